r"""Is it a sample of the posterior? Metrics of several samples of each of several posteriors.

For each image :math:`x` of a batch and its measurement :math:`y`, a sampler returns
:math:`X_1, \dots, X_S`. If it is exact, then :math:`x, X_1, \dots, X_S` given :math:`y` are
**exchangeable**: nothing tells the truth from the samples. The metrics of this file rest on that.

- The scores (:func:`energy_score`, :func:`crps`) are lowest in expectation for the exact posterior, so
  they rank samplers; how low depends on the problem.
- The :func:`coverage` counts in how many images the truth is as close to the mean as the samples
  are. It says whether the spread is right, and needs no other sampler to compare with; but samples that
  ignore :math:`y` and follow the prior are calibrated too.
- The :func:`measurement_consistency` is 1 on average for exact samples.

Samples are ``[S, B, C, H, W]``, as :meth:`deepinv_ud2m.UD2M.sample` returns them, and true images
``[B, C, H, W]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from deepinv.physics import LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor, nn

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.metrics.features import extract_features
from deepinv_ud2m.proximal import Scalar, expand_scalar, noise_level

# -- Proper scores --------------------------------------------------------------------------------


def energy_score(samples: Tensor, x: Tensor) -> Tensor:
    r"""
    Energy score of the samples of each posterior,

    .. math::

        \mathrm{ES} = \mathbb{E} \|X - x\|_2 - \tfrac{1}{2} \mathbb{E} \|X - X'\|_2
        \approx \frac{1}{S} \sum_s \|X_s - x\|_2 - \frac{1}{2 S (S-1)} \sum_{s \neq t} \|X_s - X_t\|_2 .

    Strictly proper (`Gneiting and Raftery, 2007 <https://doi.org/10.1198/016214506000001437>`_): in
    expectation over :math:`x` the posterior scores lowest, and nothing else as low. The estimate is
    unbiased for any number of samples, because only pairs of different samples count; the price is that
    it may be negative for one image. Lower is better; the unit is that of the Euclidean norm of an
    image, so it grows like :math:`\sqrt{CHW}`.

    Time is :math:`O(S^2)`, memory that of the samples of one image. It has gradients.

    :param torch.Tensor samples: samples ``[S, B, C, H, W]``, at least two of each posterior.
    :param torch.Tensor x: true images ``[B, C, H, W]``.
    :return: score of each image, ``[B]``.
    :raises ValueError: for fewer than two samples, other shapes, or values that are not finite.

    :Examples:

    >>> import torch
    >>> from deepinv_ud2m.metrics import energy_score
    >>> samples = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
    >>> energy_score(samples, torch.zeros(1, 1, 1, 1))
    tensor([0.])
    """
    samples, x = _check_samples(samples, x)
    return torch.stack([_energy_score(samples[:, i].flatten(1), x[i].flatten()) for i in range(len(x))])


def _energy_score(samples: Tensor, x: Tensor) -> Tensor:
    num = len(samples)
    to_truth = torch.linalg.vector_norm(samples - x, dim=1)
    # Not through a matrix product: it loses the distances of samples that are close.
    pairs = torch.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist")
    return to_truth.mean() - pairs.sum() / (2 * num * (num - 1))


def crps(samples: Tensor, x: Tensor) -> Tensor:
    r"""
    Continuous ranked probability score of the pixels of each image,

    .. math::

        \mathrm{CRPS} = \mathbb{E} |X - x| - \tfrac{1}{2} \mathbb{E} |X - X'|
        \approx \frac{1}{S} \sum_s |X_s - x| - \frac{1}{2 S (S-1)} \sum_{s \neq t} |X_s - X_t|

    in each pixel, then the mean over pixels. It is the energy score in one dimension: strictly proper
    for the marginal distribution of a pixel, blind to how pixels go together. The estimate is unbiased
    for any number of samples (the *fair* score of `Ferro, 2014
    <https://doi.org/10.1002/qj.2270>`_), so numbers of samples can differ; it may be negative.
    Lower is better; the unit is that of a pixel. It has gradients.

    With sorted samples the double sum is :math:`2 \sum_k (2k - S - 1) X_{(k)}`, so time is
    :math:`O(S \log S)`.

    :param torch.Tensor samples: samples ``[S, B, C, H, W]``, at least two of each posterior.
    :param torch.Tensor x: true images ``[B, C, H, W]``.
    :return: score of each image, ``[B]``.
    :raises ValueError: for fewer than two samples, other shapes, or values that are not finite.
    """
    samples, x = _check_samples(samples, x)
    num = len(samples)
    rank = torch.arange(1, num + 1, dtype=samples.dtype, device=samples.device)
    weights = (2 * rank - num - 1) / (num * (num - 1))
    scores = []
    for i in range(len(x)):
        # The weights add up to zero: relative to x the sum cancels less.
        error = (samples[:, i] - x[i]).flatten(1)
        scores.append((error.abs().mean(0) - weights @ error.sort(0).values).mean())
    return torch.stack(scores)


# -- Coverage -------------------------------------------------------------------------------------


def credible_level(
    samples: Tensor,
    x: Tensor,
    features: Callable[[Tensor], Tensor] | None = None,
    *,
    batch_size: int = 256,
) -> Tensor:
    r"""
    Level of the ball around the posterior mean that just reaches the truth, for each image.

    With :math:`X_0 = x`, the distance of each of the :math:`S + 1` points to the mean of the *others*,

    .. math::

        d_i = \Big\| X_i - \frac{1}{S} \sum_{j \neq i} X_j \Big\|_2 , \qquad i = 0, \dots, S ,

    treats truth and samples alike: :math:`d_0` is the distance of the truth to the mean of the samples,
    and no :math:`d_i` is small because :math:`X_i` has drawn the mean towards itself. Samples of the
    exact posterior are exchangeable with the truth, so the rank of :math:`d_0` among the :math:`S + 1`
    distances is uniform, for any :math:`S` and any posterior. (Each :math:`d_i` is :math:`(S+1)/S` times
    the distance to the mean of all :math:`S + 1` points, which is what is computed.)

    A rank of :math:`r` smaller distances puts the truth in the interval of levels
    :math:`[r, r + 1] / (S + 1)`; with :math:`t` samples at exactly the distance of the truth,
    :math:`[r, r + 1 + t] / (S + 1)`. Concatenate the intervals of several batches and pass them to
    :func:`coverage_curve`; they can be stored per image, and mean all there is to know.

    :param torch.Tensor samples: samples ``[S, B, C, H, W]``, at least two of each posterior.
    :param torch.Tensor x: true images ``[B, C, H, W]``.
    :param Callable features: maps images ``[N, C, H, W]`` to features ``[N, D]``, in whose space the
        balls are taken, such as :meth:`DigitClassifier.features
        <deepinv_ud2m.metrics.DigitClassifier.features>`; by default the pixels. Any fixed map
        leaves an exact sampler calibrated.
    :param int batch_size: most images per call of ``features``.
    :return: ends of the interval, ``[B, 2]`` in [0, 1], float64 on the CPU.
    :raises ValueError: for fewer than two samples, other shapes, or values that are not finite.
    """
    samples, x = _check_samples(samples, x)
    features = nn.Flatten() if features is None else features
    intervals = []
    for i in range(len(x)):
        z = extract_features(torch.cat([x[i : i + 1], samples[:, i]]), features, batch_size, "samples")
        distance = torch.linalg.vector_norm(z - z.mean(0), dim=1)
        low, high = (distance < distance[0]).sum(), (distance <= distance[0]).sum()
        intervals.append(torch.stack([low, high]).double() / len(z))
    return torch.stack(intervals)


def coverage_curve(intervals: Tensor, levels: Tensor) -> Tensor:
    r"""
    Share of images whose truth is inside the ball of each nominal level.

    At a level :math:`\alpha = k / (S + 1)` it is the plain share of images whose truth is among the
    :math:`k` points nearest to the mean. Between such levels, and where distances are equal, an image
    counts in part: by how much of its interval is below :math:`\alpha`, so that the expected share
    is :math:`\alpha` at every level for the exact posterior (`Czado, Gneiting and Held, 2009
    <https://doi.org/10.1111/j.1541-0420.2009.01191.x>`_).

    :param torch.Tensor intervals: of all images, ``[B, 2]``, from :func:`credible_level`.
    :param torch.Tensor levels: nominal levels ``[L]`` in [0, 1].
    :return: shares ``[L]`` in [0, 1], float64.
    :raises ValueError: if the intervals or the levels are not such.
    """
    intervals, levels = torch.as_tensor(intervals).double(), torch.as_tensor(levels).double()
    if intervals.ndim != 2 or intervals.shape[1] != 2 or not len(intervals):
        raise ValueError(f"Intervals must be [B, 2] with B >= 1, got {list(intervals.shape)}.")
    low, high = intervals.unbind(1)
    if not ((low >= 0) & (low < high) & (high <= 1)).all():
        raise ValueError("Intervals must satisfy 0 <= low < high <= 1.")
    if levels.ndim != 1 or not len(levels) or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"Levels must be a list of numbers in [0, 1], got {levels.tolist()}.")
    levels = levels.to(intervals.device)
    return ((levels[:, None] - low) / (high - low)).clamp(0, 1).mean(1)


def coverage(
    samples: Tensor,
    x: Tensor,
    levels: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    *,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    r"""
    Coverage of norm balls around the posterior mean.

    The ball of nominal level :math:`\alpha` holds the share :math:`\alpha` of the posterior that is
    nearest to its mean. For the exact posterior the truth is inside in a share :math:`\alpha` of the
    images, up to the sampling noise given by :func:`coverage_error_quantile`. A share above
    :math:`\alpha` means balls too large (samples spread too far), below it too small (samples too close
    to each other, or around a wrong mean). Mean and radii are estimated from the same samples
    without bias, in the way told in :func:`credible_level`: the expected curve of an exact sampler is
    the diagonal for any number of samples.

    :param torch.Tensor samples: samples ``[S, B, C, H, W]``, at least two of each posterior.
    :param torch.Tensor x: true images ``[B, C, H, W]``.
    :param torch.Tensor levels: nominal levels ``[L]`` in [0, 1]; by default the levels
        :math:`1/(S+1), \dots, S/(S+1)` that :math:`S` samples resolve.
    :param Callable features: maps images ``[N, C, H, W]`` to features ``[N, D]``, in whose space the
        balls are taken; by default the pixels.
    :param int batch_size: most images per call of ``features``.
    :return: the nominal levels ``[L]`` and the shares ``[L]``, float64 on the CPU.
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
    intervals = credible_level(samples, x, features, batch_size=batch_size)
    if levels is None:
        num = len(samples)
        levels = torch.arange(1, num + 1, dtype=torch.float64) / (num + 1)
    levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
    return levels, coverage_curve(intervals, levels)


def coverage_error(levels: Tensor, shares: Tensor) -> Tensor:
    r"""
    Largest deviation of a coverage curve from the diagonal,
    :math:`\max_\ell |c(\alpha_\ell) - \alpha_\ell|`.

    At the default levels of :func:`coverage` it is the largest deviation at all levels. It is never 0
    for finitely many images: compare it to :func:`coverage_error_quantile`.

    :param torch.Tensor levels: nominal levels ``[L]``.
    :param torch.Tensor shares: shares ``[L]`` of images covered.
    :return: the deviation in [0, 1], a tensor without dimensions.
    :raises ValueError: if the two are not of one size.
    """
    levels, shares = torch.as_tensor(levels), torch.as_tensor(shares)
    if levels.ndim != 1 or levels.shape != shares.shape or not len(levels):
        raise ValueError(
            f"Levels and shares must be [L], got {list(levels.shape)} and {list(shares.shape)}."
        )
    return (levels - shares).abs().max()


def coverage_error_quantile(num_images: int, num_samples: int, probability: float = 0.95) -> float:
    r"""
    Sampling noise of :func:`coverage_error`: its quantile for an exact sampler.

    The number of images covered at the level :math:`k/(S+1)` is the number of :math:`B`
    independent uniform ranks in :math:`\{0, \dots, S\}` that are below :math:`k`. The
    distribution of the largest deviation (the Kolmogorov-Smirnov statistic on a grid) is computed
    exactly: a walk over the levels with Poisson steps, kept within the deviation, given that it
    ends at :math:`B`. For many samples it is that of Kolmogorov, about
    :math:`1.36 / \sqrt{B}` at 0.95; for few it is smaller.

    The error of an exact sampler on :math:`B` independent images is above it with a probability of at
    most ``1 - probability``, if distances do not tie; with fewer levels it is smaller.

    :param int num_images: number :math:`B` of independent images.
    :param int num_samples: number :math:`S` of samples of each.
    :param float probability: of an error below the quantile, in (0, 1).
    :return: the quantile, moved to half-way to the next value that the error can take, so that
        comparing with it does not depend on rounding.
    :raises ValueError: for counts below 1 or a probability outside (0, 1).
    """
    num_images, points = (
        check_count("num_images", num_images),
        check_count("num_samples", num_samples) + 1,
    )
    if not 0 < probability < 1:
        raise ValueError(f"probability must be in (0, 1), got {probability}.")
    # The error is a multiple of 1 / (B (S + 1)). That of Massart's inequality is large enough.
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
    """P(|N_k - total k / points| <= width / points for all k), N_k counting uniform ranks below k."""
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


# -- The measurement ------------------------------------------------------------------------------


def measurement_consistency(
    samples: Tensor, y: Tensor | TensorList, physics: Physics, sigma_y: Scalar | None = None
) -> Tensor:
    r"""
    Squared residual of each sample, in units of the noise,

    .. math::

        \frac{\|A X_s - y\|_2^2}{m\, \sigma_y^2} .

    It is 1 in expectation for samples of the exact posterior, as it is for the truth: both have the same
    joint distribution with :math:`y`. Its standard deviation for the truth is :math:`\sqrt{2/m}` per
    image. Much above 1, samples contradict the measurement; much below 1, they fit its noise.

    :math:`m` counts the entries of :math:`y` that a linear physics measures at all: what a mask has
    removed is neither in the sum nor in the count. For other physics all entries count.

    :param torch.Tensor samples: samples ``[S, B, C, H, W]``, at least one of each posterior.
    :param torch.Tensor, deepinv.utils.TensorList y: measurements of the B images.
    :param deepinv.physics.Physics physics: the physics, for a batch of B images.
    :param float, torch.Tensor sigma_y: noise level, one or one per image; that of the physics by
        default, see :func:`deepinv_ud2m.proximal.noise_level` (a physics without noise has a floor).
    :return: the ratio for each sample and image, ``[S, B]``.
    :raises ValueError: for other shapes, values that are not finite, a noise level that is not positive,
        or an image of which nothing is measured.
    """
    samples, _ = _check_samples(samples, None, minimum=1)
    y = _rows(y)
    if y.is_complex() or not y.isfinite().all():
        raise ValueError("Measurements must be real and finite.")
    sigma_y = expand_scalar(noise_level(physics, sigma_y), samples[0], "sigma_y").flatten()
    if not (sigma_y > 0).all():
        raise ValueError(f"sigma_y must be positive, got {sigma_y.tolist()}.")
    measured = _measured(physics, samples[0]).to(samples.dtype)
    if len(y) != samples.shape[1] or y.shape[1] != measured.shape[1]:
        raise ValueError(
            f"A of {list(samples.shape[1:])} gives {measured.shape[1]} values for each of "
            f"{samples.shape[1]} images, the measurements have {y.shape[1]} for {len(y)}."
        )
    count = measured.sum(1)
    if not count.all():
        raise ValueError("The physics measures nothing of some images.")
    squares = [((_rows(physics.A(x)) - y) * measured).square().sum(1) for x in samples]
    return torch.stack(squares) / (count * sigma_y**2)


@torch.no_grad()
def _measured(physics: Physics, x: Tensor) -> Tensor:
    """Entries ``[B, m]`` of the measurement that depend on the image."""
    # A row of A that is not zero has a non-zero product with almost every image.
    probe = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    product = _rows(physics.A(probe.to(x)))
    return product != 0 if isinstance(physics, LinearPhysics) else torch.ones_like(product, dtype=bool)


def _rows(y: Tensor | TensorList) -> Tensor:
    """Measurements as one vector per image, ``[B, m]``."""
    return torch.cat([_rows(part) for part in y], 1) if isinstance(y, TensorList) else y.flatten(1)


def _check_samples(samples: Tensor, x: Tensor | None, minimum: int = 2) -> tuple[Tensor, Tensor | None]:
    """Samples and truth in the same precision, at least single."""
    if samples.ndim != 5 or samples.numel() == 0:
        raise ValueError(f"Samples must be [S, B, C, H, W], got {list(samples.shape)}.")
    if len(samples) < minimum:
        raise ValueError(f"At least {minimum} samples of each image are needed, got {len(samples)}.")
    if x is not None and x.shape != samples.shape[1:]:
        raise ValueError(
            f"True images must be {list(samples.shape[1:])} for samples {list(samples.shape)}, "
            f"got {list(x.shape)}."
        )
    images = {"Samples": samples} if x is None else {"Samples": samples, "True images": x}
    dtype = torch.float32
    for name, tensor in images.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be real floating-point images, got {tensor.dtype}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} are not finite.")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return samples.to(dtype), None if x is None else x.to(samples.device, dtype)
