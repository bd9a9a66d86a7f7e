r"""
Train a diffusion prior on photographs
======================================

A prior for colour photographs of any size: a Gaussian denoiser at every noise level,

.. math:: D(w, \delta) \approx E[x \mid x + \delta n = w], \qquad 0.002 \leq \delta \leq 80 ,

fully convolutional but for attention on small maps, trained on random crops of a folder of photographs
at several scales. A stopped run resumes: call it again with the same arguments. Two processes share the
work with ``torchrun --nproc_per_node 2``; ``--smoke`` runs everything in a minute, in miniature.

.. code-block:: bash

    python examples/train_prior_photos.py --train photos/train --test photos/test --out runs/prior_photos

When the crops are spent, the averaged weights are written to ``--out`` with their card: denoising PSNR
on photographs that were not trained on, beside BM3D where ``pip install bm3d`` was done.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import deepinv as dinv
import torch
from torch.utils.data import DataLoader

from deepinv_ud2m.data import RandomCrops, load_images
from deepinv_ud2m.priors import build_network, load_prior, save_prior
from deepinv_ud2m.training import denoising_psnr, train_prior

# %%
# The network, deepinv's ADMUNet on pixel-unshuffled images. ``pixel_std``, which the preconditioning
# needs, is about the root mean square of the pixels of photographs.
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
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a prior of photographs.")
    parser.add_argument("--train", required=True, help="folder of photographs to train on")
    parser.add_argument("--test", required=True, help="folder of other photographs")
    parser.add_argument("--out", type=Path, default=Path("runs/prior_photos"))
    parser.add_argument("--crops", type=int, default=128_000, help="crops seen")
    parser.add_argument("--size", type=int, default=64, help="side of the crops")
    parser.add_argument("--batch-size", type=int, default=16, help="crops per optimiser step")
    parser.add_argument("--epoch-crops", type=int, default=4_000, help="crops per checkpoint")
    parser.add_argument("--channels", type=int, default=64, help="width of the network")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--median", type=float, default=0.2, help="median noise level of training")
    parser.add_argument("--test-size", type=int, default=128, help="side of the centre crops to test on")
    parser.add_argument("--fast", action="store_true", help="compiled, in bfloat16")
    parser.add_argument("--workers", type=int, default=0, help="processes that cut crops, on a GPU many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny network, a few crops")
    args = parser.parse_args()
    if args.smoke:
        args.crops, args.epoch_crops, args.channels = 256, 128, 32
        args.batch_size, args.test_size = 32, 64
    return args


def main():
    args = parse_arguments()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    config = CONFIG | {"network": CONFIG["network"] | {"model_channels": args.channels}}

    # %%
    # Data: every process draws crops of its own. What cannot be read is found before the training.
    x_test = load_images(args.test, 3, args.test_size, skip_small=True)
    crops = RandomCrops(args.train, args.size, args.epoch_crops // world_size, verbose=True)
    loader = DataLoader(crops, batch_size=args.batch_size // world_size, num_workers=args.workers)

    # %%
    # Training.
    network = train_prior(
        config,
        loader,
        epochs=-(-args.crops // args.epoch_crops),
        lr=args.lr,
        median=args.median,
        checkpoint=args.out / "checkpoint.pt",
        seed=args.seed,
        fast=args.fast,
    )

    # %%
    # The card, and a figure. Test photographs have no part in the training.
    if int(os.environ.get("RANK", 0)) == 0:
        training = {
            "data": f"random crops at scales 1 to 4 of {len(crops.photographs)} photographs",
            "command": shlex.join(["python", "examples/train_prior_photos.py", *sys.argv[1:]]),
            "parameters": sum(p.numel() for p in build_network(config).parameters()),
            "crops": -(-args.crops // args.epoch_crops) * args.epoch_crops,
            "seed": args.seed,
        }
        save_prior(network.cpu(), config | {"training": training}, args.out)
        shipped = load_prior(args.out)  # in the float16 that ships
        metrics = evaluate(shipped, x_test)
        save_prior(network, config | {"training": training, "metrics": metrics}, args.out)
        plot(shipped, x_test, args.out / "denoised.png")
        print(metrics)
    if world_size > 1:
        torch.distributed.destroy_process_group()


def evaluate(prior, x):
    ours = {f"{sigma:g}": round(denoising_psnr(prior, x, sigma, batch_size=8), 2) for sigma in LEVELS}
    metrics = {"test_photographs": len(x), "size": x.shape[-1], "denoising_psnr": ours}
    try:
        bm3d = dinv.models.BM3D()
        of_bm3d = {
            f"{sigma:g}": round(denoising_psnr(bm3d, x, sigma, batch_size=1), 2) for sigma in LEVELS
        }
    except ImportError as error:
        print(f"without BM3D: {error}")
        return metrics
    return metrics | {"denoising_psnr_bm3d": of_bm3d}


def plot(prior, x, file, sigma=0.1):
    shown = x[:: max(1, len(x) // 6)][:6]
    noisy = shown + sigma * torch.randn(shown.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoised = prior(noisy, sigma)
    columns = {"truth": shown, f"noise {sigma:g}": noisy, "denoised": denoised}
    dinv.utils.plot(columns, rescale_mode="clip", show=False, save_fn=file, dpi=100)


if __name__ == "__main__":
    main()
