"""Pictures of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepinv.physics import Physics
from matplotlib.figure import Figure  # not pyplot, which would take over a notebook's figures
from torch import Tensor

from deepinv_ud2m.proximal import Scalar
from deepinv_ud2m.training.losses import condition


def plot_curves(file: Path, history: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """
    Losses and metrics against steps.

    :param pathlib.Path file: PNG file to write; nothing is written where no curve has two points.
    :param Mapping history: points `(step, value)` by name.
    """
    shown = {name: points for name, points in history.items() if len(points) > 1 and "/" not in name}
    if not shown:
        return
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    fig = Figure(figsize=(3.2 * columns, 2.4 * rows))
    axes = fig.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (name, points) in zip(axes.flat, shown.items(), strict=False):
        axis.plot(*zip(*points, strict=True))
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("step", fontsize=7)
        axis.tick_params(labelsize=7)
    fig.tight_layout()
    fig.savefig(file, dpi=100)


def plot_samples(
    file: Path,
    x: Tensor,
    y: Tensor,
    physics: Physics,
    samples: Tensor,
    shown: int = 6,
    sigma_y: Scalar | None = None,
) -> None:
    """
    Truth, back-projected measurement, three samples, mean and standard deviation, an image per row.

    :param pathlib.Path file: PNG file to write.
    :param torch.Tensor x: images, `[B, C, H, W]`.
    :param torch.Tensor y: their measurements.
    :param deepinv.physics.Physics physics: the physics.
    :param torch.Tensor samples: samples, `[S, B, C, H, W]`.
    :param int shown: most rows (default: 6).
    :param float, torch.Tensor sigma_y: noise level, where the physics does not tell it.
    """
    columns = {"truth": x, "measurement": condition(y, physics, sigma_y=sigma_y)}
    columns |= {f"sample {i + 1}": sample for i, sample in enumerate(samples[:3])}
    columns |= {"mean": samples.mean(0), "2 std": 2 * samples.std(0, correction=0)}
    height = min(shown, len(x))
    fig = Figure(figsize=(1.4 * len(columns), 1.4 * height + 0.3))
    axes = fig.subplots(height, len(columns), squeeze=False)
    for column, (name, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(name, fontsize=8)
        for axis, image in zip(column, images, strict=False):
            axis.imshow(_displayable(image), vmin=0, vmax=1, cmap="gray")
            axis.set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout(pad=0.3)
    fig.savefig(file, dpi=100)


def _displayable(image: Tensor) -> Tensor:
    """Grey or RGB, in [0, 1]; of two channels, real and imaginary part, or of many, the modulus."""
    if image.shape[0] not in (1, 3):
        image = image.norm(dim=0, keepdim=True)
    return image.float().clamp(0, 1).permute(1, 2, 0).squeeze(-1).cpu()
