"""Random crops of photographs, the data that a prior is trained on."""

import numpy as np
import pytest
import torch
from PIL import Image

from deepinv_ud2m.data import RandomCrops, photograph


def save_image(image, file):
    Image.fromarray((255 * image[0]).round().byte().permute(1, 2, 0).squeeze().numpy()).save(file)


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        save_image(photograph("chelsea")[..., : 128 + 32 * i, :160], tmp_path / f"{i}.png")
    return tmp_path


def test_crops_repeat_with_the_global_seed(folder):
    crops = RandomCrops(folder, 32, num=5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(torch.stack(list(crops)))
    assert drawn[0].shape == (5, 3, 32, 32)
    assert drawn[0].min() >= 0 and drawn[0].max() <= 1
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert RandomCrops(folder, 32, 5, channels=1)[0].shape == (1, 32, 32)


def test_without_reduction_a_crop_is_a_part_of_the_photograph_turned(tmp_path):
    """Every pixel of this image has a value of its own, which tells where a crop was."""
    values = torch.arange(48 * 64).reshape(48, 64)
    image = torch.stack([values // 256, values % 256, values * 0]) / 255.0
    save_image(image[None], tmp_path / "image.png")
    crops = RandomCrops(tmp_path, 8, num=300, max_scale=1)
    torch.manual_seed(0)
    corners, orientations = set(), set()
    for crop in crops:
        red, green, _ = (255 * crop).round().long()
        index = 256 * red + green
        rows, columns = index // 64, index % 64
        assert (index.unique().numel(), rows.unique().numel(), columns.unique().numel()) == (64, 8, 8)
        corners.add((rows.min().item(), columns.min().item()))
        order = index.argsort(stable=True) if index.ndim == 1 else index.flatten().argsort()
        orientations.add(tuple(order.tolist()))
    assert len(orientations) == 8, "four turns, each with its mirror image"
    rows, columns = zip(*corners, strict=True)
    assert (min(rows), max(rows)) == (0, 40) and (min(columns), max(columns)) == (0, 56)


def test_reduction_averages(tmp_path):
    """A checkerboard of single pixels becomes grey; without reduction it stays black and white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    torch.manual_seed(0)
    crops = RandomCrops(tmp_path, 32, num=50, channels=1, max_scale=8)
    assert torch.stack([crop.std() for crop in crops]).max() < 0.15
    assert RandomCrops(tmp_path, 32, num=1, channels=1, max_scale=1)[0].std() > 0.49
    assert (torch.stack([crop.mean() for crop in crops]) - 0.5).abs().max() < 0.02


def test_bad_folders(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"0\.png is 128x160 pixels, but the crops are 144x144"):
        RandomCrops(folder, 144, 1)
    with pytest.raises(ValueError, match="source must be a folder"):
        RandomCrops(tmp_path_factory.mktemp("empty"), 32, 1)
    with pytest.raises(ValueError, match="max_scale must be"):
        RandomCrops(folder, 32, 1, max_scale=0.5)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        RandomCrops(folder, 32, 1)
