"""Denoisers made of other networks: on reordered pixels, and of networks that predict noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepinv.models import Denoiser
from deepinv.physics import Physics
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_shuffle, pixel_unshuffle

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.schedule import VPSchedule, to_vp_state


class PixelShuffledDenoiser(Denoiser):
    r"""
    A denoiser at full resolution made of one that works on `factor` times smaller images.

    Each `factor` x `factor` block of pixels becomes one pixel of `factor**2` times as many channels.
    That only reorders pixels, so white noise of level :math:`\sigma` stays white noise of level
    :math:`\sigma`, and the preconditioning of the inner denoiser holds unchanged. Convolutions of as
    many channels cost `factor**2` times less.

    :param deepinv.models.Denoiser denoiser: denoiser of images with `factor**2` times the channels.
    :param int factor: side of the blocks, at least 1 (default: 2).
    :param int multiple: images whose sides are not multiples of it are padded by reflection, below and
        on the right, and the result is cropped. With 1 (default) nothing is padded.
    :param float, None checkerboard_filter: width in pixels of a filter that takes out the checkerboard
        pattern which the four places of a block may differ by, see :func:`checkerboard`. Only for
        `factor` 2. ``None`` (default) leaves the result as it is.
    :raises ValueError: for values that are not accepted.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        factor: int = 2,
        multiple: int = 1,
        checkerboard_filter: float | None = None,
    ):
        super().__init__()
        if checkerboard_filter is not None and (factor != 2 or not checkerboard_filter > 0):
            raise ValueError(
                "checkerboard_filter must be positive and is for factor 2, got "
                f"{checkerboard_filter} and factor {factor}"
            )
        self.denoiser = denoiser
        self.factor, self.multiple = check_count("factor", factor), check_count("multiple", multiple)
        self.checkerboard_filter = checkerboard_filter

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""
        Denoise images.

        :param torch.Tensor x: noisy images, of shape `[B, C, H, W]`. H and W are at least `multiple` if
            the images are padded, otherwise multiples of what the inner denoiser asks for.
        :param float, torch.Tensor sigma: their noise level, a scalar or `[B]`.
        :returns: denoised images of the same shape.
        :raises ValueError: for images that are too small to be padded.
        :raises TypeError: if it is called like a sampler, with a physics.
        """
        refuse_physics(sigma)
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.multiple)
        x = pixel_shuffle(self.denoiser(pixel_unshuffle(x, self.factor), sigma), self.factor)
        x = x[..., :height, :width]
        if self.checkerboard_filter is not None:
            x = x - checkerboard(x, self.checkerboard_filter)
        return x


def refuse_physics(sigma: float | Tensor) -> None:
    """Raise TypeError for a physics in the place of a noise level: a prior is no sampler."""
    if isinstance(sigma, Physics):
        raise TypeError(
            f"sigma must be a noise level, got the physics {type(sigma).__name__}: a prior is a denoiser "
            "D(x, sigma). For samples write UD2M.from_pretrained(name)(y, physics), or make a sampler of "
            "the prior, UD2M(UnfoldedDenoiser(prior))(y, physics)"
        )


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """
    Pad images `[B, C, H, W]` by reflection, below and on the right, until their sides are multiples.

    :raises ValueError: for images that are too small to be padded.
    """
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if not bottom and not right:
        return x
    if min(height, width) < multiple:
        raise ValueError(f"the sides of the images must be at least {multiple}, got {height}x{width}")
    return pad(x, (0, right, 0, bottom), mode="reflect")


def checkerboard(x: Tensor, width: float) -> Tensor:
    r"""
    The part of images `[B, C, H, W]` that alternates from pixel to pixel in both directions.

    It is the band around the spatial frequency :math:`(\pi, \pi)`, of Gaussian shape. Edges along rows
    and columns have none of it.

    :param float width: standard deviation, in pixels, of the window that is averaged over; positive.
    """
    radius = min(int(3 * width), min(x.shape[-2:]) - 1)  # a reflection cannot be longer
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    window = torch.exp(-(offsets**2) / (2 * width**2))
    kernel = (window / window.sum() * (1 - 2 * (offsets % 2))).to(x.dtype)
    images = pad(x.flatten(0, 1)[:, None], (radius,) * 4, mode="reflect")
    with torch.autocast(x.device.type, enabled=False):
        images = conv2d(conv2d(images, kernel[None, None, None]), kernel[None, None, :, None])
    return images[:, 0].unflatten(0, x.shape[:2])


class VPDenoiser(Denoiser):
    r"""
    A denoiser made of a network that predicts the noise of a variance-preserving diffusion,

    .. math:: D(w, \delta) = w - \delta\, \hat\varepsilon(v, t(\delta)), \qquad
        v = \sqrt{\bar\alpha} (2 w - 1), \quad \bar\alpha = 1 / (1 + 4 \delta^2) .

    It is differentiable in image and noise level. Time is not rounded to an integer, and the result is
    not clamped, as both are in :class:`deepinv.models.DiffUNet`. At the noise levels of integer times
    the two are equal where nothing is clamped.

    :param torch.nn.Module network: the network.
    :param Callable noise: ``noise(network, v, t)`` gives the noise, of the shape of v, for times t of
        shape `[B]` that are not integer.
    :param deepinv_ud2m.VPSchedule schedule: noise levels of the times (default: linear, 1000 times). At
        levels outside of it, the network gets the time of the nearer end.
    """

    def __init__(
        self,
        network: nn.Module,
        noise: Callable[[nn.Module, Tensor, Tensor], Tensor],
        schedule: VPSchedule | None = None,
    ):
        super().__init__()
        self.network, self.noise = network, noise
        self.schedule = schedule if schedule is not None else VPSchedule()

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""
        Denoise images.

        :param torch.Tensor x: noisy images, of shape `[B, C, H, W]`.
        :param float, torch.Tensor sigma: their noise level, a scalar, `[B]` or `[B, 1, 1, 1]`.
        :returns: denoised images of the same shape.
        :raises TypeError: if it is called like a sampler, with a physics.
        """
        refuse_physics(sigma)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(len(x))
        t = self.schedule.timestep(sigma).to(x.dtype)
        noise = self.noise(self.network, to_vp_state(x, sigma), t)
        return x - sigma.reshape(-1, 1, 1, 1) * noise
