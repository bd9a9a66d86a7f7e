"""What a prior was trained for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Real

import torch

from deepinv_ud2m.checks import check_count


@dataclass(frozen=True)
class PriorInfo:
    """
    What a prior was trained for.

    Set it as attribute ``prior_info`` of your own denoiser to get the same checks as with the priors of
    this package.

    :param str name: name, for messages.
    :param int channels: number of image channels.
    :param float sigma_min: smallest noise level, at least 0, for images in [0, 1].
    :param float sigma_max: largest noise level, above ``sigma_min``.
    :param int size_multiple: height and width must be multiples of it (default: 1).
    :param int, None image_size: height and width of the training images. ``None`` (default) if the prior
        suits any size.
    :raises ValueError: for any other value; it names the argument.

    |sep|

    :Examples:

        >>> import deepinv as dinv
        >>> from deepinv_ud2m import PriorInfo
        >>> denoiser = dinv.models.TVDenoiser()
        >>> denoiser.prior_info = PriorInfo("total variation", channels=3, sigma_min=0.002, sigma_max=1.0)
    """

    name: str
    channels: int
    sigma_min: float
    sigma_max: float
    size_multiple: int = 1
    image_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a string, got {self.name!r}")
        check_count("channels", self.channels)
        check_count("size_multiple", self.size_multiple)
        if self.image_size is not None:
            check_count("image_size", self.image_size)
        sigmas = (self.sigma_min, self.sigma_max)
        # NaN fails the comparison.
        if not all(isinstance(s, Real) for s in sigmas) or not 0 <= sigmas[0] < sigmas[1]:
            raise ValueError(
                "sigma_min and sigma_max must be numbers with 0 <= sigma_min < sigma_max, got "
                f"{self.sigma_min!r} and {self.sigma_max!r}"
            )

    def check_images(self, shape: torch.Size) -> None:
        """
        Check the shape of images, and warn if the prior was not trained on their size.

        :param torch.Size shape: shape of the images, `[B, C, H, W]`.
        :raises ValueError: if the prior cannot take them.
        """
        if len(shape) != 4:
            accepted = "images of shape [B, C, H, W]"
        elif shape[1] != self.channels:
            accepted = f"images with {self.channels} channel(s), not {shape[1]} channel(s)"
            if shape[1] == 2:  # complex: deepinv has the real and the imaginary part as channels
                accepted += " (for real images, of known phase, give it ChannelMap.real(physics))"
            elif self.channels == 1:
                accepted += " (make each channel an image of its own, y.flatten(0, 1)[:, None])"
        elif any(n < self.size_multiple or n % self.size_multiple for n in shape[2:]):
            sides = f"{shape[2]}x{shape[3]}"
            accepted = f"sides that are multiples of {self.size_multiple}, not {sides} (crop or pad)"
        else:
            accepted = None
        if accepted is not None:
            raise ValueError(
                f"the prior {self.name!r} takes {accepted}, but the images of this problem have shape "
                f"{list(shape)}"
            )
        height, width = shape[2:]
        if self.image_size is not None and (height, width) != (self.image_size, self.image_size):
            warnings.warn(
                f"the prior {self.name!r} was trained on {self.image_size}x{self.image_size} "
                f"images; those of this problem are {height}x{width}",
                stacklevel=3,
            )

    def check_levels(self, sigmas: torch.Tensor) -> None:
        """
        Warn if any noise level is outside the range of the prior.

        :param torch.Tensor sigmas: noise levels that the prior is to denoise, of any shape.
        """
        low, high = sigmas.min().item(), sigmas.max().item()
        if low < 0.99 * self.sigma_min or high > 1.01 * self.sigma_max:
            warnings.warn(
                f"the prior {self.name!r} knows noise levels from {self.sigma_min} to "
                f"{self.sigma_max}, but is asked for {low:.3g} to {high:.3g}; they are clamped",
                stacklevel=4,
            )
