"""Randomness that a resumed run repeats: every draw of a step follows from the seed and the step.

Nothing has to be stored but the number of the step and the place in the data. The global generators,
and each random generator that the physics, the noise models and the losses hold, are seeded anew at each
step, each with a seed of its own. (A generator that a dataset keeps to itself is beyond reach.)
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader


def seed_all(key: Iterable[int], generators: Iterable[torch.Generator] = ()) -> None:
    """
    Seed PyTorch, NumPy, Python and further generators, each apart, from a key.

    :param Iterable[int] key: non-negative integers; equal keys give equal draws.
    :param Iterable[torch.Generator] generators: generators to seed as well.
    """
    generators = list(generators)
    seeds = np.random.SeedSequence(list(key)).generate_state(3 + len(generators), np.uint64)
    torch.manual_seed(int(seeds[0]) >> 1)
    # Augmentations of a user's dataset may draw from the old global generators.
    np.random.seed(int(seeds[1]) >> 32)  # noqa: NPY002
    random.seed(int(seeds[2]))
    for generator, seed in zip(generators, seeds[3:], strict=True):
        generator.manual_seed(int(seed) >> 1)


def find_generators(*owners) -> list[torch.Generator]:
    """
    The random generators that physics, noise models and physics generators hold, each once.

    Sums and mixtures of physics generators hold others inside (a sum, in a closure), which are found
    too: seeding only the outermost, as deepinv does, gives the parts of a sum one and the same seed, so
    that a blur width and a noise level would be drawn from the same number.

    :param owners: modules, or lists of them; ``None`` is skipped.
    """
    found = {id(generator): generator for generator in _walk(owners, set())}
    return list(found.values())


def _walk(thing, seen: set[int]) -> Iterator[torch.Generator]:
    if isinstance(thing, torch.Generator):
        yield thing
    elif id(thing) not in seen:
        seen.add(id(thing))
        for part in _parts(thing):
            yield from _walk(part, seen)


def _parts(thing) -> Iterable:
    """What a thing holds, as far as a random generator may be in it."""
    if isinstance(thing, list | tuple):
        return thing
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, torch.nn.Module):
        return [part for name, part in vars(thing).items() if name not in ("_buffers", "_parameters")]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(getattr(thing, "__self__", None), torch.nn.Module):
        return [thing.__self__]
    cells = getattr(thing, "__closure__", None) or ()
    held = list(getattr(thing, "__dict__", {}).values()) if callable(thing) else []
    return held + [cell.cell_contents for cell in cells if _is_set(cell)]


def _is_set(cell) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


class BatchStream:
    """
    The batches of a data loader, epoch after epoch, from any place on.

    An epoch's order follows from the seed and the number of the epoch.

    :param torch.utils.data.DataLoader loader: the data loader.
    :param list[int] key: integers that fix the order.
    :param Callable check: is called with the first batch that is taken, to refuse it.
    :raises ValueError: for persistent workers, whose random state cannot be set; and when an epoch has
        no batch.
    """

    def __init__(self, loader: DataLoader, key: list[int], check: Callable | None = None):
        if getattr(loader, "persistent_workers", False):
            raise ValueError(
                "data loaders must have persistent_workers=False: the random state of workers that stay "
                "cannot be set, and a run would not be repeatable"
            )
        self.loader, self.key, self.check = loader, list(key), check
        self.epoch, self.position, self._iterator = 0, 0, None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self):
        if self._iterator is None:
            self._start()
        batch = next(self._iterator, self._END)
        if batch is self._END:
            if self.position == 0:
                raise ValueError(
                    "train_dataloader has no batch: its dataset is empty, or smaller than a batch "
                    "with drop_last=True"
                )
            self.epoch, self.position, self._iterator = self.epoch + 1, 0, None
            return next(self)
        self.position += 1
        if self.check is not None:
            self.check(batch)
            self.check = None
        return batch

    def seek(self, epoch: int, position: int) -> None:
        """
        Go to a place; the batches before it in its epoch are loaded and dropped.

        :param int epoch: epoch, from 0.
        :param int position: batches of it that were used.
        """
        # The iterator is not made before it is used: a sampler draws its order at the first batch.
        self.epoch, self.position, self._iterator = epoch, 0, None
        for _ in range(position):
            next(self)

    def _start(self) -> None:
        # Only a loader's own draws: the order of the data, and the seeds of its workers.
        parts = [self.loader, getattr(self.loader, "sampler", None)]
        parts += [batches := getattr(self.loader, "batch_sampler", None)]
        parts += [getattr(batches, "sampler", None)]
        generators = {id(g): g for g in (getattr(part, "generator", None) for part in parts) if g}
        own = list(generators.values())
        if hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(self.epoch)
        seed_all([*self.key, self.epoch], own)
        self._iterator = iter(self.loader)

    _END = object()
