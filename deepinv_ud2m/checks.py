"""Checks of arguments that several files share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral

from torch import Tensor


def check_count(name: str, value: int) -> int:
    """
    A number of things.

    :param str name: name of the argument, for the message.
    :param int value: an integer, NumPy's included, at least 1.
    :returns: the value as a Python int.
    :raises ValueError: if it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def shapes(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The shapes of tensors, as text, which JSON leaves on one line."""
    return {key: str(list(tensor.shape)) for key, tensor in state.items()}


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """What is wrong with the names and shapes found, in words; nothing if they are those expected."""
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
    """Names for a message, not more than are read."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
