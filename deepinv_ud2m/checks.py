"""Checks of arguments that several files share."""

from __future__ import annotations

from numbers import Integral


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
