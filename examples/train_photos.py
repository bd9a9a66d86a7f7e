r"""
Distil a posterior sampler of photographs
=========================================

The prior of photographs gets a LoRA adapter, and K unfolded iterations of LATINO are trained to draw
from :math:`p(x \mid y, x_s)` for all degradations at once: blur by Gaussian, uniform and motion kernels,
super-resolution by 2 and 4, random and box inpainting, JPEG. Every image has an operator and a noise
level of its own.

.. code-block:: bash

    python examples/train_photos.py --train photos/train --fast --out runs/ud2m_photos

The command that made the sampler that ships is in its ``config.json``. A stopped run goes on when it is
started again with the same arguments; ``--smoke`` runs everything in miniature.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from train_mnist import check_arguments, check_energy_score

from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora, load_prior
from deepinv_ud2m.benchmark.tasks import TASKS, make_generator, make_physics
from deepinv_ud2m.data import RandomCrops, load_images
from deepinv_ud2m.initializers import LinearInitializer
from deepinv_ud2m.lora import lora_config
from deepinv_ud2m.metrics import PerceptualDistance
from deepinv_ud2m.training import (
    DistillationTrainer,
    EnergyScoreLoss,
    SamplerLevels,
    parameter_groups,
    sampler_to_train,
    warmup_cosine,
)
from deepinv_ud2m.wiener import WienerInitializer

ALL_TASKS = [
    "deblur-gaussian",
    "deblur-uniform",
    "deblur-motion",
    "inpaint-random",
    "inpaint-box",
    "sr4",
    "sr4-bicubic",
    "sr2",
    "jpeg-10",
]
INITIALIZERS = {"linear": LinearInitializer, "wiener": WienerInitializer}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description="Distil a sampler of photographs.")
    parser.add_argument("--train", required=True, help="folder of photographs")
    parser.add_argument(
        "--prior", help="name, or folder of save_prior; photos, or that of the sampler to start from"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ud2m_photos"))
    parser.add_argument(
        "--start", help="sampler to train on, name or folder: what was trained in it, or --rank 0"
    )
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=ALL_TASKS, metavar="TASK")
    parser.add_argument("--sigma-y", type=float, nargs=2, default=[0.005, 0.1], help="range of noise")
    parser.add_argument("--size", type=int, default=64, help="side of the crops")
    parser.add_argument("--perceptual", type=float, default=5.0, help="weight of the activations' score")
    parser.add_argument(
        "--spread", type=float, default=1.0, help="of the draws, as asked for; 1 is the posterior's"
    )
    parser.add_argument("--iterations", type=int, help="K, unfolded iterations; 3")
    parser.add_argument(
        "--levels",
        type=float,
        nargs="+",
        help="the N levels of the sampler; 78.7 0.2 0.04, or those of the sampler to start from",
    )
    parser.add_argument("--reference-level", type=float, help="detail to work at; 0.08")
    parser.add_argument("--delta", type=float, nargs="+", help="untrained multipliers, K; 3 1.5 1")
    parser.add_argument("--rho", type=float, nargs="+", help="untrained multipliers, K; 1.35 3.6 1.6")
    parser.add_argument("--initializer", choices=INITIALIZERS, help="of each level's iterations; wiener")
    parser.add_argument(
        "--rank", type=int, help="of LoRA; 0 trains all weights; 5, or as it was trained"
    )
    parser.add_argument("--updates", type=int, default=1200, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=12, help="measurements per optimiser step")
    parser.add_argument("--lr", type=float, help="1e-3, or 2e-4 where all weights are trained")
    parser.add_argument("--lr-scalars", type=float, default=3e-3)
    parser.add_argument("--own-levels", type=float, default=0.8, help="share of the sampler's levels")
    parser.add_argument(
        "--end-to-end", action="store_true", help="train samples of the whole sampler, not single levels"
    )
    parser.add_argument(
        "--fast", action="store_true", help="compiled prior in bfloat16; needs a C++ compiler on a CPU"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that cut crops")
    parser.add_argument("--eval-interval", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two steps on two tasks")
    args = parser.parse_args(argv)
    counts = ("updates", "batch_size", "eval_interval", "size")
    check_arguments(parser, args, counts, rates=("lr", "lr_scalars"))
    check_energy_score(parser, spread=args.spread)
    if args.iterations is not None and args.iterations < 1:
        parser.error(f"--iterations must be at least 1, got {args.iterations}")
    if not args.start and args.iterations not in (None, 3) and not (args.delta and args.rho):
        parser.error(
            f"--delta and --rho must be given with --iterations {args.iterations}, one for each"
        )
    if args.start:
        of_it = ("iterations", "delta", "rho", "reference_level", "initializer")
        fixed = [name for name in of_it if getattr(args, name) is not None]
        if fixed or args.rank:
            parser.error(
                f"--{(fixed or ['rank'])[0].replace('_', '-')} cannot be given with --start, but for "
                "--rank 0: the sampler to start from has its own"
            )
    if args.smoke:
        args.tasks, args.updates, args.batch_size, args.size = args.tasks[:2], 2, 2, 32
    return args


def main():
    args = parse_arguments()

    # %%
    # The model: the prior with its adapter, K iterations, N levels.
    model = make_model(args)
    adapter = lora_config(model.unfolded.denoiser)
    lr = (1e-3 if adapter else 2e-4) if args.lr is None else args.lr

    # %%
    # One physics for each task, and a generator of its operators and noise levels.
    shape = (3, args.size, args.size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    physics = [make_physics(task, shape, device=device) for task in args.tasks]
    generators = [make_generator(task, shape, args.sigma_y, device=device) for task in args.tasks]

    # %%
    # Random crops of the photographs; what is shown during the run are centre crops of the first few.
    crops = RandomCrops(args.train, args.size, args.updates * args.batch_size, verbose=True)
    num_shown = min(8, len(crops.photographs))
    shown = load_images(args.train, 3, args.size, num=num_shown, skip_small=True)

    # %%
    # The energy score of two draws of each measurement, which is lowest for the posterior alone: of
    # their pixels, and of what a network for images sees in them.
    losses = [EnergyScoreLoss(2, spread=args.spread)]
    if args.perceptual:
        perceptual = PerceptualDistance("efficientnet", device=device)
        losses.append(
            EnergyScoreLoss(2, features=perceptual.embedding, spread=args.spread, weight=args.perceptual)
        )
    trainer = DistillationTrainer(
        model=model,
        physics=physics,
        physics_generator=generators,
        train_dataloader=DataLoader(crops, args.batch_size, num_workers=args.workers),
        eval_dataloader=DataLoader(shown, len(shown)),
        losses=losses,
        optimizer=torch.optim.AdamW(
            parameter_groups(model.unfolded, lr=lr, lr_scalars=args.lr_scalars), betas=(0.9, 0.99)
        ),
        lr_schedule=warmup_cosine(args.updates, warmup_steps=30),
        steps=args.updates,
        levels=SamplerLevels(model, args.own_levels),
        end_to_end=args.end_to_end,
        compile=args.fast,
        mixed_precision="bfloat16" if args.fast else False,
        eval_samples=2,
        eval_interval=args.eval_interval,
        ckp_interval=50,
        plot_images=True,
        save_path=args.out,
        settings={
            name: getattr(args, name) for name in ("tasks", "sigma_y", "size", "own_levels", "start")
        },
        seed=args.seed,
        device=device,
    )
    model = trainer.train()
    loss = f"energy score of pixels + {args.perceptual:g} x that of EfficientNet-Lite0's activations"
    training = {
        "command": shlex.join(["python", "examples/train_photos.py", *sys.argv[1:]]),
        "start": args.start,
        "data": f"{len(crops.photographs)} photographs, random {args.size}x{args.size} crops",
        "tasks": args.tasks,
        "sigma_y": args.sigma_y,
        "measurements": args.updates * args.batch_size,
        "batch_size": args.batch_size,
        "loss": loss if args.perceptual else "energy score",
        "spread": args.spread,
        "trained": f"LoRA of rank {adapter['rank']}" if adapter else "all weights",
        "seed": args.seed,
    }
    model.save_pretrained(args.out / "model", metadata=training, dtype=torch.float16)
    print(f"written to {args.out / 'model'}: UD2M.from_pretrained({str(args.out / 'model')!r})")


def make_model(args):
    if args.start:
        all_weights = args.rank == 0
        return sampler_to_train(
            args.start, prior=args.prior, all_weights=all_weights, levels=args.levels
        )
    torch.manual_seed(args.seed)
    prior = load_prior(args.prior or "photos")
    unfolded = UnfoldedDenoiser(
        prior,
        args.iterations or 3,
        INITIALIZERS[args.initializer or "wiener"](),
        delta=args.delta or [3.0, 1.5, 1.0],
        rho=args.rho or [1.35, 3.6, 1.6],
        reference_level=0.08 if args.reference_level is None else args.reference_level,
    )
    if args.rank == 0:
        prior.requires_grad_(True)
    else:
        add_lora(prior, args.rank or 5, targets="all-convs")
    return UD2M(unfolded, levels=args.levels or [78.7, 0.2, 0.04])


if __name__ == "__main__":
    main()
