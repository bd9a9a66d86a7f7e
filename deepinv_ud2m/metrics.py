r"""Metrics of posterior samplers.

Distances between two sets of images
------------------------------------

The Fréchet distance compares the *distribution* of a set of images to that of a reference set:
features of both are fitted by Gaussians :math:`\mathcal{N}(m_1, C_1)` and
:math:`\mathcal{N}(m_2, C_2)`, whose squared 2-Wasserstein distance is

.. math::

    d^2 = \|m_1 - m_2\|_2^2
        + \operatorname{tr}\left(C_1 + C_2 - 2 \left(C_1^{1/2} C_2 C_1^{1/2}\right)^{1/2}\right).

With features of the Inception network this is the FID (`Heusel et al., 2017
<https://arxiv.org/abs/1706.08500>`_). For digits, :class:`DigitClassifier` gives features that know
what a digit is, in few enough dimensions that a few thousand images determine the covariances.

The distance alone says nothing about whether a sample is consistent with its measurement: report it
next to a metric that does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["DigitClassifier", "frechet_distance", "gaussian_frechet"]

_CLASSIFIER = Path(__file__).parent / "weights" / "mnist-classifier"


# -- Distances between two sets of images ---------------------------------------------------------


class DigitClassifier(nn.Module):
    r"""
    Small convolutional classifier of MNIST digits, and the features for :func:`frechet_distance`.

    Three convolutions (32, 16 and 8 pixels wide), one hidden linear layer, one linear layer to the
    10 digits. The features are the hidden layer's activations before its nonlinearity, standardised
    by a batch normalisation without affine parameters: over the MNIST training digits each has mean
    0 and variance 1, so that distances between features have a scale.

    :param int num_features: dimension of the features.
    :param tuple channels: widths of the three convolutions.

    :Examples:

    >>> from deepinv_ud2m.data import mnist_digits
    >>> from deepinv_ud2m.metrics import DigitClassifier
    >>> classifier = DigitClassifier.from_pretrained()
    >>> classifier(mnist_digits(num=4)).argmax(1)
    tensor([7, 2, 1, 0])
    """

    def __init__(self, num_features: int = 64, channels: tuple[int, int, int] = (24, 48, 64)):
        super().__init__()
        c1, c2, c3 = channels
        self.num_features = num_features
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, c1, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(c1),
            nn.ReLU(),
            nn.Conv2d(c1, c2, 3, padding=1, bias=False),
            nn.BatchNorm2d(c2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(c2, c3, 3, padding=1, bias=False),
            nn.BatchNorm2d(c3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(16 * c3, num_features, bias=False)
        # The features are taken before the nonlinearity: behind it some units die, and a unit that
        # is zero for nearly all digits is far from Gaussian and, standardised, is rounding noise.
        self.standardize = nn.BatchNorm1d(num_features, affine=False)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(num_features, 10))

    def features(self, x: Tensor) -> Tensor:
        r"""
        Standardised activations of the hidden layer.

        :param torch.Tensor x: digits ``[B, 1, 32, 32]`` in ``[0, 1]``.
        :return: features ``[B, num_features]``.
        """
        if x.shape[1:] != (1, 32, 32):
            raise ValueError(f"Expected digits [B, 1, 32, 32], got {list(x.shape)}.")
        return self.standardize(self.hidden(self.convolutions(2 * x - 1)))

    def forward(self, x: Tensor) -> Tensor:
        r"""
        Logits of the ten digits.

        :param torch.Tensor x: digits ``[B, 1, 32, 32]`` in ``[0, 1]``.
        :return: logits ``[B, 10]``.
        """
        return self.head(self.features(x))

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> DigitClassifier:
        r"""
        A trained classifier, in evaluation mode, without gradients for its parameters.

        :param str, pathlib.Path folder: folder with ``config.json`` and ``model.safetensors`` as
            written by ``examples/train_digit_classifier.py``; the weights shipped with the package
            if ``None``.
        :return: the classifier, on the CPU.
        """
        folder = _CLASSIFIER if folder is None else Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"No {name} in {folder}, where a classifier was expected.")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = cls(**config["architecture"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval().requires_grad_(False)


def gaussian_frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    r"""
    Squared Fréchet distance (2-Wasserstein) between two Gaussians.

    .. math::

        d^2 = \|m_1 - m_2\|_2^2 + \operatorname{tr}\left(
            C_1 + C_2 - 2 \left(C_1^{1/2} C_2 C_1^{1/2}\right)^{1/2}\right)

    (`Dowson and Landau, 1982 <https://doi.org/10.1016/0047-259X(82)90077-X>`_). The trace of the
    last square root is the nuclear norm of :math:`C_1^{1/2} C_2^{1/2}`. It is computed as such, in
    double precision, with both roots from eigendecompositions: nothing is inverted and no square is
    formed, so singular covariances are fine.

    :param torch.Tensor mean1: mean :math:`m_1`, ``[D]``.
    :param torch.Tensor cov1: covariance :math:`C_1`, ``[D, D]``.
    :param torch.Tensor mean2: mean :math:`m_2`, ``[D]``.
    :param torch.Tensor cov2: covariance :math:`C_2`, ``[D, D]``.
    :return: :math:`d^2 \geq 0`, a float64 tensor without dimensions, on the CPU.
    """
    # Double precision on the CPU: some devices have none, and the matrices are small.
    mean1, cov1, mean2, cov2 = (
        torch.as_tensor(t).detach().to("cpu", torch.float64) for t in (mean1, cov1, mean2, cov2)
    )
    if mean1.ndim != 1 or mean1.shape != mean2.shape:
        raise ValueError(
            f"Means must be vectors of one size, got {list(mean1.shape)} and {list(mean2.shape)}."
        )
    size = (mean1.numel(), mean1.numel())
    if cov1.shape != size or cov2.shape != size:
        raise ValueError(
            f"Covariances must be {list(size)}, got {list(cov1.shape)} and {list(cov2.shape)}."
        )
    if not all(t.isfinite().all() for t in (mean1, cov1, mean2, cov2)):
        raise ValueError("Means and covariances must be finite.")

    fidelity = torch.linalg.svdvals(_sqrt_psd(cov1) @ _sqrt_psd(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * fidelity
    # Equal Gaussians may come out at minus a rounding error.
    return distance.clamp(min=0)


def _sqrt_psd(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    # Estimated covariances may have eigenvalues a rounding error below zero; others never do.
    if values[0] < -1e-5 * values[-1].abs():
        raise ValueError(f"Covariance with a negative eigenvalue, {values[0].item():.3g}.")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def frechet_distance(
    x: Tensor, x_ref: Tensor, features: Callable[[Tensor], Tensor], *, batch_size: int = 256
) -> Tensor:
    r"""
    Fréchet distance between two sets of images, in a space of features.

    The means :math:`m` and (unbiased) covariances :math:`C` of the features of the two sets are
    compared as Gaussians:

    .. math::

        d^2 = \|m_1 - m_2\|_2^2 + \operatorname{tr}\left(
            C_1 + C_2 - 2 \left(C_1^{1/2} C_2 C_1^{1/2}\right)^{1/2}\right)

    With Inception features this is the FID of `Heusel et al., 2017
    <https://arxiv.org/abs/1706.08500>`_, who, as here, call the squared distance the Fréchet
    distance. See :func:`gaussian_frechet`.

    .. warning::

        The estimate is **biased upwards**, by an amount that shrinks like one over the number of
        images: two small sets of the same distribution are not at distance 0. With fewer images
        than features the covariance is singular and the number means little. The bias also depends
        on what is compared (`Bińkowski et al., 2018 <https://arxiv.org/abs/1801.01401>`_; `Chong
        and Forsyth, 2020 <https://arxiv.org/abs/1911.07023>`_). Compare only numbers with the same
        features, the same reference and the same number of images, next to the distance between two
        sets of true images of those sizes.

    :param torch.Tensor x: images ``[N, C, H, W]``, for instance posterior samples; at least two.
    :param torch.Tensor x_ref: reference images ``[M, C, H, W]``; at least two.
    :param Callable features: maps images ``[B, C, H, W]`` to features ``[B, D]``, such as
        :meth:`DigitClassifier.features`. It gets the images as they are, on their device. A network
        should be in evaluation mode.
    :param int batch_size: number of images per call of ``features``.
    :return: :math:`d^2 \geq 0`, a float64 tensor without dimensions, on the CPU.

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
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    z = _features_in_batches(x, features, batch_size, "x")
    z_ref = _features_in_batches(x_ref, features, batch_size, "x_ref")
    if z.shape[1] != z_ref.shape[1]:
        raise ValueError(f"Features of x and x_ref differ in size: {z.shape[1]} and {z_ref.shape[1]}.")
    return gaussian_frechet(*_gaussian_fit(z), *_gaussian_fit(z_ref))


@torch.no_grad()
def _features_in_batches(
    x: Tensor, features: Callable[[Tensor], Tensor], batch_size: int, name: str
) -> Tensor:
    """Features ``[N, D]`` in float64 on the CPU, or an error that names the set of images."""
    if x.ndim != 4:
        raise ValueError(f"{name} must be images [N, C, H, W], got {list(x.shape)}.")
    if len(x) < 2:
        raise ValueError(f"A covariance needs at least 2 images, {name} has {len(x)}.")
    batches = []
    for batch in x.split(batch_size):
        z = features(batch)
        if z.ndim != 2 or len(z) != len(batch):
            raise ValueError(
                f"features must map {list(batch.shape)} to [{len(batch)}, D], got {list(z.shape)}."
            )
        batches.append(z.to("cpu", torch.float64))
    z = torch.cat(batches)
    if not z.isfinite().all():
        raise ValueError(f"Features of {name} are not finite.")
    return z


def _gaussian_fit(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and unbiased covariance ``[D, D]`` of features ``[N, D]``."""
    mean = z.mean(0)
    # Centre first: the difference of second moments would lose digits.
    centred = z - mean
    return mean, centred.mT @ centred / (len(z) - 1)
