r"""Adversarial training: all of it is in this file.

A discriminator :math:`D(x \mid c)` sees an image next to its condition c, which is the measurement in the
space of images. It tells whether the image is a sample of :math:`p(x \mid y)`, not only whether it looks like
an image. The state is not part of the condition: over all states of a level, samples of
:math:`p(x \mid y, x_s)` follow :math:`p(x \mid y)`, as the true images do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from deepinv.loss import Loss
from deepinv.models import PatchGANDiscriminator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from deepinv_ud2m.checks import check_count, check_number
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.training.losses import WeightedLoss, as_samples


class Adversary:
    """
    The discriminator of a distillation, with its losses and its optimiser.

    :param torch.nn.Module D: discriminator, called as ``D(x, condition)``; it returns logits `[B, ...]` and
        judges the images of a batch separately, as :class:`ConditionalDiscriminator` does.
    :param Loss, list[Loss] losses: losses of the discriminator (default:
        :class:`AdversarialDiscriminatorLoss`).
    :param torch.optim.Optimizer optimizer: of the parameters of ``D`` (default: AdamW with learning rate 1e-4
        and weight decay 0.01, as in the paper's Table 9).
    :param int ratio: updates of the discriminator in each training step, at least 1 (default: 1).

    |sep|

    :Examples:

        >>> from deepinv_ud2m.training import AdversarialDiscriminatorLoss, Adversary
        >>> from deepinv_ud2m.training import ConditionalDiscriminator
        >>> losses = AdversarialDiscriminatorLoss(penalty_weight=0.1)
        >>> adversary = Adversary(ConditionalDiscriminator(channels=1), losses, ratio=2)
    """

    def __init__(
        self,
        D: nn.Module,
        losses: Loss | Sequence[Loss] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        ratio: int = 1,
    ):
        if not isinstance(D, nn.Module):
            raise TypeError(f"D must be a discriminator, a module, got {D!r}")
        losses = AdversarialDiscriminatorLoss() if losses is None else losses
        self.D, self.ratio = D, check_count("ratio", ratio)
        self.losses = list(losses) if isinstance(losses, list | tuple) else [losses]
        self.optimizer = optimizer or torch.optim.AdamW(D.parameters(), lr=1e-4, weight_decay=0.01)
        #: The :class:`deepinv_ud2m.training.updates.Update` of the discriminator, which the trainer sets.
        self.update: Any = None

    def context(self, problem: Problem) -> dict:
        """What the adversarial losses are called with besides: ``D`` and the ``condition``."""
        return {"D": self.D, "condition": condition(problem)}

    def step(self, step: int, batches: Sequence[dict], compute: Callable) -> dict[str, float]:
        """
        Update the discriminator ``ratio`` times, as long as losses and gradients are finite;
        ``update.finite`` tells whether they were.

        :param int step: number of the training step.
        :param Sequence[dict] batches: what losses are called with, without gradients.
        :param Callable compute: ``compute(losses, batch, turn)`` gives the mean loss of each of the losses.
        :returns: mean losses by name.
        """
        sums: dict[str, float] = defaultdict(float)
        for turn in range(self.ratio):
            self.update.start(step)
            for batch in batches:
                values = self.update.add(compute(self.losses, batch, turn))
                for loss, value in zip(self.losses, values, strict=True):
                    sums[f"D {type(loss).__name__}"] += value / len(batches) / self.ratio
            self.update.finish()
            if not self.update.finite:
                break
            self.update.apply()
        return dict(sums)

    def state_dict(self) -> dict:
        """What a checkpoint of the training holds of it."""
        return {"D": self.D.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load what :meth:`state_dict` returned."""
        self.D.load_state_dict(state["D"])
        self.optimizer.load_state_dict(state["optimizer"])

    def __repr__(self) -> str:
        return f"Adversary({type(self.D).__name__}, losses={self.losses}, ratio={self.ratio})"


class ConditionalDiscriminator(nn.Module):
    r"""
    deepinv's :class:`deepinv.models.PatchGANDiscriminator` on an image and its condition, side by side.

    Images may have any size. Each logit judges a window of :math:`9 \cdot 2^L - 2` pixels (16, 34, 70 for
    L = 1, 2, 3 layers of stride 2). Sides of n pixels give :math:`n / 2^L + 3` logits, if :math:`2^L` divides
    n. Convolutions have spectral normalisation (`Miyato et al., 2018 <https://arxiv.org/abs/1802.05957>`_).
    There is no batch normalisation, because the gradient penalty needs images that are judged separately.

    :param int channels: channels C of the images, and of the condition.
    :param int base_channels: channels after the first convolution; they double with each layer, up to eight
        times as many (default: 32).
    :param int num_layers: number L of convolutions of stride 2 (default: 3).
    :raises ValueError: if a number is not an integer >= 1.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training import ConditionalDiscriminator
        >>> D = ConditionalDiscriminator(channels=1, num_layers=2)
        >>> D(torch.rand(4, 1, 32, 32), torch.rand(4, 1, 32, 32)).shape
        torch.Size([4, 1, 11, 11])
    """

    def __init__(self, channels: int, base_channels: int = 32, num_layers: int = 3):
        super().__init__()
        self.channels = check_count("channels", channels)
        self.network = PatchGANDiscriminator(
            input_nc=2 * channels,
            ndf=check_count("base_channels", base_channels),
            n_layers=check_count("num_layers", num_layers),
            batch_norm=False,
        )
        for module in list(self.network.modules()):
            if isinstance(module, nn.Conv2d):
                parametrizations.spectral_norm(module)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """
        Judge images; large logits mean real.

        :param torch.Tensor x: images `[B, C, H, W]`, real ones in [0, 1].
        :param torch.Tensor condition: conditions, of the same shape, about in [0, 1].
        :returns: logits `[B, 1, h, w]`.
        :raises ValueError: if images and conditions do not fit.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be images [B, {self.channels}, H, W], got {list(x.shape)}")
        if condition.shape != x.shape:
            raise ValueError(f"condition must be {list(x.shape)}, as the images, got {list(condition.shape)}")
        # The images are centred: the zeros that the convolutions pad with stand for grey.
        return self.network(torch.cat([2 * x - 1, (2 * condition - 1).to(x.dtype)], 1))


class AdversarialGeneratorLoss(WeightedLoss):
    r"""
    Non-saturating adversarial loss of the samples (Goodfellow et al. 2014),

    .. math::
        \operatorname{softplus}(-D(\hat x \mid c)) = -\log \operatorname{sigmoid} D(\hat x \mid c) ,

    averaged over the logits of an image. Besides the arguments of :mod:`deepinv_ud2m.training.losses` it
    takes the discriminator ``D``, which stays as it is, and the ``condition``, see :func:`condition`. The
    trainer passes both.

    :param float weight: weight of this loss in a sum, finite and non-negative (default: 1).
    :raises TypeError, ValueError: for another weight.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training import AdversarialGeneratorLoss, ConditionalDiscriminator
        >>> x, x_net, condition = torch.rand(3, 2, 1, 32, 32)
        >>> loss = AdversarialGeneratorLoss()
        >>> loss(x=x, x_net=x_net, D=ConditionalDiscriminator(channels=1), condition=condition).shape
        torch.Size([2])
    """

    def forward(
        self,
        *,
        x: Tensor,
        x_net: Tensor,
        D: nn.Module,
        condition: Tensor,
        samples: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of ``samples``, or else of ``x_net``."""
        samples = as_samples(x, x_net, samples)
        return self.weight * F.softplus(-_judge(D, condition, frozen=True)(samples)).mean((0, 2))


class AdversarialDiscriminatorLoss(WeightedLoss):
    r"""
    Logistic loss of the discriminator, with a zero-centred gradient penalty of weight :math:`\lambda`,

    .. math::
        \operatorname{softplus}(-D(x \mid c)) + \operatorname{softplus}(D(\hat x \mid c))
        + \lambda\, \| \nabla_{\tilde x} D(\tilde x \mid c) \|_2^2 ,

    at random interpolates :math:`\tilde x = x + t (\hat x - x)`, t uniform in [0, 1]
    (`Thanh-Tung et al., 2019 <https://arxiv.org/abs/1902.03984>`_). The arguments are those of
    :class:`AdversarialGeneratorLoss`. No gradient reaches the samples.

    The paper has :math:`\lambda` = 0.01 (MNIST, LSUN) or 10 (ImageNet), for images in [-1, 1]. A gradient
    with respect to images in [0, 1] is twice as large, so the same penalties are 0.0025 and 2.5 here.

    :param float weight: weight of this loss in a sum, finite and non-negative (default: 1).
    :param float penalty_weight: :math:`\lambda`, finite and non-negative; 0 leaves the penalty out (default:
        0.01).
    :raises TypeError, ValueError: for other weights.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training import AdversarialDiscriminatorLoss, ConditionalDiscriminator
        >>> x, x_net, condition = torch.rand(3, 2, 1, 32, 32)
        >>> loss = AdversarialDiscriminatorLoss(penalty_weight=0.0025)
        >>> loss(x=x, x_net=x_net, D=ConditionalDiscriminator(channels=1), condition=condition).shape
        torch.Size([2])
    """

    def __init__(self, weight: float = 1.0, penalty_weight: float = 0.01):
        super().__init__(weight)
        self.penalty_weight = check_number("penalty_weight", penalty_weight, low=0)

    def forward(
        self,
        *,
        x: Tensor,
        x_net: Tensor,
        D: nn.Module,
        condition: Tensor,
        samples: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of ``samples``, or else of ``x_net``."""
        samples, judge = as_samples(x, x_net, samples).detach(), _judge(D, condition)
        real = x[None].to(samples)
        logits = judge(torch.cat([real, samples]))
        loss = F.softplus(-logits[0]).mean(1) + F.softplus(logits[1:]).mean((0, 2))
        if self.penalty_weight > 0:
            t = torch.rand(*samples.shape[:2], 1, 1, 1, dtype=samples.dtype, device=samples.device)
            loss = loss + self.penalty_weight * gradient_penalty(judge, torch.lerp(real, samples, t)).mean(0)
        return self.weight * loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, penalty_weight={self.penalty_weight:g}"


def gradient_penalty(D: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""
    Zero-centred gradient penalty, :math:`\| \nabla_x \sum_n D_n(x) \|_2^2 / N` for the N logits of an image,
    which does not depend on the size of the image.

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


@torch.no_grad()
def condition(problem: Problem) -> Tensor:
    r"""
    The measurement in the space of images,
    :math:`\operatorname{argmin}_x \|Ax - y\|^2 / (2\sigma_y^2) + \|x - 1/2\|^2 / (2 \tau^2)` with
    :math:`\tau = 1/2`. It stops inverting where the noise takes over. The pseudo-inverse of the paper
    amplifies the noise: after a Gaussian blur it has next to no correlation with x.

    :param deepinv_ud2m.Problem problem: the problem.
    :returns: conditions `[B, C, H, W]`, clamped to [-1, 2], without gradient.
    """
    middle = torch.full_like(problem.adjoint, 0.5)
    return problem.prox(middle, 0.5**2 / problem.sigma_y**2).clamp(-1, 2)


def _judge(D: nn.Module, condition: Tensor, frozen: bool = False) -> Callable[[Tensor], Tensor]:
    """Logits `[N, B, M]` of images `[N, B, C, H, W]`, each with the condition of its measurement."""
    constants = {name: parameter.detach() for name, parameter in D.named_parameters()}
    constants |= {name: buffer.clone() for name, buffer in D.named_buffers()}  # of spectral normalisation

    def judge(images: Tensor) -> Tensor:
        seen = images.flatten(0, 1), condition.repeat(len(images), 1, 1, 1)
        logits = functional_call(D, constants, seen) if frozen else D(*seen)
        return logits.reshape(*images.shape[:2], -1)

    return judge
