"""Random draws that do not depend on how the samples were split into batches.

Each sample has a stream of its own, seeded from the caller's generator before any batch is formed.
A batch of streams stands wherever a :class:`torch.Generator` does: :func:`randn` takes either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SampleStreams:
    """
    One stream of standard normal images per sample of a batch. The same seed, shape and block size give the
    same images, whatever the other streams are.

    :param seeds: one integer per sample.
    :param torch.device device: where the noise is drawn.
    :param int block: images drawn at once for each stream, because a draw costs a call per stream
        (default: 1).
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str, block: int = 1):
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
        self.block = block
        self._noise: Tensor | None = None
        self._used = block

    def randn(self, like: Tensor) -> Tensor:
        """Noise of the shape and dtype of images, one per stream; ValueError for another shape in a block."""
        if like.shape[0] != len(self.generators):
            raise ValueError(f"there are {len(self.generators)} random streams but {like.shape[0]} images")
        if self._noise is None or self._used == self.block:
            self._noise = self._draw_block(like)
            self._used = 0
        noise = self._noise[:, self._used]
        if noise.shape != like.shape:
            raise ValueError(
                f"the random streams are of images of shape {list(noise.shape)}, got {list(like.shape)}"
            )
        self._used += 1
        return noise.to(like.dtype)

    def _draw_block(self, like: Tensor) -> Tensor:
        block = like.new_empty(len(self.generators), self.block, *like.shape[1:])
        for part, generator in zip(block, self.generators, strict=True):
            torch.randn(part.shape, generator=generator, out=part)
        return block


def randn(like: Tensor, generator: torch.Generator | SampleStreams | None = None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of ``like``; by default of PyTorch's generator."""
    if isinstance(generator, SampleStreams):
        return generator.randn(like)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def draw_seeds(num: int, generator: torch.Generator | None = None) -> list[int]:
    """Seeds for :class:`SampleStreams`; by default from PyTorch's generator."""
    device = generator.device if generator is not None else "cpu"
    return torch.randint(2**63 - 1, (num,), generator=generator, device=device).tolist()
