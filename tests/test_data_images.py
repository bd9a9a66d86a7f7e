"""Images of any origin: read as they are, or refused by name."""

import re

import deepinv as dinv
import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from deepinv_ud2m.data import load_image, load_images


@pytest.fixture
def pixels() -> np.ndarray:
    """A colour image of bytes, 20x24."""
    return np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, pixels):
    """Three images, of which the darkest is the first by name and the last to be written."""
    for level, name in ((2, "c.PNG"), (1, "b.jpeg"), (0, "a.bmp")):
        Image.fromarray(np.full_like(pixels, 50 * level)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    (tmp_path / "more.png").mkdir()
    Image.fromarray(pixels).save(tmp_path / "more.png" / "0.png")
    return tmp_path


def expected(pixels: np.ndarray, size: int = 20) -> torch.Tensor:
    """The centre crop of bytes or of values in [0, 1]."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    scale = 255 if pixels.dtype == np.uint8 else 1
    crop = torch.from_numpy(pixels[top : top + size, left : left + size].copy())
    return crop.permute(2, 0, 1).float() / scale


def test_a_folder_is_read_by_name(folder):
    x = load_images(folder, channels=3, size=16)
    assert x.shape == (3, 3, 16, 16) and x.dtype == torch.float32
    assert torch.allclose(x.mean((1, 2, 3)) * 255, torch.tensor([0.0, 50.0, 100.0]), atol=1)
    assert torch.equal(load_images(str(folder), 3, 16, num=2), x[:2])
    assert torch.equal(load_images(folder / "c.PNG", 3, 16), x[2:])


@pytest.mark.parametrize("size", [20, 17, 1])
def test_the_crop_is_central(tmp_path, pixels, size):
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert torch.equal(load_images(tmp_path, 3, size)[0], expected(pixels, size))


def test_images_without_room_are_left_out_if_asked(tmp_path):
    for name, shade, side in (("a", 0, 20), ("b", 1, 30), ("c", 2, 20), ("d", 3, 24), ("e", 4, 40)):
        Image.new("L", (side, 32), shade).save(tmp_path / f"{name}.png")
    for num, shades in ((None, [1, 3, 4]), (2, [1, 3])):
        kept = load_images(tmp_path, 1, 24, num=num, skip_small=True)
        assert (255 * kept[:, 0, 0, 0]).tolist() == pytest.approx(shades)
    with pytest.raises(ValueError, match="3 images of at least 24x24 pixels, 4 asked for"):
        load_images(tmp_path, 1, 24, num=4, skip_small=True)
    with pytest.raises(ValueError, match="0 images of at least 64x64 pixels"):
        load_images(tmp_path, 1, 64, skip_small=True)


def test_one_image_whole(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x = load_image(tmp_path / "a.png", 3)
    assert x.shape == (1, 3, 20, 24)
    assert torch.equal(x[..., 2:22], load_images(tmp_path / "a.png", 3, 20))
    assert load_image(tmp_path / "a.png", 1).shape == (1, 1, 20, 24)
    with pytest.raises(ValueError, match=r"there is no '.*b\.png'"):
        load_image(tmp_path / "b.png", 3)
    (tmp_path / "b.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image"):
        load_image(tmp_path / "b.png", 3)


def test_colours_become_grey_as_in_pil(tmp_path, pixels):
    image = Image.fromarray(pixels)
    image.save(tmp_path / "x.png")
    of_pil = expected(np.asarray(image.convert("L")))
    grey = load_images(tmp_path, 1, 20)
    assert (grey[0] - of_pil).abs().max() <= 0.51 / 255, "no more than the rounding to bytes"
    assert torch.allclose(load_images([expected(pixels)], 1, 20), grey), "files and tensors alike"


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("error")
def test_modes_of_pil(tmp_path, pixels, mode, channels):
    if mode in ("L", "LA", "1"):
        image, pixels = Image.fromarray(pixels[..., 0]), pixels[..., :1]
    elif mode == "P":
        image = Image.fromarray(pixels).quantize(16)
        pixels = np.asarray(image.convert("RGB"))
        image.info["transparency"] = bytes(range(16))
    else:
        image = Image.fromarray(pixels)
    if mode == "1":
        image = image.point(lambda value: 255 * (value > 99)).convert("1")
        pixels = np.where(pixels > 99, 255, 0).astype(np.uint8)
    elif mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(np.arange(480, dtype=np.uint8).reshape(20, 24)))
    elif mode == "CMYK":
        image = image.convert("CMYK")
    assert image.mode == mode
    image.save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    x = load_images(tmp_path, channels, 20)[0]
    true = expected(pixels)
    if channels == 1 and len(true) == 3:
        true = (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * true).sum(0, keepdim=True)
    assert torch.allclose(x, true.expand(channels, -1, -1), atol=1e-6)


def test_sixteen_bits_and_floating_values_are_kept(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 24), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "y.tif")
    floating = np.random.default_rng(0).random((20, 24), dtype=np.float32)
    Image.fromarray(floating).save(tmp_path / "z.tif")
    *x, z = load_images(tmp_path, 1, 20)
    assert torch.equal(z, expected(floating))
    assert torch.allclose(x[0], expected(values.astype(np.float64) / 65535), atol=1e-7)
    assert torch.equal(x[0], x[1])
    assert torch.equal(load_images(tmp_path / "x.png", 3, 20)[0], x[0].expand(3, -1, -1))


def test_the_orientation_of_photographs_is_honoured(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = np.rot90(pixels, -1)
    assert torch.equal(load_images(tmp_path, 3, 20)[0], expected(upright))
    folder = dinv.datasets.ImageFolder(tmp_path)
    assert torch.equal(load_images(folder, 3, 20)[0], expected(upright))


class Items(list, torch.utils.data.Dataset):
    """A dataset of given items."""


def test_items_of_datasets(pixels):
    x = expected(pixels, 20)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    opaque = torch.cat([whole, whole[:1]])
    items = [Image.fromarray(pixels), whole, whole / 255, opaque, (whole, 7), [whole], {"x": whole, "y": 0}]
    assert torch.equal(load_images(Items(items), 3, 20), x.expand(7, -1, -1, -1))
    assert torch.equal(load_images(Items([whole[0], whole[:1]]), 1, 20), x[:1].expand(2, 1, -1, -1))
    assert torch.equal(load_images(dinv.datasets.TensorDataset(x=x[None]), 3, 20), x[None])


def test_items_that_are_not_asked_for_are_not_read():
    items = Items([torch.rand(1, 20, 20)] * 2 + ["not an image"])
    assert len(load_images(items, 1, 20, num=2)) == 2


@pytest.fixture
def downloadable(folder, monkeypatch):
    """A deepinv dataset that needs no internet, its files in an order of its own."""

    class Set14HR(dinv.datasets.ImageFolder):
        def __init__(self, root=None, download=False, transform=None):
            assert download
            if root is not None and root.endswith("offline"):
                raise OSError("no internet")
            super().__init__(folder, x_path="*.[bjP]*")
            self.x_paths.reverse()
            self.asked_for = root

    monkeypatch.setattr(dinv.datasets, "Set14HR", Set14HR)


def test_datasets_of_deepinv_by_name(folder, downloadable, tmp_path, monkeypatch):
    x = load_images("Set14HR", 3, 16, root=tmp_path / "here")
    assert torch.equal(x, load_images(folder, 3, 16))
    with pytest.raises(ValueError, match=r"Set14HR is not in .*offline and could not.*no internet"):
        load_images("Set14HR", 3, 16, root=tmp_path / "offline")
    (tmp_path / "Set14HR").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "Set14HR" / "x.png")
    monkeypatch.chdir(tmp_path)
    assert len(load_images("Set14HR", 1, 16)) == 1, "a folder comes before a dataset of its name"


def test_bad_arguments_and_sources(folder, tmp_path):
    def call(source=folder, **changes):
        return lambda: load_images(source, **{"channels": 1, "size": 16, **changes})

    (empty := tmp_path / "empty").mkdir()
    (empty / "notes.txt").write_text("nothing")
    names = r"folder of images.*one of \[.*'Set14HR'.*'Urban100HR'.*\]; there is no '.*nowhere'"
    refused(
        (call(channels=2), "channels must be 1 or 3, got 2"),
        (call(size=16.0), "size must be an integer >= 1, got 16.0"),
        (call(size=24), r"a\.bmp is 20x24 pixels, but the crops are 24x24"),
        (call(multiple=0), "multiple must be an integer >= 1, got 0"),
        *((call(multiple=value), f"size must be a multiple of {value}, got 16") for value in (5, 32)),
        *((call(num=value), f"num must be an integer >= 1, got {value}") for value in (0, -1)),
        (call(num=4), r"num must be at most 3, the images of .*, got 4"),
        (call(tmp_path / "nowhere"), names),
        (call(empty), rf"{re.escape(str(empty))} itself has no file.*\.png"),
        (call(Items()), "Items is empty"),
        (call(3), TypeError, "got int"),
    )


def test_damaged_files_are_named(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    whole, lossy = (tmp_path / "a.png").read_bytes(), (tmp_path / "a.jpg").read_bytes()
    damaged = {
        "cut.jpg": lossy[: len(lossy) // 2],
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.jpg": b"not an image",
        "header.png": whole[:20],
        "flipped.png": whole[:60] + bytes(b ^ 255 for b in whole[60:90]) + whole[90:],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            load_images(tmp_path / name, 3, 16)
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        load_images(tmp_path, 3, 16)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "x.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image"):
        load_images(tmp_path / "links", 3, 16)
    with pytest.raises(ValueError, match=r"empty\.png"):
        load_images(dinv.datasets.ImageFolder(tmp_path, x_path="e*.png"), 3, 16)


def test_bad_items_are_named():
    grey = torch.ones(1, 20, 20)
    for item, message in (
        (torch.rand(3, 8, 20), "is 8x20 pixels"),
        (torch.rand(20), r"\[C, H, W\] or \[H, W\], got \[20\]"),
        (torch.rand(2, 20, 20), "1, 3 or .* 4 channels"),
        (2 * grey, r"must be in \[0, 1\], got 2 to 2"),
        (grey * torch.nan, r"must be in \[0, 1\], got nan"),
        (grey.int(), "uint8 or floating.*int32"),
        (grey * 1j, "uint8 or floating.*complex64"),
        ("a string", "of PIL or a tensor, got str"),
        ({"y": grey}, r'the key "x", got \[\'y\'\]'),
        (Image.fromarray(np.full((20, 20), 70000, dtype=np.int32)), "70000 to 70000: more than 16 bits"),
    ):
        refused((lambda item=item: load_images(Items([item]), 1, 16), f"item 0 of Items .*{message}"))
