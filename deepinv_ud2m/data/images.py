r"""Images from a folder, a file, or a dataset of deepinv or of one's own, as one tensor.

An image that cannot be used is an error that names it: to skip, stretch or pad it in silence would change
an experiment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepinv as dinv
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from deepinv_ud2m.checks import check_count, check_path

#: Files of a folder with these endings, in any case, are images.
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_images(
    source: str | Path | Dataset,
    channels: int,
    size: int,
    num: int | None = None,
    multiple: int = 1,
    root: str | Path | None = None,
    skip_small: bool = False,
) -> Tensor:
    r"""
    Images as one tensor: centre crops of one size, with one number of channels, in [0, 1].

    RGB becomes grey as by PIL's mode "L" (luma of ITU-R 601-2), without the rounding to bytes. Grey
    becomes RGB by repetition. Alpha is dropped, the EXIF orientation is applied, and 16-bit grey images
    keep their 16 bits.

    :param str, pathlib.Path, torch.utils.data.Dataset source: one of

        - a folder: its images in the order of their names, without those of subfolders. Images are the
          files with an ending of :data:`EXTENSIONS`;
        - an image file;
        - the name of a dataset of :mod:`deepinv.datasets`, such as ``"Set14HR"``. Unless it is in
          ``root`` already, deepinv **downloads** it; its documentation says from where, and how large it
          is. A folder or file of that name comes first;
        - a dataset whose items are images, tuples that begin with one, or dictionaries with one under
          ``"x"``. An image is of PIL, or a tensor `[C, H, W]` or `[H, W]`, uint8 or floating in [0, 1].
    :param int channels: channels C of the result, 1 or 3.
    :param int size: side of the centre crop.
    :param int, None num: how many images, from the first (default: all).
    :param int multiple: the side must be a multiple of it, such as the ``size_multiple`` of a prior
        (default: 1).
    :param str, pathlib.Path, None root: folder of a dataset given by name (default: deepinv's cache).
    :param bool skip_small: leave out images that are smaller than the crop, instead of an error; ``num``
        counts those that are left (default: ``False``).
    :return: images `[N, C, size, size]`, float32.
    :raises ValueError: for a source that does not exist or has no images, fewer images than ``num``,
        an image that is unreadable or smaller than the crop, or arguments that are out of range.
    :raises TypeError: for a source of another type.

    :Examples:

    >>> import torch
    >>> from deepinv_ud2m.data import load_images
    >>> load_images(torch.utils.data.StackDataset(torch.rand(4, 3, 40, 48)), channels=1, size=32).shape
    torch.Size([4, 1, 32, 32])
    """
    check_channels(channels)
    check_count("size", size)
    if size % check_count("multiple", multiple):
        raise ValueError(f"size must be a multiple of {multiple}, got {size}")
    if num is not None:
        check_count("num", num)
    images = open_images(source, root)
    if num is not None and num > len(images.labels):
        raise ValueError(f"num must be at most {len(images.labels)}, the images of {images}, got {num}")
    crops: list[Tensor] = []
    for i in range(len(images.labels)):
        if len(crops) == num:
            break
        try:
            crops.append(images.image(i, channels, size))
        except _TooSmall:
            if not skip_small:
                raise
    if not crops or (num is not None and len(crops) < num):
        raise ValueError(
            f"{images} has {len(crops)} images of at least {size}x{size} pixels, {num or 1} asked for"
        )
    return torch.stack(crops)


def load_image(file: str | Path, channels: int = 3) -> Tensor:
    """
    An image file as a tensor, whole, with the conversions of :func:`load_images`.

    :param str, pathlib.Path file: the file.
    :param int channels: channels C of the result, 1 or 3 (default: 3).
    :return: the image `[1, C, H, W]` in [0, 1], float32.
    :raises ValueError: if it does not exist or cannot be read as an image.
    """
    check_channels(channels)
    if not check_path("file", file).is_file():
        raise ValueError(f"file must be an image file, but there is no {str(file)!r}")
    return _open_files(str(file), [Path(file)]).image(0, channels)[None]


def check_channels(channels: int) -> None:
    """
    :param int channels: number of channels.
    :raises ValueError: if it is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels!r}")


class _TooSmall(ValueError):
    """An image has no room for the crop."""


@dataclass(frozen=True)
class Images:
    """
    A source of images.

    :param str name: name of the source, for messages.
    :param Sequence[str] labels: name of each image, for messages.
    :param Callable read: gives the item of an index.
    """

    name: str
    labels: Sequence[str]
    read: Callable[[int], Any]

    def __str__(self) -> str:
        return self.name

    def image(self, index: int, channels: int, size: int | None = None) -> Tensor:
        """
        One image `[C, H, W]` in [0, 1], as :func:`load_images` converts it.

        :param int index: which.
        :param int channels: channels C, 1 or 3.
        :param int, None size: side of its centre crop (default: the whole image).
        :raises ValueError: if it cannot be read, is smaller than the crop, or has other values.
        """
        label = self.labels[index]
        try:
            image = _image_of(self.read(index))
        # Of a damaged file, PIL raises what its decoder happens to meet (SyntaxError, struct.error, ...).
        except Exception as error:
            raise ValueError(f"{label} cannot be read as an image: {error}") from error
        height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
        if size is not None and min(height, width) < size:
            raise _TooSmall(f"{label} is {height}x{width} pixels, but the crops are {size}x{size}")
        rows, columns = (height, width) if size is None else (size, size)
        top, left = (height - rows) // 2, (width - columns) // 2
        try:
            if isinstance(image, Tensor):
                values = _from_tensor(image[..., top : top + rows, left : left + columns])
            else:
                values = _from_pil(image.crop((left, top, left + columns, top + rows)))
        except (ValueError, OSError) as error:
            raise ValueError(f"{label} cannot be used: {error}") from error
        if len(values) == channels:
            return values
        if channels == 3:
            return values.expand(3, -1, -1)
        return (_LUMA[:, None, None] * values).sum(0, keepdim=True)


def open_images(source: str | Path | Dataset, root: str | Path | None = None, nested: bool = False) -> Images:
    """
    :param str, pathlib.Path, torch.utils.data.Dataset source: see :func:`load_images`.
    :param str, pathlib.Path, None root: see :func:`load_images`.
    :param bool nested: also the images in subfolders of a folder (default: ``False``).
    :raises ValueError, TypeError: see :func:`load_images`.
    """
    if not isinstance(source, str | Path):
        return _open_dataset(source, type(source).__name__)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, nested)
    if path.is_file():
        return _open_files(str(path), [path])
    known = _deepinv_datasets()
    if str(source) in known:
        return _download(known[str(source)], root)
    raise ValueError(
        "source must be a folder of images, an image file, or the name of a deepinv dataset, one of "
        f"{sorted(known)}; there is no {str(source)!r}"
    )


def _open_folder(folder: Path, nested: bool = False) -> Images:
    # Not through deepinv's ImageFolder: it descends into subfolders, in the order of the file system,
    # knows lower-case endings only, and reads 16 bits as 8 and photographs without their orientation.
    found = folder.rglob("*") if nested else folder.iterdir()
    files = [file for file in found if file.suffix.lower() in EXTENSIONS]
    # A link to a file that is missing stays: it is an error when it is read.
    files = sorted(file for file in files if not file.name.startswith(".") and not file.is_dir())
    if not files:
        raise ValueError(
            f"source must be a folder of images, but {folder} itself has no file that ends with one of "
            f"{', '.join(EXTENSIONS)}"
        )
    return _open_files(str(folder), files)


def _open_files(name: str, files: list[Path]) -> Images:
    return Images(name, [str(file) for file in files], lambda i: _read_file(files[i]))


def _read_file(file: Path) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image.copy()


def _deepinv_datasets() -> dict[str, type]:
    """Datasets that deepinv downloads, by name."""
    classes = inspect.getmembers(dinv.datasets, inspect.isclass)
    return {
        name: kind
        for name, kind in classes
        if issubclass(kind, Dataset) and {"root", "download"} <= inspect.signature(kind).parameters.keys()
    }


def _download(kind: type, root: str | Path | None) -> Images:
    where = "deepinv's cache" if root is None else str(root)
    try:
        dataset = kind(root=None if root is None else str(root), download=True)
    # Each dataset has errors of its own: no network, a damaged archive, a package that is missing.
    except Exception as error:
        raise ValueError(
            f"the dataset {kind.__name__} is not in {where} and could not be downloaded: {error}"
        ) from error
    # deepinv lists files in the order of the file system, which differs between machines.
    if isinstance(dataset, dinv.datasets.ImageFolder) and dataset.y_paths is None:
        dataset.x_paths = sorted(dataset.x_paths)
    return _open_dataset(dataset, kind.__name__)


def _open_dataset(dataset: Dataset, name: str) -> Images:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            "source must be a path, the name of a deepinv dataset, or a dataset with a length whose "
            f"items have an index, got {name}"
        )
    if len(dataset) == 0:
        raise ValueError(f"source must have at least one image, but the dataset {name} is empty")
    labels = [f"item {i} of {name}" for i in range(len(dataset))]
    if isinstance(dataset, dinv.datasets.ImageFolder) and dataset.x_paths is not None:
        labels = [str(path) for path in dataset.x_paths]
    return Images(name, labels, dataset.__getitem__)


def _image_of(item: Any) -> Tensor | Image.Image:
    """The image of an item of a dataset."""
    if isinstance(item, Mapping):
        if "x" not in item:
            raise ValueError(f'as a dictionary it must have the key "x", got {sorted(map(str, item))}')
        item = item["x"]
    elif isinstance(item, tuple | list):
        item = item[0]
    if isinstance(item, Image.Image):
        return ImageOps.exif_transpose(item)
    if not isinstance(item, Tensor):
        raise ValueError(f"it must be an image of PIL or a tensor, got {type(item).__name__}")
    if item.ndim not in (2, 3):
        raise ValueError(f"it must be a tensor [C, H, W] or [H, W], got {list(item.shape)}")
    return item


def _from_pil(image: Image.Image) -> Tensor:
    """Values in [0, 1], of shape `[C, H, W]` with 1 or 3 channels."""
    if image.mode == "F":
        return _from_tensor(torch.from_numpy(np.array(image)))
    if image.mode.startswith("I"):  # integers of more than 8 bits
        values = np.array(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"it has values from {values.min():.0f} to {values.max():.0f}: more than 16 bits"
            )
        return _from_tensor(torch.from_numpy(values / 65535))
    if image.mode in ("1", "L", "LA"):
        return _from_bytes(image.convert("L"))[None]
    if image.mode == "P":  # through RGBA, or PIL warns about transparent colours
        image = image.convert("RGBA")
    return _from_bytes(image.convert("RGB")).permute(2, 0, 1)


def _from_bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).float() / 255


def _from_tensor(image: Tensor) -> Tensor:
    """Values in [0, 1], of shape `[C, H, W]` with 1 or 3 channels."""
    image = image.detach().cpu()
    image = image[None] if image.ndim == 2 else image
    if image.shape[0] not in (1, 3, 4):
        raise ValueError(f"it must have 1, 3 or (with alpha) 4 channels, got shape {list(image.shape)}")
    image = image[:3]
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise ValueError(f"it must be uint8 or floating in [0, 1], got {image.dtype}")
    if not ((image > -_ROUNDING) & (image < 1 + _ROUNDING)).all():
        low, high = image.min().item(), image.max().item()
        raise ValueError(f"floating values must be in [0, 1], got {low:.4g} to {high:.4g}")
    return image.float().clamp(0, 1)


_LUMA = torch.tensor([0.299, 0.587, 0.114])

#: Floating values may leave [0, 1] by this much, by rounding.
_ROUNDING = 1e-5
