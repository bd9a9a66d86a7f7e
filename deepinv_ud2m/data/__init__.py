r"""Images: MNIST digits, two photographs, and readers for any others (:func:`load_images`).

Digits are float tensors `[N, 1, 32, 32]` in [0, 1]. The original :math:`28 \times 28` digits are
zero-padded by 2 pixels on each side, so that networks can halve them five times. Their background is
exactly black, so no edge appears.

Some digits ship with the package (see ``LICENSES.md`` next to this file), enough for tests, examples and
benchmarks without the internet. Training needs all of MNIST, from a file (:func:`mnist_arrays`) or from
the internet (:func:`load_mnist`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepinv_ud2m.data.crops import RandomCrops, ResizedCrops
from deepinv_ud2m.data.images import load_image, load_images

__all__ = [
    "RandomCrops",
    "ResizedCrops",
    "load_image",
    "load_images",
    "load_mnist",
    "mnist_arrays",
    "mnist_digits",
    "photograph",
]

_SHIPPED = Path(__file__).parent / "mnist_digits.npz"
_PHOTOGRAPHS = Path(__file__).parent / "photos"
_SPLITS = ("test", "validation")


@overload
def mnist_digits(
    split: str = "test", num: int | None = None, *, labels: Literal[False] = False
) -> Tensor: ...


@overload
def mnist_digits(
    split: str = "test", num: int | None = None, *, labels: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def mnist_digits(
    split: str = "test", num: int | None = None, *, labels: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""
    The MNIST digits shipped with the package; nothing is downloaded.

    Both splits come from the 10 000 digits of the MNIST *test* set, so no network trained on the MNIST
    training set has seen them. ``"test"`` holds the first 1000 digits, ``"validation"`` the last 256.

    :param str split: ``"test"`` or ``"validation"`` (default: ``"test"``).
    :param int, None num: how many digits, from the first (default: all of the split).
    :param bool labels: also return the labels (default: ``False``).
    :return: images `[N, 1, 32, 32]`, float32 in [0, 1]; with ``labels=True`` a tuple of the images and
        the labels `[N]` (int64, 0 to 9).
    :raises ValueError: for another split, or more digits than it has.

    :Examples:

    >>> from deepinv_ud2m.data import mnist_digits
    >>> mnist_digits("validation", num=4).shape
    torch.Size([4, 1, 32, 32])
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {_SPLITS}, got {split!r}")
    with np.load(_SHIPPED, allow_pickle=False) as arrays:
        x, y = arrays[f"{split}_x"], arrays[f"{split}_y"]
    if num is not None:
        # Fewer digits than asked for would silently change an experiment.
        if not 0 < num <= len(x):
            raise ValueError(f"num must be between 1 and {len(x)} for split {split!r}, got {num}")
        x, y = x[:num], y[:num]
    images, targets = _to_tensors(x, y)
    return (images, targets) if labels else images


def photograph(name: str) -> Tensor:
    r"""
    A colour photograph shipped with the package.

    :param str name: ``"astronaut"`` or ``"chelsea"``.
    :return: image `[1, 3, 256, 256]`, float32 in [0, 1].
    :raises ValueError: for another name.
    """
    names = sorted(file.stem for file in _PHOTOGRAPHS.glob("*.png"))
    if name not in names:
        raise ValueError(f"name must be one of {names}, got {name!r}")
    return load_image(_PHOTOGRAPHS / f"{name}.png", 3)


def mnist_arrays(path: str | Path) -> tuple[Tensor, Tensor]:
    r"""
    Read MNIST, or a part of it, from an ``.npz`` file.

    :param str, pathlib.Path path: file with the arrays ``x``, uint8 ``(N, 28, 28)``, and ``y``, the
        N integer labels.
    :return: images `[N, 1, 32, 32]`, float32 in [0, 1], and labels `[N]` (int64, 0 to 9).
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file does not hold these arrays.
    """
    path = Path(path)
    expected = "expected an .npz file with the arrays x, uint8 (N, 28, 28), and y, integer (N,)"
    if not path.is_file():
        raise FileNotFoundError(f"there is no MNIST file {path}: {expected}")
    try:
        # Object arrays would need pickle.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    # NumPy raises errors of many types for what is no archive, or a damaged one.
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}): {expected}") from error
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1:] != (28, 28):
        raise ValueError(f"x in {path} is {x.dtype} {x.shape}: {expected}")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
        raise ValueError(f"y in {path} is {y.dtype} {y.shape} for {len(x)} digits: {expected}")
    if len(x) == 0 or y.min() < 0 or y.max() > 9:
        raise ValueError(f"{path} must hold at least one digit, and labels from 0 to 9")
    return _to_tensors(x, y)


def load_mnist(root: str | Path, train: bool, *, npz: str | Path | None = None) -> tuple[Tensor, Tensor]:
    r"""
    All of MNIST: the 60 000 training digits or the 10 000 test digits.

    Without ``npz``, this is :class:`torchvision.datasets.MNIST` with ``download=True``. Unless they are
    already in ``root/MNIST/raw``, torchvision **downloads** the four files of MNIST (both splits, 11.6 MB
    compressed, 66 MB on disk) from ``https://ossci-datasets.s3.amazonaws.com/mnist/`` or, failing that,
    ``http://yann.lecun.com/exdb/mnist/``, and checks their MD5 sums. With ``npz`` nothing is downloaded.

    :param str, pathlib.Path root: folder of the dataset, as in torchvision; not used with ``npz``.
    :param bool train: training digits if ``True``, test digits if ``False``; not used with ``npz``.
    :param str, pathlib.Path npz: read this file instead, see :func:`mnist_arrays`.
    :return: images `[N, 1, 32, 32]`, float32 in [0, 1], and labels `[N]` (int64, 0 to 9).
    :raises RuntimeError: if MNIST is not there and cannot be downloaded.
    """
    if npz is not None:
        return mnist_arrays(npz)
    # Imported here: reading the shipped digits needs nothing of torchvision.
    from torchvision.datasets import MNIST

    try:
        dataset = MNIST(str(root), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"MNIST is not in {root} and could not be downloaded. Put its four raw files in "
            f"{Path(root) / 'MNIST' / 'raw'}, or give an .npz file with npz=..."
        ) from error
    return _to_tensors(dataset.data.numpy(), dataset.targets.numpy())


def _to_tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    # Pad while the digits are still bytes: the whole training set costs 245 MB as floats.
    images = F.pad(torch.tensor(x).unsqueeze(1), (2, 2, 2, 2))
    return images.to(torch.float32).div_(255), torch.tensor(y, dtype=torch.int64)
