"""Pictures of a training run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot, which would take over a notebook's figures
from torch import Tensor

from deepinv_ud2m.files import write_file
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.training.adversarial import condition


def plot_curves(file: Path, history: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Losses and metrics against steps, points `(step, value)` by name; none of a single point is drawn."""
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
    _write(fig, file)


def plot_samples(file: Path, x: Tensor, problem: Problem, samples: Tensor, shown: int = 6) -> None:
    """
    Truth, measurement in the space of images, three samples `[S, B, C, H, W]`, mean and standard deviation,
    an image per row.
    """
    columns = {"truth": x, "measurement": condition(problem)}
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
    _write(fig, file)


def _write(fig: Figure, file: Path) -> None:
    fig.tight_layout(pad=0.3)
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=100, format="png")
    write_file(file, buffer.getvalue())


def _displayable(image: Tensor) -> Tensor:
    """Grey or RGB, in [0, 1]; of two channels, real and imaginary part, or of many, the modulus."""
    if image.shape[0] not in (1, 3):
        image = image.norm(dim=0, keepdim=True)
    return image.float().clamp(0, 1).permute(1, 2, 0).squeeze(-1).cpu()
