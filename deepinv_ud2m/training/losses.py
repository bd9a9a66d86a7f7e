r"""Losses of distillation: they turn the unfolded denoiser into a sampler of :math:`p(x \mid y, x_s)`.

For a clean image x, a measurement y and a state :math:`x_s = x + s\,\varepsilon`, the unfolded
denoiser gives draws :math:`\hat x_1, \dots, \hat x_S` that differ in their inner noise. Given y and
:math:`x_s`, the true x is itself one draw from :math:`p(x \mid y, x_s)`; the losses compare the others
to it.

- :class:`L2Loss` alone is lowest for the posterior *mean*: it makes draws accurate and takes away their
  spread. :class:`PerceptualLoss` does the same in the activations of a network.
- :class:`AdversarialGeneratorLoss` gives the spread back: a discriminator, trained with
  :class:`AdversarialDiscriminatorLoss`, tells draws from true images of the same measurement.
- :class:`EnergyScoreLoss` is lowest for the posterior itself, from two draws and without a
  discriminator.

The generator of the paper (Mbakam et al. 2025, Section 4) minimises the sum of the first three, with
weights 1, 0.1 and 0.01.

**Calling convention.** They are deepinv losses, called with keywords as deepinv's trainers do,
``loss(x=x, x_net=x_net, y=y, physics=physics, model=model, ...)``, and return one value per image,
`[B]`. They also take what deepinv's trainers do not have: ``sigma``, the levels s, and ``samples``,
draws `[S, B, C, H, W]` of which ``x_net`` is the first. ``num_samples`` says how many draws a loss
needs; with more, all count. Other keywords are left aside, as everywhere in deepinv. Images are in [0,
1], but draws are not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

import torch
import torch.nn.functional as F
from deepinv.loss import Loss
from deepinv.loss.adversarial import DiscriminatorLoss, DiscriminatorMetric, GeneratorLoss
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.initializers import LinearInitializer
from deepinv_ud2m.metrics.perceptual import PerceptualDistance
from deepinv_ud2m.proximal import Scalar, expand_scalar, noise_level

# -- Accuracy -------------------------------------------------------------------------------------


class L2Loss(Loss):
    r"""
    Squared error, averaged over pixels and channels, weighted by the level of the state,

    .. math:: w(s)\, \| \hat x - x \|^2 / d .

    ============= ================================ ===========================================
    ``weighting`` :math:`w(s)`                     what it measures
    ============= ================================ ===========================================
    "x0"          1                                the error of the image
    "eps"         :math:`1 / s^2`                  the error of the noise, as in the paper
    "clipped"     :math:`\min(1/s^2, w_{\max})`    that of the noise, at low levels that of the
                                                   image
    ============= ================================ ===========================================

    A draw is also a prediction of the noise, :math:`\hat\varepsilon = (x_s - \hat x) / s`, so
    :math:`\|\hat\varepsilon - \varepsilon\|^2 = \|\hat x - x\|^2 / s^2` exactly. In the coordinates of
    the paper (images in [-1, 1], time t) the weight is :math:`\bar\alpha_t / (1 - \bar\alpha_t) = 1 /
    (4 s^2)`, on errors four times as large: from 4.5e3 at t = 1 to 4e-5 at t = 999, so that few levels
    decide alone. The default :math:`w_{\max} = 20` makes ``"clipped"`` the Min-SNR weighting with
    :math:`\gamma = 5` of `Hang et al., 2023 <https://arxiv.org/abs/2303.09556>`_,
    :math:`\min(\bar\alpha_t / (1 - \bar\alpha_t), \gamma)`, up to the same factor of four.

    :param str weighting: ``"x0"``, ``"eps"`` or ``"clipped"`` (default: ``"x0"``).
    :param float clip: largest weight :math:`w_{\max}` of ``"clipped"``, positive (default: 20).
    :param float weight: of this loss in a sum, non-negative (default: 1).
    :raises ValueError: for another weighting or other numbers.
    """

    num_samples = 1

    def __init__(self, weighting: str = "x0", clip: float = 20.0, weight: float = 1.0):
        super().__init__()
        _check_choice("weighting", weighting, ("x0", "eps", "clipped"))
        if not clip > 0:
            raise ValueError(f"clip must be positive, got {clip}")
        self.weighting, self.clip = weighting, clip
        self.weight = _check_weight("weight", weight)

    def forward(
        self,
        *,
        x: Tensor,
        x_net: Tensor,
        sigma: Scalar | None = None,
        samples: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        r"""
        :param torch.Tensor x: clean images `[B, C, H, W]`.
        :param torch.Tensor x_net: draws, of the same shape.
        :param float, torch.Tensor sigma: levels s of the states, a scalar, `[B]` or `[B, 1, 1, 1]`,
            positive; ``"x0"`` does not need them.
        :param torch.Tensor samples: draws `[S, B, C, H, W]`, averaged over, in place of ``x_net``.
        :returns: losses `[B]`.
        :raises ValueError: if shapes differ, or ``sigma`` is missing or not positive.
        """
        error = (_draws(x, x_net, samples) - x).square().flatten(2).mean((0, 2))
        return self.weight * self.level_weight(sigma, x) * error

    def level_weight(self, sigma: Scalar | None, x: Tensor) -> Tensor | float:
        """
        The weight of each level.

        :param float, torch.Tensor sigma: levels, a scalar, `[B]` or `[B, 1, 1, 1]`.
        :param torch.Tensor x: images, which give B.
        :returns: weights `[B]`; 1 with ``"x0"``.
        """
        if self.weighting == "x0":
            return 1.0
        sigma = _levels(sigma, x)
        if sigma is None:
            raise ValueError(
                f'sigma, the levels of the states, is needed by weighting="{self.weighting}"'
            )
        if not (sigma > 0).all():
            raise ValueError(f"sigma must be positive, got {sigma.tolist()}")
        weight = sigma**-2
        return weight.clamp(max=self.clip) if self.weighting == "clipped" else weight

    def extra_repr(self) -> str:
        clip = f", clip={self.clip:g}" if self.weighting == "clipped" else ""
        return f"{self.weighting!r}{clip}, weight={self.weight:g}"


class FirstGuessLoss(Loss):
    r"""
    Negative logarithm of the Gaussian likelihood of x, per pixel, of the first guess m and its error h,

    .. math:: \log h + \frac{\| m - x \|^2}{2 d\, h^2} ,

    lowest for :math:`m = E[x \mid y, x_s]` and :math:`h^2 = E[\|x - m\|^2 / d \mid y, x_s]`. Errors
    count relative to what is stated, so that easy and hard measurements weigh alike.
    """

    num_samples = 1

    def forward(self, *, x: Tensor, x_net: Tensor, error: Tensor, **kwargs) -> Tensor:
        """
        :param torch.Tensor x: clean images `[B, C, H, W]`.
        :param torch.Tensor x_net: first guesses, of the same shape.
        :param torch.Tensor error: their stated errors, `[B, 1, 1, 1]`, positive.
        :returns: losses `[B]`.
        """
        error = error.flatten()
        return error.log() + (x_net - x).square().flatten(1).mean(1) / (2 * error**2)


class PerceptualLoss(Loss):
    r"""
    Perceptual distance of draws to the true image, see
    :class:`deepinv_ud2m.metrics.PerceptualDistance`.

    ================ =================== ================================================
    ``network``      images              needs
    ================ =================== ================================================
    "digits"         1x32x32             nothing, shipped
    "efficientnet"   grey or colour      two packages
    "lpips-alex"     grey or colour,     a file of 233 MB (AlexNet); "lpips" is the same
    "lpips-vgg"      32x32 or larger     a file of 528 MB (VGG16)
    "lpips-squeeze"                      a file of 5 MB (SqueezeNet 1.1)
    ================ =================== ================================================

    Networks of colour images see a grey image three times, once per channel. The network is frozen and
    in evaluation mode; gradients reach the draws. It moves to the device of the images by itself.
    Draws are not clipped to [0, 1]: where they were, they would have no gradient.

    :param str network: one of the table (default: ``"digits"``).
    :param bool download: allow LPIPS to fetch a missing file (default: ``False``).
    :param float weight: of this loss in a sum, non-negative (default: 1).
    :raises ValueError: for another network or weight.
    :raises ImportError: if the packages of the network are missing; it names them.
    :raises RuntimeError: if its file is missing; it says which, how large, from where, to where, and
        what works without.
    """

    num_samples = 1

    def __init__(self, network: str = "digits", *, download: bool = False, weight: float = 1.0):
        super().__init__()
        self.weight = _check_weight("weight", weight)
        self.distance = PerceptualDistance(network, download=download)
        self.network, self._sees_colour = network, network != "digits"

    def forward(self, *, x: Tensor, x_net: Tensor, samples: Tensor | None = None, **kwargs) -> Tensor:
        """
        :param torch.Tensor x: clean images `[B, C, H, W]`.
        :param torch.Tensor x_net: draws, of the same shape.
        :param torch.Tensor samples: draws `[S, B, C, H, W]`, averaged over, in place of ``x_net``.
        :returns: losses `[B]`.
        :raises ValueError: if shapes differ, or are not those of the network.
        """
        draws = _draws(x, x_net, samples)
        if self._sees_colour and x.shape[1] == 1:
            draws, x = draws.expand(-1, -1, 3, -1, -1), x.expand(-1, 3, -1, -1)
        if next(self.distance.parameters()).device != x.device:
            self.distance.to(x.device)
        distances = self.distance(draws.flatten(0, 1), x.repeat(len(draws), 1, 1, 1))
        return self.weight * distances.unflatten(0, draws.shape[:2]).mean(0)

    def extra_repr(self) -> str:
        return f"{self.network!r}, weight={self.weight:g}"


# -- The posterior, by a proper score -------------------------------------------------------------


class EnergyScoreLoss(Loss):
    r"""
    Energy score of S draws,

    .. math::
        \frac{1}{S} \sum_j \| \hat x_j - x \|_2^\beta
        - \frac{c}{2 S (S-1)} \sum_{j \neq k} \| \hat x_j - \hat x_k \|_2^\beta , \quad c = 1 .

    Its expectation over x given y and :math:`x_s` is, for independent draws from any law Q, lowest if
    and only if Q is the conditional law :math:`p(x \mid y, x_s)`: the score is strictly proper for
    :math:`0 < \beta < 2` (`Gneiting and Raftery, 2007 <https://doi.org/10.1198/016214506000001437>`_).
    So it trains accuracy and spread at once. The first term pulls draws to the truth, the second
    pushes them apart; only pairs of different draws count, so that the estimate is unbiased for any S
    >= 2 and S does not move the minimum. At :math:`\beta = 2` it would be blind to everything but the
    mean, and is refused. With :math:`\beta = 1` it is :func:`deepinv_ud2m.metrics.energy_score`.

    A ``spread`` c below 1 asks for less than the posterior's spread, and so for draws nearer to its
    mean: the score is proper no more, and favours accuracy. For a Gaussian law in many dimensions
    and :math:`\beta = 1` the draws have the right mean, and :math:`c / \sqrt{2 - c^2}` times the
    standard deviation: 0.38 of it at c = 0.5, where a draw costs 0.6 dB against the mean and not 3 dB.
    A ``spread`` a little above 1 mends draws that are found to spread too little, as those of a model
    that cannot tell easy measurements from hard ones do: 1.06 times the standard deviation at c = 1.03.
    Far outliers, of a share below 1 - 1 / c of the draws, are then no longer punished.

    The unit is that of the Euclidean norm of an image (to the power :math:`\beta`): it grows like
    :math:`\sqrt{CHW}`, and the loss of one image may be negative.

    For a whole image the norm is one number, and its gradient is noisy. With ``patch_size`` the score
    is that of each of the patches of a grid that does not overlap, averaged over patches (those at the
    right and lower edge may be smaller). It is proper, and strictly so for the law of each *patch*: it
    does not see how patches go together. ``patch_size=1`` on grey images is the CRPS of the pixels.
    Likewise with ``features`` it is the score of the law of the features. A sum with a score of the
    whole image is strictly proper again.

    :param int num_samples: draws needed, at least 2 (default: 2).
    :param float beta: power :math:`\beta`, in (0, 2) (default: 1).
    :param int patch_size: side of the patches, in pixels; the whole image by default.
    :param Callable features: maps images `[N, C, H, W]` to features `[N, ...]`, or to maps `[N, D, h,
        w]` where there are patches too; pixels by default. It should be frozen and treat images
        separately.
    :param float, dict spread: c, in [0, 1.2] (default: 1, the energy score); or that of each of the
        operators of a training with several, ``{physics: c}``.
    :param float weight: of this loss in a sum, non-negative (default: 1).
    :raises ValueError: for numbers outside of these ranges.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training.losses import EnergyScoreLoss
        >>> loss = EnergyScoreLoss()
        >>> samples = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
        >>> loss(x=torch.zeros(1, 1, 1, 1), x_net=samples[0], samples=samples)
        tensor([0.])
    """

    def __init__(
        self,
        num_samples: int = 2,
        beta: float = 1.0,
        patch_size: int | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        spread: float | Mapping[Physics, float] = 1.0,
        weight: float = 1.0,
    ):
        super().__init__()
        self.num_samples = check_count("num_samples", num_samples)
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}")
        if not 0 < beta < 2:
            raise ValueError(f"beta must be in (0, 2), where the score is strictly proper, got {beta}")
        if features is not None and not callable(features):
            raise ValueError(f"features must be callable, got {features!r}")
        self.spread = dict(spread) if isinstance(spread, Mapping) else spread
        if self.spread == {} or not all(isinstance(c, Real) for c in self._spreads()):
            raise ValueError(f"spread must be a number, or {{physics: number}}, got {spread!r}")
        for c in self._spreads():
            if not 0 <= c <= 1.2:
                raise ValueError(f"spread must be in [0, 1.2], got {c}")
        self.beta, self.features = beta, features
        self.patch_size = None if patch_size is None else check_count("patch_size", patch_size)
        self.weight = _check_weight("weight", weight)

    def forward(
        self,
        *,
        x: Tensor,
        x_net: Tensor | None = None,
        samples: Tensor | None = None,
        physics: Physics | None = None,
        **kwargs,
    ) -> Tensor:
        """
        :param torch.Tensor x: clean images `[B, C, H, W]`.
        :param torch.Tensor x_net: not used: one draw has no spread.
        :param torch.Tensor samples: draws `[S, B, C, H, W]`, S >= 2.
        :param deepinv.physics.Physics physics: the operator, where each has a ``spread`` of its own.
        :returns: losses `[B]`.
        :raises ValueError: for fewer draws, other shapes, or an operator without a ``spread``.
        """
        if samples is None or len(samples) < 2:
            given = "none" if samples is None else len(samples)
            raise ValueError(
                f"samples must be at least two draws [S, B, C, H, W] of each image, got {given}"
            )
        draws = _draws(x, None, samples)
        points = self._points(torch.cat([x[None].to(draws), draws]))
        truth, draws = points[0], points[1:]
        j, k = torch.triu_indices(len(draws), len(draws), 1, device=draws.device)
        error = self._distance(draws, truth).mean(0)
        spread = self._distance(draws[j], draws[k]).mean(0)
        return self.weight * (error - self._spread_of(physics) * spread / 2).mean(1)

    def _spreads(self) -> list[float]:
        return list(self.spread.values()) if isinstance(self.spread, dict) else [self.spread]

    def _spread_of(self, physics: Physics | None) -> float:
        if not isinstance(self.spread, dict):
            return self.spread
        if physics not in self.spread:
            known = [type(operator).__name__ for operator in self.spread]
            raise ValueError(
                f"physics must be one of the operators that spread was given for, {known}, "
                f"got {type(physics).__name__}"
            )
        return self.spread[physics]

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

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(a - b, dim=-1)  # its gradient at zero is zero
        if self.beta == 1:
            return norm
        # That of the power is not finite, or not zero, and must not be multiplied by it.
        apart = norm > 0
        return torch.where(apart, torch.where(apart, norm, 1.0) ** self.beta, 0.0)

    def extra_repr(self) -> str:
        patches = "" if self.patch_size is None else f", patch_size={self.patch_size}"
        spreads = ", ".join(f"{c:g}" for c in self._spreads())
        spread = "" if self.spread == 1 else f", spread={spreads}"
        options = f"{patches}{spread}, weight={self.weight:g}"
        return f"num_samples={self.num_samples}, beta={self.beta:g}{options}"


# -- The posterior, by a discriminator ------------------------------------------------------------


class AdversarialGeneratorLoss(GeneratorLoss):
    r"""
    Non-saturating adversarial loss of the generator (Goodfellow et al. 2014), conditional on the
    measurement,

    .. math::
        \operatorname{softplus}(-D(\hat x \mid c)) = -\log \operatorname{sigmoid} D(\hat x \mid c) ,

    averaged over the logits of an image, if there are several. The condition c is y in the space of
    images, see :func:`condition`. The state is not part of it: over all states of a level, draws from
    :math:`p(x \mid y, x_s)` follow :math:`p(x \mid y)`, as the true images do.

    The discriminator is called as ``D(x, condition, sigma=sigma)`` and returns logits `[B]` or `[B,
    ...]`, as :class:`~deepinv_ud2m.training.discriminator.ConditionalDiscriminator` does. The gradient
    passes through it to the draws; its own parameters get none.

    :param float weight: of this loss in a sum, non-negative (default: 1).
    :param torch.nn.Module D: discriminator, unless it is given in the call.
    :param str mode: how the condition is computed where it is not given, see :func:`condition`
        (default: ``"tikhonov"``).
    :raises ValueError: for another mode or weight.
    """

    num_samples = 1

    def __init__(self, weight: float = 1.0, D: nn.Module | None = None, mode: str = "tikhonov"):
        super().__init__(weight_adv=_check_weight("weight", weight), D=D)
        self.mode = _check_choice("mode", mode, _MODES)
        self.metric_gan = LogisticMetric()

    def forward(
        self,
        *,
        x: Tensor,
        x_net: Tensor,
        y: Tensor | TensorList | None = None,
        physics: Physics | None = None,
        D: nn.Module | None = None,
        condition: Tensor | None = None,
        sigma: Scalar | None = None,
        samples: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """
        :param torch.Tensor x: clean images `[B, C, H, W]`, for their shape.
        :param torch.Tensor x_net: draws, of the same shape.
        :param torch.Tensor, deepinv.utils.TensorList y: measurements.
        :param deepinv.physics.Physics physics: the physics. It and ``y`` are needed where there is no
            ``condition``.
        :param torch.nn.Module D: discriminator.
        :param torch.Tensor condition: conditions `[B, ...]`, from :func:`condition`.
        :param float, torch.Tensor sigma: levels s, a scalar, `[B]` or `[B, 1, 1, 1]`, for ``D``.
        :param torch.Tensor samples: draws `[S, B, C, H, W]`, averaged over, in place of ``x_net``.
        :returns: losses `[B]`.
        :raises ValueError: if something is missing, or shapes do not fit.
        """
        draws = _draws(x, x_net, samples)
        D = _frozen(_discriminator(self, D))
        judge = _Judge(D, _condition(condition, y, physics, self.mode), sigma)
        return self.adversarial_loss(real=None, fake=draws, D=judge).mean(0)

    def extra_repr(self) -> str:
        return f"weight={self.weight_adv:g}, mode={self.mode!r}"


class AdversarialDiscriminatorLoss(DiscriminatorLoss):
    r"""
    Logistic loss of the conditional discriminator, with a zero-centred gradient penalty of weight
    :math:`\lambda`,

    .. math::
        \operatorname{softplus}(-D(x \mid c)) + \operatorname{softplus}(D(\hat x \mid c))
        + \lambda\, \| \nabla_{\tilde x} D(\tilde x \mid c) \|_2^2 .

    The penalty is taken at random interpolates :math:`\tilde x = x + t (\hat x - x)`, t uniform in [0,
    1], as in the paper (`Thanh-Tung et al., 2019 <https://arxiv.org/abs/1902.03984>`_), or at the real
    images, :math:`\tilde x = x` (R1, `Mescheder et al., 2018 <https://arxiv.org/abs/1801.04406>`_,
    whose :math:`\gamma / 2` is :math:`\lambda` here). For N logits per image, it is :math:`\|\nabla
    \sum_n D_n\|^2 / N`: the mean of the penalties of the single logits, if they judge different
    pixels, so that it does not depend on the size of the images.

    The paper has :math:`\lambda` = 0.01 (MNIST, LSUN) or 10 (ImageNet), for images in [-1, 1]. A
    gradient with respect to images in [0, 1] is twice as large, so the same penalties are
    :math:`\lambda` = 0.0025 and 2.5 here.

    The discriminator is called as ``D(x, condition, sigma=sigma)`` and must judge the images of a
    batch separately (no batch normalisation). No gradient reaches the draws.

    :param float weight: of this loss in a sum, non-negative (default: 1).
    :param float penalty_weight: :math:`\lambda`, non-negative; 0 leaves the penalty out (default:
        0.01).
    :param str penalty: ``"interpolates"`` or ``"r1"`` (default: ``"interpolates"``).
    :param torch.nn.Module D: discriminator, unless it is given in the call.
    :param str mode: how the condition is computed where it is not given, see :func:`condition`
        (default: ``"tikhonov"``).
    :param torch.Generator generator: source of t, on the device of the images; PyTorch's own by
        default.
    :raises ValueError: for another penalty, mode or weights.
    """

    num_samples = 1

    def __init__(
        self,
        weight: float = 1.0,
        penalty_weight: float = 0.01,
        penalty: str = "interpolates",
        D: nn.Module | None = None,
        mode: str = "tikhonov",
        generator: torch.Generator | None = None,
    ):
        super().__init__(weight_adv=_check_weight("weight", weight), D=D)
        self.penalty = _check_choice("penalty", penalty, ("interpolates", "r1"))
        self.penalty_weight = _check_weight("penalty_weight", penalty_weight)
        self.mode = _check_choice("mode", mode, _MODES)
        self.generator = generator
        self.metric_gan = LogisticMetric()

    def forward(
        self,
        *,
        x: Tensor,
        x_net: Tensor,
        y: Tensor | TensorList | None = None,
        physics: Physics | None = None,
        D: nn.Module | None = None,
        condition: Tensor | None = None,
        sigma: Scalar | None = None,
        samples: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """
        The arguments are those of :meth:`AdversarialGeneratorLoss.forward`.

        :returns: losses `[B]`.
        :raises ValueError: if something is missing, or shapes do not fit.
        """
        D = _discriminator(self, D)
        draws = _draws(x, x_net, samples).detach()
        condition = _condition(condition, y, physics, self.mode)
        real = x[None].to(draws)
        # One pass for all: half the calls, and wrappers for several processes want but one.
        logits = _Judge(D, condition, sigma)(torch.cat([real, draws]))
        loss = self.metric_gan(logits[0], real=True) + self.metric_gan(logits[1:], real=False).mean(0)
        if self.penalty_weight > 0:
            at = real if self.penalty == "r1" else self._interpolates(real, draws)
            penalty = gradient_penalty(_Judge(_unwrapped(D), condition, sigma), at)
            loss = loss + self.penalty_weight * penalty.mean(0)
        return self.weight_adv * loss

    def _interpolates(self, real: Tensor, draws: Tensor) -> Tensor:
        options = {"dtype": draws.dtype, "device": draws.device, "generator": self.generator}
        return torch.lerp(real, draws, torch.rand(*draws.shape[:2], 1, 1, 1, **options))

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight_adv:g}, penalty_weight={self.penalty_weight:g}, "
            f"penalty={self.penalty!r}, mode={self.mode!r}"
        )


class LogisticMetric(DiscriminatorMetric):
    r"""
    Cross-entropy of logits, :math:`\operatorname{softplus}(\mp D)` for real and fake, averaged over
    the logits of each image: what :class:`torch.nn.BCEWithLogitsLoss` computes, but one value per
    image, and on any device.
    """

    def __call__(self, pred: Tensor, real: bool | None = None) -> Tensor:
        """
        :param torch.Tensor pred: logits `[..., N]`.
        :param bool real: whether they should be large.
        :returns: losses `[...]`.
        """
        return F.softplus(-pred if real else pred).mean(-1)


def gradient_penalty(D: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""
    Zero-centred gradient penalty, :math:`\| \nabla_x \sum_n D_n(x) \|_2^2 / N` for the N logits of an
    image.

    :param Callable D: gives logits `[..., N]` for images `[..., C, H, W]`, each image by itself.
    :param torch.Tensor x: images; no gradient reaches them.
    :returns: penalties `[...]`, which can be differentiated, unless gradients are disabled.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # also where the loss is only evaluated
        x = x.detach().requires_grad_()
        logits = D(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=create_graph)
    return gradient.square().flatten(-3).sum(-1) / logits.shape[-1]


_MODES = ("tikhonov", "pinv", "adjoint")


@torch.no_grad()
def condition(
    y: Tensor | TensorList,
    physics: Physics,
    mode: str = "tikhonov",
    *,
    sigma_y: Scalar | None = None,
    limits: tuple[float, float] = (-1.0, 2.0),
) -> Tensor:
    r"""
    The measurement in the space of images: the condition of a discriminator.

    - ``"tikhonov"``: :math:`\operatorname{argmin}_x \|Ax - y\|^2 / (2\sigma_y^2) + \|x - 1/2\|^2 / (2
      \tau^2)` with :math:`\tau = 1/2`, a pseudo-inverse that stops where the noise takes over: it is
      :class:`deepinv_ud2m.LinearInitializer` without a state, one call of the prox.
    - ``"pinv"``: :math:`A^\dagger y`, as in the paper. It amplifies the noise where A is nearly
      singular: after a Gaussian blur, what is inside of the limits has next to no correlation with x.
    - ``"adjoint"``: :math:`A^\top y`, which may be of another scale than x.

    :param torch.Tensor, deepinv.utils.TensorList y: measurements of B images.
    :param deepinv.physics.Physics physics: the physics.
    :param str mode: one of the above (default: ``"tikhonov"``).
    :param float, torch.Tensor sigma_y: noise level for ``"tikhonov"``; that of the physics by default.
    :param tuple limits: values are clamped to them (default: (-1, 2), the range of images thrice as
        wide).
    :returns: conditions `[B, C, H, W]`, without gradient.
    :raises ValueError: for another mode, limits not in order, or a physics without Gaussian noise
        level.
    :raises TypeError: for ``"tikhonov"`` and a physics without ``prox_l2``.
    """
    _check_choice("mode", mode, _MODES)
    low, high = limits
    if not low < high:
        raise ValueError(f"limits must be two increasing numbers, got {limits}")
    image = physics.A_dagger(y) if mode == "pinv" else physics.A_adjoint(y)
    if mode == "tikhonov":
        # A state of infinite noise says nothing; it only gives the shape.
        image = LinearInitializer()(y, physics, image, math.inf, noise_level(physics, sigma_y))
    return image.clamp(low, high)


# -- Arguments ------------------------------------------------------------------------------------


class _Judge:
    """A discriminator with its conditions: logits `[N, B, M]` of images `[N, B, C, H, W]`."""

    def __init__(self, D: Callable, condition: Tensor, sigma: Scalar | None):
        self.D, self.condition, self.sigma = D, condition, sigma

    def __call__(self, images: Tensor) -> Tensor:
        num, batch_size = images.shape[:2]
        if len(self.condition) != batch_size:
            raise ValueError(
                f"condition must be of {batch_size} images, one for each of x, got {len(self.condition)}"
            )
        condition = self.condition.repeat(num, *[1] * (self.condition.ndim - 1))
        sigma = _levels(self.sigma, images[0])
        sigma = None if sigma is None else sigma.repeat(num)
        return self.D(images.flatten(0, 1), condition, sigma=sigma).reshape(num, batch_size, -1)


def _draws(x: Tensor | None, x_net: Tensor | None, samples: Tensor | None) -> Tensor:
    """``samples``, or else ``x_net`` alone, as `[S, B, C, H, W]`, in single precision at least."""
    if x is None:
        raise ValueError("x, the clean images, is needed: distillation is supervised")
    name, draws = ("x_net", x_net[None]) if samples is None else ("samples", samples)
    if draws.ndim != 5 or draws.shape[1:] != x.shape:
        expected = list(x.shape) if samples is None else ["S", *x.shape]
        given = list(draws.shape[1:] if samples is None else draws.shape)
        raise ValueError(f"{name} must be {expected} for images x {list(x.shape)}, got {given}")
    return draws.to(torch.promote_types(draws.dtype, torch.float32))


def _levels(sigma: Scalar | None, x: Tensor) -> Tensor | None:
    return None if sigma is None else expand_scalar(sigma, x, "sigma").flatten()


def _condition(given: Tensor | None, y, physics, mode: str) -> Tensor:
    if given is not None:
        return given
    if y is None or physics is None:
        raise ValueError("condition, or y and physics to compute it from, must be given")
    return condition(y, physics, mode)


def _discriminator(loss: Loss, D: nn.Module | None) -> nn.Module:
    D = loss.D if D is None else D
    if D is None:
        raise ValueError(f"D, the discriminator, must be given to {type(loss).__name__} or in its call")
    return D


def _frozen(D: nn.Module) -> Callable:
    """The discriminator with constant parameters: no gradient for them, and no work for it."""
    D = _unwrapped(D)
    constants = {name: parameter.detach() for name, parameter in D.named_parameters()}
    return lambda x, condition, sigma: functional_call(D, constants, (x, condition), {"sigma": sigma})


def _unwrapped(D: nn.Module) -> nn.Module:
    # Each call of the wrapper must be followed by a backward pass into the parameters.
    return D.module if isinstance(D, DistributedDataParallel) else D


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _check_weight(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return value
