r"""Are these samples of the posterior? Scores of several samples of each of several posteriors.

For each image :math:`x` and its measurement :math:`y`, a sampler returns :math:`X_1, \dots, X_S`.

- :func:`energy_score` and :func:`crps` are lowest in expectation for the exact posterior. How low they get
  depends on the problem.
- :func:`spread_skill_ratio` and :func:`reduced_chi_square` are 1 for exact samples, up to sampling noise.

Samples are `[S, B, C, H, W]`, as :meth:`deepinv_ud2m.UD2M.sample` returns them, and true images
`[B, C, H, W]`.
"""

from __future__ import annotations

from typing import overload

import torch
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_ud2m.checks import Scalar, expand_scalar
from deepinv_ud2m.physics.traits import is_linear, noise_level


def energy_score(samples: Tensor, x: Tensor) -> Tensor:
    r"""
    Energy score of the samples of each posterior,

    .. math::

        \mathrm{ES} = \mathbb{E} \|X - x\|_2 - \tfrac{1}{2} \mathbb{E} \|X - X'\|_2
        \approx \frac{1}{S} \sum_s \|X_s - x\|_2 - \frac{1}{2 S (S-1)} \sum_{s \neq t} \|X_s - X_t\|_2 .

    Lower is better. The score is strictly proper (`Gneiting and Raftery, 2007
    <https://doi.org/10.1198/016214506000001437>`_): in expectation over :math:`x`, only the posterior
    reaches the minimum. The estimate is unbiased for any number of samples, so it may be negative for one
    image. The unit is that of the Euclidean norm of an image, which grows like :math:`\sqrt{CHW}`. The score
    has gradients.

    :param torch.Tensor samples: samples `[S, B, C, H, W]`, at least two of each posterior.
    :param torch.Tensor x: true images `[B, C, H, W]`.
    :return: score of each image, `[B]`.
    :raises ValueError: for fewer than two samples, other shapes, or values that are not finite.

    :Examples:

    >>> import torch
    >>> from deepinv_ud2m.metrics import energy_score
    >>> samples = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
    >>> energy_score(samples, torch.zeros(1, 1, 1, 1))
    tensor([0.])
    """
    samples, x = check_samples(samples, x)
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

    in each pixel, then the mean over pixels. Lower is better, in units of a pixel. It is the energy
    score in one dimension: strictly proper for the marginal distribution of a pixel, blind to how
    pixels go together. The estimate is unbiased for any number of samples (the *fair* score of `Ferro,
    2014 <https://doi.org/10.1002/qj.2270>`_), unlike torchmetrics', so it may be negative. The score has
    gradients.

    :param torch.Tensor samples: samples `[S, B, C, H, W]`, at least two of each posterior.
    :param torch.Tensor x: true images `[B, C, H, W]`.
    :return: score of each image, `[B]`.
    :raises ValueError: for fewer than two samples, other shapes, or values that are not finite.
    """
    samples, x = check_samples(samples, x)
    num = len(samples)
    # With sorted samples the double sum is 2 sum_k (2k - S - 1) X_(k).
    order = torch.arange(1, num + 1, dtype=samples.dtype, device=samples.device)
    weights = (2 * order - num - 1) / (num * (num - 1))
    scores = []
    for i in range(len(x)):
        # The weights add up to zero: relative to x the sum cancels less.
        error = (samples[:, i] - x[i]).flatten(1)
        scores.append((error.abs().mean(0) - weights @ error.sort(0).values).mean())
    return torch.stack(scores)


def spread_skill_ratio(samples: Tensor, x: Tensor) -> Tensor:
    r"""
    Root mean square error of the mean of the samples, over the one that their variance predicts,

    .. math::

        \left( \frac{\sum_{b,p} (\bar X_{bp} - x_{bp})^2}{(1 + 1/S) \sum_{b,p} v_{bp}} \right)^{1/2} ,

    with the mean :math:`\bar X` and the unbiased variance :math:`v` of the samples of image b in pixel
    p. An exact sampler gives 1 for any S, up to sampling noise. Above 1 the sampler is over-confident; below
    1 its samples spread too far.

    :param torch.Tensor samples: samples `[S, B, C, H, W]`, at least two of each posterior.
    :param torch.Tensor x: true images `[B, C, H, W]`.
    :return: the ratio over all images, a tensor without dimensions; infinite if all samples are equal.
    :raises ValueError: for fewer than two samples, other shapes, or values that are not finite.
    """
    samples, x = check_samples(samples, x)
    squared_error = (samples.mean(0) - x).square().mean()
    return (squared_error / ((1 + 1 / len(samples)) * samples.var(0).mean())).sqrt()


def reduced_chi_square(
    samples: Tensor, y: Tensor | TensorList, physics: Physics, sigma_y: Scalar | None = None
) -> Tensor:
    r"""
    Squared residual of each sample, in units of the noise,

    .. math::

        \chi^2 = \frac{\|A X_s - y\|_2^2}{m\, \sigma_y^2} .

    It is 1 in expectation for samples of the exact posterior, as for the truth, for which its standard
    deviation is :math:`\sqrt{2/m}` per image. Much above 1, samples contradict the measurement; much below
    1, they fit its noise.

    :math:`m` is the number of entries of :math:`y` that a linear physics measures at all: what a mask
    removes is neither in the sum nor in the count. For other physics all entries count.

    :param torch.Tensor samples: samples `[S, B, C, H, W]`, at least one of each posterior.
    :param torch.Tensor, deepinv.utils.TensorList y: measurements of the B images.
    :param deepinv.physics.Physics physics: the physics, for a batch of B images.
    :param float, torch.Tensor sigma_y: noise level, one or one per image; that of the physics by
        default, see :func:`deepinv_ud2m.physics.traits.noise_level` (a physics without noise has a
        floor).
    :return: the ratio for each sample and image, `[S, B]`.
    :raises ValueError: for other shapes, values that are not finite, a noise level that is not positive,
        or an image of which nothing is measured.
    """
    samples, _ = check_samples(samples, None, minimum=1)
    y = _rows(y)
    if y.is_complex() or not y.isfinite().all():
        raise ValueError("y must be real and finite")
    sigma_y = expand_scalar(noise_level(physics, sigma_y), samples[0], "sigma_y").flatten()
    if not (sigma_y > 0).all():
        raise ValueError(f"sigma_y must be positive, got {sigma_y.tolist()}")
    measured = _measured(physics, samples[0]).to(samples.dtype)
    if len(y) != samples.shape[1] or y.shape[1] != measured.shape[1]:
        raise ValueError(
            f"A of {list(samples.shape[1:])} gives {measured.shape[1]} values for each of "
            f"{samples.shape[1]} images, but y has {y.shape[1]} for {len(y)}"
        )
    count = measured.sum(1)
    if not count.all():
        raise ValueError("the physics measures nothing of some images")
    squares = [((_rows(physics.A(x)) - y) * measured).square().sum(1) for x in samples]
    return torch.stack(squares) / (count * sigma_y**2)


@torch.no_grad()
def _measured(physics: Physics, x: Tensor) -> Tensor:
    """Entries `[B, m]` of the measurement that depend on the image."""
    # A row of A that is not zero has a non-zero product with almost every image.
    probe = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    product = _rows(physics.A(probe.to(x)))
    return product != 0 if is_linear(physics) else torch.ones_like(product, dtype=torch.bool)


def _rows(y: Tensor | TensorList) -> Tensor:
    """Measurements as one vector per image, `[B, m]`."""
    return torch.cat([_rows(part) for part in y], 1) if isinstance(y, TensorList) else y.flatten(1)


@overload
def check_samples(samples: Tensor, x: Tensor, minimum: int = 2) -> tuple[Tensor, Tensor]: ...


@overload
def check_samples(samples: Tensor, x: Tensor | None, minimum: int = 2) -> tuple[Tensor, Tensor | None]: ...


def check_samples(samples: Tensor, x: Tensor | None, minimum: int = 2) -> tuple[Tensor, Tensor | None]:
    """
    Samples and true images in the same precision, at least single.

    :param torch.Tensor samples: samples `[S, B, C, H, W]`.
    :param torch.Tensor, None x: true images `[B, C, H, W]`, if there are any.
    :param int minimum: smallest S.
    :raises ValueError: for fewer samples, other shapes, or values that are not real and finite.
    """
    if samples.ndim != 5 or samples.numel() == 0:
        raise ValueError(f"samples must be [S, B, C, H, W], got {list(samples.shape)}")
    if len(samples) < minimum:
        raise ValueError(f"samples must be at least {minimum} of each image, got {len(samples)}")
    if x is not None and x.shape != samples.shape[1:]:
        raise ValueError(
            f"x must be {list(samples.shape[1:])} for samples {list(samples.shape)}, got {list(x.shape)}"
        )
    dtype = torch.float32
    for name, images in {"samples": samples, "x": x}.items():
        if images is None:
            continue
        if not images.is_floating_point() or not images.isfinite().all():
            raise ValueError(f"{name} must be finite images of a real floating type, got {images.dtype}")
        dtype = torch.promote_types(dtype, images.dtype)
    return samples.to(dtype), None if x is None else x.to(samples.device, dtype)
