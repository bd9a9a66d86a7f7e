"""Degradations by name: for training, examples and benchmark alike.

Some are those of the paper, with circular borders. Others are those of real cameras and files: borders that
are not seen (``-valid``) or reflected (``-reflect``), files that were shrunk by a bicubic filter with
antialiasing (``-matlab``, as MATLAB's imresize and Pillow do it), a Bayer filter, and measurements of grey
images (``grey-``), the means of the channels.

Names that end with ``-paper`` are the operators of the paper, where ours differ or vary more.

A new task is one entry in ``TASKS``. Every task works with any number of channels, but ``"demosaicing"``
with three and ``"jpeg-10"`` with one or three. Sides are multiples of 4, and equal for tomography.
:func:`make_physics` gives one operator for all images; its random masks and kernels have a fixed seed.
:func:`make_generator` draws operators of the same kind, one for each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepinv.physics import (
    MRI,
    Blur,
    BlurFFT,
    Demosaicing,
    Downsampling,
    DownsamplingMatlab,
    GaussianNoise,
    Inpainting,
    MultiCoilMRI,
    Physics,
    Tomography,
)
from deepinv.physics.functional import gaussian_blur
from deepinv.physics.generator import (
    BernoulliSplittingMaskGenerator,
    GaussianBlurGenerator,
    MotionBlurGenerator,
    PhysicsGenerator,
    RandomMaskGenerator,
    SigmaGenerator,
)
from torch import Tensor

from deepinv_ud2m.checks import check_number
from deepinv_ud2m.physics.channels import ChannelMap
from deepinv_ud2m.physics.generators import (
    BoxMaskGenerator,
    JointGenerator,
    JPEGQualityGenerator,
    UniformBlurGenerator,
)
from deepinv_ud2m.physics.jpeg import JPEG
from deepinv_ud2m.physics.tabulated import tabulate

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Task:
    """
    A named degradation.

    :param str title: what a reader calls it.
    :param Callable operator: makes the physics, without noise, from the shape `(C, H, W)`.
    :param Callable, None generator: makes a generator of random operators of its kind, from the shape
        and the keywords ``rng`` and ``device``; ``None`` if there is only the one operator.
    :param bool noisy: whether its measurements have Gaussian noise.

    |sep|

    :Examples:

        >>> from deepinv_ud2m.physics import TASKS
        >>> TASKS["sr4"].operator((1, 32, 32))(torch.zeros(1, 1, 32, 32)).shape
        torch.Size([1, 1, 8, 8])
    """

    title: str
    operator: Callable[[Shape], Physics]
    generator: Callable[..., PhysicsGenerator] | None = None
    noisy: bool = True


def make_physics(
    name: str, shape: Shape, sigma_y: float = 0.05, device: torch.device | str = "cpu"
) -> Physics:
    """
    The physics of a task.

    :param str name: one of ``TASKS``.
    :param tuple[int, int, int] shape: shape `(C, H, W)` of the images; H and W are multiples of 4, at
        least 16.
    :param float sigma_y: standard deviation of the Gaussian noise for images in [0, 1], positive. JPEG
        has no noise except its rounding.
    :param torch.device, str device: where to put it.
    :raises ValueError: for an unknown name, a level that is not positive, or another shape.
    """
    task = _task(name)
    check_number("sigma_y", sigma_y, positive=True)
    if len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < 16 or any(n % 4 for n in shape[1:]):
        raise ValueError(f"shape must be (C, H, W) with H and W multiples of 4 and >= 16, got {shape}")
    physics = task.operator(shape)
    if task.noisy:
        physics.set_noise_model(GaussianNoise(sigma_y))
    return physics.to(device)


def make_generator(
    name: str,
    shape: Shape,
    sigma_y: tuple[float, float] = (0.005, 0.1),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> JointGenerator:
    """
    A generator of operators and noise levels for the physics of a task, one for each image.

    =============== ==================================================================
    task            what varies besides the noise
    =============== ==================================================================
    deblur-gaussian width, standard deviation 0.5 to 4 pixels, round or not
    deblur-uniform  width, 2 to 9 pixels
    deblur-motion   the path
    sr2, sr4        width of the filter, standard deviation 0.25 to 1 times the factor
    inpaint-random  kept pixels and their share, 10 % to 70 %
    inpaint-box     place and sides of the box, 20 % to 60 % of those of the image
    grey-mri        the columns that are measured, a quarter of all
    jpeg-10         quality, 5 to 40; no noise
    =============== ==================================================================

    Tasks of other borders, the paper or grey images vary as the one they are named after. Others have noise
    alone.

    :param str name: one of ``TASKS``.
    :param tuple[int, int, int] shape: shape `(C, H, W)` of the images.
    :param tuple[float, float] sigma_y: range of the noise level (default: 0.005 to 0.1).
    :param int seed: of its two random generators, of operators and of levels (default: 0).
    :param torch.device, str device: where the operators are.
    :raises ValueError: for an unknown name, or a range that is not positive.
    """
    task = _task(name)
    is_range = isinstance(sigma_y, tuple | list) and len(sigma_y) == 2
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not is_range or not 0 < sigma_y[0] <= sigma_y[1]:
        raise ValueError(f"sigma_y must be a range of positive levels, (low, high), got {sigma_y}")
    of_levels, of_operators = (torch.Generator(device).manual_seed(2 * seed + i) for i in range(2))
    parts = []
    if task.generator is not None:
        parts.append(task.generator(shape, rng=of_operators, device=device))
    if task.noisy:
        parts.append(SigmaGenerator(*sigma_y, rng=of_levels, device=device))
    return JointGenerator(*parts)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}")
    return TASKS[name]


def _super_resolution(kernel: str | Tensor, factor: int = 4) -> Callable[[Shape], Physics]:
    def operator(shape: Shape) -> Physics:
        return Downsampling(img_size=shape, filter=kernel, factor=factor, padding="circular")

    return operator


def _blur(kernel: Tensor) -> Callable[[Shape], Physics]:
    return lambda shape: BlurFFT(shape, filter=kernel)


def _bordered(kernel: Tensor | Callable[[Shape], Tensor], padding: str) -> Callable[[Shape], Physics]:
    return lambda shape: Blur(kernel(shape) if callable(kernel) else kernel, padding=padding)


def _path(shape: Shape) -> Tensor:
    return _motion_blurs(shape, rng=torch.Generator().manual_seed(0)).step(1)["filter"]


def _demosaicing(shape: Shape) -> Physics:
    if shape[0] != 3:
        raise ValueError(f"shape must be (3, H, W) for demosaicing, got {shape}")
    return Demosaicing(shape)


def _grey_mri(shape: Shape) -> Physics:
    mask = _columns(shape, rng=torch.Generator().manual_seed(0)).step(1)["mask"]
    return ChannelMap.real(MRI(mask, img_size=(2, *shape[1:])), shape[0])


def _coils(shape: Shape) -> Physics:
    """Four coils, one at each corner, that see their side with a phase of their own."""
    height, width = shape[1:]
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    corners = [(a, b) for a in (-1, 1) for b in (-1, 1)]
    maps = torch.stack(
        [torch.exp(-((rows - a) ** 2) - (columns - b) ** 2 + 1j * a * rows) for a, b in corners]
    )
    maps = maps[None] / maps.abs().square().sum(0).sqrt()
    mask = _columns(shape, rng=torch.Generator().manual_seed(0)).step(1)["mask"]
    return ChannelMap.real(MultiCoilMRI(mask, coil_maps=maps, img_size=(2, *shape[1:])), shape[0])


def _tomography(angles: int) -> Callable[[Shape], Physics]:
    def operator(shape: Shape) -> Physics:
        if shape[1] != shape[2]:
            raise ValueError(f"shape must be (C, H, W) with H = W for tomography, got {shape}")
        with torch.random.fork_rng(devices=[]):  # it finds its norm from a random image
            torch.manual_seed(0)
            scanner = Tomography(angles, img_width=shape[2], normalize=True)
        return ChannelMap.grey(tabulate(scanner, (1, *shape[1:])), shape[0])

    return operator


def _columns(shape: Shape, **options: Any) -> PhysicsGenerator:
    return RandomMaskGenerator((2, *shape[1:]), acceleration=4, **options)


def _motion_blurs(shape: Shape, **options: Any) -> PhysicsGenerator:
    size = max(5, min(shape[-2:]) // 8 * 2 + 1)
    return MotionBlurGenerator((size, size), **options)


def _gaussian_blurs(
    low: float, high: float, size: int, isotropic: bool = True
) -> Callable[..., PhysicsGenerator]:
    def generator(shape: Shape, **options: Any) -> PhysicsGenerator:
        side = min(size, (min(shape[-2:]) - 1) // 2 * 2 + 1)  # odd, not larger than the image
        widths = {"sigma_min": low, "sigma_max": high, "isotropic": isotropic}
        return GaussianBlurGenerator((side, side), **widths, **options)

    return generator


def _random_masks(shape: Shape, **options: Any) -> PhysicsGenerator:
    kept = {"random_split_ratio": True, "min_split_ratio": 0.1, "max_split_ratio": 0.7}
    return BernoulliSplittingMaskGenerator(shape, 0.4, **kept, **options)


def _random_inpainting(kept: float) -> Callable[[Shape], Physics]:
    def operator(shape: Shape) -> Physics:
        generator = torch.Generator().manual_seed(0)
        mask = (torch.rand(1, 1, *shape[-2:], generator=generator) < kept).float()
        return Inpainting(shape, mask=mask.expand(1, *shape))

    return operator


def _thirty_percent(shape: Shape, **options: Any) -> PhysicsGenerator:
    return BernoulliSplittingMaskGenerator((1, *shape[1:]), 0.3, **options)


def _box_inpainting(shape: Shape) -> Physics:
    mask = torch.ones(1, *shape)
    height, width = shape[-2:]
    mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
    return Inpainting(shape, mask=mask)


def _gaussian(size: int, variance: float) -> Tensor:
    offsets = torch.arange(size) - (size - 1) / 2
    profile = torch.exp(-(offsets**2) / (2 * variance))
    kernel = profile[:, None] * profile
    return (kernel / kernel.sum())[None, None]


#: Tasks by name.
TASKS = {
    "sr4": Task("super-resolution x4", _super_resolution("gaussian"), _gaussian_blurs(1.0, 4.0, 29)),
    "sr4-bicubic": Task("super-resolution x4, bicubic", _super_resolution("bicubic")),
    "sr4-paper": Task("super-resolution x4, 3x3 Gaussian", _super_resolution(_gaussian(3, 3.0))),
    "sr2": Task("super-resolution x2", _super_resolution("gaussian", 2), _gaussian_blurs(0.5, 2.0, 15)),
    "sr2-bicubic": Task("super-resolution x2, bicubic", _super_resolution("bicubic", 2)),
    "deblur-gaussian": Task(
        "Gaussian deblurring",
        _blur(gaussian_blur(sigma=(2.0, 2.0))),
        _gaussian_blurs(0.5, 4.0, 31, isotropic=False),
    ),
    "deblur-uniform": Task(
        "uniform deblurring",
        _blur(torch.ones(1, 1, 5, 5) / 25),
        lambda shape, **options: UniformBlurGenerator(9, **options),
    ),
    "deblur-motion": Task(
        "motion deblurring", lambda shape: BlurFFT(shape, filter=_path(shape)), _motion_blurs
    ),
    "deblur-gaussian-valid": Task(
        "Gaussian deblurring, unseen borders",
        _bordered(gaussian_blur(sigma=(2.0, 2.0)), "valid"),
        _gaussian_blurs(0.5, 4.0, 31, isotropic=False),
    ),
    "deblur-gaussian-reflect": Task(
        "Gaussian deblurring, reflected borders",
        _bordered(gaussian_blur(sigma=(2.0, 2.0)), "reflect"),
        _gaussian_blurs(0.5, 4.0, 31, isotropic=False),
    ),
    "deblur-motion-valid": Task(
        "motion deblurring, unseen borders", _bordered(_path, "valid"), _motion_blurs
    ),
    "deblur-motion-reflect": Task(
        "motion deblurring, reflected borders", _bordered(_path, "reflect"), _motion_blurs
    ),
    "sr2-matlab": Task("super-resolution x2, file", lambda shape: DownsamplingMatlab(factor=2)),
    "sr4-matlab": Task("super-resolution x4, file", lambda shape: DownsamplingMatlab(factor=4)),
    "demosaicing": Task("demosaicing", _demosaicing),
    "grey-deblur": Task(
        "grey image, Gaussian deblurring, unseen borders",
        lambda shape: ChannelMap.grey(Blur(gaussian_blur(sigma=(2.0, 2.0)), padding="valid"), shape[0]),
        _gaussian_blurs(0.5, 4.0, 31, isotropic=False),
    ),
    "grey-ct30": Task("tomography of a grey image, 30 angles", _tomography(30)),
    "grey-ct60": Task("tomography of a grey image, 60 angles", _tomography(60)),
    "grey-mri-coils": Task("MRI of a real image by four coils, a quarter of the columns", _coils),
    "grey-mri": Task("MRI of a real image, a quarter of the columns", _grey_mri, _columns),
    "deblur-gaussian-paper": Task("Gaussian deblurring, 5x5, variance 3", _blur(_gaussian(5, 3.0))),
    "deblur-uniform-paper": Task("uniform deblurring, 5x5", _blur(torch.ones(1, 1, 5, 5) / 25)),
    "inpaint-random-paper": Task("random inpainting, 30 % kept", _random_inpainting(0.3), _thirty_percent),
    "inpaint-box-paper": Task("box inpainting, half-size box", _box_inpainting),
    "inpaint-random": Task("random inpainting, 30 % kept", _random_inpainting(0.3), _random_masks),
    "inpaint-box": Task("box inpainting, half-size box", _box_inpainting, BoxMaskGenerator),
    "jpeg-10": Task(
        "JPEG, quality 10",
        lambda shape: JPEG(shape, quality=10),
        lambda shape, **options: JPEGQualityGenerator(**options),
        noisy=False,
    ),
}
