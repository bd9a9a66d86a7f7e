"""Whether samples explain the measurements."""

from __future__ import annotations

import warnings

import torch
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_ud2m.problem import Problem


def warn_of_misfit(problem: Problem, x: Tensor) -> None:
    """
    Warn of residuals that no sample of images in [0, 1] can explain: y is of another range, or its noise
    level in other units.

    :param deepinv_ud2m.Problem problem: the problem.
    :param torch.Tensor x: one sample of each image, `[B, C, H, W]`.
    """
    if not problem.is_linear:
        return
    y, of_x = problem.y, problem.A(x.expand(problem.shape))
    pairs = list(zip(of_x, y, strict=True)) if isinstance(y, TensorList) else [(of_x, y)]
    residual = torch.stack([_root_mean_square(a - b) for a, b in pairs]).amax(0)
    size = torch.stack([_root_mean_square(b) for _, b in pairs]).amax(0)
    level = problem.sigma_y.flatten()
    # Poor samples alone should not warn: five noise levels, 30 % of y and 0.2 are allowed.
    allowed = torch.maximum(5 * level, 0.3 * size).clamp(min=0.2)
    excess, worst = (residual / allowed).max(0)
    if bool(excess > 1):
        level = level[worst].item()
        warnings.warn(
            f"the samples leave residuals of {residual[worst].item():.3g}, "
            f"{residual[worst].item() / level:.3g} times the noise level: is y made of images in "
            f"[0, 1], by this physics, and sigma_y = {level:.3g} its noise in those units?",
            stacklevel=4,
        )


def _root_mean_square(batch: Tensor) -> Tensor:
    return batch.abs().square().flatten(1).mean(1).sqrt()
