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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from deepinv.loss import Loss
from deepinv.models import Denoiser
from deepinv.physics import Physics
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from deepinv_ud2m.checks import check_device, check_path
from deepinv_ud2m.data.crops import RandomCrops, ResizedCrops
from deepinv_ud2m.files import check_digest, make_folder, read_json, read_weights, write_file
from deepinv_ud2m.initializers import (
    Initializer,
    PosteriorMeanInitializer,
    PseudoInverseInitializer,
    RAMInitializer,
    WienerInitializer,
)
from deepinv_ud2m.metrics import energy_score, spread_skill_ratio
from deepinv_ud2m.physics import make_generator, make_physics
from deepinv_ud2m.physics.traits import is_linear
from deepinv_ud2m.priors import PUBLISHED, PriorInfo, add_lora, load_prior, random_prior
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.schedule import VPSchedule
from deepinv_ud2m.training.controller import DiversityController
from deepinv_ud2m.training.losses import EnergyScoreLoss, GaussianNLLLoss
from deepinv_ud2m.training.objectives import Setting, make_losses
from deepinv_ud2m.training.randomness import find_generators, seed_all
from deepinv_ud2m.training.recipe import Recipe, Stage
from deepinv_ud2m.training.sigmas import StateSigmas
from deepinv_ud2m.training.trainer import DistillationTrainer
from deepinv_ud2m.training.updates import parameter_groups, warmup_cosine
from deepinv_ud2m.unfolded import UnfoldedDenoiser

#: Images that the Wiener filter is fitted to.
_FITTED = 10_000

#: The recipe of a run, in its folder.
_RECIPE = "recipe.json"


@dataclass
class _Run:
    """What all stages share."""

    recipe: Recipe
    folder: Path
    device: torch.device
    fast: bool
    checkpointing: bool
    download: bool
    smoke: bool
    verbose: bool

    def setting(self, channels: int, controller: DiversityController | None = None) -> Setting:
        return Setting(channels, self.device, controller, self.download, self.smoke)


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

    A run that was stopped goes on when it is started again with the same arguments. ``save_path`` gets a
    folder for each stage, with curves and samples of validation images, and the sampler, as ``model``. Under
    ``torchrun``, processes share the batches of each step.

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
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    recipe = recipe.miniature() if smoke else recipe
    prior = recipe.prior if prior is None else prior
    if prior is None:
        raise ValueError("prior must be given, or be named by the recipe")
    _check_physics(physics, recipe)
    _check_images(images)
    check_device(device)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    save_path = check_path("save_path", save_path)
    run = _Run(recipe, save_path, device, fast, checkpointing, download, smoke, verbose)
    _check_folder(run)
    name, prior = _prior(run, prior, weights)
    # All stages are made ready before the first is trained: what is wrong with the last is told at once.
    crops: dict[int, tuple] = {}
    ready = []
    for number, stage in enumerate(recipe.stages):
        train, held_out = _data(images, recipe, stage, getattr(prior, "prior_info", None), crops)
        pairs = _physics(physics, recipe, stage, tuple(held_out.shape[1:]), device)
        ready.append((stage, run.folder / f"{number}_{stage.stage}", pairs, train, held_out))
    make_losses(recipe.losses, run.setting(held_out.shape[1]))
    # Only now, as it may add an adapter to the caller's prior.
    torch.manual_seed(recipe.seed)
    model = _sampler(run, prior, _initial(run, name, images) if initial is None else initial)
    write_file(run.folder / _RECIPE, json.dumps(recipe.as_json(), indent=1) + "\n")
    for prepared in ready:
        _run_stage(run, model, *prepared)
    factor = _set_noise(run, model, pairs, held_out) if len(recipe.factors) > 1 else 1.0
    metadata = {"recipe": recipe.as_json(), "factor of delta": factor}
    model.save_pretrained(run.folder / "model", metadata=metadata, dtype=torch.float16)
    return model.eval()


def _check_physics(physics: Sequence[Physics | tuple] | None, recipe: Recipe) -> None:
    if physics is None and recipe.tasks:
        return
    if not physics:
        raise ValueError("physics must be one or more, or None where the recipe has tasks")
    for one in physics:
        one = one[0] if isinstance(one, tuple) else one
        if not isinstance(one, Physics):
            raise TypeError(f"physics must be of deepinv, or pairs of one and its generator, got {one!r}")


def _check_images(images: Any) -> None:
    if isinstance(images, str | Path):
        if not Path(images).is_dir():
            raise ValueError(f"images must be a folder, a tensor or a dataset: there is no folder {images}")
    elif not isinstance(images, Tensor | Dataset):
        raise TypeError(f"images must be a folder, a tensor or a dataset, got {type(images).__name__}")
    elif isinstance(images, Tensor):
        _check_values(images)


def _check_values(x: Tensor, channels: int | None = None) -> None:
    if x.ndim != 4 or not x.is_floating_point() or not x.isfinite().all():
        raise ValueError(f"images must be [N, C, H, W], floating and finite, got {x.dtype} {list(x.shape)}")
    low, high = x.min().item(), x.max().item()
    if low < -1 or high > 2:  # some leave the range a little
        raise ValueError(f"images must be in [0, 1], got values from {low:g} to {high:g}")
    if channels not in (None, x.shape[1]):
        raise ValueError(f"images must have {channels} channel(s), as the prior, got {x.shape[1]}")


def _check_folder(run: _Run) -> None:
    make_folder(run.folder)
    file, wanted = run.folder / _RECIPE, json.loads(json.dumps(run.recipe.as_json()))
    there = read_json(file) if file.is_file() else wanted
    changed = [name for name in wanted if there.get(name) != wanted[name]]
    if changed:
        raise ValueError(
            f"save_path {run.folder} holds a run of another recipe, with other {', '.join(changed)}: give "
            "another folder, or delete it"
        )


def _prior(run: _Run, prior: Any, weights: str | Path | None) -> tuple[str | None, Any]:
    """The prior, and its name or folder, if that was given."""
    if not isinstance(prior, str | Path):
        return None, prior
    name = str(prior)
    if name in PUBLISHED and run.smoke:
        return name, random_prior(name)
    return name, load_prior(name, weights=weights, download=run.download)


def _sampler(run: _Run, prior: Any, initial: Initializer) -> UD2M:
    recipe = run.recipe
    if recipe.rank:
        add_lora(prior, recipe.rank, targets=recipe.targets)
    unfolded = UnfoldedDenoiser(
        prior,
        len(recipe.delta),
        initial,
        delta=recipe.delta,
        rho=recipe.rho,
        train_prior=recipe.train_prior or ("adapter" if recipe.rank else "all"),
    )
    levels = {"num_steps": recipe.num_steps} if recipe.sigmas is None else {"sigmas": recipe.sigmas}
    return UD2M(unfolded, eta=recipe.eta, nominal_rmse=recipe.nominal_rmse, **levels)


def _initial(run: _Run, name: str | None, images: Any) -> Initializer:
    recipe = run.recipe
    level: dict[str, Any] = {"reference_level": recipe.reference_level}
    if recipe.initial == "pseudo-inverse":
        return PseudoInverseInitializer(**level)
    if recipe.initial == "ram":
        ram = dinv.models.RAM(pretrained=not run.smoke)
        return RAMInitializer(ram, trainable=True, **level)
    wiener = WienerInitializer(**level)
    if recipe.fit_wiener:
        if isinstance(images, str | Path):
            raise ValueError("fit_wiener needs images as a tensor or a dataset, got a folder")
        some = torch.stack([images[i] for i in range(min(len(images), _FITTED))])
        wiener = WienerInitializer.fit(some, **level)
    if recipe.initial == "wiener":
        return wiener
    if name is None:
        raise ValueError("initial: learned needs a prior by name or folder; give initial=..., or another one")
    return PosteriorMeanInitializer.from_prior(name, wiener, **level)


def _data(
    images: Any, recipe: Recipe, stage: Stage, info: PriorInfo | None, crops: dict
) -> tuple[Dataset, Tensor]:
    """Training images, and those that are held out. Photographs are read once for each size of crops."""
    held, batch = recipe.validation_images, stage.batch_size * stage.accumulate
    if isinstance(images, str | Path):
        if stage.size is None:
            raise ValueError(f"size of the stage {stage.stage!r} must be given, for crops of photographs")
        if stage.size not in crops:
            channels = getattr(info, "channels", 3)
            if recipe.resized:
                read: ResizedCrops | RandomCrops = ResizedCrops(images, stage.size, 1, channels)
            else:
                read = RandomCrops(images, stage.size, 1, channels, skip_small=True)
            crops[stage.size] = read, read.hold_out(held)
        read, held_out = crops[stage.size]
        train = copy.copy(read)
        train.num = stage.steps * batch
        return train, held_out
    if len(images) < held + batch:
        raise ValueError(
            f"images must be at least {held + batch}, {held} that are held out (validation_images) and those "
            f"of a step; got {len(images)}"
        )
    count = len(images) - held
    held_out = torch.stack([images[i] for i in range(count, len(images))])
    _check_values(held_out, getattr(info, "channels", None))
    return Subset(images, range(count)), held_out


def _physics(
    given: Sequence[Physics | tuple] | None,
    recipe: Recipe,
    stage: Stage,
    shape: Any,
    device: torch.device,
) -> list[tuple]:
    if given:
        pairs = [one if isinstance(one, tuple) else (one, None) for one in given]
    else:
        options: dict[str, Any] = {"sigma_y": tuple(recipe.sigma_y), "seed": recipe.seed, "device": device}
        pairs = [
            (make_physics(task, shape, device=device), make_generator(task, shape, **options))
            for task in recipe.tasks
        ]
    if stage.stage == "initial" or recipe.initial == "ram":  # both are for linear operators only
        pairs = [pair for pair in pairs if is_linear(pair[0])]
    if not pairs:
        raise ValueError("physics must have a linear one for the stage 'initial', and for RAM")
    if len({generator is None for _, generator in pairs}) > 1:
        raise ValueError("physics must all come with a generator, or all without one")
    return pairs


def _run_stage(
    run: _Run, model: UD2M, stage: Stage, folder: Path, pairs: list[tuple], train: Dataset, held_out: Tensor
) -> None:
    recipe, (physics, generators) = run.recipe, zip(*pairs, strict=True)
    if (folder / "final").is_dir():  # done before
        weights = folder / "final" / "model.safetensors"
        check_digest(weights, read_json(folder / "final" / "config.json")["weights"]["sha256"])
        model.unfolded.load_state(read_weights(weights))
        return
    of_samples = stage.stage != "initial"
    controller = adversary = None
    losses: Loss | list[Loss] = GaussianNLLLoss()
    if of_samples:
        controller = DiversityController(physics, recipe.kappa) if recipe.kappa else None
        losses, adversary = make_losses(recipe.losses, run.setting(held_out.shape[1], controller))
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
    DistillationTrainer(
        model=model,
        physics=list(physics),
        physics_generator=None if generators[0] is None else list(generators),
        train_dataloader=loader,
        eval_dataloader=DataLoader(held_out, len(held_out)) if of_samples else None,  # type: ignore[arg-type]
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
        sample_metrics={"energy score": energy_score, "spread-skill ratio": spread_skill_ratio},
        controller=controller,
        eval_samples=recipe.validation_samples,
        eval_interval=-(-stage.steps // recipe.evaluations),
        ckp_interval=min(100, stage.steps),
        log_interval=min(50, stage.steps),
        plot_images=True,
        save_path=folder,
        settings={"recipe": recipe.as_json(), "stage": folder.name},
        seed=recipe.seed,
        device=run.device,
        verbose=run.verbose,
    ).train()


@torch.no_grad()
def _set_noise(run: _Run, model: UD2M, pairs: list[tuple], x: Tensor) -> float:
    """Multiply all delta by the factor of the best energy score, relative to the mean of each physics."""
    recipe = run.recipe
    device, start = next(model.parameters()).device, model.unfolded.log_delta.clone()
    x = x.to(device)
    scores: list[list[Tensor]] = []
    for factor in tqdm(recipe.factors, desc="factor of delta", disable=not run.verbose):
        model.unfolded.log_delta.copy_(start + torch.tensor(factor).log())
        scores.append([])
        for i, (physics, generator) in enumerate(pairs):
            seed_all([recipe.seed, i], find_generators([physics], [generator]))
            if generator is not None:
                physics.update(**generator.step(len(x)))
            samples = model.sample(physics(x), physics, recipe.validation_samples)
            scores[-1].append(energy_score(samples, x).mean())
    table = torch.tensor(scores)
    best = recipe.factors[int((table / table.mean(0)).mean(1).argmin())]
    model.unfolded.log_delta.copy_(start + torch.tensor(best).log())
    return best
