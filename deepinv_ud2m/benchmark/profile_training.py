r"""Cost of a step of distillation next to the parts it is made of.

    python -m deepinv_ud2m.benchmark.profile_training

times in turn, in one run,

- a step of :class:`deepinv_ud2m.training.DistillationTrainer` with the paper's losses (l2, perceptual,
  adversarial) and a discriminator,
- its parts alone: K forward and backward passes of the denoiser with its adapter, the losses, the update
  of the discriminator,
- a step and one more pass of the generator, forward and backward, for the discriminator's update,

and measures the memory of a step with and without checkpointing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from deepinv.training import AdversarialOptimizer
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora, load_prior
from deepinv_ud2m.benchmark.memory import peak_memory, reset_peak_memory
from deepinv_ud2m.benchmark.run import machine
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    ConditionalDiscriminator,
    DistillationTrainer,
    L2Loss,
    PerceptualLoss,
    parameter_groups,
)
from deepinv_ud2m.training.losses import condition


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and store; returns what is stored."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    memory = {name: _in_a_process(_memory, args, name == "checkpointing") for name in _MEMORY}
    trainer = _make_trainer(args)
    seconds = {"step": [], "parts": [], "two passes": []}
    work = {
        "step": lambda: trainer.train_step(0),
        "parts": lambda: _parts(trainer),
        "two passes": lambda: _two_passes(trainer),
    }
    for function in work.values():  # warm-up
        function()
    for turn in range(args.rounds):
        for name in list(work) if turn % 2 else list(work)[::-1]:
            start = time.perf_counter()
            work[name]()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "command": shlex.join(["python", "-m", "deepinv_ud2m.benchmark.profile_training", *argv]),
        "machine": machine(),
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "seconds": medians,
        "step_over_parts": _ratio(seconds, "step", "parts"),
        "step_over_two_passes": _ratio(seconds, "step", "two passes"),
        "memory_gb": memory,
        "memory_saved_by_checkpointing": 1 - memory["checkpointing"] / memory["plain"],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def _make_trainer(args: argparse.Namespace, checkpointing: bool = False) -> DistillationTrainer:
    prior = load_prior(args.prior)
    add_lora(prior, 5, targets="all-convs")
    unfolded = UnfoldedDenoiser(prior, num_iterations=3)
    shape = (prior.prior_info.channels, 32, 32)
    x = torch.rand(args.batch_size, *shape, generator=torch.Generator().manual_seed(0))
    discriminator = ConditionalDiscriminator(shape[0])
    trainer = DistillationTrainer(
        model=UD2M(unfolded),
        physics=make_physics("sr4", shape),
        train_dataloader=DataLoader(x, args.batch_size),
        losses=[L2Loss(), PerceptualLoss("digits", weight=0.1), AdversarialGeneratorLoss(weight=0.01)],
        D=discriminator,
        losses_d=AdversarialDiscriminatorLoss(),
        optimizer=AdversarialOptimizer(
            torch.optim.AdamW(parameter_groups(unfolded)), torch.optim.AdamW(discriminator.parameters())
        ),
        checkpointing=checkpointing,
        verbose=False,
        device="cpu",
    )
    trainer.setup_train()
    return trainer


def _parts(trainer: DistillationTrainer) -> None:
    """K passes of the denoiser, the losses and the update of the discriminator, nothing else."""
    x = next(trainer._streams[0])
    physics = trainer.physics[0]
    y = physics(x)
    level = torch.full((len(x),), 0.3)
    for _ in range(trainer.unfolded.num_iterations):
        w = x.clone().requires_grad_()
        trainer.unfolded.denoiser(w, level).sum().backward()
    batch = {"x": x, "y": y, "physics": physics, "sigma": level, "condition": condition(y, physics)}
    draws = (x + 0.1)[None].requires_grad_()
    batch |= {"samples": draws, "x_net": draws[0], "step": 0}
    sum(trainer._loss(loss, batch) for loss in trainer.losses).backward()
    drawn = {"samples": draws.detach(), "x_net": draws[0].detach(), "micro_step": 0}
    trainer._train_discriminator([batch | drawn], 0)


def _two_passes(trainer: DistillationTrainer) -> None:
    """A step, and the generator once more."""
    trainer.train_step(0)
    x = next(trainer._streams[0])
    trainer.draw(x, trainer.physics[0](x), trainer.physics[0])["samples"].sum().backward()


def _in_a_process(function, *arguments):
    """In a process of its own: what an allocator keeps from one measurement hides the next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _memory(args: argparse.Namespace, checkpointing: bool) -> float:
    """Peak of a step above what was there before, in GB."""
    torch.set_num_threads(args.threads)
    small = argparse.Namespace(**{**vars(args), "batch_size": 1})
    _make_trainer(small, checkpointing).train_step(0)  # libraries load what they need
    trainer = _make_trainer(args, checkpointing)
    y = torch.zeros(1)
    reset_peak_memory(y)
    before = peak_memory(y)
    trainer.train_step(0)
    return peak_memory(y) - before


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="mnist", help="name or folder of the prior")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    return parser.parse_args(argv)


_MEMORY = ("checkpointing", "plain")

if __name__ == "__main__":
    main()
