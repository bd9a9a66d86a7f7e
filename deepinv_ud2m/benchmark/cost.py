"""What a sample costs: time over that of its network evaluations alone, stages, memory.

For each task, size and batch all methods take turns, so that a drift of the machine meets all of them. A turn
is a sample and its network evaluations alone: as many forward and backward calls of the same networks on as
many images. The overhead is the ratio of the two times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from deepinv.physics import Physics
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from deepinv_ud2m.benchmark.rows import machine
from deepinv_ud2m.benchmark.run import Calls, Study, measure, synchronize
from deepinv_ud2m.counting import peak_gb
from deepinv_ud2m.files import write_file

#: Stages of a sample of UD2M, as it names them to PyTorch's profiler. What is left is "other".
STAGES = ("initialise", "prox", "noise", "denoise", "step")


def measure_cost(
    folder: str | Path, study: Study, images: Sequence[Tensor], batch_sizes: Sequence[int], rounds: int = 5
) -> pd.DataFrame:
    """
    Measure the methods of a study, and write ``cost.csv`` and ``machine.json``.

    :param Sequence[torch.Tensor] images: images `[N, C, H, W]` of each size, in place of those of the study.
    :param int rounds: times each is measured, after a warm-up.
    :returns: per case network evaluations per sample, median seconds of a batch, images per second, overhead
        with quartiles, peak memory in GiB, and for UD2M the shares of the stages by PyTorch's profiler.
    """
    lines, folder = [], Path(folder)
    cases = [(task, x, batch) for task in study.tasks for x in images for batch in batch_sizes]
    for task, x, batch in tqdm(cases, desc="cost", disable=None):
        x = x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch]
        works: list[tuple[dict, Callable, Calls, list[dict]]] = []
        for _, physics, entry in replace(study, x=x, tasks=[task]):
            y = measure(physics, x, range(batch), study.seed)
            settings = entry.resolve(study.search.best(task, entry)[0])
            sampler = entry.method.build(study.prior, study.sigma_y, **settings)
            calls = Calls(getattr(sampler, "networks", [study.prior]))
            line = {"task": task, "size": x.shape[-1], "batch": batch, "method": entry.label}
            peak_gb(x.device)
            with calls, torch.no_grad():  # the warm-up
                sampler(y, physics, 0)
            line["nfe"], line["nfe_backward"] = (images / batch for images in calls.images())
            line["peak_gb"] = peak_gb(x.device)
            line |= _stages(sampler, y, physics) if entry.name.startswith("ud2m") else {}
            works.append((line, partial(sampler, y, physics), calls, []))
        for turn in range(rounds):
            for _, sample, calls, seconds in works:
                pair: dict[str, Callable] = {"sample": partial(sample, turn), "network": calls.replay}
                # What the first of a pair leaves behind meets each of them.
                order = list(pair) if turn % 2 else list(pair)[::-1]
                seconds.append({name: _seconds(pair[name], x) for name in order})
        for line, _, _, seconds in works:
            seconds = pd.DataFrame(seconds)
            line |= {"seconds": seconds["sample"].median(), "rounds": rounds}
            line["images_per_second"] = batch / line["seconds"]
            if line["nfe"]:
                low, middle, high = (seconds["sample"] / seconds["network"]).quantile([0.25, 0.5, 0.75])
                line |= {"overhead": middle, "overhead_low": low, "overhead_high": high}
            lines.append(line)
    lines, parameters = pd.DataFrame(lines), sum(p.numel() for p in study.prior.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "cost.csv", lines.to_csv(index=False, float_format="%.4g"))
    about = {**study.names, "parameters": parameters, **machine()}
    write_file(folder / "machine.json", json.dumps(about, indent=1) + "\n")
    return lines


def _stages(sampler: Callable, y: Tensor, physics: Physics) -> dict[str, float]:
    cuda = [ProfilerActivity.CUDA] if y.is_cuda else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler, record_function("all"):
        sampler(y, physics, 0)
    kind = "device_time_total" if y.is_cuda else "cpu_time_total"
    spent = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    shares = {stage: spent.get(f"UD2M {stage}", 0.0) / spent["all"] for stage in STAGES}
    return shares | {"other": 1 - sum(shares.values())}


@torch.no_grad()
def _seconds(work: Callable, like: Tensor) -> float:
    synchronize(like)
    start = time.perf_counter()
    work()
    synchronize(like)
    return time.perf_counter() - start
