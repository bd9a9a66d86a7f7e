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

from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora, load_prior, merge_lora
from deepinv_ud2m.benchmark.tasks import make_generator, make_physics
from deepinv_ud2m.data import RandomCrops, load_images
from deepinv_ud2m.initializers import LinearInitializer
from deepinv_ud2m.lora import lora_config
from deepinv_ud2m.metrics import PerceptualDistance
from deepinv_ud2m.training import (
    DistillationTrainer,
    EnergyScoreLoss,
    SamplerLevels,
    parameter_groups,
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


def parse_arguments():
    parser = argparse.ArgumentParser(description="Distil a sampler of photographs.")
    parser.add_argument("--train", required=True, help="folder of photographs")
    parser.add_argument(
        "--prior", default="photos", help="name, or folder of save_prior; also with --start"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ud2m_photos"))
    parser.add_argument(
        "--start", help="sampler to start from, name or folder, with its scalars and adapter"
    )
    parser.add_argument("--tasks", nargs="+", default=ALL_TASKS)
    parser.add_argument("--sigma-y", type=float, nargs=2, default=[0.005, 0.1], help="range of noise")
    parser.add_argument("--size", type=int, default=64, help="side of the crops")
    parser.add_argument("--perceptual", type=float, default=5.0, help="weight of the activations' score")
    parser.add_argument(
        "--spread", type=float, default=1.0, help="of the draws, as asked for; 1 is the posterior's"
    )
    parser.add_argument("--iterations", type=int, default=3, help="K, unfolded iterations")
    parser.add_argument(
        "--levels",
        type=float,
        nargs="+",
        help="the N levels of the sampler; 78.7 0.2 0.04, or those of the sampler to start from",
    )
    parser.add_argument("--reference-level", type=float, default=0.08, help="detail to work at")
    parser.add_argument(
        "--delta", type=float, nargs="+", default=[3.0, 1.5, 1.0], help="untrained multipliers, K"
    )
    parser.add_argument(
        "--rho", type=float, nargs="+", default=[1.35, 3.6, 1.6], help="untrained multipliers, K"
    )
    parser.add_argument(
        "--initializer",
        choices=["linear", "wiener"],
        default="wiener",
        help="of each level's iterations",
    )
    parser.add_argument("--rank", type=int, default=5, help="of LoRA; 0 trains all weights")
    parser.add_argument("--updates", type=int, default=1200, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=12, help="measurements per optimiser step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-scalars", type=float, default=3e-3)
    parser.add_argument("--own-levels", type=float, default=0.8, help="share of the sampler's levels")
    parser.add_argument(
        "--end-to-end", action="store_true", help="train samples of the whole sampler, not single levels"
    )
    parser.add_argument(
        "--fast", action="store_true", help="compiled prior in bfloat16; needs a C++ compiler on a CPU"
    )
    parser.add_argument("--eval-interval", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two steps on two tasks")
    args = parser.parse_args()
    if args.smoke:
        args.tasks, args.updates, args.batch_size, args.size = args.tasks[:2], 2, 2, 32
    return args


def main():
    args = parse_arguments()

    # %%
    # The model: the prior with its adapter, K iterations, N levels.
    model = make_model(args)

    # %%
    # One physics for each task, and a generator of its operators and noise levels.
    shape = (3, args.size, args.size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    physics = [make_physics(task, shape, device=device) for task in args.tasks]
    generators = [make_generator(task, shape, args.sigma_y, device=device) for task in args.tasks]

    # %%
    # Random crops of the photographs; what is shown during the run are centre crops of the first few.
    crops = RandomCrops(args.train, args.size, args.updates * args.batch_size, verbose=True)
    shown = load_images(args.train, 3, args.size, num=8, skip_small=True)

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
        train_dataloader=DataLoader(crops, args.batch_size),
        eval_dataloader=DataLoader(shown, len(shown)),
        losses=losses,
        optimizer=torch.optim.AdamW(
            parameter_groups(model.unfolded, lr=args.lr, lr_scalars=args.lr_scalars), betas=(0.9, 0.99)
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
        seed=args.seed,
        device=device,
    )
    model = trainer.train()
    loss = f"energy score of pixels + {args.perceptual:g} x that of EfficientNet-Lite0's activations"
    adapter = lora_config(model.unfolded.denoiser)
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
    model.save_pretrained(args.out / "model", prior=args.prior, metadata=training, dtype=torch.float16)
    print(f"written to {args.out / 'model'}: UD2M.from_pretrained({str(args.out / 'model')!r})")


def make_model(args):
    if args.start:
        model = UD2M.from_pretrained(args.start, merge=False)
        if args.rank == 0:
            merge_lora(model.unfolded.denoiser, unload=True)
            model.unfolded.denoiser.requires_grad_(True)
        return UD2M(model.unfolded, levels=args.levels) if args.levels else model
    torch.manual_seed(args.seed)
    prior = load_prior(args.prior)
    unfolded = UnfoldedDenoiser(
        prior,
        args.iterations,
        WienerInitializer() if args.initializer == "wiener" else LinearInitializer(),
        delta=args.delta,
        rho=args.rho,
        reference_level=args.reference_level,
    )
    if args.rank:
        add_lora(prior, args.rank, targets="all-convs")
    else:
        prior.requires_grad_(True)
    return UD2M(unfolded, levels=args.levels or [78.7, 0.2, 0.04])


if __name__ == "__main__":
    main()
