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

The weights of the shipped prior took 1 000 000 images, about two hours on two cores. Writing the
model card (``examples/make_prior_card.py``) is a separate step.
"""

import argparse
import os
from pathlib import Path

import deepinv as dinv
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from deepinv_ud2m.data import load_mnist, mnist_arrays
from deepinv_ud2m.priors import PRIOR_CONFIGS, build_network
from deepinv_ud2m.training import EDMLoss, LogNormalSigmaGenerator, PriorTrainer, warmup_cosine


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the MNIST prior.")
    parser.add_argument("--data", help="MNIST as an npz file; downloaded by torchvision if absent")
    parser.add_argument("--out", default="runs/prior_mnist", help="folder of the checkpoint")
    parser.add_argument("--images", type=int, default=1_000_000, help="training images seen")
    parser.add_argument("--batch-size", type=int, default=64, help="images per optimiser step")
    parser.add_argument("--epoch-images", type=int, default=20_000, help="images per checkpoint")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
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
    x, _ = mnist_arrays(args.data) if args.data else load_mnist("datasets", train=True)
    order = torch.Generator()
    batch_size = args.batch_size // world_size
    sampler = RandomSampler(x, num_samples=args.epoch_images // world_size, generator=order)
    loader = DataLoader(Digits(x), batch_size=batch_size, sampler=sampler)

    # %%
    # The network: EDM preconditioning is part of deepinv's ADMUNet.
    config = PRIOR_CONFIGS["mnist"]
    torch.manual_seed(args.seed)
    prior = build_network(config).train().requires_grad_(True)
    model = dinv.models.ArtifactRemoval(prior, mode="direct")
    if world_size > 1:
        model = DistributedDataParallel(model)

    # %%
    # Noise levels over more than four decades, weighted alike by the loss.
    levels = LogNormalSigmaGenerator(
        sigma_min=config["sigma_min"], sigma_max=config["sigma_max"], rng=torch.Generator()
    )
    optimizer = torch.optim.Adam(prior.parameters(), lr=args.lr, betas=(0.9, 0.99))
    epochs = -(-args.images // args.epoch_images)
    steps = epochs * len(loader)
    trainer = PriorTrainer(
        model=model,
        physics=dinv.physics.Denoising(dinv.physics.GaussianNoise()),
        physics_generator=levels,
        online_measurements=True,
        optimizer=optimizer,
        step_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps)),
        train_dataloader=loader,
        epochs=epochs,
        losses=EDMLoss(config["network"]["pixel_std"]),
        metrics=[],
        compute_train_metrics=False,
        grad_clip=1.0,
        check_grad=True,  # deepinv 0.5.0 cannot clip without it
        device="cpu" if not torch.cuda.is_available() else "cuda",
        checkpoint=Path(args.out) / "checkpoint.pt",
        seed=args.seed,
        generators=[order, levels.rng],
        verbose=rank == 0,
        freq_update_progress_bar=20,
    )
    trainer.train()


if __name__ == "__main__":
    main()
