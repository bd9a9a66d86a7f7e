r"""Losses of distillation: they turn the unfolded denoiser into a sampler of :math:`p(x \mid y, x_s)`.

For a clean image x, a measurement y and a state :math:`x_s = x + s\,\varepsilon`, the unfolded denoiser gives
samples :math:`\hat x_1, \dots, \hat x_S`. The true x is itself a sample of :math:`p(x \mid y, x_s)`, to which
the losses compare the others. Those of a single sample are lowest for the posterior *mean*; those of the
paper (Mbakam et al. 2025, Section 4) are :class:`L2Loss`, :class:`PerceptualLoss` and an adversarial loss,
with weights 1, 0.1 and 0.01. :class:`EnergyScoreLoss` is lowest for the posterior itself.

They are deepinv losses, called with keywords only, and return one value per image, `[B]`, times their
``weight``:

- ``x``: clean images, `[B, C, H, W]`, in [0, 1];
- ``x_net``: samples, of the same shape, not clipped;
- ``samples``: several samples, `[S, B, C, H, W]`, of which ``x_net`` is the first. The attribute
  ``num_samples`` says how many a loss needs. A loss of a single sample is averaged over them;
- ``rmse``: the predicted RMSE of an initial estimate ``x_net``, `[B, 1, 1, 1]`, positive;
- ``physics``, ``y``, ``model``, ``sigma`` and others, which most losses do not use.

They raise a ValueError if shapes differ, or what they need is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from deepinv.loss import Loss
from deepinv.physics import Physics
from torch import Tensor

from deepinv_ud2m.checks import check_count, check_number
from deepinv_ud2m.metrics.perceptual import PerceptualDistance


class WeightedLoss(Loss):
    """
    A loss times its weight, of a single sample unless ``num_samples`` says otherwise.

    :param float weight: weight of this loss in a sum, finite and non-negative (default: 1).
    :raises TypeError, ValueError: for another weight.
    """

    num_samples = 1

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = check_number("weight", weight, low=0)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"


class L2Loss(WeightedLoss):
    r"""
    Squared error of the image, averaged over pixels and channels, :math:`\| \hat x - x \|^2 / d`; or of the
    noise in the state, as in the paper: with :math:`\hat\varepsilon = (x_s - \hat x) / s` it is this times
    :math:`1 / s^2`, which is :math:`\bar\alpha_t / (1 - \bar\alpha_t)` for images in [-1, 1].

    :param float weight: weight of this loss in a sum, finite and non-negative (default: 1).
    :param str of: ``"image"`` (default) or ``"noise"``, which needs states, so not ``stage="end_to_end"``.
    :raises TypeError, ValueError: for another weight or name.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training import L2Loss
        >>> x, x_net = torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.5)
        >>> L2Loss()(x=x, x_net=x_net)
        tensor([0.2500, 0.2500])
        >>> L2Loss(of="noise")(x=x, x_net=x_net, sigma=torch.tensor([0.5, 1.0]))
        tensor([1.0000, 0.2500])
    """

    def __init__(self, weight: float = 1.0, of: str = "image"):
        super().__init__(weight)
        if of not in ("image", "noise"):
            raise ValueError(f"of must be 'image' or 'noise', got {of!r}")
        self.of = of

    def forward(
        self,
        *,
        x: Tensor,
        x_net: Tensor,
        samples: Tensor | None = None,
        sigma: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of ``samples``, or else of ``x_net``; that of the noise needs ``sigma``, `[B]`."""
        error = (as_samples(x, x_net, samples) - x).square().flatten(2).mean((0, 2))
        if self.of == "noise":
            if sigma is None:
                raise ValueError("sigma, the level of the states, is needed for the error of the noise")
            error = error / sigma.flatten() ** 2
        return self.weight * error

    def extra_repr(self) -> str:
        return f"of={self.of!r}, {super().extra_repr()}"


class GaussianNLLLoss(Loss):
    r"""
    Gaussian negative log-likelihood of x, per pixel, for an estimate m and its predicted RMSE h,

    .. math:: \log h + \frac{\| m - x \|^2}{2 d\, h^2} .

    It is lowest for :math:`m = E[x \mid y, x_s]` and :math:`h^2 = E[\|x - m\|^2 / d \mid y, x_s]`. Errors
    count relative to the predicted RMSE, so easy and hard measurements have equal weight.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training import GaussianNLLLoss
        >>> x, x_net = torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.5)
        >>> GaussianNLLLoss()(x=x, x_net=x_net, rmse=torch.tensor([0.5, 1.0]))  # the first predicts its error
        tensor([-0.1931,  0.1250])
    """

    num_samples = 1

    def forward(self, *, x: Tensor, x_net: Tensor, rmse: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The loss of the estimate ``x_net`` and ``rmse``."""
        if rmse is None:
            raise ValueError("rmse, the predicted RMSE of an estimate, is needed: train with stage='initial'")
        error = (as_samples(x, x_net, None)[0] - x).square().flatten(1).mean(1)
        return rmse.flatten().log() + error / (2 * rmse.flatten() ** 2)


class PerceptualLoss(WeightedLoss):
    """
    Perceptual distance of samples to the true image, :class:`deepinv_ud2m.metrics.PerceptualDistance`.

    Networks of colour images see a grey image three times, once per channel. The network moves to the device
    of the images by itself.

    :param str network: a name of that class, such as ``"digits"`` (default), ``"efficientnet"`` or
        ``"lpips-vgg"``.
    :param bool download: allow LPIPS to fetch a missing file (default: ``False``).
    :param bool random: random weights for the backbone of LPIPS, to try a recipe (default: ``False``).
    :param float weight: weight of this loss in a sum, finite and non-negative (default: 1).
    :raises ValueError, ImportError, RuntimeError: as that class.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training import PerceptualLoss
        >>> PerceptualLoss("digits")(x=torch.zeros(2, 1, 32, 32), x_net=torch.rand(2, 1, 32, 32)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        network: str = "digits",
        *,
        download: bool = False,
        random: bool = False,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        self.distance = PerceptualDistance(network, download=download, random=random)
        self.network, self._sees_colour = network, network != "digits"

    def forward(self, *, x: Tensor, x_net: Tensor, samples: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The loss of ``samples``, or else of ``x_net``."""
        samples = as_samples(x, x_net, samples)
        if self._sees_colour and x.shape[1] == 1:
            samples, x = samples.expand(-1, -1, 3, -1, -1), x.expand(-1, 3, -1, -1)
        if next(self.distance.parameters()).device != x.device:
            self.distance.to(x.device)
        distances = self.distance(samples.flatten(0, 1), x.repeat(len(samples), 1, 1, 1))
        return self.weight * distances.unflatten(0, samples.shape[:2]).mean(0)

    def extra_repr(self) -> str:
        return f"{self.network!r}, {super().extra_repr()}"


class EnergyScoreLoss(WeightedLoss):
    r"""
    Energy score of S samples,

    .. math::
        \frac{1}{S} \sum_j \| \hat x_j - x \|_2
        - \frac{c}{2 S (S-1)} \sum_{j \neq k} \| \hat x_j - \hat x_k \|_2 , \quad c = 1 .

    The first term pulls samples to the truth, the second pushes them apart. It is
    :func:`deepinv_ud2m.metrics.energy_score`, unbiased and strictly proper: its expectation over x is lowest
    if and only if the samples follow :math:`p(x \mid y, x_s)`.

    A diversity weight c other than 1 changes the standard deviation of the samples, and the score is no
    longer proper. For a Gaussian law in many dimensions, the samples have the right mean and
    :math:`c / \sqrt{2 - c^2}` times the right standard deviation: 0.38 at c = 0.5, 1.06 at c = 1.03. Values
    slightly above 1 correct samples that are found to be too similar. Above 1, far outliers of a share below
    1 - 1 / c are not punished.

    With ``patch_size`` the score is that of each patch of a grid without overlap, averaged over patches: its
    gradient is less noisy, and it does not see how patches go together. ``patch_size=1`` on grey images is
    the CRPS of the pixels. With ``features`` it is the score of the law of the features. A sum with a score
    of the whole image is strictly proper again.

    :param int num_samples: samples needed, at least 2 (default: 2).
    :param int patch_size: side of the patches, in pixels; those at the right and lower edge may be smaller
        (default: ``None``, the whole image).
    :param Callable features: maps images `[N, C, H, W]` to features `[N, ...]`, or to maps `[N, D, h, w]`
        where there are patches too. It should be frozen and treat images separately (default: ``None``,
        pixels).
    :param float, dict diversity_weight: c, in [0, 1.2] (default: 1), or one for each physics of the trainer,
        ``{physics: c}``. A dictionary is kept as it is, so that changes of it between steps take effect.
    :param float weight: weight of this loss in a sum, finite and non-negative (default: 1).
    :raises ValueError: for numbers outside of these ranges.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training import EnergyScoreLoss
        >>> samples = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
        >>> EnergyScoreLoss()(x=torch.zeros(1, 1, 1, 1), samples=samples)
        tensor([0.])
    """

    def __init__(
        self,
        num_samples: int = 2,
        patch_size: int | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        diversity_weight: float | Mapping[Physics, float] = 1.0,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        self.num_samples = check_count("num_samples", num_samples)
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}")
        if features is not None and not callable(features):
            raise ValueError(f"features must be callable, got {features!r}")
        weights = (
            [*diversity_weight.values()] if isinstance(diversity_weight, Mapping) else [diversity_weight]
        )
        if not weights or not all(isinstance(c, Real) and 0 <= c <= 1.2 for c in weights):
            raise ValueError(
                "diversity_weight must be a number in [0, 1.2], or {physics: number}, got "
                f"{weights if isinstance(diversity_weight, Mapping) else diversity_weight!r}"
            )
        self.features: Any = features
        self.patch_size = None if patch_size is None else check_count("patch_size", patch_size)
        self.diversity_weight = diversity_weight  # a mapping itself: a controller changes it during training

    def forward(
        self, *, x: Tensor, samples: Tensor | None = None, physics: Physics | None = None, **kwargs: Any
    ) -> Tensor:
        """The score of ``samples``, of which there must be two at least; it may be negative."""
        if samples is None or len(samples) < 2:
            given = "none" if samples is None else len(samples)
            raise ValueError(
                f"samples must be at least two samples [S, B, C, H, W] of each image, got {given}"
            )
        samples = as_samples(x, None, samples)
        points = self._points(torch.cat([x[None].to(samples), samples]))
        truth, samples = points[0], points[1:]
        j, k = torch.triu_indices(len(samples), len(samples), 1, device=samples.device)
        error = torch.linalg.vector_norm(samples - truth, dim=-1).mean(0)
        diversity = torch.linalg.vector_norm(samples[j] - samples[k], dim=-1).mean(0)
        return self.weight * (error - self._weight_of(physics) * diversity / 2).mean(1)

    def _weight_of(self, physics: Physics | None) -> float:
        if not isinstance(self.diversity_weight, Mapping):
            return self.diversity_weight
        if physics not in self.diversity_weight:
            known = [type(known).__name__ for known in self.diversity_weight]
            raise ValueError(
                f"physics must be one of those that diversity_weight was given for, {known}, "
                f"got {type(physics).__name__}"
            )
        return self.diversity_weight[physics]

    def _points(self, images: Tensor) -> Tensor:
        """What is compared, `[N, B, P, D]`: P patches, of D numbers, of the images `[N, B, C, H, W]`."""
        if self.features is not None:
            images = self._features(images)
        if self.patch_size is None:
            return images.flatten(2).unsqueeze(2)
        size = self.patch_size
        # What is added at the edges is the same in all images, so no distance changes.
        images = F.pad(images, (0, -images.shape[-1] % size, 0, -images.shape[-2] % size))
        patches = images.unfold(3, size, size).unfold(4, size, size)
        return patches.permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(2, 3)

    def _features(self, images: Tensor) -> Tensor:
        features = self.features(images.flatten(0, 1))
        num = images.shape[0] * images.shape[1]
        fits = features.ndim >= 2 if self.patch_size is None else features.ndim == 4
        if not fits or len(features) != num:
            expected = f"[{num}, ...]" if self.patch_size is None else f"maps [{num}, D, h, w]"
            given = [num, *images.shape[2:]]
            raise ValueError(f"features must map {given} to {expected}, got {list(features.shape)}")
        return features.unflatten(0, images.shape[:2])

    def extra_repr(self) -> str:
        patches = "" if self.patch_size is None else f", patch_size={self.patch_size}"
        weight = self.diversity_weight
        # Weights of each physics change in training, and this describes a run.
        shown = "of each physics" if isinstance(weight, Mapping) else f"{weight:g}"
        diversity = "" if shown == "1" else f", diversity_weight={shown}"
        return f"num_samples={self.num_samples}{patches}{diversity}, {super().extra_repr()}"


def as_samples(x: Tensor | None, x_net: Any, samples: Tensor | None) -> Tensor:
    """``samples``, or else ``x_net`` alone, as `[S, B, C, H, W]`, in single precision at least."""
    if x is None:
        raise ValueError("x, the clean images, is needed: distillation is supervised")
    name, given = ("x_net", x_net[None]) if samples is None else ("samples", samples)
    if given.ndim != 5 or given.shape[1:] != x.shape:
        expected = list(x.shape) if samples is None else ["S", *x.shape]
        shape = list(given.shape[1:] if samples is None else given.shape)
        raise ValueError(f"{name} must be {expected} for images x {list(x.shape)}, got {shape}")
    return given.to(torch.promote_types(given.dtype, torch.float32))
