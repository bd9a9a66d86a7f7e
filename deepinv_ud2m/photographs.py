r"""What happened to a photograph, as a physics: from files to a problem that a sampler can take.

- :func:`read_photograph` reads a file; a grey one has one channel.
- :func:`physics_of` says what happened to it: a blur, a reduction, a hole, or noise alone.

JPEG compression needs the file itself, :meth:`deepinv_ud2m.physics.JPEG.read`. The command line
(:mod:`deepinv_ud2m.cli`) is made of these.
"""

from __future__ import annotations

from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from deepinv_ud2m.checks import check_count, check_number
from deepinv_ud2m.data import load_image

#: What a photograph may have gone through, besides noise.
DEGRADATIONS = ("blur", "sr", "inpaint", "denoise")

#: What is beyond the borders of a blurred photograph: ``"valid"`` is what a camera does.
BORDERS = ("valid", "circular", "reflect", "replicate")


def read_photograph(file: str | Path) -> Tensor:
    """
    An image file, grey if all its channels are the same.

    :param str, pathlib.Path file: the file.
    :returns: the image `[1, C, H, W]` in [0, 1], C = 1 or 3.
    :raises ValueError: if it does not exist or cannot be read as an image.
    """
    x = load_image(file, 3)
    return x[:, :1] if (x == x[:, :1]).all() else x


def read_kernel(file: str | Path) -> Tensor:
    """
    The kernel of a blur: a grey picture of it, or an array of NumPy (``.npy``), scaled to the sum 1.

    :param str, pathlib.Path file: the file.
    :returns: the kernel `[1, 1, h, w]`.
    :raises ValueError: if it cannot be read, is not a matrix, has negative values, or is zero.
    """
    if Path(file).suffix.lower() == ".npy":
        try:
            values = np.asarray(np.load(file, allow_pickle=False))
        except Exception as error:  # a damaged file raises errors of any kind
            raise ValueError(f"kernel {file} cannot be read: {error}") from error
        if values.ndim != 2 or not np.issubdtype(values.dtype, np.number):
            raise ValueError(f"kernel {file} must be a matrix of numbers, got {values.dtype} {values.shape}")
        kernel = torch.from_numpy(values.astype(np.float32))[None, None]
    else:
        kernel = load_image(file, 1)
    if not kernel.isfinite().all() or (kernel < 0).any() or kernel.sum() <= 0:
        raise ValueError(f"kernel {file} must have values >= 0, not all 0")
    return kernel / kernel.sum()


def physics_of(
    y: Tensor,
    degradation: str,
    *,
    kernel: Tensor | None = None,
    gaussian: float | None = None,
    borders: str = "valid",
    factor: int = 4,
    filter: str = "bicubic",
    mask: Tensor | None = None,
) -> LinearPhysics:
    r"""
    The physics of a photograph that is degraded.

    :param torch.Tensor y: the photograph `[B, C, H, W]` in [0, 1].
    :param str degradation: one of :data:`DEGRADATIONS`: ``"blur"`` needs ``kernel`` or ``gaussian``, ``"sr"``
        takes ``factor`` and ``filter``, ``"inpaint"`` needs ``mask``.
    :param torch.Tensor, None kernel: kernel of the blur `[1, 1, h, w]`, see :func:`read_kernel`.
    :param float, None gaussian: standard deviation of a Gaussian blur, in pixels, in [0.2, 20].
    :param str borders: one of :data:`BORDERS` (default: ``"valid"``, the restored image is larger than y by
        what the kernel saw of the surroundings).
    :param int factor: by how much both sides were reduced, 2 to 16 (default: 4).
    :param str filter: ``"bicubic"``, with antialiasing, as programs and cameras reduce (default); or
        ``"gaussian"``, deepinv's, with circular borders.
    :param torch.Tensor, None mask: pixels that are missing are not zero, `[1, 1, H, W]`.
    :returns: the physics, without noise.
    :raises ValueError: for arguments that are missing, or of no use.
    """
    channels, height, width = y.shape[1:]
    if degradation == "denoise":
        return dinv.physics.Denoising()
    if degradation == "blur":
        return _blur(y, kernel, gaussian, borders)
    if degradation == "sr":
        if not 2 <= check_count("factor", factor) <= 16:
            raise ValueError(f"factor must be in [2, 16], got {factor}")
        size = (channels, height * factor, width * factor)
        if filter == "bicubic":
            return dinv.physics.DownsamplingMatlab(factor=factor)
        if filter == "gaussian":
            options = {"filter": "gaussian", "factor": factor, "padding": "circular"}
            return dinv.physics.Downsampling(img_size=size, **options)
        raise ValueError(f"filter must be 'bicubic' or 'gaussian', got {filter!r}")
    if degradation == "inpaint":
        if mask is None or mask.shape[-2:] != y.shape[-2:]:
            given = "none" if mask is None else f"one of {mask.shape[-1]}x{mask.shape[-2]}"
            raise ValueError(f"mask must be an image of {width}x{height} pixels, as y, got {given}")
        known = (mask[:, :1] < 0.5).float()
        if not known.any() or known.all():
            raise ValueError(
                "mask must be white where pixels are missing and black elsewhere, got one colour"
            )
        return dinv.physics.Inpainting((channels, height, width), mask=known.expand(1, channels, -1, -1))
    raise ValueError(f"degradation must be one of {DEGRADATIONS}, got {degradation!r}")


def _blur(y: Tensor, kernel: Tensor | None, gaussian: float | None, borders: str) -> LinearPhysics:
    if borders not in BORDERS:
        raise ValueError(f"borders must be one of {BORDERS}, got {borders!r}")
    if (kernel is None) == (gaussian is None):
        raise ValueError("a blur needs either kernel or gaussian, the standard deviation in pixels")
    if kernel is not None and not (kernel.isfinite().all() and (kernel >= 0).all() and kernel.any()):
        raise ValueError("kernel must have finite values >= 0, not all 0")
    if kernel is None:
        sigma = check_number("gaussian", gaussian, 0.2, 20)
        kernel = dinv.physics.functional.gaussian_blur(sigma=(sigma, sigma))
    if min(y.shape[-2:]) < 2 * max(kernel.shape[-2:]):
        raise ValueError(
            f"kernel of {kernel.shape[-1]}x{kernel.shape[-2]} pixels is too large for a photograph of "
            f"{y.shape[-1]}x{y.shape[-2]}: at most half of it"
        )
    return dinv.physics.Blur(kernel, padding=borders)
