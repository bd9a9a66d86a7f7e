r"""
Distil a posterior sampler of digits
====================================

The prior that ships as ``load_prior("mnist")`` gets a LoRA adapter, and K unfolded iterations of
LATINO are trained to draw from :math:`p(x \mid y, x_s)` on the 60 000 training digits. With ``--quick``
the script shows the gain in minutes, on super-resolution:

.. code-block:: bash

    python examples/train_mnist.py --quick

Without it, it trains one sampler for all tasks of the benchmark, for hours; the commands that made
the samplers that ship are in their ``config.json``. A stopped run goes on when it is started again with
the same arguments.
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path

import deepinv as dinv
import torch
import torch.nn.functional as F
from deepinv.physics.generator import BernoulliSplittingMaskGenerator, SigmaGenerator
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora, load_prior
from deepinv_ud2m.benchmark.tasks import TASKS, make_physics
from deepinv_ud2m.data import load_mnist, mnist_digits
from deepinv_ud2m.lora import lora_config
from deepinv_ud2m.metrics import DigitClassifier, PerceptualDistance
from deepinv_ud2m.schedule import check_levels
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    ConditionalDiscriminator,
    DistillationTrainer,
    EnergyScoreLoss,
    L2Loss,
    PerceptualLoss,
    SamplerLevels,
    parameter_groups,
    sampler_to_train,
    warmup_cosine,
)
from deepinv_ud2m.wiener import WienerInitializer

LOSSES = {
    "energy": "energy score",
    "l2": "squared error",
    "adversarial": "squared error, perceptual distance and discriminator",
}
# Levels and scalars to start from, found by examples/search_schedule.py --initializer linear --images 16
# --reference-level 0.2 --delta 3 2 0.6 --rho 2 4 1 --levels 78.7 1 0.1 --trials 70.
LEVELS = [78.7, 0.66, 0.077]
START = {"delta": [3.2, 2.57, 0.72], "rho": [2.08, 3.63, 1.46]}
ALL_TASKS = ["sr4", "sr4-paper", "deblur-gaussian", "inpaint-random", "inpaint-box"]


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description="Distil a sampler of digits.")
    parser.add_argument("--train", help="training digits, npz; torchvision downloads them if absent")
    parser.add_argument("--out", type=Path, default=Path("runs/ud2m_mnist"))
    parser.add_argument(
        "--start", help="sampler to train on, name or folder: what was trained in it, or --rank 0"
    )
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=ALL_TASKS, metavar="TASK")
    parser.add_argument("--sigma-y", type=float, nargs=2, default=[0.02, 0.1], help="range of noise")
    parser.add_argument("--loss", choices=LOSSES, default="energy")
    parser.add_argument("--draws", type=int, default=2, help="draws per measurement, for energy")
    parser.add_argument(
        "--spread",
        nargs="+",
        default=["1"],
        metavar="[TASK=]SPREAD",
        help="of the draws, for energy: of all tasks, then of some, as in 1.03 inpaint-box=1.08; "
        "1, the default, is the posterior's",
    )
    parser.add_argument(
        "--patches", type=float, default=0.0, help="weight of the energy score of patches of 8x8 pixels"
    )
    parser.add_argument(
        "--classifier",
        help="folder of examples/train_digit_classifier.py: the energy score of what it sees is added; "
        "not the one that ships, which measures",
    )
    parser.add_argument(
        "--perceptual",
        type=float,
        default=5.0,
        help="weight of that score, of how its layers see images",
    )
    parser.add_argument(
        "--features", type=float, default=0.0, help="weight of that of the features it classifies by"
    )
    parser.add_argument("--iterations", type=int, help="K, unfolded iterations; 3")
    parser.add_argument("--steps", type=int, help="N, levels of the sampler; 3")
    parser.add_argument(
        "--levels",
        type=float,
        nargs="+",
        help="those levels; those of a search for N = 3, else of the linear schedule",
    )
    parser.add_argument(
        "--reference-error",
        type=float,
        help="levels between the first and the last are for measurements of which the first guess "
        "states this error, and others' in proportion; of --start, which must have a first guess",
    )
    parser.add_argument(
        "--task-levels",
        nargs="+",
        default=[],
        metavar="TASK=LEVEL,LEVEL,...",
        help="levels that one of --tasks is trained and evaluated with instead, with --end-to-end; of a "
        "task that is there several times, each time it is given here",
    )
    parser.add_argument(
        "--rank", type=int, help="of LoRA; 0 trains all weights; 5, or as it was trained"
    )
    parser.add_argument("--targets", help='layers of LoRA; all-convs, or "attention" for those alone')
    parser.add_argument("--updates", type=int, default=6000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="measurements per optimiser step")
    parser.add_argument("--lr", type=float, help="1e-3, or 4e-4 where all weights are trained")
    parser.add_argument("--lr-scalars", type=float, default=2e-3)
    parser.add_argument("--lr-first-guess", type=float, help="of a trained first guess; that of --lr")
    parser.add_argument(
        "--own-levels", type=float, default=0.5, help="share of the sampler's own levels"
    )
    parser.add_argument(
        "--end-to-end", action="store_true", help="train samples of the whole sampler, not single levels"
    )
    parser.add_argument(
        "--fast", action="store_true", help="compiled prior in bfloat16; needs a C++ compiler on a CPU"
    )
    parser.add_argument(
        "--distort", type=float, default=0.0, help="share of digits that are turned, scaled and bent"
    )
    parser.add_argument("--eval-interval", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few minutes, super-resolution only")
    args = parser.parse_args(argv)
    if args.quick:
        args.tasks, args.updates, args.eval_interval = ["sr4"], 300, 100
    check_arguments(
        parser,
        args,
        counts=("updates", "batch_size", "eval_interval"),
        rates=("lr", "lr_scalars", "lr_first_guess", "patches", "perceptual", "features"),
    )
    if not 0 <= args.distort <= 1:
        parser.error(f"--distort must be in [0, 1], got {args.distort}")
    args.spread = spread_of_tasks(parser, args.spread, args.tasks)
    check_energy_score(parser, num_samples=args.draws, spread=args.spread)
    check_arguments(
        parser,
        args,
        counts=[n for n in ("iterations", "steps") if getattr(args, n) is not None],
        rates=(),
    )
    if args.levels and args.steps not in (None, len(args.levels)):
        parser.error(f"--steps must be the number of --levels, {len(args.levels)}, got {args.steps}")
    args.task_levels = levels_of_tasks(parser, args.task_levels, args.tasks)
    if any(args.task_levels) and not args.end_to_end:
        parser.error("--task-levels are for --end-to-end")
    if args.reference_error and not args.start:
        parser.error("--reference-error needs the first guess of a --start")
    for name in ("classifier", "patches"):
        if getattr(args, name) and args.loss != "energy":
            parser.error(f"--{name} is for --loss energy, got --loss {args.loss}")
    if set(args.spread.values()) != {1.0} and args.loss != "energy":
        parser.error(f"--spread is for --loss energy, got --loss {args.loss}")
    if args.features and not args.classifier:
        parser.error("--features are those of a --classifier, and none was given")
    if args.start:
        of_it = [name for name in ("iterations", "steps", "targets") if getattr(args, name) is not None]
        if of_it or args.rank:
            parser.error(
                f"--{(of_it or ['rank'])[0]} cannot be given with --start, but for --rank 0: "
                "the sampler to start from has its own"
            )
    return args


def main():
    args = parse_arguments()

    # %%
    # The model: the prior with its adapter, K iterations, N levels.
    model = make_model(args)
    adapter = lora_config(model.unfolded.denoiser)
    lr = (1e-3 if adapter else 4e-4) if args.lr is None else args.lr

    # %%
    # The tasks of the benchmark, with a noise level per image and, for random inpainting, a mask.
    shape = (1, 32, 32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    physics = [make_physics(task, shape, device=device) for task in args.tasks]
    generators = [operators_and_levels(task, shape, args.sigma_y, device) for task in args.tasks]

    # %%
    # Losses, and a discriminator where one is asked for.
    losses, discriminator, losses_d = choose_losses(args, physics, device)
    optimizer = torch.optim.AdamW(
        parameter_groups(
            model.unfolded,
            lr=lr,
            lr_scalars=args.lr_scalars,
            lr_initializer=lr if args.lr_first_guess is None else args.lr_first_guess,
        ),
        betas=(0.9, 0.99),
    )
    if discriminator is not None:
        optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=5e-4, betas=(0.5, 0.99))
        optimizer = dinv.training.AdversarialOptimizer(optimizer, optimizer_d)

    x, _ = load_mnist("datasets", train=True, npz=args.train)
    trainer = DistillationTrainer(
        model=model,
        physics=physics,
        physics_generator=generators,
        train_dataloader=DataLoader(
            x,
            args.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=partial(distorted, share=args.distort) if args.distort else None,
        ),
        eval_dataloader=DataLoader(mnist_digits("validation", num=32), batch_size=32),
        losses=losses,
        D=discriminator,
        losses_d=losses_d,
        optimizer=optimizer,
        lr_schedule=warmup_cosine(args.updates, warmup_steps=50),
        steps=args.updates,
        levels=SamplerLevels(model, args.own_levels),
        end_to_end=args.end_to_end,
        physics_levels=args.task_levels if any(args.task_levels) else None,
        compile=args.fast,
        mixed_precision="bfloat16" if args.fast else False,
        eval_interval=args.eval_interval,
        ckp_interval=100,
        plot_images=True,
        save_path=args.out,
        settings={
            name: getattr(args, name)
            for name in ("tasks", "sigma_y", "own_levels", "start", "classifier", "distort")
            if name != "distort" or args.distort
        },
        seed=args.seed,
        device=device,
    )
    untrained = evaluate_untrained(trainer, args.out)
    if untrained:
        print("untrained:", ", ".join(f"{name} {value:.4g}" for name, value in untrained.items()))
    model = trainer.train()
    training = {
        "command": shlex.join(["python", "examples/train_mnist.py", *sys.argv[1:]]),
        "start": args.start,
        "data": "MNIST training set, 60 000 digits (LeCun & Cortes, CC BY-SA 3.0)",
        "tasks": args.tasks,
        "sigma_y": args.sigma_y,
        "measurements": args.updates * args.batch_size,
        "batch_size": args.batch_size,
        "loss": describe_loss(args),
        **({"spread": one_if_equal(args.spread)} if args.loss == "energy" else {}),
        **({"reference_error": args.reference_error} if args.reference_error else {}),
        **({"levels of tasks": args.task_levels} if any(args.task_levels) else {}),
        **({"distorted": args.distort} if args.distort else {}),
        "trained": f"LoRA of rank {adapter['rank']}" if adapter else "all weights",
        "seed": args.seed,
        "validation": trainer.evaluate(),
        "validation_untrained": untrained,
    }
    model.save_pretrained(args.out / "model", metadata=training, dtype=torch.float16)
    print(f"written to {args.out / 'model'}: UD2M.from_pretrained({str(args.out / 'model')!r})")


def evaluate_untrained(trainer, folder):
    file = folder / "untrained.json"
    if (folder / "checkpoint.pt").is_file():  # of a run that goes on, which was evaluated when it began
        return json.loads(file.read_text()) if file.is_file() else {}
    untrained = trainer.evaluate()
    file.write_text(json.dumps(untrained))
    return untrained


def make_model(args):
    if args.start:
        return sampler_to_train(
            args.start,
            all_weights=args.rank == 0,
            levels=args.levels,
            reference_error=args.reference_error,
        )
    torch.manual_seed(args.seed)
    prior = load_prior("mnist")
    digits, _ = load_mnist("datasets", train=True, npz=args.train)
    iterations, steps, targets = args.iterations or 3, args.steps or 3, args.targets or "all-convs"
    start = START if iterations == 3 else {}
    unfolded = UnfoldedDenoiser(prior, iterations, WienerInitializer.fit(digits), **start)
    if args.rank == 0:
        prior.requires_grad_(True)
    else:
        add_lora(prior, args.rank or 5, targets=None if targets == "attention" else targets)
    levels = args.levels or (LEVELS if steps == len(LEVELS) else None)
    return UD2M(unfolded, None if levels else steps, levels=levels)


def check_arguments(parser, args, counts, rates):
    for name in counts:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in rates:  # one that is not given has a default
        rate = getattr(args, name)
        if rate is not None and not 0 <= rate < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be finite and not negative, got {rate}")
    if not 0 < args.sigma_y[0] <= args.sigma_y[1]:
        parser.error(f"--sigma-y must be two positive levels, LOW HIGH, got {args.sigma_y}")


def spread_of_tasks(parser, given, tasks):
    """The spread of each task, of values for all tasks or, as ``task=value``, for one."""
    spread = dict.fromkeys(tasks, 1.0)
    for text in given:
        task, _, value = text.rpartition("=")
        if task and task not in spread:
            parser.error(f"--spread must be of one of the --tasks, {sorted(spread)}, got {text}")
        try:
            spread |= dict.fromkeys([task] if task else spread, float(value))
        except ValueError:
            parser.error(f"--spread must be numbers, or TASK=number, got {text}")
    return spread


def levels_of_tasks(parser, given, tasks):
    """Levels for each of the tasks, ``None`` where none are given, of ``task=level,level,...``."""
    levels = [None] * len(tasks)
    for text in given:
        task, _, values = text.rpartition("=")
        places = [n for n, of in enumerate(tasks) if of == task and levels[n] is None]
        if not places:
            parser.error(
                "--task-levels must be of one of the --tasks, once for each time it is there, "
                f"{sorted(tasks)}, got {text}"
            )
        try:
            levels[places[0]] = check_levels([float(value) for value in values.split(",")]).tolist()
        except ValueError as error:
            parser.error(f"--task-levels {text}: {error}")
    return levels


def one_if_equal(spread):
    return spread if len(set(spread.values())) > 1 else next(iter(spread.values()))


def check_energy_score(parser, **settings):
    try:
        EnergyScoreLoss(**settings)
    except ValueError as error:
        parser.error(str(error).replace("num_samples", "--draws").replace("spread", "--spread"))


def operators_and_levels(task, shape, sigma_y, device):
    levels = SigmaGenerator(*sigma_y, rng=torch.Generator(device), device=device)
    if task != "inpaint-random":
        return levels
    rng = torch.Generator(device)
    masks = BernoulliSplittingMaskGenerator(shape, split_ratio=0.3, rng=rng, device=device)
    return masks + levels


def distorted(digits, share):
    r"""
    A batch of digits, a share of them seen through a random map that turns, scales, shears, shifts and
    bends by a few per cent: digits that nobody wrote, but somebody might.
    """
    digits = torch.stack(list(digits))
    n, size = len(digits), digits.shape[-2:]
    affine = torch.eye(2, 3) + torch.randn(n, 2, 3) * torch.tensor([0.08, 0.08, 0.03])
    bends = F.interpolate(0.03 * torch.randn(n, 2, 5, 5), size, mode="bicubic", align_corners=True)
    grid = F.affine_grid(affine, digits.shape, align_corners=False) + bends.permute(0, 2, 3, 1)
    # Bicubic: linear interpolation would teach blurred strokes.
    bent = F.grid_sample(digits, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return torch.where(torch.rand(n, 1, 1, 1) < share, bent, digits)


def choose_losses(args, physics, device):
    if args.loss == "energy":
        return energy_scores(args, physics, device), None, None
    if args.loss == "l2":
        return [L2Loss("x0")], None, None
    losses = [L2Loss("x0"), PerceptualLoss("digits", weight=0.1), AdversarialGeneratorLoss(weight=0.01)]
    return losses, ConditionalDiscriminator(1), [AdversarialDiscriminatorLoss()]


def energy_scores(args, physics, device):
    spread = one_if_equal(args.spread)
    if isinstance(spread, dict):
        spread = {of: spread[task] for of, task in zip(physics, args.tasks, strict=True)}
    seen_as = [{}]
    if args.patches:
        seen_as.append({"patch_size": 8, "weight": args.patches})
    if args.classifier:
        classifier = DigitClassifier.from_pretrained(args.classifier).to(device)
        layers = PerceptualDistance(classifier, device=device).embedding
        seen_as.append({"features": layers, "weight": args.perceptual})
        if args.features:
            seen_as.append({"features": classifier.features, "weight": args.features})
    return [EnergyScoreLoss(args.draws, spread=spread, **settings) for settings in seen_as]


def describe_loss(args):
    parts = [LOSSES[args.loss]]
    if args.patches:
        parts.append(f"{args.patches:g} x that of 8x8 patches")
    if args.classifier:
        parts.append(f"{args.perceptual:g} x that of a classifier's layers")
    if args.features:
        parts.append(f"{args.features:g} x that of its features")
    return " + ".join(parts)


if __name__ == "__main__":
    main()
