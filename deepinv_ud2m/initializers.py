r"""Where an unfolded denoiser starts: a first guess of x from the measurement y and the state x_s."""

from __future__ import annotations

import warnings

import torch
from deepinv.physics import LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor, nn

from deepinv_ud2m.batching import RepeatedPhysics
from deepinv_ud2m.lora import freeze_prior
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


class RAMInitializer(nn.Module):
    r"""
    The image that RAM, deepinv's reconstruction network (Terris et al. 2025), makes of y and x_s.

    Both are linear measurements of x, so together they are one linear problem,
    :class:`WhitenedPhysics`, which RAM is trained to solve: at a high level of x_s it is RAM applied
    to y, at a low one RAM as a denoiser of x_s.

    RAM counts as one network evaluation, of which each level s of a sampler spends one. It pads images
    to 64 pixels, or to the next multiple of 16, by itself. It runs in the precision of its own weights,
    never in that of autocast: operators lose too much there. Its smallest noise level is 0.005; a lower
    one, from s and :math:`\sigma_y` together, is treated as that.

    Gradients reach ``x_s`` and the parameters of RAM, but not a ``y`` or noise levels that require
    them: RAM rescales measurements in place.

    :param torch.nn.Module ram: ``deepinv.models.RAM()``, whose weights deepinv downloads, or a module
        with the same call ``(y, physics, sigma=...)``: y is a ``TensorList`` and sigma of shape `[B]`.
        It is kept in evaluation mode, without gradients for its parameters but for those of a LoRA
        on it.
    :param bool trainable: turn on gradients for all its parameters, to fine-tune it
        (default: ``False``).
    :raises TypeError: if ``ram`` is not a module.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m.initializers import RAMInitializer
        >>> ram = dinv.models.RAM(in_channels=(1,), pretrained=False)  # RAM() has trained weights
        >>> physics = dinv.physics.Inpainting((1, 64, 64), mask=0.5)
        >>> x_s = torch.rand(1, 1, 64, 64)
        >>> y = physics(x_s)
        >>> RAMInitializer(ram)(y, physics, x_s, sigma=0.5, sigma_y=0.05).shape
        torch.Size([1, 1, 64, 64])
    """

    def __init__(self, ram: nn.Module, trainable: bool = False):
        super().__init__()
        if not isinstance(ram, nn.Module):
            raise TypeError(f"ram must be a deepinv.models.RAM, got {type(ram).__name__}")
        self.ram, self.trainable = ram, trainable
        freeze_prior(ram)
        if trainable:
            ram.requires_grad_(True)

    def forward(
        self,
        y: Tensor | TensorList,
        physics: LinearPhysics,
        x_s: Tensor,
        sigma: Scalar,
        sigma_y: Scalar,
    ) -> Tensor:
        """
        The arguments of :meth:`LinearInitializer.forward`, all left as they are.

        :raises TypeError: if the physics is not linear.
        :raises ValueError: if RAM does not take images of so many channels.
        """
        self._check(physics, x_s)
        dtype = next((p.dtype for p in self.ram.parameters() if p.is_floating_point()), x_s.dtype)
        with torch.autocast(x_s.device.type, enabled=False), warnings.catch_warnings():
            # Where RAM pads, its prox is deepinv's, with a gradient through all its iterations.
            warnings.filterwarnings("ignore", "Warning: least_squares_implicit_backward")
            joint = WhitenedPhysics(y, physics, x_s, sigma, sigma_y)
            observation = joint.whiten(y, x_s.to(dtype))
            x = self.ram(observation, joint, sigma=joint.level.flatten().to(dtype))
        return x.to(x_s.dtype)

    def _check(self, physics: Physics, x_s: Tensor) -> None:
        operator = physics.physics if isinstance(physics, RepeatedPhysics) else physics
        if not isinstance(operator, LinearPhysics):
            raise TypeError(
                f"physics must be a deepinv LinearPhysics for RAM, got {type(operator).__name__}; "
                "LinearInitializer takes any physics with a prox_l2"
            )
        accepted, channels = getattr(self.ram, "in_channels", None), x_s.shape[1]
        if isinstance(accepted, list | tuple) and channels not in accepted:
            raise ValueError(
                f"x_s has {channels} channels, of shape {list(x_s.shape)}, but this RAM takes images "
                f"of {' or '.join(map(str, accepted))} channels only"
            )

    @property
    def networks(self) -> list[nn.Module]:
        """The networks whose calls count as network evaluations (NFE)."""
        return [self.ram]

    def __repr__(self) -> str:
        # Not the hundreds of layers of RAM, which the representation of a sampler would repeat.
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

    Any common level h is a whitening. This one gives :math:`w_y^2 + w_x^2 = 1`: the norm of the
    operator is at most one where that of A is, which is what networks are trained on, and the problem
    turns smoothly into each of its halves as the other loses its meaning. For A = I the adjoint is
    the precision-weighted mean of y and x_s, and h its noise level.

    Measurements are a ``TensorList``, the blocks of y first: networks take the brightness from there,
    as they do from y alone. Levels and operators may differ from image to image. Images and
    measurements may come in another precision than that of ``x_s``, in which the physics works.

    :param torch.Tensor, deepinv.utils.TensorList y: measurements, which tell how many blocks there are.
    :param deepinv.physics.LinearPhysics physics: the operator A. Its noise model is not used.
    :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`.
    :param float, torch.Tensor sigma: their level s, a scalar, `[B]` or `[B, 1, 1, 1]`, positive.
    :param float, torch.Tensor sigma_y: noise level of ``y``, likewise.

    Its ``level`` is h, of shape `[B, 1, 1, 1]`.
    """

    def __init__(
        self,
        y: Tensor | TensorList,
        physics: LinearPhysics,
        x_s: Tensor,
        sigma: Scalar,
        sigma_y: Scalar,
    ):
        super().__init__(img_size=tuple(x_s.shape[1:]))
        half = x_s.dtype in (torch.float16, torch.bfloat16)
        self.physics, self.dtype = physics, torch.float32 if half else x_s.dtype
        x_s = x_s.to(self.dtype)
        sigma = expand_scalar(sigma, x_s, "sigma")
        sigma_y = expand_scalar(sigma_y, x_s, "sigma_y")
        self.level = (sigma**-2 + sigma_y**-2).rsqrt()
        self.weight_y, self.weight_x = self.level / sigma_y, self.level / sigma
        self.is_stack = isinstance(y, TensorList)

    def whiten(self, y: Tensor | TensorList, x: Tensor) -> TensorList:
        """
        :param torch.Tensor, deepinv.utils.TensorList y: measurements.
        :param torch.Tensor x: images, of shape `[B, C, H, W]`.
        :returns: new tensors, the weighted blocks of y, then the weighted x, in the precision of x.
        """
        blocks = [_scale(block, self.weight_y) for block in (y if self.is_stack else [y])]
        return TensorList([_to(block, x.dtype) for block in [*blocks, self.weight_x * x]])

    def A(self, x: Tensor, **kwargs) -> TensorList:
        return self.whiten(self.physics.A(x.to(self.dtype), **kwargs), x)

    def A_adjoint(self, y: TensorList, **kwargs) -> Tensor:
        measurement, x = self._split(y)
        backprojection = self.physics.A_adjoint(measurement, **kwargs)
        return (self.weight_y * backprojection + self.weight_x * x).to(x.dtype)

    def prox_l2(self, z: Tensor, y: TensorList, gamma: Scalar, **_) -> Tensor:
        """That of both blocks at once, closed where that of the physics is; settings of a solver
        are not used."""
        measurement, x = self._split(y)
        if self.is_stack:
            unweighted = TensorList([_scale(block, 1 / self.weight_y) for block in measurement])
        else:
            unweighted = _scale(measurement, 1 / self.weight_y)
        sigma = expand_scalar(gamma, self.level, "gamma") ** -0.5
        return posterior_prox(
            z.to(self.dtype),
            unweighted,
            self.physics,
            x / self.weight_x,
            sigma / self.weight_x,
            rho=1.0,
            sigma_y=sigma / self.weight_y,
        ).to(z.dtype)

    def _split(self, y: TensorList) -> tuple[Tensor | TensorList, Tensor]:
        """The measurement as the physics has it, in its precision, and the image."""
        *blocks, x = y
        blocks = [_to(block, self.dtype) for block in blocks]
        return TensorList(blocks) if self.is_stack else blocks[0], x


def _scale(block: Tensor, weight: Tensor) -> Tensor:
    """One weight per image, for measurements of any number of dimensions."""
    return weight.reshape(-1, *[1] * (block.ndim - 1)) * block


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a real precision, or the complex numbers of that precision."""
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)
