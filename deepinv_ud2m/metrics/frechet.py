r"""Fréchet distance between two sets of images.

It compares the *distributions* of two sets of images. The features of each set are fitted by a Gaussian,
:math:`\mathcal{N}(m_1, C_1)` and :math:`\mathcal{N}(m_2, C_2)`. Their squared 2-Wasserstein distance is

.. math::

    d^2 = \|m_1 - m_2\|_2^2
        + \operatorname{tr}\left(C_1 + C_2 - 2 \left(C_1^{1/2} C_2 C_1^{1/2}\right)^{1/2}\right).

With features of the Inception network this is the FID (`Heusel et al., 2017
<https://arxiv.org/abs/1706.08500>`_), and as there the squared distance is called the Fréchet distance. For
digits, take :class:`~deepinv_ud2m.metrics.DigitClassifier`: a few thousand images determine the covariances
of its 64 features. For colour images, take :class:`~deepinv_ud2m.metrics.EfficientNetLite`.

The distance does not say whether a sample fits its measurement: report it next to a metric that does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepinv_ud2m.metrics.features import extract_features


def gaussian_frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    r"""
    Squared Fréchet distance between two Gaussians, as in :mod:`deepinv_ud2m.metrics.frechet` (`Dowson and
    Landau, 1982 <https://doi.org/10.1016/0047-259X(82)90077-X>`_). The covariances may be singular.

    :param torch.Tensor mean1: mean :math:`m_1`, `[D]`.
    :param torch.Tensor cov1: covariance :math:`C_1`, `[D, D]`.
    :param torch.Tensor mean2: mean :math:`m_2`, `[D]`.
    :param torch.Tensor cov2: covariance :math:`C_2`, `[D, D]`.
    :return: :math:`d^2 \geq 0`, a float64 tensor without dimensions, on the CPU.
    :raises ValueError: for shapes that do not fit, values that are not finite, or a negative eigenvalue.
    """
    # Double precision on the CPU: some devices have none, and the matrices are small.
    mean1, cov1, mean2, cov2 = (
        torch.as_tensor(t).detach().to("cpu", torch.float64) for t in (mean1, cov1, mean2, cov2)
    )
    given = [list(t.shape) for t in (mean1, mean2, cov1, cov2)]
    size = mean1.numel()
    if given != [[size], [size], [size, size], [size, size]]:
        raise ValueError(f"mean1 and mean2 must be [D], cov1 and cov2 [D, D], got {given}")
    if not all(t.isfinite().all() for t in (mean1, cov1, mean2, cov2)):
        raise ValueError("means and covariances must be finite")

    # The trace of the root is the nuclear norm of a product of roots: nothing is inverted.
    fidelity = torch.linalg.svdvals(_sqrt_psd(cov1) @ _sqrt_psd(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * fidelity
    # Equal Gaussians may come out at minus a rounding error.
    return distance.clamp(min=0)


def _sqrt_psd(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    # Estimated covariances may have eigenvalues a rounding error below zero; others never do.
    if values[0] < -1e-5 * values[-1].abs():
        raise ValueError(f"covariances must not have a negative eigenvalue, got {values[0].item():.3g}")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def frechet_distance(x: Tensor, x_ref: Tensor, features: Callable[[Tensor], Tensor]) -> Tensor:
    r"""
    Fréchet distance between two sets of images, in a space of features.

    It is :func:`gaussian_frechet` of the means and the (unbiased) covariances of the features of the two
    sets.

    .. warning::

        The estimate is **biased upwards**: two small sets of the same distribution are not at distance
        0. The bias shrinks like one over the number of images (`Bińkowski et al., 2018
        <https://arxiv.org/abs/1801.01401>`_). With fewer images than features the number means little.
        Compare only distances with the same features, the same reference and the same number of images,
        and state the distance between two sets of true images of those sizes.

    :param torch.Tensor x: images `[N, C, H, W]`, for instance posterior samples; at least two.
    :param torch.Tensor x_ref: reference images `[M, C, H, W]`; at least two.
    :param Callable features: maps images `[B, C, H, W]` to features `[B, D]`, such as
        :meth:`DigitClassifier.features <deepinv_ud2m.metrics.DigitClassifier.features>`. A network should
        be in evaluation mode, on the device of the images.
    :return: :math:`d^2 \geq 0`, a float64 tensor without dimensions, on the CPU.
    :raises ValueError: for fewer than two images, other shapes, or features that are not finite.

    :Examples:

    >>> from deepinv_ud2m.data import mnist_digits
    >>> from deepinv_ud2m.metrics import DigitClassifier, frechet_distance
    >>> classifier = DigitClassifier.from_pretrained()
    >>> x, x_ref = mnist_digits("test"), mnist_digits("validation")
    >>> near = frechet_distance(x, x_ref, classifier.features)
    >>> far = frechet_distance(x.roll(6, dims=-1), x_ref, classifier.features)
    >>> bool(near < far)
    True
    """
    for name, images in {"x": x, "x_ref": x_ref}.items():
        if images.ndim == 4 and len(images) < 2:
            raise ValueError(f"a covariance needs at least 2 images, {name} has {len(images)}")
    z, z_ref = extract_features(x, features, "x"), extract_features(x_ref, features, "x_ref")
    if z.shape[1] != z_ref.shape[1]:
        raise ValueError(f"features of x and x_ref differ in size: {z.shape[1]} and {z_ref.shape[1]}")
    return gaussian_frechet(*gaussian_fit(z), *gaussian_fit(z_ref))


def frechet_influence(z: Tensor, mean_ref: Tensor, cov_ref: Tensor) -> Tensor:
    r"""
    Influence of each sample of a set on the Fréchet distance of the set to a reference.

    To first order, the distance of N samples varies like the mean of their influences. So the standard
    deviation of the influences over :math:`\sqrt{N}` is the standard error of the distance. With m and C the
    mean and covariance of the set,

    .. math::

        I(z) = 2 (m - m_r)^T (z - m) + (z - m)^T S (z - m) - \operatorname{tr}(S C), \qquad
        S = \mathrm{Id} - T, \qquad T = C_r^{1/2} \left(C_r^{1/2} C C_r^{1/2}\right)^{-1/2} C_r^{1/2},

    where T is the optimal transport map from C to :math:`C_r`.

    :param torch.Tensor z: features `[N, D]`, N > D.
    :param torch.Tensor mean_ref: mean :math:`m_r` of the reference, `[D]`.
    :param torch.Tensor cov_ref: its covariance :math:`C_r`, `[D, D]`.
    :return: influences `[N]`, float64, of mean 0 up to the factor (N - 1) / N of a covariance.
    :raises ValueError: if there are no more samples than features, or for a reference of another number
        of features.
    """
    if z.ndim != 2 or len(z) <= z.shape[1]:
        raise ValueError(f"z must be [N, D] with N > D, got {list(z.shape)}")
    dim = z.shape[1]
    if mean_ref.shape != (dim,) or cov_ref.shape != (dim, dim):
        raise ValueError(
            f"mean_ref and cov_ref must be [{dim}] and [{dim}, {dim}], as the {dim} features of z are, "
            f"got {list(mean_ref.shape)} and {list(cov_ref.shape)}"
        )
    z, mean_ref, cov_ref = (t.detach().to("cpu", torch.float64) for t in (z, mean_ref, cov_ref))
    mean, cov = gaussian_fit(z)
    root = _sqrt_psd(cov_ref)
    values, vectors = torch.linalg.eigh(root @ cov @ root)
    # Where features hardly vary, their variance is a rounding error, and its inverse means nothing.
    inverse = torch.where(values > 1e-12 * values[-1], values.clamp(min=1e-300).rsqrt(), 0.0)
    slope = torch.eye(dim, dtype=torch.float64) - root @ (vectors * inverse) @ vectors.mT @ root
    centred = z - mean
    quadratic = ((centred @ slope) * centred).sum(1)
    return 2 * centred @ (mean - mean_ref) + quadratic - (slope * cov).sum()


def gaussian_fit(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and unbiased covariance `[D, D]` of features `[N, D]`."""
    mean = z.mean(0)
    # Centre first: the difference of second moments would lose digits.
    centred = z - mean
    return mean, centred.mT @ centred / (len(z) - 1)
