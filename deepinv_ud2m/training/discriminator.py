r"""The discriminator of distillation: does an image go with a measurement?

It sees the measurement brought into the space of images, :math:`c(y)`, next to the image, so that it
judges samples of :math:`p(x \mid y)` and not only whether they look like images at all.
"""

from __future__ import annotations

import torch
from deepinv.models import PatchGANDiscriminator
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.proximal import Scalar, expand_scalar


class ConditionalDiscriminator(nn.Module):
    r"""
    Discriminator :math:`D(x \mid c)` of patches: deepinv's
    :class:`deepinv.models.PatchGANDiscriminator` on the image and its condition, side by side.

    L = ``num_layers`` convolutions of stride 2 and two of stride 1, all 4 wide, with leaky ReLUs. It is
    fully convolutional: images may have any size, and each logit judges a window of
    :math:`9 \cdot 2^L - 2` pixels (16, 34, 70 for L = 1, 2, 3). Sides of n pixels give
    :math:`\lfloor n / 2^L \rfloor + 3` logits, if :math:`2^L` divides n.

    It returns **logits**; there is no sigmoid. Convolutions have spectral normalisation (`Miyato et
    al., 2018 <https://arxiv.org/abs/1802.05957>`_) and there is no batch normalisation, so that images
    of a batch are judged separately, as the gradient penalty requires. As in every network with
    spectral normalisation, a call in training mode also improves the estimates of the norms.

    :param int channels: channels C of the images.
    :param int condition_channels: channels of the condition (default: those of the images).
    :param int base_channels: channels after the first convolution; they double with each layer, up to
        eight times as many (default: 32).
    :param int num_layers: number L of convolutions of stride 2 (default: 3).
    :param bool noise_level: also see the level s of the state that the image was drawn from, as a
        channel :math:`\log(s) / 4` (default: ``False``).
    :param bool spectral_norm: normalise the convolutions (default: ``True``).
    :raises ValueError: if a number is not an integer >= 1.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.training.discriminator import ConditionalDiscriminator
        >>> D = ConditionalDiscriminator(channels=1, num_layers=2)
        >>> D(torch.rand(4, 1, 32, 32), torch.rand(4, 1, 32, 32)).shape
        torch.Size([4, 1, 11, 11])
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int | None = None,
        base_channels: int = 32,
        num_layers: int = 3,
        *,
        noise_level: bool = False,
        spectral_norm: bool = True,
    ):
        super().__init__()
        self.channels = check_count("channels", channels)
        if condition_channels is None:
            condition_channels = channels
        self.condition_channels = check_count("condition_channels", condition_channels)
        self.noise_level = noise_level
        self.network = PatchGANDiscriminator(
            input_nc=self.channels + self.condition_channels + int(noise_level),
            ndf=check_count("base_channels", base_channels),
            n_layers=check_count("num_layers", num_layers),
            batch_norm=False,
        )
        if spectral_norm:
            for module in list(self.network.modules()):
                if isinstance(module, nn.Conv2d):
                    parametrizations.spectral_norm(module)

    def forward(self, x: Tensor, condition: Tensor, sigma: Scalar | None = None) -> Tensor:
        r"""
        Judge images; large logits mean real.

        :param torch.Tensor x: images `[B, C, H, W]`, real ones in [0, 1].
        :param torch.Tensor condition: conditions `[B, condition_channels, H, W]`, about in [0, 1].
        :param float, torch.Tensor sigma: levels s, a scalar, `[B]` or `[B, 1, 1, 1]`, positive. Needed
            if the discriminator was built with ``noise_level=True``; otherwise it is not looked at.
        :returns: logits `[B, 1, h, w]`.
        :raises ValueError: if images and condition do not fit, or ``sigma`` is missing.
        """
        self._check(x, condition)
        # The images are centred; what was grey is like the zeros that the convolutions pad with.
        inputs = [2 * x - 1, (2 * condition - 1).to(x.dtype)]
        if self.noise_level:
            if sigma is None:
                raise ValueError("sigma is needed: the discriminator was built with noise_level=True")
            level = expand_scalar(sigma, x, "sigma").log() / 4
            inputs.append(level.expand(-1, 1, *x.shape[2:]))
        return self.network(torch.cat(inputs, 1))

    def _check(self, x: Tensor, condition: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be images [B, {self.channels}, H, W], got {list(x.shape)}")
        expected = [len(x), self.condition_channels, *x.shape[2:]]
        if list(condition.shape) != expected:
            raise ValueError(
                f"condition must be {expected} for images {list(x.shape)}, got {list(condition.shape)}"
            )
