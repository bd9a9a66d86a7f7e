"""Seconds and memory of the methods, side by side.

A long run is timed under whatever else the machine does meanwhile. Here the methods take turns on the
same batch, several times, so that a drift of the machine hits all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from deepinv.models import Denoiser
from torch import Tensor
from tqdm import tqdm

from deepinv_ud2m.benchmark.methods import Sampler
from deepinv_ud2m.benchmark.run import check_setup, draw, machine, measure, parse_method
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.benchmark.tune import best_settings


def time_methods(
    folder: Path,
    prior: Denoiser,
    x: Tensor,
    tasks: list[str],
    methods: list[str],
    tuned: dict,
    sigma_y: float = 0.05,
    rounds: int = 3,
    progress: bool = True,
) -> dict:
    """
    Time the methods in turn and write ``timings.json`` into a folder of results, where the tasks of an
    earlier call are kept.

    :param pathlib.Path folder: folder of results.
    :param deepinv.models.Denoiser prior: the prior all methods share.
    :param torch.Tensor x: images of one batch, `[B, C, H, W]`, on the device to run on.
    :param list[str] tasks: names of tasks.
    :param list[str] methods: labels of methods.
    :param dict tuned: result of :func:`deepinv_ud2m.benchmark.tune.merge_searches`.
    :param float sigma_y: noise level.
    :param int rounds: times each method is measured, at least 1.
    :param bool progress: show a progress bar.
    :raises ValueError: if there is no such folder, or it has another noise level, or timings of another
        machine, number of images or of rounds; for ``rounds`` < 1.
    :returns: what is written: seconds per sample and image of each round, and the peak memory.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    check_setup(folder, sigma_y=sigma_y)
    about = {"machine": machine(), "images": len(x), "rounds": rounds}
    before = _timed_before(Path(folder) / "timings.json", about)
    seconds, memory = {}, {}
    for task in tasks:
        physics = make_physics(task, tuple(x.shape[1:]), sigma_y, x.device)
        y = measure(physics, x, range(len(x)), seed=0)
        samplers = _samplers(prior, sigma_y, task, methods, tuned, physics)
        seconds[task] = {method: [] for method in samplers}
        memory[task] = dict.fromkeys(samplers, 0.0)
        prior(x, torch.full((len(x),), 0.1, device=x.device))  # warm-up
        turns = [(method, r) for r in range(rounds) for method in samplers]
        for method, r in tqdm(turns, desc=task, disable=not progress):
            _, cost = draw(samplers[method], prior, y, physics, 1, seed=r)
            seconds[task][method].append(cost["seconds"])
            memory[task][method] = max(memory[task][method], cost["peak_memory_gb"])
    result = about | {
        "seconds": before["seconds"] | seconds,
        "peak_memory_gb": before["peak_memory_gb"] | memory,
    }
    (Path(folder) / "timings.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _timed_before(file: Path, about: dict) -> dict:
    """What is there of other tasks, if it was measured in the same way."""
    if not file.is_file():
        return {"seconds": {}, "peak_memory_gb": {}}
    there = json.loads(file.read_text())
    for name in ("device", "threads"):
        if there["machine"][name] != about["machine"][name]:
            what = f"{name} {there['machine'][name]!r}, not {about['machine'][name]!r}"
            raise ValueError(f"{file} was measured with {what}: move it away to measure anew")
    for name in ("images", "rounds"):
        if there[name] != about[name]:
            what = f"{name} = {there[name]}, not {about[name]}"
            raise ValueError(f"{file} was measured with {what}: move it away to measure anew")
    return there


def _samplers(prior, sigma_y, task, methods, tuned, physics) -> dict[str, Sampler]:
    samplers = {}
    for method in methods:
        entry, overrides = parse_method(method)
        if entry.applies(physics):
            settings = dict(entry.defaults) | best_settings(tuned, task, method) | overrides
            samplers[method] = entry.build(prior, sigma_y, **settings)
    return samplers
