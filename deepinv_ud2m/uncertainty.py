r"""What samples of the posterior are for: estimates, standard deviations, intervals that can be trusted.

Samples are `[S, B, C, H, W]`, as :meth:`deepinv_ud2m.UD2M.sample` returns them, and true images
`[B, C, H, W]`.

- :func:`summary`: mean, standard deviation and intervals of each pixel, and how good they are.
- :class:`Conformal`: intervals that hold the truth as often as they say, whatever the sampler.
- :func:`toward_mean`: images between a sample and the mean, from perception to distortion.
- :func:`plot`: all of it in one figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from deepinv.physics import Physics
from deepinv.physics.generator import PhysicsGenerator
from torch import Tensor
from torch.nn.functional import avg_pool2d

from deepinv_ud2m.checks import check_count, check_number
from deepinv_ud2m.metrics.posterior import check_samples, spread_skill_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deepinv_ud2m.sampler import UD2M

# Added to standard deviations: that of the rounding of images to 8 bits.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Summary:
    """
    What :func:`summary` finds.

    :param torch.Tensor mean: mean of the samples, the estimate of least squared error, `[B, C, H, W]`.
    :param torch.Tensor std: unbiased standard deviation of each pixel, of the same shape.
    :param torch.Tensor low: lower end of the interval of each pixel.
    :param torch.Tensor high: upper end.
    :param torch.Tensor, None coverage: share of the pixels of each image that are in their interval, `[B]`.
    :param torch.Tensor, None spread_skill_ratio: root mean square error of the mean over the one that the
        samples predict, `[B]`; above 1, they are over-confident.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.uncertainty import summary
        >>> found = summary(torch.rand(19, 2, 1, 8, 8))
        >>> found.mean.shape, bool((found.low < found.high).all())
        (torch.Size([2, 1, 8, 8]), True)
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    coverage: Tensor | None = None
    spread_skill_ratio: Tensor | None = None


def summary(samples: Tensor, x: Tensor | None = None, level: float = 0.9) -> Summary:
    r"""
    Mean, standard deviation and interval of each pixel.

    The interval is between quantiles of the samples. Quantile p is the order statistic of rank
    :math:`p (S + 1)`, interpolated. If these ranks are integers, the truth of an exact sampler is in the
    interval with probability ``level``.

    :param torch.Tensor samples: samples `[S, B, C, H, W]`, S at least :math:`2 / (1 - \mathrm{level}) - 1`,
        which is 19 for a level of 0.9.
    :param torch.Tensor, None x: true images `[B, C, H, W]`, for coverage and spread-skill ratio.
    :param float level: probability of the interval, in [0, 0.999] (default: 0.9).
    :returns: the summary.
    :raises ValueError: for too few samples, other shapes, or values that are not finite.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.uncertainty import summary
        >>> g = torch.Generator().manual_seed(0)
        >>> x, samples = torch.randn(1, 1, 64, 64, generator=g), torch.randn(19, 1, 1, 64, 64, generator=g)
        >>> print(f"{summary(samples, x).coverage.item():.2f}")
        0.90
    """
    level = check_number("level", level, 0, 0.999)
    samples, x = check_samples(samples, x)
    tail, count = (1 - level) / 2, len(samples)
    needed = math.ceil(round(1 / tail, 6)) - 1
    if count < needed:
        raise ValueError(
            f"samples must be at least {needed} for intervals of level {level:g}, got {count}; "
            "Conformal gives intervals with any number of samples"
        )
    mean, std, ordered = samples.mean(0), samples.std(0), samples.sort(0).values
    low, high = (_order_statistic(ordered, p * (count + 1)) for p in (tail, 1 - tail))
    if x is None:
        return Summary(mean, std, low, high)
    ratios = [spread_skill_ratio(samples[:, i : i + 1], x[i : i + 1]) for i in range(len(x))]
    return Summary(mean, std, low, high, inside(x, low, high), torch.stack(ratios))


def _order_statistic(ordered: Tensor, rank: float) -> Tensor:
    """Between the order statistics, counted from 1, next to a rank."""
    rank = min(max(rank, 1), len(ordered)) - 1
    below = min(int(rank + 1e-6), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], max(rank - below, 0.0))


def inside(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """
    Share of the pixels of each image that are in their interval.

    :param torch.Tensor x: true images `[B, C, H, W]`.
    :param torch.Tensor low: lower ends, of the same shape.
    :param torch.Tensor high: upper ends.
    :returns: shares, `[B]`.
    """
    return ((x >= low) & (x <= high)).flatten(1).float().mean(1)


@dataclass(frozen=True)
class Conformal:
    r"""
    Intervals that cover at the stated rate, whatever the sampler: the mean of the samples, plus or minus a
    multiple q of their standard deviation. The factor q is fitted to images whose truth is known.

    With the score :math:`r = |x - \bar X| / (\mathrm{std} + 0.001)` of each pixel, q is the smallest number
    with

    .. math:: \frac{1}{n + 1} \Big( 1 + \sum_{i=1}^n \mathrm{share\ of\ pixels\ of\ image}\ i\
        \mathrm{with}\ r > q \Big) \le 1 - \mathrm{level} .

    Then the expected share of pixels of a new image that are in their intervals is at least ``level``, if the
    new image, its operator and its noise are exchangeable with the n others (conformal risk control,
    `Angelopoulos et al., 2024 <https://arxiv.org/abs/2208.02814>`_). Nothing is promised for images of
    another kind, another operator or another level of noise. The expectation is over images: a single one
    may be far off.

    :param float factor: q, positive.
    :param float level: share of pixels (default: 0.9).
    :param int pool: side of the blocks whose mean values the intervals are of (default: 1, pixels).
    :param int num_samples: samples S of each image that q was fitted with (default: 16).
    :raises ValueError: for other values.

    |sep|

    :Examples:

        >>> import deepinv as dinv
        >>> from deepinv_ud2m import UD2M
        >>> from deepinv_ud2m.data import mnist_digits
        >>> from deepinv_ud2m.uncertainty import Conformal
        >>> model = UD2M.from_pretrained("mnist")
        >>> noise = dinv.physics.GaussianNoise(0.05)
        >>> physics = dinv.physics.Inpainting((1, 32, 32), mask=0.3, noise_model=noise)
        >>> conformal = Conformal.fit(model, mnist_digits("validation", num=16), physics, num_samples=4)
        >>> y = physics(mnist_digits("test", num=1))
        >>> low, high = conformal.interval(model.sample(y, physics, 4))
        >>> model.conformal["inpainting"] = conformal  # save_pretrained stores it
    """

    factor: float
    level: float = 0.9
    pool: int = 1
    num_samples: int = 16

    def __post_init__(self) -> None:
        check_number("factor", self.factor, positive=True)
        check_number("level", self.level, 0, 0.999)
        check_count("pool", self.pool)
        if check_count("num_samples", self.num_samples) < 2:
            raise ValueError(f"num_samples must be at least 2, got {self.num_samples}")

    @classmethod
    def of(cls, value: Conformal | Mapping) -> Conformal:
        """Itself, or one of these arguments, as JSON holds them."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or "factor" not in value or set(value) - {*cls.__annotations__}:
            raise TypeError(f"conformal must be Conformal, or its arguments, got {value!r}")
        return cls(**value)

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        model: UD2M,
        images: Tensor,
        physics: Physics,
        level: float = 0.9,
        *,
        pool: int = 1,
        num_samples: int = 16,
        physics_generator: PhysicsGenerator | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 8,
    ) -> Conformal:
        r"""
        Fit the factor to images whose truth is known.

        :param deepinv_ud2m.UD2M model: the sampler.
        :param torch.Tensor images: images `[n, C, H, W]` in [0, 1] that the sampler was not trained with, at
            least :math:`1 / (1 - \mathrm{level}) - 1`, which is 9 for a level of 0.9. They should be
            independent: one crop of each photograph. The fewer they are, the wider the intervals: the
            expected coverage is up to 1 / (n + 1) above the level.
        :param deepinv.physics.Physics physics: makes the measurements, with its noise.
        :param float level: share of pixels, in [0, 0.999] (default: 0.9).
        :param int pool: side of the blocks whose mean values the intervals are of (default: 1, pixels).
        :param int num_samples: samples of each image, at least 2 (default: 16).
        :param deepinv.physics.generator.PhysicsGenerator, None physics_generator: draws operator and noise of
            each image (default: those of ``physics`` for all).
        :param torch.Generator, None generator: of the samples.
        :param int batch_size: images at a time (default: 8).
        :returns: the intervals.
        :raises ValueError: for too few images or samples, or other values.
        """
        _needed(len(images), check_number("level", level, 0, 0.999))
        if check_count("num_samples", num_samples) < 2:
            raise ValueError("num_samples must be at least 2, got 1")
        samples = []
        for x in images.split(check_count("batch_size", batch_size)):
            if physics_generator is not None:
                physics.update(**physics_generator.step(len(x)))
            samples.append(model.sample(physics(x), physics, num_samples, generator=generator))
        return cls.from_samples(torch.cat(samples, 1), images, level, pool=pool)

    @classmethod
    def from_samples(cls, samples: Tensor, x: Tensor, level: float = 0.9, *, pool: int = 1) -> Conformal:
        """
        Fit the factor to samples that are there already.

        :param torch.Tensor samples: samples `[S, n, C, H, W]`, at least two.
        :param torch.Tensor x: true images `[n, C, H, W]`, see :meth:`fit`.
        :param float level: share of pixels, in [0, 0.999] (default: 0.9).
        :param int pool: side of the blocks whose mean values the intervals are of (default: 1, pixels).
        :returns: the intervals.
        """
        level = check_number("level", level, 0, 0.999)
        samples, x = check_samples(samples, x)
        share = _needed(len(x), level)
        mean, std = _moments(samples, pool)
        scores = ((_pooled(x, pool) - mean).abs() / std).flatten()
        rank = min(math.ceil(share * scores.numel()), scores.numel())
        factor = scores.double().kthvalue(max(rank, 1)).values.item()
        return cls(max(factor, 1e-6), level, pool, len(samples))

    def interval(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """
        Intervals of pixels, or of the means of blocks.

        :param torch.Tensor samples: samples `[S, B, C, H, W]`, as many of each image as the factor was
            fitted with.
        :returns: lower and upper ends, each `[B, C, H / pool, W / pool]`.
        :raises ValueError: for another number of samples.
        """
        samples, _ = check_samples(samples, None)
        if len(samples) != self.num_samples:
            raise ValueError(
                f"samples must be {self.num_samples} of each image, as the intervals were fitted with, "
                f"got {len(samples)}"
            )
        mean, std = _moments(samples, self.pool)
        return mean - self.factor * std, mean + self.factor * std


def _needed(count: int, level: float) -> float:
    """The share of all scores that must be below the factor, of n images."""
    tail = 1 - level
    needed = math.ceil(round(1 / tail - 1, 6))
    if count < max(needed, 1):
        raise ValueError(f"images must be at least {max(needed, 1)} for a level of {level:g}, got {count}")
    return 1 - ((count + 1) * tail - 1) / count


def _pooled(images: Tensor, pool: int) -> Tensor:
    if min(images.shape[-2:]) < check_count("pool", pool):
        raise ValueError(f"pool must be at most the side of images {list(images.shape[-2:])}, got {pool}")
    return avg_pool2d(images, pool)


def _moments(samples: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    pooled = torch.stack([_pooled(sample, pool) for sample in samples])
    return pooled.mean(0), pooled.std(0) + _ROUNDING


def toward_mean(samples: Tensor, a: float) -> Tensor:
    r"""
    Images between the samples and their mean, :math:`\bar X + a\,(X_s - \bar X)`.

    a = 1 leaves the samples as they are, which look best. a = 0 gives the mean, which has the least squared
    error. If the sampler is exact, no image of a smaller error is closer to the distribution of true
    images than those between (`Freirich et al., 2021 <https://arxiv.org/abs/2107.02555>`_).

    :param torch.Tensor samples: samples `[S, B, C, H, W]`, at least two.
    :param float a: in [0, 1].
    :returns: images `[S, B, C, H, W]`.
    :raises ValueError: for other values.
    """
    a = check_number("a", a, 0, 1)
    samples, _ = check_samples(samples, None)
    mean = samples.mean(0)
    return mean + a * (samples - mean)


def plot(
    samples: Tensor,
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    shown: int = 3,
    std_max: float | None = None,
) -> Figure:
    """
    A figure of one row per image: truth, measurement, samples, their mean, their standard deviation and the
    error of the mean, on one scale.

    :param torch.Tensor samples: samples `[S, B, C, H, W]` of one or three channels, at least two.
    :param torch.Tensor, None x: true images `[B, C, H, W]`.
    :param torch.Tensor, None y: measurements, if they are images of one or three channels.
    :param int shown: number of samples to show (default: 3).
    :param float, None std_max: end of the scale of standard deviation and error (default: the 99th
        percentile of both).
    :returns: the figure, a ``matplotlib.figure.Figure``.
    :raises ValueError: for other shapes or values.
    """
    import matplotlib.pyplot as plt

    samples, x = check_samples(samples, x)
    samples, x = samples.detach().cpu(), None if x is None else x.detach().cpu()
    if samples.shape[2] not in (1, 3):
        raise ValueError(f"samples must have one or three channels to be shown, got {samples.shape[2]}")
    if y is not None and (y.ndim != 4 or y.shape[1] not in (1, 3) or len(y) != samples.shape[1]):
        raise ValueError(f"y must be {samples.shape[1]} images to be shown, got {list(y.shape)}")
    mean = samples.mean(0)
    columns = {} if x is None else {"truth": x}
    columns |= {} if y is None else {"measurement": y.detach().cpu()}
    columns |= {f"sample {i + 1}": one for i, one in enumerate(samples[: check_count("shown", shown)])}
    columns[f"mean of {len(samples)}"] = mean
    maps = {"standard deviation": samples.var(0).mean(1).sqrt()}
    if x is not None:
        maps["|error| of the mean"] = (mean - x).square().mean(1).sqrt()
    if std_max is not None:
        check_number("std_max", std_max, positive=True)
    else:
        ends = [part.flatten().sort().values[int(0.99 * (part.numel() - 1))] for part in maps.values()]
        std_max = max(float(max(ends)), 1e-6)
    rows, cols = samples.shape[1], len(columns) + len(maps)
    ratio = samples.shape[-2] / samples.shape[-1]
    figure, axes = plt.subplots(
        rows, cols, figsize=(1.8 * cols + 0.7, 1.8 * ratio * rows + 0.3), squeeze=False, layout="constrained"
    )
    for column, (title, images) in zip(axes.T, (columns | maps).items(), strict=True):
        column[0].set_title(title, fontsize=9)
        color = {"cmap": "magma", "vmax": std_max} if title in maps else {"cmap": "gray", "vmax": 1}
        for axis, image in zip(column, images, strict=True):
            image = image if image.ndim == 2 else image.clamp(0, 1).permute(1, 2, 0).squeeze(-1)
            drawn = axis.imshow(image.numpy(), vmin=0, **color)
            axis.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=list(axes[:, -len(maps) :].flat), fraction=0.05)
    return figure
