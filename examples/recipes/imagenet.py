r"""
Distil a posterior sampler at the scale of the paper
====================================================

A published diffusion network for images of 256 x 256 pixels gets a LoRA of rank 5 on its attention, and three
unfolded iterations are trained with the settings of the paper's Table 9: AdamW with learning rate 1e-4,
squared error, perceptual distance, and a conditional discriminator. ``--dataset lsun`` takes the network for
bedrooms, which needs ``pip install -e ".[diffusers]"``. It wants a GPU, or several:

.. code-block:: bash

    python examples/recipes/imagenet.py --train imagenet/train --download --bfloat16 --checkpointing
    torchrun --nproc_per_node 4 examples/recipes/imagenet.py --train imagenet/train --bfloat16 --accumulate 4

Processes share the ``--accumulate`` batches of a step. A run that was stopped goes on when it is started
again with the same arguments, also with another number of processes. ``--smoke`` runs everything in
miniature, on a network of the same class with random weights.
"""

import argparse
import shlex
import sys
from pathlib import Path

import deepinv as dinv
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from deepinv_ud2m import UD2M, RAMInitializer, UnfoldedDenoiser, add_lora, load_prior
from deepinv_ud2m.data.images import EXTENSIONS
from deepinv_ud2m.physics import make_generator, make_physics
from deepinv_ud2m.priors import random_prior
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    Adversary,
    ConditionalDiscriminator,
    DistillationTrainer,
    L2Loss,
    PerceptualLoss,
    parameter_groups,
)

#: Prior, degradations, noise and weight of the gradient penalty in the paper's experiments. The paper's
#: images are in [-1, 1]; a penalty of images in [0, 1] has a quarter of its weight.
DATASETS = {
    "imagenet": {
        "prior": "imagenet256",
        "tasks": ["deblur-gaussian", "deblur-uniform", "deblur-motion", "sr4-bicubic", "jpeg-10"],
        "sigma_y": 0.01,
        "penalty": 2.5,
    },
    "lsun": {
        "prior": "lsun-bedroom256",
        "tasks": ["inpaint-box", "inpaint-random", "deblur-gaussian", "sr4-bicubic"],
        "sigma_y": 0.025,
        "penalty": 0.0025,
    },
}


def parse_arguments():
    parser = argparse.ArgumentParser(description="Distil a sampler with the settings of the paper.")
    parser.add_argument("--train", type=Path, required=True, help="folder of images, subfolders included")
    parser.add_argument("--dataset", choices=DATASETS, default="imagenet", help="whose settings to take")
    parser.add_argument("--weights", help="file or folder of the prior's weights")
    parser.add_argument("--download", action="store_true", help="download weights that are not here")
    parser.add_argument("--ram", action="store_true", help="start each level from deepinv's RAM")
    parser.add_argument("--updates", type=int, default=100_000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=2, help="measurements per batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimiser step")
    parser.add_argument("--bfloat16", action="store_true", help="networks in mixed precision")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--out", type=Path, default=Path("runs/ud2m_256"))
    parser.add_argument("--smoke", action="store_true", help="two steps, random weights, small images")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.manual_seed(0)
    settings = DATASETS[args.dataset]
    size, updates = (32, 2) if args.smoke else (256, args.updates)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = open_images(args.train, size)
    if len(images) < args.batch_size:
        sys.exit(f"--train: {args.train} has {len(images)} images, a batch has {args.batch_size}")
    workers = 0 if args.smoke else 4
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True, num_workers=workers)
    shown = DataLoader(Subset(images, range(min(4, len(images)))), args.batch_size)

    # Random operators of each degradation. RAM takes linear ones only.
    tasks = [task for task in settings["tasks"] if not (args.ram and task.startswith("jpeg"))]
    tasks = tasks[:2] if args.smoke else tasks
    shape, sigma_y = (3, size, size), settings["sigma_y"]
    physics = [make_physics(task, shape, sigma_y, device) for task in tasks]
    generators = [make_generator(task, shape, (sigma_y, sigma_y), device=device) for task in tasks]

    model = make_model(settings["prior"], args)
    trained = sum(p.numel() for p in model.unfolded.trained_parameters().values())
    total = sum(p.numel() for p in model.unfolded.parameters())
    print(f"{trained:,} of {total:,} parameters are trained, {trained / total:.2%}")

    perceptual = "efficientnet" if args.smoke else "lpips-vgg"
    penalty = AdversarialDiscriminatorLoss(penalty_weight=settings["penalty"])
    trainer = DistillationTrainer(
        model=model,
        physics=physics,
        physics_generator=generators,
        train_dataloader=loader,
        eval_dataloader=shown,
        losses=[
            L2Loss(),
            PerceptualLoss(perceptual, download=args.download, weight=0.1),
            AdversarialGeneratorLoss(weight=0.01),
        ],
        adversary=Adversary(ConditionalDiscriminator(3), penalty),
        optimizer=torch.optim.AdamW(parameter_groups(model.unfolded, lr=1e-4, lr_initializer=1e-5)),
        steps=updates,
        accumulate=args.accumulate,
        checkpointing=args.checkpointing,
        mixed_precision="bfloat16" if args.bfloat16 else False,
        eval_samples=2,
        eval_interval=min(updates, 5000),
        plot_images=True,
        save_path=args.out,
        settings={"dataset": args.dataset, "tasks": tasks, "size": size},
        device=device,
    )
    model = trainer.train()
    if trainer.writes:
        command = shlex.join(["python", "examples/recipes/imagenet.py", *sys.argv[1:]])
        metadata = {"command": command, "data": str(args.train), "tasks": tasks}
        named = None if args.smoke else settings["prior"]
        model.save_pretrained(args.out / "model", prior=named, metadata=metadata)
        print(f"written to {args.out / 'model'}")


def open_images(folder, size):
    """Random crops of all images in a folder and its subfolders, read when they are needed."""
    if not folder.is_dir():
        sys.exit(f"--train: there is no folder {folder}")
    crop = [v2.Resize(size), v2.RandomCrop(size), v2.RandomHorizontalFlip()]
    convert = [v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True)]
    images = dinv.datasets.ImageFolder(folder, x_path="**/*", transform=v2.Compose(crop + convert))
    # ImageNet's files end with .JPEG; deepinv knows lower-case endings only.
    images.x_paths = [path for path in images.x_paths if path.suffix.lower() in EXTENSIONS]
    return images


def make_model(name, args):
    """Trained are the adapter, the output layer, the scalars, and RAM if it is asked for."""
    options = {"weights": args.weights, "download": args.download}
    prior = random_prior(name) if args.smoke else load_prior(name, **options)
    add_lora(prior, 5)
    output = next(name for name, layer in prior.named_modules() if layer is prior.output_layer)
    initializer = None
    if args.ram:
        initializer = RAMInitializer(dinv.models.RAM(pretrained=not args.smoke), trainable=True)
    return UD2M(UnfoldedDenoiser(prior, 3, initializer, train_prior=[output]), num_steps=3)


if __name__ == "__main__":
    main()
