r"""Methods on a prior in closed form, whose posterior is known.

The prior is Gaussian with a stationary covariance. Its exact denoiser is a filter, and the posterior of a
linear measurement is Gaussian, by a dense solve. Nothing is learned, so errors are the method's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from deepinv.models import Denoiser
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from deepinv_ud2m.benchmark.methods import METHODS, Entry, Method
from deepinv_ud2m.benchmark.report import report
from deepinv_ud2m.benchmark.run import Study, run
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.physics.traits import noise_level
from deepinv_ud2m.priors import PriorInfo
from deepinv_ud2m.randomness import randn


def compare_with_posterior(
    folder: str | Path, study: Study, num_images: int = 256, size: int = 16
) -> pd.DataFrame:
    r"""
    Run methods on images drawn from :class:`GaussianPrior`, and compare them with its exact posterior.

    The folder is one of results with its report, in which the method ``"exact"`` draws from the posterior,
    and two more columns:

    - ``mean_error``: RMS distance of the mean of the samples to the posterior mean, in posterior standard
      deviations, without the part of the finite number of samples; 0 for an exact sampler;
    - ``std_ratio``: standard deviation of the samples over that of the posterior, both root mean squares;
      1 for an exact sampler.

    :param Study study: the methods and linear tasks, with several samples.
    :param int size: side of the images, at most 64, for the dense solve takes the cube of their pixels.
    :raises ValueError: for tasks that are not linear, numbers out of range, or too small a size.
    """
    if check_count("num_samples", study.num_samples) < 2 or check_count("size", size) > 64:
        raise ValueError(
            f"num_samples must be at least 2, and size at most 64, got {study.num_samples}, {size}"
        )
    METHODS["exact"] = Method(lambda prior, sigma_y: prior.draw_posterior)
    prior, methods = GaussianPrior(), [Entry("exact"), *study.methods]
    x = prior.draw(check_count("num_images", num_images), size, torch.Generator().manual_seed(study.seed))
    given: dict[str, Any] = {"prior": prior, "x": x, "methods": methods, "batch_size": num_images}
    study = replace(study, **given, names={"prior": repr(prior)})
    for task, physics, _ in study:
        if not isinstance(physics, LinearPhysics):
            raise ValueError(f"tasks must be linear, to have a Gaussian posterior; got {task!r}")
        kernel = getattr(physics, "filter", None)
        # deepinv's proximal operators are wrong for kernels that the image does not hold.
        if kernel is not None and (side := max(kernel.shape[-2:])) > size:
            raise ValueError(f"size must be at least {side}, that of the kernel of {task}, got {size}")
    run(folder, study)
    return report(folder)


class GaussianPrior(Denoiser):
    r"""
    :math:`x \sim \mathcal N(\mu, C)`, and its exact denoiser

    .. math:: \mathbb E[x \mid x + \sigma \varepsilon = w] =
              \mu + \mathcal F^{-1} \frac{\lambda}{\lambda + \sigma^2} \mathcal F (w - \mu)

    with a Matern covariance on the torus, :math:`\lambda(\omega) \propto (1 + \ell^2 |\omega|^2)^{-2}`.

    :param float mean: mean :math:`\mu` of a pixel.
    :param float std: standard deviation of a pixel, positive. By default [0, 1] is five of them to each
        side of the mean, so that samplers may clamp to [0, 1] without a noticeable bias.
    :param float length: correlation length :math:`\ell` in pixels, positive.
    """

    def __init__(self, mean: float = 0.5, std: float = 0.1, length: float = 2.0):
        super().__init__()
        if not (0 < std < math.inf and 0 < length < math.inf):
            raise ValueError(f"std and length must be positive, got {std} and {length}")
        # A parameter, for samplers ask the prior's parameters for its device.
        self.mean = nn.Parameter(torch.tensor(float(mean)), requires_grad=False)
        self.std, self.length = std, length
        self.prior_info = PriorInfo("gaussian", channels=1, sigma_min=0.0, sigma_max=math.inf)

    def forward(self, x: Tensor, sigma: float | Tensor, **kwargs: Any) -> Tensor:
        """Posterior means of noisy images `[B, C, H, W]`, with one noise level or one per image."""
        variance = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1) ** 2
        spectrum = self.spectrum(*x.shape[-2:]).to(x)
        return self.mean + _filter(x - self.mean, spectrum / (spectrum + variance))

    def draw(self, num: int, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Grey images of the prior, `[num, 1, size, size]`."""
        noise = randn(self.mean.new_empty(num, 1, size, size), generator)
        return self.mean + _filter(noise, self.spectrum(size, size).sqrt().to(noise))

    def spectrum(self, height: int, width: int) -> Tensor:
        """Eigenvalues of the covariance, one per frequency `[height, width]`, in double precision."""
        rows, columns = (2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
        spectrum = (1 + self.length**2 * (rows[:, None] ** 2 + columns**2)) ** -2
        # The mean of the eigenvalues is the variance of a pixel.
        return self.std**2 * spectrum / spectrum.mean()

    def covariance(self, shape: Sequence[int]) -> Tensor:
        """The dense covariance of images of shape `(C, H, W)`, in double precision."""
        identity = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        return _filter(identity, self.spectrum(*shape[-2:])).flatten(1)

    def posterior(self, y: Tensor, physics: LinearPhysics) -> tuple[Tensor, Tensor]:
        r"""
        Means `[B, C, H, W]` of :math:`p(x \mid y)`, and the covariance `[CHW, CHW]` that they share:

        .. math::
            G = C A^\top (A C A^\top + \sigma_y^2 I)^{-1}, \qquad
            x \mid y \sim \mathcal N(\mu + G (y - A \mu), \; C - G A C) .
        """
        shape = physics.A_adjoint(y).shape[1:]
        prior_covariance = self.covariance(shape)
        A = physics.A(torch.eye(len(prior_covariance)).reshape(-1, *shape)).flatten(1).double().T
        covariance_of_y = A @ prior_covariance @ A.T
        covariance_of_y.diagonal().add_(torch.as_tensor(noise_level(physics)).double() ** 2)
        gain = torch.linalg.solve(covariance_of_y, A @ prior_covariance).T
        centred = y.flatten(1).double() - self.mean * A.sum(1)
        mean = self.mean + centred @ gain.T
        return mean.reshape(-1, *shape), prior_covariance - gain @ A @ prior_covariance

    def draw_posterior(self, y: Tensor, physics: LinearPhysics, seed: int) -> Tensor:
        """A sample of each posterior, `[B, C, H, W]`, in double precision."""
        mean, covariance = self.posterior(y, physics)
        noise = randn(mean, torch.Generator().manual_seed(seed)).flatten(1)
        return mean + (noise @ torch.linalg.cholesky(covariance).T).reshape(mean.shape)

    def posterior_errors(self, samples: Tensor, y: Tensor, physics: LinearPhysics) -> dict[str, Tensor]:
        """Per image: squares of ``mean_error`` and ``std_ratio``, see :func:`compare_with_posterior`."""
        mean, covariance = self.posterior(y, physics)
        samples, true_variance = samples.double(), covariance.diagonal().mean()
        variance = samples.var(0, correction=min(1, len(samples) - 1)).flatten(1).mean(1)
        square = (samples.mean(0) - mean).square().flatten(1).mean(1) - variance / len(samples)
        return {"mean_error": square / true_variance, "std_ratio": variance / true_variance}


def _filter(x: Tensor, transfer: Tensor) -> Tensor:
    """Multiply by a real and even function of the frequencies."""
    height, width = x.shape[-2:]
    half = transfer[..., : width // 2 + 1]
    return torch.fft.irfft2(torch.fft.rfft2(x) * half, s=(height, width))
