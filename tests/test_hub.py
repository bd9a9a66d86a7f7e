"""Samplers on the Hugging Face Hub: there and back, model cards, and failures."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import sample
from huggingface_hub import ModelCard

import deepinv_ud2m
from deepinv_ud2m import UD2M
from deepinv_ud2m.checkpoint import PRETRAINED
from deepinv_ud2m.hub import model_card


class Repository(str):
    """The address of a repository, as huggingface_hub returns it."""

    def __new__(cls, repo_id):
        url = super().__new__(cls, f"https://huggingface.co/{repo_id}")
        url.repo_id = repo_id
        return url


class FakeHub:
    """A Hub in memory, in place of the functions that would reach the network."""

    def __init__(self, folder):
        self.folder, self.calls, self.files = folder, [], {}

    def HfApi(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        return Repository(full)

    def file_exists(self, repo_id, name):
        return name in self.files.get(repo_id, {})

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, commit_message))
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.files.setdefault(repo_id, {}).update(files)

    def snapshot_download(self, repo_id, revision=None, allow_patterns=None):
        self.calls.append(("download", repo_id, revision))
        if repo_id not in self.files:
            raise OSError("404 repository not found")
        self.folder.mkdir(exist_ok=True)
        for name in allow_patterns:
            (self.folder / name).write_bytes(self.files[repo_id][name])
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.HfApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_to_the_hub_and_back(tiny_sampler, tiny_folder, hub, capsys):
    url = tiny_sampler.push_to_hub("repo", private=True, token="t", prior=tiny_folder, metadata={"data": "x"})
    assert url == "https://huggingface.co/me/repo"
    upload = ("upload", "me/repo", "Upload UD2M sampler")
    assert hub.calls == [("token", "t"), ("create", "repo", True, True), upload]
    assert hub.files["me/repo"].keys() == {"config.json", "model.safetensors", "README.md"}
    loaded = UD2M.from_pretrained("me/repo", revision="v1", merge=False)
    assert hub.calls[-1] == ("download", "me/repo", "v1")
    assert torch.equal(sample(loaded), sample(tiny_sampler))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("model.safetensors", "'me/repo'", "v1", "Hugging Face Hub"))


def test_what_is_left_alone(tiny_sampler, sampler_folder, hub, monkeypatch):
    with pytest.raises(TypeError, match="metadata"):
        tiny_sampler.push_to_hub("me/repo", metadata={"x": object()})
    assert not hub.calls, "what cannot be saved is not uploaded"
    monkeypatch.chdir(sampler_folder.parent.parent)  # a folder comes before the Hub
    loaded = UD2M.from_pretrained(f"{sampler_folder.parent.name}/{sampler_folder.name}", merge=False)
    assert torch.equal(sample(loaded), sample(tiny_sampler)) and not hub.calls
    hub.files["me/repo"] = {"README.md": b"mine"}
    tiny_sampler.push_to_hub("me/repo")
    assert hub.files["me/repo"]["README.md"] == b"mine"
    assert "config.json" in hub.files["me/repo"]
    with pytest.raises(OSError, match=r"'runs/typo' is neither a folder nor.*404 repository not found"):
        UD2M.from_pretrained("runs/typo")
    # Where runs is a folder, a folder was meant, unless a revision is given.
    Path("runs").mkdir()
    hub.calls.clear()
    with pytest.raises(ValueError, match=r"no folder 'runs/typo' in the folder 'runs'.* revision='main'"):
        UD2M.from_pretrained("runs/typo")
    assert not hub.calls
    with pytest.raises(OSError, match="404 repository not found"):
        UD2M.from_pretrained("runs/typo", revision="main")


def test_model_card(sampler_folder):
    config = json.loads((sampler_folder / "config.json").read_text())
    card = model_card("me/repo", config)
    assert card.data.to_dict() | {"tags": None} == {
        "license": "unknown", "library_name": "deepinv", "pipeline_tag": "image-to-image", "tags": None
    }  # fmt: skip
    parts = ['UD2M.from_pretrained("me/repo", prior=prior)', '"seed": 7', config["prior"]["fingerprint"]]
    nothing = ["does not say what the sampler was trained on", "holds no results"]
    assert all(part in card.text for part in [*parts, *nothing, "3.3, 0.7, 0.1", "rank 2 on"])
    config |= {"initializer": {"kind": "RAMInitializer"}, "lora": None, "metadata": {"license": "mit"}}
    config["prior"] |= {"name": "mnist", "channels": None}
    card = model_card("me/repo", config)
    assert 'from_pretrained("me/repo", initializer=initializer)' in card.text
    assert "| LoRA | none |" in card.text and card.data.license == "mit"


@pytest.mark.parametrize("name", PRETRAINED)
def test_cards_say_what_the_shipped_files_say(name, tmp_path):
    weights = Path(deepinv_ud2m.__file__).parent / "weights"
    config = json.loads((weights / PRETRAINED[name] / "config.json").read_text())
    metadata, digits = config["metadata"], name.startswith("mnist")
    metadata = {**metadata.get("recipe", {}), **metadata}
    model_card("me/repo", config).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")  # it is read as the Hub reads it
    assert (card.data.license, card.data.pipeline_tag) == ("bsd-3-clause", "image-to-image")
    assert card.data.datasets == (["ylecun/mnist"] if digits else None)
    assert {"PSNR", "energy score"} <= {*card.data.metrics}
    assert f"| images | {metadata['data']} |" in card.text
    assert all(task in card.text for task in metadata["tasks"])
    low, high = metadata["sigma_y"]
    assert f"| noise levels, least and largest | {low}, {high} |" in card.text or low == high
    assert f"| all | {metadata['validation']['PSNR']:.4g} |" in card.text
    assert ("calibration: factor" in card.text) == (
        "factor of delta" in metadata or "delta_factor" in metadata
    )


def test_cards_of_trainings(sampler_folder):
    """What a recipe and an evaluation store."""
    config = json.loads((sampler_folder / "config.json").read_text())
    stages = [{"size": 64}, {"size": 32}, {"size": None}]
    recipe = {
        "tasks": ["sr4", "jpeg-10"],
        "sigma_y": [0.01, 0.1],
        "losses": [{"loss": "energy"}],
        "stages": stages,
    }
    figures = {"energy score": 1.5, "energy score/0": 1.25, "energy score/1": 1.75, "diversity/0": 1.1}
    config["metadata"] = {"recipe": recipe, "factor of delta": 0.95, "step": 40, **figures}
    card = model_card("me/repo", config)
    lines = [
        "| degradations | sr4, jpeg-10 |",
        "| noise levels, least and largest | 0.01, 0.1 |",
        "| image size in pixels | 32, 64 |",
        "| losses | loss energy |",
        "| calibration: factor on all delta_k | 0.95 |",
        "| all | 1.5 |",
        "| jpeg-10 | 1.75 |",
    ]
    assert [line for line in lines if line not in card.text] == []
    assert card.data.metrics == ["energy score"]


def test_without_huggingface_hub(tiny_sampler, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        UD2M.from_pretrained("user/repo")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        tiny_sampler.push_to_hub("user/repo")
