"""The measured figures of README.md and RESULTS.md, from the files that hold them.

    python -m deepinv_ud2m.benchmark.readme

rewrites them in both, between their markers; a test checks that they are up to date. It needs SciPy, as
the tests do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from deepinv_ud2m.benchmark.methods import METHODS
from deepinv_ud2m.benchmark.report import method_title
from deepinv_ud2m.benchmark.run import MEAN_OF
from deepinv_ud2m.benchmark.tasks import TASKS

#: Files of the checkout that have such figures.
FILES = ("README.md", "RESULTS.md")

_PACKAGE = Path(__file__).parents[1]
_RESULTS = _PACKAGE / "benchmark" / "results"


def main() -> None:
    """Rewrite the files of this checkout."""
    for name in FILES:
        file = _PACKAGE.parent / name
        file.write_text(updated(file.read_text()))


def updated(text: str) -> str:
    """
    A file with its measured figures as the stored ones are.

    :param str text: README.md or RESULTS.md.
    """
    for name, part in PARTS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if start in text:
            before, _, rest = text.partition(start)
            _, _, after = rest.partition(end)
            text = f"{before}{start}\n{part()}\n{end}{after}"
    return text


def _of_method(lines: list[dict], method: str) -> list[dict]:
    """With any settings and number of steps."""
    return [line for line in lines if line["method"].partition(":")[0] == method]


def _best(lines: list[dict]) -> dict | None:
    return min(lines, key=lambda line: line["perceptual_gap"], default=None)


def _digits() -> str:
    return _benchmark(
        "mnist",
        "MNIST test digits",
        "the settings of every method tuned on validation digits (but for the untrained UD2M on "
        f"*{TASKS['sr4-paper'].title}*, which has its defaults)",
        "the shipped digit classifier",
    )


def _more_digits() -> str:
    """Single samples of as many digits as ship, of the samplers that were run on so many."""
    summary = _stored(_RESULTS / "mnist_1000" / "summary.json")
    lines = sorted(summary["lines"], key=lambda line: _ORDER.index(line["method"].partition(":")[0]))
    one_sample = [(title, cell) for title, cell in _COLUMNS if title in _OF_ONE_SAMPLE]
    titles = ["task", *(title for title, _ in one_sample)]
    parts = [
        f"**One sample of each of {lines[0]['images']} digits**, settings and measures as above, of "
        "those samplers and tasks that so many were drawn of:",
        "",
        _cells(titles),
        _cells(["---"] * len(titles)),
    ]
    for task in dict.fromkeys(line["task"] for line in summary["lines"]):
        for line in lines:
            if line["task"] == task:
                parts.append(_cells([TASKS[task].title, *(cell(line) for _, cell in one_sample)]))
    parts += ["", "More metrics: [report](deepinv_ud2m/benchmark/results/mnist_1000/report.md)."]
    return "\n".join(parts)


def _photos() -> str:
    return _benchmark(
        "photos",
        "128x128 crops of photographs that nothing was trained on",
        "DiffPIR, DDRM and DPS tuned on crops of other photographs, all else at its defaults",
        "EfficientNet-Lite2, which no sampler was trained with",
    )


def _training_of_digits() -> str:
    samplers = [_sampler(name) for name in ("mnist", "mnist-sr4", "mnist-accurate")]
    return "\n\n".join([*samplers, _prior_of_digits(_card("prior-mnist"))])


def _training_of_photos() -> str:
    samplers = [_sampler(name) for name in ("photos", "photos-posterior")]
    return "\n\n".join([*samplers, _prior_of_photos(_card("prior-photos"))])


def _cost() -> str:
    profiles = [_stored(file) for file in sorted(_RESULTS.glob("overhead*.json"))]
    parts = [
        _overhead(profiles),
        _training(_stored(_RESULTS / "training_cost.json")),
        _paper_scale(_stored(_RESULTS / "paper_scale.json")),
    ]
    return "\n\n".join(parts)


def _stored(file: Path) -> dict:
    return json.loads(file.read_text())


def _card(name: str) -> dict:
    return _stored(_PACKAGE / "weights" / name / "config.json")


def _sampler(name: str) -> str:
    training = _card(f"ud2m-{name}")["metadata"]
    low, high = training["sigma_y"]
    start = f" on from the sampler `{training['start']}`" if training.get("start") else ""
    noise = f"{low} to {high}" if low < high else low
    spread = f" of spread {training['spread']}" if training.get("spread", 1.0) != 1.0 else ""
    distorted = f", distorted digits: {training['distorted']}" if training.get("distorted") else ""
    return (
        f"**The sampler `{name}`**: {training['trained']} and the scalars, trained{start} with the "
        f"{training['loss']}{spread} on {training['measurements']:,} measurements of "
        f"{', '.join(training['tasks'])}, noise {noise}{distorted} "
        "(a small budget: the paper's is 3,200,000), by"
        f"\n\n{_commands(training['command'])}"
    )


def _commands(text: str) -> str:
    """Commands one below the other, what is remarked on them behind."""
    lines = [re.sub(r" \((.*)\)$", r"  # \1", command) for command in text.split("; ")]
    return "\n".join(["```bash", *lines, "```"])


def _training(cost: dict) -> str:
    return (
        "**A step of distillation** costs "
        f"{cost['step_over_parts']:.2f} times its parts alone (K denoiser passes forward and backward, "
        f"losses, discriminator) and {cost['step_over_two_passes']:.2f} times a step with a second pass "
        "of the generator for the discriminator; checkpointing saves "
        f"{100 * cost['memory_saved_by_checkpointing']:.0f} % of its memory (`{cost['command']}`)."
    )


def _benchmark(name: str, images: str, tuned: str, network: str) -> str:
    summary = _stored(_RESULTS / name / "summary.json")
    setup, machine = summary["setup"], summary["machine"]
    lines = [line for line in summary["lines"] if _is_shown(line, summary["lines"])]
    lines.sort(key=lambda line: _ORDER.index(line["method"].partition(":")[0]))
    columns = [(title, cell) for title, cell in _COLUMNS if any(cell(line) != "-" for line in lines)]
    titles = [title for title, _ in columns]
    has_gaps = any("psnr_gap" in line for line in lines)
    has_spread = any("error_over_spread" in line for line in lines)
    many = any(line["samples"] > MEAN_OF for line in lines)
    of_more = f" (the mean is of {MEAN_OF} where there are more)" if many else ""
    distances = "PSNR, perceptual and Frechet" if "Frechet" in titles else "PSNR and perceptual"
    parts = [
        f"**Samplers on the same prior** (`{setup['prior']}`), {images}, noise {setup['sigma_y']}, "
        f"{tuned}. {distances} distance "
        f"are of one sample per image, the other columns of several samples{of_more}, on as many images "
        f"as stand after the semicolon. Distances are in features of {network}. Coverage: largest "
        "deviation of the coverage of norm balls from nominal, S / (S + 1) at most with S samples, in "
        "brackets what an exact sampler stays under in 95 % of such measurements. "
        f"{_SPREAD if has_spread else ''}{_LESS if has_gaps else ''}Means and standard errors"
        f"{_DELTA if 'Frechet' in titles else ''}. Hollow points: of fewer images. {_seconds(summary)} "
        f"({machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}).",
    ]
    parts += [
        "",
        f"![Perceptual distance against time](deepinv_ud2m/benchmark/results/{name}/quality_time.png)",
    ]
    for task in dict.fromkeys(line["task"] for line in summary["lines"]):
        parts += ["", f"*{TASKS[task].title}*", "", _cells(titles), _cells(["---"] * len(titles))]
        parts += [_cells([cell(line) for _, cell in columns]) for line in lines if line["task"] == task]
    parts += [
        "",
        "All settings, defaults of the baselines, more metrics, curves and pictures: "
        f"[report](deepinv_ud2m/benchmark/results/{name}/report.md).",
    ]
    return "\n".join(parts)


def _is_shown(line: dict, lines: list[dict]) -> bool:
    """Of defaults, only those better than what was searched: the others are in the report."""
    name = line["method"].partition(":")[0]
    same = [other for other in _of_method(lines, name) if other["task"] == line["task"]]
    return "defaults" not in line["method"] or line == _best([x for x in same if "perceptual_gap" in x])


def _seconds(summary: dict) -> str:
    timed = summary.get("timings")
    if timed is None:
        return "Seconds were taken while the machine did other work as well: only rough ratios count"
    lines = [line for line in summary["lines"] if line["task"] in timed["seconds"]]
    apart = {line["method"] for line in lines if "defaults" not in line["method"]}
    apart -= {method for of_task in timed["seconds"].values() for method in of_task}
    tasks = {line["task"] for line in summary["lines"]} - set(timed["seconds"])
    of_tasks = [f"all those of *{TASKS[task].title}*" for task in sorted(tasks)]
    others = " and ".join([*(f"those of {method}" for method in sorted(apart)), *of_tasks])
    others = f"; {others} are of the long run, under load" if others else ""
    return (
        f"Seconds per sample: the methods in turn, {timed['images']} images at once, medians of "
        f"{timed['rounds']} round{'s' if timed['rounds'] > 1 else ''}{others}"
    )


def _mean(key: str, digits: int, sign: str = ""):
    def cell(line: dict) -> str:
        if key not in line:
            return "-"
        return f"{line[key]:{sign}.{digits}f} ± {line[key + '_se']:.{digits}f}"

    return cell


def _images(line: dict) -> str:
    several = f"; {line['images_with_samples']} x {line['samples']}" if line["samples"] > 1 else ""
    return f"{line['images']}{several}"


def _evaluations(line: dict) -> str:
    backward = f" + {line['nfe_backward']:.0f} backward" if line["nfe_backward"] else ""
    return f"{line['nfe']:.0f}{backward}"


def _number(key: str, digits: int):
    return lambda line: f"{line[key]:.{digits}f}" if key in line else "-"


def _coverage(line: dict) -> str:
    if "coverage_error" not in line:
        return "-"
    return f"{line['coverage_error']:.2f} [{line['coverage_noise']:.2f}]"


def _title(line: dict) -> str:
    return method_title(line["method"], quote="`")


_SPREAD = (
    "Error / spread: error of the mean over what the variance of the samples leads one to expect, "
    "1 for an exact sampler, more for an over-confident one. "
)
_DELTA = ", those of Frechet distances by the delta method"
_LESS = "Less UD2M's: difference to the first row on the same images. "

_ORDER = ["ud2m-distilled", *(name for name in METHODS if name != "ud2m-distilled")]

_COLUMNS = [
    ("sampler", _title),
    ("NFE", _evaluations),
    ("seconds", _number("seconds", 3)),
    ("images", _images),
    ("PSNR", _mean("psnr", 2)),
    ("PSNR of the mean", _mean("psnr_mean", 2)),
    ("perceptual", _mean("perceptual", 3)),
    ("energy score", _mean("energy_score", 2)),
    ("Frechet", _mean("frechet", 2)),
    ("PSNR less UD2M's", _mean("psnr_gap", 2, "+")),
    ("mean's PSNR less UD2M's", _mean("psnr_mean_gap", 2, "+")),
    ("perceptual less UD2M's", _mean("perceptual_gap", 3, "+")),
    ("energy score less UD2M's", _mean("energy_score_gap", 2, "+")),
    ("Frechet less UD2M's", _mean("frechet_gap", 2, "+")),
    ("coverage", _coverage),
    ("error / spread", _number("error_over_spread", 2)),
]


_OF_ONE_SAMPLE = [
    *("sampler", "PSNR", "perceptual", "Frechet"),
    *("PSNR less UD2M's", "perceptual less UD2M's", "Frechet less UD2M's"),
]


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _prior_of_digits(card: dict) -> str:
    metrics, training = card["metrics"], card["training"]
    levels = metrics["denoising_psnr"]
    distances = metrics["frechet_distance_to_test"]
    listed = ", ".join(f"{value:.2f} for {name}" for name, value in distances.items())
    return "\n".join(
        [
            f"**The prior `mnist`**: {training['parameters']:,} parameters, trained on "
            f"{training['images']:,} images. Denoising PSNR on the {metrics['test_images']:,} "
            "test digits:",
            "",
            f"| noise level | {' | '.join(levels)} |",
            f"|---|{'---|' * len(levels)}",
            f"| PSNR (dB) | {' | '.join(f'{value:.2f}' for value in levels.values())} |",
            "",
            f"Frechet distance to the test digits (features of the shipped classifier): {listed}.",
        ]
    )


def _prior_of_photos(card: dict) -> str:
    metrics, training = card["metrics"], card["training"]
    ours, of_bm3d = metrics["denoising_psnr"], metrics["denoising_psnr_bm3d"]
    return "\n".join(
        [
            f"**The prior `photos`**: {training['parameters']:,} parameters, trained on "
            f"{training['crops']:,} {training['data']} by `{training['command']}`. The "
            "photographs come from packages of Debian; "
            "`deepinv_ud2m/weights/prior-photos/photographs.csv` lists each with author and licence. "
            f"Denoising PSNR on {metrics['size']}x{metrics['size']} crops of "
            f"{metrics['test_photographs']} test photographs:",
            "",
            f"| noise level | {' | '.join(ours)} |",
            f"|---|{'---|' * len(ours)}",
            f"| prior (dB) | {' | '.join(f'{value:.2f}' for value in ours.values())} |",
            f"| BM3D (dB) | {' | '.join(f'{value:.2f}' for value in of_bm3d.values())} |",
        ]
    )


def _overhead(profiles: list[dict]) -> str:
    machine = profiles[0]["machine"]
    commands = [f"`{profile['command']}`" for profile in profiles]
    lines = [
        "**Overhead of the sampler** over the network evaluations it is made of: time of a call of "
        "`sample` over that of as many evaluations of the prior on as many images at a time, measured "
        f"alternately ({', '.join(commands)}; {machine['device']}, torch {machine['torch']}; "
        "the machine did other work as well, but for the ADM network). The share of the network in the "
        "time of a sample is by PyTorch's profiler. *Allocator set*: with the variables before the "
        "command, by which glibc keeps the memory of large tensors from one operation to the next.",
        "",
        "| prior | threads | measurements x samples | NFE | overhead, median | quartiles | pairs "
        "| share of the network | samples a second |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for profile in profiles:
        allocator = ", allocator set" if profile["command"].startswith("MALLOC_") else ""
        for row in profile["rows"]:
            low, high = row["quartiles"]
            split = f", {row['split']} at a time" if row["split"] else ""
            lines.append(
                f"| {profile['prior']}{allocator} | {profile['machine']['threads']} "
                f"| {row['measurements']} x {row['samples']}, {row['size']}x{row['size']}{split} "
                f"| {row['nfe']} | {row['overhead']:.3f} | {low:.3f} to {high:.3f} | {row['pairs']} "
                f"| {row['stages']['denoise']:.1%} | {row['images_per_second']:.3g} |"
            )
    lines += [_scaling(profile) for profile in profiles if "scaling" in profile]
    lines += [_faster(profile) for profile in profiles if "faster" in profile]
    return "\n".join(lines)


def _scaling(profile: dict) -> str:
    lines = profile["scaling"]
    of_evaluations, of_batch = lines["evaluations"], lines["batch"]
    return (
        f"\nThe time is linear in the evaluations, N x K from {min(of_evaluations['points'])} to "
        f"{max(of_evaluations['points'])} (R² = {of_evaluations['r_squared']:.4f}), and in the batch, "
        f"{min(of_batch['points'])} to {max(of_batch['points'])} (R² = {of_batch['r_squared']:.4f}; "
        f"prior `{profile['prior']}`)."
    )


def _faster(profile: dict) -> str:
    ways = [
        f"{way} {of_way['time']:.2f} ({of_way['change']:.0e})"
        for way, of_way in profile["faster"].items()
        if way != "float32"
    ]
    row = max(profile["rows"], key=lambda row: row["measurements"] * (row["samples"] == 1))
    return (
        f"\nTime of a sample over that in plain float32, and in brackets the root mean square by which "
        f"the samples change, prior `{profile['prior']}`, {row['measurements']} images of "
        f"{row['size']}x{row['size']}: {', '.join(ways)}."
    )


def _paper_scale(result: dict) -> str:
    precision = "bfloat16" if result["bfloat16"] else "float32"
    checkpointing = "checkpointing, " if result["training_step"]["checkpointing"] else ""
    machine, sample, step = result["machine"], result["sample"], result["training_step"]
    prior, minutes = result["prior"].partition(",")[0], (sample["seconds"] / 60, step["seconds"] / 60)
    return (
        f"**At the scale of the paper**: the prior `{prior}` with random weights, "
        f"{result['parameters']:,} parameters, of which {result['trained']:,} "
        f"({result['trained_share']:.3%}) are trained, at {result['size']}x{result['size']} "
        f"(`{result['command']}`; {machine['device']}, {machine['threads']} thread(s), {precision}, "
        "the machine doing other work as well). "
        f"One sample of {sample['nfe']:.0f} evaluations: {minutes[0]:.0f} minutes, "
        f"{sample['peak_gb']:.1f} GB at most. One training step (K = 3, batch {step['batch_size']}, "
        f"{checkpointing}squared error, perceptual distance and discriminator): "
        f"{minutes[1]:.0f} minutes, {step['peak_gb']:.1f} GB. These are peaks of the whole process on "
        f"the CPU. The tensors alone, which are what a GPU has to hold, take {sample['tensors_gb']:.1f} "
        f"and {step['tensors_gb']:.1f} GB at most, counted storage by storage as operations make them "
        "and let go of them; the workspaces inside a GPU's kernels come on top. On a GPU it was not "
        "measured."
    )


#: What stands between ``<!-- name -->`` and ``<!-- /name -->``, by name.
PARTS = {
    "digits": _digits,
    "digits-1000": _more_digits,
    "digits-training": _training_of_digits,
    "photos": _photos,
    "photos-training": _training_of_photos,
    "cost": _cost,
}


if __name__ == "__main__":
    main()
