r"""Overhead of the sampler over the network evaluations it is made of.

    python -m deepinv_ud2m.benchmark.profile

times a sample and as many calls of the bare denoiser on the same batch, alternately in one run, and
reports the ratio

.. math:: \frac{\text{time of one sample}}{\text{NFE} \times \text{time of one denoiser call}} .

The ratio is taken within each pair, so that what else the machine does hits both, and the median
over the pairs is reported with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
from deepinv_ud2m.benchmark.run import machine
from deepinv_ud2m.benchmark.tasks import make_physics


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and store; returns what is stored."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    prior = load_prior(args.prior, device=args.device)
    cases = [(batch_size, 1) for batch_size in args.batch_sizes] + [(4, 16)]
    rows = [measure_overhead(prior, *case, args) for case in cases]
    result = {
        "command": "python -m deepinv_ud2m.benchmark.profile",
        "prior": args.prior,
        "machine": machine(),
        "rows": rows,
    }
    for row in rows:
        print(
            f"{row['measurements']:3d} x {row['samples']:2d} samples: overhead {row['overhead']:.3f} "
            f"[{row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f}], NFE {row['nfe']:.0f}, "
            f"{row['seconds']:.3f} s"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def measure_overhead(
    prior: torch.nn.Module, measurements: int, samples: int, args: argparse.Namespace
) -> dict:
    """
    Overhead on super-resolution by four.

    :param torch.nn.Module prior: the denoiser.
    :param int measurements: measurements sampled together.
    :param int samples: samples of each, in the same pass.
    :param argparse.Namespace args: size, pairs, device.
    :returns: one row of the result.
    """
    shape = (prior.prior_info.channels, args.size, args.size)
    physics = make_physics("sr4", shape, device=args.device)
    y = physics(torch.rand(measurements, *shape, device=args.device))
    model = UD2M(UnfoldedDenoiser(prior)).to(args.device)
    x = torch.rand(measurements * samples, *shape, device=args.device)
    level = torch.full((len(x),), 0.1, device=args.device)

    model.sample(y, physics, samples)  # warm-up; also counts the network evaluations
    nfe = round(model.nfe)
    ratios, seconds = [], []
    work = {
        "sample": lambda: model.sample(y, physics, samples),
        "network": lambda: [prior(x, level) for _ in range(nfe)],
    }
    for pair in range(args.pairs):
        order = list(work) if pair % 2 else list(work)[::-1]  # a drift of the machine cancels
        spent = {name: _timed(work[name], args.device) for name in order}
        ratios.append(spent["sample"] / spent["network"])
        seconds.append(spent["sample"])
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "measurements": measurements,
        "samples": samples,
        "size": args.size,
        "nfe": nfe,
        "pairs": args.pairs,
        "overhead": statistics.median(ratios),
        "quartiles": [low, high],
        "seconds": statistics.median(seconds),
    }


@torch.no_grad()
def _timed(work, device: str) -> float:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="mnist", help="name or folder of the prior")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs per batch size, at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"--pairs must be at least 2, got {args.pairs}")
    return args


if __name__ == "__main__":
    main()
