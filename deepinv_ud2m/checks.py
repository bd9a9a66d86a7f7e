"""Checks of arguments that several files share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Number, Real
from pathlib import Path

import torch
from torch import Tensor

Scalar = float | Tensor

#: Bounds of noise levels and couplings. Their squares, and products of these, fit into float32.
SMALLEST, LARGEST = 1e-6, 1e6


def check_count(name: str, value: int) -> int:
    """An integer of at least 1, NumPy's included, as a Python int; ValueError names the argument."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def check_number(
    name: str, value: float | None, low: float = -math.inf, high: float = math.inf, *, positive: bool = False
) -> float:
    """
    A finite real number in [low, high], NumPy's included, as a Python float.

    :raises TypeError: if it is not a real number; it names the argument.
    :raises ValueError: if it is not finite, or out of range.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if math.isfinite(value) and low <= value <= high and (value > 0 or not positive):
        return float(value)
    if positive:
        accepted = "positive and finite"
    elif math.isfinite(low):
        accepted = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and >= {low:g}"
    else:
        accepted = "finite"
    raise ValueError(f"{name} must be {accepted}, got {value!r}")


def check_path(name: str, value: str | Path) -> Path:
    """A path, of a str or as it is; TypeError names the argument."""
    if not isinstance(value, str | Path):
        raise TypeError(f"{name} must be a path, got {value!r}")
    return Path(value)


def expand_scalar(value: Scalar, like: Tensor, name: str) -> Tensor:
    """
    A scalar, or one scalar per image, in a shape that multiplies images.

    :param float, torch.Tensor value: a number in [1e-6, 1e6], or a tensor of shape `[]`, `[1]`, `[B]` or
        `[B, 1, 1, 1]`.
    :param torch.Tensor like: images of shape `[B, C, H, W]`, which give B, dtype and device.
    :param str name: name of the argument, for the message.
    :returns: tensor of shape `[B, 1, 1, 1]`.
    :raises TypeError, ValueError: for another type, shape or number.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    if isinstance(value, Number):  # filled on the device: a copy to it would wait
        if not SMALLEST <= value <= LARGEST:
            raise ValueError(f"{name} must be positive, in [{SMALLEST:g}, {LARGEST:g}], got {value}")
        value = torch.full((), float(value), dtype=like.dtype, device=like.device)
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    batch_size, ones = like.shape[0], [1] * (like.ndim - 1)
    if value.numel() not in (1, batch_size) or any(n != 1 for n in value.shape[1:]):
        raise ValueError(
            f"{name} must be a scalar or one value per image, of shape [{batch_size}] or "
            f"{[batch_size, *ones]}; got shape {list(value.shape)}"
        )
    return value.reshape(-1, *ones).expand(batch_size, *ones)


def shapes(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The shapes of tensors, as text, which JSON leaves on one line."""
    return {key: str(list(tensor.shape)) for key, tensor in state.items()}


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """How the names and shapes found differ from those expected, in words. Empty if they do not."""
    shared = expected.keys() & found.keys()
    complaints = {
        "missing": sorted(expected.keys() - shared),
        "unexpected": sorted(found.keys() - shared),
        "of another shape": [
            f"{key}: {found[key]} instead of {expected[key]}"
            for key in sorted(shared)
            if found[key] != expected[key]
        ],
    }
    return "; ".join(f"{what}: {shorten(keys)}" for what, keys in complaints.items() if keys)


def shorten(names: Iterable[str], most: int = 12) -> str:
    """The first names, and how many more there are, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_interval(name: str, value: tuple[float, float] | None) -> tuple[float, float] | None:
    """
    An interval (low, high), or none.

    :raises TypeError: if it is no pair of numbers.
    :raises ValueError: if low is not below high.
    """
    if value is None:
        return None
    try:
        low, high = value
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be None or (low, high), got {value!r}") from error
    low, high = check_number(name, low), check_number(name, high)
    if not low < high:
        raise ValueError(f"{name} must be (low, high) with low < high, got {value!r}")
    return low, high


def check_device(device: torch.device | str | None) -> None:
    """
    Whether a device is there, before anything is loaded for it.

    :raises ValueError: for what is no device, or a GPU that PyTorch does not see.
    """
    try:
        kind = "cpu" if device is None else torch.device(device).type
    except (RuntimeError, TypeError) as error:
        message = f"device must be one of PyTorch, such as 'cpu' or 'cuda', got {device!r}"
        raise ValueError(message) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {str(device)!r}, and PyTorch sees no CUDA GPU here: use 'cpu', or install a driver "
            "and a PyTorch with CUDA"
        )
