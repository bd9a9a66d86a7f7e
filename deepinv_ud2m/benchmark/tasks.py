"""Degradations by name: a deepinv physics and its noise level, in the settings of the paper.

A new task is one entry in ``TASKS``. Every task works at any image size and number of channels. Its
operator is the same for all images; random masks and kernels come from a seed of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from deepinv.physics import BlurFFT, Downsampling, GaussianNoise, Inpainting, Physics
from deepinv.physics.functional import gaussian_blur
from deepinv.physics.generator import MotionBlurGenerator
from torch import Tensor

from deepinv_ud2m.physics import JPEG

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Task:
    """
    A named degradation.

    :param str title: what a reader calls it.
    :param Callable operator: makes the physics, without noise, from the shape `(C, H, W)`.
    :param bool noisy: whether Gaussian noise is added to its measurements.
    """

    title: str
    operator: Callable[[Shape], Physics]
    noisy: bool = True


def make_physics(
    name: str, shape: Shape, sigma_y: float = 0.05, device: torch.device | str = "cpu"
) -> Physics:
    """
    The physics of a task.

    :param str name: one of ``TASKS``.
    :param tuple[int, int, int] shape: shape `(C, H, W)` of the images.
    :param float sigma_y: standard deviation of the Gaussian noise, in units of the image, positive; JPEG
        has no noise but its rounding.
    :param torch.device, str device: where to put it.
    :raises ValueError: for an unknown name, a level that is not positive, or images too small.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}")
    if not sigma_y > 0:
        raise ValueError(f"sigma_y must be positive, got {sigma_y}")
    if min(shape[-2:]) < 16 or any(n % 4 for n in shape[-2:]):
        raise ValueError(f"the sides of the images must be multiples of 4 and >= 16, got {shape}")
    physics = TASKS[name].operator(shape)
    if TASKS[name].noisy:
        physics.set_noise_model(GaussianNoise(sigma_y))
    return physics.to(device)


def _super_resolution(kernel: str | Tensor) -> Callable[[Shape], Physics]:
    def operator(shape: Shape) -> Physics:
        return Downsampling(img_size=shape, filter=kernel, factor=4, padding="circular")

    return operator


def _blur(kernel: Tensor) -> Callable[[Shape], Physics]:
    return lambda shape: BlurFFT(shape, filter=kernel)


def _motion_blur(shape: Shape) -> Physics:
    size = max(5, min(shape[-2:]) // 8 * 2 + 1)
    generator = MotionBlurGenerator((size, size), rng=torch.Generator().manual_seed(0))
    return BlurFFT(shape, filter=generator.step(1)["filter"])


def _random_inpainting(kept: float) -> Callable[[Shape], Physics]:
    def operator(shape: Shape) -> Physics:
        generator = torch.Generator().manual_seed(0)
        mask = (torch.rand(1, 1, *shape[-2:], generator=generator) < kept).float()
        return Inpainting(shape, mask=mask.expand(1, *shape))

    return operator


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


TASKS = {
    "sr4": Task("super-resolution x4", _super_resolution("gaussian")),
    "sr4-bicubic": Task("super-resolution x4, bicubic", _super_resolution("bicubic")),
    "sr4-paper": Task("super-resolution x4, 3x3 Gaussian", _super_resolution(_gaussian(3, 3.0))),
    "deblur-gaussian": Task("Gaussian deblurring", _blur(gaussian_blur(sigma=(2.0, 2.0)))),
    "deblur-uniform": Task("uniform deblurring", _blur(torch.ones(1, 1, 5, 5) / 25)),
    "deblur-motion": Task("motion deblurring", _motion_blur),
    "inpaint-random": Task("random inpainting, 30 % kept", _random_inpainting(0.3)),
    "inpaint-box": Task("box inpainting, half-size box", _box_inpainting),
    "jpeg-10": Task("JPEG, quality 10", lambda shape: JPEG(shape, quality=10), noisy=False),
}
