r"""Regularised least squares by conjugate gradients, with implicit gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Tensors of an operator, and how often each was written to.
Fingerprint = list[tuple[Tensor, int]]


def regularised_least_squares(
    mean: Tensor,
    adjoint: Tensor,
    gamma: Tensor,
    normal: Callable[[Tensor], Tensor],
    *,
    tol: float = 1e-5,
    atol: Tensor | float = 0.0,
    max_iter: int = 1000,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    operator: Callable[[], Fingerprint] = list,
) -> Tensor:
    r"""
    The minimiser of :math:`\tfrac\gamma2 \|A z - y\|^2 + \tfrac12 \|z - m\|^2`, which solves
    :math:`(I + \gamma A^\top A) z = m + \gamma A^\top y`.

    Each image stops when the bound on its own error is below ``tol`` or ``atol``, the looser of both. The
    result for an image does not depend on the other images of its batch.

    Gradients reach m, :math:`A^\top y` and :math:`\gamma`, by implicit differentiation. Their memory does
    not grow with the number of iterations. There are no second derivatives, and no gradients for the
    parameters of the operator.

    In float32 rounding limits the solution to an error of about :math:`10^{-7} \gamma \|A\|^2` relative
    to z, whatever ``tol``.

    :param torch.Tensor mean: m, of shape `[B, C, H, W]`, where the iterations start.
    :param torch.Tensor adjoint: :math:`A^\top y`, of the same shape.
    :param torch.Tensor gamma: :math:`\gamma`, of shape `[B, 1, 1, 1]`.
    :param Callable normal: :math:`A^\top A` of images.
    :param float tol: bound on the error relative to z (default: 1e-5).
    :param torch.Tensor, float atol: bound on the root mean square error, in units of the image, a number or
        of shape `[B, 1, 1, 1]` (default: 0). The gradients have the error ``tol`` all the same.
    :param Callable preconditioner: a symmetric positive definite approximation of
        :math:`(I + \gamma A^\top A)^{-1}`, of images (default: the identity).
    :param int max_iter: most iterations (default: 1000). It warns when it reaches them.
    :param Callable operator: returns the tensors of the operator, see
        :func:`deepinv_ud2m.physics.traits.operator_tensors`. The backward pass raises a ``RuntimeError``
        if they have changed since the forward pass.
    :returns: the minimiser, of the shape of m.
    """
    solve = _Solver(normal, tol, max_iter, preconditioner)
    return _Solve.apply(mean, adjoint, gamma, atol, solve, operator)


class _Solve(torch.autograd.Function):
    r"""
    With :math:`H = I + \gamma A^\top A` and an incoming gradient g, :math:`v = H^{-1} g` is the gradient
    of m, :math:`\gamma v` that of :math:`A^\top y`, and :math:`\langle v, z - m \rangle / \gamma` that of
    :math:`\gamma`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        adjoint: Tensor,
        gamma: Tensor,
        atol: Tensor | float,
        solve: _Solver,
        operator: Callable[[], Fingerprint],
    ) -> Tensor:
        correction = solve(mean, adjoint, gamma, atol)
        ctx.save_for_backward(gamma, correction)
        ctx.solve, ctx.operator, ctx.tensors = solve, operator, operator()
        return mean + correction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not _are_same(ctx.operator(), ctx.tensors):
            raise RuntimeError(
                "the physics was updated between the forward and the backward pass of "
                "posterior_prox; its gradient would be that of another operator"
            )
        gamma, correction = ctx.saved_tensors
        v = grad + ctx.solve(grad, 0.0, gamma, 0.0)
        return v, gamma * v, _dot(v, correction) / gamma, None, None, None


@dataclass(frozen=True)
class _Solver:
    r"""
    What the data adds to the mean: :math:`d = z - m` solves
    :math:`H d = \gamma (A^\top y - A^\top A m) = r`.

    Its error is at most the norm of the residual, because :math:`H \ge I`.
    """

    normal: Callable[[Tensor], Tensor]
    tol: float
    max_iter: int
    preconditioner: Callable[[Tensor], Tensor] | None

    def __call__(self, mean: Tensor, adjoint: Tensor, gamma: Tensor, atol: Tensor | float) -> Tensor:
        precondition = self.preconditioner or (lambda r: r)
        r = gamma * (adjoint - self.normal(mean))
        d = 0 * r  # NaN where r is NaN
        p = s = precondition(r)
        r_s = _dot(r, s)
        bound = atol**2 * r[0].numel()
        for _ in range(self.max_iter):
            z = mean + d
            active = _dot(r, r) > torch.maximum(self.tol**2 * _dot(z, z), torch.as_tensor(bound))
            if not active.any():
                break
            H_p = p + gamma * self.normal(p)
            step = torch.where(active, r_s / _dot(p, H_p), 0)
            d, r, r_s_before = d + step * p, r - step * H_p, r_s
            s = precondition(r)
            r_s = _dot(r, s)
            p = torch.where(active, s + (r_s / r_s_before) * p, p)
        else:
            warnings.warn(
                f"posterior_prox stopped after {self.max_iter} iterations, before it reached its tolerance",
                stacklevel=2,
            )
        return d


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _are_same(now: Fingerprint, then: Fingerprint) -> bool:
    # By value: deepinv's Downsampling registers its filter anew, unchanged, in every call.
    return len(now) == len(then) and all(
        (a is b and i == j) or (a is not b and a.shape == b.shape and torch.equal(a, b))
        for (a, i), (b, j) in zip(now, then, strict=True)
    )
