r"""
Train a diffusion prior on MNIST
================================

A diffusion prior is a Gaussian denoiser that works at every noise level:

.. math:: D(w, \delta) \approx E[x \mid x + \delta n = w], \qquad 0.002 \leq \delta \leq 80 .

This script trains the one that ships as ``load_prior("mnist")``, on the 60 000 training digits. Two processes
share the work with

.. code-block:: bash

    torchrun --nproc_per_node 2 examples/recipes/prior_mnist.py --out runs/prior_mnist

A run that was stopped goes on when it is started again with the same arguments. At the end the averaged
weights are written to ``--out`` with their card: denoising PSNR on the 10 000 test digits, and the Fréchet
distance of unconditional samples to them.
"""

import argparse
import shlex
import sys
from pathlib import Path

import deepinv as dinv
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, RandomSampler

from deepinv_ud2m.data import load_mnist
from deepinv_ud2m.metrics import DigitClassifier, frechet_distance
from deepinv_ud2m.priors import load_prior, save_prior
from deepinv_ud2m.training import denoising_psnr, train_prior

#: The network: deepinv's ADMUNet, which brings the EDM preconditioning, on pixel-unshuffled digits.
#: ``pixel_std`` is the root mean square of the padded digits.
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
SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the prior of digits.")
    parser.add_argument("--train", help="training digits, npz; torchvision downloads them if absent")
    parser.add_argument("--test", help="test digits, npz; likewise")
    parser.add_argument("--out", type=Path, default=Path("runs/prior_mnist"))
    parser.add_argument("--images", type=int, default=640_000, help="training images seen")
    parser.add_argument("--batch-size", type=int, default=64, help="images per optimiser step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=5000, help="samples for the Fréchet distance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps and samples")
    if parser.parse_args().quick:  # other defaults
        parser.set_defaults(images=64, batch_size=32, samples=100)
    return parser.parse_args()


def main():
    args = parse_arguments()
    # Each process draws its own digits, at random with replacement between epochs. An epoch ends with a
    # checkpoint.
    x, _ = load_mnist("datasets", train=True, npz=args.train)
    order, epoch_images = torch.Generator(), min(20_000, args.images)
    state = PartialState(cpu=not torch.cuda.is_available())
    sampler = RandomSampler(x, num_samples=epoch_images // state.num_processes, generator=order)
    loader = DataLoader(x, batch_size=args.batch_size // state.num_processes, sampler=sampler)
    network = train_prior(
        CONFIG,
        loader,
        epochs=-(-args.images // epoch_images),
        lr=args.lr,
        checkpoint=args.out / "checkpoint.pt",
        seed=args.seed,
        generators=[order],
    ).cpu()
    if not state.is_main_process:
        return

    # The card, of the float16 weights that are written. Test digits and samples have no part in the training.
    training = {
        "data": "MNIST, all 60 000 training digits, zero-padded to 32x32 (LeCun & Cortes, CC BY-SA 3.0)",
        "command": shlex.join(["python", "examples/recipes/prior_mnist.py", *sys.argv[1:]]),
        "processes": state.num_processes,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    save_prior(network, CONFIG | {"training": training}, args.out)
    x_test, _ = load_mnist("datasets", train=False, npz=args.test)
    metrics = evaluate(load_prior(args.out), x_test, x, args)
    save_prior(network, CONFIG | {"training": training, "metrics": metrics}, args.out)
    print(metrics)


def evaluate(prior, x_test, x_train, args):
    """Denoising PSNR of each noise level, and the Fréchet distance of samples and of training digits."""
    features = DigitClassifier.from_pretrained().features
    samples = unconditional_samples(prior, args.samples, seed=args.seed)
    dinv.utils.plot(
        [samples[i : i + 8] for i in range(0, 64, 8)],
        show=False,
        max_imgs=8,
        rescale_mode="clip",
        save_fn=args.out / "samples.png",
        dpi=100,
    )
    order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(args.seed))
    of_training = x_train[order[: args.samples]]
    distances = {"samples": samples, "training digits": of_training}
    distances = {name: frechet_distance(x, x_test, features).item() for name, x in distances.items()}
    return {
        "test_images": len(x_test),
        "denoising_psnr": {f"{sigma:g}": round(denoising_psnr(prior, x_test, sigma), 2) for sigma in SIGMAS},
        "frechet_distance_to_test": {f"{args.samples} {name}": round(d, 3) for name, d in distances.items()},
        "frechet_features": "64 features of the shipped digit classifier (squared distance)",
        "sampler": "deepinv VarianceExplodingDiffusion, Heun ODE, 18 levels from 80 to 0.02",
    }


@torch.no_grad()
def unconditional_samples(prior, num, seed, batch_size=250, num_levels=18):
    """Samples of the prior by deepinv's probability-flow ODE, at the noise levels of Karras et al. 2022."""
    low, high = 0.02, 80.0
    ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64)
    sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    times = (sigmas / low).log() / torch.tensor(high / low).log()
    solver = dinv.sampling.HeunSolver(timesteps=times, rng=torch.Generator().manual_seed(seed))
    settings = {"sigma_min": low, "sigma_max": high, "alpha": 0.0}
    sde = dinv.sampling.VarianceExplodingDiffusion(prior, solver=solver, **settings)
    images = []
    for start in range(0, num, batch_size):
        x = sde.sample((min(batch_size, num - start), 1, 32, 32)).float()
        images.append(prior(x, low).clamp(0, 1))
    return torch.cat(images)


if __name__ == "__main__":
    main()
