"""Tables and figures of a folder of results."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from torch import Tensor

from deepinv_ud2m.benchmark.methods import METHODS
from deepinv_ud2m.benchmark.run import MEAN_OF, PACKED_ROWS, file_name, measure, read_rows, rows_text
from deepinv_ud2m.benchmark.tasks import TASKS, make_physics
from deepinv_ud2m.metrics import (
    coverage_curve,
    coverage_error,
    coverage_error_quantile,
    frechet_influence,
    gaussian_frechet,
)

#: Metrics averaged over images: key, heading, digits.
METRICS = [
    ("psnr", "PSNR of a sample", 2),
    ("psnr_mean", "PSNR of the mean", 2),
    ("ssim", "SSIM", 3),
    ("perceptual", "perceptual", 4),
    ("energy_score", "energy score", 3),
    ("crps", "CRPS", 4),
    ("consistency", "consistency", 2),
]

#: Those that need several samples of an image.
METRICS_OF_SEVERAL = {"psnr_mean", "energy_score", "crps"}

#: Those of which the report states the difference to a sampler on the same images, which varies far less
#: than either: key, heading, digits.
GAPS = [
    ("psnr", "PSNR less UD2M's", 2),
    ("psnr_mean", "PSNR of the mean less UD2M's", 2),
    ("perceptual", "perceptual less UD2M's", 3),
    ("energy_score", "energy score less UD2M's", 2),
]

#: Of the sets of samples, one of each image: only where there are more images than features.
FRECHET = [("frechet", "Frechet", 2), ("frechet_gap", "Frechet less UD2M's", 2)]
#: That sampler.
REFERENCE = "ud2m-distilled"

#: One for each method, the same in all figures.
_COLORS = {name: f"C{i}" for i, name in enumerate(METHODS)}

_LEGEND = """\
Mean over images ± standard error. NFE: forward (+ backward) evaluations of the prior per sample,
counted by hooks. Seconds: per sample and image. PSNR of the mean (of 16 samples where there are more),
energy score, CRPS and coverage: over the images with several samples (images; images x samples).
Coverage error: largest deviation of the coverage of norm balls from nominal, in pixels / features, with
the 95 % quantile of an exact sampler in brackets; with S samples it is S / (S + 1) at most. Error /
spread: root mean square error of the mean of samples over what their variance leads one to expect, 1
for an exact sampler, more for an over-confident one. Less UD2M's: mean difference to the distilled UD2M
on the same images ± its standard error. Frechet: distance of one sample per image to the reference
images, in features of the network that gives the perceptual distance, with standard errors by the delta
method; only where there are more images than features."""


def report(folder: Path, x: Tensor, x_reference: Tensor | None = None, features=None) -> list[dict]:
    """
    Write ``summary.json``, ``table.csv``, ``report.md`` and the figures of a folder of results.

    :param pathlib.Path folder: folder of results.
    :param torch.Tensor x: the images of the run, for the sheets.
    :param torch.Tensor x_reference: images to which the Frechet distance is taken.
    :param Callable features: their features, the ones stored in the rows.
    :returns: the lines of the summary.
    :raises ValueError: if the folder has no results, or rows of several runs that do not go together.
    """
    folder = Path(folder)
    rows = read_rows(folder)
    if not rows:
        raise ValueError(f"{folder} has no results")
    _check_settings(folder, rows)
    reference = None
    if x_reference is not None and features is not None:
        reference = torch.cat([features(part) for part in x_reference.split(256)]).double()
    lines = summarise(rows, reference)
    about = json.loads((folder / "setup.json").read_text())
    if (folder / "timings.json").is_file():
        about["timings"] = json.loads((folder / "timings.json").read_text())
        _take_timings(lines, about["timings"])
    (folder / "summary.json").write_text(json.dumps(about | {"lines": lines}, indent=1) + "\n")
    _write_csv(folder / "table.csv", lines)
    (folder / "report.md").write_text(_markdown(about, lines))
    _plot_calibration(folder / "calibration.png", rows)
    _plot_quality_against_time(folder / "quality_time.png", lines)
    for task in dict.fromkeys(row["task"] for row in rows):
        _plot_sheet(folder, task, rows, x, about["setup"])
    return lines


def _check_settings(folder: Path, rows: list[dict]) -> None:
    """A line of a table is of one sampler: a run refuses to mix them, joining files of rows does not."""
    made_with = {}
    for row in rows:
        line, settings = (row["task"], row["method"]), (row["settings"], row.get("weights"))
        if made_with.setdefault(line, settings) != settings:
            found = " and ".join(map(str, (made_with[line], settings)))
            raise ValueError(
                f"{folder} has rows of {row['method']!r} on {row['task']} with several settings or "
                f"weights, {found}: keep those of one"
            )


def store(folder: Path, destination: Path) -> None:
    """
    Copy what a report consists of, and the rows, packed, into a folder of its own.

    A copy of that folder is one of results again, which ``run --out`` extends by methods, tasks or
    images; only the pictures of the samples are not in it.

    :param pathlib.Path folder: folder of results, with its report.
    :param pathlib.Path destination: where to; made if it does not exist, its files are replaced.
    """
    folder, destination = Path(folder), Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.suffix == ".png" and file.stat().st_size > _LARGE_PICTURE:
            with Image.open(file) as picture:  # a palette: a third of the size
                picture.convert("RGB").quantize(256).save(destination / file.name, optimize=True)
        elif file.suffix in (".json", ".csv", ".md", ".png"):
            shutil.copy(file, destination)
    # Without a time in the head, equal rows give equal files.
    packed = gzip.compress(rows_text(folder).encode(), mtime=0)
    (destination / PACKED_ROWS).write_bytes(packed)


_LARGE_PICTURE = 2**20


def summarise(rows: list[dict], reference: Tensor | None = None) -> list[dict]:
    """
    One line per task and method.

    Metrics of one sample are averaged over all images, those of a distribution over the images that
    have the most samples.

    :param list[dict] rows: rows of :func:`deepinv_ud2m.benchmark.run.read_rows`.
    :param torch.Tensor reference: features `[N, D]` for the Frechet distance of the first samples.
    :returns: lines with the mean over images and its standard error for each metric, the coverage
        error, counts of network evaluations, and seconds per sample and image.
    """
    lines = []
    groups = _groups(rows)
    for (task, method), group in groups.items():
        several = _with_most_samples(group)
        line = {"task": task, "method": method, "settings": group[0]["settings"]}
        line |= {"images": len(group), "samples": several[0]["num_samples"]}
        line["images_with_samples"] = len(several)
        line["nfe"] = float(np.mean([row["nfe"] for row in group]))
        line["nfe_backward"] = float(np.mean([row["nfe_backward"] for row in group]))
        line["seconds"] = float(np.median([row["seconds"] for row in group]))
        line["peak_memory_gb"] = max(row["peak_memory_gb"] for row in group)
        for key, _, _ in METRICS:
            of = several if key in METRICS_OF_SEVERAL else group
            if key in METRICS_OF_SEVERAL and line["samples"] == 1:
                continue
            values = np.array([row[key] for row in of if key in row])
            if len(values):
                line[key] = float(values.mean())
                line[f"{key}_se"] = float(values.std(ddof=min(1, len(values) - 1)) / len(values) ** 0.5)
        for key, _, _ in GAPS if method != REFERENCE else ():
            of, others = group, groups.get((task, REFERENCE), [])
            if key in METRICS_OF_SEVERAL:
                of, others = (
                    [row for row in part if row["num_samples"] > 1] for part in (several, others)
                )
            if key == "psnr_mean" and len({_samples_of_mean(row) for row in (*of, *others)}) > 1:
                continue  # the mean of fewer samples is further from the truth
            line |= _gap(of, others, key)
        for key in ("credible_level", "credible_level_features"):
            if key in several[0]:
                error = coverage_error(*_curve(several, key)).item()
                line[key.replace("credible_level", "coverage_error")] = error
                line["coverage_noise"] = coverage_error_quantile(len(several), line["samples"])
        if "variance" in several[0]:
            line["error_over_spread"] = _error_over_spread(several)
        if reference is not None:
            line |= _frechet(group, reference)
            if method != REFERENCE and (task, REFERENCE) in groups:
                line |= _frechet_gap(group, groups[task, REFERENCE], reference)
        lines.append(line)
    return lines


def _samples_of_mean(row: dict) -> int:
    return min(row["num_samples"], MEAN_OF)


def _error_over_spread(group: list[dict]) -> float:
    """The error of the mean of S exact samples has 1 + 1 / S times their variance."""
    errors = [10 ** (-row["psnr_mean"] / 10) for row in group]
    variances = [(1 + 1 / _samples_of_mean(row)) * row["variance"] for row in group]
    return float((np.mean(errors) / np.mean(variances)) ** 0.5)


def _gap(group: list[dict], reference: list[dict], key: str) -> dict:
    """Mean difference to another method on the images that both have, and its standard error."""
    values = {row["image"]: row[key] for row in reference if key in row}
    gaps = [row[key] - values[row["image"]] for row in group if key in row and row["image"] in values]
    if len(gaps) < 2:
        return {}
    error = float(np.std(gaps, ddof=1)) / len(gaps) ** 0.5
    return {f"{key}_gap": float(np.mean(gaps)), f"{key}_gap_se": error}


def _take_timings(lines: list[dict], timings: dict) -> None:
    """Times measured side by side in place of those of the run."""
    for line in lines:
        seconds = timings["seconds"].get(line["task"], {}).get(line["method"])
        if seconds:
            line["seconds"] = float(np.median(seconds))
            line["peak_memory_gb"] = timings["peak_memory_gb"][line["task"]][line["method"]]


def _groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows per task and method, in the order of those, of each image the one with the most samples."""
    groups = defaultdict(dict)
    for row in rows:
        group = groups[row["task"], row["method"]]
        there = group.get(row["image"])
        if there is None or there["num_samples"] < row["num_samples"]:
            group[row["image"]] = row
    return {
        key: [group[image] for image in sorted(group)]
        for key, group in sorted(groups.items(), key=lambda item: _order(*item[0]))
    }


def _order(task: str, method: str) -> tuple:
    name = method.partition(":")[0]
    return list(TASKS).index(task), [*METHODS, name].index(name), method


def _with_most_samples(group: list[dict]) -> list[dict]:
    most = max(row["num_samples"] for row in group)
    return [row for row in group if row["num_samples"] == most]


def _curve(group: list[dict], key: str) -> tuple[Tensor, Tensor]:
    num_samples = group[0]["num_samples"]
    levels = torch.arange(1, num_samples + 1, dtype=torch.float64) / (num_samples + 1)
    return levels, coverage_curve(torch.tensor([row[key] for row in group]), levels)


def _frechet(group: list[dict], reference: Tensor) -> dict:
    """Distance of the first samples to the reference, and its standard error."""
    features = _features(group)
    if not 0 < features.shape[-1] < len(features):
        return {}
    fit = reference.mean(0), torch.cov(reference.T)
    distance = gaussian_frechet(features.mean(0), torch.cov(features.T), *fit)
    error = frechet_influence(features, *fit).std() / len(features) ** 0.5
    return {"frechet": distance.item(), "frechet_se": error.item()}


def _frechet_gap(group: list[dict], others: list[dict], reference: Tensor) -> dict:
    """Difference of two distances on the images that both have, and its standard error."""
    both = {row["image"] for row in group} & {row["image"] for row in others}
    pair = [[row for row in part if row["image"] in both] for part in (group, others)]
    distances = [_frechet(part, reference) for part in pair]
    if not all(distances):
        return {}
    fit = reference.mean(0), torch.cov(reference.T)
    own, other = (frechet_influence(_features(part), *fit) for part in pair)
    error = (own - other).std() / len(both) ** 0.5
    gap = distances[0]["frechet"] - distances[1]["frechet"]
    return {"frechet_gap": gap, "frechet_gap_se": error.item()}


def _features(group: list[dict]) -> Tensor:
    return torch.tensor([row.get("features", []) for row in group], dtype=torch.float64)


def _write_csv(file: Path, lines: list[dict]) -> None:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(lines)


def _markdown(about: dict, lines: list[dict]) -> str:
    setup, machine = about["setup"], about["machine"]
    where = ", ".join(f"{name} {machine[name]}" for name in ("torch", "deepinv", "commit"))
    parts = [
        "# Benchmark",
        "",
        f"Prior `{setup['prior']}`, images `{setup['data']}`, noise {setup['sigma_y']}, seed "
        f"{setup['seed']}, {setup['batch_size']} images sampled together; {machine['device']}, "
        f"{machine['threads']} thread(s), {where}.",
        "",
        _LEGEND,
    ]
    if "timings" in about:
        timings = about["timings"]
        parts += [
            "",
            f"Seconds and memory (without those of defaults, and of methods that were not timed) were "
            f"measured side by side in one run: {timings['images']} images, the methods in turn, "
            f"{timings['rounds']} times, medians; {timings['machine']['device']}, "
            f"{timings['machine']['threads']} thread(s). Memory is that of the process, libraries and "
            "prior included, at its peak.",
        ]
    for task in dict.fromkeys(line["task"] for line in lines):
        of_task = [line for line in lines if line["task"] == task]
        metrics = [*METRICS, *((f"{key}_gap", *rest) for key, *rest in GAPS)]
        shown, distances = (
            [metric for metric in some if any(metric[0] in line for line in of_task)]
            for some in (metrics, FRECHET)
        )
        head = [
            "method",
            "settings",
            "images",
            "NFE",
            "seconds",
            "memory (GB)",
            *(heading for _, heading, _ in shown),
        ]
        head += ["coverage error", "error / spread", *(heading for _, heading, _ in distances)]
        parts += ["", f"## {TASKS[task].title}", "", _row(head), _row(["---"] * len(head))]
        parts += [_row(_cells(line, shown, distances)) for line in of_task]
    return "\n".join(parts) + "\n"


def _cells(line: dict, shown: list[tuple], distances: list[tuple]) -> list[str]:
    backward = f" + {line['nfe_backward']:.0f}" if line["nfe_backward"] else ""
    images = str(line["images"])
    if line["samples"] > 1:
        images += f"; {line['images_with_samples']} x {line['samples']}"
    cells = [
        line["method"],
        ", ".join(f"{name} {value}" for name, value in line["settings"].items()) or "-",
        images,
        f"{line['nfe']:.0f}{backward}",
        f"{line['seconds']:.4f}",
        f"{line['peak_memory_gb']:.2f}",
    ]
    cells += [_with_error(line, *metric) for metric in shown]
    cells.append(
        f"{line['coverage_error']:.3f} / {line.get('coverage_error_features', float('nan')):.3f} "
        f"[{line['coverage_noise']:.3f}]"
        if "coverage_error" in line
        else "-"
    )
    cells.append(f"{line['error_over_spread']:.2f}" if "error_over_spread" in line else "-")
    return cells + [_with_error(line, *metric) for metric in distances]


def _with_error(line: dict, key: str, _: str, digits: int) -> str:
    if key not in line:
        return "-"
    sign = "+" if key.endswith("_gap") else ""
    return f"{line[key]:{sign}.{digits}f} ± {line[f'{key}_se']:.{digits}f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plot_calibration(file: Path, rows: list[dict]) -> None:
    groups = {key: _with_most_samples(group) for key, group in _groups(rows).items()}
    groups = {key: group for key, group in groups.items() if "credible_level" in group[0]}
    styles = _line_styles(method for _, method in groups)
    with _panels(file, [task for task, _ in groups]) as panels:
        for task, axis in panels.items():
            axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
            axis.set(xlabel="nominal level", ylabel="coverage", aspect="equal")
            for (_, method), group in ((key, group) for key, group in groups.items() if key[0] == task):
                levels, shares = _curve(group, "credible_level")
                looks = {"linestyle": styles[method], **_label(method)}
                axis.plot([0, *levels, 1], [0, *shares, 1], **looks)


def _plot_quality_against_time(file: Path, lines: list[dict]) -> None:
    """
    One curve per method and settings, over the numbers of steps, without defaults and the
    pseudo-inverse. Points of fewer images than others of the task have are hollow.
    """
    lines = [line for line in lines if line["nfe"] and "defaults" not in line["method"]]
    key, title = ("perceptual", "perceptual distance (better: lower)")
    if any(key not in line for line in lines):
        key, title = ("psnr", "PSNR in dB (better: higher)")
    markers = _markers(_curve_name(line["method"]) for line in lines)
    with _panels(file, [line["task"] for line in lines]) as panels:
        for task, axis in panels.items():
            axis.set(xscale="log", xlabel="seconds per sample", ylabel=title)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # 3x10^0, 4x10^0, ... overlap
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", labelsize=8)
            curves, of_task = defaultdict(list), [line for line in lines if line["task"] == task]
            for line in of_task:
                point = line["seconds"], line[key], line["images"]
                curves[_curve_name(line["method"])].append(point)
            most = max(line["images"] for line in of_task)
            for method, points in curves.items():
                marker = markers[method]
                seconds, values, images = zip(*sorted(points), strict=True)
                axis.plot(seconds, values, marker=marker, **_label(method))
                fewer = [i for i, number in enumerate(images) if number < most]
                axis.plot(
                    seconds, values, marker, mfc="w", color=_label(method)["color"], markevery=fewer
                )


def _curve_name(method: str) -> str:
    """A method and its settings, but for the number of steps, along which its curve goes."""
    name, _, settings = method.partition(":")
    others = [pair for pair in settings.split(",") if not pair.startswith("num_steps=")]
    return f"{name}:{','.join(others)}" if any(others) else name


def _markers(curves: Iterable[str]) -> dict[str, str]:
    """A marker for each curve, the same in all panels; those of a colour differ."""
    trained, others = (defaultdict(lambda kinds=kinds: iter(kinds)) for kinds in ("^v<>", "sDPX"))
    markers = {}
    for curve in dict.fromkeys(curves):
        name, _, settings = curve.partition(":")
        variants = trained if "checkpoint=" in settings else others
        markers[curve] = next(variants[name], "*") if settings else "o"
    return markers


def _line_styles(methods: Iterable[str]) -> dict[str, object]:
    """A line style for each label, the same in all panels; those of a colour differ, while they last."""
    dashes = ["--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3))]
    variants, styles = defaultdict(lambda: iter(dashes)), {}
    for method in dict.fromkeys(methods):
        name, _, settings = method.partition(":")
        styles[method] = next(variants[name], ":") if settings else "-"
    return styles


@contextmanager
def _panels(file: Path, tasks: Iterable[str], columns: int = 4) -> Iterator[dict[str, plt.Axes]]:
    """A panel for each task, drawn into by the caller, then saved with one legend for all of them."""
    tasks = list(dict.fromkeys(tasks))
    if not tasks:
        yield {}
        return
    height = -(-len(tasks) // columns)
    columns = -(-len(tasks) // height)
    size = (3.4 * columns, 3.4 * height)
    fig, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
    panels = dict(zip(tasks, axes.flat, strict=False))
    yield panels
    for task, axis in panels.items():
        axis.set_title(TASKS[task].title, fontsize=10)
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    labelled = {}
    for axis in panels.values():
        labelled |= dict(reversed(pair) for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    fig.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4, fontsize=9)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def _label(method: str) -> dict:
    """Name and colour of a method's curve, the same in all panels."""
    return {"label": method_title(method), "color": _COLORS[method.partition(":")[0]]}


def method_title(label: str, quote: str = "") -> str:
    """
    What a reader calls a method with settings.

    :param str label: of the method, see :func:`deepinv_ud2m.benchmark.run.parse_method`.
    :param str quote: put around the name of a checkpoint.
    """
    name, _, settings = label.partition(":")
    found = dict(re.findall(r"(\w+)=([^,]+)", settings))
    title = METHODS[name].title
    if "checkpoint" in found:
        title += f" {quote}{Path(found['checkpoint']).name}{quote}"
    if "num_steps" in found:
        title += f", {found['num_steps']} steps"
    if "spacing" in found:
        title += f", {found['spacing']} levels"
    if "defaults" in settings.split(","):
        title += ", defaults"
    for setting in ("second_level", "extra_level", "weight"):
        if setting in found:
            title += f", {setting.replace('_', ' ')} {float(found[setting]):g}"
    return title


def _plot_sheet(
    folder: Path, task: str, rows: list[dict], x: Tensor, setup: dict, shown: int = 6
) -> None:
    """Truth, measurement, a sample of each method; of UD2M also mean and standard deviation."""
    shown = min(shown, setup["batch_size"])  # the pictures of one batch
    x = x[:shown].cpu().float()
    physics = make_physics(task, tuple(x.shape[1:]), setup["sigma_y"])
    y = measure(physics, x, range(len(x)), setup["seed"])
    columns = {"truth": x.numpy(), "measurement": y.numpy()}
    groups = {method: group for (name, method), group in _groups(rows).items() if name == task}
    for method, group in groups.items():
        num_samples = group[0]["num_samples"]
        batch = folder / "images" / f"{task}__{file_name(method)}__{num_samples}__00000.npz"
        if not batch.is_file():
            continue
        with np.load(batch) as images:
            columns[method] = images["sample"][:shown].astype(np.float32)
            if num_samples > 1 and method.startswith("ud2m"):
                columns[f"{method}, mean"] = images["mean"][:shown].astype(np.float32)
                columns[f"{method}, 2 std"] = 2 * images["std"][:shown].astype(np.float32)
    height = len(next(iter(columns.values())))
    fig, axes = plt.subplots(
        height, len(columns), figsize=(1.5 * len(columns), 1.5 * height + 0.4), squeeze=False
    )
    for column, (name, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(re.sub("[:,] ?", "\n", name), fontsize=7)
        for axis in column:
            axis.set_axis_off()
        for axis, image in zip(column, images, strict=False):
            axis.imshow(image.transpose(1, 2, 0).squeeze().clip(0, 1), vmin=0, vmax=1, cmap="gray")
    fig.tight_layout(pad=0.3)
    fig.savefig(folder / f"sheet_{task}.png", dpi=110)
    plt.close(fig)
