"""The annotations of the public API are complete. What they say is checked by mypy, see ``typing_use.py``."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from importlib import import_module

import pytest

MODULES = ("", ".data", ".initializers", ".metrics", ".physics", ".priors", ".training", ".uncertainty")


def public(module: str) -> Iterator[tuple[str, object]]:
    """The names in ``__all__``, or else those that the module defines."""
    found = import_module(f"deepinv_ud2m{module}")
    own = [name for name, thing in vars(found).items() if getattr(thing, "__module__", "") == found.__name__]
    for name in getattr(found, "__all__", own):
        if not name.startswith("_"):
            yield name, getattr(found, name)


def functions(name: str, thing: object) -> Iterator[tuple[str, Callable]]:
    """A function, or the methods of a class and of its bases in this package."""
    if inspect.isfunction(thing):
        yield name, thing
    for cls in thing.__mro__ if inspect.isclass(thing) else ():
        for attribute, value in vars(cls).items() if cls.__module__.startswith("deepinv_ud2m") else ():
            is_public = not attribute.startswith("_") or attribute == "__call__"
            is_public |= attribute == "__init__" and not is_dataclass(cls)
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if is_public and inspect.isfunction(function):
                yield f"{cls.__name__}.{attribute}", function


def lacking(name: str, function: Callable) -> list[str]:
    """What of the signature has no annotation."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    found = [f"{name}: {p.name}" for p in parameters if p.annotation is p.empty]
    has_no_result = signature.return_annotation is signature.empty and not name.endswith(".__init__")
    return found + [f"{name}: its result"] * has_no_result


@pytest.mark.parametrize("module", MODULES)
def test_annotations_of_public_names_are_complete(module):
    """Parameters and results of functions, methods and properties."""
    checked = dict(pair for name, thing in public(module) for pair in functions(name, thing))
    assert checked
    assert [what for name, function in checked.items() for what in lacking(name, function)] == []


def test_what_is_not_annotated_is_told():
    """The check above, on what it must find."""

    class Bad:
        def __init__(self, a):
            self.a = a

        @property
        def b(self):
            return self.a

        @classmethod
        def c(cls, d: int) -> int:
            return d

    Bad.__module__ = "deepinv_ud2m"
    found = [what for pair in functions("Bad", Bad) for what in lacking(*pair)]
    assert found == ["Bad.__init__: a", "Bad.b: its result"]
