"""What the benchmark reports of its rows; the search of settings; the cost of samples."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny_prior, seeded
from deepinv.physics import Denoising, Downsampling, GaussianNoise
from filelock import FileLock
from PIL import Image
from test_benchmark import computed, entry, study_of

from deepinv_ud2m.benchmark.cost import STAGES, measure_cost
from deepinv_ud2m.benchmark.methods import CRITERIA, METHODS, Entry, Method, Search
from deepinv_ud2m.benchmark.report import comparison, overview, report, stored_arrays, summarise
from deepinv_ud2m.benchmark.rows import COLUMNS, batch_folder, read_rows
from deepinv_ud2m.benchmark.run import Study, evaluate, measure, perceptual_metric, run
from deepinv_ud2m.benchmark.tune import _scores, tune
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import frechet_influence, gaussian_frechet
from deepinv_ud2m.physics.tasks import make_physics


def rows_of(values, **given):
    """Rows of one task; ``values`` are columns by method, and lists are one value per image."""
    rows = []
    for method, columns in values.items():
        head = {"task": "sr4", "method": method, "name": method, "settings": "{}", "criterion": "energy"}
        head |= {"weights": "", "searched_on": 4, "num_samples": 1, "nfe": 1, "nfe_backward": 0, "seconds": 1}
        frame = pd.DataFrame(given | columns).reset_index(names="row")
        rows.append(frame.assign(**{key: value for key, value in head.items() if key not in frame}))
    rows = pd.concat(rows).reindex(columns=["row", *COLUMNS])
    return rows.assign(image=rows["image"].fillna(rows["row"]).astype(int))


def line_of(lines, method):
    return lines.set_index("method").loc[method]


def test_the_psnr_of_the_mean_is_of_sixteen_samples():
    samples = torch.rand(20, 2, 1, 20, 20, generator=seeded(0))
    x = torch.full((2, 1, 20, 20), 0.5)
    few, all_ = (evaluate(s, x, x, Denoising(GaussianNoise(0.1)), None)[0] for s in (samples[:16], samples))
    error = (samples[:16].mean(0) - x).square().mean((1, 2, 3))
    assert few["psnr_mean"] == all_["psnr_mean"] == pytest.approx((-10 * error.log10()).tolist())
    assert few["squared_error"] == pytest.approx(error.tolist())
    assert few["energy_score"] != all_["energy_score"]


def test_the_psnr_of_the_mean_of_many_is_found_from_two_samples():
    """Errors are bias and variance. With two samples, what is left of one image's error may be negative."""
    generator = seeded(0)
    x = torch.full((64, 1, 32, 32), 0.5)
    samples = x + 0.03 + 0.2 * torch.randn(8, *x.shape, generator=generator)
    study = SimpleNamespace(x=x, metric=None, features_of_images=None)
    few, many = (_scores(s, x, Denoising(GaussianNoise(0.1)), study)["psnr"] for s in (samples[:2], samples))
    assert few == pytest.approx(many, abs=0.6)  # three standard errors; the mean of two has 5 dB less


def test_differences_are_of_the_same_images():
    """Images that one method lacks do not count, however much they differ."""
    ours = {"image": range(4), "psnr": [20.0, 27.0, 34.0, 41.0], "num_samples": 1}
    theirs = {"image": [1, 3], "psnr": [26.0, 39.0], "num_samples": 1}
    lines = summarise(rows_of({"pinv": theirs, "ud2m-distilled": ours}))
    assert np.isnan(line_of(lines, "ud2m-distilled")["psnr_less"])
    line = line_of(lines, "pinv")
    assert line["psnr_less"] == pytest.approx(-1.5)
    assert line["psnr_less_se"] == pytest.approx(0.5)  # standard deviation 0.5 sqrt(2), of two images


def test_methods_are_compared_on_the_images_that_all_have():
    """Only those that were searched for the criterion, and bold beyond two standard errors."""
    ours = {"energy_score": [1.0, 2.0, 3.0, 9.0], "perceptual": 0.5, "criterion": "", "num_samples": 8}
    theirs = {"image": [0, 1, 2], "energy_score": [1.5, 2.6, 3.4], "num_samples": 4}
    near = {"image": range(1, 4), "energy_score": [2.5, 2.9, 0.0], "criterion": "crps and energy"}
    columns = {"ud2m-distilled": ours, "dps": theirs, "ddrm, for crps": near | {"num_samples": 4}}
    columns["pigdm"] = {**theirs, "energy_score": 0.0, "criterion": "perceptual", "perceptual": 0.4}
    rows = rows_of(columns)
    table = comparison(rows, "energy_score").splitlines()
    assert table[0] == "| task | images | ud2m-distilled | dps | ddrm |"
    assert table[2:] == ["| `sr4` | 2 | 2.50 | 3.00 | 2.70 |"]
    table = comparison(rows, "energy_score", ["ud2m-distilled", "dps"])
    assert table.splitlines()[2:] == ["| `sr4` | 3 | **2.00** | 2.50 |"]
    assert "| `sr4` | 3 | 0.500 | **0.400** |" in comparison(rows, "perceptual")
    assert comparison(rows, "swd") == comparison(rows_of({"dps": theirs}), "energy_score") == ""
    # The mean of eight samples is not compared with the mean of four.
    rows["psnr_mean"] = [20.0] * 4 + [19.0] * 3 + [19.5] * 3 + [21.0] * 3
    rows["criterion"] = rows["criterion"].where(rows["method"] == "ud2m-distilled", "psnr")
    assert comparison(rows, "psnr_mean") == ""
    rows["num_samples"] = rows["num_samples"].where(rows["method"] != "dps", 8)
    assert "| `sr4` | 3 | **20.00** | 19.00 |" in comparison(rows, "psnr_mean").replace(" |  |", " |")


def test_settings_of_ones_own_stand_beside_no_searched_ones():
    score = {"energy_score": [2.0, 3.0], "num_samples": 4}
    own = score | {"name": "dps", "criterion": ""}
    rows = rows_of({"ud2m-distilled": score | {"criterion": ""}, "dps": score, "dps, weight 2": own})
    table = overview(summarise(rows), "energy_score_less")
    assert "| dps |" in table and "weight 2" not in table
    table = overview(summarise(rows[rows["method"] != "dps"]), "energy_score_less")
    assert "| dps, weight 2 |" in table, "nothing was searched"


def test_the_standard_error_of_the_spread_skill_ratio_is_that_of_the_jackknife():
    error, variance = (1 + torch.rand(2, 200, generator=seeded(0), dtype=torch.float64)).numpy()
    columns = {"squared_error": error, "variance": variance, "num_samples": 4}
    line = line_of(summarise(rows_of({"dps": columns})), "dps")
    ratio = lambda kept: (error[kept].mean() / variance[kept].mean() / 1.25) ** 0.5  # noqa: E731
    others = np.array([ratio(np.arange(200) != i) for i in range(200)])
    assert line["spread_skill"] == pytest.approx(ratio(slice(None)))
    assert line["spread_skill_se"] == pytest.approx((199 * others.var()) ** 0.5, rel=0.01)


def test_means_are_compared_where_both_have_several_samples():
    """The mean of one sample is that sample, which says nothing of the mean of several."""
    columns = {}
    for name, several, mean in (("ud2m-distilled", {0, 1, 2}, 20.0), ("ddrm", {1, 2, 3}, 19.0)):
        psnr = [mean + 7 * i + (i == 1 and mean == 20) for i in range(4)]
        numbers = [8 if i in several else 1 for i in range(4)]
        columns[name] = {"psnr_mean": psnr, "num_samples": numbers, "energy_score": 2.0, "psnr": 20.0}
    line = line_of(summarise(rows_of(columns)), "ddrm")
    assert line["psnr_less"] == 0 and line["energy_score_less"] == 0
    assert line["psnr_mean_less"] == pytest.approx(-1.5)  # -2 and -1, on images 1 and 2
    columns["ud2m-distilled"]["num_samples"] = [16, 16, 16, 2]
    line = line_of(summarise(rows_of(columns)), "ddrm")
    assert "psnr_mean_less" not in line, "of 16 and of 8 samples"
    assert line["energy_score_less"] == 0, "which their number does not bias"


def test_a_report_has_tables_and_figures(tiny_prior, tmp_path):
    rows = computed(tmp_path, tiny_prior)
    lines = report(tmp_path)
    assert set(zip(lines["method"], lines["images"], strict=True)) == {("ud2m", 4), ("pinv", 4)}
    of_ud2m, line = rows.loc[rows["method"] == "ud2m", "energy_score"], line_of(lines, "ud2m")
    assert line["energy_score"] == pytest.approx(of_ud2m.mean())
    assert line["energy_score_se"] == pytest.approx(of_ud2m.std() / 2)
    text = (tmp_path / "report.md").read_text()
    assert f"{line['energy_score']:.2f} ± {line['energy_score_se']:.2f}" in text
    assert text.count("DigitClassifier (deepinv_ud2m mnist-classifier)") == 2, "setup and legend"
    assert "| perceptual distance, DigitClassifier |" in text
    assert f"{line['spread_skill']:.2f}" in overview(lines, "spread_skill")
    assert overview(lines, "spread_skill") in text
    stored = pd.read_csv(tmp_path / "summary.csv")
    assert stored["psnr"].tolist() == pytest.approx(lines["psnr"].tolist(), rel=1e-4)
    for figure in ("calibration.webp", "sheet_sr4.webp"):
        with Image.open(tmp_path / figure) as picture:
            assert len(picture.convert("L").getcolors()) > 50


@pytest.mark.parametrize("method", ["ud2m", "diffpir", "pigdm"])
def test_networks_alone_run_in_mixed_precision(method, tiny_prior, tmp_path, monkeypatch):
    seen, operator = {"network": set(), "operator": set()}, Downsampling.A
    attention = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()

    def record(self, *arguments, **options):
        seen["operator"].add(torch.is_autocast_enabled("cpu"))
        return operator(self, *arguments, **options)

    monkeypatch.setattr(Downsampling, "A", record)
    layer = next(m for m in tiny_prior.modules() if isinstance(m, torch.nn.GroupNorm))
    layer.register_forward_hook(lambda *_: seen["network"].add(torch.is_autocast_enabled("cpu")))
    study = study_of(tiny_prior, [method], images=2)
    study.bfloat16 = True
    run(tmp_path, study)
    assert seen == {"network": {False, True}, "operator": {False}}  # False: its warm-up
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == attention
    study.bfloat16 = False
    with pytest.raises(ValueError, match="in bfloat16', here it is"):  # rows of both kinds do not mix
        run(tmp_path, study)


@pytest.mark.parametrize("gone", [[], ["swd", "reduced_chi_square"]])
def test_new_rows_go_after_packed_ones(gone, tiny_prior, tmp_path):
    """As published results are stored, those of versions with less columns included: all are kept."""
    computed(tmp_path, tiny_prior, methods=["ud2m"])
    before = pd.read_csv(tmp_path / "rows.csv").drop(columns=gone).to_csv(index=False)
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(before.encode()))
    (tmp_path / "rows.csv").unlink()
    rows = computed(tmp_path, tiny_prior, methods=["ud2m", "pinv"])
    assert rows["method"].tolist() == 4 * ["ud2m"] + 4 * ["pinv"]
    assert rows["swd"].notna().tolist() == 4 * [not gone] + 4 * [True]


def test_frechet_distances_are_those_of_the_stored_features(tiny_prior, tmp_path):
    run(tmp_path, study_of(tiny_prior, ["pinv"], images=66, samples=1, batch_size=33))
    line = report(tmp_path).iloc[0]
    x = mnist_digits("test", num=66)
    physics = make_physics("sr4", (1, 32, 32))
    samples = physics.A_dagger(measure(physics, x, range(66), 0)).clamp(0, 1)
    features = perceptual_metric(x).distance.backbone.features
    z, other = (features(images).half().double() for images in (samples, x))
    fit = other.mean(0), torch.cov(other.T)
    distance = gaussian_frechet(z.mean(0), torch.cov(z.T), *fit).item()
    assert line["frechet"] == pytest.approx(distance, rel=1e-4)
    error = frechet_influence(z, *fit).std().item() / 66**0.5
    assert line["frechet_se"] == pytest.approx(error, rel=1e-4)
    run(tmp_path, study_of(tiny_prior, ["dpir"], images=2, samples=1))
    assert report(tmp_path)["frechet"].dropna().item() == line["frechet"], (
        "the reference is of the most images"
    )
    (tmp_path / "reference.npz").unlink()
    of_table = report(tmp_path)["frechet"].dropna().item()
    assert of_table == pytest.approx(line["frechet"], rel=1e-4), "without the features"


@pytest.mark.parametrize("other", [{"settings": '{"eta": 0.5}'}, {"weights": "abc"}])
def test_joined_rows_of_several_settings_are_refused(other, tiny_prior, tmp_path):
    computed(tmp_path, tiny_prior, methods=["ud2m"])
    report(tmp_path)
    before = (tmp_path / "report.md").read_text()
    rows = pd.concat([(rows := read_rows(tmp_path)), rows[:1].assign(image=9, **other)])
    rows.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match=r"rows of \('sr4', 'ud2m'\) with several settings or weights"):
        report(tmp_path)
    assert (tmp_path / "report.md").read_text() == before


# -- Search ---------------------------------------------------------------------------------------


def _scaled():
    """One setting for each criterion: an exact image, one without spread, too much of it, and a failure."""

    def build(prior, sigma_y, kind=""):
        def sample(y, physics, seed):
            x = mnist_digits("validation", num=len(y))
            noise = torch.randn(x.shape, generator=seeded(seed))
            return {"biased": x * 0.7 + 0.1, "noisy": x + 0.3 * noise, "failed": x * np.nan}[kind]

        return sample

    return Method(build, {"kind": ["failed", "biased", "noisy"]})


def test_winners_are_those_of_each_criterion(tiny_prior, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "scaled", _scaled())
    study = study_of(tiny_prior, ["scaled"], samples=4, seed=7)
    study.x = mnist_digits("validation", num=4)
    result = tune(tmp_path / "s.json", study)
    scores = result["scores"]["sr4"]["scaled"]
    assert [one["settings"]["kind"] for one in scores] == ["failed", "biased", "noisy"]
    assert scores[0] == {"settings": {"kind": "failed"}, **dict.fromkeys(CRITERIA)}
    for criterion, (_, sign) in CRITERIA.items():
        best = min(scores[1:], key=lambda one: sign * one[criterion])["settings"]
        found, wins, images = Search([tmp_path / "s.json"], criterion).best("sr4", study.methods[0])
        assert (found, images) == (best, 4) and criterion in wins.split(" and ")
        assert wins == " and ".join(c for c in CRITERIA if result["winners"][c]["sr4"]["scaled"] == best)
        study.search = Search([tmp_path / "s.json"], criterion)
        run(tmp_path / criterion, study)
        rows = read_rows(tmp_path / criterion)
        assert set(rows["criterion"]) == {wins} and set(rows["searched_on"]) == {4}
    report(tmp_path / "crps")
    assert "| energy and crps, 4 images |" in (tmp_path / "crps" / "report.md").read_text()
    assert len({json.dumps(result["winners"][criterion]) for criterion in CRITERIA}) == 2


def test_two_samples_predict_the_psnr_of_the_mean_of_eight(tiny_prior, tmp_path, monkeypatch):
    def build(prior, sigma_y, spread=0.0):
        shrunk = lambda x, noise: 0.2 + 0.6 * x + spread * noise  # noqa: E731, inside [0, 1]
        x = mnist_digits("validation", num=4)
        return lambda y, physics, seed: shrunk(x, 2 * torch.rand(x.shape, generator=seeded(seed)) - 1)

    monkeypatch.setitem(METHODS, "scaled", Method(build, {"spread": [0.02, 0.2]}))
    found = {}
    for samples in (2, 8):
        study = study_of(tiny_prior, ["scaled"], samples=samples)
        study.x = mnist_digits("validation", num=4)
        scores = tune(tmp_path / f"{samples}.json", study)["scores"]["sr4"]["scaled"]
        found[samples] = [one["psnr"] for one in scores]
    # The PSNR of the mean of two samples is half a dB lower for the large spread.
    assert found[2] == pytest.approx(found[8], abs=0.1)


def test_a_method_stands_once_for_each_criterion_it_was_searched_for(tiny_prior, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "scaled", _scaled())
    scaled = [Entry("scaled", criterion=criterion) for criterion in ("energy", "crps", "perceptual")]
    quick = {"num_steps": 1, "num_iterations": 1, "eta": 1.0, "reference_level": 0.2}  # nothing to search
    study = study_of(tiny_prior, [Entry("ud2m", settings=quick), *scaled], samples=4)
    study.x = mnist_digits("validation", num=4)
    winners = tune(tmp_path / "s.json", study)["winners"]
    study.search = Search([tmp_path / "s.json"])
    run(tmp_path, study)
    lines, text = report(tmp_path), (tmp_path / "report.md").read_text()
    # One setting has the best energy score and CRPS, and stands once for both.
    assert set(lines["method"]) == {"ud2m", "scaled, for energy", "scaled, for perceptual"}
    for criterion in ("energy", "perceptual"):
        line = line_of(lines, f"scaled, for {criterion}")
        assert json.loads(line["settings"]) == winners[criterion]["sr4"]["scaled"]
        assert criterion in line["criterion"].split(" and ")
    for key, criterion in (("energy_score", "energy"), ("crps", "energy"), ("perceptual", "perceptual")):
        table, line = overview(lines, f"{key}_less"), line_of(lines, f"scaled, for {criterion}")
        (row,) = (row for row in table.splitlines() if row.startswith("| scaled |"))
        digits = {"energy_score": 2, "crps": 4, "perceptual": 3}[key]
        assert f"{line[f'{key}_less']:+.{digits}f}" in row and table in text
        assert f"| {key.removesuffix('_score')}, 4 images |" in row
    assert overview(lines, "psnr_less") == ""
    with pytest.raises(ValueError, match=r"criterion of 'dps' must be of .*'psnr'.*, got 'ssim'"):
        Entry("dps", criterion="ssim")
    with pytest.raises(ValueError, match="no settings of 'dps, for energy' were searched for 'sr4'"):
        study.search.best("sr4", Entry("dps", criterion="energy"))
    study.sigma_y = 0.1
    with pytest.raises(
        ValueError, match=r"--settings is of another setup: its sigma_y is 0.05, here it is 0.1"
    ):
        run(tmp_path / "other", study)
    study.num_samples = 1
    with pytest.raises(ValueError, match="--samples must be at least 2 in a search of samplers, got 1"):
        tune(tmp_path / "t.json", study)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("diffpir", {"num_steps": 4, "zeta": 0.3, "lambda_": 1.0}),
        ("pigdm", {"num_steps": 4, "weight": 1.0}),
        ("moment-matching", {"num_steps": 4, "weight": 1.0}),
    ],
)
def test_a_search_in_bfloat16_is_near_and_leaves_the_prior_as_it_was(method, settings, tmp_path, monkeypatch):
    """PiGDM and moment matching differentiate the prior by torch.func, whose attention is another one."""
    tiny_prior = make_tiny_prior(model_channels=64, attn_resolutions=[16])
    assert any(getattr(module, "num_heads", 0) for module in tiny_prior.modules())
    monkeypatch.setattr(Entry, "candidates", lambda self: [settings])
    study, x = study_of(tiny_prior, [method], images=2, samples=2), torch.rand(1, 1, 32, 32)
    before, scores = tiny_prior(x, 0.1), []
    for bfloat16 in (False, True):
        study.bfloat16 = bfloat16
        result = tune(tmp_path / f"{bfloat16}.json", study)
        assert ("in bfloat16" in result["setup"]["prior_weights"]) == bfloat16
        scores.append(result["scores"]["sr4"][method][0])
    for criterion in ("energy", "crps", "psnr"):
        assert 0 < abs(scores[1][criterion] / scores[0][criterion] - 1) < 0.01, criterion
    assert torch.equal(tiny_prior(x, 0.1), before) and "forward" not in vars(tiny_prior)
    with pytest.raises(ValueError, match="is of another setup: its prior_weights"):
        tune(tmp_path / "False.json", study)


def test_arrays_are_of_the_most_samples(tmp_path):
    folder = batch_folder(tmp_path, "sr4", "dps")
    folder.mkdir(parents=True)
    for number in (4, 16):
        np.savez(folder / f"{number}-0.npz", image=[0], mean=[number])
    assert stored_arrays(tmp_path, "sr4", "dps", "mean") == {0: 16}


def test_a_search_resumes_and_finds_the_minimum(tiny_prior, tmp_path):
    file, study = tmp_path / "s.json", study_of(tiny_prior, images=2, samples=2)
    result = tune(file, study)
    scores = result["scores"]["sr4"]["ud2m"]
    assert [one["settings"] for one in scores] == entry("ud2m").candidates() and len(scores) == 12
    assert result["scores"]["sr4"]["pinv"] == [] and "pinv" not in result["winners"]["energy"]["sr4"]
    best = min(scores, key=lambda one: one["energy"])["settings"]
    search = Search([file])
    found, wins, images = search.best("sr4", entry("ud2m"))
    assert (found, images) == (best, 2) and wins.startswith("energy")
    assert search.best("inpaint-box", entry("ud2m")) == ({}, "", 0) == search.best("sr4", entry("dps"))
    with pytest.raises(ValueError, match="its num_steps is 2, here it is 5"):
        search.best("sr4", entry("ud2m", num_steps=5))
    with tiny_prior.register_forward_hook(lambda *_: pytest.fail("the network was called")):
        assert tune(file, study) == result
    before = file.read_text()
    in_use = pytest.raises(ValueError, match=r"s\.json is in use by another")
    with FileLock(tmp_path / ".s.json.lock"), in_use:
        tune(file, study_of(tiny_prior, [entry("dps")], images=2, samples=2))
    for other in ({"sigma_y": 0.1}, {"samples": 3}, {"images": 3}, {"names": {"data": "mine"}}):
        with pytest.raises(ValueError, match="is of another setup"):
            tune(file, study_of(tiny_prior, **{"images": 2, "samples": 2} | other))
    assert file.read_text() == before
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="has no settings that were searched for 'crps'"):
        Search([tmp_path / "other.json"], "crps")


# -- Cost -----------------------------------------------------------------------------------------


def test_the_cost_of_samples_is_measured(tiny_prior, tmp_path):
    x = torch.rand(2, 1, 16, 16)
    methods = [entry("ud2m", num_steps=3), entry("pigdm"), entry("pinv"), entry("ddrm")]
    study = Study(tiny_prior, x, ["inpaint-random", "sr2"], methods)
    lines = measure_cost(tmp_path, study, [x], [2], rounds=2)
    assert len(lines) == 4 + 3, "DDRM does not apply to super-resolution"
    ours = lines[lines["method"] == "ud2m"]
    assert set(ours["nfe"]) == {9} and set(lines.loc[lines["method"] == "pigdm", "nfe_backward"]) == {3}
    assert ours[[*STAGES, "other"]].sum(axis=1).tolist() == pytest.approx(2 * [1])
    assert (ours[list(STAGES)] > 0).all().all() and (ours["denoise"] > ours["noise"]).all()
    assert (ours["overhead_low"] <= ours["overhead"]).all() and (ours["overhead"] > 0.5).all()
    assert lines.loc[lines["method"] == "pinv", "overhead"].isna().all() and (lines["peak_gb"] > 0).all()
    assert len(pd.read_csv(tmp_path / "cost.csv")) == len(lines)
    assert json.loads((tmp_path / "machine.json").read_text())["parameters"] > 0
