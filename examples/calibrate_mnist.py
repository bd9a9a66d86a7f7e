r"""
Set the spread of a sampler of digits
=====================================

A trained sampler may spread its samples too little or too much. The noise of its iterations,
:math:`\delta_k`, is the dial: with more of it the samples differ more, and each is less accurate. This
tries factors of all :math:`\delta_k` on validation digits and writes the sampler with the one whose
credible balls cover the truth best, on average over the tasks:

.. code-block:: bash

    python examples/calibrate_mnist.py runs/ud2m_mnist/model --out runs/calibrated

It prints what the spread costs in PSNR, and what it does to the energy score, and saves the coverage of
every factor as a figure.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

import deepinv as dinv
import matplotlib
import torch
from tqdm import tqdm
from train_mnist import ALL_TASKS

from deepinv_ud2m.benchmark.run import measure
from deepinv_ud2m.benchmark.tasks import TASKS, make_physics
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import coverage_curve, coverage_error, credible_level, energy_score
from deepinv_ud2m.training import sampler_to_train

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description="Set the spread of a sampler of digits.")
    parser.add_argument("sampler", help="name or folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.05, 1.1, 1.15])
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=ALL_TASKS, metavar="TASK")
    parser.add_argument("--sigma-y", type=float, default=0.05)
    parser.add_argument("--images", type=int, default=256, help="validation digits, at most 256")
    parser.add_argument("--samples", type=int, default=8, help="per measurement, at least 2")
    args = parser.parse_args(argv)
    for name, values in (("factors", args.factors), ("sigma-y", [args.sigma_y])):
        if not all(0 < value < float("inf") for value in values):
            parser.error(f"--{name} must be positive and finite, got {values}")
    if args.samples < 2:
        parser.error(f"--samples must be at least 2, got {args.samples}")
    if not 1 <= args.images <= 256:
        parser.error(f"--images must be from 1 to 256, got {args.images}")
    if args.out.resolve() == Path(args.sampler).resolve():
        parser.error(f"--out must be another folder than that of the sampler, got {args.out} for both")
    if args.out.is_file():
        parser.error(f"--out must be a folder, got the file {args.out}")
    return args


def main():
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = sampler_to_train(args.sampler).to(device)
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is found out before the work
    x = mnist_digits("validation", num=args.images).to(device)
    trained = model.unfolded.log_delta.detach().clone()

    # %%
    # Every factor on every task.
    results = {factor: {} for factor in args.factors}
    pairs = [(factor, task) for factor in args.factors for task in args.tasks]
    for factor, task in tqdm(pairs, desc="Factors and tasks"):
        set_factor(model, trained, factor)
        results[factor][task] = evaluate(model, task, x, args)
    report(results)

    # %%
    # The sampler with the best of them, and the figure.
    best = min(args.factors, key=lambda factor: mean_error(results[factor]))
    set_factor(model, trained, best)
    metadata = {
        "command": shlex.join(["python", "examples/calibrate_mnist.py", *sys.argv[1:]]),
        "delta_factor": best,
        "validation": results[best],
    }
    model.save_pretrained(args.out, metadata=metadata, dtype=torch.float16)
    print(f"factor {best:g} written to {args.out}: UD2M.from_pretrained({str(args.out)!r})")
    plot(results, args.out / "coverage.png")


def set_factor(model, trained, factor):
    with torch.no_grad():
        model.unfolded.log_delta.copy_(trained + math.log(factor))


def evaluate(model, task, x, args):
    physics = make_physics(task, x.shape[1:], sigma_y=args.sigma_y, device=x.device)
    # The same measurements and random numbers for every factor: little of the differences is chance.
    generator = torch.Generator(x.device).manual_seed(0)
    samples = []
    for part in torch.arange(len(x)).split(32):
        y = measure(physics, x[part], part.tolist(), seed=0)
        with torch.no_grad():
            samples.append(model.sample(y, physics, args.samples, generator=generator))
    samples = torch.cat(samples, 1).clamp(0, 1)
    psnr = dinv.metric.PSNR()
    nominal = levels(args.samples)
    covered = coverage_curve(credible_level(samples, x).cpu(), nominal)
    return {
        "coverage": covered.tolist(),
        "coverage error": coverage_error(nominal, covered).item(),
        "energy score": energy_score(samples, x).mean().item(),
        "PSNR": torch.stack([psnr(sample, x).mean() for sample in samples]).mean().item(),
        "PSNR of the mean": psnr(samples.mean(0), x).mean().item(),
    }


def levels(num_samples):
    return torch.arange(1, num_samples + 1, dtype=torch.float64) / (num_samples + 1)


def mean_error(of_tasks):
    return sum(result["coverage error"] for result in of_tasks.values()) / len(of_tasks)


def report(results):
    for factor, of_tasks in results.items():
        for task, numbers in of_tasks.items():
            said = ", ".join(f"{n} {v:.3f}" for n, v in numbers.items() if n != "coverage")
            print(f"x {factor:<5g} {task:16s} {said}")
        print(f"x {factor:<5g} mean coverage error {mean_error(of_tasks):.3f}")


def plot(results, file):
    tasks = list(next(iter(results.values())))
    figure, _ = plt.subplots(1, len(tasks), figsize=(3.2 * len(tasks), 3.4), sharey=True)
    for axis, task in zip(figure.axes, tasks, strict=True):
        for factor, of_tasks in results.items():
            covered = of_tasks[task]["coverage"]
            axis.plot(levels(len(covered)), covered, ".-", label=f"{factor:g}")
        axis.plot([0, 1], [0, 1], "k:", lw=1)
        axis.set(title=task, xlabel="nominal", xlim=(0, 1), ylim=(0, 1))
    figure.axes[0].set_ylabel("truth inside the ball")
    figure.axes[0].legend(title="factor of delta")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    print(f"saved {file}")


if __name__ == "__main__":
    main()
