"""Checks of measurements, of their noise level, and of the operator that is said to have made them."""

from __future__ import annotations

import warnings

import torch
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_ud2m.checks import LARGEST, SMALLEST, Scalar


def parts(y: Tensor | TensorList) -> list[Tensor]:
    """Measurements, or the parts of those of a stack."""
    return list(y) if isinstance(y, TensorList) else [y]


def shapes_of(y: Tensor | TensorList) -> list:
    """Shape of measurements, or the shapes of the parts of a stack."""
    return [list(part.shape) for part in y] if isinstance(y, TensorList) else list(y.shape)


def check_measurements(y: Tensor | TensorList) -> None:
    """
    :raises TypeError: for what is no tensor of a floating or complex type.
    :raises ValueError: for an empty tensor, or values that are not finite.
    """
    for part in parts(y):
        if not isinstance(part, Tensor):
            raise TypeError(f"y must be a tensor or a TensorList, got {type(part).__name__}")
        if not (part.is_floating_point() or part.is_complex()):
            raise TypeError(
                f"y must be of a floating type, measurements of images in [0, 1]; got {part.dtype}"
            )
        if part.numel() == 0:
            raise ValueError(f"y is empty: its shape is {list(part.shape)}")
        if not bool(torch.isfinite(part).all()):
            raise ValueError("y must be finite, but it has NaN or infinite values")


def check_level(sigma_y: Scalar) -> Scalar:
    """
    A noise level as it is.

    :raises TypeError, ValueError: for another type, or a number out of range. It warns above 1.
    """
    try:
        level = torch.as_tensor(sigma_y)
        in_range = bool(((level >= SMALLEST) & (level <= LARGEST)).all())  # NaN is not
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"sigma_y must be a number or a tensor, got {sigma_y!r}; samplers also take 'estimate'"
        ) from error
    if not in_range:
        raise ValueError(
            f"sigma_y must be positive, in [{SMALLEST:g}, {LARGEST:g}], got {level.tolist()}; for "
            "measurements without noise give the physics a ZeroNoise, which stands for a small floor"
        )
    if bool((level > 1).any()):
        warnings.warn(
            f"sigma_y is {level.max().item():.3g}: it is a standard deviation, in the units of "
            "images in [0, 1] (25 of 255 is 0.098)",
            stacklevel=4,
        )
    return sigma_y


def check_operator(
    physics: Physics, y: list[Tensor], again: list[Tensor], adjoint: Tensor, level: Scalar
) -> None:
    r"""Warn of an adjoint that is none, and of measurements of what :math:`A A^\top y` does not see."""
    # The dot product test with white noise u: <A u, y> - <u, B y> has the size of the error of B y.
    generator = torch.Generator(adjoint.device).manual_seed(0)
    u = torch.randn(adjoint.shape, generator=generator, dtype=adjoint.dtype, device=adjoint.device)
    with torch.no_grad(), torch.autocast(adjoint.device.type, enabled=False):
        of_u = parts(physics.A(u))
    products = sum(_dots(a, part) for a, part in zip(of_u, y, strict=True))
    error = ((products - _dots(u, adjoint)).square().sum() / _dots(adjoint, adjoint).sum()).sqrt()
    is_exact = adjoint.dtype not in (torch.float16, torch.bfloat16)  # whose rounding is as large
    if is_exact and bool(error > 0.01):
        warnings.warn(
            f"A_adjoint of {type(physics).__name__} is not the adjoint of its A: <A u, y> and "
            f"<u, A_adjoint y> of random images u differ by {100 * error:.2g} % of |A_adjoint y|. Samples "
            "will be wrong; deepinv.physics.adjoint_function makes an adjoint of any linear A",
            stacklevel=4,
        )
    if any(not part.is_complex() and bool(part.abs().max() > 10) for part in y):
        white = parts(physics.A(torch.ones_like(adjoint)))
        for part, of_white in zip(y, white, strict=True):
            if message := too_bright(part, of_white, level):
                warnings.warn(message, stacklevel=4)
    for a, part in zip(again, y, strict=True):
        unseen = part[a == 0]
        if unseen.numel() and bool(unseen.abs().square().mean().sqrt() > 5 * torch.as_tensor(level).max()):
            warnings.warn(
                f"y is not zero in {100 * unseen.numel() / part.numel():.3g} % of the places where "
                f"{type(physics).__name__} measures nothing: is its mask inverted, or that of another image?",
                stacklevel=4,
            )


def too_bright(y: Tensor, of_white: Tensor, level: Scalar) -> str | None:
    """Whether real measurements are larger than those of a white image by far."""
    most, top = y.abs().max(), of_white.abs().max()
    if y.is_complex() or bool(most <= 3 * top + 5 * torch.as_tensor(level).max()):
        return None
    limit = f"images in [0, 1] give at most {top:.3g}"
    return f"y reaches {most:.3g}, where {limit} (divide images of 8 bits by 255)"


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Real parts of the inner products of images, `[B]`, in double precision."""
    return (a.conj() * b).real.double().flatten(1).sum(1)
