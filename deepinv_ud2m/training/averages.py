"""The moving average of parameters, which is better than the last of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deepinv_ud2m.training.checkpoints import uninterrupted


class MovingAverage:
    r"""
    Exponential moving average of parameters, with decay :math:`\min(\beta, (1 + n) / (10 + n))` in update n:
    short at first, so that a short run is not an average with its starting point.

    :param Sequence[torch.nn.Parameter] parameters: the parameters; the average starts from them.
    :param float decay: :math:`\beta`, in [0, 1).
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters, self.decay, self.swapped = list(parameters), decay, False
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """After update n of the parameters, from 0."""
        decay = min(self.decay, (1 + n) / (10 + n))
        for average, parameter in zip(self.values, self.parameters, strict=True):
            average.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and average."""
        with uninterrupted():
            for parameter, average in zip(self.parameters, self.values, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)
            self.swapped = not self.swapped

    def restore(self) -> None:
        """Exchange them again, if they are exchanged."""
        if self.swapped:
            self.swap()

    @torch.no_grad()
    def assign(self) -> None:
        """Give the parameters the values of the average."""
        for parameter, average in zip(self.parameters, self.values, strict=True):
            parameter.copy_(average)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A block in which the parameters are the average."""
        try:
            self.swap()
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        """Load ``values`` of another one."""
        for average, value in zip(self.values, values, strict=True):
            average.copy_(value)
