r"""Is the spread of samples right? How often the truth is in the balls that samples predict.

If a sampler is exact, then the truth :math:`x` and the samples :math:`X_1, \dots, X_S`, given :math:`y`,
are **exchangeable**: nothing tells one from the others. Samples that ignore :math:`y` and follow the prior
are calibrated too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.metrics.features import extract_features
from deepinv_ud2m.metrics.posterior import check_samples


def rank(samples: Tensor, x: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    r"""
    Rank of each true image among its samples, by the distance from their mean, as an interval of levels.

    With :math:`X_0 = x`, we take the distance of each of the :math:`S + 1` points from the mean of the
    *others*,

    .. math::

        d_i = \Big\| X_i - \frac{1}{S} \sum_{j \neq i} X_j \Big\|_2 , \qquad i = 0, \dots, S .

    For samples of the exact posterior, the rank of :math:`d_0` among the :math:`S + 1` distances is uniform,
    for any :math:`S` and any posterior. If :math:`r` distances are smaller and :math:`t` samples are at
    exactly the distance of the truth, the interval is :math:`[r, r + 1 + t] / (S + 1)`. Intervals of several
    batches can be concatenated for :func:`coverage_curve`.

    :param torch.Tensor samples: samples `[S, B, C, H, W]`, at least two of each posterior.
    :param torch.Tensor x: true images `[B, C, H, W]`.
    :param Callable features: maps images `[N, C, H, W]` to features `[N, D]`, in whose space distances
        are taken, such as :meth:`DigitClassifier.features
        <deepinv_ud2m.metrics.DigitClassifier.features>`; by default the pixels. An exact sampler is
        calibrated in every fixed space.
    :return: ends of the interval, `[B, 2]` in [0, 1], float64 on the CPU.
    :raises ValueError: for fewer than two samples, other shapes, or values that are not finite.
    """
    samples, x = check_samples(samples, x)
    features = nn.Flatten() if features is None else features
    intervals = []
    for i in range(len(x)):
        z = extract_features(torch.cat([x[i : i + 1], samples[:, i]]), features, "samples")
        # The same up to a factor as distances from the mean of the others.
        distance = torch.linalg.vector_norm(z - z.mean(0), dim=1)
        low, high = (distance < distance[0]).sum(), (distance <= distance[0]).sum()
        intervals.append(torch.stack([low, high]).double() / len(z))
    return torch.stack(intervals)


def coverage_curve(intervals: Tensor, levels: Tensor) -> Tensor:
    r"""
    Share of images whose truth is inside the ball of each nominal level.

    An image counts by how much of its interval is below the level :math:`\alpha`. So the expected share is
    :math:`\alpha` at every level for the exact posterior (`Czado, Gneiting and Held, 2009
    <https://doi.org/10.1111/j.1541-0420.2009.01191.x>`_).

    :param torch.Tensor intervals: of all images, `[B, 2]`, from :func:`rank`.
    :param torch.Tensor levels: nominal levels `[L]` in [0, 1].
    :return: shares `[L]` in [0, 1], float64.
    :raises ValueError: for other shapes, or numbers outside these ranges.
    """
    intervals, levels = torch.as_tensor(intervals).double(), torch.as_tensor(levels).double()
    if intervals.ndim != 2 or intervals.shape[1] != 2 or not len(intervals):
        raise ValueError(f"intervals must be [B, 2] with B >= 1, got {list(intervals.shape)}")
    low, high = intervals.unbind(1)
    if not ((low >= 0) & (low < high) & (high <= 1)).all():
        raise ValueError("intervals must satisfy 0 <= low < high <= 1")
    if levels.ndim != 1 or not len(levels) or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"levels must be a list of numbers in [0, 1], got {levels.tolist()}")
    levels = levels.to(intervals.device)
    return ((levels[:, None] - low) / (high - low)).clamp(0, 1).mean(1)


def coverage(
    samples: Tensor, x: Tensor, features: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    r"""
    Coverage of norm balls around the posterior mean: :func:`coverage_curve` of :func:`rank` at the levels
    :math:`1/(S+1), \dots, S/(S+1)` that :math:`S` samples resolve.

    The ball of nominal level :math:`\alpha` holds the share :math:`\alpha` of the posterior that is
    nearest to its mean. For the exact posterior the truth is inside in a share :math:`\alpha` of the
    images, up to the sampling noise that :func:`coverage_error_quantile` gives. A share above
    :math:`\alpha` means that the samples spread too far. A share below it means that they are too close to
    each other, or around a wrong mean.

    :param torch.Tensor samples: samples `[S, B, C, H, W]`, at least two of each posterior.
    :param torch.Tensor x: true images `[B, C, H, W]`.
    :param Callable features: see :func:`rank`.
    :return: the levels `[S]` and the shares `[S]`, float64 on the CPU.
    :raises ValueError: for fewer than two samples, other shapes, or values that are not finite.

    :Examples:

    >>> import torch
    >>> from deepinv_ud2m.metrics import coverage, coverage_error, coverage_error_quantile
    >>> draw = torch.randn(17, 64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> x, samples = draw[0], draw[1:]
    >>> bool(coverage_error(*coverage(samples, x)) < coverage_error_quantile(64, 16))
    True
    >>> bool(coverage_error(*coverage(0.8 * samples, x)) < coverage_error_quantile(64, 16))
    False
    """
    num = len(samples)
    levels = torch.arange(1, num + 1, dtype=torch.float64) / (num + 1)
    return levels, coverage_curve(rank(samples, x, features), levels)


def coverage_error(levels: Tensor, shares: Tensor) -> Tensor:
    r"""
    Largest deviation of a coverage curve from the diagonal,
    :math:`\max_\ell |c(\alpha_\ell) - \alpha_\ell|`.

    It is never 0 for finitely many images: compare it with :func:`coverage_error_quantile`.

    :param torch.Tensor levels: nominal levels `[L]`.
    :param torch.Tensor shares: shares `[L]` of images covered.
    :return: the deviation in [0, 1], a tensor without dimensions.
    :raises ValueError: if the two are not of one size.
    """
    levels, shares = torch.as_tensor(levels), torch.as_tensor(shares)
    if levels.ndim != 1 or levels.shape != shares.shape or not len(levels):
        raise ValueError(f"levels and shares must be [L], got {list(levels.shape)} and {list(shares.shape)}")
    return (levels - shares).abs().max()


def coverage_error_quantile(num_images: int, num_samples: int, probability: float = 0.95) -> float:
    r"""
    Sampling noise of :func:`coverage_error`: its quantile for an exact sampler.

    The error of an exact sampler on :math:`B` independent images is above it with a probability of at most
    ``1 - probability``, if distances do not tie. It is the quantile of the Kolmogorov-Smirnov statistic on
    the grid of levels :math:`k/(S+1)`, computed exactly. For many samples and the probability 0.95 it is
    about :math:`1.36 / \sqrt{B}`; for few samples it is smaller.

    :param int num_images: number :math:`B` of independent images.
    :param int num_samples: number :math:`S` of samples of each.
    :param float probability: of an error below the quantile, in (0, 1).
    :return: the quantile, moved half-way to the next value that the error can take, because of rounding.
    :raises ValueError: for counts below 1 or a probability outside (0, 1).
    """
    num_images = check_count("num_images", num_images)
    points = check_count("num_samples", num_samples) + 1
    if not 0 < probability < 1:
        raise ValueError(f"probability must be in (0, 1), got {probability}")
    # The error is a multiple of 1 / (B (S + 1)). Massart's inequality bounds the quantile.
    unit = 1 / (num_images * points)
    bound = math.sqrt(math.log(2 / (1 - probability)) / (2 * num_images))
    low, high = -1, min(math.ceil(bound / unit), num_images * points)
    while high - low > 1:
        middle = (low + high) // 2
        if _probability_within(middle, num_images, points) >= probability:
            high = middle
        else:
            low = middle
    return (high + 0.5) * unit


def _probability_within(width: int, total: int, points: int) -> float:
    """
    P(|N_k - total k / points| <= width / points for all k), N_k counting uniform ranks below k.

    N is a walk with Poisson steps, given that it ends at ``total``; ``walk`` holds the probabilities of its
    values that are within the width.
    """
    log_factorial = torch.arange(1, total + 2).double().lgamma().numpy()
    n = np.arange(total + 1)
    step = np.exp(n * math.log(total / points) - total / points - log_factorial)
    walk, low = np.ones(1), 0
    for k in range(1, points + 1):
        slack = width if k < points else 0
        new_low = max(-((slack - k * total) // points), 0)
        new_high = min((k * total + slack) // points, total)
        if new_high < new_low:
            return 0.0
        walk = np.convolve(walk, step[: new_high - low + 1])[new_low - low : new_high - low + 1]
        low = new_low
    log_total = total * math.log(total) - total - log_factorial[total]
    return float(walk[0]) / math.exp(log_total)
