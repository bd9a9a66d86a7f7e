r"""
A trained first guess for a sampler of digits
=============================================

A sampler whose iterations start from a Wiener filter spends most of them on what a network trained for
the measurements tells at once. This trains such a network, the posterior mean of x given y and the
state, and the error that it states, on the tasks of the benchmark. With the denoiser of a trained
sampler it makes a new one, of one evaluation of that network and K = 2 iterations at each level, which
``train_mnist.py --start`` then trains as a whole:

.. code-block:: bash

    python examples/train_mnist_first_guess.py --fast

With ``--start`` it trains the first guess that a sampler has, and leaves the rest of it as it is. A task
named twice is drawn twice as often. A stopped run goes on when it is started again with the same
arguments.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from train_mnist import ALL_TASKS, check_arguments, operators_and_levels

from deepinv_ud2m import UD2M, PosteriorMeanInitializer, UnfoldedDenoiser
from deepinv_ud2m.benchmark.tasks import TASKS, make_physics
from deepinv_ud2m.data import load_mnist, mnist_digits
from deepinv_ud2m.training import (
    FirstGuessLoss,
    FirstGuessTrainer,
    SamplerLevels,
    parameter_groups,
    sampler_to_train,
    warmup_cosine,
)
from deepinv_ud2m.wiener import WienerInitializer

parser = argparse.ArgumentParser(description="Train the first guess of a sampler of digits.")
parser.add_argument("--train", help="training digits, npz; torchvision downloads them if absent")
parser.add_argument("--out", type=Path, default=Path("runs/first_guess"))
parser.add_argument("--sampler", help='whose denoiser and levels it takes; "mnist"')
parser.add_argument("--start", help="sampler whose first guess is trained on, instead")
parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=ALL_TASKS, metavar="TASK")
parser.add_argument("--sigma-y", type=float, nargs=2, default=[0.02, 0.1], help="range of noise")
parser.add_argument("--delta", type=float, nargs="+", help="K, to start from; 4.5 1.3")
parser.add_argument("--rho", type=float, nargs="+", help="likewise; 2 2")
parser.add_argument("--updates", type=int, default=3000, help="optimiser steps")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--fast", action="store_true", help="compiled, in bfloat16; needs a C++ compiler")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
check_arguments(parser, args, counts=("updates", "batch_size"), rates=("lr",))
if args.start and (args.sampler or args.delta or args.rho):
    parser.error("--sampler, --delta and --rho cannot be given with --start: that sampler has its own")
delta, rho = args.delta or [4.5, 1.3], args.rho or [2.0, 2.0]
if len(delta) != len(rho):
    parser.error(f"--delta and --rho must be as many, got {delta} and {rho}")

# %%
# The network starts as the prior, with further images to see, or as that of a trained first guess.
torch.manual_seed(args.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"
name = args.start or args.sampler or "mnist"
sampler = sampler_to_train(name, all_weights=True)
if args.start and not isinstance(sampler.unfolded.initializer, PosteriorMeanInitializer):
    parser.error(f"--start must be a sampler with a trained first guess, got {name}")
sampler.unfolded.denoiser.requires_grad_(False)  # until the end
digits, _ = load_mnist("datasets", train=True, npz=args.train)
if args.start:
    model, unfolded, initializer = sampler, sampler.unfolded, sampler.unfolded.initializer
else:
    initializer = PosteriorMeanInitializer.from_prior("mnist", WienerInitializer.fit(digits))
    unfolded = UnfoldedDenoiser(sampler.unfolded.denoiser, len(delta), initializer, delta=delta, rho=rho)
    model = UD2M(unfolded, levels=sampler.levels.tolist(), eta=sampler.eta)

# %%
# Half of the states are at the first level, where there is y alone; most others at the sampler's.
shape = (1, 32, 32)
of_sampler = SamplerLevels(model, share=0.7)


def levels(batch_size):
    first = torch.rand(batch_size) < 0.5
    return torch.where(first, model.levels[0].cpu(), of_sampler(batch_size))


trainer = FirstGuessTrainer(
    model=model,
    physics=[make_physics(task, shape, device=device) for task in args.tasks],
    physics_generator=[operators_and_levels(task, shape, args.sigma_y, device) for task in args.tasks],
    train_dataloader=DataLoader(digits, args.batch_size, shuffle=True, drop_last=True),
    losses=FirstGuessLoss(),
    optimizer=torch.optim.Adam(
        parameter_groups(unfolded, lr_initializer=args.lr, weight_decay=0.0), betas=(0.9, 0.99)
    ),
    lr_schedule=warmup_cosine(args.updates, warmup_steps=100),
    grad_clip=1.0,
    steps=args.updates,
    levels=levels,
    compile=args.fast,
    mixed_precision="bfloat16" if args.fast else False,
    ckp_interval=200,
    save_path=args.out,
    settings={"tasks": args.tasks, "sigma_y": args.sigma_y, "sampler": name},
    seed=args.seed,
    device=device,
)
model = trainer.train()

# %%
# What it knows of y alone: its PSNR on validation digits, and the error it states against its own.
x = mnist_digits("validation", num=256).to(device)
scores = {}
for task in args.tasks:
    torch.manual_seed(0)
    physics = make_physics(task, shape, device=device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        states = model.first_state(x)
        m, h = initializer.estimate(physics(x), physics, states, model.levels[0], 0.05)
    mse = (m - x).square().flatten(1).mean(1)
    scores[task] = {
        "PSNR": -10 * mse.log10().mean().item(),
        "error": mse.mean().sqrt().item(),
        "stated": h.square().mean().sqrt().item(),
        "correlation": torch.corrcoef(torch.stack([mse.sqrt(), h.flatten()]))[0, 1].item(),
    }
    print(task, ", ".join(f"{name} {value:.4g}" for name, value in scores[task].items()))

# %%
unfolded.denoiser.requires_grad_(True)  # the weights of a sampler, which are to be stored with it
training = {
    "command": shlex.join(["python", "examples/train_mnist_first_guess.py", *sys.argv[1:]]),
    "sampler": name,
    "data": "MNIST training set, 60 000 digits (LeCun & Cortes, CC BY-SA 3.0)",
    "tasks": args.tasks,
    "sigma_y": args.sigma_y,
    "measurements": args.updates * args.batch_size,
    "seed": args.seed,
    "first_guess": scores,
}
model.save_pretrained(args.out / "model", metadata=training, dtype=torch.float16)
print(f"written to {args.out / 'model'}: UD2M.from_pretrained({str(args.out / 'model')!r})")
