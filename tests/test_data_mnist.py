"""The shipped digits and photographs, and the readers of MNIST."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from deepinv_ud2m import data
from deepinv_ud2m.data import load_mnist, mnist_arrays, mnist_digits, photograph


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
    assert x.min() == 0 and x.max() == 1
    assert y.shape == (size,) and y.dtype == torch.int64
    assert y.unique().tolist() == list(range(10))
    # The padding is black on all four sides.
    assert x[..., 2:-2, 2:-2].count_nonzero() == x.count_nonzero()


def test_shipped_digits_num():
    x, y = mnist_digits("test", num=5, labels=True)
    assert torch.equal(x, mnist_digits("test")[:5])
    assert y.tolist() == [7, 2, 1, 0, 4]  # the well-known first labels of the test set
    assert isinstance(mnist_digits("test", 5), torch.Tensor)


def test_shipped_splits_are_disjoint():
    test, validation = mnist_digits("test").flatten(1), mnist_digits("validation").flatten(1)
    assert torch.cdist(test, validation).min() > 0


def test_shipped_file_is_small_and_credited():
    assert data._SHIPPED.stat().st_size <= 400e3
    licence = (data._SHIPPED.parent / "LICENSES.md").read_text(encoding="utf-8")
    assert data._SHIPPED.name in licence and "CC BY-SA 3.0" in licence


def test_shipped_photographs():
    for name in ("astronaut", "chelsea"):
        x = photograph(name)
        assert x.shape == (1, 3, 256, 256) and x.dtype == torch.float32
        with Image.open(data._PHOTOGRAPHS / f"{name}.png") as image:
            assert np.array_equal((255 * x[0]).round().byte().permute(1, 2, 0), np.array(image))


def test_shipped_errors():
    with pytest.raises(ValueError, match="'train'"):
        mnist_digits("train")
    for num in (0, -1, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            mnist_digits("test", num)
    with pytest.raises(ValueError, match="name must be one of"):
        photograph("lena")


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


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: {"images": x, "labels": y},
        lambda x, y: {"x": x},
        lambda x, y: {"x": x.reshape(7, -1), "y": y},
        lambda x, y: {"x": x / 255, "y": y},
        lambda x, y: {"x": x, "y": y[:3]},
        lambda x, y: {"x": x, "y": y.astype(float)},
        lambda x, y: {"x": x, "y": y + 10},
        lambda x, y: {"x": x[:0], "y": y[:0]},
        lambda x, y: {"x": x, "y": y.astype(object)},  # would need pickle
    ],
)
def test_arrays_wrong_content(tmp_path, digits, change):
    np.savez(tmp_path / "wrong.npz", **change(*digits))
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
