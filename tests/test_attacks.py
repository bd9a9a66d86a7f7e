"""
Hostile files: none of them is executed, whoever opens them.

Each attack writes a file whose code makes a trace where it is executed, and says how a user opens it. It may
be refused or read; it must not leave the trace.
"""

import contextlib
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import Bomb, make_tiny_config, make_tiny_prior, trained_sampler
from distillation import make_trainer

from deepinv_ud2m import UD2M, load_prior, save_prior
from deepinv_ud2m.benchmark.methods import read_methods
from deepinv_ud2m.benchmark.report import report
from deepinv_ud2m.cli import main
from deepinv_ud2m.data import load_image, load_images, mnist_arrays
from deepinv_ud2m.files import sha256
from deepinv_ud2m.metrics import DigitClassifier
from deepinv_ud2m.photographs import read_kernel
from deepinv_ud2m.training import Recipe
from deepinv_ud2m.training.__main__ import main as train

PICKLES = {
    "a pickle": lambda bomb, file: file.write_bytes(pickle.dumps(bomb)),
    "a zip of torch": torch.save,
    "tensors by name": lambda bomb, file: torch.save({"conv_in.weight": bomb}, file),
    "a legacy file of torch": lambda bomb, file: torch.save(bomb, file, _use_new_zipfile_serialization=False),
}


def _sampler(folder, write):
    trained_sampler(make_tiny_prior()).save_pretrained(folder / "sampler")
    return _edit(folder / "sampler", write), lambda: UD2M.from_pretrained(
        folder / "sampler", prior=make_tiny_prior()
    )


def _edit(folder, write):
    """Weights whose digest is in the configuration."""
    file = folder / "model.safetensors"
    write(file)
    config = json.loads((folder / "config.json").read_text())
    section = config.get("weights", config)
    section["sha256"] = sha256(file)
    (folder / "config.json").write_text(json.dumps(config))
    return file


def _prior(folder, write):
    save_prior(make_tiny_prior(), make_tiny_config(), folder / "prior")
    return _edit(folder / "prior", write), lambda: load_prior(folder / "prior")


def _published(name):
    def attack(folder, write):
        write(folder / name)
        return folder / name, lambda: load_prior("ffhq256", weights=folder / name)

    return attack


def _pipeline(folder):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = diffusers.UNet2DModel(32, layers_per_block=1, block_out_channels=(32,), **blocks)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(folder)
    return lambda: load_prior("lsun-bedroom256", weights=folder)


def _unet(name):
    def attack(folder, write):
        load, unet = _pipeline(folder), folder / "unet"
        (unet / "diffusion_pytorch_model.safetensors").unlink()
        write(unet / name)
        return unet / name, load

    return attack


def _checkpoint(folder, write):
    write(folder / "checkpoint.pt")
    trainer = make_trainer(make_tiny_prior(), save_path=folder)
    return folder / "checkpoint.pt", trainer.train


def _classifier(folder, write):
    (folder / "config.json").write_text(json.dumps({"sha256": ""}))
    return _edit(folder, write), lambda: DigitClassifier.from_pretrained(folder)


def _file(name, load):
    def attack(folder, write):
        write(folder / name)
        return folder / name, lambda: load(folder / name)

    return attack


PICKLED = {
    "sampler": _sampler,
    "prior": _prior,
    "published prior, .pt": _published("w.pt"),
    "published prior, .safetensors": _published("w.safetensors"),
    "diffusers, .bin": _unet("diffusion_pytorch_model.bin"),
    "diffusers, .safetensors": _unet("diffusion_pytorch_model.safetensors"),
    "checkpoint of a training": _checkpoint,
    "classifier of a metric": _classifier,
    "image": _file("x.png", load_image),
    "digits": _file("x.npz", mnist_arrays),
    "kernel": _file("k.npy", read_kernel),
}


@pytest.fixture
def bomb(tmp_path):
    return Bomb(tmp_path / "trace")


def opened(load):
    with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
        load()


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", PICKLED)
def test_no_pickle_is_executed(name, kind, bomb, tmp_path):
    (tmp_path / "folder").mkdir()
    file, load = PICKLED[name](tmp_path / "folder", lambda file: PICKLES[kind](bomb, file))
    opened(load)
    assert not bomb.trace.exists()
    if kind == "a pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(io.BytesIO(file.read_bytes()), weights_only=False)
    assert bomb.trace.exists(), "it is a bomb"


@pytest.mark.parametrize("name", ["x.npz", "k.npy", "reference.npz"])
def test_no_array_of_objects_is_executed(name, bomb, tmp_path):
    objects = np.array([bomb], dtype=object)
    if name.endswith(".npz"):
        np.savez(tmp_path / name, x=objects, y=objects, features=objects)
    else:
        np.save(tmp_path / name, objects)
    load = {"x.npz": mnist_arrays, "k.npy": read_kernel, "reference.npz": lambda file: report(file.parent)}[
        name
    ]
    opened(lambda: load(tmp_path / name))
    assert not bomb.trace.exists()


YAML = {
    "recipe": lambda file: Recipe.read(file),
    "methods": lambda file: read_methods([str(file)]),
    "a change on the command line": lambda file: train(
        ["default", "--images", str(file.parent), "--set", f"kappa={file.read_text().splitlines()[0]}"]
    ),
}


@pytest.mark.parametrize("name", YAML)
def test_no_tag_of_yaml_is_executed(name, tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    tag = f'!!python/object/apply:builtins.open ["{trace}", "w"]'
    (tmp_path / "evil.yaml").write_text(f"{tag}\n" if name != "recipe" else f"delta: {tag}\n")
    monkeypatch.setattr("sys.argv", ["train"])
    with contextlib.suppress(SystemExit):
        opened(lambda: YAML[name](tmp_path / "evil.yaml"))
    assert not trace.exists()
    import yaml

    yaml.unsafe_load((tmp_path / "evil.yaml").read_text())
    assert trace.exists()


@pytest.mark.parametrize("name", ["prior", "sampler", "diffusers", "classifier", "images", "pictures"])
def test_no_module_beside_files_is_executed(name, tmp_path, monkeypatch):
    """Files with names that libraries import, in the folder that is opened, which is the current one."""
    folder, trace = tmp_path / "folder", tmp_path / "trace"
    if name == "diffusers":
        load = _pipeline(folder)
    elif name == "prior":
        save_prior(make_tiny_prior(), make_tiny_config(), folder)
        load = lambda: load_prior(folder)  # noqa: E731
    elif name == "sampler":
        trained_sampler(make_tiny_prior()).save_pretrained(folder)
        load = lambda: UD2M.from_pretrained(folder, prior=make_tiny_prior())  # noqa: E731
    else:
        folder.mkdir()
        load = {
            "classifier": lambda: DigitClassifier.from_pretrained(folder),
            "images": lambda: load_images(folder, 3, 16),
            "pictures": lambda: main(["restore", str(folder), "--task", "denoise"]),
        }[name]
    code = f"open({str(trace)!r}, 'w')\nclass Evil: pass\n"
    spots = [folder, *(spot for spot in folder.iterdir() if spot.is_dir())]
    for spot in spots:
        for module in (
            "evil",
            "pipeline",
            "unet",
            "__init__",
            "modeling",
            "conftest",
            "torch",
            "usercustomize",
        ):
            (spot / f"{module}.py").write_text(code)
        for file in spot.glob("*.json"):
            content = json.loads(file.read_text())
            hostile = {
                "auto_map": {"AutoModel": "evil.Evil"},
                "_module": "evil.py",
                "trust_remote_code": True,
            }
            file.write_text(json.dumps(content | hostile | {"_class_name": ["evil", "Evil"]}))
    monkeypatch.chdir(folder)
    opened(load)
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text().replace('"kind": "', '"kind": "evil.Evil'))
    opened(load)
    assert not trace.exists()
    exec(code)
    assert trace.exists()
    shutil.rmtree(folder)
