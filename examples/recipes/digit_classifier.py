r"""
Train the digit classifier
==========================

Trains :class:`deepinv_ud2m.metrics.DigitClassifier` on the 60 000 training digits of MNIST. Its layers
compare digits in the perceptual distance, and its features in the Fréchet distance. A few minutes on one CPU
thread::

    python examples/recipes/digit_classifier.py --train train.npz --test test.npz --out runs/classifier

Without ``--train`` and ``--test``, torchvision downloads MNIST (see :func:`deepinv_ud2m.data.load_mnist`).
What ships in ``deepinv_ud2m/weights/mnist-classifier`` was trained with seed 0.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from deepinv_ud2m.data import load_mnist
from deepinv_ud2m.metrics import DigitClassifier


def augment(x, generator):
    """Random rotations (up to 10 degrees), scales (up to 10 %) and shifts (up to 2 pixels)."""

    def uniform(bound):
        return bound * (2 * torch.rand(len(x), generator=generator) - 1)

    angle, scale = torch.deg2rad(uniform(10)), 1 + uniform(0.1)
    # affine_grid counts in half image widths: 2 pixels of 32 are 1/8.
    shift_x, shift_y = uniform(1 / 8), uniform(1 / 8)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(rows, x.shape, align_corners=False), align_corners=False)


@torch.no_grad()
def accuracy(model, x, y):
    predictions = torch.cat([model(batch).argmax(1) for batch in x.split(500)])
    return (predictions == y).double().mean().item()


@torch.no_grad()
def standardize_features(model, x):
    """Give the features mean 0 and variance 1 over the training digits as they are, without augmentation."""
    model.eval()
    hidden = torch.cat([model.hidden(model.convolutions(2 * b - 1)) for b in x.split(500)]).double()
    model.standardize.running_mean.copy_(hidden.mean(0))
    # Batch normalisation divides by sqrt(running_var + eps).
    model.standardize.running_var.copy_(hidden.var(0) - model.standardize.eps)


def main():
    parser = argparse.ArgumentParser(description="Train the digit classifier.")
    parser.add_argument("--train", type=Path, help="npz of the 60 000 training digits")
    parser.add_argument("--test", type=Path, help="npz of the 10 000 test digits")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is found before the work
    x, y = load_mnist("datasets", train=True, npz=args.train)
    x_test, y_test = load_mnist("datasets", train=False, npz=args.test)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-2)
    # Without the last, incomplete batch: batch statistics of few digits are poor.
    batches = len(x) // args.batch_size
    total = args.epochs * batches
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total)
    with tqdm(total=total, mininterval=5) as progress:
        for epoch in range(args.epochs):
            model.train()
            order = torch.randperm(len(x), generator=generator)
            for index in order[: batches * args.batch_size].split(args.batch_size):
                loss = F.cross_entropy(model(augment(x[index], generator)), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update()
            # Reported only: the last epoch is kept, whatever the test digits say.
            progress.write(f"epoch {epoch + 1}: test accuracy {accuracy(model.eval(), x_test, y_test):.4f}")

    standardize_features(model, x)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.out / "model.safetensors")
    config = {
        "model": "DigitClassifier",
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "MNIST training digits (LeCun and Cortes; CC BY-SA 3.0), padded to 32x32",
        "augmentation": "rotation 10 degrees, scale 10 %, shift 2 pixels",
        "training_digits": len(x),
        **{name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "seed")},
        "test_accuracy": accuracy(model, x_test, y_test),
        "test_digits": len(x_test),
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"test accuracy {config['test_accuracy']:.4f}, {config['parameters']} parameters")


if __name__ == "__main__":
    main()
