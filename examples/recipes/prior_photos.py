r"""
Train a diffusion prior on photographs
======================================

A prior of colour photographs of any size is a Gaussian denoiser that works at every noise level:

.. math:: D(w, \delta) \approx E[x \mid x + \delta n = w], \qquad 0.002 \leq \delta \leq 80 .

The network is convolutional, with attention on small maps only. It is trained on random crops of a folder of
photographs, at several scales.

.. code-block:: bash

    python examples/recipes/prior_photos.py --train photos/train --test photos/test --fast

Several processes share the work with ``torchrun --nproc_per_node 2``. A run that was stopped goes on when it
is started again with the same arguments. ``--quick`` runs everything in miniature. At the end the averaged
weights are written to ``--out`` with their card: denoising PSNR on photographs that were not trained on, next
to BM3D if you have the package ``bm3d``.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import deepinv as dinv
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from deepinv_ud2m.data import RandomCrops, load_images
from deepinv_ud2m.priors import load_prior, save_prior
from deepinv_ud2m.training import denoising_psnr, train_prior

#: The network: deepinv's ADMUNet on pixel-unshuffled images. ``pixel_std``, which its preconditioning needs,
#: is about the root mean square of the pixels of photographs.
CONFIG = {
    "prior": {
        "name": "photos",
        "channels": 3,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "size_multiple": 1,
        "image_size": None,
    },
    "network": {
        "pixel_shuffle": 2,
        "pad_to_multiple": 8,
        "checkerboard_filter": 2.0,  # takes out what the shuffling leaves behind
        "img_resolution": 32,
        "model_channels": 64,
        "channel_mult": [1, 1, 2],
        "channel_mult_emb": 2,
        "num_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
        "pixel_std": 0.5,
    },
}
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a prior of photographs.")
    parser.add_argument("--train", required=True, help="folder of photographs to train on")
    parser.add_argument("--test", required=True, help="folder of other photographs")
    parser.add_argument("--out", type=Path, default=Path("runs/prior_photos"))
    parser.add_argument("--crops", type=int, default=2_252_800, help="training crops seen")
    parser.add_argument("--size", type=int, default=64, help="side of the crops")
    parser.add_argument("--batch-size", type=int, default=256, help="crops per optimiser step")
    parser.add_argument("--channels", type=int, default=64, help="width of the network")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--fast", action="store_true", help="compiled, in bfloat16; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny network, a few crops")
    if parser.parse_args().quick:  # other defaults
        parser.set_defaults(crops=64, batch_size=32, channels=32)
    return parser.parse_args()


def main():
    args = parse_arguments()
    config = CONFIG | {"network": CONFIG["network"] | {"model_channels": args.channels}}
    # Each process draws crops of its own. Photographs that cannot be read are found before the training.
    x_test = load_images(args.test, 3, 64 if args.quick else 128, skip_small=True)
    state, epoch_crops = PartialState(cpu=not torch.cuda.is_available()), min(102_400, args.crops)
    crops = RandomCrops(args.train, args.size, epoch_crops // state.num_processes, verbose=True)
    workers = min(12, os.cpu_count() - 1) if torch.cuda.is_available() else 0
    network = train_prior(
        config,
        DataLoader(crops, batch_size=args.batch_size // state.num_processes, num_workers=workers),
        epochs=-(-args.crops // epoch_crops),
        lr=args.lr,
        median=0.2,
        checkpoint=args.out / "checkpoint.pt",
        seed=args.seed,
        fast=args.fast,
    ).cpu()
    if not state.is_main_process:
        return

    # The card, of the float16 weights that are written, and a figure. Test photographs have no part in the
    # training.
    training = {
        "data": f"random crops at scales 1 to 4 of {len(crops.photographs)} photographs",
        "command": shlex.join(["python", "examples/recipes/prior_photos.py", *sys.argv[1:]]),
        "processes": state.num_processes,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    save_prior(network, config | {"training": training}, args.out)
    prior = load_prior(args.out)
    metrics = evaluate(prior, x_test)
    save_prior(network, config | {"training": training, "metrics": metrics}, args.out)
    plot(prior, x_test, args.out / "denoised.png")
    print(metrics)


def evaluate(prior, x):
    def psnr(denoiser, batch_size):
        return {f"{s:g}": round(denoising_psnr(denoiser, x, s, batch_size=batch_size), 2) for s in SIGMAS}

    metrics = {"test_photographs": len(x), "size": x.shape[-1], "denoising_psnr": psnr(prior, 8)}
    try:
        return metrics | {"denoising_psnr_bm3d": psnr(dinv.models.BM3D(), 1)}
    except ImportError as error:
        print(f"without BM3D: {error}")
        return metrics


def plot(prior, x, file, sigma=0.1):
    shown = x[:: max(1, len(x) // 4)][:4]
    noisy = shown + sigma * torch.randn(shown.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        columns = {"truth": shown, f"noise {sigma:g}": noisy, "denoised": prior(noisy, sigma)}
    dinv.utils.plot(columns, rescale_mode="clip", show=False, close=True, save_fn=file, dpi=100)


if __name__ == "__main__":
    main()
