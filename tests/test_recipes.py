"""The training scripts in miniature, as a user would start them."""

import importlib
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import deepinv
import numpy as np
import pytest
import torch
from torchvision.utils import save_image

import deepinv_ud2m
from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import DigitClassifier
from deepinv_ud2m.published import random_prior

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        image = torch.nn.functional.interpolate(
            torch.rand(1, 3, 6, 7, generator=generator), size=(84, 98), mode="bicubic"
        )
        save_image(image.clamp(0, 1), folder / f"{i}.png")
    return folder


def start(script: str, *arguments, launcher=()):
    command = [sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """As start, but in this process, which has imported everything already."""

    def here(script: str, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        code, message = 0, ""
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as stop:
            code, message = (stop.code, "") if isinstance(stop.code, int) else (1, str(stop.code))
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err + message)

    return here


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--bfloat16", "--checkpointing"), ("--ram", "--one-operator")])
def test_imagenet(photos, tmp_path, options):
    pytest.importorskip("efficientnet_lite_pytorch")
    result = start("train_imagenet.py", "--train", photos, "--out", tmp_path, "--smoke", *options)
    assert result.returncode == 0, result.stderr
    assert "parameters are trained" in result.stdout
    for file in ("checkpoint.pt", "samples_0.png", "model/model.safetensors"):
        assert (tmp_path / file).is_file()
    if "--ram" not in options:  # the prior has random weights, from the seed of the run
        torch.manual_seed(0)
        model = UD2M.from_pretrained(tmp_path / "model", prior=random_prior("imagenet256"))
        assert model.unfolded.num_iterations == 2


@pytest.mark.slow
def test_imagenet_in_two_processes(photos, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["train_imagenet.py", "--train", photos, "--out", tmp_path, "--smoke"]
    result = start(*arguments, "--accumulate", 2, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model" / "model.safetensors").is_file()
    # Nothing hangs where the processes cannot share a step.
    result = start(*arguments, "--accumulate", 1, launcher=launcher)
    assert result.returncode != 0
    assert "accumulate must be a multiple of the number of processes" in result.stderr


@pytest.mark.slow
def test_lsun(photos, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("diffusers")
    result = start("train_lsun.py", "--train", photos, "--out", tmp_path, "--smoke")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_photos_from_prior_to_sampler(photos, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    prior = tmp_path / "prior"
    result = start(
        "train_prior_photos.py", "--train", photos, "--test", photos, "--out", prior, "--smoke"
    )
    assert result.returncode == 0, result.stderr
    result = start(
        "train_photos.py", "--train", photos, "--prior", prior, "--out", tmp_path / "s", "--smoke"
    )
    assert result.returncode == 0, result.stderr
    assert UD2M.from_pretrained(tmp_path / "s" / "model").num_steps == 3
    # And on from there, all weights of the prior with it.
    arguments = ["--train", photos, "--prior", prior, "--out", tmp_path / "all", "--smoke"]
    arguments += ["--start", tmp_path / "s" / "model", "--rank", 0, "--spread", 0.5]
    result = start("train_photos.py", *arguments)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "all" / "model" / "config.json").read_text())
    assert config["lora"] is None
    assert config["metadata"]["trained"] == "all weights"
    assert UD2M.from_pretrained(tmp_path / "all" / "model").num_steps == 3


@pytest.mark.slow
def test_ablation_on_digits_goes_on(tmp_path):
    digits = torch.randint(0, 256, (32, 28, 28), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "digits.npz"
    np.savez(file, x=digits.numpy().astype(np.uint8), y=np.zeros(32, np.uint8))
    arguments = ["--train", file, "--out", tmp_path, "--updates", 2, "--images", 4, "--samples", 2]
    for variants in (["K = 1, N = 16"], ["K = 1, N = 16", "adversarial"]):
        result = start("ablate_mnist.py", *arguments, "--variants", *variants)
        assert result.returncode == 0, result.stderr
    assert result.stdout.count("UD2M.from_pretrained(") == 1  # the first was not trained again
    rows = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["untrained"]["nfe"] for row in rows] == [16, 9]
    for row in rows:  # two updates move the weights
        assert row["trained"]["energy_score"] != row["untrained"]["energy_score"]
    assert (tmp_path / "ablation.png").is_file()
    assert (tmp_path / "ablation.md").read_text().count("adversarial") == 2


@pytest.mark.slow
def test_a_first_guess_then_the_whole(tmp_path):
    digits = torch.randint(0, 256, (32, 28, 28), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "digits.npz"
    np.savez(file, x=digits.numpy().astype(np.uint8), y=np.zeros(32, np.uint8))
    arguments = ["--train", file, "--updates", 2, "--batch-size", 4]
    first = [*arguments, "--out", tmp_path / "first", "--tasks", "sr4", "inpaint-random"]
    result = start("train_mnist_first_guess.py", *first)
    assert result.returncode == 0, result.stderr
    assert "inpaint-random PSNR" in result.stdout
    folder = tmp_path / "first" / "model"
    options = ["--start", folder, "--rank", 0, "--end-to-end", "--tasks", "sr4", "--eval-interval", 2]
    options += ["--distort", 0.5, "--spread", 1, "sr4=1.05"]
    result = start("train_mnist.py", *arguments, *options, "--out", tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    one, other = (UD2M.from_pretrained(f) for f in (folder, tmp_path / "whole" / "model"))
    assert other.unfolded.initializer.settings == one.unfolded.initializer.settings
    moved = [
        name
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True)
        if not torch.equal(p, q)
    ]
    for part in ("initializer.network", "initializer.error", "denoiser", "log_delta"):
        assert any(f"unfolded.{part}" in name for name in moved), part
    # The first guess alone is trained on, with the rest as it was.
    again = ["--start", tmp_path / "whole" / "model", "--out", tmp_path / "again", "--tasks", "sr4"]
    result = start("train_mnist_first_guess.py", *arguments, *again)
    assert result.returncode == 0, result.stderr
    last = UD2M.from_pretrained(tmp_path / "again" / "model")
    moved = {
        name.split(".")[1]
        for (name, p), q in zip(last.named_parameters(), other.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved == {"initializer"}
    result = start("train_mnist_first_guess.py", *arguments, "--start", "mnist-accurate")
    assert result.returncode and "--start must be a sampler with a trained first guess" in result.stderr


def test_the_mean_of_samplers(tmp_path, run):
    one, other = (
        UD2M.from_pretrained("mnist-sr4", merge=False),
        UD2M.from_pretrained("mnist-sr4", merge=False),
    )
    with torch.no_grad():
        for parameter in other.unfolded.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    other.save_pretrained(tmp_path / "other")
    result = run("average_samplers.py", "mnist-sr4", tmp_path / "other", "--out", tmp_path / "mean")
    assert result.returncode == 0, result.stderr
    mean = UD2M.from_pretrained(tmp_path / "mean", merge=False)
    of_one = dict(one.unfolded.named_parameters())
    for name, parameter in mean.unfolded.named_parameters():
        shift = 0.5 if parameter.requires_grad else 0
        torch.testing.assert_close(parameter, of_one[name] + shift, atol=2e-3, rtol=1e-3)
    for names, reason in (
        (["mnist", "photos"], "photos and mnist differ in unfolded"),
        (["photos-posterior"] * 2, "photos-posterior has an adapter"),
    ):
        result = run("average_samplers.py", *names, "--out", tmp_path / "none")
        assert reason in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_spread_set_on_validation_digits(tmp_path, run):
    arguments = ["mnist", "--images", 4, "--samples", 2, "--tasks", "sr4", "inpaint-random"]
    factors = [1, 1.25]
    result = run("calibrate_mnist.py", *arguments, "--factors", *factors, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "config.json").read_text())["metadata"]
    errors = [
        float(line.split()[-1]) for line in result.stdout.splitlines() if " mean coverage " in line
    ]
    best = min(zip(errors, factors, strict=True))[1]
    assert config["delta_factor"] == best
    assert set(config["validation"]) == {"sr4", "inpaint-random"}
    old, new = UD2M.from_pretrained("mnist").unfolded, UD2M.from_pretrained(tmp_path).unfolded
    for (name, p), q in zip(old.named_parameters(), new.parameters(), strict=True):
        shift = math.log(best) if name == "log_delta" else 0.0
        torch.testing.assert_close(q, p + shift, atol=1e-3, rtol=0)  # stored in half precision
    assert (tmp_path / "coverage.png").is_file()


def refused(script: str, *arguments, capsys) -> str:
    """What a script says to arguments, before it reads anything."""
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_arguments([*map(str, arguments)])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--out", ["mnist"]),
        ("--factors", [1, 0]),
        ("--sigma-y", ["nan"]),
        ("--samples", [1]),
        ("--images", [257]),
    ],
)
def test_what_a_spread_cannot_be_set_by(option, values, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    message = refused("calibrate_mnist", "mnist", "--out", "x", option, *values, capsys=capsys)
    assert f"{option} must be" in message and str(values[-1]) in message


def test_a_file_is_no_folder_to_write_to(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (tmp_path / "file").write_text("")
    arguments = ("calibrate_mnist", "mnist", "--out", tmp_path / "file")
    assert "--out must be a folder, got the file" in refused(*arguments, capsys=capsys)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_mnist", ["--iterations", 0], "--iterations must be at least 1, got 0"),
        ("train_mnist", ["--steps", 0], "--steps must be at least 1, got 0"),
        ("train_mnist", ["--steps", 2, "--levels", 80, 1, 0.1], "number of --levels, 3, got 2"),
        ("train_photos", ["--train", "x", "--iterations", 0], "--iterations must be at least 1, got 0"),
        ("train_photos", ["--train", "x", "--iterations", 2], "--delta and --rho must be given"),
    ],
)
def test_counts_that_do_not_fit(script, options, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert message in refused(script, *options, capsys=capsys)


def test_ram_takes_no_jpeg(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("train_imagenet")
    defaults = ("imagenet256", script.IMAGENET, 0.01, 2)
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", "--train", "x", "--ram"])
    assert script.parse_arguments(*defaults).tasks == [t for t in script.IMAGENET if t != "jpeg-10"]
    sys.argv += ["--tasks", "sr4", "jpeg-10"]
    with pytest.raises(SystemExit):
        script.parse_arguments(*defaults)
    assert "--tasks must be without JPEG" in capsys.readouterr().err


def test_the_untrained_scores_are_those_of_this_run(monkeypatch, tmp_path):
    """Not of one that was stopped before its first checkpoint; after it, they are kept."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("train_mnist")
    scores = iter([{"energy score": 3.0}, {"energy score": 4.0}])
    trainer = SimpleNamespace(evaluate=lambda: next(scores))
    assert script.evaluate_untrained(trainer, tmp_path) == {"energy score": 3.0}
    assert script.evaluate_untrained(trainer, tmp_path) == {"energy score": 4.0}
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    assert script.evaluate_untrained(trainer, tmp_path) == {"energy score": 4.0}
    (tmp_path / "untrained.json").unlink()
    assert script.evaluate_untrained(trainer, tmp_path) == {}


def test_energy_scores_of_what_is_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train_mnist = importlib.import_module("train_mnist")
    classifier = Path(deepinv_ud2m.__file__).parent / "weights" / "mnist-classifier"
    weights = {"--patches": 4, "--perceptual": 8, "--features": 0.1}
    options = [str(value) for pair in weights.items() for value in pair]
    args = train_mnist.parse_arguments(["--classifier", str(classifier), "--spread", "1.02", *options])
    physics = list(range(len(args.tasks)))
    losses = train_mnist.energy_scores(args, physics, "cpu")
    assert [loss.weight for loss in losses] == [1, 4, 8, 0.1]
    assert [loss.patch_size for loss in losses] == [None, 8, None, None]
    assert {loss.spread for loss in losses} == {1.02}
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for loss in losses:  # each is zero for draws at the truth, and not for others
        assert loss(x=x, samples=torch.stack([x, x])).abs().max() < 1e-4
        assert loss(x=x, samples=torch.stack([1 - x, 1 - x])).min() > 0.01
    said = train_mnist.describe_loss(args)
    for part in ("4 x that of 8x8 patches", "8 x that of a classifier's layers", "0.1 x that of its"):
        assert part in said


def test_energy_scores_of_tasks_with_spreads_of_their_own(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train_mnist = importlib.import_module("train_mnist")
    tasks = ["inpaint-box", "sr4", "inpaint-box"]
    args = train_mnist.parse_arguments(["--tasks", *tasks, "--spread", "1.03", "inpaint-box=1.1"])
    assert args.spread == {"sr4": 1.03, "inpaint-box": 1.1}
    quick = train_mnist.parse_arguments(["--quick", "--tasks", *tasks, "--spread", "1.03", "sr4=1.1"])
    assert quick.spread == {"sr4": 1.1}
    physics = [deepinv.physics.Denoising() for _ in tasks]
    (loss,) = train_mnist.energy_scores(args, physics, "cpu")
    assert [loss.spread[of] for of in physics] == [1.1, 1.03, 1.1]
    for spread, message in (
        ("deblur-gaussian=1", "--spread must be of one of the --tasks, ['inpaint-box', 'sr4'], got deb"),
        ("sr4=wide", "--spread must be numbers, or TASK=number, got sr4=wide"),
        ("sr4=2", "--spread must be in [0, 1.2], got 2"),
    ):
        assert message in refused("train_mnist", "--tasks", *tasks, "--spread", spread, capsys=capsys)


def test_levels_of_single_tasks(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    parse = importlib.import_module("train_mnist").parse_arguments
    end_to_end = ["--end-to-end", "--tasks", "inpaint-box", "sr4", "inpaint-box"]
    assert parse(end_to_end).task_levels == [None] * 3
    one, two = "inpaint-box=9,1,0.5", "inpaint-box=8,0.5"
    assert parse([*end_to_end, "--task-levels", one]).task_levels == [[9, 1, 0.5], None, None]
    assert parse([*end_to_end, "--task-levels", one, two]).task_levels == [[9, 1, 0.5], None, [8, 0.5]]
    for given, message in (
        (["sr4=9,1", "sr4=8,1"], "--task-levels must be of one of the --tasks, once for each time"),
        (["deblur-gaussian=9,1"], "['inpaint-box', 'inpaint-box', 'sr4'], got deblur-gaussian=9,1"),
        (["sr4=1,9"], "--task-levels sr4=1,9: levels must be"),
        (["sr4=high"], "--task-levels sr4=high: could not convert"),
    ):
        assert message in refused("train_mnist", *end_to_end, "--task-levels", *given, capsys=capsys)
    message = refused("train_mnist", "--reference-error", "0.2", capsys=capsys)
    assert "--reference-error needs the first guess of a --start" in message
    message = refused("train_mnist", "--task-levels", "sr4=9,1", capsys=capsys)
    assert "--task-levels are for --end-to-end" in message


def test_distorted_digits(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    distorted = importlib.import_module("train_mnist").distorted
    digits = list(mnist_digits("validation", num=256))
    assert torch.equal(distorted(digits, share=0.0), torch.stack(digits))
    torch.manual_seed(0)
    bent = distorted(digits, share=0.5)
    moved = (bent - torch.stack(digits)).abs().amax((1, 2, 3)) > 0
    # Binomial(256, 1/2): 128 +- 8; five standard deviations, false alarms below 1e-6.
    assert abs(moved.sum().item() - 128) <= 40
    bent = distorted(digits, share=1.0)
    assert bent.min() >= 0 and bent.max() <= 1
    # Still the digits that they were, with strokes as sharp, to those of a classifier that saw neither.
    classifier = DigitClassifier.from_pretrained()
    seen = [classifier(images).argmax(1) for images in (torch.stack(digits), bent)]
    assert (seen[0] == seen[1]).float().mean() > 0.95
    steps = [images.diff(dim=-1).square().mean().sqrt() for images in (torch.stack(digits), bent)]
    assert steps[1] > 0.9 * steps[0]


@pytest.mark.parametrize(
    ("script", "option"),
    [("train_photos", "--delta"), ("train_photos", "--iterations"), ("train_mnist", "--iterations")],
)
def test_options_that_a_sampler_to_start_from_has_already(script, option, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    message = refused(script, "--train", "x", "--start", "x", option, 2, capsys=capsys)
    assert f"{option} cannot be given with --start" in message
    message = refused(script, "--train", "x", "--start", "x", "--rank", 5, capsys=capsys)
    assert "--rank cannot be given" in message


@pytest.mark.parametrize("script", ["train_photos", "train_mnist"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--updates", 0], "--updates must be at least 1, got 0"),
        (["--lr-scalars", -1], "--lr-scalars must be finite and not negative, got -1"),
        (["--lr", "nan"], "--lr must be finite and not negative, got nan"),
        (["--spread", 2], "--spread must be in [0, 1.2], got 2"),
        (["--spread", "nan"], "--spread must be in [0, 1.2], got nan"),
        (["--sigma-y", 0.1, 0.02], "--sigma-y must be two positive levels, LOW HIGH, got [0.1, 0.02]"),
    ],
)
def test_numbers_out_of_range(script, options, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert message in refused(script, "--train", "x", *options, capsys=capsys)


def test_a_share_out_of_range(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    message = refused("train_mnist", "--distort", 1.5, capsys=capsys)
    assert "--distort must be in [0, 1], got 1.5" in message


def test_a_classifier_to_train_with(monkeypatch, capsys, run):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    message = refused("train_mnist", "--loss", "l2", "--classifier", "x", capsys=capsys)
    assert "--classifier is for --loss energy, got --loss l2" in message
    message = refused("train_mnist", "--loss", "l2", "--spread", 1.1, capsys=capsys)
    assert "--spread is for --loss energy, got --loss l2" in message
    message = refused("train_mnist", "--loss", "l2", "--patches", 4, capsys=capsys)
    assert "--patches is for --loss energy, got --loss l2" in message
    message = refused("train_mnist", "--features", 0.1, capsys=capsys)
    assert "--features are those of a --classifier, and none was given" in message
    with pytest.raises(FileNotFoundError, match=r"No config\.json in nowhere"):
        run("train_mnist.py", "--train", "nowhere", "--start", "mnist", "--classifier", "nowhere")


def test_images_of_a_folder_whatever_their_ending(tmp_path, monkeypatch):
    """As in ImageNet, in subfolders."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_imagenet import open_images

    (tmp_path / "n01").mkdir()
    for name in ("n01/b.JPEG", "n01/a.png", "c.jpg"):
        save_image(torch.full((3, 40, 50), 0.5), tmp_path / "file.png")
        (tmp_path / "file.png").rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(SimpleNamespace(train=str(tmp_path), size=32, batch_size=3))
    assert [path.name for path in images.x_paths] == ["c.jpg", "a.png", "b.JPEG"]
    assert images[2].shape == (3, 32, 32)


def test_a_folder_without_images(tmp_path, run):
    result = run("train_imagenet.py", "--train", tmp_path, "--smoke")
    assert result.returncode != 0
    assert f"{tmp_path} and its subfolders have 0 images" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("of_photos", [False, True])
def test_search_of_a_schedule(photos, tmp_path, of_photos):
    """What it prints is what it stores, and no worse than where it started."""
    arguments = ["--images", 2, "--trials", 6, "--tasks", "sr4", "inpaint-random"]
    if of_photos:
        pytest.importorskip("efficientnet_lite_pytorch")
        arguments += ["--prior", "photos", "--data", photos, "--size", 32]
    result = start("search_schedule.py", *arguments, "--out", tmp_path / "schedule.json")
    assert result.returncode == 0, result.stderr
    successes = json.loads((tmp_path / "schedule.json").read_text())["successes"]
    best = successes[-1]
    assert f"--delta {' '.join(f'{v:.3g}' for v in best['delta'])}" in result.stdout
    scores = [sum(map(math.log, success["scores"].values())) for success in successes]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) > 1
    assert best["levels"] == sorted(best["levels"], reverse=True)


@pytest.mark.slow
def test_a_folder_is_shared_by_processes_and_goes_on(photos, tmp_path):
    arguments = ["sample_folder.py", "--images", photos, "--samples", 2, "--task", "inpaint-random"]
    assert start(*arguments, "--out", tmp_path / "one").returncode == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    result = start(*arguments, "--out", tmp_path / "three", launcher=launcher)
    assert result.returncode == 0, result.stderr
    written = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(written) == 8 * 5
    for name in written:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes(), name
    (tmp_path / "one" / "3.png.json").unlink()
    kept = (tmp_path / "one" / "4.png_mean.png").stat().st_mtime_ns
    assert start(*arguments, "--out", tmp_path / "one").returncode == 0
    assert (tmp_path / "one" / "3.png.json").is_file()
    assert (tmp_path / "one" / "4.png_mean.png").stat().st_mtime_ns == kept
    assert start(*arguments, "--out", tmp_path / "one", "--sigma-y", 0.05).returncode == 0
    assert (tmp_path / "one" / "4.png_mean.png").stat().st_mtime_ns > kept  # other options, done anew
    result = start("sample_folder.py", "--images", tmp_path)
    assert "has no images" in result.stderr
