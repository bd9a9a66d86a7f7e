"""Several posterior samples of each measurement in one batch."""

from __future__ import annotations

import torch
from deepinv.physics import GaussianNoise, LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor


class RepeatedPhysics(LinearPhysics):
    """
    A physics on a batch that is several copies of its own batch, one after the other.

    Operators that differ from image to image keep their own images, copy after copy, whatever the
    class of the physics: nothing is assumed about how it stores them. An operator that is the same for
    all images, which is found by trying it, takes all copies in one call.

    :param deepinv.physics.Physics physics: the physics of one copy.
    :param torch.Tensor like: images of one copy, `[B, C, H, W]`, for shape, dtype and device.
    :param int repeats: number of copies.
    :param float, torch.Tensor sigma_y: noise level of one copy, with 1 or B elements.
    """

    def __init__(self, physics: Physics, like: Tensor, repeats: int, sigma_y: float | Tensor):
        sigma_y = torch.as_tensor(sigma_y, device=like.device).reshape(-1)
        super().__init__(
            noise_model=GaussianNoise(sigma_y if len(sigma_y) == 1 else sigma_y.repeat(repeats))
        )
        self.physics = physics
        self.calls = 1 if repeats == 1 or is_shared(physics, like) else repeats

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


def is_shared(physics: Physics, like: Tensor, sigma_y: float | Tensor = 1.0) -> bool:
    """
    Whether operator and noise level are the same for all images of a batch.

    Such an operator commutes with permuting the images, and takes any number of them, both of which are
    tried: equal parameters, one per image, pass the first alone.

    :param deepinv.physics.Physics physics: the physics.
    :param torch.Tensor like: images `[B, C, H, W]`, for shape, dtype and device.
    :param float, torch.Tensor sigma_y: noise level, with 1 or B elements.
    """
    if like.shape[0] == 1:
        return True
    if torch.as_tensor(sigma_y).numel() > 1:
        return False
    generator = torch.Generator(like.device).manual_seed(0)
    x = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    permuted, y = physics.A(x.roll(1, 0)), physics.A(x)
    pairs = zip(permuted, y, strict=True) if isinstance(y, TensorList) else [(permuted, y)]
    if not all(torch.allclose(a, b.roll(1, 0), rtol=1e-5, atol=1e-6) for a, b in pairs):
        return False
    try:
        physics.A(repeat_batch(x, 2))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False
    return True


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
