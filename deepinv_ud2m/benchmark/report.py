"""Tables and figures of a folder of results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import deepinv as dinv
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure  # not pyplot, which would take over a notebook's figures
from torch import Tensor

from deepinv_ud2m import metrics
from deepinv_ud2m.benchmark.methods import CRITERIA, METHODS
from deepinv_ud2m.benchmark.rows import batch_folder, read_rows, read_setup
from deepinv_ud2m.benchmark.run import MEAN_OF
from deepinv_ud2m.files import write_file
from deepinv_ud2m.metrics.frechet import gaussian_fit
from deepinv_ud2m.physics.tasks import TASKS

#: Columns that are averaged over images: heading, digits, the criterion that ranks by it, and whether it
#: needs several samples of an image.
METRICS = {
    "energy_score": ("energy score", 2, "energy", True),
    "crps": ("CRPS", 4, "crps", True),
    "psnr_mean": ("PSNR of the mean", 2, "psnr", True),
    "perceptual": ("perceptual distance", 3, "perceptual", False),
    "swd": ("sliced Wasserstein distance", 5, "swd", False),
    "psnr": ("PSNR of a sample", 2, "", False),
    "reduced_chi_square": ("reduced chi-square", 2, "", False),
}

_LEGEND = """\
Means over images ± standard errors. *Searched for*: the criterion that the settings of a method were
searched for, and the number of validation images. A method ranks in the column of that criterion only.
*Less*: mean difference to {reference} on the same images; * marks more than two standard errors, in the
column that ranks the method. The PSNR of a sample ranks nobody: a draw of the posterior lies up to 3 dB below
its mean. The PSNR of the mean is of at most {mean_of} samples. *Images*: their number; number x samples.
*NFE*: forward (+ backward) network evaluations per sample. *Seconds*: per sample and image. The Fréchet
distance depends on the number of images. *Coverage error*: largest deviation of the coverage of norm balls,
in pixels / features, and its 95 % quantile for an exact sampler. *Spread-skill ratio*: RMSE of the mean over
what the spread predicts; above 1 for an over-confident sampler, 1 for an exact one, as the *reduced
chi-square* of the measurement. *Sliced Wasserstein distance*: between the patches of one sample and of its
truth, on the detail levels of a Laplacian pyramid. Perceptual and Fréchet distances, of one sample per image,
by {network}."""


def report(folder: str | Path) -> pd.DataFrame:
    """
    Write ``summary.csv``, ``frechet.csv``, ``report.md`` and the figures of a folder of results.

    :returns: the summary, see :func:`summarise`.
    :raises ValueError: if the folder has no results, or rows of several settings under one label.
    """
    folder = Path(folder)
    setup, rows = read_setup(folder), read_rows(folder)
    if not len(rows):
        raise ValueError(f"{folder} has no results")
    for key, group in rows.groupby(["task", "method"]):
        if len(kinds := group[["settings", "weights"]].drop_duplicates()) > 1:
            raise ValueError(f"{folder} has rows of {key} with several settings or weights: {kinds}")
    reference, frechet = reference_of(rows), frechet_table(folder, rows)
    lines = summarise(rows, frechet)
    for name, frame in (("summary", lines), ("frechet", frechet)):
        if len(frame):
            write_file(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.5g"))
    network = setup.get("perceptual") or "none"
    legend = _LEGEND.format(reference=reference, mean_of=MEAN_OF, network=network)
    parts = [f"# Benchmark\n\nSetup: {setup}.\n\n{legend}\n"]
    titles = {f"{key}_less": f"{title}, less {reference}" for key, (title, *_) in METRICS.items()}
    for key, (title, _, criterion, _) in METRICS.items():
        if criterion and (table := comparison(rows, key)):
            parts.append(f"\n## {title[0].upper()}{title[1:]}, on the same images\n\n{table}\n")
    for key, title in {**titles, "spread_skill": "spread-skill ratio"}.items():
        if table := overview(lines, key):
            parts.append(f"\n## {title[0].upper()}{title[1:]}\n\n{table}\n")
    for task, of_task in lines.groupby("task", sort=False):
        table = task_table(of_task, reference, network.partition(" ")[0])
        parts.append(f"\n## {TASKS[task].title if task in TASKS else task}\n\n{table}\n")
        _plot_sheet(folder, task, of_task["method"], reference)
    write_file(folder / "report.md", "".join(parts))
    plot_calibration(folder / "calibration.webp", rows)
    return lines


def reference_of(rows: pd.DataFrame) -> str:
    """The method that others are compared to: the first distilled sampler, or else the first."""
    distilled = rows[rows["name"] == "ud2m-distilled"]
    return (distilled if len(distilled) else rows)["method"].iloc[0]


def summarise(rows: pd.DataFrame, frechet: pd.DataFrame | None = None) -> pd.DataFrame:
    """
    One line per task and method, from rows and :func:`frechet_table`.

    Metrics of one sample are averaged over all images, those of several over the images with the most
    samples. Columns ``<metric>_se`` are standard errors, ``<metric>_less`` and ``<metric>_less_se`` the
    mean difference to :func:`reference_of` on the same images and its standard error.
    """
    lines, groups, reference = [], _groups(rows), reference_of(rows)
    for (task, method), group in groups.items():
        most = int(group["num_samples"].max())
        several = group[group["num_samples"] == most]
        kept = ["task", "method", "name", "settings", "criterion", "searched_on", "weights"]
        line = group.iloc[0][kept].to_dict()
        line |= {"images": len(group), "samples": most, "images_with_samples": len(several)}
        line |= {key: group[key].mean() for key in ("nfe", "nfe_backward")}
        line["seconds"] = group["seconds"].median()
        for key, (_, _, _, of_several) in METRICS.items():
            values = (several if of_several else group)[key].dropna()
            if len(values) and not (of_several and most == 1):
                line |= {key: values.mean(), f"{key}_se": values.sem()}
                if method != reference and (task, reference) in groups:
                    line |= _difference(group, groups[task, reference], key, of_several)
        for key in ("mean_error", "std_ratio"):  # of a known posterior, squared
            if group[key].notna().any():
                line[key] = max(group[key].mean(), 0) ** 0.5
        if most > 1:
            for key in ("rank", "rank_features"):
                if several[key].notna().all():
                    error = metrics.coverage_error(*_coverage(several, key)).item()
                    line[key.replace("rank", "coverage_error")] = error
            line["coverage_noise"] = metrics.coverage_error_quantile(len(several), most)
            # The mean of S exact samples errs by 1 + 1 / S variances.
            error, predicted = several["squared_error"], (1 + 1 / min(most, MEAN_OF)) * several["variance"]
            ratio = (error.mean() / (predicted.mean() or math.nan)) ** 0.5
            gap = error / error.mean() - predicted / predicted.mean()  # the error to first order
            line |= {"spread_skill": ratio, "spread_skill_se": ratio / 2 * gap.sem()}
        lines.append(line)
    lines = pd.DataFrame(lines)
    return lines if frechet is None or not len(frechet) else lines.merge(frechet, "left", ["task", "method"])


def _groups(rows: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Rows per task and method in the order of TASKS and METHODS, indexed by image."""
    order = {name: i for i, name in enumerate([*TASKS, *METHODS])}
    keys = rows[["task", "name", "method"]].drop_duplicates().itertuples(index=False)
    keys = sorted(keys, key=lambda key: (order.get(key[0], 99), order.get(key[1], 99)))
    groups = dict(list(rows.groupby(["task", "method"])))
    return {(t, m): groups[t, m].set_index("image", drop=False).sort_index() for t, _, m in keys}


def _difference(group: pd.DataFrame, other: pd.DataFrame, key: str, of_several: bool) -> dict:
    """Mean difference on the images that both have."""
    if of_several:
        group, other = (part[part["num_samples"] > 1] for part in (group, other))
    numbers = pd.concat([group, other])["num_samples"].clip(upper=MEAN_OF)
    gaps = (group[key] - other[key]).dropna()
    # The mean of fewer samples is further from the truth.
    if len(gaps) < 2 or (key == "psnr_mean" and numbers.nunique() > 1):
        return {}
    return {f"{key}_less": gaps.mean(), f"{key}_less_se": gaps.sem()}


def _coverage(group: pd.DataFrame, key: str) -> tuple[Tensor, Tensor]:
    samples = int(group["num_samples"].iloc[0])
    levels = torch.arange(1, samples + 1, dtype=torch.float64) / (samples + 1)
    return levels, metrics.coverage_curve(torch.tensor(group[[key, f"{key}_end"]].to_numpy()), levels)


def frechet_table(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """
    Fréchet distance of the first samples of each task and method to the images, with standard error by
    the delta method. Read from ``frechet.csv`` where the features are not at hand.
    """
    if not (folder / "reference.npz").is_file():
        file = folder / "frechet.csv"
        return pd.read_csv(file) if file.is_file() else pd.DataFrame()
    with np.load(folder / "reference.npz") as arrays:
        z = torch.from_numpy(arrays["features"]).double()
    fit, lines = gaussian_fit(z), []
    for (task, method), group in _groups(rows).items():
        features = stored_arrays(folder, task, method, "features")
        found = [features[i] for i in group["image"] if i in features]
        if len(found) > len(fit[0]):
            z = torch.from_numpy(np.stack(found)).double()
            distance = metrics.gaussian_frechet(*gaussian_fit(z), *fit).item()
            error = metrics.frechet_influence(z, *fit).std().item() / len(z) ** 0.5
            lines.append({"task": task, "method": method, "frechet": distance, "frechet_se": error})
    return pd.DataFrame(lines)


def stored_arrays(folder: Path, task: str, method: str, key: str) -> dict[int, np.ndarray]:
    """What is stored of each image."""
    found: dict[int, np.ndarray] = {}
    files = batch_folder(folder, task, method).glob("*.npz")
    # By number of samples and first image: what was drawn last replaces the others.
    for file in sorted(files, key=lambda file: [int(part) for part in file.stem.split("-")]):
        with np.load(file) as arrays:
            if key in arrays:  # pictures are those of the first images only
                found |= dict(zip(arrays["image"].tolist(), arrays[key], strict=False))
    return found


def task_table(lines: pd.DataFrame, reference: str, network: str) -> str:
    """All numbers of one task, as markdown."""

    def evaluations(line: Mapping) -> str:
        return f"{line['nfe']:.0f}" + f" + {line['nfe_backward']:.0f}" * (line["nfe_backward"] > 0)

    def images(line: Mapping) -> str:
        several = f"; {line['images_with_samples']} x {line['samples']}"
        return f"{line['images']}" + several * (line["samples"] > 1)

    def coverage(line: Mapping) -> str:
        errors = [line.get(f"coverage_error{kind}", math.nan) for kind in ("", "_features")]
        shown = " / ".join(f"{error:.2f}" for error in errors if not math.isnan(error))
        return shown and f"{shown} [{line['coverage_noise']:.2f}]"

    def settings(line: Mapping) -> str:
        return ", ".join(
            f"{name} {value}" for name, value in json.loads(line["settings"]).items() if value is not None
        )

    columns = {"NFE": evaluations, "seconds": number("seconds", 3), "images": images}
    for key, (heading, digits, criterion, _) in METRICS.items():
        heading += f", {network}" * (key == "perceptual")
        columns[heading] = number(key, digits)
        if criterion:
            columns[f"{heading}, less {reference}"] = number(f"{key}_less", digits, criterion)
    columns |= {f"Fréchet distance, {network}": number("frechet", 2), "coverage error": coverage}
    columns |= {"spread-skill ratio": number("spread_skill", 2), "error of the mean": number("mean_error", 2)}
    return markdown(lines, columns | {"ratio of std": number("std_ratio", 2), "settings": settings})


def comparison(rows: pd.DataFrame, key: str, methods: Collection[str] | None = None) -> str:
    """
    Means of a metric over the images that all methods have, as markdown: tasks (rows) and methods (columns).

    Methods are :func:`reference_of` and those that were searched for the criterion of the metric, or of
    these the given ones. The best is **bold** if all differences are more than two standard errors.
    """
    _, digits, criterion, of_several = METRICS[key]
    is_searched = np.array([criterion in one.split(" and ") for one in rows["criterion"]])
    kept = (is_searched | (rows["method"] == reference_of(rows))) & (rows["num_samples"] > of_several)
    rows = rows.assign(method=rows["method"].map(_without_criterion))[kept & rows[key].notna()]
    lines, groups = [], _groups(rows[rows["method"].isin(methods)] if methods else rows)
    methods = list(dict.fromkeys(method for _, method in groups))
    for task in dict.fromkeys(task for task, _ in groups):
        of_task = {m: groups[task, m] for m in methods if (task, m) in groups}
        if key == "psnr_mean":  # the mean of fewer samples is further from the truth
            most = max(of["num_samples"].max() for of in of_task.values())
            of_task = {m: of for m, of in of_task.items() if of["num_samples"].min() >= min(most, MEAN_OF)}
        values = pd.DataFrame({m: of[key] for m, of in of_task.items()}).dropna()
        if len(of_task) < 2 or len(values) < 2:
            continue
        best = (CRITERIA[criterion][1] * values.mean()).idxmin()
        gaps = values.drop(columns=best).sub(values[best], axis=0)
        is_ahead = (gaps.mean().abs() > 2 * gaps.sem()).all()
        cells = {m: f"{mean:.{digits}f}" for m, mean in values.mean().items()}
        cells[best] = f"**{cells[best]}**" if is_ahead else cells[best]
        lines.append([f"`{task}`", str(len(values)), *(cells.get(m, "") for m in methods)])
    head = ["task", "images", *methods]
    table = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) if lines else ""


def _without_criterion(label: str) -> str:
    """The label of a method that has one row for each criterion."""
    return label.rpartition(",")[0] if label.endswith(tuple(f", for {name}" for name in CRITERIA)) else label


def overview(lines: pd.DataFrame, key: str) -> str:
    """
    One number of methods (rows) and tasks (columns), as markdown.

    Methods that were searched for another criterion are left out, and so are those with settings of one's own
    beside the searched ones. Empty for a criterion that no method was searched for, unless it is the energy
    score.
    """
    _, digits, criterion, _ = METRICS.get(key.removesuffix("_less"), ("", 2, "energy", True))
    is_searched = np.array([criterion in one.split(" and ") for one in lines["criterion"]])
    if key not in lines or not criterion or not (criterion == "energy" or is_searched.any()):
        return ""
    lines = lines.assign(criterion=np.where(is_searched, criterion, lines["criterion"]))
    lines = lines[lines[key].notna() & lines["criterion"].isin(["", criterion])]
    if not len(lines):
        return ""
    # A method that has one row for each criterion has one line here.
    lines["method"] = lines["method"].map(_without_criterion)
    searched = lines[lines["criterion"] == criterion]
    kept = lines["method"].isin(searched["method"]) | ~lines["name"].isin(searched["name"])
    lines = lines[kept]
    columns, of = {}, {(line["task"], line["method"]): line for line in lines.to_dict("records")}
    cell = number(key, digits, criterion if key.endswith("_less") else None)
    for task in dict.fromkeys(lines["task"]):
        columns[task] = lambda line, task=task: cell(of.get((task, line["method"]), {"criterion": ""}))
    methods = lines.sort_values("searched_on", ascending=False, kind="stable").drop_duplicates("method")
    kinds = lines.groupby("method")["criterion"].nunique()
    methods["criterion"] += [" in part" if kinds[method] > 1 else "" for method in methods["method"]]
    return markdown(methods.sort_index(), columns)


def number(key: str, digits: int, criterion: str | None = None) -> Callable[[Mapping], str]:
    """Formats a number with its standard error, and a difference also with its sign and mark."""

    def cell(line: Mapping) -> str:
        value, error = line.get(key, math.nan), line.get(f"{key}_se", math.nan)
        text = "" if math.isnan(value) else f"{value:{'+' if criterion else ''}.{digits}f}"
        text += "" if math.isnan(error) else f" ± {error:.{digits}f}"
        is_ranked = criterion and criterion in line["criterion"].split(" and ") and abs(value) > 2 * error
        return f"{text} *" if is_ranked else text

    return cell


def markdown(lines: pd.DataFrame, columns: Mapping[str, Callable[[Mapping], str]]) -> str:
    """A table with the methods and what they were searched for; empty columns are left out."""
    records = lines.to_dict("records")
    searched = [f"{r['criterion']}, {r['searched_on']} images" if r["criterion"] else "" for r in records]
    cells = {"method": [record["method"] for record in records], "searched for": searched}
    cells |= {heading: [cell(record) for record in records] for heading, cell in columns.items()}
    cells = {heading: column for heading, column in cells.items() if any(column)}
    rows = [list(cells), ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot_calibration(file: Path, rows: pd.DataFrame) -> None:
    """Coverage curves, one panel for each task."""
    groups = _groups(rows[rows["rank"].notna()])
    if not groups:
        return
    tasks, methods = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    figure = Figure(figsize=(3.4 * len(tasks), 3.6), layout="constrained")
    axes = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True))
    for (task, method), group in groups.items():
        levels, shares = _coverage(group[group["num_samples"] == group["num_samples"].max()], "rank")
        look = {"color": f"C{(i := methods.index(method)) % 10}", "ls": ("-", "--", ":")[i // 10 % 3]}
        axes[task].plot([0, *levels, 1], [0, *shares, 1], label=method, **look)
    for task, axis in axes.items():
        axis.axline((0, 0), slope=1, color="grey", linewidth=0.8)
        axis.set(title=task, xlabel="nominal level", ylabel="coverage", aspect="equal")
        axis.legend(fontsize=6)
    figure.savefig(file, dpi=100)


def _plot_sheet(folder: Path, task: str, methods: Iterable[str], reference: str) -> None:
    """Truth, measurement, a sample of each method; of the reference also mean and standard deviation."""
    columns: dict[str, dict[int, np.ndarray]] = {}
    for method in methods:
        kinds = {"truth": "truth", "measurement": "measurement", method: "sample"}
        kinds |= {"mean": "mean", "2 std": "2 std"} if method == reference else {}
        for title, kind in kinds.items():
            if title not in columns:
                columns[title] = stored_arrays(folder, task, method, kind)
    columns = {title: images for title, images in columns.items() if images}
    if shown := sorted(set.intersection(*map(set, columns.values()))) if columns else []:
        stacks = {title: np.stack([of[i] for i in shown]) for title, of in columns.items()}
        images = {title: torch.from_numpy(stack).float() for title, stack in stacks.items()}
        options = {"rescale_mode": "clip", "show": False, "close": True, "fontsize": 7, "dpi": 100}
        size = (1.5 * len(images), 1.6 * len(shown))
        dinv.utils.plot(images, save_fn=folder / f"sheet_{task}.webp", figsize=size, **options)
