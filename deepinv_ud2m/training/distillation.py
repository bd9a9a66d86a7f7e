r"""Distillation by a recipe: from a prior, physics and images to a calibrated posterior sampler, in one call.

The stages of a recipe, each of which goes on where it was stopped:

1. ``initial``: the initial estimate with its predicted error, by Gaussian likelihood.
2. ``single``: samples of :math:`p(x \mid y, x_s)` at single levels.
3. ``end_to_end``: samples of the whole sampler, through all of its levels.
4. At last one factor on all noise multipliers :math:`\delta_k` is set on validation images.

The losses of samples are those that the recipe lists: energy scores of pixels, of patches and of what a
network for images sees, or those of the paper. In stages 2 and 3 the weight of diversity in energy scores
follows the spread-skill ratio, for each physics by itself
(:class:`deepinv_ud2m.training.DiversityController`).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from deepinv.loss import Loss
from deepinv.models import Denoiser
from deepinv.physics import Physics
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from deepinv_ud2m.counting import peak_gb
from deepinv_ud2m.data.crops import RandomCrops, ResizedCrops
from deepinv_ud2m.files import write_file
from deepinv_ud2m.initializers import Initializer
from deepinv_ud2m.metrics import energy_score, spread_skill_ratio
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.schedule import VPSchedule
from deepinv_ud2m.training.controller import RATIO, DiversityController
from deepinv_ud2m.training.losses import EnergyScoreLoss, GaussianNLLLoss
from deepinv_ud2m.training.preparation import RECIPE, Prepared, Run, count_images, prepare
from deepinv_ud2m.training.randomness import find_generators, seed_all
from deepinv_ud2m.training.recipe import Recipe
from deepinv_ud2m.training.sigmas import StateSigmas
from deepinv_ud2m.training.trainer import DistillationTrainer
from deepinv_ud2m.training.updates import parameter_groups, warmup_cosine

#: Images that are sampled at once in evaluations, and when the factor is set.
_PART = 8

_METRICS = {"energy score": energy_score, RATIO: spread_skill_ratio}


def distill(
    prior: Denoiser | str | None,
    physics: Sequence[Physics | tuple] | None,
    images: str | Path | Tensor | Dataset,
    recipe: Recipe | str | Path = "default",
    save_path: str | Path = "runs/distilled",
    *,
    initial: Initializer | None = None,
    fast: bool = False,
    checkpointing: bool = False,
    weights: str | Path | None = None,
    download: bool = False,
    smoke: bool = False,
    device: torch.device | str | None = None,
    verbose: bool = True,
) -> UD2M:
    r"""
    A trained posterior sampler, from a prior, physics and images.

    A run that was stopped goes on when it is started again with the same arguments. With other physics,
    images or another recipe it is refused. ``save_path`` gets a folder for each stage, with curves and
    samples of validation images, and the sampler, as ``model``. Under ``torchrun``, processes share the
    batches of each step. The prior and the initializer that are given stay as they are: a copy is trained.

    :param deepinv.models.Denoiser, str, None prior: the prior, or the name or folder of one
        (:func:`deepinv_ud2m.load_prior`). ``None`` takes that of the recipe.
    :param Sequence physics: the physics to train for, with their noise models. A pair ``(physics,
        generator)`` draws an operator for each image. ``None`` takes the tasks of the recipe.
    :param str, Tensor, Dataset images: a folder of photographs, of which random crops are taken; or images
        `[N, C, H, W]` in [0, 1], or a dataset of images `[C, H, W]`. The last ones are held out.
    :param Recipe, str, pathlib.Path recipe: a recipe, a YAML file, or the name of one that ships (default:
        ``"default"``, small, for one kind of images).
    :param str, pathlib.Path save_path: folder of the run.
    :param deepinv_ud2m.initializers.Initializer initial: in place of that of the recipe.
    :param bool fast: compile the networks, and compute in bfloat16 (default: ``False``).
    :param bool checkpointing: about 1/K of the memory, a third more time (default: ``False``).
    :param str, pathlib.Path, None weights: weights of a published prior, see
        :func:`deepinv_ud2m.load_prior`.
    :param bool download: allow weights to be downloaded that are not here (default: ``False``).
    :param bool smoke: try all of a recipe in miniature, with random weights in the place of those that are
        published elsewhere (default: ``False``).
    :param torch.device, str device: where to train (default: a GPU, if there is one).
    :param bool verbose: show progress (default: ``True``).
    :returns: the sampler.
    :raises ValueError: for arguments that cannot work, before training.

    |sep|

    :Examples:

        >>> import tempfile
        >>> import deepinv as dinv
        >>> from deepinv_ud2m.data import mnist_digits
        >>> from deepinv_ud2m.training import Recipe, Stage, distill
        >>> recipe = Recipe(
        ...     [Stage("single", 1, 2)], sigmas=[78.7, 0.2], delta=[2.0], rho=[2.0], initial="wiener",
        ...     evaluations=1, validation_images=2, validation_samples=2, factors=[1.0],
        ... )
        >>> noise = dinv.physics.GaussianNoise(0.05)
        >>> physics = dinv.physics.Inpainting((1, 32, 32), mask=0.3, noise_model=noise)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = distill("mnist", [physics], mnist_digits(num=8), recipe, folder, verbose=False)
    """
    options = {"fast": fast, "checkpointing": checkpointing, "download": download, "verbose": verbose}
    run = Run.of(recipe, save_path, device, smoke, **options)
    prior, initial = copy.deepcopy((prior, initial))  # the caller's stay as they are, for another call
    model, stages = prepare(run, prior, physics, images, initial, weights)
    recipe = run.recipe
    if run.writes:
        write_file(run.folder / RECIPE, json.dumps(recipe.as_json(), indent=1) + "\n")
    curves = {}
    for prepared in stages:
        # A stage that is done returns at once, from its checkpoint.
        trainer = _trainer(run, model, prepared, run.folder / prepared.name)
        trainer.train()
        curves[prepared.name] = trainer.history.summary()
    *_, pairs, train, held_out, _ = stages[-1]
    factor = 1.0
    if recipe.factors == [factor]:
        found = trainer.evaluate() if trainer.eval_dataloader else {}
    else:
        factor, found = _set_noise(run, model, pairs, held_out)
    metadata = {
        "recipe": recipe.as_json(),
        "data": f"{count_images(train)} images, and {len(held_out)} held out",
        "measurements": sum(s.steps * s.batch_size * s.accumulate for s in recipe.stages),
        "factor of delta": factor,
        "validation": found,
        "validation_note": f"{recipe.validation_samples} samples of each image held out, with this factor",
        "curves": curves,
    }
    if run.writes:
        model.save_pretrained(run.folder / "model", metadata=metadata, dtype=torch.float16)
    return model.eval()


def plan(
    prior: Denoiser | str | None,
    physics: Sequence[Physics | tuple] | None,
    images: str | Path | Tensor | Dataset,
    recipe: Recipe | str | Path = "default",
    *,
    initial: Initializer | None = None,
    fast: bool = False,
    checkpointing: bool = False,
    weights: str | Path | None = None,
    download: bool = False,
    device: torch.device | str | None = None,
) -> str:
    """
    What a distillation would take: two steps of each of its stages, at full size, of which the second is
    timed here.

    Random weights stand in for those that are not here, which are named. Nothing is written. The arguments
    are those of :func:`distill`.

    :returns: a text of lines: what is missing, seconds of a step, hours in all, peak memory.
    :raises ValueError: for arguments that cannot work.
    """
    options = {"fast": fast, "checkpointing": checkpointing, "download": download, "verbose": False}
    run = Run.of(recipe, "", device, missing=[], **options)
    steps = [stage.steps for stage in run.recipe.stages]
    # The first one allocates and compiles, and the optimiser's state exists after it.
    run.recipe = replace(run.recipe, stages=[replace(stage, steps=2) for stage in run.recipe.stages])
    prior, initial = copy.deepcopy((prior, initial))  # which a step of training changes
    model, stages = prepare(run, prior, physics, images, initial, weights)
    lines, total = [], 0.0
    for prepared, count in zip(stages, steps, strict=True):
        trainer, stage = _trainer(run, model, prepared, None), prepared.stage
        peak_gb(run.device)
        seconds = _time_of_last_step(trainer)
        total += seconds * count
        height, width = prepared.held_out.shape[-2:]
        lines.append(
            f"{stage.stage}, {stage.accumulate} x {stage.batch_size} images of {width}x{height} pixels: "
            f"{seconds:.3g} s a step, {peak_gb(run.device):.1f} GiB at its peak; {count} steps take "
            f"{seconds * count / 3600:.2g} hours"
        )
    lines.append(f"all: about {total / 3600:.2g} hours by one process, besides evaluations")
    return "\n".join([*(f"missing: {what}" for what in run.missing or []), *lines])


def _time_of_last_step(trainer: DistillationTrainer) -> float:
    """Train, and return the seconds of the last step."""
    step, seconds = trainer.train_step, 0.0

    def timed(number: int) -> dict[str, float]:
        nonlocal seconds
        start = time.perf_counter()
        logs = step(number)
        seconds = time.perf_counter() - start
        return logs

    trainer.train_step = timed  # type: ignore[method-assign,assignment]
    trainer.train()
    return seconds


def _trainer(run: Run, model: UD2M, prepared: Prepared, folder: Path | None) -> DistillationTrainer:
    """The trainer of a stage; without a folder it evaluates and writes nothing."""
    stage, name, pairs, train, held_out, given = prepared
    recipe, (physics, generators) = run.recipe, zip(*pairs, strict=True)
    # A discriminator starts alike, whether the run was stopped or not.
    seed_all([recipe.seed, *name.encode()])
    of_samples = stage.stage != "initial"
    controller = adversary = None
    losses: Loss | list[Loss] = GaussianNLLLoss()
    if of_samples:
        controller = DiversityController(physics, recipe.kappa) if recipe.kappa else None
        losses, adversary = run.losses(held_out.shape[1], controller)
        if not any(isinstance(loss, EnergyScoreLoss) for loss in losses):
            controller = None
    if recipe.states == "uniform":
        sigmas: Callable[[int], Tensor] = VPSchedule().training_sigmas
    else:
        sigmas = StateSigmas(model, 0.25 if of_samples else 0.5)
    lr_initial = stage.lr if stage.lr_initial is None else stage.lr_initial
    groups = parameter_groups(model.unfolded, stage.lr, stage.lr_scalars, lr_initial, recipe.weight_decay)
    is_drawn = isinstance(train, RandomCrops | ResizedCrops)
    workers = 4 if recipe.resized and run.device.type == "cuda" else 0
    loader = DataLoader(train, stage.batch_size, shuffle=not is_drawn, drop_last=True, num_workers=workers)
    cosine = warmup_cosine(stage.steps, min(100, stage.steps)) if recipe.schedule == "cosine" else None
    is_evaluated = of_samples and folder is not None
    return DistillationTrainer(
        model=model,
        physics=list(physics),
        physics_generator=None if generators[0] is None else list(generators),
        train_dataloader=loader,
        eval_dataloader=DataLoader(held_out, _PART) if is_evaluated else None,  # type: ignore[arg-type]
        stage=stage.stage,
        steps=stage.steps,
        losses=losses,
        adversary=adversary,
        sigmas=sigmas,
        optimizer=torch.optim.AdamW(groups, betas=(recipe.betas[0], recipe.betas[1])),
        lr_schedule=cosine,
        grad_clip=recipe.grad_clip,
        accumulate=stage.accumulate,
        checkpointing=run.checkpointing,
        compile=run.fast,
        mixed_precision="bfloat16" if run.fast else False,
        ema_decay=recipe.ema_decay,
        sample_metrics=_METRICS,
        controller=controller if is_evaluated else None,
        eval_samples=recipe.validation_samples,
        eval_interval=-(-stage.steps // recipe.evaluations),
        ckp_interval=min(100, stage.steps),
        log_interval=min(50, stage.steps),
        plot_images=folder is not None,
        save_path=folder,
        settings={"recipe": recipe.as_json(), "stage": name, **given},
        seed=recipe.seed,
        device=run.device,
        verbose=run.verbose,
    )


@torch.no_grad()
def _set_noise(run: Run, model: UD2M, pairs: list[tuple], x: Tensor) -> tuple[float, dict[str, float]]:
    """
    Multiply all delta by one of the factors, and return it with its metrics. Energy scores count relative to
    the mean of each physics. They are flat in the factor, so calibration decides among those near the best.
    """
    recipe = run.recipe
    device, start = next(model.parameters()).device, model.unfolded.log_delta.clone()
    x = x.to(device)
    values = torch.zeros(len(recipe.factors), len(pairs), len(_METRICS))
    for f, factor in enumerate(tqdm(recipe.factors, desc="factor of delta", disable=not run.verbose)):
        model.unfolded.log_delta.copy_(start + torch.tensor(factor).log())
        for i, (physics, generator) in enumerate(pairs):
            seed_all([recipe.seed, i], find_generators([physics], [generator]))
            samples = []
            for part in x.split(_PART):
                if generator is not None:
                    physics.update(**generator.step(len(part)))
                samples.append(model.sample(physics(part), physics, recipe.validation_samples))
            values[f, i] = torch.stack([m(torch.cat(samples, 1), x).mean() for m in _METRICS.values()])
    scores = values[..., 0]
    relative = (scores / scores.mean(0)).mean(1)
    miss = values[..., 1].log().abs().mean(1)
    best = int(miss.where(relative <= 1.01 * relative.min(), torch.inf).argmin())
    (best,) = broadcast_object_list([best])  # that of the first of several processes, which writes
    model.unfolded.log_delta.copy_(start + torch.tensor(recipe.factors[best]).log())
    found: dict[str, float] = {}
    for name, of in zip(_METRICS, values[best].T, strict=True):
        found |= {name: of.mean().item()} | {f"{name}/{i}": value for i, value in enumerate(of.tolist())}
    return recipe.factors[best], found
