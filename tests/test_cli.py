"""The command line, and photographs that were degraded outside of the package."""

import json
import os
import subprocess
import sys

import deepinv as dinv
import numpy as np
import pytest
import torch
from conftest import refused, seeded
from PIL import Image
from scipy import signal
from torchvision.transforms.functional import to_pil_image

from deepinv_ud2m import cli
from deepinv_ud2m.cli import main
from deepinv_ud2m.data import load_image, photograph
from deepinv_ud2m.photographs import physics_of, read_kernel, read_photograph
from deepinv_ud2m.pictures import write_png

SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photograph, and files of it: blurred, compressed, reduced, with a hole, grey and noisy."""
    out = tmp_path_factory.mktemp("files")
    x = photograph("astronaut")[0, :, 180 : 180 + SIZE, 100 : 100 + SIZE]
    kernel = np.outer([1, 2, 4, 2, 1], [1, 3, 1]).astype(np.float32)
    blurred = signal.convolve(x.numpy(), (kernel / kernel.sum())[None], mode="valid")
    noise = torch.randn(3, SIZE, SIZE, generator=seeded())
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 10:30, 12:24] = 1
    save = lambda name, values: to_pil_image(torch.as_tensor(values).float().clamp(0, 1)).save(out / name)  # noqa: E731
    np.save(out / "kernel.npy", kernel)
    save("truth.png", x)
    save("kernel.png", kernel[None] / kernel.max())
    save("blur.png", torch.tensor(blurred) + 0.02 * noise[:, : blurred.shape[1], : blurred.shape[2]])
    to_pil_image(x).save(out / "jpeg.jpg", quality=20)
    to_pil_image(x).resize((SIZE // 2, SIZE // 2), Image.BICUBIC).save(out / "small.png")
    save("mask.png", mask)
    save("hole.png", x * (1 - mask) + 0.7 * mask)  # whatever stands in it
    save("grey.png", x.mean(0, keepdim=True) + 0.08 * noise[:1])
    return out


CASES = {
    "jpeg.jpg": (["--task", "jpeg"], 0.0),
    "blur.png": (["--task", "blur", "--kernel", "kernel.npy"], 1.0),
    "small.png": (["--task", "sr", "--factor", "2", "--noise", "0.01"], 0.5),
    "hole.png": (["--task", "inpaint", "--mask", "mask.png"], 3.0),
    "grey.png": (["--task", "denoise"], 3.0),
}


@pytest.mark.parametrize("name", CASES)
def test_restores_better_than_what_was_there(folder, tmp_path, monkeypatch, capsys, name):
    arguments, gain = CASES[name]
    monkeypatch.chdir(folder)
    assert main(["restore", name, *arguments, "--samples", "4", "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert (
        summary["network evaluations per sample"] == (6 if "jpeg" in name else 9)
        and summary["options"]["samples"] == 4
    )
    x, given = load_image("truth.png"), load_image(name)
    if name == "grey.png":
        x, given = x.mean(1, keepdim=True), given[:, :1]
        assert summary["noise"] == pytest.approx(0.08, rel=0.25)
    mean = load_image(tmp_path / "out" / f"{name}_mean.png", x.shape[1])
    samples = [load_image(tmp_path / "out" / f"{name}_sample{i}.png", x.shape[1]) for i in range(1, 5)]
    std = load_image(tmp_path / "out" / f"{name}_std.png", x.shape[1])
    assert torch.allclose(torch.stack(samples).mean(0), mean, atol=4e-3)  # readers make 8 bits of 16
    assert torch.allclose(torch.stack(samples).std(0), std, atol=8e-3)
    assert mean.shape == x.shape
    given = torch.nn.functional.interpolate(given, x.shape[-2:], mode="bicubic").clamp(0, 1)
    psnr = dinv.metric.PSNR()
    assert psnr(mean, x).item() > psnr(given, x).item() + gain
    with Image.open(tmp_path / "out" / f"{name}_sheet.png") as figure:
        assert figure.width > 600
    # Started again it has nothing to do; with another option it has.
    before = (tmp_path / "out" / f"{name}_mean.png").stat().st_mtime_ns
    command = ["restore", name, *arguments, "--out", str(tmp_path / "out")]
    assert main([*command, "--samples", "4"]) == 0
    assert (tmp_path / "out" / f"{name}_mean.png").stat().st_mtime_ns == before
    assert main([*command, "--samples", "2", "--seed", "1"]) == 0
    assert (tmp_path / "out" / f"{name}_mean.png").stat().st_mtime_ns > before
    assert len(list((tmp_path / "out").glob("*_sample*.png"))) == 2, "none of the four of before"


def test_another_photograph_of_the_same_name_is_restored_as_well(folder, tmp_path):
    (tmp_path / "in").mkdir()
    command = ["restore", str(tmp_path / "in"), "--task", "denoise", "--noise", "0.05", "--samples", "2"]
    means = []
    for left in (0, 100):
        to_pil_image(photograph("chelsea")[0, :, :32, left : left + 32]).save(tmp_path / "in" / "a.png")
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        means.append((tmp_path / "out" / "a.png_mean.png").read_bytes())
    assert means[0] != means[1]


def test_a_folder_goes_on_after_a_file_that_is_none(folder, tmp_path, capsys):
    for i in range(2):
        to_pil_image(photograph("chelsea")[0, :, 64 * i : 64 * i + 32, :32]).save(tmp_path / f"{i}.png")
    (tmp_path / "1b.png").write_text("no image")
    out = tmp_path / "out"
    assert main(["restore", str(tmp_path), "--task", "denoise", "--samples", "2", "--out", str(out)]) == 1
    assert "1b.png cannot be read" in capsys.readouterr().err
    assert sorted(file.name for file in out.glob("*.json")) == ["0.png.json", "1.png.json"]
    files = [str(tmp_path / name) for name in ("0.png", "nowhere.png", "1.png")]
    assert main(["restore", *files, "--task", "jpeg", "--samples", "2", "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert all(f"{name}: " in told for name in ("0.png", "nowhere.png", "1.png")), "each is tried"


def test_a_folder_goes_on_where_the_memory_is_too_small_for_one(tmp_path, monkeypatch, capsys):
    for i in range(2):
        to_pil_image(photograph("chelsea")[0, :, :32, 40 * i : 40 * i + 32]).save(tmp_path / f"{i}.png")

    def restored(model, file, *arguments, done=cli._restore_file):
        if file.name == "0.png":
            raise torch.OutOfMemoryError("too large")
        return done(model, file, *arguments)

    monkeypatch.setattr(cli, "_restore_file", restored)
    command = ["--task", "denoise", "--noise", "0.05", "--samples", "2", "--out", str(tmp_path / "out")]
    assert main(["restore", str(tmp_path / "0.png"), *command]) == 2
    assert main(["restore", str(tmp_path), *command]) == 1
    error = capsys.readouterr().err
    assert "error: too large" in error and "0.png: too large" in error
    assert [file.name for file in (tmp_path / "out").glob("*.json")] == ["1.png.json"]


@pytest.mark.slow
def test_a_folder_is_shared_by_processes(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        x = photograph("chelsea")[0, :, 40 * i : 40 * i + 34, :41]
        to_pil_image(x).save(tmp_path / "in" / f"{i}.png")
    command = ["-m", "deepinv_ud2m.cli", "restore", str(tmp_path / "in"), "--task", "denoise"]
    command += ["--samples", "2"]
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]}
    for name, launcher in launchers.items():
        line = [sys.executable, *launcher, *command, "--out", str(tmp_path / name)]
        subprocess.run(line, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 3 * 6
    for name in files:
        if name.endswith(".json"):
            one, two = (json.loads((tmp_path / run / name).read_text()) for run in launchers)
            assert one | {"seconds": 0} == two | {"seconds": 0}
        else:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_mistakes_are_told(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    cases = {
        "needs either kernel or gaussian": ["blur.png", "--task", "blur"],
        "kernel nowhere.npy cannot be read": ["blur.png", "--task", "blur", "--kernel", "nowhere.npy"],
        "gaussian must be in": ["blur.png", "--task", "blur", "--gaussian", "0"],
        "is too large for a photograph": ["blur.png", "--task", "blur", "--gaussian", "9"],
        "mask must be an image of 46x44": ["blur.png", "--task", "inpaint", "--mask", "mask.png"],
        "got none": ["hole.png", "--task", "inpaint"],
        "black elsewhere": ["grey.png", "--task", "inpaint", "--mask", "white.png"],
        "factor must be in": ["small.png", "--task", "sr", "--factor", "1"],
        "must be a grey JPEG or one of YCbCr": ["blur.png", "--task", "jpeg"],
        "there is no 'nowhere.png'": ["nowhere.png", "--task", "denoise"],
        "the folder empty has no images": ["empty", "--task", "denoise"],
        "--noise must be a number or estimate": ["grey.png", "--task", "denoise", "--noise", "little"],
        "sigma_y must be positive": ["grey.png", "--task", "denoise", "--noise", "0"],
        "--samples must be at least 2": ["grey.png", "--task", "denoise", "--samples", "1"],
        "must have different names": ["grey.png", "grey.png", "--task", "denoise"],
        "--out must be another folder than the images": [".", "--task", "denoise", "--out", "."],
        "one of the shipped samplers": ["grey.png", "--task", "denoise", "--model", "nothing"],
    }
    (folder / "empty").mkdir()
    Image.new("L", (SIZE, SIZE), 255).save(folder / "white.png")
    for message, arguments in cases.items():
        assert main(["restore", "--out", str(tmp_path), *arguments]) == 2
        assert message in capsys.readouterr().err, message
    assert not list(tmp_path.glob("*.png"))


def test_files_of_sixteen_bits(tmp_path):
    x = torch.rand(3, 5, 7, generator=seeded())
    for image in (x, x[:1]):
        write_png(tmp_path / "x.png", image)
        import png

        width, height, rows, info = png.Reader(str(tmp_path / "x.png")).read()
        values = torch.tensor(np.vstack([np.array(row, dtype=np.int64) for row in rows]))
        assert (width, height, info["bitdepth"]) == (7, 5, 16)
        expected = (image.permute(1, 2, 0).reshape(5, -1) * 65535).round().long()
        assert torch.equal(values, expected)


def test_kernels_and_photographs_are_read_as_they_are(folder, tmp_path):
    exact, drawn = read_kernel(folder / "kernel.npy"), read_kernel(folder / "kernel.png")
    assert exact.sum() == pytest.approx(1) and exact.shape == (1, 1, 5, 3)
    assert torch.allclose(exact, drawn, atol=2e-3)
    assert read_photograph(folder / "grey.png").shape[1] == 1
    assert read_photograph(folder / "truth.png").shape[1] == 3
    # deepinv's operator and SciPy's convolution see the same
    y = physics_of(load_image(folder / "blur.png"), "blur", kernel=exact).A(load_image(folder / "truth.png"))
    assert (y - load_image(folder / "blur.png")).std().item() == pytest.approx(0.02, rel=0.1)
    wrong = {"negative": [[1.0, -1.0]], "zero": [[0.0]], "text": [["a"]], "cube": [[[1.0]]]}
    for name, values in wrong.items():
        np.save(tmp_path / f"{name}.npy", np.array(values))
        refused((lambda name=name: read_kernel(tmp_path / f"{name}.npy"), "kernel .* must"))
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "zip.npz", a=np.ones((3, 3)))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    for name, message in (("empty", "cannot be read"), ("zip", "must be a matrix|cannot be read")):
        refused((lambda name=name: read_kernel(tmp_path / f"{name}.npy"), f"kernel .* {message}"))
    y = torch.rand(1, 3, 32, 32)
    refused(
        (lambda: physics_of(y, "stretch"), "degradation must be one of"),
        (lambda: physics_of(y, "sr", filter="lanczos"), "filter must be"),
        (lambda: physics_of(y, "blur", gaussian=1.0, borders="open"), "borders must be one of"),
        (lambda: physics_of(y, "sr", factor=2.5), "factor must be an integer"),
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--help"], "restore"),
        (["restore", "--help"], "--kernel"),
        (["train", "--help"], "--set"),
        (["benchmark", "--help"], "tune"),
        (["app", "--help"], "--port"),
    ],
)
def test_commands_have_their_own_options(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepinv-ud2m"])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0 and words in capsys.readouterr().out
