r"""What a sample costs: overhead over its network evaluations, stages, memory, scaling.

    python -m deepinv_ud2m.benchmark.profile

times a sample and as many calls of the bare denoiser on the same batch, alternately in one run, and
reports the ratio

.. math:: \frac{\text{time of one sample}}{\text{NFE} \times \text{time of one denoiser call}} .

The ratio is taken within each pair, so that what else the machine does hits both, and the median
over the pairs is reported with its quartiles. For every size and batch it also reports the share of each
stage (initialise, prox, noise, denoise, step), images per second and peak memory. ``--scaling`` adds the
time against N, K and the batch, with the line that fits it; ``--faster`` the gain of bfloat16, of
another memory format and of the compiler, and how far they move the samples; ``--random-weights``
profiles a published prior whose weights are not at hand. ``--samples 64 --split 16`` adds a row of 64
samples of each measurement, in passes of 16 images, against the network on 16 images: with the batch of
the highest throughput, against the best that the network can do.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.profiler import ProfilerActivity
from tqdm import tqdm

from deepinv_ud2m import UD2M, UnfoldedDenoiser, VPSchedule, load_prior
from deepinv_ud2m.benchmark.memory import peak_memory, reset_peak_memory
from deepinv_ud2m.benchmark.run import machine
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.data import mnist_digits, photograph
from deepinv_ud2m.published import PUBLISHED, random_prior

#: Stages of a sample, as the sampler names them to PyTorch's profiler; what is left is "other".
STAGES = ("initialise", "prox", "noise", "denoise", "step")


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and store; returns what is stored."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    prior = random_prior(args.prior, full_size=True) if args.random_weights else load_prior(args.prior)
    prior = prior.to(args.device)
    batches = [(batch_size, 1, None) for batch_size in args.batch_sizes]
    if args.samples > 1:
        batches.append((max(1, min(args.batch_sizes) // 4), args.samples, args.split))
    cases = [(size, *batch) for size in args.sizes for batch in batches]
    rows = [measure_overhead(prior, *case, args) for case in tqdm(cases, desc="profile")]
    result = {
        "command": " ".join(
            [*_allocator(), "python -m deepinv_ud2m.benchmark.profile", shlex.join(argv)]
        ),
        "prior": args.prior + (", random weights" if args.random_weights else ""),
        "parameters": sum(p.numel() for p in prior.parameters()),
        "machine": machine(),
        "rows": rows,
    }
    if args.scaling:
        result["scaling"] = measure_scaling(prior, args)
    if args.faster:
        result["faster"] = measure_faster(prior, args)
    print(_table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        _plot(result, args.out.with_suffix(".png"))
    return result


def _allocator() -> list[str]:
    """Settings of the C library's allocator, which decide on the time of large batches on a CPU."""
    return [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")
    ]


def measure_overhead(
    prior: torch.nn.Module,
    size: int,
    measurements: int,
    samples: int,
    split: int | None,
    args: argparse.Namespace,
) -> dict:
    """
    Overhead on super-resolution by four.

    :param torch.nn.Module prior: the denoiser.
    :param int size: height and width of the images.
    :param int measurements: measurements sampled together.
    :param int samples: samples of each.
    :param int split: most images in one pass of the network; all by default.
    :param argparse.Namespace args: pairs, device.
    :returns: one row of the result.
    """
    model, y, physics = _problem(prior, size, measurements, args.device)
    x = torch.rand(measurements * samples, _channels(prior), size, size, device=args.device)
    passes = [
        (part, torch.full((len(part),), 0.1, device=args.device)) for part in x.split(split or len(x))
    ]

    def draw():
        model.sample(y, physics, samples, batch_size=split)

    reset_peak_memory(y)
    draw()  # warm-up; also counts the network evaluations
    memory, nfe = peak_memory(y), round(model.nfe)
    ratios, seconds, of_network = [], [], []
    work = {
        "sample": draw,
        "network": lambda: [prior(*one) for one in passes for _ in range(nfe)],
    }
    for pair in tqdm(range(args.pairs), desc=f"pairs, {measurements} x {samples}", leave=False):
        order = list(work) if pair % 2 else list(work)[::-1]  # a drift of the machine cancels
        spent = {name: _timed(work[name], args.device) for name in order}
        ratios.append(spent["sample"] / spent["network"])
        seconds.append(spent["sample"])
        of_network.append(spent["network"])
    low, _, high = statistics.quantiles(ratios, n=4) if args.pairs > 1 else ratios * 3
    return {
        "measurements": measurements,
        "samples": samples,
        "split": split,
        "size": size,
        "nfe": nfe,
        "pairs": args.pairs,
        "overhead": statistics.median(ratios),
        "quartiles": [low, high],
        "seconds": statistics.median(seconds),
        "images_per_second": len(x) / statistics.median(seconds),
        "network_images_per_second": nfe * len(x) / statistics.median(of_network),
        "peak_gb": memory,
        "stages": stage_shares(model, y, physics, samples, split),
    }


def stage_shares(
    model: UD2M, y: torch.Tensor, physics, samples: int = 1, split: int | None = None
) -> dict[str, float]:
    """
    Share of each stage in the time of a sample, by PyTorch's profiler, which adds to small operations.

    :param deepinv_ud2m.UD2M model: the sampler.
    :param torch.Tensor y: measurements.
    :param deepinv.physics.Physics physics: the physics.
    :param int samples: samples of each measurement.
    :param int split: most images in one pass of the network; all by default.
    :returns: shares by stage and ``other``, which sum to one.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if y.is_cuda else [])]
    profiler = torch.profiler.profile(activities=activities)
    with profiler, torch.profiler.record_function("UD2M sample"):
        model.sample(y, physics, samples, batch_size=split)
    kind = "device_time_total" if y.is_cuda else "cpu_time_total"
    spent = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    whole = spent["UD2M sample"]
    shares = {stage: spent.get(f"UD2M {stage}", 0.0) / whole for stage in STAGES}
    return shares | {"other": 1 - sum(shares.values())}


def measure_scaling(prior: torch.nn.Module, args: argparse.Namespace) -> dict:
    """
    Time of a sample against N x K and the batch, at the first size.

    :param torch.nn.Module prior: the denoiser.
    :param argparse.Namespace args: sizes, batch sizes, pairs, device.
    :returns: for ``evaluations`` (N x K at the smallest batch) and ``batch`` (at N = K = 3): the points,
        and slope, intercept and R squared of the line of least squares.
    """
    size, batch_size = args.sizes[0], min(args.batch_sizes)
    shapes = [(1, 1), (1, 3), (3, 1), (2, 3), (3, 3), (6, 2), (3, 5)]
    evaluations = {
        n * k: _problem(prior, size, batch_size, args.device, n, k) for n, k in dict.fromkeys(shapes)
    }
    batches = {b: _problem(prior, size, b, args.device) for b in (1, 2, 4, 8, 16)}
    return {
        name: _line(points, _medians(problems, args))
        for name, problems in (("evaluations", evaluations), ("batch", batches))
        for points in [list(problems)]
    }


#: What PyTorch offers for the speed of the network; the first is what the others are compared with.
WAYS = ("float32", "channels_last", "compiled", "bfloat16", "bfloat16, compiled")


def measure_faster(prior: torch.nn.Module, args: argparse.Namespace) -> dict:
    """
    Gain of each of :data:`WAYS`, and its price, with the largest batch.

    :param torch.nn.Module prior: the denoiser.
    :param argparse.Namespace args: sizes, batch sizes, pairs, device.
    :returns: for each way, median of the time of a sample over that in float32, measured in turn, and
        root mean square of the change of the samples, which have the same random numbers.
    """
    size, batch_size = args.sizes[0], max(args.batch_sizes)
    models = {name: _problem(_faster(prior, name), size, 1, args.device)[0] for name in WAYS}
    _, y, physics = _problem(prior, size, batch_size, args.device)
    kind = torch.device(args.device).type

    def draw(name):
        generator = torch.Generator(args.device).manual_seed(0)
        with torch.autocast(kind, torch.bfloat16, enabled="bfloat16" in name):
            return models[name].sample(y, physics, generator=generator)

    samples = {name: draw(name) for name in tqdm(WAYS, desc="compiling")}  # and warm-up
    ratios = {name: [] for name in WAYS}
    for _ in tqdm(range(args.pairs), desc="faster"):
        spent = {name: _timed(lambda: draw(name), args.device) for name in WAYS}  # noqa: B023
        for name in WAYS:
            ratios[name].append(spent[name] / spent["float32"])
    return {
        name: {
            "time": statistics.median(ratios[name]),
            "change": (samples[name] - samples["float32"]).square().mean().sqrt().item(),
        }
        for name in WAYS
    }


def _faster(prior: torch.nn.Module, way: str) -> torch.nn.Module:
    """A copy of the prior in one of :data:`WAYS`; bfloat16 is set where it is called."""
    prior = copy.deepcopy(prior)
    if "channels_last" in way:
        prior.to(memory_format=torch.channels_last)
    if "compiled" in way:
        prior.compile()
    return prior


def _problem(prior, size, measurements, device, num_steps=3, num_iterations=3):
    """A sampler, measurements and their physics."""
    shape = (_channels(prior), size, size)
    physics = make_physics("sr4", shape, device=device)
    y = physics(_images(shape, measurements).to(device))
    levels = VPSchedule().sampling_levels(num_steps)
    return UD2M(UnfoldedDenoiser(prior, num_iterations), levels=levels).to(device), y, physics


def _images(shape: tuple[int, int, int], number: int) -> torch.Tensor:
    """Digits where they have that shape, else a photograph in that many places."""
    if shape == (1, 32, 32):
        return mnist_digits("test")[torch.arange(number) % 64]
    image = torch.nn.functional.interpolate(photograph("astronaut"), shape[1:], mode="area")
    if shape[0] == 1:
        image = image.mean(1, keepdim=True)
    return torch.cat([image.roll((5 * i, 9 * i), (2, 3)) for i in range(number)])


def _channels(prior) -> int:
    info = getattr(prior, "prior_info", None)
    return info.channels if info else 3  # the published ones


def _medians(problems: dict, args: argparse.Namespace) -> list[float]:
    """Seconds of a sample of each problem, the problems in turn."""
    seconds = {key: [] for key in problems}
    for turn in tqdm(range(args.pairs + 1), desc="scaling"):
        for key, (model, y, physics) in problems.items():
            spent = _timed(lambda: model.sample(y, physics), args.device)  # noqa: B023
            if turn:  # the first is a warm-up
                seconds[key].append(spent)
    return [statistics.median(values) for values in seconds.values()]


def _line(points: list[int], seconds: list[float]) -> dict:
    slope, intercept = np.polyfit(points, seconds, 1)
    residual = np.asarray(seconds) - slope * np.asarray(points) - intercept
    return {
        "points": points,
        "seconds": seconds,
        "slope": slope,
        "intercept": intercept,
        "r_squared": 1 - float(np.square(residual).sum() / np.square(seconds - np.mean(seconds)).sum()),
    }


@torch.no_grad()
def _timed(work, device: str) -> float:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def _table(result: dict) -> str:
    lines = [
        "| size | measurements x samples | NFE | overhead | quartiles | seconds | images/s "
        "| network images/s | peak GB | " + " | ".join((*STAGES, "other")) + " |",
        "|" + "---|" * (9 + len(STAGES) + 1),
    ]
    for row in result["rows"]:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['size']} | {_case(row)} | {row['nfe']} "
            f"| {row['overhead']:.3f} | {low:.3f} to {high:.3f} | {row['seconds']:.3f} "
            f"| {row['images_per_second']:.3g} | {row['network_images_per_second']:.4g} "
            f"| {row['peak_gb']:.2f} | "
            + " | ".join(f"{share:.1%}" for share in row["stages"].values())
            + " |"
        )
    for name, line in result.get("scaling", {}).items():
        lines.append(
            f"\nseconds against {name}: {line['intercept']:.4f} + {line['slope']:.4f} per unit, "
            f"R^2 {line['r_squared']:.4f}"
        )
    for name, way in result.get("faster", {}).items():
        lines.append(f"{name}: time x {way['time']:.2f}, samples change by {way['change']:.1e}")
    return "\n".join(lines)


def _case(row: dict) -> str:
    split = f", {row['split']} at a time" if row["split"] else ""
    return f"{row['measurements']} x {row['samples']}{split}"


def _plot(result: dict, file: Path) -> None:
    """Stages of each row, overhead beside them, and the scaling where it was measured."""
    scaling, rows = result.get("scaling", {}), result["rows"]
    fig, axes = plt.subplots(
        1, 1 + len(scaling), figsize=(6 + 3.5 * len(scaling), 0.4 * len(rows) + 2.6)
    )
    axes = np.atleast_1d(axes)
    labels = [f"{row['size']}x{row['size']}, {_case(row)}" for row in rows]
    left = np.zeros(len(rows))
    for stage in (*STAGES, "other"):
        share = np.array([100 * row["stages"][stage] for row in rows])
        axes[0].barh(labels, share, left=left, label=stage)
        left += share
    for place, row in enumerate(rows):
        axes[0].text(101, place, f"{row['overhead']:.3f}", va="center", fontsize=8)
    axes[0].set(xlabel="share of the time (%), and overhead ratio", xlim=(0, 112))
    axes[0].legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    for ax, (name, line) in zip(axes[1:], scaling.items(), strict=True):
        points = np.array(line["points"])
        ax.plot(points, line["seconds"], "o")
        ends = np.array([0, points.max()])
        ax.plot(ends, line["intercept"] + line["slope"] * ends, lw=1)
        title = {"evaluations": "N x K", "batch": "measurements"}[name]
        ax.set(xlabel=title, ylabel="seconds", ylim=(0, None), title=f"$R^2$ = {line['r_squared']:.4f}")
    fig.tight_layout()
    fig.savefig(file, dpi=110)
    plt.close(fig)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="mnist", help="name or folder of the prior")
    parser.add_argument(
        "--random-weights", action="store_true", help="of a published prior, in place of its own"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32], help="height and width of the images"
    )
    parser.add_argument("--samples", type=int, default=16, help="of each measurement, for one more row")
    parser.add_argument("--split", type=int, help="most images in one pass of the network, for that row")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs per row, at least 1")
    parser.add_argument("--scaling", action="store_true", help="time against N, K and the batch")
    parser.add_argument(
        "--faster", action="store_true", help="bfloat16, channels_last and torch.compile against float32"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the result; the figure goes beside it")
    args = parser.parse_args(argv)
    if args.random_weights and args.prior not in PUBLISHED:
        parser.error(f"--random-weights is for --prior of {sorted(PUBLISHED)}, got {args.prior!r}")
    for name in ("batch_sizes", "sizes", "samples", "split", "pairs", "threads"):
        values = getattr(args, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {values}")
    return args


if __name__ == "__main__":
    main()
