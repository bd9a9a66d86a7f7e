"""The benchmark: honest counts, rows that do not depend on interruptions, clear refusals."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from deepinv.physics import Denoising, GaussianNoise
from PIL import Image
from torch.utils.checkpoint import checkpoint

import deepinv_ud2m
from deepinv_ud2m import UD2M, PosteriorMeanInitializer, UnfoldedDenoiser, add_lora
from deepinv_ud2m.benchmark import paper_scale, profile, profile_training
from deepinv_ud2m.benchmark.__main__ import main
from deepinv_ud2m.benchmark.memory import LiveTensors
from deepinv_ud2m.benchmark.methods import METHODS, Method
from deepinv_ud2m.benchmark.report import (
    _curve_name,
    _error_over_spread,
    _line_styles,
    _markers,
    method_title,
    report,
    store,
    summarise,
)
from deepinv_ud2m.benchmark.run import (
    Results,
    Setup,
    draw,
    evaluate,
    measure,
    parse_method,
    read_rows,
    run_method,
)
from deepinv_ud2m.benchmark.tasks import TASKS, make_physics
from deepinv_ud2m.benchmark.timing import time_methods
from deepinv_ud2m.benchmark.tune import best_settings, merge_searches, tune
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.lora import has_lora
from deepinv_ud2m.metrics import gaussian_frechet
from deepinv_ud2m.priors import save_prior

SETUP = Setup(prior="tiny", data="test", sigma_y=0.05, seed=0, batch_size=2)
TIMES = ("seconds", "peak_memory_gb")


def metrics_of(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "jpeg-10"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 48, 64)])
def test_tasks_are_linear_physics_at_any_size(name, shape):
    physics = make_physics(name, shape, sigma_y=0.03)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert physics.adjointness_test(img_size=shape) < 1e-6 * x[0].numel()  # a sum of so many products
    assert physics.noise_model.sigma.item() == pytest.approx(0.03)
    assert physics.A_adjoint(physics(x)).shape == x.shape
    again = make_physics(name, shape, sigma_y=0.03)
    assert torch.equal(physics.A(x), again.A(x)), "masks and kernels must not change between runs"


@pytest.mark.parametrize("method", ["ud2m", "diffpir:num_steps=3", "dps:num_steps=3", "dpir", "pinv"])
def test_methods_run_on_jpeg(tiny_prior, method, tmp_path):
    assert not METHODS["pigdm"].applies(make_physics("jpeg-10", (1, 32, 32)))
    assert not METHODS["ddrm"].applies(make_physics("jpeg-10", (1, 32, 32)))
    results = Results(tmp_path, SETUP)
    x = mnist_digits("test", num=2)
    run_method(results, tiny_prior, x, "jpeg-10", method, {}, 1, progress=False)
    assert all(np.isfinite(row["psnr"]) for row in results.rows) and len(results.rows) == 2


def test_the_kernel_of_the_paper():
    """3x3, Gaussian of variance 3."""
    kernel = make_physics("sr4-paper", (1, 32, 32)).filter
    assert kernel.shape[-2:] == (3, 3)
    assert kernel.sum().item() == pytest.approx(1)
    assert (kernel[0, 0, 1, 0] / kernel[0, 0, 1, 1]).item() == pytest.approx(np.exp(-1 / 6), rel=1e-5)


@pytest.mark.parametrize(
    "method, forward, backward",
    [
        ("ud2m", 9, 0),
        ("ud2m:num_steps=2,num_iterations=4", 8, 0),
        ("diffpir:num_steps=7", 7, 0),
        ("ddrm:num_steps=5", 5, 0),
        ("dps:num_steps=6", 6, 6),
        ("pigdm:num_steps=6", 6, 6),
        ("dpir", 8, 0),
        ("pinv", 0, 0),
    ],
)
def test_evaluations_are_counted_by_hooks(tiny_prior, method, forward, backward):
    physics = make_physics("inpaint-random", (1, 32, 32))
    y = physics(mnist_digits("test", num=2))
    entry, settings = parse_method(method)
    sampler = entry.build(tiny_prior, 0.05, **{**entry.defaults, **settings})
    samples, cost = draw(sampler, tiny_prior, y, physics, 2, seed=0)
    assert samples.shape == (2, 2, 1, 32, 32) and samples.isfinite().all()
    assert (cost["nfe"], cost["nfe_backward"]) == (forward, backward)
    assert not entry.random or not torch.equal(samples[0], samples[1])


def test_a_distilled_sampler_is_counted_and_leaves_the_prior_alone(tiny_prior, tmp_path):
    adapted = copy.deepcopy(tiny_prior)
    add_lora(adapted, 2, targets="all-convs")
    UD2M(UnfoldedDenoiser(adapted, 2), 2).save_pretrained(tmp_path / "sampler")
    label = f"ud2m-distilled:checkpoint={tmp_path / 'sampler'}"
    rows = run_all(tmp_path / "out", tiny_prior, methods=[label])
    assert {(row["nfe"], row["nfe_backward"]) for row in rows} == {(4, 0)}
    assert not has_lora(tiny_prior)
    more = run_all(tmp_path / "out", tiny_prior, methods=[f"{label},num_steps=5"])
    assert more[-1]["nfe"] == 10


def test_the_second_level_of_a_distilled_sampler_can_be_set(tiny_prior, tmp_path):
    model = UD2M(UnfoldedDenoiser(tiny_prior, 1), levels=[80.0, 0.5, 0.1])
    model.save_pretrained(tmp_path / "sampler")
    physics = make_physics("inpaint-random", (1, 32, 32))
    y = physics(mnist_digits("test", num=2))
    sampler = METHODS["ud2m-distilled"].build(
        tiny_prior, 0.05, checkpoint=tmp_path / "sampler", second_level=2.0
    )
    expected = UD2M(model.unfolded, levels=[80.0, 2.0, 0.1])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(sampler(y, physics, 3), expected(y, physics, generator=generator))
    with pytest.raises(ValueError, match="two levels or more"):
        METHODS["ud2m-distilled"].build(
            tiny_prior, 0.05, checkpoint=tmp_path / "sampler", num_steps=1, second_level=2.0
        )


def test_a_distilled_sampler_can_have_an_extra_level(tiny_prior, tmp_path):
    model = UD2M(UnfoldedDenoiser(tiny_prior, 1), levels=[80.0, 0.5, 0.1])
    model.save_pretrained(tmp_path / "sampler")
    physics = make_physics("inpaint-random", (1, 32, 32))
    y = physics(mnist_digits("test", num=2))
    build = METHODS["ud2m-distilled"].build
    sampler = build(tiny_prior, 0.05, checkpoint=tmp_path / "sampler", extra_level=0.3)
    expected = UD2M(model.unfolded, levels=[80.0, 0.5, 0.3, 0.1])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(sampler(y, physics, 3), expected(y, physics, generator=generator))
    with pytest.raises(ValueError, match="strictly decreasing"):
        build(tiny_prior, 0.05, checkpoint=tmp_path / "sampler", extra_level=0.5)


def test_a_distilled_sampler_keeps_its_reference_error(tiny_prior, tiny_config, tmp_path):
    initializer = PosteriorMeanInitializer(tiny_config["network"], 1)
    unfolded = UnfoldedDenoiser(tiny_prior, 1, initializer)
    UD2M(unfolded, levels=[80.0, 0.5, 0.1]).save_pretrained(tmp_path / "fixed")
    UD2M(unfolded, levels=[80.0, 0.5, 0.1], reference_error=0.4).save_pretrained(tmp_path / "relative")
    physics = make_physics("inpaint-random", (1, 32, 32))
    y = physics(mnist_digits("test", num=2))
    fixed, relative, more, of_schedule = (
        METHODS["ud2m-distilled"].build(tiny_prior, 0.05, checkpoint=tmp_path / name, **options)
        for name, options in (
            *(("fixed", {}), ("relative", {}), ("relative", {"extra_level": 0.3})),
            ("relative", {"num_steps": 2}),
        )
    )
    expected = UD2M(unfolded, levels=[80.0, 0.5, 0.3, 0.1], reference_error=0.4)
    with torch.no_grad():
        found = more(y, physics, 3)
        torch.testing.assert_close(
            found, expected(y, physics, generator=torch.Generator().manual_seed(3))
        )
    assert fixed.weights != relative.weights == more.weights != of_schedule.weights == fixed.weights


@pytest.mark.parametrize(
    "name", [name for name in METHODS if METHODS[name].random and name != "ud2m-distilled"]
)
def test_samplers_repeat_with_their_seed(tiny_prior, name):
    physics = make_physics("inpaint-random", (1, 32, 32))
    y = physics(mnist_digits("test", num=2))
    entry = METHODS[name]
    sampler = entry.build(tiny_prior, 0.05, num_steps=4, **entry.defaults)
    with torch.no_grad():
        first, again, other = sampler(y, physics, 0), sampler(y, physics, 0), sampler(y, physics, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_methods_apply_where_they_can():
    """DDRM needs a singular value decomposition."""
    assert METHODS["ddrm"].applies(make_physics("inpaint-box", (1, 32, 32)))
    assert not METHODS["ddrm"].applies(make_physics("sr4", (1, 32, 32)))


@pytest.mark.parametrize("spacing, gap", [("linear", 10.0), ("geometric", 100.0)])
def test_levels_of_ddrm_are_spaced_as_asked(tiny_prior, spacing, gap):
    """From 20.002 to 0.002 in three levels the middle one is the mean, arithmetic or geometric."""
    levels = []
    physics = make_physics("inpaint-box", (1, 32, 32))
    sampler = METHODS["ddrm"].build(tiny_prior, 0.05, num_steps=3, sigma_max=20.0, spacing=spacing)
    with tiny_prior.register_forward_pre_hook(lambda _, inputs: levels.append(float(inputs[1]))):
        sampler(physics(mnist_digits("test", num=1)), physics, 0)
    assert levels[0] == 20 and levels[2] == pytest.approx(0.002)
    found = levels[0] - levels[1] if spacing == "linear" else levels[0] / levels[1]
    assert found == pytest.approx(gap, rel=1e-3)
    with pytest.raises(ValueError, match=r"spacing.*'linear', 'geometric'.*'cubic'"):
        METHODS["ddrm"].build(tiny_prior, 0.05, spacing="cubic")


def test_a_measurement_depends_on_its_image_alone():
    x = mnist_digits("test", num=4)
    physics = make_physics("sr4", (1, 32, 32))
    together = measure(physics, x, range(4), seed=3)
    assert torch.equal(together[2:], measure(physics, x[2:], range(2, 4), seed=3))
    assert not torch.equal(together, measure(physics, x, range(4), seed=4))


def run_all(folder, prior, methods=("ud2m", "pinv"), images=4):
    results = Results(folder, SETUP)
    for method in methods:
        run_method(
            results, prior, mnist_digits("test", num=images), "sr4", method, {}, 2, progress=False
        )
    return results.rows


def test_the_same_seed_gives_the_same_rows(tiny_prior, tmp_path):
    assert metrics_of(run_all(tmp_path / "a", tiny_prior)) == metrics_of(
        run_all(tmp_path / "b", tiny_prior)
    )


def test_a_killed_run_resumes_to_the_same_rows(tiny_prior, tmp_path):
    whole = run_all(tmp_path / "whole", tiny_prior)
    run_all(tmp_path / "killed", tiny_prior, methods=["ud2m"], images=2)
    with open(tmp_path / "killed" / "rows.jsonl", "a") as file:
        file.write('{"task": "sr4", "method": "ud2m", "im')  # killed while writing
    resumed = run_all(tmp_path / "killed", tiny_prior)
    assert metrics_of(resumed) == metrics_of(whole)
    assert metrics_of(read_rows(tmp_path / "killed")) == metrics_of(whole)


def test_nothing_is_computed_twice(tiny_prior, tmp_path):
    run_all(tmp_path, tiny_prior)
    before = (tmp_path / "rows.jsonl").read_text()
    prior = tiny_prior.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    run_all(tmp_path, tiny_prior)
    prior.remove()
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_more_images_are_added_to_those_with_more_samples(tiny_prior, tmp_path):
    """The first sample of an image is the same however many there are, so it is not drawn again."""
    results = Results(tmp_path, SETUP)
    x = mnist_digits("test", num=6)
    run_method(results, tiny_prior, x[:2], "sr4", "ud2m", {}, num_samples=3, progress=False)
    run_method(results, tiny_prior, x, "sr4", "ud2m", {}, num_samples=1, progress=False)
    assert [(row["image"], row["num_samples"]) for row in results.rows] == [
        (0, 3), (1, 3), (2, 1), (3, 1), (4, 1), (5, 1),
    ]  # fmt: skip
    line = summarise(results.rows)[0]
    assert (line["images"], line["images_with_samples"], line["samples"]) == (6, 2, 3)
    assert line["psnr"] == pytest.approx(np.mean([row["psnr"] for row in results.rows]))
    assert line["psnr_mean"] == pytest.approx(np.mean([row["psnr_mean"] for row in results.rows[:2]]))
    alone = Results(tmp_path / "alone", SETUP)
    run_method(alone, tiny_prior, x, "sr4", "ud2m", {}, num_samples=1, progress=False)
    assert [row["psnr"] for row in alone.rows] == [row["psnr"] for row in results.rows]


def test_methods_are_timed_in_turn(tiny_prior, tmp_path):
    rows = run_all(tmp_path, tiny_prior)
    x = mnist_digits("test", num=4)
    timings = time_methods(
        tmp_path,
        tiny_prior,
        x,
        ["sr4"],
        ["ud2m", "pinv", "ddrm"],
        {"scores": {}},
        rounds=2,
        progress=False,
    )
    assert timings["seconds"]["sr4"].keys() == {"ud2m", "pinv"}, "DDRM does not apply"
    assert all(len(seconds) == 2 for seconds in timings["seconds"]["sr4"].values())
    lines = report(tmp_path, x)
    assert [line["seconds"] for line in lines] == [
        pytest.approx(np.median(timings["seconds"]["sr4"][line["method"]])) for line in lines
    ]
    assert "side by side" in (tmp_path / "report.md").read_text()
    assert len(rows) == 8
    # Another task is added, and what was measured in another way is not mixed in.
    again = time_methods(
        *(tmp_path, tiny_prior, x, ["inpaint-box"], ["pinv"], {"scores": {}}), rounds=2, progress=False
    )
    assert again["seconds"]["sr4"] == timings["seconds"]["sr4"] and "inpaint-box" in again["seconds"]
    with pytest.raises(ValueError, match="was measured with rounds = 2, not 1"):
        time_methods(tmp_path, tiny_prior, x, ["sr4"], ["pinv"], {"scores": {}}, rounds=1)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        time_methods(tmp_path, tiny_prior, x, ["sr4"], ["pinv"], {"scores": {}}, rounds=0)
    with pytest.raises(ValueError, match="not a folder of results"):
        time_methods(tmp_path / "nowhere", tiny_prior, x, ["sr4"], ["pinv"], {"scores": {}})


def test_defaults_win_over_tuned_settings():
    _, settings = parse_method("diffpir:num_steps=20,defaults")
    assert settings == {"num_steps": 20, **METHODS["diffpir"].defaults}


def test_settings_that_diverge_do_not_win(tiny_prior, tmp_path, monkeypatch):
    method = Method("diverges", lambda prior, sigma_y, scale: lambda y, physics, seed: y * scale,
                    grid={"scale": [math.nan, 1.0]}, random=False)  # fmt: skip
    monkeypatch.setitem(METHODS, "diverges", method)
    x = mnist_digits("validation", num=2)
    result = tune(tiny_prior, x, ["inpaint-box"], ["diverges"], tmp_path / "s.json", progress=False)
    scores = result["scores"]["inpaint-box"]["diverges"]
    assert [score["score"] is None for score in scores] == [True, False]
    assert best_settings(result, "inpaint-box", "diverges") == {"scale": 1.0}


def test_searches_are_merged_and_stand_for_other_numbers_of_steps(tmp_path):
    def search(score):
        return [{"settings": {"weight": score}, "score": score}, {"settings": {"weight": 9}, "score": 9}]

    (tmp_path / "a.json").write_text(json.dumps({"scores": {"sr4": {"dps:num_steps=100": search(1)}}}))
    (tmp_path / "b.json").write_text(json.dumps({"scores": {"sr4": {"dps:num_steps=1000": search(2)}}}))
    merged = merge_searches([tmp_path / "a.json", tmp_path / "b.json"])
    assert best_settings(merged, "sr4", "dps:num_steps=1000") == {"weight": 2}
    assert best_settings(merged, "sr4", "dps:num_steps=10") == {"weight": 1}
    assert best_settings(merged, "sr4", "diffpir") == {}
    (tmp_path / "c.json").write_text("{}")
    for name in ("c.json", "nowhere.json"):
        with pytest.raises(ValueError, match="--settings"):
            merge_searches([tmp_path / name])


def test_a_folder_of_another_setup_is_refused_and_left_alone(tiny_prior, tmp_path):
    run_all(tmp_path, tiny_prior)
    before = (tmp_path / "rows.jsonl").read_text()
    with pytest.raises(ValueError, match="another setup"):
        Results(tmp_path, Setup("tiny", "test", 0.1, 0, 2))
    with pytest.raises(ValueError, match="another setup"):
        Results(tmp_path, Setup("tiny", "test", 0.05, 0, 2, "weights of another prior"))
    with pytest.raises(ValueError, match="its judge is None, here it is 'another'"):
        Results(tmp_path, Setup("tiny", "test", 0.05, 0, 2, None, "another"))
    results = Results(tmp_path, SETUP)
    with pytest.raises(ValueError, match="image 0 of 'test' is not what it was"):
        run_method(results, tiny_prior, 1 - mnist_digits("test", num=4), "sr4", "pinv", {}, 2)
    arguments = (tiny_prior, mnist_digits("test", num=4), ["sr4"], ["pinv"], {"scores": {}})
    with pytest.raises(ValueError, match=r"its sigma_y is 0.05, here it is 0.1"):
        time_methods(tmp_path, *arguments, sigma_y=0.1)
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_a_run_that_came_to_nothing_does_not_bind_its_folder(tiny_prior, tmp_path):
    Results(tmp_path, Setup("tiny", "test", 0.1, 0, 2))
    run_all(tmp_path, tiny_prior, methods=["pinv"])
    assert json.loads((tmp_path / "setup.json").read_text())["setup"]["sigma_y"] == 0.05


@pytest.mark.parametrize("num_samples", [8, 32])
def test_error_over_spread_of_an_exact_sampler_is_one(num_samples):
    """Truth and samples of one Gaussian, 4000 dimensions: 1 +- 0.005, six times that is allowed."""
    generator = torch.Generator().manual_seed(0)
    samples = 0.5 + 0.01 * torch.randn(num_samples + 1, 10, 1, 20, 20, generator=generator)
    x, samples = samples[0], samples[1:]
    rows = evaluate(samples, x, x, Denoising(GaussianNoise(0.1)))
    rows = [{"num_samples": num_samples, **row} for row in rows]
    assert _error_over_spread(rows) == pytest.approx(1, abs=0.03)
    for row in rows:
        row["variance"] /= 4
    assert _error_over_spread(rows) == pytest.approx(2, abs=0.06)


def test_the_psnr_of_the_mean_is_of_sixteen_samples():
    """Whatever their number: the mean of more is nearer to the truth."""
    samples = torch.rand(20, 2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    x = torch.full((2, 1, 20, 20), 0.5)
    few, all_ = (evaluate(s, x, x, Denoising(GaussianNoise(0.1))) for s in (samples[:16], samples))
    for row, other in zip(few, all_, strict=True):
        error = (samples[:16].mean(0) - x)[few.index(row)].square().mean()
        assert row["psnr_mean"] == other["psnr_mean"] == pytest.approx(-10 * error.log10().item())
        assert row["energy_score"] != other["energy_score"]


def test_report_writes_tables_and_figures(tiny_prior, tmp_path):
    rows = run_all(tmp_path, tiny_prior)
    features = torch.tensor([row["features"] for row in rows])
    x = mnist_digits("test", num=4)
    lines = report(tmp_path, x, x.repeat(50, 1, 1, 1), lambda images: features.repeat(40, 1))
    assert {(line["method"], line["images"]) for line in lines} == {("ud2m", 4), ("pinv", 4)}
    of_ud2m = [row["psnr"] for row in rows if row["method"] == "ud2m"]
    line = next(line for line in lines if line["method"] == "ud2m")
    assert line["psnr"] == pytest.approx(np.mean(of_ud2m))
    assert line["psnr_se"] == pytest.approx(np.std(of_ud2m, ddof=1) / 2)
    assert line["nfe"] == 9
    text = (tmp_path / "report.md").read_text()
    assert f"{line['psnr']:.2f} ± {line['psnr_se']:.2f}" in text
    assert json.loads((tmp_path / "summary.json").read_text())["lines"] == lines
    for figure in ("calibration.png", "quality_time.png", "sheet_sr4.png"):
        assert (tmp_path / figure).stat().st_size > 1000
    assert (tmp_path / "table.csv").read_text().count("\n") == 3


def test_labels_of_one_colour_have_line_styles_of_their_own():
    labels = ["dps:num_steps=100", "dps:num_steps=1000", "dps:weight=1", "dps:weight=3", "pigdm", "ddrm"]
    styles = _line_styles([*labels, *labels])
    assert len({str(styles[label]) for label in labels[:4]}) == 4
    assert styles["pigdm"] == styles["ddrm"] == "-" and "-" not in list(styles.values())[:4]


def test_curves_of_one_colour_have_markers_of_their_own():
    curves = [
        "ud2m-distilled",
        "ud2m-distilled:checkpoint=a",
        "dps:weight=1",
        "ud2m-distilled:checkpoint=b",
    ]
    curves += ["dps:weight=2", "dps"]
    markers = _markers(map(_curve_name, curves))
    assert markers["ud2m-distilled"] == markers["dps"] == "o"
    for name in ("ud2m-distilled", "dps"):
        own = [marker for curve, marker in markers.items() if curve.partition(":")[0] == name]
        assert len(set(own)) == len(own) == 3
    assert _curve_name("dps:num_steps=1000,weight=1") == "dps:weight=1"
    assert _curve_name("dps:num_steps=1000") == "dps"


def test_other_settings_or_another_sampler_are_not_mixed(tiny_prior, tmp_path):
    results = Results(tmp_path, Setup("tiny", "test", 0.05, 0, 2))
    x = mnist_digits("test", num=4)
    run_method(results, tiny_prior, x[:2], "sr4", "ud2m", {}, progress=False)
    rows = list(results.rows)
    with pytest.raises(ValueError, match=r"has rows of 'ud2m' on sr4 with the settings"):
        run_method(results, tiny_prior, x, "sr4", "ud2m", {"eta": 0.5}, progress=False)
    assert results.rows == rows
    for row in results.rows:
        row["weights"] = "of another"
    with pytest.raises(ValueError, match="other weights, of another"):
        run_method(results, tiny_prior, x, "sr4", "ud2m", {}, progress=False)


def test_lines_are_in_the_order_of_tasks_and_methods():
    row = {"num_samples": 1, "image": 0, "settings": {}, "nfe": 1, "nfe_backward": 0, "seconds": 1.0}
    row |= {"peak_memory_gb": 1.0, "psnr": 20.0}
    names = [("sr4", "ud2m"), ("sr4", "dps:num_steps=10"), ("sr4", "pinv"), ("inpaint-box", "ud2m")]
    rows = [row | {"task": task, "method": method} for task, method in reversed(names)]
    assert [(line["task"], line["method"]) for line in summarise(rows)] == names


def test_titles_tell_methods_apart():
    assert method_title("dps:num_steps=100,guidance=norm,weight=300") == "DPS, 100 steps, weight 300"
    assert method_title("ud2m-distilled:checkpoint=runs/mine", quote="`") == "UD2M `mine`"
    assert method_title("ud2m-distilled:second_level=1.0") == "UD2M, second level 1"
    assert method_title("ud2m-distilled:extra_level=0.3") == "UD2M, extra level 0.3"
    assert method_title("ddrm:spacing=geometric,eta=1.0") == "DDRM, geometric levels"
    assert method_title("pigdm:defaults") == "PiGDM, defaults"


def test_differences_are_of_the_same_images():
    """Images that one method lacks do not count, however much they differ."""
    row = {"num_samples": 1, "settings": {}, "nfe": 1, "nfe_backward": 0, "seconds": 1.0, "task": "sr4"}
    row |= {"peak_memory_gb": 1.0}
    rows = [row | {"method": "ud2m-distilled", "image": i, "psnr": 20.0 + 7 * i} for i in range(4)]
    gaps = {1: -1.0, 3: -2.0}
    rows += [row | {"method": "pinv", "image": i, "psnr": 20 + 7 * i + gap} for i, gap in gaps.items()]
    ours, theirs = summarise(rows)
    assert "psnr_gap" not in ours
    assert theirs["psnr_gap"] == pytest.approx(-1.5)
    assert theirs["psnr_gap_se"] == pytest.approx(0.5)  # standard deviation 0.5 sqrt(2), of two images


def test_frechet_distances_are_compared_on_the_same_images():
    row = {"num_samples": 1, "settings": {}, "nfe": 1, "nfe_backward": 0, "seconds": 1.0, "task": "sr4"}
    row |= {"peak_memory_gb": 1.0, "psnr": 20.0}
    g = torch.Generator().manual_seed(0)
    features, reference = torch.randn(12, 2, generator=g), torch.randn(50, 2, generator=g).double()
    of = {"ud2m-distilled": features, "ddrm": features[:8], "dps": features + 1, "pinv": features[:2]}
    rows = [
        row | {"method": method, "image": i, "features": z.tolist()}
        for method, zs in of.items()
        for i, z in enumerate(zs)
    ]
    lines = {line["method"]: line for line in summarise(rows, reference)}
    ours, fewer, shifted, too_few = (lines[method] for method in of)
    assert "frechet_gap" not in ours
    z = features.double()
    expected = gaussian_frechet(z.mean(0), torch.cov(z.T), reference.mean(0), torch.cov(reference.T))
    assert ours["frechet"] == pytest.approx(expected.item())
    assert fewer["frechet"] != pytest.approx(ours["frechet"])
    assert (fewer["frechet_gap"], fewer["frechet_gap_se"]) == (0, 0)
    # The shift adds 2 (m - m_r) . (1, 1) + 2, whose error is that of the mean.
    shift = 2 * (z.mean(0) - reference.mean(0)).sum().item() + 2
    assert shifted["frechet_gap"] == pytest.approx(shift)
    error = 2 * z.sum(1).std().item() / 12**0.5
    assert shifted["frechet_gap_se"] == pytest.approx(error)
    assert not any(key.startswith("frechet") for key in too_few)


def test_means_are_compared_where_both_have_several_samples():
    """The mean of one sample is that sample, which says nothing of the mean of several."""
    row = {"settings": {}, "nfe": 1, "nfe_backward": 0, "seconds": 1.0, "task": "sr4"}
    row |= {"peak_memory_gb": 1.0, "psnr": 20.0, "energy_score": 2.0}
    several = {"ud2m-distilled": {0, 1, 2}, "ddrm": {1, 2, 3}}
    rows = [
        row
        | {"method": method, "image": i, "num_samples": 8 if i in of else 1, "psnr_mean": mean + 7 * i}
        for (method, of), mean in zip(several.items(), (20.0, 19.0), strict=True)
        for i in range(4)
    ]
    rows[1]["psnr_mean"] += 1
    _, theirs = summarise(rows)
    assert theirs["psnr_gap"] == 0
    assert theirs["psnr_mean_gap"] == pytest.approx(-1.5)  # -2 and -1, on images 1 and 2
    assert theirs["energy_score_gap"] == 0
    for row in rows[:4]:
        row["num_samples"] *= 2
    _, theirs = summarise(rows)
    assert "psnr_mean_gap" not in theirs  # of 16 and of 8 samples
    assert theirs["energy_score_gap"] == 0  # which their number does not bias


def test_stored_results_are_results_that_can_be_extended(tiny_prior, tmp_path):
    run_all(tmp_path / "run", tiny_prior, methods=["ud2m"])
    x = mnist_digits("test", num=4)
    report(tmp_path / "run", x)
    store(tmp_path / "run", tmp_path / "stored")
    assert not (tmp_path / "stored" / "rows.jsonl").exists()
    packed = (tmp_path / "stored" / "rows.jsonl.gz").read_bytes()
    whole = run_all(tmp_path / "whole", tiny_prior)
    assert read_rows(tmp_path / "stored") and not (tmp_path / "stored" / "rows.jsonl").exists()
    shutil.copytree(tmp_path / "stored", tmp_path / "copy")
    report(tmp_path / "copy", x)  # of packed rows alone
    store(tmp_path / "copy", tmp_path / "copied")
    assert (tmp_path / "copied" / "rows.jsonl.gz").read_bytes() == packed
    with tiny_prior.register_forward_hook(lambda *_: pytest.fail("the network was called")):
        run_all(tmp_path / "copy", tiny_prior, methods=["ud2m"])
    assert metrics_of(run_all(tmp_path / "copy", tiny_prior)) == metrics_of(whole)
    report(tmp_path / "copy", x)
    store(tmp_path / "copy", tmp_path / "stored")
    assert (tmp_path / "stored" / "rows.jsonl.gz").read_bytes() != packed
    assert "pinv" in (tmp_path / "stored" / "report.md").read_text()


def test_a_first_line_cut_short_is_no_row(tiny_prior, tmp_path):
    whole = run_all(tmp_path / "whole", tiny_prior, methods=["pinv"])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "rows.jsonl").write_text((tmp_path / "whole" / "rows.jsonl").read_text()[:50])
    assert read_rows(tmp_path / "cut") == []
    run_all(tmp_path / "cut", tiny_prior, methods=["pinv"])
    assert metrics_of(read_rows(tmp_path / "cut")) == metrics_of(whole)


@pytest.mark.parametrize("other", [{"settings": {"eta": 0.5}}, {"weights": "abc"}])
def test_joined_rows_of_several_settings_are_refused(other, tiny_prior, tmp_path):
    run_all(tmp_path, tiny_prior, methods=["ud2m"])
    x, file = mnist_digits("test", num=4), tmp_path / "rows.jsonl"
    report(tmp_path, x)
    first = json.loads(file.read_text().splitlines()[0])
    with file.open("a") as rows:
        rows.write(json.dumps(first | other) + "\n")
    before = (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match=r"rows of 'ud2m' on \S+ with several settings or weights"):
        report(tmp_path, x)
    assert (tmp_path / "report.md").read_text() == before


@pytest.mark.parametrize("name", ["mnist", "mnist_1000", "photos", "photos_256", "photos_low_noise"])
def test_stored_rows_are_of_one_setting(name):
    made_with = {}
    for row in read_rows(Path(deepinv_ud2m.__file__).parent / "benchmark" / "results" / name):
        line = (row["task"], row["method"])
        assert made_with.setdefault(line, row["settings"]) == row["settings"], line


def test_coverage_of_an_exact_sampler_is_within_its_noise():
    """Uniform ranks, with a fixed seed; an exact sampler passes its 95 % quantile 1 time in 20."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, 17, (256,), generator=generator)
    rows = [
        {
            "task": "sr4", "method": "exact", "num_samples": 16, "image": i, "settings": {}, "nfe": 1,
            "nfe_backward": 0, "seconds": 1.0, "peak_memory_gb": 1.0, "psnr": 0.0,
            "credible_level": [r.item() / 17, (r.item() + 1) / 17],
        }
        for i, r in enumerate(ranks)
    ]  # fmt: skip
    line = summarise(rows)[0]
    assert line["coverage_error"] < line["coverage_noise"]
    for row in rows:
        row["credible_level"] = [0.0, 1 / 17]
    assert summarise(rows)[0]["coverage_error"] > 0.9


def test_tuning_finds_the_minimum_and_resumes(tiny_prior, tmp_path):
    file = tmp_path / "settings.json"
    x = mnist_digits("validation", num=2)
    result = tune(tiny_prior, x, ["sr4"], ["ud2m"], file, progress=False)
    scores = result["scores"]["sr4"]["ud2m"]
    assert [score["settings"] for score in scores] == METHODS["ud2m"].settings()
    best = min(scores, key=lambda score: score["score"])
    assert best_settings(result, "sr4", "ud2m") == best["settings"]
    assert best_settings(result, "inpaint-box", "ud2m") == {}
    assert METHODS["dps"].settings(fixed=["guidance"])[0].keys() == {"weight"}
    hook = tiny_prior.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    assert tune(tiny_prior, x, ["sr4"], ["ud2m"], file, progress=False) == result
    hook.remove()
    with pytest.raises(ValueError, match="another setup"):
        tune(tiny_prior, x, ["sr4"], ["ud2m"], file, sigma_y=0.1, progress=False)
    other = copy.deepcopy(tiny_prior)
    next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="its prior_weights is"):
        tune(other, x, ["sr4"], ["ud2m"], file, progress=False)
    with pytest.raises(ValueError, match="its data is '', here it is 'photos'"):
        tune(tiny_prior, x, ["sr4"], ["ud2m"], file, data="photos", progress=False)


def test_other_values_than_the_declared_can_be_searched(tmp_path):
    """And are added to those in the file."""
    file = tmp_path / "settings.json"
    search = ["tune", "--images", "1", "--tasks", "inpaint-box", "--settings", str(file)]
    search += ["--methods", "dps:num_steps=2,guidance=norm", "--grid"]
    assert main([*search, "weight=0.5,2"]) == 0
    assert main([*search, "weight=2,7"]) == 0
    scores = json.loads(file.read_text())["scores"]["inpaint-box"]["dps:num_steps=2,guidance=norm"]
    assert [score["settings"] for score in scores] == [{"weight": weight} for weight in (0.5, 2, 7)]


@pytest.mark.parametrize(
    "grid, message",
    [
        ("weight", "--grid is written setting=value,value, got 'weight'"),
        ("zeta=1", "these methods are ['guidance', 'weight'], got 'zeta'"),
        ("weight=1,many", "weight of 'dps' must be a number, got 'many'"),
    ],
)
def test_bad_values_to_search_are_refused(grid, message, tmp_path, capsys):
    file = tmp_path / "settings.json"
    arguments = ["--images", "1", "--tasks", "sr4", "--methods", "dps", "--settings", str(file)]
    assert main(["tune", *arguments, "--grid", grid]) == 2
    assert message in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "sr5"], "task must be one of"),
        (["--methods", "diffpire"], "method must be one of"),
        (["--methods", "diffpir:num_steps"], "name=value"),
        (["--prior", "nowhere"], "name must be one of the priors"),
        (["--images", "0"], "--images"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, message, tmp_path, capsys):
    assert main(["run", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "rows.jsonl").exists()


@pytest.fixture
def photos(tmp_path):
    """A folder of two pictures, and a prior for any size beside it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_a_folder_of_images_is_benchmarked(tiny_prior, tiny_config, photos, tmp_path):
    save_prior(tiny_prior, tiny_config, tmp_path / "prior")
    arguments = ["--prior", str(tmp_path / "prior"), "--data", str(photos), "--size", "32"]
    arguments += ["--tasks", "sr4", "--methods", "ud2m", "pinv", "--samples", "2", "--device", "cpu"]
    assert main(["run", "--out", str(tmp_path / "out"), *arguments]) == 0
    rows = read_rows(tmp_path / "out")
    assert [(row["method"], row["image"]) for row in rows] == [
        ("ud2m", 0), ("ud2m", 1), ("pinv", 0), ("pinv", 1),
    ]  # fmt: skip
    assert "photos, 32x32" in (tmp_path / "out" / "report.md").read_text()


def test_bad_images_are_refused_and_leave_results_untouched(
    tiny_prior, tiny_config, photos, tmp_path, capsys
):
    save_prior(tiny_prior, tiny_config, tmp_path / "prior")
    out = tmp_path / "out"
    fixed = ["run", "--out", str(out), "--prior", str(tmp_path / "prior"), "--device", "cpu"]
    fixed += ["--tasks", "sr4", "--methods", "pinv"]
    assert main([*fixed, "--data", str(photos), "--size", "32"]) == 0
    before = (out / "rows.jsonl").read_text()
    (tmp_path / "empty").mkdir()
    (photos / "2.png").write_bytes(b"not a picture")
    two = ["--data", str(photos), "--size", "32", "--images", "2"]
    for arguments, message in [
        (["--data", str(tmp_path / "empty"), "--size", "32"], "empty itself has no file"),
        (["--data", str(photos), "--size", "32"], "2.png"),
        (["--data", str(photos), "--size", "64", "--images", "2"], "0.png"),
        (["--data", str(photos), "--size", "16", "--images", "2"], "another setup"),
        (["--data", str(photos), "--size", "33"], "multiple"),
        ([*two, "--sigma-y", "0"], "sigma_y must be positive"),
        ([*two, "--batch-size", "0"], "batch_size must be"),
        ([*two, "--samples", "0"], "--samples must be"),
        ([*two, "--methods", "diffpir:steps=9"], "got 'steps'"),
        (
            [*two, "--methods", "diffpir:num_steps=abc"],
            "num_steps of 'diffpir' must be an integer, got 'abc'",
        ),
        ([*two, "--methods", "diffpir:zeta=true"], "zeta of 'diffpir' must be a number, got True"),
        (
            [*two, "--methods", "ud2m-distilled:second_level=abc"],
            "second_level of 'ud2m-distilled' must be a number, got 'abc'",
        ),
        ([*two, "--data", "test"], "--size is for a folder"),
        (["--data", str(photos)], "--size"),
        (["--data", "Nowhere", "--size", "32"], "Nowhere"),
    ]:
        assert main([*fixed, *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
    (tmp_path / "prior" / "model.safetensors").unlink()
    assert main([*fixed, "--data", str(photos), "--size", "32", "--images", "2"]) == 2
    assert "weights of the prior" in capsys.readouterr().err
    assert (out / "rows.jsonl").read_text() == before


def test_the_command_compares_with_a_gaussian_posterior(tmp_path, capsys):
    arguments = ["--images", "8", "--samples", "2", "--methods", "pinv", "--tasks", "inpaint-random"]
    assert main(["gaussian", "--out", str(tmp_path), *arguments]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["gaussian", "--out", str(tmp_path), *arguments, "--sigma-y", "0"]) == 2
    assert main(["gaussian", "--out", str(tmp_path), *arguments, "--tasks", "jpeg-10"]) == 2
    assert "tasks must be linear" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "--out", str(tmp_path / "out"), "--device", "cuda:1"]) == 2
    assert "--device is 'cuda:1', but there is no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        make_physics("sr4", (1, 14, 14))


@pytest.mark.slow
def test_the_cost_of_a_training_step_is_measured(tiny_prior, tiny_config, tmp_path):
    save_prior(tiny_prior, tiny_config, tmp_path / "prior")
    arguments = ["--prior", str(tmp_path / "prior"), "--batch-size", "4", "--rounds", "2"]
    result = profile_training.main([*arguments, "--out", str(tmp_path / "cost.json")])
    assert json.loads((tmp_path / "cost.json").read_text())["seconds"] == result["seconds"]
    assert result["memory_gb"]["plain"] > 0


def test_the_cost_of_a_sample_is_profiled(tiny_prior, tiny_config, tmp_path, capsys):
    save_prior(tiny_prior, tiny_config, tmp_path / "prior")
    arguments = ["--prior", str(tmp_path / "prior"), "--sizes", "16", "--batch-sizes", "4", "--scaling"]
    result = profile.main(
        [*arguments, "--pairs", "2", "--samples", "3", "--split", "2", "--out", str(tmp_path / "p.json")]
    )
    assert json.loads((tmp_path / "p.json").read_text()) == result
    cases = [(row["measurements"], row["samples"], row["split"]) for row in result["rows"]]
    assert cases == [(4, 1, None), (1, 3, 2)]
    for row in result["rows"]:
        assert row["nfe"] == 9
        assert sum(row["stages"].values()) == pytest.approx(1)
        assert all(row["stages"][stage] > 0 for stage in profile.STAGES)
        assert row["stages"]["denoise"] > row["stages"]["noise"]
        assert row["peak_gb"] > 0
        assert row["network_images_per_second"] > row["images_per_second"] > 0
    assert result["scaling"]["evaluations"]["points"] == [1, 3, 6, 9, 12, 15]
    assert result["scaling"]["batch"]["slope"] > 0
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert "overhead" in capsys.readouterr().out


@pytest.mark.slow  # compiles
def test_ways_to_sample_faster_change_the_samples_little(tiny_prior, tiny_config, tmp_path):
    save_prior(tiny_prior, tiny_config, tmp_path / "prior")
    arguments = ["--prior", str(tmp_path / "prior"), "--sizes", "16", "--batch-sizes", "4"]
    faster = profile.main([*arguments, "--pairs", "1", "--samples", "1", "--faster"])["faster"]
    assert tuple(faster) == profile.WAYS
    assert faster["float32"] == {"time": 1, "change": 0}
    for name, way in faster.items():
        assert way["time"] > 0
        assert way["change"] < (0.05 if "bfloat16" in name else 1e-4)
    assert faster["bfloat16"]["change"] > 0


def test_one_sample_and_one_step_of_a_published_network(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    arguments = ["--small", "--size", "32", "--threads", "1", "--checkpointing"]
    result = paper_scale.main([*arguments, "--out", str(tmp_path / "p.json")])
    assert json.loads((tmp_path / "p.json").read_text()) == result
    assert result["sample"]["nfe"] == 9 and result["sample"]["finite"]
    assert result["training_step"]["batch_size"] == 2 and result["training_step"]["checkpointing"]
    assert 0 < result["trained"] < result["parameters"]
    assert result["trained_share"] == pytest.approx(result["trained"] / result["parameters"])
    for part in ("sample", "training_step"):
        assert result[part]["seconds"] > 0 and result[part]["peak_gb"] > 0
        assert (
            4 * result["parameters"]
            < result[part]["tensors_gb"] * 2**30
            < result[part]["peak_gb"] * 2**30
        )
    with pytest.raises(SystemExit):
        paper_scale.main(["--batch-size", "0"])


def test_live_tensors_are_counted_from_their_making_to_their_end():
    kept = torch.zeros(256, 1024)  # 1 MiB, made before
    with LiveTensors() as before:
        pass
    start, unit = before.bytes, 2**20
    with LiveTensors() as tensors:
        held = kept + 1
        view = held[:10]  # shares its storage
        assert tensors.bytes == start + unit
        (kept * 2 + held).sum()  # two more for a moment, and the sum
        assert tensors.bytes == start + unit
        assert start + 3 * unit <= tensors.peak <= start + 3 * unit + 64
        del held
        assert tensors.bytes == start + unit
        del view
        assert tensors.bytes == start


@pytest.mark.parametrize("checkpointing", [False, True])
def test_live_tensors_see_what_the_backward_pass_and_checkpointing_hold(checkpointing):
    """Ten layers sin(sin(sin(x))): each holds its three inputs, or with checkpointing one alone."""
    x = torch.zeros(256, 1024, requires_grad=True)

    def layer(h):
        return h.sin().sin().sin()

    with LiveTensors() as tensors:
        start, h = tensors.bytes, x
        for _ in range(10):
            h = checkpoint(layer, h, use_reentrant=False) if checkpointing else layer(h)
        # every input of a sine, the outputs before the last being inputs of the next; x itself was there
        assert tensors.bytes - start == (10 if checkpointing else 30) * 2**20
        h.sum().backward()
    # above it: the gradient on its way (two of them and a cosine), and of one layer its inputs again
    over = tensors.peak - start - (10 if checkpointing else 30) * 2**20
    assert 2 * 2**20 <= over <= (6 if checkpointing else 3) * 2**20 + 64


def test_a_line_is_fitted_and_bad_sizes_are_refused(capsys):
    line = profile._line([1, 2, 4], [3.0, 5.0, 9.0])
    assert line["slope"] == pytest.approx(2)
    assert line["intercept"] == pytest.approx(1)
    assert line["r_squared"] == pytest.approx(1)
    with pytest.raises(SystemExit):
        profile.main(["--batch-sizes", "16", "0"])
    assert "--batch-sizes must be at least 1" in capsys.readouterr().err
