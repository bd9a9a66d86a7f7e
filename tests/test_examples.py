"""The examples, as a user would start them, with smaller images where they take long."""

import importlib
import re

import pandas as pd
import pytest
from PIL import Image
from scripts import EXAMPLES, run
from torchvision.utils import save_image

import deepinv_ud2m.data
from deepinv_ud2m import UD2M

PHOTO = sorted(file.stem for file in EXAMPLES.glob("photo_*.py"))
DIGITS = sorted(file.stem for file in EXAMPLES.glob("digits_*.py"))


def slow_but(names, *fast):
    """Names as parameters, marked slow but for some."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def helpers(monkeypatch, tmp_path):
    """The module of the examples; figures go to a temporary folder, and DiffPIR takes few steps."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    helpers = importlib.import_module("helpers")
    monkeypatch.setattr(helpers, "OUT", tmp_path)
    monkeypatch.setattr(helpers, "DIFFPIR_STEPS", 5)
    return helpers


@pytest.fixture
def small(monkeypatch):
    """Photographs of 64 x 64 pixels, and at most four digits."""
    photograph, mnist_digits = deepinv_ud2m.data.photograph, deepinv_ud2m.data.mnist_digits
    monkeypatch.setattr(deepinv_ud2m.data, "photograph", lambda name: photograph(name)[..., 64:128, 64:128])
    monkeypatch.setattr(deepinv_ud2m.data, "mnist_digits", lambda s, num: mnist_digits(s, min(num, 4)))


def check_figure(file):
    with Image.open(file) as figure:
        assert figure.format == "WEBP" and min(figure.size) > 200
        assert len(figure.convert("L").getcolors()) > 50


def table_of(printed):
    """PSNR and network evaluations by method, of what ``compare`` printed."""
    rows = [line for line in printed.splitlines() if line.startswith(("UD2M", "DiffPIR", "DPIR", "pseudo"))]
    return {row[:20].strip(): [float(row[20:].split()[i]) for i in (0, -1)] for row in rows}


@pytest.mark.parametrize("name", slow_but(PHOTO, "photo_jpeg", "photo_motion_deblurring"))
def test_photographs(name, helpers, monkeypatch, tmp_path):
    photograph = deepinv_ud2m.data.photograph  # the examples take parts of it, which are smaller then
    monkeypatch.setattr(deepinv_ud2m.data, "photograph", lambda name: photograph(name)[..., :104, :104])
    rows = table_of(run(f"{name}.py"))
    once = 6 if name == "photo_jpeg" else 9
    assert [nfe for _, nfe in rows.values()] == [once, 8 * once, 5, 8, 0]
    assert list(rows) == ["UD2M, one sample", "UD2M, mean of 8", "DiffPIR", "DPIR", "pseudo-inverse"]
    # In these small images there is no box, a JPEG is near to the truth in squared error, and so is bicubic
    # interpolation.
    least = {"photo_box_inpainting": 0, "photo_jpeg": -1.5, "photo_superresolution": 0.3}.get(name, 1)
    assert rows["UD2M, mean of 8"][0] > rows["pseudo-inverse"][0] + least
    check_figure(tmp_path / f"{name}.webp")


def test_there_is_a_short_script_for_each_degradation_and_figures_are_small():
    assert len(PHOTO) == 7 and len(DIGITS) == 3
    for name in PHOTO + DIGITS:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40, name
    sizes = [file.stat().st_size for file in (EXAMPLES / "figures").iterdir()]
    assert max(sizes) < 150_000 and sum(sizes) < 1_000_000


@pytest.mark.parametrize("name", slow_but(DIGITS, "digits_superresolution"))
def test_digits(name, helpers, small, tmp_path):
    rows = table_of(run(f"{name}.py"))
    mean = next(row for row in rows if "mean" in row)
    assert rows["UD2M, one sample"][1] == 9
    assert rows[mean][0] > rows["UD2M, one sample"][0] > rows["pseudo-inverse"][0] + 1
    for figure in ["_random", "_box"] if "inpainting" in name else [""]:
        check_figure(tmp_path / f"{name}{figure}.webp")


def test_exact_posterior(helpers, tmp_path):
    printed = run("exact_posterior.py").splitlines()
    rows = {line[:24].strip(): [float(v) for v in line[24:].split()] for line in printed[1:4]}
    for name in ("exact draws, N = 1", "exact draws, N = 3"):
        error, ratio = rows[name]  # chance alone: 0.007 and 1 +- 0.001
        assert error < 0.02 and abs(ratio - 1) < 0.005
    assert rows["LATINO, K = 3, N = 3"][0] > 0.2
    check_figure(tmp_path / "exact_posterior.webp")


def test_your_prior(helpers, tmp_path):
    printed = run("your_prior.py").splitlines()
    for line, least in zip(printed[:2], (15, 1), strict=True):
        measured, _, mean = (float(part.split(" dB")[0].split()[-1]) for part in line.split(",")[:3])
        assert mean > measured + least
    check_figure(tmp_path / "your_prior.webp")


@pytest.mark.parametrize("file", ["photo.png", pytest.param(None, marks=pytest.mark.slow)])
def test_full_photo(file, helpers, small, tmp_path):
    save_image(deepinv_ud2m.data.photograph("chelsea"), tmp_path / "photo.png")
    arguments, size = ([tmp_path / file], "64 x 64") if file else ([], "192 x 128")
    assert f"{size} pixels" in run("full_photo.py", *arguments)
    check_figure(tmp_path / "full_photo.webp")


@pytest.mark.slow
def test_a_benchmark_ends_in_a_table(small):
    lines = run("benchmark.py").splitlines()[-4:]
    assert "energy score" in lines[0] and [line.split()[0] for line in lines[1:]] == [
        "UD2M",
        "DiffPIR",
        "DPS",
    ]
    assert [line.split()[-2:] for line in lines[1:]] == [["9.0", "0.0"], ["100.0", "0.0"], ["100.0", "100.0"]]


@pytest.mark.slow
def test_in_deepinv(small):
    printed = run("in_deepinv.py")
    scores = [float(line.split("PSNR ")[1].split()[0]) for line in printed.splitlines()[:4]]
    assert min(scores) > 24 and "mean of 16 by DiffusionSampler" in printed


@pytest.mark.slow
def test_any_physics_and_uncertainty(helpers, tmp_path):
    for line in run("any_physics.py").splitlines()[1:5]:
        inverse, _, mean = map(float, line[20:].split())
        assert mean > inverse + 1
    printed = run("uncertainty.py")
    correlation, ratio = (float(line.split()[-1]) for line in printed.splitlines()[:2])
    mended = float(next(line for line in printed.splitlines() if line.startswith("mean -+")).split()[-1][:-1])
    assert correlation > 0.1 and ratio > 1 and 80 < mended <= 98 and printed.count("PSNR") == 3
    for name in ("any_physics", "uncertainty"):
        check_figure(tmp_path / f"{name}.webp")


@pytest.mark.slow
def test_a_training_of_ones_own(helpers, tmp_path):
    """With few steps it runs; with 400 the energy score falls from 3.36 +- 0.16 to 2.73 +- 0.13."""
    printed = run("your_training.py", "--steps", "3", "--out", tmp_path / "run")
    scores = re.findall(r"^(?:un)?trained +energy score ([\d.]+)", printed, re.MULTILINE)
    assert len(scores) == 2 and min(map(float, scores)) > 0, printed
    check_figure(tmp_path / "your_training.webp")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan_ct", "scan_mri", "microscopy"])
def test_scans(name, helpers, tmp_path):
    """Better than the pseudo-inverse, by the mean and by one sample."""
    printed = run(f"{name}.py")
    rows = table_of(printed)
    for row in ("UD2M, one sample", "UD2M, mean of 8"):
        assert rows[row][0] > rows["pseudo-inverse"][0] + 2, printed
    files = [f"scan_mri_{coils}" for coils in ("one_coil", "four_coils")] if name == "scan_mri" else [name]
    for file in files:
        check_figure(tmp_path / f"{file}.webp")


@pytest.mark.slow
def test_right_and_wrong_operators_on_files(helpers, tmp_path):
    """The right ones are better than what is given, the wrong ones are worse, and warn."""
    run("real_photographs.py", "--samples", 2, "--out", tmp_path / "real.csv")
    table = pd.read_csv(tmp_path / "real.csv", index_col=["measurement", "operator"])
    images = table[["image 1", "image 2"]]
    blur, shrunk = images.loc["blur"], images.loc["shrunk by 4"]
    assert (blur.loc["valid, noise 0.02"] > blur.loc["as it is"] + 2).all()
    assert (blur.loc["valid, estimated noise"] > blur.loc["valid, noise 0.02"] - 0.3).all()
    assert (shrunk.loc["DownsamplingMatlab"] > shrunk.loc["bicubic interpolation"] + 0.3).all()
    warns = table["warns"] == "yes"
    right = {"valid, estimated noise", "valid, noise 0.02", "reflected, noise 0.02", "DownsamplingMatlab"}
    right |= {"as it is", "bicubic interpolation"}
    assert {name for (_, name), said in warns.items() if not said} == right


@pytest.mark.slow
def test_intervals_are_stored_with_a_sampler(tmp_path):
    """As many pixels as stated are in them, and the weights are those that were given."""
    options = ["--model", "mnist", "--num", 10, "--sigma-y", 0.05, "--samples", 4, "--tasks", "inpaint-box"]
    printed = run("recipes/conformal.py", *options, "--out", tmp_path / "model", "--check", "validation")
    conformal = UD2M.from_pretrained(tmp_path / "model").conformal["inpaint-box"]
    assert conformal.num_samples == 4 and f"factor {conformal.factor:.2f}" in printed
    line = pd.read_csv(tmp_path / "model" / "coverage.csv").iloc[0]
    assert line["fitted"] > line["without"] > 0.8
    again = ["--model", tmp_path / "model", *options[2:], "--check", "validation", "--out"]
    assert run("recipes/conformal.py", *again, tmp_path / "model") == "", "it is done"
    checked = run("recipes/conformal.py", *again, tmp_path / "kept", "--keep")
    assert printed == f"{printed.splitlines()[0]}\n{checked}", "the same intervals, not fitted again"
    assert f"factor {conformal.factor:.2f}" in run("recipes/conformal.py", *again, tmp_path / "other"), "anew"
