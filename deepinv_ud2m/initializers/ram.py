r"""The initial estimate by RAM, deepinv's reconstruction network, which takes y and x_s as one problem."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from deepinv.utils import TensorList
from torch import Tensor, nn

from deepinv_ud2m.checks import Scalar, expand_scalar
from deepinv_ud2m.initializers.base import Initializer
from deepinv_ud2m.priors import freeze_prior, prior_parameters
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.proximal import posterior_prox


class RAMInitializer(Initializer):
    r"""
    The image that RAM, deepinv's reconstruction network (Terris et al. 2025), makes of y and x_s.

    Both are linear measurements of x. Together they are one linear problem, :class:`WhitenedPhysics`, of the
    kind that RAM is trained to solve. At a high level of x_s the result is that of RAM applied to y. At a low
    level RAM acts as a denoiser of x_s.

    RAM counts as one network evaluation per level of a sampler. It pads images to 64 pixels, or to the next
    multiple of 16. It runs in the precision of its own weights, and without autocast, in which operators lose
    too much. Its smallest noise level is 0.005. A lower joint level of s and :math:`\sigma_y` is treated as
    0.005.

    Gradients reach ``x_s`` and the parameters of RAM. They do not reach ``y`` or noise levels, because RAM
    rescales measurements in place.

    :param torch.nn.Module ram: ``deepinv.models.RAM()``, whose weights deepinv downloads, or a module
        with the same call ``(y, physics, sigma=...)``: y is a ``TensorList`` and sigma of shape `[B]`.
        It stays in evaluation mode. Its parameters are frozen, apart from those of a LoRA.
    :param bool trainable: train all its parameters, and store them in a checkpoint (default: ``False``).
    :param float reference_level: see :class:`deepinv_ud2m.initializers.Initializer` (default: 0.2).
    :raises TypeError: if ``ram`` is not a module.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import Problem, RAMInitializer
        >>> ram = dinv.models.RAM(in_channels=(1,), pretrained=False)  # RAM() has trained weights
        >>> physics = dinv.physics.Inpainting((1, 64, 64), mask=0.5)
        >>> x_s = torch.rand(1, 1, 64, 64)
        >>> y = physics(x_s)
        >>> x, h = RAMInitializer(ram)(Problem(y, physics, sigma_y=0.05), x_s, sigma=0.5)
        >>> x.shape
        torch.Size([1, 1, 64, 64])
    """

    is_rebuilt = False

    def __init__(self, ram: nn.Module, trainable: bool = False, reference_level: float = 0.2):
        super().__init__(reference_level)
        if not isinstance(ram, nn.Module):
            raise TypeError(f"ram must be a deepinv.models.RAM, got {type(ram).__name__}")
        self.ram, self.trainable = ram, trainable
        freeze_prior(ram)
        if trainable:
            ram.requires_grad_(True)

    def estimate(self, problem: Problem, x_s: Tensor, sigma: Tensor) -> Tensor:
        """
        :raises TypeError: if the physics is not linear.
        :raises ValueError: if RAM does not take images of so many channels.
        """
        self._check(problem, x_s)
        dtype = next((p.dtype for p in self.ram.parameters() if p.is_floating_point()), x_s.dtype)
        with torch.autocast(x_s.device.type, enabled=False), warnings.catch_warnings():
            # If RAM pads the images, it uses deepinv's prox, which warns.
            warnings.filterwarnings("ignore", "Warning: least_squares_implicit_backward")
            joint = WhitenedPhysics(problem, x_s, sigma)
            observation = joint.whiten(problem.y, x_s.to(dtype))
            x = self.ram(observation, joint, sigma=joint.level.flatten().to(dtype))
        return x.to(x_s.dtype)

    def _check(self, problem: Problem, x_s: Tensor) -> None:
        if not problem.is_linear:
            raise TypeError(
                "physics must be a deepinv LinearPhysics for RAM, got "
                f"{type(problem.physics).__name__}; LinearInitializer takes any physics with a prox_l2"
            )
        accepted, channels = getattr(self.ram, "in_channels", None), x_s.shape[1]
        if isinstance(accepted, list | tuple) and channels not in accepted:
            raise ValueError(
                f"x_s has {channels} channels, of shape {list(x_s.shape)}, but this RAM takes images "
                f"of {' or '.join(map(str, accepted))} channels only"
            )

    def config(self) -> dict:
        return {"trainable": self.trainable, **super().config()}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of RAM, if it is trainable."""
        return dict(prior_parameters(self)) if self.trainable else {}

    @property
    def networks(self) -> list[nn.Module]:
        """The networks whose calls count as network evaluations (NFE)."""
        return [self.ram]

    def __repr__(self) -> str:
        trainable = ", trainable=True" if self.trainable else ""
        return f"RAMInitializer({type(self.ram).__name__}{trainable})"


class WhitenedPhysics(LinearPhysics):
    r"""
    Measurement and state as one linear problem of one noise level: :math:`y = A x + \sigma_y n` and
    :math:`x_s = x + s n'` are

    .. math::
        \begin{pmatrix} w_y y \\ w_x x_s \end{pmatrix}
        = \begin{pmatrix} w_y A \\ w_x I \end{pmatrix} x + h\, n'', \qquad
        h = (\sigma_y^{-2} + s^{-2})^{-1/2}, \quad w_y = h / \sigma_y, \quad w_x = h / s .

    Any common level h would do. With this one :math:`w_y^2 + w_x^2 = 1`. The norm of the operator is then at
    most one if the norm of A is, as for the operators that networks are trained on. The weight of y or of x_s
    goes to zero as its noise grows. For A = I the adjoint is the precision-weighted mean of y
    and x_s, and h its noise level.

    Measurements are a ``TensorList``. The blocks of y come first, because networks take the brightness from
    the first block. Levels and operators may differ from image to image. The physics works in the precision
    of ``x_s``. Images and measurements may come in another precision.

    :param deepinv_ud2m.Problem problem: measurements, the operator A and its noise level.
    :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`.
    :param float, torch.Tensor sigma: their level s, a scalar, `[B]` or `[B, 1, 1, 1]`, positive.

    The attribute ``level`` is h, of shape `[B, 1, 1, 1]`.
    """

    def __init__(self, problem: Problem, x_s: Tensor, sigma: Scalar):
        super().__init__(img_size=tuple(x_s.shape[1:]))
        half = x_s.dtype in (torch.float16, torch.bfloat16)
        self.problem, self.dtype = problem, torch.float32 if half else x_s.dtype
        sigma = expand_scalar(sigma, x_s.to(self.dtype), "sigma")
        sigma_y = problem.sigma_y.to(self.dtype)
        self.level = (sigma**-2 + sigma_y**-2).rsqrt()
        self.weight_y, self.weight_x = self.level / sigma_y, self.level / sigma
        self.is_stack = isinstance(problem.y, TensorList)

    def whiten(self, y: Tensor | TensorList, x: Tensor) -> TensorList:
        """The weighted blocks of y, then the weighted images x, as new tensors in the precision of x."""
        blocks = [_scale(block, self.weight_y) for block in (y if self.is_stack else [y])]
        return TensorList([_to(block, x.dtype) for block in [*blocks, self.weight_x * x]])

    def A(self, x: Tensor, **kwargs: Any) -> TensorList:
        return self.whiten(self.problem.A(x.to(self.dtype)), x)

    def A_adjoint(self, y: TensorList, **kwargs: Any) -> Tensor:
        measurement, x = self._split(y)
        backprojection = self.problem.A_adjoint(measurement)
        return (self.weight_y * backprojection + self.weight_x * x).to(x.dtype)

    def prox_l2(self, z: Tensor, y: TensorList, gamma: Scalar, **_: Any) -> Tensor:
        """The prox of both blocks, in closed form if the physics has one, whatever the solver's settings."""
        measurement, x = self._split(y)
        if self.is_stack:
            unweighted = TensorList([_scale(block, 1 / self.weight_y) for block in measurement])
        else:
            unweighted = _scale(measurement, 1 / self.weight_y)
        sigma = expand_scalar(gamma, self.level, "gamma") ** -0.5
        return posterior_prox(
            self.problem.of(unweighted, sigma / self.weight_y),
            z.to(self.dtype),
            x / self.weight_x,
            sigma / self.weight_x,
            rho=1.0,
        ).to(z.dtype)

    def _split(self, y: TensorList) -> tuple[Tensor | TensorList, Tensor]:
        """The measurement in the precision of the physics, and the image."""
        *blocks, x = y
        blocks = [_to(block, self.dtype) for block in blocks]
        return TensorList(blocks) if self.is_stack else blocks[0], x


def _scale(block: Tensor, weight: Tensor) -> Tensor:
    """One weight per image, for measurements of any number of dimensions."""
    return weight.reshape(-1, *[1] * (block.ndim - 1)) * block


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a real precision, or the complex numbers of that precision."""
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)
