r"""What the samplers need to know of a physics beyond its operator.

A physics may say these things itself, by methods of these names:

- ``is_linear: bool``: whether its operator is linear, if it inherits from a linear physics;
- ``has_closed_form_prox(shape) -> bool``: its ``prox_l2`` is exact for images of this shape;
- ``is_per_image(batch_size) -> bool``: each image of a batch of this size has an operator of its own;
- ``measures_as: Physics``: the physics inside, whose noise and measurements it has;
- ``find_structure(find, shape, y, like, per_image)``: its :mod:`structure <deepinv_ud2m.structure>`, where
  ``find`` finds that of another physics, or ``NotImplemented``;
- ``complaint(y) -> str | None``: a warning, if these measurements do not look like its own.

For deepinv's physics the answers are here. No other file names their classes.
"""

from __future__ import annotations

import torch
from deepinv.physics import (
    MRI,
    BlurFFT,
    DecomposablePhysics,
    Denoising,
    Downsampling,
    GaussianNoise,
    Inpainting,
    LinearPhysics,
    Physics,
    StackedPhysics,
    ZeroNoise,
)
from torch import Tensor

from deepinv_ud2m.checks import Scalar

#: Level given to a physics without noise, about that of 8-bit quantisation (1/255 is 0.004).
NOISE_FLOOR = 0.005

#: Physics whose ``prox_l2`` deepinv computes from a true singular value decomposition.
_CLOSED_FORMS = (BlurFFT, Denoising, Inpainting, MRI)

#: Classes of deepinv whose operators are functions of the user, which may hold anything.
_OF_FUNCTIONS = (Physics, LinearPhysics, DecomposablePhysics)


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


def is_linear(physics: Physics) -> bool:
    """Whether the operator is linear."""
    return isinstance(physics, LinearPhysics) and getattr(physics, "is_linear", True)


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
    physics = getattr(physics, "measures_as", physics)
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


def has_noise(physics: Physics) -> bool:
    """Whether its noise model, or that of any child of a stack, is other than none."""
    physics = getattr(physics, "measures_as", physics)
    if isinstance(physics, StackedPhysics):
        return any(has_noise(child) for child in physics.physics_list)
    return not isinstance(physics.noise_model, ZeroNoise)


def complaints(physics: Physics, y: Tensor) -> list[str]:
    """
    What is suspicious of a physics and its measurements.

    :param deepinv.physics.Physics physics: the physics. By the name that deepinv gives it, its ``filter`` is
        a kernel `[b, c, h, w]`.
    :param torch.Tensor, deepinv.utils.TensorList y: measurements.
    """
    physics = getattr(physics, "measures_as", physics)
    if isinstance(physics, StackedPhysics):
        children = zip(physics.physics_list, y, strict=True)
        return list(dict.fromkeys(text for child, part in children for text in complaints(child, part)))
    found = []
    kernel = getattr(physics, "filter", None)
    if isinstance(kernel, Tensor) and kernel.ndim == 4:
        total, size = kernel.sum((-2, -1)), kernel.abs().sum((-2, -1))
        # A derivative, whose weights cancel, is none of an image.
        is_off = ((total - 1).abs() > 0.02) & (total.abs() > 0.2 * size)
        if bool(is_off.any()):
            found.append(
                f"the weights of the filter of {type(physics).__name__} sum to {total[is_off][0]:.4g}, not "
                "to 1: the brightness of images comes out divided by it, unless y was measured so"
            )
    complain = getattr(physics, "complaint", None)
    own = complain(y) if callable(complain) else None
    return [*found, own] if own else found


def has_closed_form(physics: Physics, shape: torch.Size) -> bool:
    """
    Whether ``physics.prox_l2`` is exact without iterations.

    A ``prox_l2`` that is defined outside of deepinv is trusted. One of deepinv, under an operator ``A`` that
    is not, is not used. Of deepinv's own only those known to be right count:

    - Downsampling for circular padding, where the factor divides the size of the image and the filter is
      not larger than the image. A larger filter wraps around, and the formula folds it differently from
      the operator. Its subclasses inherit the formula with another operator.
    - Four classes with a true singular value decomposition. Others inherit its formula without having one.

    :param deepinv.physics.Physics physics: the physics.
    :param torch.Size shape: shape of the images, `[B, C, H, W]`.
    """
    said = getattr(physics, "has_closed_form_prox", None)
    if callable(said):
        return bool(said(shape))
    prox, operator = _owner(physics, "prox_l2"), _owner(physics, "A")
    if not _is_deepinvs(prox):
        return True
    if not _is_deepinvs(operator):
        return False
    if isinstance(physics, Downsampling):
        return (
            operator is Downsampling
            and physics.padding == "circular"
            and physics.filter is not None
            and all(
                f <= n and n % physics.factor == 0
                for f, n in zip(physics.filter.shape[-2:], shape[-2:], strict=True)
            )
        )
    return prox is not LinearPhysics and isinstance(physics, _CLOSED_FORMS)


def is_per_image(physics: Physics, batch_size: int) -> bool:
    """
    Whether each image of a batch has an operator of its own, so that it does not take more images.

    deepinv keeps such parameters in tensors whose first dimension is the batch. A user's own physics that
    does not say is treated as per image. That is right for every operator, and costs one call per copy of
    the batch.

    :param deepinv.physics.Physics physics: the physics.
    :param int batch_size: number B of images of one copy.
    """
    if batch_size == 1:
        return False
    said = getattr(physics, "is_per_image", None)
    if callable(said):
        return bool(said(batch_size))
    if not _is_deepinvs(type(physics)) or type(physics) in _OF_FUNCTIONS:
        return True
    if any(is_per_image(child, batch_size) for child in _children(physics)):
        return True
    return any(t.ndim > 0 and len(t) == batch_size for t in _tensors(physics))


def operator_tensors(physics: Physics) -> list[tuple[Tensor, int]]:
    """The tensors of an operator, and how often each was written to: they tell whether it has changed."""
    own = [b for name, b in physics.named_buffers() if "noise_model" not in name]
    # A tensor made under torch.inference_mode() has no counter.
    own = [(b, 0 if b.is_inference() else b._version) for b in own]
    return own + [pair for child in _children(physics) for pair in operator_tensors(child)]


def is_circular(physics: Physics, shape: torch.Size) -> bool:
    r"""
    Whether :math:`A C A^\top` is a circular convolution, the same in all channels, for every stationary
    covariance C.

    :param deepinv.physics.Physics physics: the physics.
    :param torch.Size shape: shape of the images, `[B, C, H, W]`.
    """
    if not isinstance(physics, BlurFFT | Downsampling) or not has_closed_form(physics, shape):
        return False
    kernel = physics.filter
    return kernel is not None and torch.equal(kernel, kernel[:, :1].expand_as(kernel))


def _owner(physics: Physics, name: str) -> type:
    """The class that defines a method."""
    return next((cls for cls in type(physics).__mro__ if name in vars(cls)), type(physics))


def _is_deepinvs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "deepinv"


def _children(physics: Physics) -> list[Physics]:
    """Other physics inside: submodules, and those of stacks, which are in a plain list."""
    inner = [module for module in physics.modules() if isinstance(module, Physics)]
    listed = [child for module in inner for child in getattr(module, "physics_list", [])]
    return [child for child in [*inner, *listed] if child is not physics]


def _tensors(physics: Physics) -> list[Tensor]:
    own = [(name, t) for name, t in [*physics.named_buffers(), *physics.named_parameters()]]
    own += [(name, value) for name, value in vars(physics).items() if isinstance(value, Tensor)]
    return [tensor for name, tensor in own if "noise_model" not in name]
