r"""A first guess that is trained: the posterior mean of x, and how far off it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from deepinv.models import ADMUNet
from deepinv.physics import LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from deepinv_ud2m.batching import RepeatedPhysics
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.networks import pad_to_multiple
from deepinv_ud2m.priors import build_unet, load_prior, network_settings
from deepinv_ud2m.proximal import Scalar, expand_scalar, joint_level
from deepinv_ud2m.wiener import WienerInitializer

#: Floor and ceiling of the error it states, in units of the image.
ERROR_MIN, ERROR_MAX = 1e-3, 1.0


class PosteriorMeanInitializer(nn.Module):
    r"""
    A small network that estimates :math:`m \approx E[x \mid y, x_s]`, and the root mean square error

    .. math:: h(y, x_s) \approx E\!\left[\|x - m\|^2 / d \mid y, x_s\right]^{1/2}

    of its estimate. In an :class:`deepinv_ud2m.UnfoldedDenoiser` m is the first iterate and h takes the
    place of the level that is made of s and :math:`\sigma_y` alone: the noise of the iterations,
    :math:`\delta_k = d_k h`, then is as strong as what is unknown, weak for a mild blur and strong for a
    large hole.

    The network is the U-Net of a prior, with the preconditioning of a denoiser of level h, and sees the
    Wiener filter's estimate, :math:`A^\top y`, :math:`A^\top A \mathbf 1` (where and how much y sees),
    :math:`x_s` and both noise levels. A second network of three layers gives h. Together they are
    trained by Gaussian likelihood, :class:`deepinv_ud2m.training.FirstGuessLoss`, and may be trained on
    with the sampler. The estimate counts as one network evaluation per level.

    It is of the operators it was trained with; their norm should be at most about one. Where the physics
    is not linear, m is what :class:`deepinv_ud2m.WienerInitializer` gives, and h as before training.

    :param Mapping network: settings of the U-Net, as in the configuration of a prior
        (:func:`deepinv_ud2m.save_prior`): ``pixel_shuffle`` and the arguments of
        :class:`deepinv.models.ADMUNet`.
    :param int channels: channels C of the images.
    :param Mapping, WienerInitializer wiener: the Wiener filter, or its settings
        (default: that of photographs).
    :param float reference_level: h before training is that of a Gaussian observation of this level
        joined with the state, in units of the image, positive (default: 0.2).
    :raises TypeError: if ``network`` or ``wiener`` is of a wrong type.
    :raises ValueError: for settings that these do not have.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import PosteriorMeanInitializer
        >>> initializer = PosteriorMeanInitializer.from_prior("mnist")
        >>> physics = dinv.physics.Inpainting((1, 32, 32), mask=0.5)
        >>> x_s = torch.rand(1, 1, 32, 32)
        >>> m, h = initializer.estimate(physics(x_s), physics, x_s, sigma=0.5, sigma_y=0.05)
        >>> m.shape, h.shape
        (torch.Size([1, 1, 32, 32]), torch.Size([1, 1, 1, 1]))
    """

    def __init__(
        self,
        network: Mapping,
        channels: int,
        wiener: Mapping | WienerInitializer | None = None,
        reference_level: float = 0.2,
    ):
        super().__init__()
        if not 0 < reference_level < float("inf"):
            raise ValueError(f"reference_level must be positive and finite, got {reference_level}")
        if not isinstance(network, Mapping):
            raise TypeError(f"network must be a dictionary of settings, got {type(network).__name__}")
        if wiener is not None and not isinstance(wiener, Mapping | WienerInitializer):
            raise TypeError(
                f"wiener must be a WienerInitializer or its settings, got {type(wiener).__name__}"
            )
        check_count("channels", channels)
        self.channels, self.reference_level = channels, reference_level
        self.network_settings = dict(network)
        if not isinstance(wiener, WienerInitializer):
            wiener = WienerInitializer(**(wiener or {}))
        self.wiener = wiener
        self.network = _ConditionalUNet(network, channels, extra=3 * channels + 2)
        self.error = nn.Sequential(
            nn.Conv2d(5 * channels + 2, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(64, 1, 1),
        )
        nn.init.zeros_(self.error[-1].weight)
        nn.init.zeros_(self.error[-1].bias)

    @classmethod
    def from_prior(
        cls, name_or_path: str | Path, wiener: WienerInitializer | None = None, **settings
    ) -> PosteriorMeanInitializer:
        """
        The network of a prior, to start training from, with the weights that it has.

        :param str, pathlib.Path name_or_path: a shipped prior or the folder of one, see
            :func:`deepinv_ud2m.load_prior`.
        :param WienerInitializer wiener: the Wiener filter of such images.
        :param settings: further arguments of the class.
        """
        network = network_settings(name_or_path)
        prior = load_prior(name_or_path)
        initializer = cls(network, prior.prior_info.channels, wiener, **settings)
        initializer.network.start_from(prior.denoiser)
        return initializer

    def forward(
        self, y: Tensor | TensorList, physics: Physics, x_s: Tensor, sigma: Scalar, sigma_y: Scalar
    ) -> Tensor:
        """
        The estimate m, of shape `[B, C, H, W]`; arguments and errors are those of :meth:`estimate`.
        """
        return self.estimate(y, physics, x_s, sigma, sigma_y)[0]

    def estimate(
        self, y: Tensor | TensorList, physics: Physics, x_s: Tensor, sigma: Scalar, sigma_y: Scalar
    ) -> tuple[Tensor, Tensor]:
        """
        :param torch.Tensor y: measurements.
        :param deepinv.physics.Physics physics: the physics.
        :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`, of any size that is not below the
            coarsest block of the network (8 pixels for that of ``"mnist"``).
        :param float, torch.Tensor sigma: level of ``x_s``, a scalar, `[B]` or `[B, 1, 1, 1]`.
        :param float, torch.Tensor sigma_y: noise level of ``y``, likewise.
        :returns: the estimate m, `[B, C, H, W]`, and its error h, `[B, 1, 1, 1]`, in [0.001, 1].
        :raises ValueError: for images of another number of channels, or too small.
        """
        if x_s.shape[1] != self.channels:
            raise ValueError(
                f"x_s has {x_s.shape[1]} channels, of shape {list(x_s.shape)}, but this initialiser is "
                f"of images of {self.channels}"
            )
        with torch.autocast(x_s.device.type, enabled=False):  # operators lose too much in bfloat16
            sigma = expand_scalar(sigma, x_s, "sigma").expand(len(x_s), 1, 1, 1)
            sigma_y = expand_scalar(sigma_y, x_s, "sigma_y").expand(len(x_s), 1, 1, 1)
            level = joint_level(sigma, sigma_y, self.reference_level)
            guess = self.wiener(y, physics, x_s, sigma, sigma_y)
            operator = physics.physics if isinstance(physics, RepeatedPhysics) else physics
            if not isinstance(operator, LinearPhysics):
                return guess, level
            images = self._images(y, physics, x_s, sigma, sigma_y)
        dtype = next(self.network.parameters()).dtype
        mean = self.network(guess.to(dtype), images.to(dtype), level.to(dtype)).to(x_s.dtype)
        # The error is that of this estimate, not something the estimate could be changed by.
        seen = torch.cat([mean.detach(), guess, images], 1).to(dtype)
        log_ratio = self.error(seen).to(x_s.dtype)
        return mean, (level * log_ratio.exp()).clamp(ERROR_MIN, ERROR_MAX)

    def _images(self, y, physics, x_s, sigma, sigma_y) -> Tensor:
        """What tells of y and x_s besides the Wiener filter's estimate; all of order one."""
        with torch.no_grad():
            sensitivity = physics.A_adjoint(physics.A(torch.ones_like(x_s)))
        return torch.cat(
            [
                physics.A_adjoint(y).to(x_s.dtype),
                sensitivity.to(x_s.dtype),
                (x_s - self.wiener.mean) / (1 + sigma**2).sqrt(),
                (5 * sigma_y).expand_as(x_s[:, :1]),
                (sigma.log() / 4).expand_as(x_s[:, :1]),
            ],
            1,
        )

    @property
    def networks(self) -> list[nn.Module]:
        """The networks whose calls count as network evaluations (NFE)."""
        return [self.network]

    @property
    def settings(self) -> dict:
        """The arguments it was made with, as JSON holds them."""
        return {
            "network": json.loads(json.dumps(self.network_settings)),
            "channels": self.channels,
            "wiener": {name: getattr(self.wiener, name) for name in WienerInitializer.SETTINGS},
            "reference_level": float(self.reference_level),
        }

    def __repr__(self) -> str:
        # Not the many layers of the network, which the representation of a sampler would repeat.
        level = self.reference_level
        return f"PosteriorMeanInitializer(channels={self.channels}, reference_level={level})"


class _ConditionalUNet(nn.Module):
    """The U-Net of a prior, as a denoiser (Karras et al. 2022) that sees further images."""

    def __init__(self, settings: Mapping, channels: int, extra: int):
        super().__init__()
        self.unet = build_unet(settings, channels + extra, channels)
        self.factor = settings["pixel_shuffle"]
        halvings = sum(name.endswith("_down") for name in self.unet.enc)
        self.multiple = self.factor * 2**halvings

    def start_from(self, prior: ADMUNet) -> None:
        """The weights of a prior; those of the images it does not see are random and small."""
        weights = self.unet.state_dict()
        for name, weight in prior.state_dict().items():
            if weights[name].shape == weight.shape:
                weights[name] = weight
            else:
                weights[name] *= 0.3
                weights[name][:, : weight.shape[1]] = weight
        self.unet.load_state_dict(weights)

    def forward(self, x: Tensor, images: Tensor, level: Tensor) -> Tensor:
        of_pixels = self.unet.pixel_std**2 + level**2
        seen = pad_to_multiple(torch.cat([x * of_pixels.rsqrt(), images], 1), self.multiple)
        residual = self.unet.forward_unet(
            pixel_unshuffle(seen, self.factor), (level.log() / 4).flatten()
        )
        residual = pixel_shuffle(residual, self.factor)[..., : x.shape[-2], : x.shape[-1]]
        skip, out = self.unet.pixel_std**2 / of_pixels, level * self.unet.pixel_std * of_pixels.rsqrt()
        return skip * x + out * residual
