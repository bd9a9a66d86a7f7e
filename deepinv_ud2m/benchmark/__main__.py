"""Compare posterior samplers on your images, with one prior for all of them."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from deepinv.models import Denoiser
from torch import Tensor

from deepinv_ud2m.benchmark.cost import measure_cost
from deepinv_ud2m.benchmark.gaussian import compare_with_posterior
from deepinv_ud2m.benchmark.methods import (
    CRITERIA,
    METHODS,
    Entry,
    Method,
    Search,
    check_labels,
    load_file,
    read_methods,
)
from deepinv_ud2m.benchmark.paper import make_study, measure_table, plan
from deepinv_ud2m.benchmark.report import report
from deepinv_ud2m.benchmark.run import Study, perceptual_metric, run
from deepinv_ud2m.benchmark.tune import tune
from deepinv_ud2m.checkpoint import PRETRAINED
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.data import load_images, mnist_digits
from deepinv_ud2m.physics.tasks import TASKS, Task
from deepinv_ud2m.priors import load_prior
from deepinv_ud2m.processes import leave_group

DEFAULT_METHODS = ["ud2m", "diffpir", "ddrm", "pigdm", "dpir", "pinv"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.command not in (_run, _paper):
            raise ValueError("only run and paper share their work between processes: no torchrun here")
        if args.method_file:
            load_file(args.method_file, "METHODS", METHODS, Method)
        if args.task_file:
            load_file(args.task_file, "TASKS", TASKS, Task)
        if unknown := sorted({*args.tasks} - {*TASKS}):
            raise ValueError(f"tasks must be of {sorted(TASKS)}, got {unknown}")
        args.command(args)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    state = _start(args)
    study = _study(args)
    study.metric = perceptual_metric(study.x, args.perceptual)
    study.batch_size = check_count("--batch-size", args.batch_size)
    run(args.out, study)
    if state.is_main_process:
        _report(args)


def _report(args: argparse.Namespace) -> None:
    report(args.out)
    print((args.out / "report.md").read_text())


def _tune(args: argparse.Namespace) -> None:
    study = _study(args)
    study.metric, study.bfloat16 = perceptual_metric(study.x, args.perceptual), args.bfloat16
    for task, winners in tune(args.out, study)["winners"].get(args.criterion, {}).items():
        print(f"{task}: {winners}")


def _cost(args: argparse.Namespace) -> None:
    images = []
    for size in args.sizes or [None]:
        args.size = size
        study = _study(args)
        images.append(study.x)
    lines = measure_cost(args.out, study, images, args.batch_sizes, check_count("--rounds", args.rounds))
    print(lines.to_string(index=False))


def _gaussian(args: argparse.Namespace) -> None:
    compare_with_posterior(args.out, _study(args, None, None), args.images, args.size)
    print((args.out / "report.md").read_text())


def _paper(args: argparse.Namespace) -> None:
    state = _start(args)
    entries = [Entry("ud2m-distilled", f"UD2M {c}", {"checkpoint": c}) for c in args.checkpoints]
    methods = entries + read_methods(args.methods or ["diffpir", "dps", "ddrm"])
    check_labels(methods)
    names = ("number", "weights", "settings", "perceptual", "download", "smoke", "batch_size", "device")
    options = {name: getattr(args, name) for name in names}
    missing: list[str] | None = [] if args.dry_run else None
    study = make_study(args.table, args.images, methods, missing=missing, **options)
    study.bfloat16 = args.bfloat16
    if args.dry_run:
        print("\n".join([*(f"missing: {what}" for what in missing or []), plan(args.table, study)]))
        return
    measure_table(args.out, args.table, study)
    if state.is_main_process:
        print((args.out / "paper.md").read_text())


def _start(args: argparse.Namespace) -> PartialState:
    """The processes of a run, each with a device of its own."""
    _check_device(args.device)
    state = PartialState(cpu=args.device == "cpu")
    atexit.register(leave_group)
    if args.device == "cuda":
        args.device = str(state.device)
    return state


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {device!r}, but there is no CUDA device here")


def _study(args: argparse.Namespace, *given: Any) -> Study:
    """What is compared; prior and images are loaded unless they are given."""
    prior, x = given or _load(args)
    shipped = ["ud2m-distilled"] if not given and args.prior in PRETRAINED else []
    methods = read_methods(args.methods or [*shipped, *DEFAULT_METHODS])
    options = {"num_samples": check_count("--samples", args.samples), "seed": args.seed}
    options |= {"search": Search(args.settings, args.criterion)}
    names = {} if given else {"prior": args.prior, "data": args.data}
    return Study(prior, x, args.tasks, methods, args.sigma_y, **options, names=names)


def _load(args: argparse.Namespace) -> tuple[Denoiser, Tensor]:
    """Prior and images."""
    _check_device(args.device)
    check_count("--images", 1 if args.images is None else args.images)
    digits = args.data in ("test", "validation")
    if args.prior is None and not digits:
        raise ValueError("--prior must be given with --data: the default is a prior of digits")
    args.prior = args.prior or "mnist"
    prior = load_prior(args.prior, args.device)
    info, size = prior.prior_info, args.size or prior.prior_info.image_size
    if digits:
        if info.channels != 1 or args.size not in (None, 32):
            raise ValueError("--data, your images, must be given: the shipped digits are grey, 32x32")
        return prior, mnist_digits(args.data, num=args.images or 64).to(args.device)
    if size is None:
        raise ValueError(f"--size, the side of the crops, must be given for the prior {args.prior!r}")
    options = {"root": args.data_root, "skip_small": args.skip_small}
    x = load_images(args.data, info.channels, size, args.images, info.size_multiple, **options)
    return prior, x.to(args.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deepinv_ud2m.benchmark", description=__doc__)
    commands, subs = parser.add_subparsers(required=True), {}
    for command, out, text in (
        (_run, "runs/benchmark", "run methods on tasks, and report"),
        (_tune, "runs/settings.json", "search the settings of methods on validation images"),
        (_report, "runs/benchmark", "write tables and figures of a folder of results"),
        (_cost, "runs/cost", "measure time and memory, and the time of the network evaluations alone"),
        (_gaussian, "runs/gaussian", "compare methods with the exact posterior of a Gaussian prior"),
        (_paper, "runs/paper", "measure a table of the paper, beside its figures"),
    ):
        name = command.__name__[1:]
        subs[name] = commands.add_parser(name, help=text, description=text)
        subs[name].add_argument("--out", type=Path, default=Path(out), help="where to write")
        subs[name].add_argument("--method-file", help="Python file with METHODS, a Method by name")
        subs[name].add_argument("--task-file", help="Python file with TASKS, a Task by name")
        subs[name].set_defaults(command=command, tasks=[], settings=[], samples=1, seed=0)

    def add(names: str, option: str, help: str, **options: Any) -> None:
        for name in names.split():
            subs[name].add_argument(option, help=help, **options)

    every, data = "run tune cost gaussian", "run tune cost"
    tasks = ["sr4", "deblur-gaussian", "inpaint-random", "inpaint-box"]
    add(data, "--tasks", f"of {', '.join(TASKS)}, or of --task-file", nargs="+", default=tasks)
    add("gaussian", "--tasks", "linear tasks", nargs="+", default=["inpaint-random", "deblur-gaussian"])
    text = f"of {', '.join(METHODS)}, of --method-file, or YAML files of {{name, label, settings, criterion}}"
    add(every, "--methods", text, nargs="+")
    add(every, "--sigma-y", "noise level", type=float, default=0.05)
    add(every, "--criterion", "settings searched for it are taken", choices=list(CRITERIA), default="energy")
    add("run cost gaussian", "--settings", "files of tune, for searched settings", nargs="+", default=[])
    for name, samples, seed in (("run", 1, 0), ("tune", 4, 1000), ("gaussian", 16, 0)):
        add(name, "--samples", "samples per image", type=int, default=samples)
        add(name, "--seed", "of measurements and samples", type=int, default=seed)
    add("gaussian", "--images", "number of images", type=int, default=256)
    add("gaussian", "--size", "side of the images", type=int, default=16)
    add(data, "--prior", "name or folder of the prior; with digits mnist by default")
    text = "a folder of images, a dataset of deepinv, or shipped digits: test or validation"
    add("run cost", "--data", text, default="test")
    add("tune", "--data", text, default="validation")
    add(data, "--data-root", "folder of a dataset of deepinv")
    add("run tune", "--size", "side of the crops", type=int)
    add("cost", "--sizes", "sides of the crops", type=int, nargs="+")
    add(data, "--skip-small", "leave out images that have no room for a crop", action="store_true")
    add(data, "--images", "number of images; by default 64 digits, or all of a folder", type=int)
    add(data, "--device", "cpu or cuda", default="cuda" if torch.cuda.is_available() else "cpu")
    add("run tune", "--perceptual", "network of the perceptual distance, or none", default="auto")
    add("run", "--batch-size", "images sampled together", type=int, default=16)
    add("cost", "--batch-sizes", "images sampled together", type=int, nargs="+", default=[1, 16])
    add("cost", "--rounds", "times each method is measured", type=int, default=5)
    add("paper", "--table", "1: ImageNet, 2: LSUN Bedroom", type=int, choices=[1, 2], required=True)
    add("paper", "--images", "folder of the images, subfolders included", required=True)
    add("paper", "--checkpoints", "folders of distilled samplers", nargs="+", default=[])
    add("paper", "--methods", "as of run; by default diffpir, dps and ddrm", nargs="+")
    add("paper", "--settings", "files of tune, searched for the perceptual distance", nargs="+")
    add("paper", "--number", "images (default: 1500 and 300, as the paper)", type=int)
    add("paper", "--weights", "file or folder of the weights of the prior")
    add("paper", "--perceptual", "network of LPIPS", default="lpips-vgg")
    add("paper", "--download", "download weights that are not here", action="store_true")
    add("tune paper", "--bfloat16", "networks in mixed precision", action="store_true")
    add("paper", "--batch-size", "images sampled together", type=int, default=1)
    add("paper", "--device", "cpu or cuda", default="cuda" if torch.cuda.is_available() else "cpu")
    add("paper", "--dry-run", "say what is needed, and how long it takes", action="store_true")
    add("paper", "--smoke", "small networks with random weights, to try it", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
