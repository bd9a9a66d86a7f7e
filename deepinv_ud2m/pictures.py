"""Results as files that people look at: PNG of 16 bits, and contact sheets."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from deepinv_ud2m.files import write_file
from deepinv_ud2m.uncertainty import plot


def write_png(file: str | Path, image: Tensor) -> None:
    """
    An image as PNG of 16 bits: 0 is 0, 1 is 65535.

    :param str, pathlib.Path file: the file.
    :param torch.Tensor image: image `[C, H, W]`, C = 1 or 3; values outside of [0, 1] are clamped.
    :raises ValueError: for another shape, or values that are not finite.
    :raises OSError: if it cannot be written.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.isfinite().all():
        raise ValueError(f"image must be [C, H, W], C = 1 or 3, and finite, got shape {list(image.shape)}")
    import png  # Pillow has no colour images of 16 bits

    values = (image.detach().float().cpu().clamp(0, 1) * 65535).round().to(torch.int32).permute(1, 2, 0)
    height, width, channels = values.shape
    buffer = io.BytesIO()
    writer = png.Writer(width, height, greyscale=channels == 1, bitdepth=16)
    writer.write(buffer, values.reshape(height, width * channels).numpy().astype("uint16"))
    write_file(Path(file), buffer.getvalue())


def sheet(file: str | Path, samples: Tensor, y: Tensor | None = None, x: Tensor | None = None) -> None:
    """
    A contact sheet, :func:`deepinv_ud2m.uncertainty.plot`, as PNG.

    :param str, pathlib.Path file: the file.
    :param torch.Tensor samples: samples `[S, B, C, H, W]`, at least two.
    :param torch.Tensor, None y: measurements that are images.
    :param torch.Tensor, None x: true images.
    """
    import matplotlib.pyplot as plt

    figure, buffer = plot(samples, x, y), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_file(Path(file), buffer.getvalue())
