"""Command line: ``python -m deepinv_ud2m.benchmark {run,time,tune,report}``; see ``--help`` of each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from deepinv_ud2m.benchmark.methods import METHODS
from deepinv_ud2m.benchmark.report import report
from deepinv_ud2m.benchmark.run import Results, Setup, parse_method, run_method
from deepinv_ud2m.benchmark.tasks import TASKS
from deepinv_ud2m.benchmark.timing import time_methods
from deepinv_ud2m.benchmark.tune import best_settings, merge_searches, tune
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import DigitClassifier
from deepinv_ud2m.priors import load_prior

DEFAULT_TASKS = ["sr4", "deblur-gaussian", "inpaint-random", "inpaint-box"]
DEFAULT_METHODS = ["ud2m", "diffpir", "ddrm", "pigdm", "dps:num_steps=100", "dpir", "pinv"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.quick:
        args.tasks, args.methods = ["sr4", "inpaint-random"], ["ud2m", "diffpir", "pinv"]
        args.images, args.samples = 4, 4
    x = _images(args)
    tuned = merge_searches(args.settings)
    setup = Setup(args.prior, args.data, args.sigma_y, args.seed, args.batch_size)
    results = Results(args.out, setup)
    prior = load_prior(args.prior, args.device)
    for task in args.tasks:
        for method in args.methods:
            settings = best_settings(tuned, task, method)
            run_method(results, prior, x, task, method, settings, args.samples)
    _report(args)


def _time(args: argparse.Namespace) -> None:
    x = _images(args)
    tuned = merge_searches(args.settings)
    prior = load_prior(args.prior, args.device)
    time_methods(args.out, prior, x, args.tasks, args.methods, tuned, args.sigma_y, args.rounds)
    _report(args)


def _tune(args: argparse.Namespace) -> None:
    args.data = "validation"
    x = _images(args)
    prior = load_prior(args.prior, args.device)
    result = tune(prior, x, args.tasks, args.methods, args.settings, args.sigma_y)
    for task in args.tasks:
        for method in args.methods:
            print(f"{task}, {method}: {best_settings(result, task, method)}")


def _report(args: argparse.Namespace) -> None:
    x = _images(args)
    reference = mnist_digits("test")
    report(args.out, x, reference, DigitClassifier.from_pretrained().features)
    print((args.out / "report.md").read_text())


def _images(args: argparse.Namespace) -> Tensor:
    if args.images < 1:
        raise ValueError(f"--images must be at least 1, got {args.images}")
    for task in args.tasks:
        if task not in TASKS:
            raise ValueError(f"task must be one of {sorted(TASKS)}, got {task!r}")
    for method in args.methods:
        parse_method(method)
    return mnist_digits(args.data, num=args.images).to(args.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deepinv_ud2m.benchmark", description=__doc__)
    commands = parser.add_subparsers(required=True)
    helps = {
        "run": "run methods on tasks, and report",
        "time": "measure seconds and memory of the methods side by side, and report",
        "tune": "search the settings of the methods on validation images",
        "report": "write tables and figures of a folder of results",
    }
    for name, command, images in (
        ("run", _run, 64),
        ("time", _time, 16),
        ("tune", _tune, 16),
        ("report", _report, 64),
    ):
        sub = commands.add_parser(name, help=helps[name])
        sub.set_defaults(command=command)
        sub.add_argument("--prior", default="mnist", help="name or folder of the prior")
        sub.add_argument("--tasks", nargs="+", default=DEFAULT_TASKS, help=f"of {', '.join(TASKS)}")
        sub.add_argument(
            "--methods",
            nargs="+",
            default=DEFAULT_METHODS,
            help=f"of {', '.join(METHODS)}, with settings as in diffpir:num_steps=20",
        )
        sub.add_argument("--images", type=int, default=images, help="number of images")
        sub.add_argument("--sigma-y", type=float, default=0.05, help="noise level")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--data", choices=["test", "validation"], default="test", help="shipped digits")
        if name != "tune":
            sub.add_argument(
                "--out", type=Path, default=Path("runs/benchmark"), help="folder of results"
            )
        if name in ("run", "time"):
            sub.add_argument(
                "--settings",
                type=Path,
                nargs="+",
                default=[],
                help="results of tune; the defaults of the methods without them",
            )
    run, time_, tune_, _ = commands.choices.values()
    run.add_argument("--samples", type=int, default=1, help="samples per image")
    run.add_argument("--batch-size", type=int, default=16, help="images sampled together")
    run.add_argument("--seed", type=int, default=0)
    time_.add_argument("--rounds", type=int, default=3, help="times each method is measured")
    run.add_argument("--quick", action="store_true", help="2 tasks, 3 methods, 4 images")
    tune_.add_argument("--settings", type=Path, default=Path("runs/settings.json"), help="file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
