"""Randomness that a resumed run repeats: every random number of a step follows from the seed and the step.

Nothing has to be stored but the number of the step and the place in the data. The global generators, and each
random generator that :func:`find_generators` finds, are seeded anew at each step, each with a seed of its
own. A generator that a dataset keeps to itself is beyond reach.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from deepinv.physics.generator import PhysicsGenerator
from torch.utils.data import DataLoader


def seed_all(key: Iterable[int], generators: Iterable[torch.Generator] = ()) -> None:
    """Seed PyTorch, NumPy, Python and further generators, each apart, from a key of integers >= 0."""
    generators = list(generators)
    seeds = np.random.SeedSequence(list(key)).generate_state(3 + len(generators), np.uint64)
    torch.manual_seed(int(seeds[0]) >> 1)
    # Augmentations of a user's dataset may draw from the old global generators.
    np.random.seed(int(seeds[1]) >> 32)  # noqa: NPY002
    random.seed(int(seeds[2]))
    for generator, seed in zip(generators, seeds[3:], strict=True):
        generator.manual_seed(int(seed) >> 1)


def find_generators(*owners: object) -> list[torch.Generator]:
    """
    The random generators in the attributes of modules, and of the modules, lists and dictionaries that these
    hold, each once; not in functions, except for a sum ``g1 + g2`` of deepinv's physics generators.
    """
    found = {id(generator): generator for generator in _walk(owners, set())}
    return list(found.values())


def _walk(thing: object, seen: set[int]) -> Iterator[torch.Generator]:
    if isinstance(thing, torch.Generator):
        yield thing
    elif id(thing) not in seen:
        seen.add(id(thing))
        if isinstance(thing, list | tuple):
            parts = thing
        elif isinstance(thing, dict):
            parts = list(thing.values())
        elif isinstance(thing, torch.nn.Module):
            parts = [*vars(thing).values(), *parts_of_sum(thing)]
        else:
            parts = []
        for part in parts:
            yield from _walk(part, seen)


def parts_of_sum(module: torch.nn.Module) -> list:
    """The parts of a sum ``g1 + g2`` of deepinv's physics generators, which a function holds."""
    step: Any = getattr(module, "step_func", None)
    of_sum = f"{PhysicsGenerator.__add__.__qualname__}.<locals>.step"
    if getattr(step, "__qualname__", None) != of_sum:
        return []
    return list(inspect.getclosurevars(step).nonlocals.values())


class BatchStream:
    """
    The batches of a data loader, epoch after epoch, from any place on.

    An epoch's order follows from the seed and the number of the epoch.

    :param torch.utils.data.DataLoader loader: the data loader.
    :param list[int] key: integers that fix the order.
    :param Callable check: is called with the first batch that is taken, to refuse it.
    :raises ValueError: for persistent workers, whose random state cannot be set.
    """

    def __init__(self, loader: DataLoader, key: list[int], check: Callable | None = None):
        if getattr(loader, "persistent_workers", False):
            raise ValueError(
                "data loaders must have persistent_workers=False: the random state of workers that stay "
                "cannot be set, and a run would not be repeatable"
            )
        self.loader, self.key, self.check = loader, list(key), check
        self.epoch, self.position = 0, 0
        self._iterator: Any = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._start()
        batch = next(self._iterator, self._END)
        if batch is self._END:
            self.epoch, self.position, self._iterator = self.epoch + 1, 0, None
            return next(self)
        self.position += 1
        if self.check is not None:
            self.check(batch)
            self.check = None
        return batch

    def seek(self, epoch: int, position: int) -> None:
        """Go to an epoch, and in it past some batches, which are loaded and dropped."""
        # The iterator is not made before it is used: a sampler draws its order at the first batch.
        self.epoch, self.position, self._iterator = epoch, 0, None
        for _ in range(position):
            next(self)

    def _start(self) -> None:
        # Only a loader's own draws: the order of the data, and the seeds of its workers.
        sampler: Any = getattr(self.loader, "sampler", None)
        batches = getattr(self.loader, "batch_sampler", None)
        parts = [self.loader, sampler, batches, getattr(batches, "sampler", None)]
        generators = {id(g): g for g in (getattr(part, "generator", None) for part in parts) if g}
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        seed_all([*self.key, self.epoch], generators.values())
        self._iterator = iter(self.loader)

    _END = object()


class Turns:
    """
    The data of several physics, which take turns: each once in every round, in an order that follows from the
    round. ``turns[i]`` is the number of the physics of turn i.

    :param list loaders: the data loader of each physics; several may have the same.
    :param list[int] key: integers that fix all orders.
    :param Callable check: see :class:`BatchStream`.
    """

    def __init__(self, loaders: list[DataLoader], key: list[int], check: Callable | None = None):
        self.key, distinct = list(key), {id(loader): loader for loader in loaders}
        streams = {
            of: BatchStream(loader, [*key, i], check) for i, (of, loader) in enumerate(distinct.items())
        }
        self.streams = [streams[id(loader)] for loader in loaders]

    def __getitem__(self, turn: int) -> int:
        turn, place = divmod(turn, len(self.streams))
        order = np.random.default_rng([*self.key, turn]).permutation(len(self.streams))
        return int(order[place])

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where the data are, for each physics: epoch, and batches of it that were used."""
        return [(stream.epoch, stream.position) for stream in self.streams]

    def seek(self, places: list[tuple[int, int]]) -> None:
        """Go to places that were noted before."""
        for stream, place in {id(s): (s, p) for s, p in zip(self.streams, places, strict=True)}.values():
            stream.seek(*place)
