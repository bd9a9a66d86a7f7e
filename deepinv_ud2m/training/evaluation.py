"""Evaluation of a distillation: metrics of the whole sampler, the same measurements each time."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from deepinv_ud2m.problem import Problem
from deepinv_ud2m.training.arguments import names_of
from deepinv_ud2m.training.figures import plot_samples
from deepinv_ud2m.training.randomness import BatchStream, seed_all

if TYPE_CHECKING:
    from deepinv_ud2m.training.trainer import DistillationTrainer


def evaluate(trainer: DistillationTrainer, key: list[int]) -> dict[str, float]:
    """
    Mean of each metric over physics and images, and with several physics also of each, for the model of a
    :class:`deepinv_ud2m.training.DistillationTrainer` as it is; ``key`` fixes all random numbers.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for operator, loader in enumerate(trainer.eval_dataloader):
        for name, value in _evaluate_on(trainer, operator, loader, [*key, operator]).items():
            values[name].append(value)
            if len(trainer.physics) > 1:
                values[f"{name}/{operator}"].append(value)
    return {name: float(np.mean(of)) for name, of in values.items()}


def score_of(trainer: DistillationTrainer, results: dict[str, float]) -> float:
    """What decides which model is the best: the first metric of samples, or else of images. Low is good."""
    if trainer.sample_metrics:
        return results[next(iter(trainer.sample_metrics))]
    score = results[names_of(trainer.metrics)[0]]
    return score if getattr(trainer.metrics[0], "lower_better", True) else -score


def _evaluate_on(
    trainer: DistillationTrainer, operator: int, loader: DataLoader, key: list[int]
) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    parts: list[tuple[Tensor, Tensor]] = []
    model, accelerator = trainer.model, trainer.accelerator
    stream = BatchStream(loader, key)
    for i in range(len(loader)):
        seed_all([*key, i], trainer.seeded)
        if i % accelerator.num_processes != accelerator.process_index:
            next(stream)
            continue
        x, y, physics = trainer.get_samples({operator: stream}, operator)
        with warnings.catch_warnings():  # a sampler that is not trained yet does not explain y
            warnings.filterwarnings("ignore", "the samples do not explain y")
            samples = model.sample(y, physics, trainer.eval_samples)
        for name, metric in zip(names_of(trainer.metrics), trainer.metrics, strict=True):
            of = metric(x=x, x_net=samples[0], y=y, physics=physics, model=model)
            values[name] += of.flatten().tolist()
        parts.append((samples.cpu(), x.cpu()))
        if i == 0 and trainer.plot_images and trainer.writes:
            problem = Problem(y, physics, model.sigma_y)
            plot_samples(trainer.folder / f"samples_{operator}.png", x, problem, samples)
    gathered = gather_object([(dict(values), parts)])
    names = dict.fromkeys(name for of, _ in gathered for name in of)
    found = {name: [v for of, _ in gathered for v in of.get(name, [])] for name in names}
    parts = [part for _, of in gathered for part in of]
    if len({x.shape[1:] for _, x in parts}) == 1:  # a ratio of sums is of all images together
        parts = [(torch.cat([samples for samples, _ in parts], 1), torch.cat([x for _, x in parts]))]
    for name, metric in (trainer.sample_metrics or {}).items():
        found[name] = [v for samples, x in parts for v in metric(samples, x).flatten().tolist()]
    return {name: float(np.mean(of)) for name, of in found.items()}
