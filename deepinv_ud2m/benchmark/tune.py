"""Search the settings of the methods, each on the same validation images.

Every method is searched over the grid it declares. The criterion is the energy score of a few samples
(mean squared error for a method that is not random): proper, so that neither a blurred mean nor an
over-dispersed sampler wins. All scores and the winners are stored in one JSON file that runs read.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from deepinv.models import Denoiser
from torch import Tensor
from tqdm import tqdm

from deepinv_ud2m.benchmark.run import draw, measure, parse_method
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.metrics import energy_score
from deepinv_ud2m.pretrained import fingerprint


def tune(
    prior: Denoiser,
    x: Tensor,
    tasks: list[str],
    methods: list[str],
    file: Path,
    sigma_y: float = 0.05,
    num_samples: int = 2,
    seed: int = 1000,
    data: str = "",
    progress: bool = True,
    grid: dict[str, list] | None = None,
) -> dict:
    """
    Search every method on every task and store the result.

    The file is written after each setting, and settings that are in it are not tried again.

    :param deepinv.models.Denoiser prior: the prior.
    :param torch.Tensor x: validation images, `[N, C, H, W]`.
    :param list[str] tasks: names of tasks.
    :param list[str] methods: labels of methods, see :func:`deepinv_ud2m.benchmark.run.parse_method`.
    :param pathlib.Path file: JSON file of the result.
    :param float sigma_y: noise level.
    :param int num_samples: samples per image, at least 2.
    :param int seed: of measurements and samples.
    :param str data: name of the images, kept with the result.
    :param bool progress: show a progress bar.
    :param dict grid: values to try, by name of the setting, in place of those the methods declare.
    :raises ValueError: if no method searches a setting of ``grid``, or a value there is of another type,
        or the file holds a search of another setup; it is not touched.
    :returns: ``{"criterion": ..., "scores": {task: {method: [{"settings", "score"}, ...]}}}``.
    """
    stated = {
        "criterion": "energy score (mean squared error where not random), smaller is better",
        "prior": getattr(getattr(prior, "prior_info", None), "name", type(prior).__name__),
        "prior_weights": fingerprint(prior),
        "data": data,
        "validation_images": len(x),
        "shape": list(x.shape[1:]),
        "samples": num_samples,
        "sigma_y": sigma_y,
        "seed": seed,
    }
    _check_grid(grid or {}, methods)
    result = json.loads(file.read_text()) if file.is_file() else stated | {"scores": {}}
    for name, value in stated.items():
        if result.get(name) != value:
            raise ValueError(
                f"{file} holds a search of another setup, its {name} is {result.get(name)!r}, "
                f"here it is {value!r}: choose another file"
            )
    for task in tasks:
        physics = make_physics(task, tuple(x.shape[1:]), sigma_y, x.device)
        y = measure(physics, x, range(len(x)), seed)
        for method in methods:
            entry, overrides = parse_method(method)
            if not entry.applies(physics):
                continue
            scores = result["scores"].setdefault(task, {}).setdefault(method, [])
            tried = [score["settings"] for score in scores]
            for settings in tqdm(
                entry.settings(overrides, grid), desc=f"{task}, {method}", disable=not progress
            ):
                if settings in tried:
                    continue
                sampler = entry.build(prior, sigma_y, **{**entry.defaults, **settings, **overrides})
                samples, _ = draw(sampler, prior, y, physics, num_samples if entry.random else 1, seed)
                scores.append({"settings": settings, "score": _criterion(samples, x)})
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def best_settings(result: dict, task: str, method: str) -> dict:
    """
    The winner of a search, or no settings where a method was not searched on a task.

    :param dict result: what :func:`tune` returns or stored.
    :param str task: name of the task.
    :param str method: label of the method; where the label was not searched, another number of steps,
        say, the first search of the same method counts.
    """
    searches = result["scores"].get(task, {})
    same = [label for label in searches if label.partition(":")[0] == method.partition(":")[0]]
    scores = searches.get(method) or (searches[same[0]] if same else [])
    finite = [score for score in scores if score["score"] is not None]
    return min(finite, key=lambda score: score["score"])["settings"] if finite else {}


def shipped_settings(prior: str, task: str, method: str) -> dict:
    """
    The winner of the search that ships with the package.

    :param str prior: ``"mnist"`` or ``"photos"``.
    :param str task: name of the task.
    :param str method: label of the method.
    :returns: its settings; none where it was not searched.
    """
    file = Path(__file__).parent / "results" / f"settings_{prior}.json"
    return best_settings(json.loads(file.read_text()), task, method)


def merge_searches(files: list[Path]) -> dict:
    """
    Several results of :func:`tune` as one.

    :param list[pathlib.Path] files: their files.
    :raises ValueError: if a file does not exist or is no result of :func:`tune`.
    """
    scores = {}
    for file in files:
        try:
            found = json.loads(Path(file).read_text())["scores"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--settings: {file} is not a result of tune: {error!r}") from error
        for task, searches in found.items():
            scores[task] = scores.get(task, {}) | searches
    return {"scores": scores}


def _check_grid(grid: dict[str, list], methods: list[str]) -> None:
    searched = {method: set(parse_method(method)[0].grid) for method in methods}
    for name, values in grid.items():
        labels = [method for method, names in searched.items() if name in names]
        if not labels:
            names = sorted(set().union(*searched.values()))
            raise ValueError(f"grid: settings searched for these methods are {names}, got {name!r}")
        for label, value in itertools.product(labels, values):
            parse_method(f"{label}{',' if ':' in label else ':'}{name}={value}")  # its type


def _criterion(samples: Tensor, x: Tensor) -> float | None:
    """The score; ``None`` for a sampler that diverged."""
    if not samples.isfinite().all():
        return None
    if len(samples) == 1:
        return (samples[0] - x).square().mean().item()
    return energy_score(samples, x).mean().item()
