r"""Samples of one image with progress and a time limit, what they say, and DiffPIR beside them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import deepinv as dinv
import torch
from deepinv.models import Denoiser
from deepinv.physics import Physics
from scipy.stats import t
from torch import Tensor

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.counting import CallCounter
from deepinv_ud2m.physics import ChannelMap
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.uncertainty import summary

#: Network evaluations of DiffPIR, and its settings.
DIFFPIR = {"max_iter": 100, "zeta": 1.0, "lambda_": 1.5}

#: Samples that :func:`deepinv_ud2m.uncertainty.summary` needs for intervals of 90 %.
FOR_QUANTILES = 19

# Pixels of one pass of the network, as UD2M.sample has on a processor.
_PIXELS_PER_PASS = 8 * 128**2


@dataclass
class Result:
    """
    Samples and what they say. Images are `[1, C, H, W]`.

    :param torch.Tensor samples: `[S, 1, C, H, W]`.
    :param torch.Tensor y: measurements.
    :param torch.Tensor mean: mean of the samples.
    :param torch.Tensor, None std: standard deviation; of two samples or more, as are ``low`` and ``high``.
    :param torch.Tensor, None low: lower end of the interval of 90 %.
    :param torch.Tensor, None high: upper end.
    :param float, None noise: noise level that the sampler took.
    :param float, None residual: residual of the first sample over the noise level, root mean square.
    :param torch.Tensor, None residuals: the same for each measurement, in the shape of ``y``.
    :param float, None nfe: network evaluations per sample.
    :param float seconds: how long the samples took.
    :param list[str] messages: warnings of the package, and what else there is to say.
    :param torch.Tensor, None x: the truth.
    :param torch.Tensor, None diffpir: the estimate of DiffPIR.
    :param dict[str, float] psnr: PSNR to the truth, in dB.
    """

    samples: Tensor
    y: Tensor
    mean: Tensor
    std: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    noise: float | None = None
    residual: float | None = None
    residuals: Tensor | None = None
    nfe: float | None = None
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)
    x: Tensor | None = None
    diffpir: Tensor | None = None
    psnr: dict[str, float] = field(default_factory=dict)


class Stopped(Exception):
    """The time is over, or a user stopped the job."""


#: Takes the share that is done, in [0, 1], and what is being done. It may raise :class:`Stopped`.
Report = Callable[[float, str], None]


def restore(
    model: UD2M,
    y: Tensor,
    physics: Physics,
    count: int,
    *,
    noise: float | str | None = "estimate",
    seed: int = 0,
    report: Report | None = None,
) -> Result:
    """
    Samples of an image.

    :param deepinv_ud2m.UD2M model: the sampler.
    :param torch.Tensor y: measurements `[1, C, H, W]`.
    :param deepinv.physics.Physics physics: the physics that made them.
    :param int count: number of samples.
    :param float, str, None noise: noise level, ``"estimate"``, or ``None`` for that of the physics.
    :param int seed: of the samples.
    :param Callable, None report: is told of the progress, after each network evaluation. If it raises
        :class:`Stopped`, the samples that are complete are the result.
    :returns: the result.
    :raises ValueError: if no sample was complete.
    """
    check_count("count", count)
    start = time.perf_counter()
    parts: list[Tensor] = []
    messages: dict[str, str] = {}
    generator = torch.Generator(y.device).manual_seed(seed)
    at_once = max(1, _PIXELS_PER_PASS // physics.A_adjoint(y).shape[-2:].numel())
    total = count * model.num_steps * getattr(model.unfolded, "num_iterations", 1)
    level: Any = noise
    counted, residual = 0, None

    def done(images: int) -> None:
        nonlocal counted
        if is_estimating:
            text, share = "The noise level is being estimated", 0.0
        else:
            counted += images
            ready = sum(map(len, parts))
            text, share = f"{ready} of {count} samples are complete", min(counted / total, 1.0)
        if report is not None:
            report(share, text)

    with warnings.catch_warnings(record=True) as caught, CallCounter(model.unfolded.networks, done):
        warnings.simplefilter("always", UserWarning)
        try:
            is_estimating = noise == "estimate"
            if is_estimating:
                level = float(model.estimate_sigma_y(y, physics, generator=generator))
                is_estimating = False
            while (missing := count - sum(map(len, parts))) > 0:
                drawn = min(missing, at_once)
                parts.append(model.sample(y, physics, drawn, sigma_y=level, generator=generator))
                residual = model.residual if residual is None else residual
        except Stopped as reason:
            if not parts:
                raise ValueError(f"{reason} No sample is complete.") from None
            messages["stopped"] = f"{reason} {sum(map(len, parts))} of {count} samples are complete."
    for one in caught:
        if one.category is UserWarning:  # samples differ in the numbers of a warning alone
            messages.setdefault(str(one.message).split(":")[0], str(one.message))
    samples = torch.cat(parts)
    result = Result(samples, y, samples.mean(0), noise=level, nfe=model.nfe, messages=[*messages.values()])
    if residual is not None:
        result.residual = residual[0].item()
        result.residuals = None if level is None else (physics.A(samples[0]) - y) / level
    result.seconds = time.perf_counter() - start
    if len(samples) >= FOR_QUANTILES:
        found = summary(samples)
        result.std, result.low, result.high = found.std, found.low, found.high
    elif len(samples) > 1:
        result.std = samples.std(0)
        result.low, result.high = (end.clamp(0, 1) for end in interval(samples))
    return result


def interval(samples: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    An interval that holds 90 % of a normal variable of which S draws are known,
    :math:`\bar x \pm t_{S-1}(0.95) \sqrt{1 + 1/S}\, s`.

    :param torch.Tensor samples: S samples `[S, ...]`, two at least.
    :returns: its ends, `[...]`.
    """
    count = len(samples)
    width = t.ppf(0.95, count - 1) * math.sqrt(1 + 1 / count) * samples.std(0)
    return samples.mean(0) - width, samples.mean(0) + width


@torch.no_grad()
def diffpir(
    prior: Denoiser,
    y: Tensor,
    physics: Physics,
    noise: float | None,
    seed: int = 0,
    report: Report | None = None,
) -> Tensor:
    """
    The estimate of deepinv's DiffPIR with the same prior, see :data:`DIFFPIR`.

    :param deepinv.models.Denoiser prior: the prior, of colour images.
    :param torch.Tensor y: measurements `[1, C, H, W]`.
    :param deepinv.physics.Physics physics: the physics that made them.
    :param float, None noise: noise level (default: 0.005).
    :param int seed: of its noise.
    :param Callable, None report: as for :func:`restore`.
    :returns: the image `[1, C, H, W]` in [0, 1].
    """
    counted, steps = 0, DIFFPIR["max_iter"]

    def done(images: int) -> None:
        nonlocal counted
        counted += images
        if report is not None:
            report(min(counted / steps, 1.0), f"DiffPIR: {counted} of {steps} network evaluations")

    is_grey = y.shape[1] == 1
    level = 0.005 if noise is None else noise
    fidelity = dinv.optim.data_fidelity.L2()
    sampler = dinv.sampling.DiffPIR(prior, fidelity, sigma=level, device=y.device, **DIFFPIR)
    with CallCounter([prior], done):
        x = sampler(y, ChannelMap.grey(physics) if is_grey else physics, seed=seed + 1)  # it ignores seed 0
    return (x.mean(1, keepdim=True) if is_grey else x).clamp(0, 1)
