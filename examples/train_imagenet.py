r"""
Distil a posterior sampler at the scale of the paper
====================================================

The ADM network for ImageNet at 256 x 256 pixels gets a LoRA of rank 5 on its attention, and K unfolded
iterations of LATINO are trained with the settings of the paper's Table 9: AdamW, learning rate 1e-4;
squared error, perceptual distance and a conditional discriminator. It wants a GPU, or several:

.. code-block:: bash

    python examples/train_imagenet.py --train imagenet/train --download --bfloat16 --checkpointing
    torchrun --nproc_per_node 4 examples/train_imagenet.py --train imagenet/train --accumulate 4

Processes share the ``--accumulate`` batches of a step. A stopped run goes on when it is started again
with the same arguments, also with another number of processes. ``--smoke`` runs everything in miniature,
on a network of the same class with random weights.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import deepinv as dinv
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from deepinv_ud2m import UD2M, RAMInitializer, UnfoldedDenoiser, add_lora, load_prior
from deepinv_ud2m.benchmark.tasks import TASKS, make_generator, make_physics
from deepinv_ud2m.data.images import EXTENSIONS
from deepinv_ud2m.published import PUBLISHED, random_prior
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    ConditionalDiscriminator,
    DistillationTrainer,
    L2Loss,
    PerceptualLoss,
    parameter_groups,
)

#: The degradations of the paper's ImageNet experiments.
IMAGENET = ["deblur-gaussian", "deblur-uniform", "deblur-motion", "sr4-bicubic", "jpeg-10"]


def parse_arguments(prior, tasks, sigma_y, batch_size):
    parser = argparse.ArgumentParser(description="Distil a sampler with the settings of the paper.")
    parser.add_argument("--train", required=True, help="folder of images, subfolders included")
    parser.add_argument("--prior", choices=sorted(PUBLISHED), default=prior)
    parser.add_argument("--weights", help="file or folder of the prior's weights")
    parser.add_argument("--download", action="store_true", help="download weights that are not here")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=tasks, metavar="TASK")
    parser.add_argument("--sigma-y", type=float, nargs=2, default=[sigma_y, sigma_y], help="noise")
    parser.add_argument("--one-operator", action="store_true", help="of the paper, not random ones")
    parser.add_argument("--ram", action="store_true", help="start each level from deepinv's RAM")
    parser.add_argument("--perceptual", default="lpips-vgg", help="network of the perceptual distance")
    parser.add_argument("--iterations", type=int, default=3, help="K, unfolded iterations")
    parser.add_argument("--steps", type=int, default=3, help="N, levels of the sampler")
    parser.add_argument("--rank", type=int, default=5, help="of LoRA")
    parser.add_argument("--size", type=int, default=256, help="side of the crops")
    parser.add_argument("--updates", type=int, default=100_000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="measurements per batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimiser step")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--bfloat16", action="store_true", help="networks in mixed precision")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"ud2m_{prior}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two steps, random weights, small images")
    args = parser.parse_args()
    linear = [task for task in args.tasks if not task.startswith("jpeg")]
    if args.ram and args.tasks not in (tasks, linear):
        parser.error(
            f"--ram: RAM takes linear operators, --tasks must be without JPEG, got {args.tasks}"
        )
    if args.ram:
        args.tasks = linear
    if args.smoke:
        args.size, args.updates, args.batch_size, args.iterations = 32, 2, 2, 2
        args.perceptual, args.workers, args.tasks = "efficientnet", 0, args.tasks[:2]
    return args


def main(prior="imagenet256", tasks=IMAGENET, sigma_y=0.01, batch_size=2, penalty=2.5):
    args = parse_arguments(prior, tasks, sigma_y, batch_size)
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "LOCAL_RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")

    # %%
    # Images, read when they are needed; training and evaluation crops.
    images = open_images(args)
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    shown = DataLoader(torch.utils.data.Subset(images, range(min(4, len(images)))), args.batch_size)

    # %%
    # The model: adapter on the attention, output layer, scalars, and RAM if asked for.
    model = make_model(args)
    trained = sum(p.numel() for p in model.unfolded.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.unfolded.parameters())
    print(f"{trained:,} of {total:,} parameters are trained, {100 * trained / total:.2f} %")

    # %%
    # One physics for each degradation; random operators of its kind unless there is to be only one.
    shape = (3, args.size, args.size)
    physics = [make_physics(task, shape, args.sigma_y[0], device) for task in args.tasks]
    generators = [make_generator(task, shape, args.sigma_y, device=device) for task in args.tasks]

    # %%
    # Table 9: weights 1, 0.1 and 0.01 of squared error, perceptual distance and discriminator. The
    # paper's penalty, 10 for ImageNet, is of images in [-1, 1]: a quarter of it in [0, 1].
    D = ConditionalDiscriminator(3)
    groups = parameter_groups(model.unfolded, lr=1e-4, lr_initializer=1e-5, weight_decay=0.01)
    trainer = DistillationTrainer(
        model=model,
        physics=physics,
        physics_generator=None if args.one_operator else generators,
        train_dataloader=loader,
        eval_dataloader=shown,
        losses=[
            L2Loss("x0"),
            PerceptualLoss(args.perceptual, download=args.download, weight=0.1),
            AdversarialGeneratorLoss(weight=0.01),
        ],
        losses_d=[AdversarialDiscriminatorLoss(penalty_weight=penalty)],
        D=D,
        optimizer=dinv.training.AdversarialOptimizer(
            torch.optim.AdamW(groups),
            torch.optim.AdamW(D.parameters(), lr=1e-4, weight_decay=0.01),
        ),
        steps=args.updates,
        accumulate=args.accumulate,
        checkpointing=args.checkpointing,
        mixed_precision="bfloat16" if args.bfloat16 else False,
        eval_samples=2,
        eval_interval=2 if args.smoke else 5000,
        ckp_interval=2 if args.smoke else 500,
        plot_images=True,
        save_path=args.out,
        settings={name: getattr(args, name) for name in ("tasks", "sigma_y", "size", "one_operator")},
        seed=args.seed,
        device=device,
    )
    model = trainer.train()
    if trainer.writes:
        training = {"command": shlex.join(["python", *sys.argv]), "data": str(args.train)}
        named = None if args.smoke else args.prior
        model.save_pretrained(args.out / "model", prior=named, metadata=training)
        print(f"written to {args.out / 'model'}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def open_images(args):
    crop = v2.Compose(
        [
            v2.Resize(args.size),
            v2.RandomCrop(args.size),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.RGB(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    if not Path(args.train).is_dir():
        raise SystemExit(f"--train: there is no folder {args.train}")
    images = dinv.datasets.ImageFolder(args.train, x_path="**/*", transform=crop)
    # ImageNet's files end with .JPEG; by itself deepinv knows lower-case endings only.
    images.x_paths = [path for path in images.x_paths if path.suffix.lower() in EXTENSIONS]
    if len(images) < args.batch_size:
        raise SystemExit(
            f"--train: {args.train} and its subfolders have {len(images)} images, "
            f"a batch has {args.batch_size}"
        )
    return images


def make_model(args):
    torch.manual_seed(args.seed)
    if args.smoke:
        prior = random_prior(args.prior)
    else:
        prior = load_prior(args.prior, weights=args.weights, download=args.download)
    initializer = None
    if args.ram:
        initializer = RAMInitializer(dinv.models.RAM(pretrained=not args.smoke), trainable=True)
    unfolded = UnfoldedDenoiser(prior, args.iterations, initializer)
    add_lora(prior, args.rank)
    prior.output_layer.requires_grad_(True)
    return UD2M(unfolded, args.steps)


if __name__ == "__main__":
    main()
