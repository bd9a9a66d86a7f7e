"""Networks of the shipped priors, built from deepinv's."""

from __future__ import annotations

from deepinv.models import Denoiser
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PixelShuffledDenoiser(Denoiser):
    r"""
    A denoiser at full resolution made of one that works on `factor` times smaller images.

    Each `factor` x `factor` block of pixels becomes one pixel of `factor**2` times as many channels.
    That only reorders pixels, so white noise of level :math:`\sigma` stays white noise of level
    :math:`\sigma`, and the preconditioning of the inner denoiser holds unchanged; the convolutions
    cost `factor**2` times less for as many channels.

    :param deepinv.models.Denoiser denoiser: denoiser of images with `factor**2` times the channels.
    :param int factor: side of the blocks (default: 2).
    """

    def __init__(self, denoiser: Denoiser, factor: int = 2):
        super().__init__()
        self.denoiser, self.factor = denoiser, factor

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""
        :param torch.Tensor x: noisy images, of shape `[B, C, H, W]`, H and W multiples of `factor`
            (and of what the inner denoiser asks for).
        :param float, torch.Tensor sigma: their level, a scalar or `[B]`.
        :returns: denoised images of the same shape.
        """
        return pixel_shuffle(self.denoiser(pixel_unshuffle(x, self.factor), sigma), self.factor)
