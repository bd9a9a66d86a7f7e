"""The README and docstrings run; the published results are of the networks that ship."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mutants import MUTANTS
from torchvision.transforms.functional import to_pil_image

import deepinv_ud2m
from deepinv_ud2m import UD2M
from deepinv_ud2m.benchmark.report import comparison, overview, summarise
from deepinv_ud2m.benchmark.rows import read_rows, read_setup
from deepinv_ud2m.checkpoint import PRETRAINED, fingerprint, trained_fingerprint
from deepinv_ud2m.data import photograph
from deepinv_ud2m.priors import load_prior
from deepinv_ud2m.uncertainty import Conformal, Summary

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FOLDERS = sorted(file.parent.name for file in RESULTS.glob("*/rows.csv.gz"))
PAGE = (RESULTS / "README.md").read_text()


def test_mutants_are_of_the_code_as_it_is():
    """Each text that a mutant replaces is in its file once."""
    for name, mutants in MUTANTS.items():
        text = (Path(deepinv_ud2m.__file__).parent / name).read_text()
        assert [old for old, new in mutants if text.count(old) != 1 or old == new] == [], name
    assert sum(map(len, MUTANTS.values())) >= 150


def summary_of(folder):
    frechet = RESULTS / folder / "frechet.csv"
    return summarise(read_rows(RESULTS / folder), pd.read_csv(frechet) if frechet.is_file() else None)


def test_rows_of_shipped_samplers_are_of_the_weights_that_ship():
    rows = pd.concat(read_rows(RESULTS / folder) for folder in FOLDERS)
    shipped = rows.loc[rows["name"] == "ud2m-distilled", ["settings", "weights"]].drop_duplicates()
    assert (rows.loc[rows["name"] != "ud2m-distilled", "weights"] == "").all()
    names, others = set(), set()
    for settings, weights in shipped.itertuples(index=False):
        settings = json.loads(settings)
        if settings["checkpoint"] not in PRETRAINED:
            others.add(settings["checkpoint"])
            continue
        model = UD2M.from_pretrained(settings["checkpoint"])
        assert trained_fingerprint(model.unfolded) == weights, settings
        assert [float(f"{sigma:.4g}") for sigma in model.sigmas] == settings["sigmas"]
        assert (model.eta, model.nominal_rmse) == (settings["eta"], settings["nominal_rmse"])
        names.add(settings["checkpoint"])
    assert names == {*PRETRAINED}
    # Trainings of the paper's experiment, of which the best one ships.
    assert {Path(file).parent.name.split("_")[0] for file in others} == {"paper", "energy"}


@pytest.mark.parametrize("folder", ["mnist", "mnist_1000", "photos"])
def test_rows_and_searches_are_of_the_priors_that_ship(folder):
    setup = read_setup(RESULTS / folder)
    assert setup["prior_weights"] == fingerprint(load_prior(setup["prior"]))
    for file in RESULTS.glob(f"settings_{setup['prior']}*.json"):
        search = json.loads(file.read_text())
        assert search["setup"]["prior_weights"].removesuffix(" in bfloat16") == setup["prior_weights"]
        assert search["setup"]["data"] != setup["data"], "validation images"


def test_rows_have_the_settings_that_were_searched():
    """For all criteria that they name. And no row claims a search that is not stored."""
    for folder in ("mnist", "photos"):
        searches = [json.loads(file.read_text()) for file in RESULTS.glob(f"settings_{folder}*.json")]
        lines = summary_of(folder)
        for line in lines[lines["criterion"] != ""].to_dict("records"):
            for criterion in line["criterion"].split(" and "):
                label = line["method"].partition(", for ")[0]
                found = [
                    (winner, search["setup"]["images"])
                    for search in searches
                    if (winner := search["winners"].get(criterion, {}).get(line["task"], {}).get(label))
                ]
                ((winner, images),) = found
                assert line["searched_on"] == images
                assert winner.items() <= json.loads(line["settings"]).items()
        assert (lines["criterion"] != "").sum() > 15


@pytest.mark.parametrize("folder", FOLDERS)
def test_summaries_follow_from_the_rows(folder):
    lines, stored = summary_of(folder), pd.read_csv(RESULTS / folder / "summary.csv")
    assert list(lines.columns) == list(stored.columns) and len(lines) == len(stored) > 0
    for column in lines:
        if pd.api.types.is_numeric_dtype(lines[column]):
            np.testing.assert_allclose(lines[column], stored[column], rtol=1e-4, atol=1e-9)
        else:
            assert lines[column].tolist() == stored[column].astype(object).fillna("").tolist()
    rows = read_rows(RESULTS / folder)
    assert not rows.duplicated(["task", "method", "image"]).any()
    assert len(rows) == sum(lines["images"])


@pytest.mark.parametrize("folder", ["mnist", "photos"])
def test_the_page_shows_the_tables_of_the_report(folder):
    lines = summary_of(folder)
    keys = ["energy_score_less", "spread_skill", *["perceptual_less"] * (folder == "photos")]
    assert [key for key in keys if overview(lines, key) not in PAGE] == []


#: Rows of the README's table.
NAMES = {
    "sr4": "super-resolution x4",
    "sr4-matlab": "super-resolution x4, bicubic",
    "deblur-gaussian": "Gaussian blur",
    "deblur-gaussian-valid": "Gaussian blur, unseen borders",
    "deblur-motion": "motion blur",
    "inpaint-random": "70 % of the pixels missing",
    "inpaint-box": "a box missing",
    "jpeg-10": "JPEG, quality 10",
}


def readme_table():
    """Its rows, and the numbers of crops of the two scores."""
    rows, lines = read_rows(RESULTS / "photos"), summary_of("photos").set_index(["task", "method"])
    methods, cells, crops = ["UD2M `photos`", "DiffPIR", "DDRM"], dict.fromkeys(NAMES, ()), []
    for key in ("energy_score", "perceptual"):
        head, _, *table = (line.split(" | ") for line in comparison(rows, key, methods)[2:-2].split(" |\n| "))
        assert head == ["task", "images", *methods]
        crops.append({int(number) for _, number, *_ in table})
        for name, _, *values in table:
            if name[1:-1] in cells:
                cells[name[1:-1]] += tuple(values)
    for task in NAMES:
        ours, dpir = (lines.loc[task, method] for method in (methods[0], "DPIR (not a sampler)"))
        assert (ours["images"], ours["samples"], dpir["images"]) == (32, 8, 32)
        is_black = task in ("deblur-gaussian-valid", "inpaint-random", "inpaint-box")  # where y says nothing
        cells[task] += f"{ours['psnr_mean']:.1f}", "" if is_black else f"{dpir['psnr']:.1f}"
    return [f"| {NAMES[task]} | {' | '.join(values)} |" for task, values in cells.items()], crops


def test_the_table_of_the_readme_follows_from_the_rows():
    text = (RESULTS.parents[1] / "README.md").read_text()
    assert text.count("\n") <= 150
    table, crops = readme_table()
    assert "\n".join(table) in text
    assert "(8 to 12 crops)" in text and "(8 to 16 crops)" in text and crops == [{8, 12}, {8, 16}]
    lines = summary_of("photos").set_index(["task", "method"]).loc["inpaint-random"]
    dps, pigdm = (
        f"{-line['energy_score_less']:.2f} ± {line['energy_score_less_se']:.2f}"
        for _, line in lines.loc[["DPS, 100 steps", "PiGDM"]].iterrows()
    )
    assert f"(by {dps} and {pigdm})" in " ".join(text.split())


def paper_tables():
    """The tables of the page on the paper's digits: results, 512 samples, curves."""
    tables, texts = [], []
    for folder in ("mnist_paper", "mnist_paper_512"):
        kept = (
            PAPER_COLUMNS if folder == "mnist_paper" else [one for one in PAPER_COLUMNS if one != "frechet"]
        )
        heads = [PAPER_COLUMNS[key][0] for key in kept]
        rows = [["trained by", *heads, "coverage error", "spread-skill"]]
        for line in summary_of(folder).to_dict("records"):
            digits = {key: PAPER_COLUMNS[key][1] for key in kept} | {"spread_skill": 2}
            *shown, ratio = (f"{line[key]:.{d}f} ± {line[f'{key}_se']:.{d}f}" for key, d in digits.items())
            errors = f"{line['coverage_error']:.2f} / {line['coverage_error_features']:.2f}"
            rows.append([line["method"], *shown, errors, ratio])
        tables.append(rows)
    curves = pd.read_csv(RESULTS / "mnist_paper" / "curves.csv")
    scores = curves.pivot(index="trained by", columns="step", values="energy score")
    rows = [["trained by", *(f"step {step}" for step in scores)]]
    for name in curves["trained by"].unique():
        rows.append([name, *(f"{score:.2f}" for score in scores.loc[name])])
    for head, *of_rows in [*tables, rows]:
        lines = [head, ["---"] * len(head), *of_rows]
        texts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return texts


#: Columns of these tables: title and digits.
PAPER_COLUMNS = {
    "energy_score": ("energy score", 2),
    "psnr_mean": ("PSNR of the mean", 2),
    "perceptual": ("perceptual", 3),
    "frechet": ("Fréchet", 2),
}


def test_the_page_of_the_papers_digits_shows_its_rows():
    page = (RESULTS / "paper_digits.md").read_text()
    assert [table for table in paper_tables() if table not in page] == []
    summary = summary_of("mnist_paper")
    assert len(summary) == 8 and (summary["images"] == 256).all() and (summary["nfe"] == 16).all()
    assert f"{summary['coverage_noise'].iloc[0]:.2f} bounds it" in " ".join(page.split())


def test_intervals_that_ship_are_those_of_the_rows_and_of_the_page():
    page = (RESULTS.parent / "guide" / "uncertainty.md").read_text()
    model, rows = UD2M.from_pretrained("photos"), pd.read_csv(RESULTS / "photos_intervals.csv", dtype=str)
    assert list(model.conformal) == list(dict.fromkeys(rows["task"]))
    for task, (test, others) in (
        rows.groupby("task")[list(rows)].apply(lambda of: of.to_dict("records")).items()
    ):
        assert f"{model.conformal[task].factor:.2f}" == test["factor"] == others["factor"]
        cells = [
            f"{row[kind]} ± {row[f'{kind}_se']}" for row in (test, others) for kind in ("without", "fitted")
        ]
        assert f"| `{task}` | {test['factor']} | {' | '.join(cells)} |" in page


def test_the_page_and_its_files_are_small():
    assert sum(file.stat().st_size for file in RESULTS.rglob("*")) < 5e6
    assert {file.suffix for file in RESULTS.rglob("*.*")} <= {".md", ".csv", ".gz", ".json", ".yaml", ".webp"}
    assert PAGE.count("\n") <= 200
    assert "second level" not in PAGE and not re.search(r"ahead|behind", PAGE)


ROOT = Path(__file__).parents[1]
TEXTS = sorted(str(file.relative_to(ROOT)) for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PACKAGES = pkgutil.walk_packages(deepinv_ud2m.__path__, "deepinv_ud2m.")
MODULES = sorted(module.name for module in PACKAGES if not module.name.endswith("__main__"))


def test_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_pil_image(photograph("chelsea")[0, :, 64:128, 64:128]).save("photo.png")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "9.0" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in TEXTS if name.startswith("docs") and "```python" in (ROOT / name).read_text()]
)
def test_python_blocks_of_the_site_run(name, tmp_path, monkeypatch):
    """One after the other, in a folder with two photographs. Blocks of ``py`` need the internet."""
    monkeypatch.chdir(tmp_path)
    for file in ("photo.png", "photo.jpg"):
        to_pil_image(photograph("chelsea")[0, :, 64:128, 64:128]).save(file)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL):
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_linked_exist(name):
    text = ROOT / name
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text.read_text())
    for link in (link for link in links if not link.startswith(("http", "data:"))):
        assert (text.parent / link).exists(), link


def test_public_classes_have_an_example():
    packages = ["", ".data", ".metrics", ".physics", ".training"]
    modules = [importlib.import_module(f"deepinv_ud2m{name}") for name in packages]
    public = [getattr(module, name) for module in modules for name in module.__all__]
    public += [Conformal, Summary]
    classes = {one for one in public if isinstance(one, type)}
    assert [one for one in classes if ">>>" not in one.__doc__] == [] and len(classes) > 30


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name == "deepinv_ud2m.app.page":
        pytest.importorskip("gradio")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert results.failed == 0
