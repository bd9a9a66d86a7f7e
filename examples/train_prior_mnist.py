r"""
Train a diffusion prior on MNIST
================================

A diffusion prior is a Gaussian denoiser that works at every noise level,

.. math:: D(w, \delta) \approx E[x \mid x + \delta n = w], \qquad 0.002 \leq \delta \leq 80 .

This script trains the one that ships as ``load_prior("mnist")``, on all 60 000 training digits.
The physics, the model wrapper and the loop are deepinv's. A stopped run resumes: call it again with
the same arguments. Two processes share the work with

.. code-block:: bash

    torchrun --nproc_per_node 2 examples/train_prior_mnist.py --out runs/prior_mnist

When the training images are spent, the averaged weights are written to ``--out`` with their model
card: denoising PSNR on the 10 000 test digits, and the Frechet distance of unconditional samples to
them. The shipped prior was made by the command in its card, ``weights/prior-mnist/config.json``.
"""

import argparse
import os
from pathlib import Path

import deepinv as dinv
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from deepinv_ud2m.data import load_mnist
from deepinv_ud2m.metrics import DigitClassifier, frechet_distance
from deepinv_ud2m.priors import build_network, load_prior, save_prior
from deepinv_ud2m.training import denoising_psnr, train_prior

# %%
# The network: deepinv's ADMUNet, which brings the EDM preconditioning, on pixel-unshuffled digits.
# ``pixel_std`` is the root mean square of the padded digits.
CONFIG = {
    "prior": {
        "name": "mnist",
        "channels": 1,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "size_multiple": 8,
        "image_size": 32,
    },
    "network": {
        "pixel_shuffle": 2,
        "img_resolution": 16,
        "model_channels": 64,
        "channel_mult": [1, 1, 1],
        "channel_mult_emb": 2,
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
        "pixel_std": 0.29,
    },
}


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the MNIST prior.")
    parser.add_argument("--train", help="training digits, npz; torchvision downloads them if absent")
    parser.add_argument("--test", help="test digits, npz; likewise")
    parser.add_argument("--out", default="runs/prior_mnist", help="folder of checkpoint and prior")
    parser.add_argument("--images", type=int, default=640_000, help="training images seen")
    parser.add_argument("--batch-size", type=int, default=64, help="images per optimiser step")
    parser.add_argument("--epoch-images", type=int, default=20_000, help="images per checkpoint")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=5000, help="samples for the Frechet distance")
    return parser.parse_args()


class Digits(TensorDataset):
    """Digits without labels: deepinv makes the measurements."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0]


def main():
    args = parse_arguments()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))

    # %%
    # Data: every process draws its own digits, at random with replacement between epochs.
    x, _ = load_mnist("datasets", train=True, npz=args.train)
    order = torch.Generator()
    batch_size = args.batch_size // world_size
    sampler = RandomSampler(x, num_samples=args.epoch_images // world_size, generator=order)
    loader = DataLoader(Digits(x), batch_size=batch_size, sampler=sampler)

    # %%
    # The network, deepinv's trainer, and noise levels over more than four decades, weighted alike.
    epochs = -(-args.images // args.epoch_images)
    averaged = train_prior(
        CONFIG,
        loader,
        epochs,
        lr=args.lr,
        checkpoint=Path(args.out) / "checkpoint.pt",
        seed=args.seed,
        generators=[order],
    )

    # %%
    # The card. Test digits and samples have no part in the training.
    if rank == 0:
        card = {"training": describe_training(args, epochs, batch_size * world_size)}
        save_prior(averaged, CONFIG | card, args.out)
        shipped = load_prior(args.out)  # in the float16 that ships
        metrics = evaluate(shipped, load_mnist("datasets", train=False, npz=args.test)[0], x, args)
        save_prior(averaged, CONFIG | card | {"metrics": metrics}, args.out)


def describe_training(args, epochs, batch_size):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = f"--images {args.images} --batch-size {args.batch_size} --lr {args.lr} --seed {args.seed}"
    return {
        "data": "MNIST, all 60 000 training digits, zero-padded to 32x32 (LeCun & Cortes, CC BY-SA 3.0)",
        "command": f"torchrun --nproc_per_node {processes} examples/train_prior_mnist.py {options}",
        "parameters": sum(p.numel() for p in build_network(CONFIG).parameters()),
        "images": epochs * args.epoch_images,
        "batch_size": batch_size,
        "optimizer": f"Adam, learning rate {args.lr}, half-cosine decay, EMA 0.9995 of the weights",
        "loss": "EDM-weighted l2; log-normal levels, median 0.25, spread 1.4, 10 % log-uniform",
        "seed": args.seed,
    }


def evaluate(prior, x_test, x_train, args):
    """Denoising PSNR per level, and the Frechet distance of samples and of training digits."""
    features = DigitClassifier.from_pretrained().features
    samples = unconditional_samples(prior, args.samples, seed=args.seed)
    dinv.utils.plot(
        [samples[i : i + 8] for i in range(0, 64, 8)],
        show=False,
        rescale_mode="clip",
        save_fn=Path(args.out) / "samples.png",
        dpi=100,
    )
    order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(args.seed))
    distance = {
        f"{args.samples} samples": frechet_distance(samples, x_test, features).item(),
        f"{args.samples} training digits": frechet_distance(
            x_train[order[: args.samples]], x_test, features
        ).item(),
    }
    psnr = {f"{s:g}": round(denoising_psnr(prior, x_test, s), 2) for s in (0.05, 0.1, 0.2, 0.5, 1.0)}
    metrics = {
        "test_images": len(x_test),
        "denoising_psnr": psnr,
        "frechet_distance_to_test": {k: round(v, 3) for k, v in distance.items()},
        "frechet_features": "64 features of the shipped digit classifier (squared distance)",
        "sampler": "deepinv VarianceExplodingDiffusion, Heun ODE, 18 levels from 80 to 0.02",
    }
    print(metrics)
    return metrics


@torch.no_grad()
def unconditional_samples(prior, num, seed, batch_size=250, num_levels=18):
    """Samples of the prior by deepinv's probability-flow ODE, at the levels of Karras et al. 2022."""
    low, high = 0.02, 80.0
    ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64)
    levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    times = (levels / low).log() / torch.tensor(high / low).log()
    generator = torch.Generator().manual_seed(seed)
    solver = dinv.sampling.HeunSolver(timesteps=times, rng=generator)
    sde = dinv.sampling.VarianceExplodingDiffusion(
        prior, sigma_min=low, sigma_max=high, alpha=0.0, solver=solver
    )
    images = []
    for start in range(0, num, batch_size):
        x = sde.sample((min(batch_size, num - start), 1, 32, 32)).float()
        images.append(prior(x, low).clamp(0, 1))
    return torch.cat(images)


if __name__ == "__main__":
    main()
