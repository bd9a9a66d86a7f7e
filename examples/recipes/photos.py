r"""
Distil a posterior sampler of photographs
=========================================

One sampler for blur by Gaussian, uniform and motion kernels, super-resolution by 2 and 4, random and box
inpainting, and JPEG. It starts from a prior of photographs and is trained on random crops of a folder of
photographs. Every image has an operator and a noise level of its own.

.. code-block:: bash

    python examples/recipes/photos.py --train photos/train --fast

The stages are those of ``mnist.py``. By default there is only the second one, as for the samplers that ship,
and each level starts from a Wiener filter. A run that was stopped goes on when it is started again with the
same arguments. ``--quick`` runs everything in miniature.
"""

import argparse
import os
from pathlib import Path

import torch
from stages import save, train_in_stages
from torch.utils.data import DataLoader

from deepinv_ud2m import (
    UD2M,
    PosteriorMeanInitializer,
    UnfoldedDenoiser,
    WienerInitializer,
    add_lora,
    load_prior,
)
from deepinv_ud2m.data import RandomCrops, load_images
from deepinv_ud2m.metrics import PerceptualDistance
from deepinv_ud2m.physics import TASKS
from deepinv_ud2m.training import EnergyScoreLoss

ALL_TASKS = [
    *("deblur-gaussian", "deblur-uniform", "deblur-motion", "inpaint-random", "inpaint-box"),
    *("sr4", "sr4-bicubic", "sr2", "jpeg-10"),
]
SIZE, SIGMA_Y, PERCEPTUAL_WEIGHT = 64, (0.005, 0.1), 5.0


def parse_arguments():
    parser = argparse.ArgumentParser(description="Distil a sampler of photographs.")
    parser.add_argument("--train", required=True, help="folder of photographs")
    parser.add_argument("--prior", default="photos", help="name of a prior, or folder of prior_photos.py")
    parser.add_argument("--out", type=Path, default=Path("runs/ud2m_photos"))
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=ALL_TASKS, metavar="TASK")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[78.7, 0.2, 0.04], help="noise levels")
    parser.add_argument(
        "--updates", type=int, nargs=3, default=[0, 1350, 0], help="optimiser steps of the three stages"
    )
    parser.add_argument("--batch-size", type=int, default=48, help="measurements per optimiser step")
    parser.add_argument(
        "--diversity-weight", type=float, default=1.0, help="1 for the posterior, less for similar samples"
    )
    parser.add_argument("--rank", type=int, default=20, help="of LoRA; 0 trains all weights")
    parser.add_argument("--fast", action="store_true", help="compiled, in bfloat16; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two steps of each stage on two tasks")
    if parser.parse_args().quick:  # other defaults
        parser.set_defaults(tasks=ALL_TASKS[-2:], updates=[2, 2, 2], batch_size=2)
    return parser.parse_args()


def main():
    args = parse_arguments()
    # Enough crops for the longest stage; validation images are centre crops of the first photographs.
    size = SIZE // 2 if args.quick else SIZE
    crops = RandomCrops(args.train, size, max(args.updates) * args.batch_size, verbose=True)
    shown = load_images(args.train, 3, size, num=min(8, len(crops.photographs)), skip_small=True)
    model = make_model(args)

    def losses(device):
        """The energy score of two samples: of pixels, and of what a network for images sees in them."""
        features = PerceptualDistance("efficientnet", device=device).embedding
        options = {"diversity_weight": args.diversity_weight}
        perceptual = EnergyScoreLoss(features=features, weight=PERCEPTUAL_WEIGHT, **options)
        return [EnergyScoreLoss(**options), perceptual]

    workers = min(8, os.cpu_count() - 1) if torch.cuda.is_available() else 0
    loader = DataLoader(crops, args.batch_size, num_workers=workers)
    lr = 1e-3 if args.rank else 4e-4
    validation = train_in_stages(model, loader, shown, losses, args, lr, SIGMA_Y)
    data = f"{len(crops.photographs)} photographs, random crops of {size}x{size} pixels"
    save(model, args, data=data, validation=validation)


def make_model(args):
    torch.manual_seed(args.seed)
    prior, initializer = load_prior(args.prior), WienerInitializer(reference_level=0.08)
    start = {"delta": [3.0, 1.5, 1.0], "rho": [1.35, 3.6, 1.6]}
    if args.updates[0]:
        initializer = PosteriorMeanInitializer.from_prior(args.prior, initializer, reference_level=0.08)
        start = {"delta": [3.0, 1.0], "rho": [1.35, 1.6]}
    if args.rank:
        add_lora(prior, args.rank, targets="all-convs")
    train_prior = "adapter" if args.rank else "all"
    unfolded = UnfoldedDenoiser(prior, len(start["rho"]), initializer, train_prior=train_prior, **start)
    return UD2M(unfolded, sigmas=args.sigmas)


if __name__ == "__main__":
    main()
