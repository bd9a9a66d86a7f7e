"""Samplers on the Hugging Face Hub: there and back, model cards, and failures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import sample

from deepinv_ud2m import UD2M
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
    huggingface_hub = pytest.importorskip("huggingface_hub")
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
    assert card.startswith("---\nlibrary_name: deepinv\n")
    parts = ['UD2M.from_pretrained("me/repo", prior=prior)', '"seed": 7', config["prior"]["fingerprint"]]
    assert all(part in card for part in [*parts, "3.3, 0.7, 0.1", "rank 2 on"])
    config |= {"initializer": {"kind": "RAMInitializer"}, "lora": None}
    config["prior"] |= {"name": "mnist", "channels": None}
    card = model_card("me/repo", config)
    assert 'from_pretrained("me/repo", initializer=initializer)' in card and "| LoRA | none |" in card


def test_without_huggingface_hub(tiny_sampler, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        UD2M.from_pretrained("user/repo")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        tiny_sampler.push_to_hub("user/repo")
