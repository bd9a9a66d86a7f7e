r"""Does one image look like another? Distances between activations of a network."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from deepinv.loss.metric import Metric
from torch import Tensor, nn

from deepinv_ud2m.metrics.features import DigitClassifier, EfficientNetLite, check_images


class PerceptualDistance(Metric):
    r"""
    Perceptual distance between two images.

    It compares the activations :math:`\phi_\ell` of the layers of a network, divided in each pixel by
    their norm over channels:

    .. math::

        d(\hat x, x) = \frac{1}{L} \sum_{\ell=1}^{L} \frac{1}{H_\ell W_\ell} \sum_{h, w}
        \left\| \hat\phi_\ell(\hat x)_{hw} - \hat\phi_\ell(x)_{hw} \right\|_2^2 ,
        \qquad \hat\phi = \frac{\phi}{\sqrt{\|\phi\|_2^2 + 10^{-6}}} .

    This is LPIPS (`Zhang et al., 2018 <https://arxiv.org/abs/1801.03924>`_) **without its weights**, which
    are learned from human judgements. Only the networks "lpips..." are LPIPS itself, which weights the
    channels and adds the layers up. Lower is better. The distance is 0 for equal images and, without learned
    weights, at most 4. Distances of different networks are not comparable: the attribute ``network`` names
    the network that was used, for reports.

    ==================== ========== =========================================== =================
    ``network``          images     activations                                 needs
    ==================== ========== =========================================== =================
    "digits"             1x32x32    three of :class:`DigitClassifier`           nothing, shipped
    "efficientnet"       3xHxW      five of :class:`EfficientNetLite` 0, at     two packages
                                    224x224
    "efficientnet-lite2" 3xHxW      five of :class:`EfficientNetLite` 2, at     two packages
                                    260x260
    "lpips-alex"         3xHxW,     five of AlexNet; "lpips" is the same        a download of the
    "lpips-vgg"          H, W >= 32 five of VGG16                               weights of the
    "lpips-squeeze"                 seven of SqueezeNet 1.1                     network
    ==================== ========== =========================================== =================

    Images are expected in [0, 1]. Others are compared as they are; ``norm_inputs="clip"`` clips them.
    Parameters are frozen and always in evaluation mode. Gradients reach the images.

    :param str, torch.nn.Module network: one of the table (default: ``"digits"``), or a network of your
        own whose method ``activations(x)`` gives a list of maps `[B, D, h, w]`.
    :param bool download: allow LPIPS to fetch the weights of its network (AlexNet 233 MB, VGG16 528 MB,
        SqueezeNet 5 MB), if they are not in the cache of torch.hub (default: ``False``).
    :param bool random: random weights for the backbone of LPIPS, for tests and trials: nothing is
        downloaded, and the distance means nothing (default: ``False``).
    :param str, torch.device device: where the network is (default: the CPU).
    :param kwargs: of :class:`deepinv.loss.metric.Metric`, such as ``reduction`` and ``center_crop``.
    :raises ValueError: for an unknown network, or one without ``activations``.
    :raises ImportError: if the packages of the network are missing; it names them.
    :raises RuntimeError: if weights would have to be downloaded and ``download`` is ``False``, or the
        download fails; it says from where, how large, and to where.

    :Examples:

    >>> from deepinv_ud2m.data import mnist_digits
    >>> from deepinv_ud2m.metrics import PerceptualDistance
    >>> x = mnist_digits(num=2)
    >>> metric = PerceptualDistance("digits")
    >>> metric(x, x)
    tensor([0., 0.])
    """

    def __init__(
        self,
        network: str | nn.Module = "digits",
        *,
        download: bool = False,
        random: bool = False,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if isinstance(network, nn.Module):
            if not callable(getattr(network, "activations", None)):
                raise ValueError(
                    "network must have a method activations(x) that gives its maps; "
                    f"{type(network).__name__} has none"
                )
            self.distance: Any = _FeatureDistance(network)
            self.network = f"{type(network).__name__}, unweighted"
        elif network == "digits":
            self.distance = _FeatureDistance(DigitClassifier.from_pretrained())
            self.network = "DigitClassifier (deepinv_ud2m mnist-classifier), unweighted"
        elif network in EFFICIENTNETS:
            backbone = EfficientNetLite(EFFICIENTNETS[network])
            self.distance = _FeatureDistance(backbone)
            self.network = f"{backbone.name}, unweighted"
        elif network in _LPIPS.BACKBONES:
            self.distance = _LPIPS(network, download, random)
            weights = "random backbone" if random else "v0.1"
            self.network = f"LPIPS {self.distance.name} {weights} (lpips {version('lpips')})"
        else:
            known = ("digits", *EFFICIENTNETS, *_LPIPS.BACKBONES)
            raise ValueError(f"network must be one of {known} or a module, got {network!r}")
        self.eval().requires_grad_(False).to(device)
        self.lower_better = True

    def train(self, mode: bool = True) -> PerceptualDistance:
        """The network stays in evaluation mode."""
        return super().train(False)

    def metric(self, x_net: Tensor, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Distances `[B]` of images and references of one shape `[B, C, H, W]`; NaN without reference."""
        if x is None:
            return torch.full((len(x_net),), torch.nan)
        if x_net.shape != x.shape:
            raise ValueError(f"x_net and x must be of one shape, got {list(x_net.shape)} and {list(x.shape)}")
        like = next(self.parameters(), x)
        return self.distance(x_net.to(like), x.to(like))

    def embedding(self, x: Tensor) -> Tensor:
        r"""
        Vectors `[B, D]` of images, whose squared Euclidean distance is this distance:
        :math:`\hat\phi_\ell / \sqrt{L H_\ell W_\ell}` of all layers. As ``features`` of a
        :class:`deepinv_ud2m.training.EnergyScoreLoss` they give a proper score.

        :raises NotImplementedError: for LPIPS, whose package gives distances only.
        """
        if not isinstance(self.distance, _FeatureDistance):
            raise NotImplementedError(f"there is no embedding for {self.network}")
        return self.distance.embedding(x.to(next(self.parameters())))


#: Variant by name.
EFFICIENTNETS = {"efficientnet": 0, "efficientnet-lite2": 2}


class _FeatureDistance(nn.Module):
    backbone: Any  # a network with activations()

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x_net: Tensor, x: Tensor) -> Tensor:
        return (self.embedding(x_net) - self.embedding(x)).square().sum(1)

    def embedding(self, x: Tensor) -> Tensor:
        maps = self.backbone.activations(x)
        parts = []
        for a in maps:
            # The constant is under the root, whose gradient at zero is infinite.
            normalized = a / (a.square().sum(1, keepdim=True) + 1e-6).sqrt()
            parts.append(normalized.flatten(1) / (len(maps) * a.shape[-2] * a.shape[-1]) ** 0.5)
        return torch.cat(parts, 1)


class _LPIPS(nn.Module):
    #: Name in the package lpips, name in torchvision, its name in messages.
    BACKBONES: ClassVar = {
        "lpips": ("alex", "AlexNet_Weights", "AlexNet"),
        "lpips-alex": ("alex", "AlexNet_Weights", "AlexNet"),
        "lpips-vgg": ("vgg", "VGG16_Weights", "VGG16"),
        "lpips-squeeze": ("squeeze", "SqueezeNet1_1_Weights", "SqueezeNet 1.1"),
    }

    def __init__(self, network: str, download: bool, random: bool):
        super().__init__()
        import lpips
        import torchvision

        net, weights, self.name = self.BACKBONES[network]
        weights = getattr(torchvision.models, weights).IMAGENET1K_V1
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        size = f"{weights.meta['_file_size']:.0f} MB"
        begins = file.stem.rpartition("-")[2]  # torchvision names its files by it
        needs = f"LPIPS needs the weights of {self.name}, {size}, sha256 {begins}..., from {weights.url}"
        instead = (
            f"put the file at {file}. Without it, use "
            'network="efficientnet", whose weights are a package, or "digits" for digits.'
        )
        if not (download or random or file.is_file()):
            raise RuntimeError(f"{needs}: pass download=True, or {instead}")
        with warnings.catch_warnings():
            # lpips asks torchvision for its weights in a deprecated way.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            try:
                self.network = lpips.LPIPS(net=net, pnet_rand=random, verbose=False)
            except OSError as error:
                raise RuntimeError(f"{needs}, which failed ({error}): {instead}") from error

    def forward(self, x_net: Tensor, x: Tensor) -> Tensor:
        check_images(x, (3, None, None), "colour images")
        if min(x.shape[2:]) < 32:
            raise ValueError(f"LPIPS needs images of at least 32 x 32 pixels, got {list(x.shape)}")
        return self.network(x_net, x, normalize=True).flatten()
