"""What a JPEG file says: its pixels, and the quality and subsampling it was written with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from torch import Tensor

from deepinv_ud2m.physics.jpeg_codec import FACTORS, quality_of

#: As Pillow numbers them.
_SAMPLINGS = {0: "4:4:4", 2: "4:2:0"}


def read_jpeg(file: str | Path) -> tuple[Tensor, int, str]:
    """
    The image `[1, C, H, W]` of a file, its quality factor and its subsampling, see
    :meth:`JPEG.read <deepinv_ud2m.physics.JPEG.read>`.
    """
    if not isinstance(file, str | Path):
        raise ValueError(f"file must be a path, got {file!r}")
    picture: Any  # a JPEG has attributes that no other image has
    try:
        with Image.open(file) as picture:
            picture.load()
            pixels = np.array(picture)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises whatever its decoder happens to meet
        raise ValueError(f"file {file} cannot be read as an image: {error}") from error
    if picture.format != "JPEG" or picture.mode not in ("L", "RGB") or _is_plain_rgb(picture):
        raise ValueError(
            f"file {file} must be a grey JPEG or one of YCbCr, got {picture.format}, {picture.mode}"
        )
    sampling = get_sampling(picture) if picture.mode == "RGB" else 0
    if sampling not in _SAMPLINGS:
        raise ValueError(f"file {file} must have subsampling of {sorted(FACTORS)}")
    quality = quality_of([picture.quantization[layer[3]] for layer in picture.layer])
    if quality is None:
        raise ValueError(
            f"file {file} has quantisation tables of its own, those of no quality factor: it was not "
            "written by libjpeg's rule"
        )
    planes = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    return torch.from_numpy(planes.copy())[None] / 255, quality, _SAMPLINGS[sampling]


def _is_plain_rgb(picture: Any) -> bool:
    """Whether a colour file holds R, G and B themselves, by the rule of libjpeg."""
    named = [layer[0] for layer in picture.layer] == list(b"RGB")
    transform = picture.info.get("adobe_transform", 0 if named else 1)
    return len(picture.layer) == 3 and "jfif" not in picture.info and transform == 0
