"""Levels of the states in training."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.schedule import VPSchedule


class SamplerLevels:
    """
    Draws the levels that a sampler will visit with a certain probability, else those of the schedule's
    training distribution: what is drawn in few steps is trained where it will be used, and still knows
    all levels.

    :param deepinv_ud2m.UD2M model: the sampler.
    :param float share: probability of one of its own levels, each alike, in [0, 1] (default: 0.5).
    :param deepinv_ud2m.VPSchedule schedule: of the others; the linear one of 1000 times by default.
    :raises ValueError: for a share outside of [0, 1].

    |sep|

    :Examples:

        >>> from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
        >>> from deepinv_ud2m.training import SamplerLevels
        >>> levels = SamplerLevels(UD2M(UnfoldedDenoiser(load_prior("mnist"))), share=1.0)
        >>> levels(8).shape
        torch.Size([8])
    """

    def __init__(self, model: UD2M, share: float = 0.5, schedule: VPSchedule | None = None):
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        self.model, self.share = model, share
        self.schedule = schedule if schedule is not None else VPSchedule()

    def __call__(self, batch_size: int) -> Tensor:
        """
        :param int batch_size: number of levels.
        :returns: levels `[batch_size]`, drawn from PyTorch's global generator.
        """
        own = self.model.levels.cpu()
        own = own[torch.randint(len(own), (batch_size,))]
        others = self.schedule.training_levels(batch_size)
        return torch.where(torch.rand(batch_size) < self.share, own, others)
