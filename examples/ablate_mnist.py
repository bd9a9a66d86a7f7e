r"""
What matters in the distillation: an ablation on digits
=======================================================

The paper's ablation: K unfolded iterations in each of N steps, with :math:`K N = 16` network evaluations
per sample, before and after training; and, with K = N = 3, the losses and what is trained. Every variant
is trained by ``train_mnist.py`` on the paper's super-resolution of digits, on as many measurements as
the others, and drawn from on the same validation digits. It takes hours; a stopped run goes on when it
is started again.

.. code-block:: bash

    python examples/ablate_mnist.py --fast
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import train_mnist

from deepinv_ud2m import UD2M
from deepinv_ud2m.benchmark.run import evaluate, measure
from deepinv_ud2m.benchmark.tasks import TASKS, make_physics
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import coverage, coverage_error

TASK, SIGMA_Y = "sr4-paper", 0.05
METRICS = ["energy_score", "psnr", "psnr_mean", "perceptual"]
PLOTTED = {
    "energy_score": "energy score",
    "psnr_mean": "PSNR of the mean (dB)",
    "perceptual": "perceptual distance",
}
SMALLER_STEPS = ["--lr", "7e-4"]  # all weights at once move further than an adapter does
VARIANTS = {
    **{f"K = {k}, N = {16 // k}": ["--iterations", k, "--steps", 16 // k] for k in (1, 2, 4, 8, 16)},
    "K = 3, N = 3": [],
    "squared error": ["--loss", "l2"],
    "adversarial": ["--loss", "adversarial"],
    "LoRA of rank 1": ["--rank", 1],
    "LoRA of rank 20": ["--rank", 20],
    "all weights": ["--rank", 0, *SMALLER_STEPS],
}


def main():
    parser = argparse.ArgumentParser(description="Ablation of the distillation, on digits.")
    parser.add_argument("--train", help="training digits, npz; torchvision downloads them if absent")
    parser.add_argument("--updates", type=int, default=200, help="optimiser steps, of 16 measurements")
    parser.add_argument("--images", type=int, default=128, help="validation digits")
    parser.add_argument("--samples", type=int, default=16, help="of each")
    parser.add_argument("--fast", action="store_true", help="as in train_mnist.py")
    everything = {"choices": VARIANTS, "default": list(VARIANTS), "metavar": "NAME"}
    parser.add_argument("--variants", nargs="+", help="all by default", **everything)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    if not 2 <= args.images <= 256:
        parser.error(f"--images must be from 2 to 256, got {args.images}")
    if args.samples < 2:
        parser.error(f"--samples must be at least 2, got {args.samples}")
    if args.updates < 1:
        parser.error(f"--updates must be at least 1, got {args.updates}")
    args.out.mkdir(parents=True, exist_ok=True)

    rows = []
    for number, name in enumerate(args.variants, 1):
        print(f"[{number}/{len(args.variants)}] {name}")
        rows.append(run_variant(name, args))
        (args.out / "ablation.json").write_text(json.dumps(rows, indent=2))
        (args.out / "ablation.md").write_text(table(rows, args))
        plot(rows, args.out / "ablation.png")
    print(f"written to {args.out}: ablation.md, ablation.json, ablation.png")


def run_variant(name, args):
    # What was trained or scored with other numbers is not taken for this.
    folder = args.out / f"{name.replace(' ', '').replace(',', '_').lower()}_{args.updates}"
    file = folder / f"scores_{args.images}x{args.samples}.json"
    if file.is_file():
        return json.loads(file.read_text())
    options = train_options(name, folder, args)
    if not (folder / "model" / "config.json").is_file():
        training = subprocess.run([sys.executable, train_mnist.__file__, *options], check=False)
        if training.returncode:
            sys.exit(f"{name}: train_mnist.py stopped with the error above; variants done are kept")
    untrained = train_mnist.make_model(train_mnist.parse_arguments(options))
    trained = UD2M.from_pretrained(folder / "model")
    row = {"variant": name, "updates": args.updates, "images": args.images, "samples": args.samples}
    row["untrained"], row["trained"] = score(untrained, args), score(trained, args)
    row["trained parameters"] = sum(p.numel() for p in untrained.parameters() if p.requires_grad)
    file.write_text(json.dumps(row, indent=2))
    return row


def train_options(name, folder, args):
    options = ["--tasks", TASK, "--sigma-y", SIGMA_Y, SIGMA_Y, "--updates", args.updates]
    options += ["--lr", 2e-3, "--lr-scalars", 5e-3, "--own-levels", 0.8]
    options += ["--eval-interval", args.updates, "--out", folder]
    options += ["--train", args.train] if args.train else []
    options += ["--fast"] if args.fast else []
    return [str(option) for option in [*options, *VARIANTS[name]]]  # the last of two equal ones counts


def score(model, args):
    """Means over digits, and the standard error of the energy score."""
    x = mnist_digits("validation", num=args.images)
    physics = make_physics(TASK, (1, 32, 32), SIGMA_Y)
    y = measure(physics, x, range(len(x)), seed=0)
    generator = torch.Generator().manual_seed(0)
    samples = model.sample(y, physics, args.samples, batch_size=64, generator=generator).clamp(0, 1)
    columns = {name: [row[name] for row in evaluate(samples, x, y, physics)] for name in METRICS}
    scores = {name: float(np.mean(values)) for name, values in columns.items()}
    scores["energy_score_se"] = float(np.std(columns["energy_score"], ddof=1) / len(x) ** 0.5)
    return scores | {"nfe": model.nfe, "coverage_error": coverage_error(*coverage(samples, x)).item()}


def table(rows, args):
    lines = [
        f"# Ablation, {TASKS[TASK].title}, noise {SIGMA_Y}",
        "",
        f"Each variant trained on {args.updates * 16} measurements; {args.images} validation digits, "
        f"{args.samples} samples of each. PSNR and perceptual distance (shipped digit classifier) are "
        "those of one sample.",
        "",
        "| variant | trained parameters | NFE | | energy score | PSNR | PSNR of the mean | perceptual "
        "| coverage error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for state in ("untrained", "trained"):
            s = row[state]
            lines.append(
                f"| {row['variant']} | {row['trained parameters']} | {s['nfe']:.0f} | {state} "
                f"| {s['energy_score']:.3f} ± {s['energy_score_se']:.3f} | {s['psnr']:.2f} "
                f"| {s['psnr_mean']:.2f} | {s['perceptual']:.3f} | {s['coverage_error']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def plot(rows, file):
    size = (13, 0.3 * len(rows) + 1.7)
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, layout="constrained")
    names = [row["variant"] for row in rows]
    for axis, (key, title) in zip(axes, PLOTTED.items(), strict=True):
        untrained, trained = ([row[state][key] for row in rows] for state in ("untrained", "trained"))
        axis.hlines(names, untrained, trained, color="0.8")
        axis.plot(untrained, names, "o", color="0.6", label="untrained")
        axis.plot(trained, names, "o", label="trained")
        axis.set(title=title)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
