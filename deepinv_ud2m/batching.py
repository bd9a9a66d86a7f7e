"""Several posterior samples of each measurement in one batch."""

from __future__ import annotations

import torch
from deepinv.physics import GaussianNoise, LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor


class RepeatedPhysics(LinearPhysics):
    """
    A physics on a batch that is several copies of its own batch, one after the other.

    Operators that differ from image to image keep their own images, whatever the class of the
    physics: nothing is assumed about how it stores them. A single operator broadcasts in every
    deepinv physics, so the copies of a batch of one go through in one call.

    :param deepinv.physics.Physics physics: the physics of one copy.
    :param int batch_size: images B in one copy.
    :param int repeats: number of copies.
    :param torch.Tensor sigma_y: noise level of one copy, with 1 or B elements.
    """

    def __init__(self, physics: Physics, batch_size: int, repeats: int, sigma_y: Tensor):
        sigma_y = sigma_y.reshape(-1)
        super().__init__(
            noise_model=GaussianNoise(sigma_y if len(sigma_y) == 1 else sigma_y.repeat(repeats))
        )
        self.physics = physics
        self.calls = 1 if batch_size == 1 else repeats

    def A(self, x, **kwargs):
        return self._by_copy(self.physics.A, x, **kwargs)

    def A_adjoint(self, y, **kwargs):
        return self._by_copy(self.physics.A_adjoint, y, **kwargs)

    def A_adjoint_A(self, x, **kwargs):
        return self._by_copy(self.physics.A_adjoint_A, x, **kwargs)

    def A_dagger(self, y, **kwargs):
        return self._by_copy(self.physics.A_dagger, y, **kwargs)

    def prox_l2(self, z, y, gamma, **kwargs):
        return self._by_copy(self.physics.prox_l2, z, y, gamma, **kwargs)

    def _by_copy(self, function, *batches, **kwargs):
        if self.calls == 1:
            return function(*batches, **kwargs)
        parts = zip(*(_split(batch, self.calls) for batch in batches), strict=True)
        return _join([function(*part, **kwargs) for part in parts])


def repeat_batch(batch: Tensor | TensorList, repeats: int) -> Tensor | TensorList:
    """
    Copies of a batch, one after the other.

    :param torch.Tensor, deepinv.utils.TensorList batch: of batch size B.
    :param int repeats: number of copies.
    :returns: batch of size ``repeats * B``.
    """
    if isinstance(batch, TensorList):
        return TensorList([repeat_batch(part, repeats) for part in batch])
    return batch.repeat(repeats, *[1] * (batch.ndim - 1))


def _split(batch: Tensor | TensorList | float, parts: int) -> list:
    if not isinstance(batch, Tensor | TensorList) or (isinstance(batch, Tensor) and batch.numel() == 1):
        return [batch] * parts  # a scalar, the same for all
    if isinstance(batch, TensorList):
        return [TensorList(list(part)) for part in zip(*(b.chunk(parts) for b in batch), strict=True)]
    return list(batch.chunk(parts))


def _join(parts: list):
    if isinstance(parts[0], TensorList):
        return TensorList([torch.cat(part) for part in zip(*parts, strict=True)])
    return torch.cat(parts)
