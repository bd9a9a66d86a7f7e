"""Checks of what a distillation is given, before anything is computed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepinv.loss import Loss
from torch import Tensor

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.physics.traits import check_has_prox
from deepinv_ud2m.priors import PriorInfo, has_merged_lora
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.training.controller import RATIO, DiversityController
from deepinv_ud2m.training.stages import STAGES
from deepinv_ud2m.unfolded import UnfoldedDenoiser

if TYPE_CHECKING:
    from deepinv_ud2m.training.trainer import DistillationTrainer

#: Arguments of deepinv's trainer that have no meaning in a distillation, and what to use instead.
UNUSED = {
    "epochs": "steps",
    "max_batch_steps": "steps",
    "scheduler": "lr_schedule, a factor for each step",
    "early_stop": "save_path, whose folder 'best' holds the best model",
    "early_stop_on_losses": "save_path, whose folder 'best' holds the best model",
    "ckpt_pretrained": "save_path and resume=True",
    "loop_random_online_physics": "seed, which repeats a whole run",
    "optimizer_step_multi_dataset": "accumulate, the batches of a step",
    "compute_train_metrics": "eval_dataloader: metrics are of the whole sampler",
    "compute_eval_losses": "metrics or sample_metrics",
    "display_losses_eval": "metrics or sample_metrics",
    "compare_no_learning": "test(..., compare_no_learning=True)",
    "plot_interval": "eval_interval: each evaluation has its pictures",
    "plot_measurements": "plot_images, whose pictures show them",
    "plot_convergence_metrics": "model.sample(..., return_trajectory=True)",
    "log_train_batch": "log_interval",
    "verbose_individual_losses": "history, which has each loss",
}

_COUNTS = (
    *("steps", "accumulate", "max_skipped", "eval_samples"),
    *("eval_interval", "ckp_interval", "log_interval"),
)

# Bicubic resampling overshoots [0, 1] slightly.
_MARGIN = 0.2


def check(trainer: DistillationTrainer) -> None:
    """Refuse arguments of a :class:`deepinv_ud2m.training.DistillationTrainer` that cannot work."""
    defaults = {field.name: field.default for field in fields(trainer)}
    for name, instead in UNUSED.items():
        given = getattr(trainer, name)
        if given != defaults[name]:
            raise ValueError(f"{name}={given!r} of deepinv's trainer has no use here: use {instead}")
    unfolded = getattr(trainer.model, "unfolded", None)
    if not isinstance(trainer.model, UD2M) or not isinstance(unfolded, UnfoldedDenoiser):
        raise TypeError(f"model must be UD2M(UnfoldedDenoiser(prior)), got {type(trainer.model).__name__}")
    for name in ("physics", "train_dataloader", "losses"):
        if not as_list(getattr(trainer, name)):
            raise ValueError(f"{name} must be given, one or a list, got {getattr(trainer, name)!r}")
    for name in _COUNTS:
        check_count(name, getattr(trainer, name))
    for name in ("sigmas", "lr_schedule"):
        given = getattr(trainer, name)
        if given is not None and not callable(given):
            raise TypeError(f"{name} must be a function, see its description, got {given!r}")
    for loss in as_list(trainer.losses):
        if not isinstance(loss, Loss):
            raise TypeError(f"losses must be of deepinv's Loss, got {type(loss).__name__}")
    if trainer.stage not in STAGES:
        raise ValueError(f"stage must be one of {list(STAGES)}, got {trainer.stage!r}")
    if not 0 <= trainer.ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {trainer.ema_decay}")
    if trainer.save_path and Path(trainer.save_path).exists() and not Path(trainer.save_path).is_dir():
        raise ValueError(f"save_path must be a folder, got the file {trainer.save_path}")
    if trainer.model.sigma_y == "estimate":
        raise ValueError("model.sigma_y='estimate' is for sampling: set it after training")
    if trainer.controller is not None and not trainer.eval_dataloader:
        raise ValueError("controller acts on evaluations: give an eval_dataloader")
    if isinstance(trainer.controller, DiversityController) and RATIO not in (trainer.sample_metrics or {}):
        raise ValueError(f"controller needs sample_metrics with {RATIO!r}: spread_skill_ratio")
    if trainer.eval_dataloader and trainer.eval_samples == 1 and not as_list(trainer.metrics):
        raise ValueError("eval_samples=1 leaves no energy score: take more, or give metrics")
    physics, generators = as_list(trainer.physics), as_list(trainer.physics_generator)
    for each in physics:
        check_has_prox(each)
    if generators and len(generators) != len(physics):
        raise ValueError(f"physics_generator must be one per physics, {len(physics)}, got {len(generators)}")


def check_model(
    unfolded: UnfoldedDenoiser, trained: Mapping[str, Tensor], stage: str, num_samples: int
) -> None:
    """Refuse an unfolded denoiser whose parameters ``trained`` cannot be trained in this stage."""
    if not trained:
        raise ValueError("model has nothing to train: all of its trained_parameters are frozen")
    if stage != "initial":
        if has_merged_lora(unfolded) and any(".lora." in name for name in trained):
            raise ValueError(
                "model has a merged adapter, whose factors get no gradient: load it with "
                "from_pretrained(..., merge=False), or call unmerge_lora(model.unfolded.denoiser)"
            )
        return
    if not unfolded.predicts_rmse or not any(name.startswith("initializer.") for name in trained):
        raise ValueError(
            "stage='initial' needs an initializer that predicts its RMSE and is trained, such as "
            f"PosteriorMeanInitializer; got {unfolded.initializer}"
        )
    if num_samples > 1:
        raise ValueError(
            f"losses need {num_samples} samples, and stage='initial' has one estimate: give GaussianNLLLoss()"
        )


def check_batch(batch: Any, prior_info: PriorInfo | None) -> None:
    """Refuse images that cannot be trained on, and warn of images far outside of [0, 1]."""
    x = batch["x"] if isinstance(batch, Mapping) else batch
    x = x[0] if isinstance(x, list | tuple) else x
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"train_dataloader must give images of a floating type, got {found}")
    low, high = x.min().item(), x.max().item()
    if not (low >= -_MARGIN and high <= 1 + _MARGIN):
        warnings.warn(
            "train_dataloader should give images in [0, 1], as noise levels and priors expect, got "
            f"values from {low:.4g} to {high:.4g}",
            stacklevel=2,
        )
    if prior_info is not None:
        prior_info.check_images(x.shape)


def loader_of_each(loaders: Any, number: int) -> list | None:
    """The data loader of each physics, of one for all or one for each; none is empty."""
    if loaders is None:
        return None
    loaders = as_list(loaders)
    if len(loaders) not in (1, number):
        raise ValueError(f"data loaders must be one, or one per physics ({number}), got {len(loaders)}")
    if any(len(loader) == 0 for loader in loaders):
        raise ValueError(
            "a data loader has no batch: its dataset is empty, or smaller than a batch with drop_last=True"
        )
    return loaders * number if len(loaders) == 1 else loaders


def as_list(things: Any) -> list:
    """One thing or several, as a list; ``None`` is an empty one."""
    if things is None:
        return []
    return list(things) if isinstance(things, list | tuple) else [things]


def names_of(things: Sequence) -> list[str]:
    """Class names, numbered where they repeat."""
    names = [type(thing).__name__ for thing in things]
    return [
        f"{name} {names[:i].count(name) + 1}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]
