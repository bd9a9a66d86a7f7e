"""Random operators for training: what deepinv's physics generators do not have.

Each draws one operator per image. They go with a noise level by addition, as deepinv's do:
``UniformBlurGenerator(...) + SigmaGenerator(...)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepinv.physics.generator import PhysicsGenerator
from torch import Tensor


class _Generator(PhysicsGenerator):
    """A generator with a random generator of its own, seeded 0, by default."""

    def __init__(self, rng: torch.Generator | None, device: str):
        rng = rng if rng is not None else torch.Generator(device).manual_seed(0)
        super().__init__(rng=rng, device=device)

    def _uniform(self, batch_size: int, low: float, high: float) -> Tensor:
        options = {"generator": self.rng, **self.factory_kwargs}
        return low + (high - low) * torch.rand(batch_size, 1, 1, 1, **options)


class UniformBlurGenerator(_Generator):
    """
    Square kernels of random width, constant inside; the pixels at their edges count in part.

    :param int psf_size: side of the kernels, odd, at least ``width_max``.
    :param float width_min: smallest width in pixels, at least 1 (default: 2).
    :param float, None width_max: largest (default: ``psf_size``).
    :param torch.Generator rng: random generator; one of its own, seeded 0, by default.
    :param str device: device of the kernels.
    :raises ValueError: for an even side, or widths that do not fit.
    """

    def __init__(
        self,
        psf_size: int,
        width_min: float = 2.0,
        width_max: float | None = None,
        rng: torch.Generator | None = None,
        device: str = "cpu",
    ):
        width_max = psf_size if width_max is None else width_max
        if psf_size % 2 == 0:
            raise ValueError(f"psf_size must be odd, got {psf_size}")
        _check_range("width", width_min, width_max, 1, psf_size)
        super().__init__(rng, device)
        self.psf_size, self.width_min, self.width_max = psf_size, width_min, width_max

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs) -> dict:
        """
        Draw a batch of kernels.

        :param int batch_size: number of kernels.
        :param int seed: seeds the generator first, when given.
        :returns: ``{"filter": tensor of shape (batch_size, 1, psf_size, psf_size)}``, of sum 1 each.
        """
        self.rng_manual_seed(seed)
        width = self._uniform(batch_size, self.width_min, self.width_max)
        offsets = torch.arange(self.psf_size, **self.factory_kwargs) - self.psf_size // 2
        profile = (width / 2 + 0.5 - offsets.abs()).clamp(0, 1) / width
        return {"filter": profile.transpose(-1, -2) * profile}


class RandomMaskGenerator(_Generator):
    """
    Masks that keep each pixel, all its channels, with a probability that is random itself.

    :param tuple[int, int, int] img_size: shape `(C, H, W)` of the images.
    :param float kept_min: smallest probability, above 0 (default: 0.1).
    :param float kept_max: largest, at most 1 (default: 0.7).
    :param torch.Generator rng: random generator; one of its own, seeded 0, by default.
    :param str device: device of the masks.
    :raises ValueError: for probabilities outside of this range.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        kept_min: float = 0.1,
        kept_max: float = 0.7,
        rng: torch.Generator | None = None,
        device: str = "cpu",
    ):
        _check_range("kept", kept_min, kept_max, 1e-6, 1)
        super().__init__(rng, device)
        self.img_size, self.kept_min, self.kept_max = tuple(img_size), kept_min, kept_max

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs) -> dict:
        """
        Draw a batch of masks.

        :param int batch_size: number of masks.
        :param int seed: seeds the generator first, when given.
        :returns: ``{"mask": tensor of shape (batch_size, C, H, W)}``, of 0 and 1.
        """
        self.rng_manual_seed(seed)
        kept = self._uniform(batch_size, self.kept_min, self.kept_max)
        options = {"generator": self.rng, **self.factory_kwargs}
        mask = (torch.rand(batch_size, 1, *self.img_size[1:], **options) < kept).to(kept)
        return {"mask": mask.expand(batch_size, *self.img_size).contiguous()}


class BoxMaskGenerator(_Generator):
    """
    Masks that miss a box of random place and random sides.

    :param tuple[int, int, int] img_size: shape `(C, H, W)` of the images.
    :param float side_min: smallest side, as a part of that of the image, above 0 (default: 0.2).
    :param float side_max: largest, below 1 (default: 0.6).
    :param torch.Generator rng: random generator; one of its own, seeded 0, by default.
    :param str device: device of the masks.
    :raises ValueError: for sides outside of this range.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        side_min: float = 0.2,
        side_max: float = 0.6,
        rng: torch.Generator | None = None,
        device: str = "cpu",
    ):
        _check_range("side", side_min, side_max, 1e-6, 1 - 1e-6)
        super().__init__(rng, device)
        self.img_size, self.side_min, self.side_max = tuple(img_size), side_min, side_max

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs) -> dict:
        """
        Draw a batch of masks.

        :param int batch_size: number of masks.
        :param int seed: seeds the generator first, when given.
        :returns: ``{"mask": tensor of shape (batch_size, C, H, W)}``, 0 inside of the box, else 1.
        """
        self.rng_manual_seed(seed)
        missing = torch.ones(batch_size, 1, 1, 1, **self.factory_kwargs)
        for dim, size in ((2, self.img_size[1]), (3, self.img_size[2])):
            side = (size * self._uniform(batch_size, self.side_min, self.side_max)).round().clamp(min=1)
            start = ((size - side + 1) * self._uniform(batch_size, 0, 1)).floor().clamp(max=size - side)
            shape = [size if d == dim else 1 for d in range(4)]
            place = torch.arange(size, **self.factory_kwargs).reshape(shape)
            missing = missing * ((place >= start) & (place < start + side))
        return {"mask": (1 - missing).expand(batch_size, *self.img_size).contiguous()}


def _check_range(name: str, low: float, high: float, least: float, most: float) -> None:
    if not least <= low <= high <= most:
        raise ValueError(
            f"{name}_min and {name}_max must satisfy {least:g} <= {name}_min <= {name}_max <= {most:g}, "
            f"got {low} and {high}"
        )
