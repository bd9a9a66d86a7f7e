"""The benchmark: honest counts, rows that do not depend on interruptions, clear refusals."""

import bisect
import copy
import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import refused, seeded
from PIL import Image

from deepinv_ud2m import UD2M, PosteriorMeanInitializer, UnfoldedDenoiser
from deepinv_ud2m.benchmark import rows as rows_module
from deepinv_ud2m.benchmark.__main__ import main
from deepinv_ud2m.benchmark.methods import METHODS, Entry, Method, read_methods
from deepinv_ud2m.benchmark.report import summarise
from deepinv_ud2m.benchmark.rows import Results, read_rows
from deepinv_ud2m.benchmark.run import Study, draw, measure, perceptual_metric, run
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.physics.tasks import make_physics
from deepinv_ud2m.priors import add_lora, has_lora, save_prior

TINY_STEPS = {"diffpir": 3, "ddrm": 3, "dps": 3, "pigdm": 3, "moment-matching": 3, "ud2m": 2}


def entry(name, label="", **settings):
    steps = {"num_steps": TINY_STEPS[name]} if name in TINY_STEPS else {}
    return Entry(name, label, steps | settings)


def study_of(prior, methods=("ud2m", "pinv"), images=4, samples=2, **options):
    x = mnist_digits("test", num=images)
    methods = [one if isinstance(one, Entry) else entry(one) for one in methods]
    defaults = {"tasks": ["sr4"], "num_samples": samples, "batch_size": 2, "metric": perceptual_metric(x)}
    return Study(prior, x, methods=methods, **(defaults | options))


def computed(folder, prior, **options):
    """Rows without what the clock says."""
    run(folder, study_of(prior, **options))
    return read_rows(folder).drop(columns="seconds").reset_index(drop=True)


@pytest.fixture
def sampler_folder(tiny_prior, tiny_config, tmp_path):
    """A stored sampler with a nominal RMSE."""
    unfolded = UnfoldedDenoiser(tiny_prior, 1, PosteriorMeanInitializer(tiny_config["network"], 1))
    model = UD2M(unfolded, sigmas=[80.0, 0.5, 0.1], nominal_rmse=0.4)
    model.save_pretrained(tmp_path / "sampler")
    return model, tmp_path / "sampler"


@pytest.mark.parametrize(
    "method, nfe",
    [
        (entry("ud2m", num_steps=3), (9, 0)),
        (entry("ud2m", num_steps=2, num_iterations=4), (8, 0)),
        (entry("diffpir", num_steps=7), (7, 0)),
        (entry("ddrm", num_steps=5), (5, 0)),
        (entry("dps", num_steps=6), (6, 6)),
        (entry("pigdm", num_steps=6), (6, 6)),
        (entry("dpir"), (8, 0)),
        (entry("pinv"), (0, 0)),
        (entry("moment-matching", num_steps=4), (4, None)),  # one for each step of conjugate gradients
    ],
)
def test_evaluations_are_counted(tiny_prior, method, nfe):
    physics = make_physics("inpaint-random", (1, 32, 32))
    y = physics(mnist_digits("test", num=2))
    sampler = method.method.build(tiny_prior, 0.05, **method.resolve({}))
    samples, cost = draw(sampler, tiny_prior, y, physics, 2, seed=0)
    assert samples.shape == (2, 2, 1, 32, 32) and samples.isfinite().all()
    assert cost["nfe"] == nfe[0]
    assert cost["nfe_backward"] > 8 if nfe[1] is None else cost["nfe_backward"] == nfe[1]
    assert method.method.random != torch.equal(samples[0], samples[1])


OTHER = {
    "num_steps": 4, "num_iterations": 2, "eta": 0.3, "reference_level": 0.5, "zeta": 0.7, "lambda_": 1.0,
    "weight": 3.0, "guidance": "annealed", "sigma_max": 3.0, "spacing": "geometric",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].random])
def test_each_setting_and_each_seed_changes_the_samples(tiny_prior, sampler_folder, name, monkeypatch):
    model, folder = sampler_folder
    physics = make_physics("inpaint-random", (1, 32, 32))
    y = measure(physics, mnist_digits("test", num=2), range(2), 0)

    def sample(seed=0, **settings):
        given = {"checkpoint": str(folder)} if name == "ud2m-distilled" else {}
        one = entry(name, **(given | settings))
        with torch.no_grad():
            return one.method.build(tiny_prior, 0.05, **one.resolve({}))(y, physics, seed)

    before = sample()
    assert torch.equal(before, sample()) and not torch.equal(before, sample(seed=1))
    UD2M(model.unfolded, 1).save_pretrained(folder.with_name("other"))
    others = OTHER | {"checkpoint": str(folder.with_name("other"))}
    for setting in METHODS[name].defaults:
        assert not torch.equal(before, sample(**{setting: others[setting]})), setting
    assert METHODS[name].grid.keys() <= METHODS[name].defaults.keys()


@pytest.mark.parametrize("name", ["ud2m", "diffpir", "dps", "dpir", "pinv"])
def test_methods_run_on_jpeg(tiny_prior, name, tmp_path):
    methods = [name, "pigdm", "moment-matching", "ddrm"]  # the others do not apply
    rows = computed(tmp_path, tiny_prior, methods=methods, images=2, samples=1, tasks=["jpeg-10"])
    assert rows["method"].tolist() == [name, name] and np.isfinite(rows["psnr"]).all()


def test_a_distilled_sampler_is_the_stored_one(tiny_prior, sampler_folder, tmp_path):
    model, folder = sampler_folder
    physics = make_physics("inpaint-random", (1, 32, 32))
    y = physics(mnist_digits("test", num=2))
    build = METHODS["ud2m-distilled"].build
    sampler, few = build(tiny_prior, 0.05, str(folder)), build(tiny_prior, 0.05, str(folder), num_steps=2)
    expected = model(y, physics, generator=seeded(3))
    torch.testing.assert_close(sampler(y, physics, 3), expected)
    assert sampler.settings["nominal_rmse"] == 0.4 and few.settings["nominal_rmse"] is None
    assert sampler.settings["sigmas"] == [80.0, 0.5, 0.1] and len(few.settings["sigmas"]) == 2
    assert sampler.weights == few.weights
    adapted = copy.deepcopy(tiny_prior)
    add_lora(adapted, 2, targets="all-convs")
    UD2M(UnfoldedDenoiser(adapted, 2), 2).save_pretrained(tmp_path / "lora")
    lora = Entry("ud2m-distilled", "", {"checkpoint": str(tmp_path / "lora")})
    rows = computed(tmp_path / "out", tiny_prior, methods=[lora])
    assert set(rows["nfe"]) == {4} and not has_lora(tiny_prior), "the prior is left alone"
    assert len(set(rows["weights"])) == 1 and rows["weights"][0] != sampler.weights


@pytest.mark.parametrize("spacing, gap", [("linear", 10.0), ("geometric", 100.0)])
def test_sigmas_of_ddrm_are_spaced_as_asked(tiny_prior, spacing, gap):
    """From 20.002 to 0.002 in three levels the middle one is the mean, arithmetic or geometric."""
    sigmas, physics = [], make_physics("inpaint-box", (1, 32, 32))
    sampler = METHODS["ddrm"].build(tiny_prior, 0.05, num_steps=3, sigma_max=20.0, spacing=spacing)
    with tiny_prior.register_forward_pre_hook(lambda _, inputs: sigmas.append(float(inputs[1]))):
        sampler(physics(mnist_digits("test", num=1)), physics, 0)
    assert sigmas[0] == 20 and sigmas[2] == pytest.approx(0.002)
    found = sigmas[0] - sigmas[1] if spacing == "linear" else sigmas[0] / sigmas[1]
    assert found == pytest.approx(gap, rel=1e-3)
    with pytest.raises(ValueError, match=r"spacing.*'linear', 'geometric'.*'cubic'"):
        METHODS["ddrm"].build(tiny_prior, 0.05, spacing="cubic")


def test_methods_are_read_from_names_and_files(tmp_path):
    text = "{name: dps, label: 'DPS, 100', settings: {num_steps: 100}, grid: {weight: [1, 2]}}"
    (tmp_path / "m.yaml").write_text(f"- {text}")
    diffpir, dps = read_methods(["diffpir", str(tmp_path / "m.yaml")])
    assert (diffpir.label, dps.label) == ("diffpir", "DPS, 100")
    assert dps.resolve({"weight": 5.0}) == {"num_steps": 100, "weight": 5.0, "guidance": "norm"}
    assert [one["weight"] for one in dps.candidates()] == [1, 2, 1, 2]
    assert dps.candidates()[0] == {"num_steps": 100, "guidance": "norm", "weight": 1}


def test_bad_methods_are_refused(tmp_path):
    def read(*listed):
        (tmp_path / "m.yaml").write_text(yaml.safe_dump([*listed] if listed[0] != "dps" else "dps"))
        return read_methods([str(tmp_path / "m.yaml")])

    dps = {"name": "dps"}
    refused(
        (lambda: read({"name": "diffpire"}), "method must be one of .*'ddrm', 'diffpir'.*, got 'diffpire'"),
        (lambda: read(dps | {"weight": 3}), "must have a name, and of label, settings .* got .*weight"),
        (lambda: read(dps | {"settings": None}), r"settings \(value by name\) .*, got .*None"),
        (lambda: read(dps | {"grid": {"weight": 3}}), r"grid \(list of values by name\), got"),
        (lambda: read("dps"), "must have a name"),
        (lambda: read(dps | {"settings": {"steps": 3}}), "'num_steps', 'weight', 'guidance'.*, got 'steps'"),
        (lambda: read(dps | {"settings": {"num_steps": "ten"}}), "'dps' must be of type int, got 'ten'"),
        (lambda: read({"name": "diffpir", "settings": {"zeta": True}}), "zeta .* of type float, got True"),
        (lambda: read(dps | {"grid": {"weight": [1, "many"]}}), "weight of 'dps' must be .*, got 'many'"),
        (lambda: read(dps, dps), r"\['dps'\] come twice: set label"),
        (lambda: read(dps, dps | {"criterion": "psnr"}), r"\['dps'\] are with and without a criterion"),
    )


@pytest.mark.parametrize("cut", ["another line", "the first line", "nothing"])
def test_a_killed_run_resumes_to_the_same_rows(tiny_prior, tmp_path, cut):
    whole = computed(tmp_path / "whole", tiny_prior)
    file = tmp_path / "killed" / "rows.csv"
    if cut == "the first line":
        file.parent.mkdir()
        file.write_text((tmp_path / "whole" / "rows.csv").read_text()[:50])
        assert not len(read_rows(file.parent))
    else:
        computed(file.parent, tiny_prior, methods=["ud2m"], images=2)
    if cut == "another line":
        with file.open("a") as stream:
            stream.write("sr4,ud2m,ud2")  # killed while writing
    pd.testing.assert_frame_equal(computed(file.parent, tiny_prior), whole)
    before = file.read_text()
    with tiny_prior.register_forward_hook(lambda *_: pytest.fail("the network was called")):
        computed(file.parent, tiny_prior)
    assert file.read_text() == before and before.count("\n") == 9
    pd.testing.assert_frame_equal(read_rows(tmp_path / "whole").drop(columns="seconds"), whole)


def test_only_missing_images_are_computed(tiny_prior, tmp_path):
    """The first sample of an image is the same however many there are. The row with more samples counts."""
    computed(tmp_path, tiny_prior, methods=["ud2m"], images=3, samples=3)
    calls = []
    with tiny_prior.register_forward_hook(lambda _, inputs, output: calls.append(len(output))):
        rows = computed(tmp_path, tiny_prior, methods=["ud2m"], images=6, samples=1)
    assert calls == [1, *6 * [1], *6 * [2]], "a warm-up, image 3, images 4 and 5"
    assert rows["image"].tolist() == list(range(6)) and rows["num_samples"].tolist() == [3, 3, 3, 1, 1, 1]
    (line,) = summarise(read_rows(tmp_path)).to_dict("records")
    assert (line["images"], line["images_with_samples"], line["samples"]) == (6, 3, 3)
    assert line["psnr"] == pytest.approx(rows["psnr"].mean())
    assert line["psnr_mean"] == pytest.approx(rows["psnr_mean"][:3].mean())
    alone = computed(tmp_path / "alone", tiny_prior, methods=["ud2m"], images=6, samples=1)
    assert alone["psnr"][:2].tolist() == rows["psnr"][:2].tolist()
    more = computed(tmp_path, tiny_prior, methods=["ud2m"], images=6, samples=4)
    assert more["num_samples"].tolist() == 6 * [4] and more["psnr"][:2].tolist() == rows["psnr"][:2].tolist()


def test_a_folder_of_another_setup_is_refused_and_left_alone(tiny_prior, tmp_path):
    computed(tmp_path, tiny_prior)
    before = (tmp_path / "rows.csv").read_text()
    for other, message in (
        ({"sigma_y": 0.1}, "its sigma_y is 0.05, here it is 0.1"),
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"metric": None}, "its perceptual is 'DigitClassifier"),
        ({"names": {"data": "mine"}}, "its data is None, here it is 'mine'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, study_of(tiny_prior, **other))
    assert (tmp_path / "rows.csv").read_text() == before


def test_rows_of_other_images_settings_or_weights_are_not_mixed(tiny_prior, sampler_folder, tmp_path):
    _, folder = sampler_folder
    computed(tmp_path, tiny_prior)
    study = study_of(tiny_prior)
    study.x = 1 - study.x
    with pytest.raises(ValueError, match="image 0 is not what it was"):
        run(tmp_path, study)
    with pytest.raises(ValueError, match="has rows of 'ud2m' on sr4 with other settings"):
        run(tmp_path, study_of(tiny_prior, [entry("ud2m", eta=0.5)]))
    study = study_of(tiny_prior, [Entry("ud2m-distilled", "", {"checkpoint": str(folder)})])
    run(tmp_path, study)
    model = UD2M.from_pretrained(folder, prior=tiny_prior)
    model.unfolded.log_rho.data += 1
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="with other weights"):
        run(tmp_path, study)
    other = copy.deepcopy(tiny_prior)
    next(other.parameters()).data += 1
    with pytest.raises(ValueError, match="its prior_weights is"):
        run(tmp_path, study_of(other))


def test_a_run_that_came_to_nothing_does_not_bind_its_folder(tiny_prior, tmp_path):
    with Results(tmp_path, {"sigma_y": 0.1}):
        pass
    computed(tmp_path, tiny_prior, methods=["pinv"])
    assert json.loads((tmp_path / "setup.json").read_text())["setup"]["sigma_y"] == 0.05


def test_a_second_run_in_the_folder_is_refused(tiny_prior, tmp_path):
    with Results(tmp_path, {}), pytest.raises(ValueError, match="is in use by another run"):
        run(tmp_path, study_of(tiny_prior))
    assert len(computed(tmp_path, tiny_prior)) == 8


@pytest.mark.parametrize("failing", ["the arrays", "the rows"])
def test_a_full_disk_leaves_the_rows_as_they_were(tiny_prior, tmp_path, monkeypatch, failing):
    whole = computed(tmp_path / "whole", tiny_prior)
    computed(tmp_path, tiny_prior, methods=["ud2m"], images=2)
    before = (tmp_path / "rows.csv").read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if failing == "the rows" else (rows_module, "write_file")), full)
        with pytest.raises(OSError, match=r"No space left on device\. The rows before are kept"):
            computed(tmp_path, tiny_prior)
    assert (tmp_path / "rows.csv").read_bytes() == before
    pd.testing.assert_frame_equal(computed(tmp_path, tiny_prior), whole)


def test_samples_that_are_not_finite_are_named(tiny_prior, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "broken", Method(lambda prior, sigma_y: lambda y, physics, seed: y * np.nan))
    with pytest.raises(ValueError, match="samples of 'broken' on inpaint-box are not finite"):
        run(tmp_path, study_of(tiny_prior, ["broken"], tasks=["inpaint-box"]))


@pytest.fixture
def command(tiny_prior, tiny_config, tmp_path, capsys):
    """Runs the command line in a folder with a prior and two pictures; returns status, output and errors."""
    save_prior(tiny_prior, tiny_config, tmp_path / "prior")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")

    def call(name, *arguments, prior=True, data=True):
        given = ["--prior", tmp_path / "prior"] if prior else []
        given += ["--data", tmp_path / "photos"] if data else []
        status = main([name, "--device", "cpu", *map(str, [*given, *arguments])])
        return status, *capsys.readouterr()

    return call


def test_a_folder_of_images_is_searched_and_benchmarked(command, tmp_path):
    text = "{name: ud2m, label: mine, settings: {num_steps: 2}, grid: {eta: [0.5]}}"
    (tmp_path / "m.yaml").write_text(f"[{text}]")
    (tmp_path / "m.py").write_text(
        "from deepinv_ud2m.benchmark.methods import Method\n"
        "def build(prior, sigma_y, scale=2.0):\n"
        "    return lambda y, physics, seed: scale * physics.A_dagger(y)\n"
        "METHODS = {'scaled': Method(build, {'scale': [0.5, 1.0]}, random=False)}\n"
    )
    (tmp_path / "t.py").write_text(
        "from deepinv.physics import Inpainting\n"
        "from deepinv_ud2m.physics.tasks import Task\n"
        "TASKS = {'half': Task('half of the pixels', lambda shape: Inpainting(shape, mask=0.5))}\n"
    )
    given = ["--tasks", "half", "--methods", tmp_path / "m.yaml", "scaled", "--size", 32]
    given += ["--method-file", tmp_path / "m.py", "--task-file", tmp_path / "t.py"]
    search = ["--out", tmp_path / "s.json", "--samples", 2, "--criterion", "crps"]
    status, out, _ = command("tune", *given, *search)
    assert status == 0 and "half: {'mine': {'num_steps': 2, 'eta': 0.5, 'reference_level': 0." in out
    given += ["--settings", tmp_path / "s.json", "--criterion", "psnr", "--out", tmp_path / "out"]
    assert command("run", *given, "--samples", 2)[0] == 0
    rows = read_rows(tmp_path / "out")
    assert rows["method"].tolist() == 2 * ["mine"] + 2 * ["scaled"] and rows["image"].tolist() == [0, 1, 0, 1]
    assert all("psnr" in wins.split(" and ") for wins in rows["criterion"])
    assert json.loads(rows["settings"].iloc[0])["eta"] == 0.5
    task_file = ["--task-file", str(tmp_path / "t.py")]
    assert main(["report", "--out", str(tmp_path / "out"), *task_file]) == 0
    assert "## half of the pixels" in (tmp_path / "out" / "report.md").read_text()
    given = ["--sizes", 16, 32, "--batch-sizes", 2, "--rounds", 2, "--tasks", "inpaint-box"]
    given += ["--methods", "pinv"]
    assert command("cost", *given, "--out", tmp_path / "cost")[0] == 0
    assert pd.read_csv(tmp_path / "cost" / "cost.csv")["size"].tolist() == [16, 32]


def test_bad_input_is_refused_before_anything_is_written(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["--methods", "pinv", "--tasks", "inpaint-box", "--out", tmp_path / "out"]
    for *arguments, message in (
        ("--tasks", "sr5", "tasks must be of ['deblur-gaussian'"),
        ("--methods", "diffpire", "method must be one of"),
        ("--methods", "nowhere.yaml", "nowhere.yaml"),
        ("--method-file", bisect.__file__, "must define METHODS, a dictionary with values of type Method"),
        ("--prior", "nowhere", "nowhere"),
        ("--images", "0", "--images must be an integer >= 1"),
        ("--images", "3", "num must be at most 2"),
        ("--size", "64", "0.png"),
        ("--size", "33", "multiple"),
        ("--size, the side of the crops, must be given",),
        ("--data", "Nowhere", "Nowhere"),
        ("--data", "test", "--size", "16", "the shipped digits are grey, 32x32"),
        ("--sigma-y", "0", "sigma_y must be positive"),
        ("--batch-size", "0", "--batch-size must be"),
        ("--samples", "0", "--samples must be"),
        ("--settings", "nowhere.json", "nowhere.json"),
        ("--perceptual", "nothing", "network must be one of"),
        ("--device", "cuda:1", "--device is 'cuda:1', but there is no CUDA device"),
        ("--device", "cuda", "--device is 'cuda', but there is no CUDA device"),
    ):
        size = [] if "--size" in arguments or not arguments else ["--size", 32]
        status, _, errors = command("run", *given, *size, *arguments)
        assert status == 2 and message in errors
    # Colour photographs were once cut to grey 32x32 and restored as digits.
    status, _, errors = command("run", "--out", tmp_path / "out", prior=False)
    assert status == 2 and "--prior must be given with --data" in errors
    assert not (tmp_path / "out" / "rows.csv").exists()
