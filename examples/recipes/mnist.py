r"""
Distil a posterior sampler of digits
====================================

The sampler starts from the prior ``load_prior("mnist")`` and is trained on the 60 000 training digits, in
three stages:

1. The initial estimate of x given y and the state, by a network that also predicts its error.
2. Samples of :math:`p(x \mid y, x_s)` at single levels s.
3. Samples of the whole sampler, with gradients through all of its levels.

The losses of the last two are energy scores, which are lowest for the posterior itself. With ``--quick`` the
script shows the gain in minutes, on super-resolution:

.. code-block:: bash

    python examples/recipes/mnist.py --quick

Without it, the script trains one sampler for several tasks, for hours on a CPU. A run that was stopped goes
on when it is started again with the same arguments.
"""

import argparse
from pathlib import Path

import torch
from stages import save, train_in_stages
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M, PosteriorMeanInitializer, UnfoldedDenoiser, WienerInitializer, load_prior
from deepinv_ud2m.data import load_mnist, mnist_digits
from deepinv_ud2m.metrics import DigitClassifier, PerceptualDistance
from deepinv_ud2m.physics import TASKS
from deepinv_ud2m.training import EnergyScoreLoss

ALL_TASKS = ["sr4", "sr4-paper", "deblur-gaussian", "inpaint-random", "inpaint-box"]


def parse_arguments():
    parser = argparse.ArgumentParser(description="Distil a sampler of digits.")
    parser.add_argument("--train", help="training digits, npz; torchvision downloads them if absent")
    parser.add_argument("--out", type=Path, default=Path("runs/ud2m_mnist"))
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=ALL_TASKS, metavar="TASK")
    parser.add_argument("--sigma-y", type=float, nargs=2, default=[0.02, 0.1], help="range of the noise")
    parser.add_argument(
        "--updates",
        type=int,
        nargs=3,
        default=[6000, 3000, 1500],
        help="optimiser steps of the three stages; 0 leaves one out, without the first a Wiener filter "
        "gives the initial estimate",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="measurements per optimiser step")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument(
        "--diversity-weight", type=float, default=1.0, help="1 for the posterior, less for similar samples"
    )
    parser.add_argument(
        "--classifier",
        help="folder of digit_classifier.py, to add the energy score of what it sees; take another than the "
        "one that ships, which measures",
    )
    parser.add_argument("--fast", action="store_true", help="compiled, in bfloat16; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few minutes, super-resolution only")
    if parser.parse_args().quick:  # other defaults
        parser.set_defaults(tasks=["sr4"], updates=[300, 200, 0], batch_size=16)
    return parser.parse_args()


def main():
    args = parse_arguments()
    digits, _ = load_mnist("datasets", train=True, npz=args.train)
    model = make_model(digits, args)

    def losses(device):
        found = [EnergyScoreLoss(diversity_weight=args.diversity_weight)]
        if args.classifier:
            classifier = DigitClassifier.from_pretrained(args.classifier)
            features = PerceptualDistance(classifier, device=device).embedding
            options = {"diversity_weight": args.diversity_weight, "weight": 5.0}
            found.append(EnergyScoreLoss(features=features, **options))
        return found

    loader = DataLoader(digits, args.batch_size, shuffle=True, drop_last=True)
    shown = mnist_digits("validation", num=8 if args.quick else 32)
    validation = train_in_stages(model, loader, shown, losses, args, args.lr, tuple(args.sigma_y))
    save(model, args, data="MNIST training set (LeCun & Cortes, CC BY-SA 3.0)", validation=validation)


def make_model(digits, args):
    """All weights of the prior are trained. Multipliers and levels start as for what ships."""
    torch.manual_seed(args.seed)
    initializer = WienerInitializer.fit(digits)
    start = {"delta": [3.2, 2.57, 0.72], "rho": [2.08, 3.63, 1.46]}
    if args.updates[0]:
        initializer = PosteriorMeanInitializer.from_prior("mnist", initializer)
        start = {"delta": [4.5, 1.3], "rho": [2.0, 2.0]}
    prior = load_prior("mnist")
    unfolded = UnfoldedDenoiser(prior, len(start["rho"]), initializer, train_prior="all", **start)
    nominal_rmse = 0.22 if unfolded.predicts_rmse else None
    return UD2M(unfolded, sigmas=[78.7, 0.66, 0.077], nominal_rmse=nominal_rmse)


if __name__ == "__main__":
    main()
