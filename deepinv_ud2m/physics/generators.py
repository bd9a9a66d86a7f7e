"""Random operators for training that deepinv's physics generators do not draw, one for each image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepinv.physics.generator import PhysicsGenerator
from torch import Tensor


class JointGenerator(PhysicsGenerator):
    """
    The parameters of several generators together, such as an operator and a noise level.

    deepinv's own, the sum of two generators, keeps its parts in a closure, where a trainer cannot find
    their random generators to seed them; and it seeds both alike, which ties what they draw.

    :param deepinv.physics.generator.PhysicsGenerator parts: generators, each with a ``rng`` of its own.
    :raises TypeError: for none, or what is no generator.

    |sep|

    :Examples:

        >>> from deepinv.physics.generator import SigmaGenerator
        >>> from deepinv_ud2m.physics import BoxMaskGenerator, JointGenerator
        >>> drawn = JointGenerator(BoxMaskGenerator((1, 32, 32)), SigmaGenerator()).step(4, seed=0)
        >>> {name: list(value.shape) for name, value in drawn.items()}
        {'mask': [4, 1, 32, 32], 'sigma': [4]}
    """

    def __init__(self, *parts: PhysicsGenerator):
        if not parts or not all(isinstance(part, PhysicsGenerator) for part in parts):
            raise TypeError(f"parts must be one or more physics generators, got {parts!r}")
        super().__init__(rng=parts[0].rng, device=parts[0].device)
        self.parts: Iterable[PhysicsGenerator] = torch.nn.ModuleList(parts)

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs: Any) -> dict:
        """
        Draw a batch of parameters.

        :param int batch_size: number of images.
        :param int seed: seeds the parts first, each apart, when given.
        :returns: the parameters of all parts, in one dictionary.
        """
        self.rng_manual_seed(seed)
        drawn = [part.step(batch_size, **kwargs) for part in self.parts]
        return {key: value for parameters in drawn for key, value in parameters.items()}

    def rng_manual_seed(self, seed: int | str | None = None) -> None:
        """Seed the parts, each with a seed of its own that follows from this one."""
        for i, part in enumerate(self.parts):
            part.rng_manual_seed(None if seed is None else f"{seed}: part {i}")

    def reset_rng(self) -> None:
        """Return to the random states at the start."""
        for part in self.parts:
            part.reset_rng()


class _Generator(PhysicsGenerator):
    """A generator that draws by :meth:`_draw`."""

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs: Any) -> dict:
        """
        Draw a batch of parameters.

        :param int batch_size: number of images.
        :param int seed: seeds the generator first, when given.
        :returns: the parameter of the physics, see the class.
        """
        self.rng_manual_seed(seed)
        return self._draw(batch_size)

    def _draw(self, batch_size: int) -> dict:
        raise NotImplementedError

    def _uniform(self, batch_size: int, low: float, high: float) -> Tensor:
        options = {"generator": self.rng, **self.factory_kwargs}
        return low + (high - low) * torch.rand(batch_size, 1, 1, 1, **options)


class UniformBlurGenerator(_Generator):
    """
    Square kernels of random width, constant inside. The pixels at their edges count in part.

    ``step`` gives a ``filter`` `[B, 1, psf_size, psf_size]`, each of sum 1. deepinv's blur generators draw
    Gaussian, motion and diffraction kernels.

    :param int psf_size: side of the kernels, odd, at least ``width_max``.
    :param float width_min: smallest width in pixels, at least 1 (default: 2).
    :param float, None width_max: largest width (default: ``psf_size``).
    :param torch.Generator rng: random generator; by default deepinv's, of its own and of a fixed seed.
    :param str device: device of the kernels.
    :raises ValueError: for an even side, or widths that do not fit.

    |sep|

    :Examples:

        >>> from deepinv_ud2m.physics import UniformBlurGenerator
        >>> kernels = UniformBlurGenerator(psf_size=7).step(2)["filter"]
        >>> kernels.shape, round(kernels[0].sum().item(), 3)
        (torch.Size([2, 1, 7, 7]), 1.0)
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
        super().__init__(rng=rng, device=device)
        self.psf_size, self.width_min, self.width_max = psf_size, width_min, width_max

    def _draw(self, batch_size: int) -> dict:
        width = self._uniform(batch_size, self.width_min, self.width_max)
        offsets = torch.arange(self.psf_size, **self.factory_kwargs) - self.psf_size // 2
        profile = (width / 2 + 0.5 - offsets.abs()).clamp(0, 1) / width
        return {"filter": profile.transpose(-1, -2) * profile}


class BoxMaskGenerator(_Generator):
    """
    Masks that miss a box of random place and random sides.

    ``step`` gives a ``mask`` `[B, C, H, W]`, 0 inside the box and 1 elsewhere. deepinv's mask generators
    draw single pixels or lines.

    :param tuple[int, int, int] img_size: shape `(C, H, W)` of the images.
    :param float side_min: smallest side, relative to that of the image, above 0 (default: 0.2).
    :param float side_max: largest side, below 1 (default: 0.6).
    :param torch.Generator rng: random generator; by default deepinv's, of its own and of a fixed seed.
    :param str device: device of the masks.
    :raises ValueError: for sides outside this range.

    |sep|

    :Examples:

        >>> from deepinv_ud2m.physics import BoxMaskGenerator
        >>> mask = BoxMaskGenerator((3, 64, 64), side_min=0.5, side_max=0.5).step(2)["mask"]
        >>> mask.shape, round(mask.mean().item(), 3)  # a quarter is missing
        (torch.Size([2, 3, 64, 64]), 0.75)
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
        super().__init__(rng=rng, device=device)
        self.img_size, self.side_min, self.side_max = tuple(img_size), side_min, side_max

    def _draw(self, batch_size: int) -> dict:
        missing = torch.ones(batch_size, 1, 1, 1, **self.factory_kwargs)
        for dim, size in ((2, self.img_size[1]), (3, self.img_size[2])):
            side = (size * self._uniform(batch_size, self.side_min, self.side_max)).round().clamp(min=1)
            start = ((size - side + 1) * self._uniform(batch_size, 0, 1)).floor().clamp(max=size - side)
            shape = [size if d == dim else 1 for d in range(4)]
            place = torch.arange(size, **self.factory_kwargs).reshape(shape)
            missing = missing * ((place >= start) & (place < start + side))
        return {"mask": (1 - missing).expand(batch_size, *self.img_size).contiguous()}


class JPEGQualityGenerator(_Generator):
    """
    Random quality factors of :class:`~deepinv_ud2m.physics.JPEG`, uniform over the integers of a range.

    ``step`` gives a ``quality`` `[B]`. deepinv has no JPEG.

    :param int quality_min: smallest factor, at least 1 (default: 5).
    :param int quality_max: largest factor, at most 100 (default: 40).
    :param torch.Generator rng: random generator; by default deepinv's, of its own and of a fixed seed.
    :param str device: device of the factors.
    :raises ValueError: for a range outside [1, 100].

    |sep|

    :Examples:

        >>> from deepinv_ud2m.physics import JPEGQualityGenerator
        >>> JPEGQualityGenerator(10, 10).step(3)["quality"].tolist()
        [10.0, 10.0, 10.0]
    """

    def __init__(
        self,
        quality_min: int = 5,
        quality_max: int = 40,
        rng: torch.Generator | None = None,
        device: str = "cpu",
    ):
        _check_range("quality", quality_min, quality_max, 1, 100)
        super().__init__(rng=rng, device=device)
        self.quality_min, self.quality_max = quality_min, quality_max

    def _draw(self, batch_size: int) -> dict:
        limits = self.quality_min, self.quality_max + 1
        options = {"generator": self.rng, "device": self.rng.device}
        return {"quality": torch.randint(*limits, (batch_size,), **options).float()}


def _check_range(name: str, low: float, high: float, least: float, most: float) -> None:
    if not least <= low <= high <= most:
        raise ValueError(
            f"{name}_min and {name}_max must satisfy {least:g} <= {name}_min <= {name}_max <= {most:g}, "
            f"got {low} and {high}"
        )
