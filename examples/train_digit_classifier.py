r"""
Train the digit classifier
==========================

Trains :class:`deepinv_ud2m.metrics.DigitClassifier` on the 60 000 training digits of MNIST: its
hidden layer gives the features of the Fréchet distance for digits. A few minutes on one CPU
thread::

    python examples/train_digit_classifier.py --train mnist_train.npz --test mnist_test.npz \
        --out deepinv_ud2m/weights/mnist-classifier

Writes ``model.safetensors`` and ``config.json``. Without ``--train`` and ``--test``, torchvision
downloads MNIST (see :func:`deepinv_ud2m.data.load_mnist`).
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from deepinv_ud2m.data import load_mnist
from deepinv_ud2m.metrics import DigitClassifier


# %%
# Random small shifts, rotations and changes of size leave a digit what it is; a classifier that has
# seen them has features that do not depend on them too much.
def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation (up to 10 degrees), scale (up to 10 %) and shift (up to 2 pixels)."""

    def uniform(bound: float) -> Tensor:
        return bound * (2 * torch.rand(len(x), generator=generator) - 1)

    angle, scale = torch.deg2rad(uniform(10)), 1 + uniform(0.1)
    # affine_grid counts in half image widths: 2 pixels of 32 are 1/8.
    shift_x, shift_y = uniform(1 / 8), uniform(1 / 8)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(rows, x.shape, align_corners=False), align_corners=False)


@torch.no_grad()
def accuracy(model: DigitClassifier, x: Tensor, y: Tensor) -> float:
    predictions = torch.cat([model(batch).argmax(1) for batch in x.split(500)])
    return (predictions == y).double().mean().item()


# %%
# The features shall have mean 0 and variance 1 over the training digits as they are. During
# training the statistics follow augmented digits and changing weights, so they are taken again,
# exactly, at the end.
@torch.no_grad()
def standardize_features(model: DigitClassifier, x: Tensor) -> None:
    model.eval()
    hidden = torch.cat([model.hidden(model.convolutions(2 * b - 1)) for b in x.split(500)]).double()
    model.standardize.running_mean.copy_(hidden.mean(0))
    # Batch normalisation divides by sqrt(running_var + eps).
    model.standardize.running_var.copy_(hidden.var(0) - model.standardize.eps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digit classifier.")
    parser.add_argument("--train", type=Path, help="npz of the 60 000 training digits")
    parser.add_argument("--test", type=Path, help="npz of the 10 000 test digits")
    parser.add_argument(
        "--root", type=Path, default=Path("datasets"), help="where MNIST is downloaded to"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is found out before the work
    torch.set_num_threads(args.threads)

    x, y = load_mnist(args.root, train=True, npz=args.train)
    x_test, y_test = load_mnist(args.root, train=False, npz=args.test)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-2)
    batches_per_epoch = len(x) // args.batch_size
    total = args.epochs * batches_per_epoch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total)

    with tqdm(total=total, mininterval=5) as progress:
        for epoch in range(args.epochs):
            model.train()
            order = torch.randperm(len(x), generator=generator)
            # The last, incomplete batch is left out: batch statistics of few digits are poor.
            for i in range(batches_per_epoch):
                index = order[i * args.batch_size : (i + 1) * args.batch_size]
                logits = model(augment(x[index], generator))
                loss = F.cross_entropy(logits, y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update()
            # Only reported: the last epoch is kept, whatever the test digits say.
            progress.write(
                f"epoch {epoch + 1}: test accuracy {accuracy(model.eval(), x_test, y_test):.4f}"
            )

    standardize_features(model, x)
    test_accuracy = accuracy(model, x_test, y_test)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.out / "model.safetensors")
    config = {
        "model": "DigitClassifier",
        "architecture": {"num_features": 64, "channels": [24, 48, 64]},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "MNIST training digits (LeCun and Cortes; CC BY-SA 3.0), padded to 32x32",
        "augmentation": "rotation 10 degrees, scale 10 %, shift 2 pixels",
        "training_digits": len(x),
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "test_accuracy": test_accuracy,
        "test_digits": len(x_test),
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"test accuracy {test_accuracy:.4f}, {config['parameters']} parameters")


if __name__ == "__main__":
    main()
