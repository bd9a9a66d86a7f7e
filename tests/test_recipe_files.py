"""The files of ``examples/recipes``, each in miniature."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scripts import EXAMPLES, miniature, run

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import DigitClassifier
from deepinv_ud2m.priors import random_prior
from deepinv_ud2m.training import (
    Stage,
    distill,
)


@pytest.mark.slow
def test_a_classifier_of_digits(digits, tmp_path):
    data = ["--train", digits, "--test", digits]
    run("recipes/digit_classifier.py", *data, "--epochs", 1, "--out", tmp_path / "c")
    features = DigitClassifier.from_pretrained(tmp_path / "c").features(mnist_digits("test", num=64))
    assert features.shape == (64, 64) and 0.5 < features.std() < 2
    assert json.loads((tmp_path / "c" / "config.json").read_text())["training_digits"] == 256
    losses = [{"loss": "energy", "features": str(tmp_path / "c")}]
    recipe = miniature("mnist.yaml", losses=losses)
    recipe.stages = [Stage("single", 1, 2)]
    distill("mnist", None, mnist_digits("validation"), recipe, tmp_path / "run", verbose=False)
    history = json.loads((tmp_path / "run" / "0_single" / "history.json").read_text())
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


@pytest.mark.slow
def test_a_prior_of_digits(digits, tmp_path):
    arguments = ["--train", digits, "--test", digits, "--out", tmp_path, "--quick"]
    printed = run("recipes/prior_mnist.py", *arguments)
    card = json.loads((tmp_path / "config.json").read_text())
    assert card["metrics"]["test_images"] == 256 and "frechet_distance_to_test" in printed
    assert load_prior(tmp_path)(torch.zeros(1, 1, 32, 32), 0.1).shape == (1, 1, 32, 32)
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.slow
def test_a_prior_of_photographs(photos, tmp_path):
    run("recipes/prior_photos.py", "--train", photos, "--test", photos, "--out", tmp_path, "--quick")
    assert (tmp_path / "denoised.png").is_file()
    assert load_prior(tmp_path)(torch.zeros(1, 3, 32, 32), 0.1).shape == (1, 3, 32, 32)


def train(*arguments, launcher=(), **options):
    """``python -m deepinv_ud2m.training`` in a process of its own."""
    command = [sys.executable, *launcher, "-m", "deepinv_ud2m.training", *arguments]
    options |= {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 600, "text": True}
    return subprocess.run(list(map(str, command)), capture_output=True, check=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet", "imagenet_ram", "lsun", "lsun_ram", "mnist_paper"])
def test_recipes_of_the_paper_in_miniature(name, photos, digits, tmp_path):
    """All losses, LPIPS and the adversary included, all tasks, and the held-out images."""
    pytest.importorskip("diffusers")
    images = digits if name == "mnist_paper" else photos
    recipe = EXAMPLES / "recipes" / f"{name}.yaml"
    result = train(recipe, "--images", images, "--out", tmp_path, "--smoke", "--checkpointing")
    assert result.returncode == 0, result.stderr
    for file in ("0_single/checkpoint.pt", "0_single/samples_0.png", "model/model.safetensors"):
        assert (tmp_path / file).is_file()
    history = json.loads((tmp_path / "0_single" / "history.json").read_text())
    losses = {"L2Loss", "PerceptualLoss", "AdversarialGeneratorLoss", "D AdversarialDiscriminatorLoss"}
    assert losses <= set(history) and "eval: energy score" in history
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    trained = {key.split(".")[0] for key in config["weights"]["tensors"]}
    assert trained >= ({"lora", "scalars"} | ({"initializer"} if "ram" in name else set()))
    assert config["metadata"]["recipe"]["losses"][0] == {"loss": "l2", "of": "noise"}
    if name in ("imagenet", "lsun"):  # the prior has random weights, from the seed of the run
        torch.manual_seed(0)
        prior = random_prior({"imagenet": "imagenet256", "lsun": "lsun-bedroom256"}[name])
        model = UD2M.from_pretrained(tmp_path / "model", prior=prior)
        assert (model.num_steps, model.eta) == (3, 0.8)


@pytest.mark.slow
def test_a_recipe_of_the_paper_in_two_processes(photos, tmp_path):
    pytest.importorskip("diffusers")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [EXAMPLES / "recipes" / "imagenet.yaml", "--images", photos, "--smoke"]
    for accumulate, fails in ((2, False), (1, True)):
        options = ["--accumulate", accumulate, "--out", tmp_path / str(accumulate)]
        result = train(*arguments, *options, launcher=launcher)
        assert bool(result.returncode) is fails, result.stderr
    assert (tmp_path / "2" / "model" / "model.safetensors").is_file()
    assert "accumulate must be a multiple of the number of processes" in result.stderr
