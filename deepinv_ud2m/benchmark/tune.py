"""Search the settings of methods on validation images.

Every setting of a method's grid is scored by every criterion, so one search serves all columns of a table:
``energy`` (energy score), ``crps``, ``psnr`` (of the mean of the samples), and of one sample ``perceptual``
(perceptual distance) and ``swd`` (sliced Wasserstein distance of patches).
A method is only comparable in the column whose criterion its settings were searched for. Two samples per
image are enough: the first two scores are unbiased, and the PSNR is predicted for the mean of eight.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from deepinv.physics import Physics
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from deepinv_ud2m.benchmark.methods import CRITERIA
from deepinv_ud2m.benchmark.rows import check_setup
from deepinv_ud2m.benchmark.run import Study, draw, evaluate, measure
from deepinv_ud2m.files import make_folder, write_file

#: The PSNR of the mean is predicted for so many samples, for the mean of few favours a small spread.
MEAN_OF = 8


def tune(file: Path, study: Study) -> dict:
    """
    Search every method on every task of a study, whose images are validation images.

    :param pathlib.Path file: JSON file of the result, written after each setting: all scores, and the
        winner of each criterion. Settings that are in it are not tried again.
    :raises ValueError: if the file holds a search of another setup, another search is writing it, or a
        method that is random has one sample alone, whose energy score has no spread.
    """
    if study.num_samples < 2 and any(entry.method.random for entry in study.methods):
        raise ValueError(f"--samples must be at least 2 in a search of samplers, got {study.num_samples}")
    make_folder(file.parent)
    try:
        with FileLock(file.with_name(f".{file.name}.lock"), timeout=0):
            return _tune(file, study)
    except Timeout as error:
        raise ValueError(
            f"{file} is in use by another search: wait for it, or choose another file"
        ) from error


def _tune(file: Path, study: Study) -> dict:
    setup = {**study.setup, "images": len(study.x), "num_samples": study.num_samples}
    result = {"setup": setup, "winners": {}, "scores": {}}
    if file.is_file():
        result = json.loads(file.read_text())
        check_setup(file, setup, result["setup"])
    for task, physics, entry in study:
        y = measure(physics, study.x, range(len(study.x)), study.seed)
        tried = result["scores"].setdefault(task, {}).setdefault(entry.searched_as, [])
        known = [one["settings"] for one in tried]
        new = [settings for settings in entry.candidates() if settings not in known]
        for settings in tqdm(new, desc=f"{task}, {entry.searched_as}", disable=None):
            sampler = entry.method.build(study.prior, study.sigma_y, **entry.resolve(settings))
            number = study.num_samples if entry.method.random else 1
            with study.precision(sampler):
                samples, _ = draw(sampler, study.prior, y, physics, number, study.seed)
            tried.append({"settings": settings, **_scores(samples, y, physics, study)})
            for criterion, (_, sign) in CRITERIA.items():
                scores = {i: sign * s for i, one in enumerate(tried) if (s := one[criterion]) is not None}
                if scores:
                    winners = result["winners"].setdefault(criterion, {}).setdefault(task, {})
                    winners[entry.searched_as] = tried[min(scores, key=scores.__getitem__)]["settings"]
            write_file(file, json.dumps(result, indent=1) + "\n")
    return result


def _scores(samples: Tensor, y: Tensor, physics: Physics, study: Study) -> dict[str, float | None]:
    """Mean over the images by criterion. None for a sampler that diverged."""
    if not samples.isfinite().all():
        return dict.fromkeys(CRITERIA)
    columns, _ = evaluate(samples, study.x, y, physics, study.metric, study.features_of_images)
    error = (samples[0] - study.x).flatten(1)
    if len(samples) == 1:  # the scores without spread
        columns |= {"energy_score": error.norm(dim=1).tolist(), "crps": error.abs().mean(1).tolist()}
    elif len(samples) < MEAN_OF:
        # The error of the mean of S samples is that of infinitely many, and the variance over S. One share
        # for all images: what is left of a single one may be negative. All variance leaves S / MEAN_OF.
        excess = (1 / len(samples) - 1 / MEAN_OF) * np.mean(columns["variance"])
        left = max(1 - excess / max(np.mean(columns["squared_error"]), 1e-12), len(samples) / MEAN_OF)
        columns["psnr_mean"] = [psnr - 10 * np.log10(left) for psnr in columns["psnr_mean"]]
    means = {name: columns.get(column) for name, (column, _) in CRITERIA.items()}
    return {name: float(np.mean(values)) if values else None for name, values in means.items()}
