r"""One sample and one training step at the scale of the paper, with random weights.

    python -m deepinv_ud2m.benchmark.paper_scale --out runs/paper_scale.json

builds the network of a published prior (``imagenet256``: ADM, 552.8 million parameters), puts LoRA of
rank 5 on its attention and frees its output layer, draws one sample of 9 network evaluations and takes
one training step (K = 3, batch 2, squared error, perceptual distance and discriminator), and reports
seconds, peak memory (of the device, and of the tensors alone: what a GPU has to hold) and how many
parameters are trained. What a step computes does not depend on the weights, so neither do time and
memory. A quarter of an hour on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from deepinv.training import AdversarialOptimizer
from torch import nn
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora
from deepinv_ud2m.benchmark.memory import LiveTensors, peak_memory, reset_peak_memory
from deepinv_ud2m.benchmark.run import machine
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.published import PUBLISHED, random_prior
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    ConditionalDiscriminator,
    DistillationTrainer,
    L2Loss,
    PerceptualLoss,
    parameter_groups,
)


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and store after each part; returns what is stored."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    prior = random_prior(args.prior, full_size=not args.small).to(args.device)
    total = sum(p.numel() for p in prior.parameters())
    add_lora(prior, args.rank)
    prior.output_layer.requires_grad_(True)
    unfolded = UnfoldedDenoiser(prior, num_iterations=3)
    trained = sum(p.numel() for p in unfolded.parameters() if p.requires_grad)
    result = {
        "command": shlex.join(["python", "-m", "deepinv_ud2m.benchmark.paper_scale", *argv]),
        "prior": f"{args.prior}, random weights" + (", small" if args.small else ""),
        "size": args.size,
        "machine": machine(),
        "bfloat16": args.bfloat16,
        "parameters": total,
        "trained": trained,
        "trained_share": trained / total,
    }
    _store(result, args)
    result["sample"] = _measure(lambda y, physics: _sample(unfolded, y, physics, args), 1, args)
    _store(result, args)
    x = torch.rand(args.batch_size, 3, args.size, args.size)
    trainer = _make_trainer(unfolded, x, args)
    step = _measure(lambda y, physics: trainer.train_step(0), args.batch_size, args)
    result["training_step"] = step | {"checkpointing": args.checkpointing, "batch_size": args.batch_size}
    _store(result, args)
    return result


def _measure(work, batch_size: int, args: argparse.Namespace) -> dict:
    """Seconds and peak memory (GiB) of one call on a batch of measurements, and what it returns."""
    physics = make_physics("sr4", (3, args.size, args.size), device=args.device)
    y = physics(torch.rand(batch_size, 3, args.size, args.size, device=args.device))
    reset_peak_memory(y)
    before = peak_memory(y)
    with LiveTensors() as tensors:
        start = time.perf_counter()
        found = work(y, physics)
        if y.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = peak_memory(y)
    memory = {"peak_gb": peak, "peak_gb_above_start": peak - before, "tensors_gb": tensors.peak / 2**30}
    return {"seconds": seconds, **memory, **found}


def _sample(unfolded: UnfoldedDenoiser, y, physics, args: argparse.Namespace) -> dict:
    model = UD2M(unfolded)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
        sample = model(y, physics)
    return {"nfe": model.nfe, "finite": bool(sample.isfinite().all())}


def _make_trainer(unfolded: nn.Module, x: torch.Tensor, args: argparse.Namespace) -> DistillationTrainer:
    D = ConditionalDiscriminator(3)
    trainer = DistillationTrainer(
        model=UD2M(unfolded),
        physics=make_physics("sr4", tuple(x.shape[1:]), device=args.device),
        train_dataloader=DataLoader(x, len(x)),
        losses=[
            L2Loss(),
            PerceptualLoss(args.perceptual, weight=0.1),
            AdversarialGeneratorLoss(weight=0.01),
        ],
        D=D,
        losses_d=AdversarialDiscriminatorLoss(penalty_weight=0.01),
        optimizer=AdversarialOptimizer(
            torch.optim.AdamW(parameter_groups(unfolded)), torch.optim.AdamW(D.parameters())
        ),
        mixed_precision="bfloat16" if args.bfloat16 else False,
        checkpointing=args.checkpointing,
        device=args.device,
        verbose=False,
    )
    trainer.setup_train()
    return trainer


def _store(result: dict, args: argparse.Namespace) -> None:
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", choices=sorted(PUBLISHED), default="imagenet256")
    parser.add_argument("--small", action="store_true", help="a small network of its class, to try this")
    parser.add_argument("--size", type=int, default=256, help="height and width of the images")
    parser.add_argument("--batch-size", type=int, default=2, help="of the training step")
    parser.add_argument("--rank", type=int, default=5, help="of LoRA")
    parser.add_argument(
        "--perceptual", default="efficientnet", help="network of the perceptual distance"
    )
    parser.add_argument("--bfloat16", action="store_true", help="the network in bfloat16")
    parser.add_argument(
        "--checkpointing", action="store_true", help="keep only the input of each iteration"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the result, written after each part")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.threads < 1:
        parser.error("--batch-size and --threads must be at least 1")
    return args


if __name__ == "__main__":
    main()
