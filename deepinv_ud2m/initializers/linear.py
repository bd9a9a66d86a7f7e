"""Initial estimates that know nothing of images: one prox, or the pseudo-inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_ud2m.checks import LARGEST, SMALLEST, check_number
from deepinv_ud2m.initializers.base import Initializer
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.proximal import posterior_prox


class LinearInitializer(Initializer):
    r"""
    The most likely image given y and x_s under a broad Gaussian prior :math:`\mathcal N(\mu, \tau^2 I)`,

    .. math::
        \operatorname*{argmin}_x \; \frac{\|A x - y\|^2}{2 \sigma_y^2}
        + \frac{\|x - x_s\|^2}{2 s^2} + \frac{\|x - \mu\|^2}{2 \tau^2} .

    In each direction it is the mean of y, x_s and :math:`\mu`, weighted by precision. Where A has no
    information it is x_s, and grey if x_s is all noise. Unlike :math:`A^\dagger y` it amplifies no noise. It
    is one call of the prox of the iterations.

    :param float mean: :math:`\mu` (default: 0.5, the middle of [0, 1]).
    :param float std: :math:`\tau`, in [1e-6, 1e6] (default: 0.5).
    :param float reference_level: see :class:`deepinv_ud2m.initializers.Initializer` (default: 0.2).
    :raises ValueError: for values out of these ranges.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv.physics import Denoising, GaussianNoise
        >>> from deepinv_ud2m import LinearInitializer, Problem
        >>> problem = Problem(torch.ones(1, 1, 8, 8), Denoising(GaussianNoise(0.5)))
        >>> estimate, h = LinearInitializer()(problem, torch.zeros(1, 1, 8, 8), 78.7)
        >>> round(estimate.mean().item(), 3)  # half of y, half of the grey of the prior
        0.75
    """

    def __init__(self, mean: float = 0.5, std: float = 0.5, reference_level: float = 0.2):
        super().__init__(reference_level)
        self.mean, self.std = check_number("mean", mean), check_number("std", std, SMALLEST, LARGEST)

    def estimate(self, problem: Problem, x_s: Tensor, sigma: Tensor) -> Tensor:
        prior_mean = torch.full_like(x_s, self.mean)
        return posterior_prox(problem, prior_mean, x_s, sigma, rho=self.std)

    def config(self) -> dict:
        return {"mean": self.mean, "std": self.std, **super().config()}


class PseudoInverseInitializer(Initializer):
    r"""
    A back-projection of y and the state, blended by precision, as in the published code of the paper:

    .. math:: (s^2 A^\dagger y + \sigma_y^2\, x_s) / (s^2 + \sigma_y^2) .

    :param str mode: ``"pinv"`` for :math:`A^\dagger y` or ``"adjoint"`` for :math:`A^\top y`
        (default: ``"pinv"``).
    :param float reference_level: see :class:`deepinv_ud2m.initializers.Initializer` (default: 0.2).
    :raises ValueError: for another mode.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv.physics import Denoising, GaussianNoise
        >>> from deepinv_ud2m import Problem, PseudoInverseInitializer
        >>> problem = Problem(torch.ones(1, 1, 8, 8), Denoising(GaussianNoise(0.5)))
        >>> estimate, h = PseudoInverseInitializer(reference_level=0)(problem, torch.zeros(1, 1, 8, 8), 0.5)
        >>> round(estimate.mean().item(), 3)  # y and the state have the same level
        0.5
    """

    def __init__(self, mode: str = "pinv", reference_level: float = 0.2):
        super().__init__(reference_level)
        if mode not in ("pinv", "adjoint"):
            raise ValueError(f"mode must be 'pinv' or 'adjoint', got {mode!r}")
        self.mode = mode

    def estimate(self, problem: Problem, x_s: Tensor, sigma: Tensor) -> Tensor:
        back_projection = problem.A_dagger() if self.mode == "pinv" else problem.adjoint
        weight = sigma**2 / (sigma**2 + problem.sigma_y.to(x_s.dtype) ** 2)
        return torch.lerp(x_s, back_projection.to(x_s.dtype), weight)

    def config(self) -> dict:
        return {"mode": self.mode, **super().config()}
