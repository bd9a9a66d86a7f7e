r"""The proximal step of the method.

Two likelihoods define a draw from :math:`p(x \mid y, x_s)`: of the measurement y and of the diffusion
state x_s. Both are Gaussian in x. Their negative logarithms and the quadratic coupling to the current
iterate add up to one quadratic. Its minimiser is one prox of the problem (Mbakam et al. 2025, Section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_ud2m.checks import Scalar, check_number, expand_scalar
from deepinv_ud2m.problem import Problem


def posterior_prox(
    problem: Problem,
    x: Tensor,
    x_s: Tensor,
    sigma: Scalar,
    rho: Scalar,
    lambda_: Scalar = 1.0,
    *,
    tol: float = 1e-5,
    atol: Tensor | float = 0.0,
    max_iter: int = 1000,
) -> Tensor:
    r"""
    Proximal step on both likelihoods,

    .. math::
        \operatorname*{argmin}_z \; \frac{\|A z - y\|^2}{2 \lambda \sigma_y^2}
        + \frac{\|z - x_s\|^2}{2 s^2} + \frac{\|z - x\|^2}{2 \rho^2} .

    With :math:`p = 1/\rho^2 + 1/s^2` and :math:`m = (x/\rho^2 + x_s/s^2)/p` this is
    ``problem.prox(m, gamma)`` with :math:`\gamma = 1/(p \lambda \sigma_y^2)`. Under autocast it computes in
    float32. Gradients reach ``x``, ``x_s``, ``y`` and all scalars.

    :param deepinv_ud2m.Problem problem: measurements, physics and noise level.
    :param torch.Tensor x: current iterate, of shape `[B, C, H, W]`.
    :param torch.Tensor x_s: noisy image, of the shape of ``x``.
    :param float, torch.Tensor sigma: level :math:`s` of ``x_s``. It and the scalars below are positive:
        a float, or a tensor that is 0-d or of shape `[1]`, `[B]` or `[B, 1, 1, 1]`.
    :param float, torch.Tensor rho: coupling :math:`\rho` to ``x``, in units of the image.
    :param float, torch.Tensor lambda_: tempering :math:`\lambda` of the measurement noise (default: 1).
    :param float tol: bound on the error of an iterative solution, relative to z (default: 1e-5).
    :param torch.Tensor, float atol: bound on its root mean square error in units of the image; the looser of
        both counts (default: 0).
    :param int max_iter: most iterations of the solver (default: 1000). It warns when it reaches them.
    :returns: the minimiser, of the shape of ``x``.
    :raises ValueError: if images or a scalar have another shape.
    """
    if not problem.shape == x.shape == x_s.shape:
        raise ValueError(
            f"x and x_s must be {list(problem.shape)} as the problem, got {list(x.shape)}, {list(x_s.shape)}"
        )
    check_number("tol", tol, low=0)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    x_s = x_s.to(x.dtype)
    scalars = {"rho": rho, "sigma": sigma, "lambda_": lambda_, "sigma_y": problem.sigma_y}
    rho, sigma, lambda_, sigma_y = (expand_scalar(value, x, name) for name, value in scalars.items())
    precision = rho**-2 + sigma**-2
    mean = (x * rho**-2 + x_s * sigma**-2) / precision
    gamma = 1 / (precision * lambda_ * sigma_y**2)
    return problem.prox(mean, gamma, tol=tol, atol=atol, max_iter=max_iter)


def joint_level(sigma: Tensor, sigma_y: Tensor, reference_level: float) -> Tensor:
    r"""
    Error of x given two Gaussian observations: a state of level s, and one of level
    :math:`(\sigma_y^2 + \sigma_0^2)^{1/2}`. It is :math:`p^{-1/2}`, where p is the sum of their precisions.

    :param torch.Tensor sigma: level s of the state.
    :param torch.Tensor sigma_y: noise level of the measurement, that broadcasts with it.
    :param float reference_level: :math:`\sigma_0`.
    """
    return ((sigma_y**2 + reference_level**2).reciprocal() + sigma**-2).rsqrt()
