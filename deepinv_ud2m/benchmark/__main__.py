"""``python -m deepinv_ud2m.benchmark {run,time,tune,report,gaussian}``; see ``--help`` of each."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from deepinv.models import Denoiser
from torch import Tensor

from deepinv_ud2m.benchmark.gaussian import gaussian_report
from deepinv_ud2m.benchmark.methods import METHODS
from deepinv_ud2m.benchmark.report import report, store
from deepinv_ud2m.benchmark.run import (
    Results,
    Setup,
    check_setup,
    parse_method,
    perceptual_distance,
    perceptual_network,
    run_method,
)
from deepinv_ud2m.benchmark.tasks import TASKS
from deepinv_ud2m.benchmark.timing import time_methods
from deepinv_ud2m.benchmark.tune import best_settings, merge_searches, tune
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.data import load_images, mnist_digits
from deepinv_ud2m.pretrained import fingerprint
from deepinv_ud2m.priors import load_prior
from deepinv_ud2m.training.parallel import rank

SPLITS = ("test", "validation")
GAUSSIAN_TASKS = ["inpaint-random", "deblur-gaussian"]
DEFAULT_TASKS = ["sr4", "deblur-gaussian", "inpaint-random", "inpaint-box"]
QUICK_TASKS = ["sr4", "inpaint-random"]
QUICK_METHODS = ["ud2m-distilled", "diffpir", "pinv"]
DEFAULT_METHODS = [
    "ud2m-distilled",
    "ud2m",
    "diffpir",
    "ddrm",
    "pigdm",
    "dps:num_steps=100",
    "dpir",
    "pinv",
]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        with _processes(args):
            args.command(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _processes(args: argparse.Namespace) -> Iterator[None]:
    """Join the other processes of torchrun, each on a device of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if args.command is not _run:
        raise ValueError("only run shares its work between processes: start the others without torchrun")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _run(args: argparse.Namespace) -> None:
    if args.quick:  # what is given wins
        args.tasks = QUICK_TASKS if args.tasks is DEFAULT_TASKS else args.tasks
        args.methods = QUICK_METHODS if args.methods is DEFAULT_METHODS else args.methods
        args.samples = args.samples or 4
    samples = 1 if args.samples is None else check_count("--samples", args.samples)
    prior, x = _prior_and_images(args)
    if args.quick and args.images is None:
        x = x[:4]
    tuned = _searches(args, prior)
    data, weights = _name_of_data(args, x), fingerprint(prior)
    judge = perceptual_network(tuple(x.shape[1:]))
    setup = Setup(args.prior, data, args.sigma_y, args.seed, args.batch_size, weights, judge)
    results = Results(args.out, setup)
    for task in args.tasks:
        for method in args.methods:
            settings = best_settings(tuned, task, method)
            run_method(results, prior, x, task, method, settings, samples)
    if rank() == 0:
        _write_report(args, x)


def _time(args: argparse.Namespace) -> None:
    prior, x = _prior_and_images(args)
    tuned = _searches(args, prior)
    setup = {"prior": args.prior, "data": _name_of_data(args, x), "prior_weights": fingerprint(prior)}
    check_setup(args.out, **setup)
    time_methods(args.out, prior, x, args.tasks, args.methods, tuned, args.sigma_y, args.rounds)
    _write_report(args, x)


def _tune(args: argparse.Namespace) -> None:
    prior, x = _prior_and_images(args)
    data = _name_of_data(args, x)
    options = {"data": data, "grid": _grid(args)}
    result = tune(prior, x, args.tasks, args.methods, args.settings, args.sigma_y, **options)
    for task in args.tasks:
        for method in args.methods:
            print(f"{task}, {method}: {best_settings(result, task, method)}")


def _grid(args: argparse.Namespace) -> dict[str, list]:
    grid = {}
    for pair in args.grid:
        name, _, values = pair.partition("=")
        if not values:
            raise ValueError(f"--grid is written setting=value,value, got {pair!r}")
        grid[name] = [_value(value) for value in values.split(",")]
    return grid


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # a word


def _report(args: argparse.Namespace) -> None:
    _, x = _prior_and_images(args)
    check_setup(args.out, prior=args.prior, data=_name_of_data(args, x))
    _write_report(args, x)
    if args.store:
        store(args.out, args.store)


def _gaussian(args: argparse.Namespace) -> None:
    tuned = merge_searches(args.settings)
    options = {"num_images": args.images, "num_samples": args.samples, "settings": tuned}
    options |= {"sigma_y": args.sigma_y, "seed": args.seed, "size": args.size}
    gaussian_report(args.out, args.methods, tasks=args.tasks, **options)
    print((args.out / "gaussian.md").read_text())


def _write_report(args: argparse.Namespace, x: Tensor) -> None:
    network = perceptual_network(tuple(x.shape[1:]))
    # The distance to digits is taken to all that ship; other images have no more than themselves.
    reference = mnist_digits("test") if network == "digits" else x
    features = perceptual_distance(network).to(x.device).distance.backbone.features if network else None
    report(args.out, x, reference.to(x.device), features)
    print((args.out / "report.md").read_text())


def _searches(args: argparse.Namespace, prior: Denoiser) -> dict:
    """The tuned settings; those of another prior may be of use, and are told of."""
    tuned, weights = merge_searches(args.settings), fingerprint(prior)
    for file in args.settings:
        other = json.loads(file.read_text()).get("prior_weights", weights)
        if other != weights:
            print(f"--settings: {file} was tuned with other weights of the prior", file=sys.stderr)
    return tuned


def _name_of_data(args: argparse.Namespace, x: Tensor) -> str:
    return args.data if args.data in SPLITS else f"{args.data}, {x.shape[-1]}x{x.shape[-1]}"


def _prior_and_images(args: argparse.Namespace) -> tuple[Denoiser, Tensor]:
    for task in args.tasks:
        if task not in TASKS:
            raise ValueError(f"task must be one of {sorted(TASKS)}, got {task!r}")
    for method in args.methods:
        parse_method(method)
    if args.images is not None and args.images < 1:
        raise ValueError(f"--images must be at least 1, got {args.images}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {args.device!r}, but there is no CUDA device here")
    prior = load_prior(args.prior, args.device)
    if args.data in SPLITS:
        if args.size is not None:
            raise ValueError(
                f"--size is for a folder or dataset, the shipped digits are 32x32; got {args.size}"
            )
        if prior.prior_info.channels != 1:
            raise ValueError(
                f"--data, a folder of images, must be given for the prior {args.prior!r}: the shipped "
                f"digits are grey, it takes images of {prior.prior_info.channels} channels"
            )
        return prior, mnist_digits(args.data, num=args.images or 64).to(args.device)
    info = prior.prior_info
    size = args.size or info.image_size
    if size is None:
        raise ValueError(f"--size, the side of the crops, must be given for the prior {args.prior!r}")
    options = {"root": args.data_root, "skip_small": args.skip_small}
    x = load_images(args.data, info.channels, size, args.images, info.size_multiple, **options)
    return prior, x.to(args.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deepinv_ud2m.benchmark", description=__doc__)
    commands = parser.add_subparsers(required=True)
    helps = {
        "run": (_run, "run methods on tasks, and report"),
        "time": (_time, "measure seconds and memory of the methods side by side, and report"),
        "tune": (_tune, "search the settings of the methods on validation images"),
        "report": (_report, "write tables and figures of a folder of results"),
        "gaussian": (_gaussian, "compare with the exact posterior of a Gaussian prior"),
    }
    for name, (command, text) in helps.items():
        commands.add_parser(name, help=text).set_defaults(command=command)
    run, time_, tune_, report_, gaussian = commands.choices.values()
    for sub in (run, time_, tune_, report_):
        _add_data(sub, default="validation" if sub is tune_ else "test")
    for sub in commands.choices.values():
        tasks = GAUSSIAN_TASKS if sub is gaussian else DEFAULT_TASKS
        untrained = [method for method in DEFAULT_METHODS if method != "ud2m-distilled"]
        methods = untrained if sub is gaussian else DEFAULT_METHODS
        sub.add_argument("--tasks", nargs="+", default=tasks, help=f"of {', '.join(TASKS)}")
        sub.add_argument(
            "--methods",
            nargs="+",
            default=methods,
            help=f"of {', '.join(METHODS)}, with settings as in diffpir:num_steps=20",
        )
        sub.add_argument("--sigma-y", type=float, default=0.05, help="noise level")
        if sub is not tune_:
            default = Path("runs/gaussian" if sub is gaussian else "runs/benchmark")
            sub.add_argument("--out", type=Path, default=default, help="folder of results")
    for sub in (run, time_, gaussian):
        sub.add_argument(
            "--settings",
            type=Path,
            nargs="+",
            default=[],
            help="results of tune; the defaults of the methods without them",
        )
    for sub in (run, gaussian):
        sub.add_argument(
            "--samples",
            type=int,
            default=None if sub is run else 16,
            help=f"samples per image (default: {1 if sub is run else 16})",
        )
        sub.add_argument("--seed", type=int, default=0)
    report_.add_argument("--store", type=Path, help="folder to copy the report and the packed rows into")
    run.add_argument("--batch-size", type=int, default=16, help="images sampled together")
    run.add_argument(
        "--quick", action="store_true", help="2 tasks, 3 methods, 4 images, where not given"
    )
    time_.add_argument("--rounds", type=int, default=3, help="times each method is measured")
    tune_.add_argument("--settings", type=Path, default=Path("runs/settings.json"), help="file to write")
    tune_.add_argument(
        "--grid",
        nargs="+",
        default=[],
        metavar="SETTING=VALUE,VALUE",
        help="values to try in place of the declared ones, as in weight=10,30,100",
    )
    gaussian.add_argument("--images", type=int, default=256, help="images drawn from the prior")
    gaussian.add_argument("--size", type=int, default=16, help="side of the images")
    return parser


def _add_data(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument("--prior", default="mnist", help="name or folder of the prior")
    sub.add_argument(
        "--data",
        default=default,
        help=f"shipped digits ({', '.join(SPLITS)}), a folder of images, or a dataset of deepinv",
    )
    sub.add_argument("--data-root", help="folder of a dataset of deepinv")
    sub.add_argument("--size", type=int, help="side of the crops of a folder or dataset")
    sub.add_argument(
        "--skip-small", action="store_true", help="leave out images that have no room for a crop"
    )
    sub.add_argument("--images", type=int, help="number of images; 64 digits, or all of a folder")
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
