"""Noise levels of the states in training."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_ud2m.sampler import UD2M


class StateSigmas:
    """
    Draws the first level of a sampler with a given probability, else a level between two, log-uniform.

    At the first level the state says nothing, and the measurements are all there is. The others of a sampler
    with a ``nominal_rmse`` differ from image to image.

    :param deepinv_ud2m.UD2M model: the sampler.
    :param float first: probability of the first level, in [0, 1].
    :param float low: smallest of the other levels, positive (default: 0.02).
    :param float high: largest of the other levels (default: 2).
    :raises ValueError: for other values.

    |sep|

    :Examples:

        >>> from deepinv_ud2m import UD2M
        >>> from deepinv_ud2m.training import StateSigmas
        >>> StateSigmas(UD2M.from_pretrained("mnist"), first=1.0)(2)
        tensor([78.7000, 78.7000])
    """

    def __init__(self, model: UD2M, first: float, low: float = 0.02, high: float = 2.0):
        if not 0 <= first <= 1 or not 0 < low <= high:
            raise ValueError(f"0 <= first <= 1 and 0 < low <= high must hold, got {first}, {low} and {high}")
        self.model, self.first, self.limits = model, first, (low, high)

    def __call__(self, batch_size: int) -> Tensor:
        """
        :param int batch_size: number of levels.
        :returns: levels `[batch_size]`, drawn from PyTorch's global generator.
        """
        is_first = torch.rand(batch_size) < self.first
        low, high = torch.tensor(self.limits).log()
        others = (low + (high - low) * torch.rand(batch_size)).exp()
        return torch.where(is_first, self.model.sigmas[0].cpu(), others)
