"""The paper's tables in miniature: small images, random weights, stand-in features."""

import os
import subprocess
import sys
from pathlib import Path

import deepinv as dinv
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import refused, seeded
from torchvision.utils import save_image

from deepinv_ud2m.benchmark import paper
from deepinv_ud2m.benchmark.__main__ import main
from deepinv_ud2m.benchmark.rows import batch_folder
from deepinv_ud2m.metrics import frechet_distance
from deepinv_ud2m.priors import PUBLISHED

QUICK = [{"name": "ud2m"}, {"name": "diffpir", "settings": {"num_steps": 2}}]
QUICK += [{"name": "dps", "settings": {"num_steps": 2}}, {"name": "ddrm", "settings": {"num_steps": 2}}]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four images, in the folders of classes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        (folder / f"n{i % 2}").mkdir(exist_ok=True)
        image = torch.rand(1, 3, 6, 7, generator=seeded(i))
        image = torch.nn.functional.interpolate(image, (66, 77), mode="bicubic").clamp(0, 1)
        save_image(image, folder / f"n{i % 2}" / f"{i}.JPEG")
    return folder


@pytest.fixture
def methods(tmp_path):
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump(QUICK))
    return tmp_path / "methods.yaml"


@pytest.mark.parametrize("table", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_table_of_the_paper(table, images, methods, tmp_path, capsys):
    if table == 2:
        pytest.importorskip("diffusers")
    out = tmp_path / "out"
    command = ["paper", "--table", str(table), "--images", str(images), "--smoke", "--out", str(out)]
    command += ["--methods", str(methods), "--batch-size", "2", "--device", "cpu", "--number", "2"]
    command += ["--perceptual", "lpips-squeeze"]
    assert main(command) == 0
    text, lines = (out / "paper.md").read_text(), pd.read_csv(out / "paper.csv")
    card = paper.TABLES[table]
    assert set(lines["task"]) == set(card.tasks) and (lines["images"] == 2).all()
    assert set(lines["method"]) == {"ud2m", "diffpir", "dps", "ddrm"}
    assert lines[["PSNR", "SSIM", "LPIPS", "FID"]].notna().all().all() and (lines["LPIPS"] > 0).all()
    assert lines["SSIM"].between(-1, 1).all() and "diffpir, 2 (settings not searched)" in text
    assert set(lines.loc[lines["method"] == "ud2m", "NFE"]) == {9}
    for method, figures in card.figures.items():
        assert f"*paper:* {method}" in text
        assert " / ".join(f"{v:.2f}" for v in next(iter(figures.values()))).replace("nan", "-") in text
    assert "random backbone" in text and "- |" not in text.split("\n\n")[0]
    # The FID is that of the samples to the images.
    with np.load(out / "reference.npz") as arrays:
        reference = torch.from_numpy(arrays["features"]).float()
    task, method = lines.iloc[0][["task", "method"]]
    files = sorted(batch_folder(out, task, method).glob("*.npz"))
    samples = torch.cat([torch.from_numpy(np.load(file)["features"]) for file in files]).float()
    assert len(samples) == 2
    pair = samples[..., None, None], reference[..., None, None]
    expected = frechet_distance(*pair, lambda z: z.flatten(1))
    assert lines.iloc[0]["FID"] == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
    # Started again it computes nothing.
    before = (out / "rows.csv").read_bytes()
    assert main(command) == 0 and (out / "rows.csv").read_bytes() == before


def test_a_dry_run_says_what_is_needed(images, methods, tmp_path, capsys, monkeypatch):
    """All that is missing at once, with its size and place; times from measured parts."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    small = dinv.models.DRUNet(nc=(4, 4, 4, 4), nb=1, pretrained=None)
    monkeypatch.setattr(paper, "random_prior", lambda name, full_size: small)
    command = ["paper", "--table", "1", "--images", str(images), "--methods", str(methods), "--device", "cpu"]
    assert main([*command, "--dry-run", "--number", "2"]) == 0
    printed = capsys.readouterr().out
    weights = "diffusion_openai.pt (2211 MB, sha256 " + PUBLISHED["imagenet256"].sha256 + ")"
    for words in (weights, "528 MB, sha256 397923af..., from https", "95 MB from https", str(tmp_path)):
        assert words in printed, printed
    assert printed.count("missing: ") == 3 and "2 images of 256x256 pixels, 4 tasks" in printed
    assert "deblur-gaussian-paper, ud2m: 9 evaluations, about" in printed
    assert "s an image" in printed and "GiB at its peak" in printed and "hours by one process" in printed
    assert not (tmp_path / "runs").exists()
    assert main(command) == 2 and weights in capsys.readouterr().err


def test_inception_is_not_unpickled(tmp_path, monkeypatch):
    """A file that is not of tensors is refused; one of tensors gives torch-fidelity's features."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloads"))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / Path(paper._INCEPTION_URL).name

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"a": Evil()}, file)
    refused((lambda: paper.inception_features(), "damaged, or no weights"))
    assert not (tmp_path / "executed").exists()
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.save(network.state_dict(), file)
    x = torch.rand(2, 3, 32, 32, generator=seeded())
    features = paper.inception_features()(x)
    assert torch.allclose(features, network((255 * x).round().byte())[0]) and features.shape == (2, 2048)


def test_what_a_table_cannot_be_measured_with(images, tmp_path, capsys):
    refused(
        (lambda: paper.make_study(3, images, []), "table must be one of"),
        (lambda: paper.make_study(1, images, [], number=9, smoke=True), "number must be at most 4"),
        (lambda: paper.make_study(1, tmp_path, [], smoke=True), "must be a folder of images"),
    )
    command = ["paper", "--table", "1", "--images", str(images), "--device", "cpu", "--checkpoints", "a", "a"]
    assert main(command) == 2 and "labels of methods must differ" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_is_shared_by_processes(images, methods, tmp_path):
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, "-m", "deepinv_ud2m.benchmark", "paper", "--table", "1"]
        command += [
            "--smoke",
            "--images",
            str(images),
            "--methods",
            str(methods),
            "--out",
            str(tmp_path / name),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--device", "cpu"], check=True, env=environment, timeout=600)
    one, two = (pd.read_csv(tmp_path / name / "paper.csv") for name in launchers)
    columns = ["task", "method", "images", "NFE", "PSNR", "FID"]
    pd.testing.assert_frame_equal(one[columns], two[columns], rtol=1e-3)
