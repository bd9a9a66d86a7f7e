r"""Where an unfolded denoiser starts: a first guess of x from the measurement y and the state x_s."""

from __future__ import annotations

import torch
from deepinv.physics import Physics
from torch import Tensor, nn

from deepinv_ud2m.proximal import Scalar, expand_scalar, posterior_prox


class LinearInitializer(nn.Module):
    r"""
    The most likely image given y and x_s under a broad Gaussian prior :math:`\mathcal N(\mu, \tau^2 I)`,

    .. math::
        \operatorname*{argmin}_x \; \frac{\|A x - y\|^2}{2 \sigma_y^2}
        + \frac{\|x - x_s\|^2}{2 s^2} + \frac{\|x - \mu\|^2}{2 \tau^2} .

    It is the pseudo-inverse and x_s, blended by precision, direction by direction: where A says
    nothing x_s decides, where x_s is all noise the image is grey. No noise is amplified, unlike in
    :math:`A^\dagger y`, and it is one call of the same prox as the iterations.

    :param float mean: :math:`\mu` (default: 0.5, the middle of [0, 1]).
    :param float std: :math:`\tau`, positive (default: 0.5).
    """

    def __init__(self, mean: float = 0.5, std: float = 0.5):
        super().__init__()
        if not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        self.mean, self.std = mean, std

    def forward(
        self, y: Tensor, physics: Physics, x_s: Tensor, sigma: Scalar, sigma_y: Scalar
    ) -> Tensor:
        """
        :param torch.Tensor y: measurements.
        :param deepinv.physics.Physics physics: the physics.
        :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`.
        :param float, torch.Tensor sigma: level of ``x_s``, a scalar, `[B]` or `[B, 1, 1, 1]`.
        :param float, torch.Tensor sigma_y: noise level of ``y``, likewise.
        :returns: images of shape `[B, C, H, W]`.
        """
        prior_mean = torch.full_like(x_s, self.mean)
        return posterior_prox(prior_mean, y, physics, x_s, sigma, rho=self.std, sigma_y=sigma_y)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


class PseudoInverseInitializer(nn.Module):
    r"""
    The initialisation of the paper, a back-projection of y and the state, blended by precision:

    .. math:: (s^2 A^\dagger y + \sigma_y^2\, x_s) / (s^2 + \sigma_y^2) .

    :param str mode: ``"pinv"`` for :math:`A^\dagger y` or ``"adjoint"`` for :math:`A^\top y`
        (default: ``"pinv"``).
    """

    def __init__(self, mode: str = "pinv"):
        super().__init__()
        if mode not in ("pinv", "adjoint"):
            raise ValueError(f"mode must be 'pinv' or 'adjoint', got {mode!r}")
        self.mode = mode

    def forward(
        self, y: Tensor, physics: Physics, x_s: Tensor, sigma: Scalar, sigma_y: Scalar
    ) -> Tensor:
        """The arguments of :meth:`LinearInitializer.forward`."""
        back_projection = physics.A_dagger(y) if self.mode == "pinv" else physics.A_adjoint(y)
        variance = expand_scalar(sigma, x_s, "sigma") ** 2
        weight = variance / (variance + expand_scalar(sigma_y, x_s, "sigma_y") ** 2)
        return torch.lerp(x_s, back_projection.to(x_s.dtype), weight)

    def extra_repr(self) -> str:
        return repr(self.mode)
