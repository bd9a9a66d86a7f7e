"""The shipped digits and photographs, the readers of MNIST, and random crops of photographs."""

import struct
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from deepinv_ud2m import data
from deepinv_ud2m.data import RandomCrops, ResizedCrops, load_mnist, mnist_arrays, mnist_digits, photograph


@pytest.fixture
def digits():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (7, 28, 28), dtype=np.uint8), np.arange(7, dtype=np.uint8)


def are(x, y, digits):
    """Whether images and labels are those of raw digits."""
    pixels = (x[:, 0, 2:-2, 2:-2] * 255).round().numpy()
    return x.dtype == torch.float32 and y.dtype == torch.int64 and np.array_equal(pixels, digits[0])


@pytest.mark.parametrize(("split", "size"), [("test", 1000), ("validation", 256)])
def test_shipped_digits(split, size):
    x, y = mnist_digits(split, labels=True)
    assert x.shape == (size, 1, 32, 32) and x.dtype == torch.float32
    assert y.shape == (size,) and y.dtype == torch.int64 and y.unique().tolist() == list(range(10))
    assert x.min() == 0 and x.max() == 1
    assert x[..., 2:-2, 2:-2].count_nonzero() == x.count_nonzero(), "black on all four sides"


def test_shipped_digits_num():
    x, y = mnist_digits("test", num=5, labels=True)
    assert torch.equal(x, mnist_digits("test")[:5])
    assert y.tolist() == [7, 2, 1, 0, 4]  # the well-known first labels of the test set
    assert torch.cdist(mnist_digits("test").flatten(1), mnist_digits("validation").flatten(1)).min() > 0


def test_shipped_photographs():
    for name in ("astronaut", "chelsea"):
        x = photograph(name)
        assert x.shape == (1, 3, 256, 256) and x.dtype == torch.float32
        with Image.open(data._PHOTOGRAPHS / f"{name}.png") as image:
            assert np.array_equal((255 * x[0]).round().byte().permute(1, 2, 0), np.array(image))


def test_arrays(tmp_path, digits):
    np.savez(tmp_path / "digits.npz", x=digits[0], y=digits[1])
    for path in (tmp_path / "digits.npz", str(tmp_path / "digits.npz")):
        x, y = mnist_arrays(path)
        assert are(x, y, digits) and x.shape == (7, 1, 32, 32) and y.tolist() == list(range(7))
    x, _ = load_mnist(tmp_path / "unused", train=True, npz=tmp_path / "digits.npz")
    assert torch.equal(x, mnist_arrays(tmp_path / "digits.npz")[0])
    assert not (tmp_path / "unused").exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.npz.*\(N, 28, 28\)"):
        mnist_arrays(tmp_path / "absent.npz")


def test_arrays_wrong_content(tmp_path, digits):
    x, y = digits
    for wrong in (
        {"images": x, "labels": y},
        {"x": x},
        {"x": x.reshape(7, -1), "y": y},
        {"x": x / 255, "y": y},
        *({"x": x, "y": labels} for labels in (y[:3], y.astype(float), y + 10)),
        {"x": x[:0], "y": y[:0]},
        {"x": x, "y": y.astype(object)},  # would need pickle
    ):
        np.savez(tmp_path / "wrong.npz", **wrong)
        with pytest.raises(ValueError, match=r"wrong\.npz"):
            mnist_arrays(tmp_path / "wrong.npz")


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_arrays_not_an_npz(tmp_path, digits):
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "empty.npz").touch()
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, digits[0])
    np.savez(tmp_path / "whole.npz", x=digits[0], y=digits[1])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:3000])
    for name in ("text.npz", "empty.npz", "single.npz", "cut.npz"):
        with pytest.raises(ValueError, match=rf"{name}.*\(N, 28, 28\)"):
            mnist_arrays(tmp_path / name)


def test_load_mnist_from_torchvision_files(tmp_path, digits):
    """The four files of MNIST, in the format and at the place torchvision expects."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, num in (("train", 7), ("t10k", 3)):
        header = struct.pack(">IIII", 0x803, num, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + digits[0][:num].tobytes())
        header = struct.pack(">II", 0x801, num)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + digits[1][:num].tobytes())
    x, y = load_mnist(tmp_path, train=True)
    assert are(x, y, digits) and y.tolist() == list(range(7))
    assert torch.equal(load_mnist(tmp_path, train=False)[0], x[:3])


def test_load_mnist_without_network(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    with pytest.raises(RuntimeError, match="npz="):
        load_mnist(tmp_path, train=True)


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


def test_resized_crops_have_room_for_the_shorter_side_only(folder):
    """Of all subfolders; what is held out is not drawn."""
    (folder / "n01").mkdir()
    save_image(torch.zeros(1, 3, 40, 60), folder / "n01" / "black.PNG")
    save_image(torch.ones(1, 3, 64, 40), folder / "n01" / "white.JPEG")
    crops = ResizedCrops(folder, 32, num=40)
    held = crops.hold_out(1)
    assert held.shape == (1, 3, 32, 32) and held.min() > 0.99
    torch.manual_seed(0)
    drawn = torch.stack(list(crops))
    assert drawn.shape == (40, 3, 32, 32) and drawn.mean((1, 2, 3)).max() < 0.99
    assert (drawn.amax((1, 2, 3)) < 0.01).sum() > 3
    # The photograph of 128 x 160 becomes 32 x 40, from which columns are cut, mirrored or not.
    image = photograph("chelsea")[..., :128, :160].mul(255).round().div(255)
    small = torch.nn.functional.interpolate(image, (32, 40), mode="bilinear", antialias=True)[0]
    windows = torch.stack([part for i in range(9) for part in (small[..., i : i + 32],) * 2])
    windows[1::2] = windows[1::2].flip(-1)
    distances = (drawn[:, None] - windows).abs().amax((2, 3, 4)).amin(1)
    assert (distances < 1e-4).sum() > 3
    refused((lambda: crops.hold_out(3), "num must be below the 3 photographs"))
    crops = ResizedCrops(folder, 32, num=40)
    others = [label for label in crops.labels if not label.endswith("white.JPEG")]
    crops.hold_out(others)
    assert min(crop.min() for crop in crops) > 0.99, "the last one is all there is"


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


def test_photographs_that_are_small_or_held_out(tmp_path):
    for name, side, shade in (("a", 40, 10), ("b", 20, 20), ("c", 64, 30), ("d", 40, 40)):
        Image.new("RGB", (side, 50), (shade,) * 3).save(tmp_path / f"{name}.png")
    crops = RandomCrops(tmp_path, 32, 50, skip_small=True)
    held = crops.hold_out(1)
    assert held.shape == (1, 3, 32, 32) and torch.allclose(255 * held, torch.tensor(40.0))
    seen = {round(255 * crop[0, 0, 0].item()) for crop in (crops[i] for i in range(50))}
    assert seen == {10, 30}, "neither the small one nor the one that is held out"
    named = RandomCrops(tmp_path, 32, 50, skip_small=True)
    assert torch.equal(named.hold_out([named.labels[-1]]), held) and named.labels == crops.labels
    with pytest.raises(ValueError, match=r"num must be of the labels of the photographs, got \['x.png'\]"):
        named.hold_out(["x.png"])
    with pytest.raises(ValueError, match="num must be below the 2 photographs, got 2"):
        named.hold_out(named.labels)
    with pytest.raises(ValueError, match="num must be below the 2 photographs, got 2"):
        crops.hold_out(2)
    with pytest.raises(ValueError, match=r"no photograph in .* has sides of 80 pixels"):
        RandomCrops(tmp_path, 80, 1, skip_small=True)


def test_what_is_refused(folder, tmp_path_factory):
    (broken := tmp_path_factory.mktemp("broken") / "broken.png").write_bytes(b"\x89PNG\r\n")
    refused(
        (lambda: mnist_digits("train"), "'train'"),
        *((partial(mnist_digits, "test", num), "between 1 and 1000") for num in (0, -1, 1001)),
        (lambda: photograph("lena"), "name must be one of"),
        (lambda: RandomCrops(folder, 144, 1), r"0\.png is 128x160 pixels, but the crops are 144x144"),
        (lambda: RandomCrops(tmp_path_factory.mktemp("empty"), 32, 1), "source must be a folder"),
        (lambda: RandomCrops(folder, 32, 1, max_scale=0.5), "max_scale must be"),
        (lambda: RandomCrops(broken.parent, 32, 1), r"broken\.png cannot be read"),
    )
