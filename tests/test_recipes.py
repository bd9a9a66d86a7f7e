"""The training recipes in miniature, as a user would start them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import seeded
from scripts import EXAMPLES, run
from torchvision.utils import save_image

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import DigitClassifier
from deepinv_ud2m.priors import random_prior


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The validation digits that ship, as a file of MNIST."""
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    x, y = mnist_digits("validation", labels=True)
    np.savez(file, x=(255 * x[:, 0, 2:-2, 2:-2]).round().byte().numpy(), y=y.numpy())
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs; ImageNet's names, in subfolders and with upper-case endings, among them."""
    folder = tmp_path_factory.mktemp("photos")
    generator = seeded(0)
    for i in range(4):
        image = torch.rand(1, 3, 6, 7, generator=generator)
        image = torch.nn.functional.interpolate(image, size=(84, 98), mode="bicubic")
        save_image(image.clamp(0, 1), folder / f"{i}.png")
    (folder / "n01").mkdir()
    (folder / "3.png").rename(folder / "n01" / "3.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_digits_in_three_stages(digits, tmp_path):
    arguments = ["--train", digits, "--out", tmp_path, "--quick", "--updates", 1, 1, 1, "--batch-size", 2]
    printed = run("recipes/mnist.py", *arguments)
    stages = {stage: UD2M.from_pretrained(tmp_path / stage / "final") for stage in ("initial", "single")}
    model = UD2M.from_pretrained(tmp_path / "model")
    assert f"UD2M.from_pretrained({str(tmp_path / 'model')!r})" in printed
    assert model.num_steps == 3 and model.nominal_rmse == 0.22
    # The first stage trains the initial estimate only, whose predicted error starts at a bias of 0; the
    # others all.
    first, second, last = (of.unfolded for of in (*stages.values(), model))
    prior = load_prior("mnist").state_dict()
    assert all(torch.equal(p, prior[name]) for name, p in first.denoiser.state_dict().items())
    assert first.initializer.error[-1].bias.any() and not first.log_delta.any()
    for before, after in ((first, second), (second, last)):
        pairs = zip(before.named_parameters(), after.parameters(), strict=True)
        moved = {name.split(".")[0] for (name, p), q in pairs if not torch.allclose(p, q, rtol=2e-3)}
        assert moved >= {"initializer", "denoiser", "log_delta"}
    metadata = json.loads((tmp_path / "model" / "config.json").read_text())["metadata"]
    assert metadata["arguments"]["tasks"] == ["sr4"] and metadata["validation"]["eval: energy score"] > 0
    # Started again, it finds all stages done.
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").unlink()
    run("recipes/mnist.py", *arguments)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


def test_a_classifier_then_digits_without_a_trained_initial_estimate(digits, tmp_path):
    data = ["--train", digits, "--test", digits]
    run("recipes/digit_classifier.py", *data, "--epochs", 1, "--out", tmp_path / "c")
    x = mnist_digits("test", num=64)
    features = DigitClassifier.from_pretrained(tmp_path / "c").features(x)
    assert features.shape == (64, 64) and 0.5 < features.std() < 2
    assert json.loads((tmp_path / "c" / "config.json").read_text())["training_digits"] == 256
    arguments = ["--train", digits, "--out", tmp_path, "--quick", "--updates", 0, 1, 0, "--batch-size", 2]
    run("recipes/mnist.py", *arguments, "--classifier", tmp_path / "c", "--diversity-weight", 0.5)
    model = UD2M.from_pretrained(tmp_path / "model")
    assert not model.unfolded.predicts_rmse and model.unfolded.num_iterations == 3
    history = json.loads((tmp_path / "single" / "history.json").read_text())
    assert "eval: energy score" in history


def test_the_file_of_digits(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (10_000, 28, 28), dtype=np.uint8)
    y = np.arange(10_000) % 10
    np.savez(tmp_path / "test.npz", x=x, y=y)
    run("recipes/digits_file.py", "--test", tmp_path / "test.npz", "--out", tmp_path / "new" / "digits.npz")
    with np.load(tmp_path / "new" / "digits.npz") as arrays:
        assert np.array_equal(arrays["test_x"], x[:1000]) and np.array_equal(arrays["test_y"], y[:1000])
        assert np.array_equal(arrays["validation_x"], x[-256:])
    np.savez(tmp_path / "test.npz", x=x[:99], y=y[:99])
    printed = run("recipes/digits_file.py", "--test", tmp_path / "test.npz", "--out", tmp_path / "other.npz")
    assert "holds 99 digits, not the 10 000" in printed


def test_arguments_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, *options, message in (
        ("mnist.py", "--tasks", "sr5", "invalid choice: 'sr5'"),
        ("photos.py", "the following arguments are required: --train"),
        ("imagenet.py", "--train", "nowhere", "--train: there is no folder nowhere"),
        ("imagenet.py", "--train", tmp_path, "images, a batch has 2"),
    ):
        printed = run(f"recipes/{script}", *options)
        assert message in printed and "stopped: " in printed


@pytest.mark.slow
def test_a_prior_of_digits(digits, tmp_path):
    arguments = ["--train", digits, "--test", digits, "--out", tmp_path, "--quick"]
    printed = run("recipes/prior_mnist.py", *arguments)
    card = json.loads((tmp_path / "config.json").read_text())
    assert card["metrics"]["test_images"] == 256 and "frechet_distance_to_test" in printed
    assert load_prior(tmp_path)(torch.zeros(1, 1, 32, 32), 0.1).shape == (1, 1, 32, 32)
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.slow
def test_photos_from_prior_to_sampler(photos, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    prior = tmp_path / "prior"
    run("recipes/prior_photos.py", "--train", photos, "--test", photos, "--out", prior, "--quick")
    assert (prior / "denoised.png").is_file()
    arguments = ["--train", photos, "--prior", prior, "--quick"]
    run("recipes/photos.py", *arguments, "--out", tmp_path / "three")
    model = UD2M.from_pretrained(tmp_path / "three" / "model")
    assert model.unfolded.predicts_rmse and model.unfolded.num_iterations == 2
    config = json.loads((tmp_path / "three" / "model" / "config.json").read_text())
    assert config["lora"]["rank"] == 20 and config["prior"]["name"] == str(prior)
    run("recipes/photos.py", *arguments, "--out", tmp_path / "all", "--updates", 0, 1, 0, "--rank", 0)
    config = json.loads((tmp_path / "all" / "model" / "config.json").read_text())
    assert config["lora"] is None and config["unfolded"]["train_prior"] == "all"


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--checkpointing"], ["--ram"], ["--dataset", "lsun"]])
def test_imagenet(options, photos, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("diffusers")
    printed = run("recipes/imagenet.py", "--train", photos, "--out", tmp_path, "--smoke", *options)
    assert "parameters are trained" in printed
    for file in ("checkpoint.pt", "samples_0.png", "model/model.safetensors"):
        assert (tmp_path / file).is_file()
    if "--ram" not in options:  # the prior has random weights, from the seed of the run
        torch.manual_seed(0)
        prior = random_prior("lsun-bedroom256" if "lsun" in options else "imagenet256")
        assert UD2M.from_pretrained(tmp_path / "model", prior=prior).num_steps == 3


@pytest.mark.slow
def test_imagenet_in_two_processes(photos, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    recipe = [EXAMPLES / "recipes" / "imagenet.py", "--train", photos, "--out", tmp_path, "--smoke"]
    for accumulate, fails in ((2, False), (1, True)):
        command = [*launcher, *recipe, "--accumulate", accumulate]
        options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 600, "text": True}
        result = subprocess.run(list(map(str, command)), capture_output=True, check=False, **options)
        assert bool(result.returncode) is fails, result.stderr
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "accumulate must be a multiple of the number of processes" in result.stderr
