r"""What is trained in each stage of a distillation: initial estimates, samples at one level, or samples.

Each stage is a function ``(model, problem, x, sigmas, num_samples) -> dict`` of what losses are called with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepinv_ud2m.checks import expand_scalar
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.sampler import UD2M


def initial(model: UD2M, problem: Problem, x: Tensor, sigmas: Callable, num_samples: int) -> dict:
    """The initializer's estimate, and its predicted RMSE."""
    states = _states(x, sigmas)
    estimate, rmse = model.unfolded.initial_estimate(problem, **states)
    return {**states, "samples": estimate[None], "rmse": rmse}


def single(model: UD2M, problem: Problem, x: Tensor, sigmas: Callable, num_samples: int) -> dict:
    r"""Samples of :math:`p(x \mid y, x_s)` at a random level s for each image."""
    states = _states(x, sigmas)
    # All samples of a state have the same initial estimate: one network evaluation in place of S.
    initial = model.unfolded.initial_estimate(problem, **states)
    initial, (x_s, sigma) = (
        [part.repeat(num_samples, *[1] * (part.ndim - 1)) for part in parts]
        for parts in (initial, (states["x_s"], states["sigma"]))
    )
    samples = model.unfolded.draw(problem.repeat(num_samples), x_s, sigma, initial=tuple(initial))
    return {**states, "samples": samples.unflatten(0, (num_samples, len(x)))}


def end_to_end(model: UD2M, problem: Problem, x: Tensor, sigmas: Callable, num_samples: int) -> dict:
    """Samples of the whole sampler, through all of its levels."""
    x_s = model.first_state(x.repeat(num_samples, 1, 1, 1))
    *_, (_, _, samples) = model.chain(problem.repeat(num_samples), x_s)
    return {"samples": samples.unflatten(0, (num_samples, len(x)))}


def _states(x: Tensor, sigmas: Callable[[int], Tensor]) -> dict[str, Tensor]:
    sigma = sigmas(len(x)).to(x)
    return {"x_s": x + expand_scalar(sigma, x, "sigmas") * torch.randn_like(x), "sigma": sigma}


STAGES: dict[str, Callable[..., dict]] = {"initial": initial, "single": single, "end_to_end": end_to_end}
