"""Random crops of a folder of photographs: at random scales from memory, or of reduced images from files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.data.images import check_channels, open_images

_T = TypeVar("_T")


class RandomCrops(Dataset):
    r"""
    Endless crops of photographs, drawn anew each time an item is asked for.

    A photograph is drawn with a probability proportional to the square root of its area. Then a scale r
    is drawn, log-uniform from 1 to ``max_scale``, or to the largest for which the photograph has room. A
    random square of side ``r * size`` is reduced to ``size`` with antialiasing, mirrored or not, and
    turned by a random multiple of 90 degrees.

    The index of an item has no effect. All is drawn from PyTorch's global generator, so a seeded run
    repeats. The photographs are kept in memory, as bytes.

    :param str, pathlib.Path folder: folder of images.
    :param int size: side of the crops.
    :param int num: length of the dataset, the crops of an epoch.
    :param int channels: 1 or 3 (default: 3).
    :param float max_scale: largest reduction, at least 1 (default: 4).
    :param bool skip_small: leave out photographs that are smaller than a crop (default: ``False``, refuse).
    :param bool verbose: show a progress bar while reading (default: ``False``).
    :raises ValueError: for a folder without images, an image that cannot be read, or is smaller than a
        crop, or numbers out of range.

    |sep|

    :Examples:

        >>> import tempfile
        >>> from torchvision.utils import save_image
        >>> from deepinv_ud2m.data import RandomCrops, photograph
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_image(photograph("chelsea"), f"{folder}/photo.png")
        ...     crops = RandomCrops(folder, size=32, num=100)
        >>> len(crops), crops[0].shape
        (100, torch.Size([3, 32, 32]))
    """

    def __init__(
        self,
        folder: str | Path,
        size: int,
        num: int,
        channels: int = 3,
        max_scale: float = 4.0,
        skip_small: bool = False,
        verbose: bool = False,
    ):
        self.size, self.num = check_count("size", size), check_count("num", num)
        check_channels(channels)
        if not 1 <= max_scale < math.inf:
            raise ValueError(f"max_scale must be at least 1, got {max_scale}")
        self.max_scale = max_scale
        files, self.photographs, self.labels = open_images(folder), [], []
        for i, label in enumerate(tqdm(files.labels, desc="photographs", disable=not verbose)):
            image = files.image(i, channels)
            height, width = image.shape[-2:]
            if min(height, width) < size:
                if skip_small:
                    continue
                raise ValueError(f"{label} is {height}x{width} pixels, but the crops are {size}x{size}")
            self.photographs.append((255 * image).round().byte().contiguous())
            self.labels.append(label)
        if not self.photographs:
            raise ValueError(f"no photograph in {folder} has sides of {size} pixels, those of the crops")
        areas = [photograph[0].numel() for photograph in self.photographs]
        self.weights = torch.tensor(areas, dtype=torch.float32).sqrt()

    def hold_out(self, num: int | Sequence[str]) -> Tensor:
        """
        Take photographs out, and return the largest squares in their centres, reduced to crops by up to
        ``max_scale``.

        :param int, list num: number of photographs, the last ones, below those there are; or some of
            ``labels``, the names of the photographs.
        :returns: images `[num, C, size, size]` in [0, 1].
        :raises ValueError: for another number, or labels that there are not.
        """
        held, kept = _places(num, self.labels)
        squares = []
        for photograph in _of(self.photographs, held):
            height, width = photograph.shape[-2:]
            side = min(height, width, round(self.max_scale * self.size))
            top, left = (height - side) // 2, (width - side) // 2
            square = photograph[None, :, top : top + side, left : left + side].float() / 255
            squares.append(F.interpolate(square, (self.size, self.size), mode="bilinear", antialias=True))
        self.photographs, self.labels = _of(self.photographs, kept), _of(self.labels, kept)
        self.weights = self.weights[kept]
        return torch.cat(squares)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        """A crop `[C, size, size]` in [0, 1], whatever the index."""
        if not 0 <= index < self.num:
            raise IndexError(index)  # ends a loop over the dataset
        photograph = self.photographs[int(torch.multinomial(self.weights, 1))]
        height, width = photograph.shape[-2:]
        u, v, w = torch.rand(3).tolist()
        room = min(self.max_scale, min(height, width) / self.size)
        side = round(self.size * room**u)
        top, left = int(v * (height - side + 1)), int(w * (width - side + 1))
        crop = photograph[None, :, top : top + side, left : left + side].float() / 255
        if side > self.size:
            crop = F.interpolate(crop, size=(self.size, self.size), mode="bilinear", antialias=True)
        flip, turns = int(torch.randint(2, (1,))), int(torch.randint(4, (1,)))
        crop = crop.flip(-1) if flip else crop
        return torch.rot90(crop[0], turns, (-2, -1)).contiguous()


class ResizedCrops(Dataset):
    r"""
    Random crops of images that are reduced until their shorter side is that of the crops, mirrored or not:
    the usual data of networks for ImageNet and LSUN. Files are read when they are needed.

    The index of an item has no effect. All is drawn from PyTorch's global generator, so a seeded run repeats.

    :param str, pathlib.Path folder: folder of images, subfolders included.
    :param int size: side of the crops.
    :param int num: length of the dataset, the crops of an epoch.
    :param int channels: 1 or 3 (default: 3).
    :raises ValueError: for a folder without images, or numbers out of range.

    |sep|

    :Examples:

        >>> import tempfile
        >>> from torchvision.utils import save_image
        >>> from deepinv_ud2m.data import ResizedCrops, photograph
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_image(photograph("chelsea"), f"{folder}/photo.png")
        ...     print(ResizedCrops(folder, size=32, num=100)[0].shape)
        torch.Size([3, 32, 32])
    """

    def __init__(self, folder: str | Path, size: int, num: int, channels: int = 3):
        self.size, self.num, self.channels = check_count("size", size), check_count("num", num), channels
        check_channels(channels)
        self.images = open_images(folder, nested=True)
        self.labels = list(self.images.labels)
        self.indices = list(range(len(self.labels)))

    def hold_out(self, num: int | Sequence[str]) -> Tensor:
        """
        Take images out, and return the crops in their centres.

        :param int, list num: number of images, the last ones, below those there are; or some of ``labels``,
            the names of the images.
        :returns: images `[num, C, size, size]` in [0, 1].
        :raises ValueError: for another number, or labels that there are not.
        """
        held, kept = _places(num, self.labels)
        crops = torch.stack([self.centre(i) for i in held])
        self.indices, self.labels = _of(self.indices, kept), _of(self.labels, kept)
        return crops

    def centre(self, place: int) -> Tensor:
        """The crop `[C, size, size]` in the centre of an image, by its place among ``labels``."""
        return self._crop(place, 0.5, 0.5)

    def _crop(self, place: int, u: float, v: float) -> Tensor:
        image = self.images.image(self.indices[place], self.channels)
        height, width = image.shape[-2:]
        factor = self.size / min(height, width)
        shape = [max(self.size, round(side * factor)) for side in (height, width)]
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
        top, left = int(u * (shape[0] - self.size + 1)), int(v * (shape[1] - self.size + 1))
        return image[:, top : top + self.size, left : left + self.size].contiguous()

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        """A crop `[C, size, size]` in [0, 1], whatever the index."""
        if not 0 <= index < self.num:
            raise IndexError(index)  # ends a loop over the dataset
        crop = self._crop(int(torch.randint(len(self.indices), (1,))), *torch.rand(2).tolist())
        return crop.flip(-1) if torch.randint(2, (1,)).item() else crop


def _of(items: list[_T], places: list[int]) -> list[_T]:
    return [items[i] for i in places]


def _places(num: int | Sequence[str], labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """Places of what is held out, and of what is kept."""
    if isinstance(num, Sequence) and (unknown := sorted({*num} - {*labels})):
        raise ValueError(f"num must be of the labels of the photographs, got {unknown}")
    wanted = {*(num if isinstance(num, Sequence) else labels[-check_count("num", num) :])}
    held = [i for i, label in enumerate(labels) if label in wanted]
    kept = [i for i, label in enumerate(labels) if label not in wanted]
    if not kept:
        shown = len(num) if isinstance(num, Sequence) else num
        raise ValueError(f"num must be below the {len(labels)} photographs, got {shown}")
    return held, kept
