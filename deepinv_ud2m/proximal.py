r"""The one prox, and the noise level of a physics.

Both likelihoods of a draw from :math:`p(x \mid y, x_s)`, that of the measurement and that of the
diffusion state, are Gaussian in x; with the quadratic coupling to the current iterate they are one
quadratic, whose minimiser is one call to ``physics.prox_l2`` (Mbakam et al. 2025, Section 3).
"""

from __future__ import annotations

import copy
import warnings
from numbers import Number

import torch
from deepinv.physics import (
    MRI,
    BlurFFT,
    Denoising,
    Downsampling,
    GaussianNoise,
    Inpainting,
    LinearPhysics,
    Physics,
    StackedPhysics,
    ZeroNoise,
)
from deepinv.utils import TensorList
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepinv_ud2m.batching import RepeatedPhysics

#: Level given to a physics without noise, about that of 8-bit quantisation (1/255 is 0.004).
NOISE_FLOOR = 0.005

#: Physics whose ``prox_l2`` deepinv computes from a true singular value decomposition.
_CLOSED_FORMS = (BlurFFT, Denoising, Inpainting, MRI)

Scalar = float | Tensor


def posterior_prox(
    x: Tensor,
    y: Tensor | TensorList,
    physics: Physics,
    x_s: Tensor,
    sigma: Scalar,
    rho: Scalar,
    lambda_: Scalar = 1.0,
    sigma_y: Scalar | None = None,
    *,
    tol: float = 1e-5,
    max_iter: int = 1000,
) -> Tensor:
    r"""
    Proximal step on both likelihoods,

    .. math::
        \operatorname*{argmin}_z \; \frac{\|A z - y\|^2}{2 \lambda \sigma_y^2}
        + \frac{\|z - x_s\|^2}{2 s^2} + \frac{\|z - x\|^2}{2 \rho^2} .

    With :math:`p = 1/\rho^2 + 1/s^2` and :math:`m = (x/\rho^2 + x_s/s^2)/p` this is
    ``physics.prox_l2(m, y, gamma)`` with :math:`\gamma = 1/(p \lambda \sigma_y^2)`. Physics that
    have a closed form use it. The others solve :math:`(I + \gamma A^\top A) z = m + \gamma A^\top y`
    by conjugate gradients, started at m, until the error of each image is below ``tol``; the settings
    stored in the physics are neither used nor changed. It computes in float32 under autocast.

    Gradients reach ``x``, ``x_s``, ``y`` and all the scalars. Those of the iterative solution are
    implicit: the memory does not grow with the iterations, there is no second derivative, the physics
    must not be updated between the forward and the backward pass, and its own parameters cannot be
    learned through it.

    In float32 rounding limits the iterative solution to an error of about
    :math:`10^{-7} \gamma \|A\|^2` relative to z, whatever ``tol``.

    :param torch.Tensor x: current iterate, of shape `[B, C, H, W]`.
    :param torch.Tensor, deepinv.utils.TensorList y: measurements.
    :param deepinv.physics.Physics physics: any deepinv linear physics, or any physics with ``prox_l2``.
    :param torch.Tensor x_s: noisy image, of the shape of ``x``.
    :param float, torch.Tensor sigma: level :math:`s` of ``x_s``. This and the scalars below are
        positive; a float, or a tensor that is 0-d or of shape `[1]`, `[B]` or `[B, 1, 1, 1]`.
    :param float, torch.Tensor rho: coupling :math:`\rho` to ``x``, in units of the image.
    :param float, torch.Tensor lambda_: tempering :math:`\lambda` of the measurement noise (default: 1).
    :param float, torch.Tensor sigma_y: noise level of ``y``; that of the physics by default, see
        :func:`noise_level`.
    :param float tol: bound on the error of the iterative solution, relative to z (default: 1e-5).
    :param int max_iter: most iterations of the iterative solver, which warns when it reaches them
        (default: 1000).
    :returns: the minimiser, of the shape of ``x``.
    :raises ValueError: if a scalar has another shape, or the physics has no Gaussian noise level.
    :raises TypeError: if the physics has no ``prox_l2``.
    """
    check_has_prox(physics)
    if sigma_y is None:
        sigma_y = noise_level(physics)
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        x_s = x_s.to(x.dtype)
        scalars = {"rho": rho, "sigma": sigma, "lambda_": lambda_, "sigma_y": sigma_y}
        rho, sigma, lambda_, sigma_y = (expand_scalar(value, x, name) for name, value in scalars.items())
        precision = rho**-2 + sigma**-2
        mean = (x * rho**-2 + x_s * sigma**-2) / precision
        gamma = 1 / (precision * lambda_ * sigma_y**2)
        if has_closed_form(physics, x.shape):
            return _checked(physics.prox_l2(mean, y, gamma), mean, physics)
        backprojection = physics.A_adjoint(y)
        return _ConjugateGradients.apply(mean, backprojection, gamma, physics, tol, max_iter)


def noise_level(physics: Physics, sigma_y: Scalar | None = None) -> Scalar:
    r"""
    Standard deviation :math:`\sigma_y` of the Gaussian noise of a physics.

    :param deepinv.physics.Physics physics: its ``noise_model`` is a ``GaussianNoise``, whose
        ``sigma`` is returned, or a ``ZeroNoise``, which gets the floor ``NOISE_FLOOR`` = 0.005.
        A stack must have the same level in all its children.
    :param float, torch.Tensor sigma_y: overrides the physics when given.
    :returns: level, a float or a tensor that is 0-d or has one element per image, `[B]`.
    :raises ValueError: for any other noise model, or children of different levels.
    """
    if sigma_y is not None:
        return sigma_y
    if isinstance(physics, StackedPhysics):
        levels = [torch.as_tensor(noise_level(child)) for child in physics.physics_list]
        if any(not torch.equal(level.flatten(), levels[0].flatten()) for level in levels[1:]):
            raise ValueError(
                "the noise levels of a stacked physics must be the same in all its children, got "
                f"{[level.tolist() for level in levels]}: rescale operators and measurements to a "
                "common level, or pass it as sigma_y"
            )
        return levels[0]
    noise_model = physics.noise_model
    if isinstance(noise_model, GaussianNoise):
        return noise_model.sigma
    if isinstance(noise_model, ZeroNoise):
        return NOISE_FLOOR
    raise ValueError(
        f"the noise model of the physics is {type(noise_model).__name__}, which has no Gaussian "
        "level: pass the standard deviation of a Gaussian approximation as sigma_y, of the call or of "
        "UD2M(..., sigma_y=...), or give the physics one, physics.set_noise_model(GaussianNoise(...)), "
        "after it has measured"
    )


def check_has_prox(physics: Physics) -> None:
    """
    :param deepinv.physics.Physics physics: the physics.
    :raises TypeError: if it has no ``prox_l2``.
    """
    if isinstance(physics, type):
        raise TypeError(f"physics must be an instance, got the class {physics.__name__}")
    if not callable(getattr(physics, "prox_l2", None)):
        raise TypeError(
            f"physics must have a prox_l2, which every deepinv LinearPhysics has; "
            f"{type(physics).__name__} has none"
        )


def remember_backprojection(physics: Physics, y: Tensor | TensorList) -> Physics:
    r"""
    A view of a physics that computes :math:`A^\top y` once.

    Every prox needs it, and deepinv computes it anew in each; for super-resolution it is most of the
    cost. The view shares all parameters with the physics, which is left as it is.

    :param deepinv.physics.Physics physics: the physics, with ``A_adjoint``.
    :param torch.Tensor, deepinv.utils.TensorList y: the measurements to remember it for.
    """
    view = copy.copy(physics)
    if isinstance(physics, RepeatedPhysics) and physics.calls == 1:
        # Its prox is that of the physics in it.
        view._modules = dict(physics._modules)  # a copy shares them
        view.physics = remember_backprojection(physics.physics, y)
        return view
    backprojection = view.A_adjoint(y)

    def A_adjoint(measurements, **kwargs):
        if measurements is y and not kwargs:
            return backprojection
        return physics.A_adjoint(measurements, **kwargs)

    view.A_adjoint = A_adjoint
    return view


def has_closed_form(physics: Physics, shape: torch.Size) -> bool:
    """
    Whether ``physics.prox_l2`` is exact without iterations.

    deepinv's Downsampling has a closed form for circular padding only, and it is right only where the
    factor divides the size of the image and the filter is not larger than the image (a longer one
    wraps around, and the formula folds it differently from the operator). Its subclasses inherit the
    formula with another operator, for which it is wrong. Other physics of deepinv inherit the formula
    of a singular value decomposition that they do not have, so only those known to be right count. A
    ``prox_l2`` defined outside of deepinv is trusted.

    :param deepinv.physics.Physics physics: the physics.
    :param torch.Size shape: shape of the images, `[B, C, H, W]`.
    """
    if isinstance(physics, RepeatedPhysics):
        return has_closed_form(physics.physics, shape)
    if isinstance(physics, Downsampling):
        return (
            type(physics).A is Downsampling.A
            and physics.padding == "circular"
            and physics.filter is not None
            and all(
                f <= n and n % physics.factor == 0
                for f, n in zip(physics.filter.shape[-2:], shape[-2:], strict=True)
            )
        )
    owner = next((cls for cls in type(physics).__mro__ if "prox_l2" in vars(cls)), None)
    if owner is None or owner.__module__.partition(".")[0] != "deepinv":
        return True  # the user's own
    return owner is not LinearPhysics and isinstance(physics, _CLOSED_FORMS)


def joint_level(sigma: Tensor, sigma_y: Tensor, reference_level: float) -> Tensor:
    r"""
    Level of a state joined with a Gaussian observation of noise
    :math:`(\sigma_y^2 + \sigma_0^2)^{1/2}`: the square root of one over the sum of their precisions.

    :param torch.Tensor sigma: level s of the state.
    :param torch.Tensor sigma_y: noise level of the measurement, that broadcasts with it.
    :param float reference_level: :math:`\sigma_0`.
    """
    return ((sigma_y**2 + reference_level**2).reciprocal() + sigma**-2).rsqrt()


def expand_scalar(value: Scalar, like: Tensor, name: str) -> Tensor:
    """
    A scalar, or one scalar per image, in a shape that multiplies images.

    :param float, torch.Tensor value: a float, or a tensor of one element or of B, all in the first
        dimension: 0-d, `[1]`, `[B]` or `[B, 1, 1, 1]`.
    :param torch.Tensor like: images of shape `[B, C, H, W]`, which give B, dtype and device.
    :param str name: name of the argument, for the message.
    :returns: tensor of shape `[B, 1, 1, 1]`.
    :raises ValueError: for any other shape, or a number that is not positive.
    :raises TypeError: for what is neither number nor tensor.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    if isinstance(value, Number):  # filled on the device: a copy to it would wait
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        value = torch.full((), value, dtype=like.dtype, device=like.device)
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    batch_size, ones = like.shape[0], [1] * (like.ndim - 1)
    if value.numel() not in (1, batch_size) or any(n != 1 for n in value.shape[1:]):
        raise ValueError(
            f"{name} must be a scalar or one value per image, of shape [{batch_size}] or "
            f"{[batch_size, *ones]}; got shape {list(value.shape)}"
        )
    return value.reshape(-1, *ones).expand(batch_size, *ones)


def _checked(z: Tensor, mean: Tensor, physics: Physics) -> Tensor:
    # deepinv broadcasts parameters of too few dimensions, such as a filter [1, 1, w], silently.
    if z.shape != mean.shape:
        raise ValueError(
            f"the prox of {type(physics).__name__} turned images of shape {list(mean.shape)} into "
            f"{list(z.shape)}: its parameters (filters must be [b, c, h, w]) do not fit the images"
        )
    return z


class _ConjugateGradients(torch.autograd.Function):
    r"""
    Minimiser :math:`z = H^{-1} (m + \gamma q)` with :math:`H = I + \gamma A^\top A` and
    :math:`q = A^\top y`.

    For an incoming gradient g, :math:`v = H^{-1} g` is the gradient of m, :math:`\gamma v` that of q
    and :math:`\langle v, z - m \rangle / \gamma` that of gamma. deepinv has an implicit solver too;
    this one needs only :math:`A^\top A` on images, so it serves stacks, whose measurements are lists.
    """

    @staticmethod
    def forward(ctx, mean, backprojection, gamma, physics, tol, max_iter):
        correction = _correction(physics, mean, backprojection, gamma, tol, max_iter)
        ctx.save_for_backward(gamma, correction)
        ctx.physics, ctx.tol, ctx.max_iter = physics, tol, max_iter
        ctx.buffers = _buffers(physics)
        return mean + correction

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not _same_buffers(_buffers(ctx.physics), ctx.buffers):
            raise RuntimeError(
                "the physics was updated between the forward and the backward pass of "
                "posterior_prox; its gradient would be that of another operator"
            )
        gamma, correction = ctx.saved_tensors
        v = grad + _correction(ctx.physics, grad, 0.0, gamma, ctx.tol, ctx.max_iter)
        grad_gamma = _dot(v, correction) / gamma
        return v, gamma * v, grad_gamma, None, None, None


def _correction(physics, mean, backprojection, gamma, tol, max_iter):
    r"""
    What the data adds to the mean: :math:`d = z - m` solves
    :math:`H d = \gamma (q - A^\top A m) = r`.

    Its error is at most the norm of the residual, because :math:`H \ge I`. Each image stops by
    itself, so it does not depend on the others in its batch.
    """
    r = p = gamma * (backprojection - physics.A_adjoint_A(mean))
    d = 0 * r  # NaN where the measurement is
    r_r = _dot(r, r)
    for _ in range(max_iter):
        z = mean + d
        active = r_r > tol**2 * _dot(z, z)
        if not active.any():
            break
        H_p = p + gamma * physics.A_adjoint_A(p)
        step = torch.where(active, r_r / _dot(p, H_p), 0)
        d, r, r_r_before = d + step * p, r - step * H_p, r_r
        r_r = _dot(r, r)
        p = torch.where(active, r + (r_r / r_r_before) * p, p)
    else:
        warnings.warn(
            f"posterior_prox stopped after {max_iter} iterations, before it reached tol={tol}",
            stacklevel=2,
        )
    return d


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _buffers(physics) -> list[tuple[Tensor, int]]:
    """The tensors of the operator, and how often each was written to."""
    # Stacks keep their children in a plain list, which named_buffers() does not look into.
    children = [child for module in physics.modules() for child in getattr(module, "physics_list", [])]
    own = [b for name, b in physics.named_buffers() if "noise_model" not in name]
    # Those made under torch.inference_mode() do not count, and no gradient comes to need it.
    own = [(b, 0 if b.is_inference() else b._version) for b in own]
    return own + [buffer for child in children for buffer in _buffers(child)]


def _same_buffers(now: list[tuple[Tensor, int]], then: list[tuple[Tensor, int]]) -> bool:
    # By value: deepinv's Downsampling registers its filter anew, unchanged, in every call.
    return len(now) == len(then) and all(
        (a is b and i == j) or (a is not b and a.shape == b.shape and torch.equal(a, b))
        for (a, i), (b, j) in zip(now, then, strict=True)
    )
