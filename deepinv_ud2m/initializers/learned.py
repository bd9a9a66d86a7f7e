r"""A trained initializer: an estimate of the posterior mean of x, and of its root mean square error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepinv.models import ADMUNet
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from deepinv_ud2m.checks import Scalar, check_count, expand_scalar
from deepinv_ud2m.initializers.base import Initializer
from deepinv_ud2m.initializers.wiener import WienerInitializer
from deepinv_ud2m.priors import build_unet, load_prior, network_settings, prior_parameters
from deepinv_ud2m.priors.networks import pad_to_multiple
from deepinv_ud2m.problem import Problem

#: Floor and ceiling of the error it predicts, in units of the image.
ERROR_MIN, ERROR_MAX = 1e-3, 1.0


class PosteriorMeanInitializer(Initializer):
    r"""
    A small network that estimates :math:`m \approx E[x \mid y, x_s]`, and the root mean square error

    .. math:: h(y, x_s) \approx E\!\left[\|x - m\|^2 / d \mid y, x_s\right]^{1/2}

    of its estimate. In an :class:`deepinv_ud2m.UnfoldedDenoiser` m is the first iterate, and the noise of the
    iterations is :math:`\delta_k = d_k h`. This noise is weak for a mild blur and strong for a large hole.
    Other initializers know s and :math:`\sigma_y` only, and give the same h for both.

    The network is the U-Net of a prior, with the preconditioning of a denoiser of level h. Its inputs are
    the estimate of the Wiener filter, :math:`A^\top y`, :math:`A^\top A \mathbf 1` (the sensitivity of y to
    each pixel), :math:`x_s` and both noise levels. A second network of three layers predicts h. Both are
    trained by Gaussian likelihood, :class:`deepinv_ud2m.training.GaussianNLLLoss`, and may be trained further
    together with the sampler. The estimate counts as one network evaluation per level.

    It works for the operators it was trained with. Their norm should be at most about one. If the physics is
    not linear, m is the estimate of :class:`deepinv_ud2m.WienerInitializer` and h its value before training.

    :param Mapping network: settings of the U-Net, as in the configuration of a prior
        (:func:`deepinv_ud2m.save_prior`): ``pixel_shuffle`` and the arguments of
        :class:`deepinv.models.ADMUNet`.
    :param int channels: channels C of the images.
    :param Mapping, WienerInitializer wiener: the Wiener filter, or its settings (default: those of
        photographs).
    :param float reference_level: sets h before training, see
        :class:`deepinv_ud2m.initializers.Initializer` (default: 0.2).
    :raises TypeError: if ``network`` or ``wiener`` is of a wrong type.
    :raises ValueError: for settings that the network or the filter does not have.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import PosteriorMeanInitializer, Problem
        >>> initializer = PosteriorMeanInitializer.from_prior("mnist")
        >>> physics = dinv.physics.Inpainting((1, 32, 32), mask=0.5)
        >>> x_s = torch.rand(1, 1, 32, 32)
        >>> m, h = initializer(Problem(physics(x_s), physics, sigma_y=0.05), x_s, sigma=0.5)
        >>> m.shape, h.shape
        (torch.Size([1, 1, 32, 32]), torch.Size([1, 1, 1, 1]))
    """

    predicts_rmse = True

    def __init__(
        self,
        network: Mapping,
        channels: int,
        wiener: Mapping | WienerInitializer | None = None,
        reference_level: float = 0.2,
    ):
        super().__init__(reference_level)
        if not isinstance(network, Mapping):
            raise TypeError(f"network must be a dictionary of settings, got {type(network).__name__}")
        if wiener is not None and not isinstance(wiener, Mapping | WienerInitializer):
            raise TypeError(
                f"wiener must be a WienerInitializer or its settings, got {type(wiener).__name__}"
            )
        check_count("channels", channels)
        self.channels = channels
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
        for parameter in self.error[-1].parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def from_prior(
        cls, name_or_path: str | Path, wiener: WienerInitializer | None = None, **settings: Any
    ) -> PosteriorMeanInitializer:
        """
        The network of a prior with its weights, to start training from.

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

    def forward(self, problem: Problem, x_s: Tensor, sigma: Scalar) -> tuple[Tensor, Tensor]:
        """
        :param deepinv_ud2m.Problem problem: measurements, physics and noise level.
        :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`, of any size that is not below the
            coarsest block of the network (8 pixels for that of ``"mnist"``).
        :param float, torch.Tensor sigma: level of ``x_s``, a scalar, `[B]` or `[B, 1, 1, 1]`.
        :returns: the estimate m, `[B, C, H, W]`, and its error h, `[B, 1, 1, 1]`, in [0.001, 1].
        :raises ValueError: for images of another number of channels, or too small.
        """
        if x_s.shape[1] != self.channels:
            raise ValueError(
                f"x_s has {x_s.shape[1]} channels, of shape {list(x_s.shape)}, but this initializer is "
                f"of images of {self.channels}"
            )
        sigma, sigma_y = expand_scalar(sigma, x_s, "sigma"), problem.sigma_y.to(x_s.dtype)
        level = self.rmse_scale(sigma_y, sigma)
        estimate = self.wiener.estimate(problem, x_s, sigma)
        if not problem.is_linear:
            return estimate, level
        images = self._images(problem, x_s, sigma, sigma_y)
        dtype = next(self.network.parameters()).dtype
        mean = self.network(estimate.to(dtype), images.to(dtype), level.to(dtype)).to(x_s.dtype)
        # Detached: the predicted error must not change the estimate.
        seen = torch.cat([mean.detach(), estimate, images], 1).to(dtype)
        log_ratio = self.error(seen).to(x_s.dtype)
        return mean, (level * log_ratio.exp()).clamp(ERROR_MIN, ERROR_MAX)

    def estimate(self, problem: Problem, x_s: Tensor, sigma: Tensor) -> Tensor:
        return self(problem, x_s, sigma)[0]

    def _images(self, problem: Problem, x_s: Tensor, sigma: Tensor, sigma_y: Tensor) -> Tensor:
        """The inputs besides the estimate of the Wiener filter, all of order one."""
        with torch.no_grad():
            sensitivity = problem.A_adjoint(problem.A(torch.ones_like(x_s)))
        return torch.cat(
            [
                problem.adjoint.to(x_s.dtype),
                sensitivity.to(x_s.dtype),
                (x_s - self.wiener.mean) / (1 + sigma**2).sqrt(),
                (5 * sigma_y).expand_as(x_s[:, :1]),
                (sigma.log() / 4).expand_as(x_s[:, :1]),
            ],
            1,
        )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """All: both networks."""
        return dict(prior_parameters(self))

    @property
    def networks(self) -> list[nn.Module]:
        """The networks whose calls count as network evaluations (NFE)."""
        return [self.network]

    def config(self) -> dict:
        return {
            "network": json.loads(json.dumps(self.network_settings)),
            "channels": self.channels,
            "wiener": self.wiener.config(),
            **super().config(),
        }


class _ConditionalUNet(nn.Module):
    """The U-Net of a prior, as a denoiser (Karras et al. 2022) with further images as inputs."""

    def __init__(self, settings: Mapping, channels: int, extra: int):
        super().__init__()
        self.unet = build_unet(settings, channels + extra, channels)
        self.factor = settings["pixel_shuffle"]
        halvings = sum(name.endswith("_down") for name in self.unet.enc)
        self.multiple = self.factor * 2**halvings

    def start_from(self, prior: ADMUNet) -> None:
        """Take the weights of a prior. Those of inputs that the prior does not have are random and small."""
        weights = self.unet.state_dict()
        for name, weight in prior.state_dict().items():
            if weights[name].shape == weight.shape:
                weights[name] = weight
            else:
                weights[name] *= 0.3
                weights[name][:, : weight.shape[1]] = weight
        self.unet.load_state_dict(weights)

    def forward(self, x: Tensor, images: Tensor, level: Tensor) -> Tensor:
        variance = self.unet.pixel_std**2 + level**2
        seen = pad_to_multiple(torch.cat([x * variance.rsqrt(), images], 1), self.multiple)
        residual = self.unet.forward_unet(pixel_unshuffle(seen, self.factor), (level.log() / 4).flatten())
        residual = pixel_shuffle(residual, self.factor)[..., : x.shape[-2], : x.shape[-1]]
        skip, out = self.unet.pixel_std**2 / variance, level * self.unet.pixel_std * variance.rsqrt()
        return skip * x + out * residual
