"""Priors: saving and loading, what they say about themselves, and the reordering of pixels."""

import builtins
import dataclasses
import errno
import json
import os

import numpy as np
import pytest
import torch
from conftest import seeded
from deepinv.models import Denoiser
from deepinv.physics import Denoising
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_config

from deepinv_ud2m import UD2M, PriorInfo, load_prior, save_prior
from deepinv_ud2m.files import sha256
from deepinv_ud2m.priors import PRIORS
from deepinv_ud2m.priors.networks import PixelShuffledDenoiser, VPDenoiser, checkerboard


def replace_weights(tiny_folder, **changes):
    """Other tensors, with a digest that is right; None takes a tensor out."""
    file = tiny_folder / "model.safetensors"
    state = load_file(file) | changes
    save_file({name: value for name, value in state.items() if value is not None}, file)
    edit_config(tiny_folder, lambda config: config.update(sha256=sha256(file)))


def test_round_trip(tiny_prior, tiny_config, tiny_folder):
    loaded = load_prior(str(tiny_folder))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.prior_info == PriorInfo(**tiny_config["prior"] | {"name": str(tiny_folder)})
    assert load_prior(tiny_folder).prior_info == loaded.prior_info  # a Path will do
    rounded = {name: value.half().float() for name, value in tiny_prior.state_dict().items()}
    assert loaded.state_dict().keys() == rounded.keys()
    assert all(torch.equal(value, rounded[name]) for name, value in loaded.state_dict().items())
    assert any(not torch.equal(value, rounded[name]) for name, value in tiny_prior.state_dict().items())
    x = torch.rand(2, 1, 32, 32, generator=seeded(0))
    sigma = torch.tensor([0.05, 3.0])
    # Half precision keeps 11 bits: a relative error of 5e-4 in each weight.
    torch.testing.assert_close(loaded(x, sigma), tiny_prior(x, sigma), rtol=0, atol=5e-3)


def test_saving_twice_gives_the_same_file(tiny_prior, tiny_config, tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    assert config == tiny_config | {"sha256": sha256(tiny_folder / "model.safetensors")}
    for again in (tiny_config, config | {"sha256": "that of another"}):
        save_prior(load_prior(tiny_folder), again, tmp_path / "again")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert len([*tiny_folder.iterdir()]) == 2


def test_a_full_disk_leaves_the_earlier_prior(tiny_prior, tiny_config, tiny_folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    with torch.no_grad():
        next(tiny_prior.parameters()).add_(1)
    opened = builtins.open

    def open_on_a_full_disk(path, mode="r", **kwargs):
        if "config.json" in str(path) and "b" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, **kwargs)

    monkeypatch.setattr(builtins, "open", open_on_a_full_disk)
    with pytest.raises(OSError, match=r"config\.json cannot be written.*No space left"):
        save_prior(tiny_prior, tiny_config, tiny_folder)
    assert {path.name: path.read_bytes() for path in tiny_folder.iterdir()} == before


def test_what_could_not_be_loaded_is_not_saved(tiny_prior, tiny_config, tmp_path):
    for name, value in (("prior", {"channels": 1}), ("network", {"pixel_shuffle": 0})):
        with pytest.raises(ValueError, match=r"sigma_max|pixel_shuffle must be .*, got 0"):
            save_prior(tiny_prior, tiny_config | {name: value}, tmp_path / "tiny")
    with torch.no_grad():
        next(tiny_prior.parameters()).fill_(1e6)  # not finite in float16
    with pytest.raises(ValueError, match="in float16, hold NaN or infinite values"):
        save_prior(tiny_prior, tiny_config, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_what_is_no_prior_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("cifar", str(tmp_path), "", "nul\0", "long" * 1000, "runs/mine"):
        with pytest.raises(ValueError, match="name must be one of the priors") as error:
            load_prior(name)
        assert all(known in str(error.value) for known in [*PRIORS, repr(name)])
    for name in (None, ["mnist"], 3):
        with pytest.raises(TypeError, match="name must be the name of a prior, or a folder, got"):
            load_prior(name)
    UD2M.from_pretrained("mnist").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"folder of a sampler: UD2M.from_pretrained"):
        load_prior(tmp_path)


def test_damaged_weights(tiny_folder):
    weights = tiny_folder / "model.safetensors"
    content = weights.read_bytes()
    flipped = bytearray(content)
    flipped[-7] ^= 4
    for damaged in (content[: len(content) // 2], content[:5], b"", b"no weights", bytes(flipped)):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"weights .* are damaged.* {sha256(weights)}, expected"):
            load_prior(tiny_folder)
        assert weights.read_bytes() == damaged
    edit_config(tiny_folder, lambda config: config.update(sha256=sha256(weights)))
    load_prior(tiny_folder)  # of one flipped bit, only the digest tells
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights .* cannot be read"):
        load_prior(tiny_folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"denoiser.out_conv.weight": None}, "missing: denoiser.out_conv.weight"),
        ({"evil": torch.zeros(1)}, "unexpected: evil"),
        ({"denoiser.out_conv.bias": torch.zeros(5)}, r"of another shape.*\[5\] instead of \[4\]"),
        ({"denoiser.out_conv.bias": torch.zeros(4).int()}, r"floating point, got .*int32"),
        ({"denoiser.out_conv.bias": torch.tensor([0, torch.nan, 0, 0])}, "NaN or infinite values in"),
        ({"denoiser.out_conv.bias": torch.tensor([0, 0, -torch.inf, 0])}, "NaN or infinite values in"),
    ],
)
def test_weights_of_another_network(changes, message, tiny_folder):
    replace_weights(tiny_folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_prior(tiny_folder)


REFUSED = {
    "prior": [
        ("name", ["mnist"], "name must be a string"),
        ("channels", 0, "channels must be an integer >= 1"),
        ("channels", -1, "channels must be an integer >= 1"),
        ("channels", True, "channels must be an integer >= 1"),
        ("channels", "1", "channels must be an integer >= 1"),
        ("sigma_min", float("nan"), "sigma_min and sigma_max"),
        ("sigma_min", -0.1, "sigma_min and sigma_max"),
        ("sigma_min", 90.0, "sigma_min and sigma_max"),
        ("sigma_max", float("nan"), "sigma_min and sigma_max"),
        ("sigma_max", "80", "sigma_min and sigma_max"),
        ("sigma_max", None, "sigma_min and sigma_max"),
        ("size_multiple", 0, "size_multiple must be an integer >= 1"),
        ("image_size", -32, "image_size must be an integer >= 1"),
        ("chanels", 1, "'prior' does not fit.*chanels"),
    ],
    "network": [
        ("pixel_shuffle", 0, "pixel_shuffle must be an integer from 1 to 1024"),
        ("pixel_shuffle", 2.0, "pixel_shuffle must be an integer from 1 to 1024"),
        ("pixel_shuffle", 10**30, "pixel_shuffle must be an integer from 1 to 1024"),
        ("pad_to_multiple", 0, "pad_to_multiple must be an integer from 1 to 1024"),
        ("checkerboard_filter", float("nan"), "checkerboard_filter must be a positive number or none"),
        ("img_resolution", 0, "img_resolution must be an integer from 1 to 1024"),
        ("model_channels", -32, "model_channels must be an integer from 1 to 1024"),
        ("model_channels", 1, "cannot be used"),
        ("channel_mult", [], "channel_mult must be 1 to 16 integers"),
        ("channel_mult", [1, 0], "channel_mult must be 1 to 16 integers"),
        ("channel_mult", "12", "channel_mult must be 1 to 16 integers"),
        ("channel_mult_emb", None, "channel_mult_emb must be an integer"),
        ("num_blocks", {}, "num_blocks must be an integer"),
        ("num_blocks", 10**9, "num_blocks must be an integer from 1 to 1024"),
        ("attn_resolutions", 4, "attn_resolutions must be up to 16"),
        ("dropout", 1.0, r"dropout must be a number in \[0, 1\)"),
        ("pixel_std", float("inf"), "pixel_std must be a positive number"),
        ("pixel_sdt", 0.3, r"no setting \['pixel_sdt'\], accepted"),
        ("pretrained", "download", r"no setting \['pretrained'\]"),
        ("in_channels", 4, r"no setting \['in_channels'\]"),
    ],
}


@pytest.mark.parametrize(
    "section, key, value, message", [(section, *case) for section, cases in REFUSED.items() for case in cases]
)
def test_settings_that_are_refused(section, key, value, message, tiny_folder):
    edit_config(tiny_folder, lambda config: config[section].update({key: value}))
    with pytest.raises(ValueError, match=rf"config\.json cannot be used.*{message}|{message}") as error:
        load_prior(tiny_folder)
    assert str(tiny_folder / "config.json") in str(error.value)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda config: config.pop("prior"), "'prior' must be a dict, got None"),
        (lambda config: config.update(network=[]), r"'network' must be a dict, got \[\]"),
        (lambda config: config.update(sha256=7), "'sha256' must be a str, got 7"),
        (lambda config: config["prior"].pop("sigma_max"), "sigma_max"),
        (lambda config: config["network"].pop("pixel_shuffle"), "needs pixel_shuffle"),
        (lambda config: config["network"].update(model_channels=64), "another shape"),
        (lambda config: config["network"].update(model_channels=1024, channel_mult=[1000]), "shape"),
        (lambda config: config["prior"].update(channels=10**30), "cannot be used"),
    ],
)
def test_config_of_another_prior(tiny_folder, edit, message):
    edit_config(tiny_folder, edit)
    with pytest.raises(ValueError, match=message):
        load_prior(tiny_folder)


@pytest.mark.parametrize("content", ['{"network": ', "", "[1]", "[" * 100_000, "\xff\xfe"])
def test_config_that_is_not_json(content, tiny_folder):
    (tiny_folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        load_prior(tiny_folder)


class Weighted(Denoiser):
    """Multiplies each channel by its own number, and all by 1 / (1 + sigma^2)."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return self.weights.reshape(1, -1, 1, 1) * x / (1 + sigma**2)


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_shuffle_is_a_reordering(factor, channels):
    generator = seeded(0)
    weights = torch.rand(channels * factor**2, generator=generator)
    x = torch.rand(2, channels, 8, 12, generator=generator)
    sigma = torch.tensor([0.5, 2.0])
    denoised = PixelShuffledDenoiser(Weighted(weights), factor)(x, sigma)
    # Pixel (i, j) of a block is one channel, so the inner weights tile the image.
    mask = weights.reshape(channels, factor, factor).repeat(1, 8 // factor, 12 // factor)
    assert torch.equal(denoised, mask * x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2))


@pytest.mark.parametrize("size", [(8, 16), (9, 16), (15, 23)])
def test_other_sizes_are_padded_by_reflection(size):
    class Recorder(Denoiser):
        def forward(self, x, sigma):
            self.seen = x
            return 2 * x

    x = torch.rand(2, 3, *size, generator=seeded(0))
    inner = Recorder()
    denoised = PixelShuffledDenoiser(inner, 2, multiple=8)(x, 0.1)
    assert torch.equal(denoised, 2 * x)
    seen = torch.nn.functional.pixel_shuffle(inner.seen, 2)
    assert all(n % 8 == 0 and n - m < 8 for n, m in zip(seen.shape[-2:], size, strict=True))
    reflected = np.pad(x.numpy(), [(0, 0), (0, 0), (0, -size[0] % 8), (0, -size[1] % 8)], mode="reflect")
    assert np.array_equal(seen.numpy(), reflected)


def test_the_checkerboard_is_taken_out_and_images_stay():
    """A checkerboard vanishes; waves of other frequencies, ramps and edges along rows stay."""
    i, j = torch.meshgrid(torch.arange(40.0), torch.arange(32.0), indexing="ij")
    board = torch.cos(torch.pi * (i + j))
    edges = (i > 17).float() - 0.3 * (j > 9).float()
    for image, left in (
        (0.2 * board, 0.0), (0.2 * torch.cos(torch.pi * i / 2) * torch.cos(torch.pi * j), 1.0),
        (0.01 * i + 0.02 * j, 1.0), (edges, 1.0),
    ):  # fmt: skip
        image = image.expand(2, 3, 40, 32)
        part = checkerboard(image, 2.0)
        inner = (image - part)[..., 8:-8, 8:-8]
        torch.testing.assert_close(inner, left * image[..., 8:-8, 8:-8], atol=2e-3, rtol=0)
    denoiser = PixelShuffledDenoiser(Weighted(torch.ones(12)), 2, checkerboard_filter=2.0)
    plain = PixelShuffledDenoiser(Weighted(torch.ones(12)), 2)
    x = torch.rand(2, 3, 8, 6, generator=seeded(0))
    found = denoiser(x, 0.1)
    torch.testing.assert_close(found, plain(x, 0.1) - checkerboard(plain(x, 0.1), 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(denoiser(x, 0.1), found)


def test_options_of_pixel_shuffle_that_are_refused():
    for options, message in (
        ({"factor": 0}, "factor must be an integer >= 1, got 0"),
        ({"multiple": -1}, "multiple must be an integer >= 1, got -1"),
        ({"factor": 4, "checkerboard_filter": 2.0}, "checkerboard_filter must be positive"),
        ({"checkerboard_filter": 0.0}, "checkerboard_filter must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            PixelShuffledDenoiser(torch.nn.Identity(), **options)
    with pytest.raises(ValueError, match="at least 8, got 7x20"):
        PixelShuffledDenoiser(Weighted(torch.ones(12)), 2, multiple=8)(torch.rand(1, 3, 7, 20), 0.1)


def test_a_prior_that_is_called_like_a_sampler():
    physics, y = Denoising(), torch.rand(1, 1, 32, 32)
    for prior in (load_prior("mnist"), VPDenoiser(torch.nn.Identity(), lambda network, v, t: v)):
        with pytest.raises(TypeError, match=r"sigma .* physics Denoising.*D\(x, sigma\).*from_pretrained"):
            prior(y, physics)


INFO = PriorInfo("p", channels=2, sigma_min=0.01, sigma_max=10.0, size_multiple=4, image_size=32)


def test_images_it_cannot_take():
    for shape, message in (
        ((1, 1, 32, 32), r"2 channel\(s\), not 1 channel\(s\).*\[1, 1, 32, 32\]"),
        *(((1, 2, *size), f"multiples of 4.*{size[0]}x{size[1]}") for size in ((30, 32), (32, 33), (0, 32))),
        *((shape, r"\[B, C, H, W\]") for shape in ((2, 32, 32), (1, 2, 4, 32, 32), (5,))),
    ):
        with pytest.raises(ValueError, match=message):
            INFO.check_images(torch.Size(shape))


@pytest.mark.filterwarnings("error")
def test_sizes_and_levels_outside_of_training_warn():
    INFO.check_images(torch.Size((3, 2, 32, 32)))
    INFO.check_levels(torch.tensor([[0.01, 1.0], [10.0, 3.0]]))
    dataclasses.replace(INFO, image_size=None).check_images(torch.Size((1, 2, 64, 4)))
    with pytest.warns(UserWarning, match="trained on 32x32 images.*64x32"):
        INFO.check_images(torch.Size((1, 2, 64, 32)))
    for levels in ([0.005, 1.0], [1.0, 20.0]):
        with pytest.warns(UserWarning, match=r"noise levels from 0\.01 to 10\.0"):
            INFO.check_levels(torch.tensor(levels))
