r"""Distillation by a recipe: from a prior, physics and images to a calibrated posterior sampler, in one call.

The stages of a recipe, each of which goes on where it was stopped:

1. ``initial``: the initial estimate with its predicted error, by Gaussian likelihood.
2. ``single``: samples of :math:`p(x \mid y, x_s)` at single levels.
3. ``end_to_end``: samples of the whole sampler, through all of its levels.
4. At last one factor on all noise multipliers :math:`\delta_k` is set on validation images.

The losses of samples are energy scores of pixels, of patches and of what a network for images sees. In stages
2 and 3 the weight of diversity in them follows the spread-skill ratio, for each physics by itself
(:class:`deepinv_ud2m.training.DiversityController`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from deepinv.models import Denoiser
from deepinv.physics import Physics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from deepinv_ud2m.checks import check_count, check_device
from deepinv_ud2m.data import RandomCrops
from deepinv_ud2m.files import read_json, write_file
from deepinv_ud2m.initializers import PosteriorMeanInitializer, WienerInitializer
from deepinv_ud2m.metrics import DigitClassifier, PerceptualDistance, energy_score, spread_skill_ratio
from deepinv_ud2m.physics import make_generator, make_physics
from deepinv_ud2m.physics.traits import is_linear
from deepinv_ud2m.priors import add_lora, load_prior
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.training.controller import DiversityController
from deepinv_ud2m.training.losses import EnergyScoreLoss, GaussianNLLLoss
from deepinv_ud2m.training.randomness import find_generators, seed_all
from deepinv_ud2m.training.sigmas import StateSigmas
from deepinv_ud2m.training.stages import STAGES
from deepinv_ud2m.training.trainer import DistillationTrainer
from deepinv_ud2m.training.updates import parameter_groups, warmup_cosine
from deepinv_ud2m.unfolded import UnfoldedDenoiser

#: Images that the Wiener filter is fitted to.
_FITTED = 10_000

#: The recipe of a run, in its folder.
_RECIPE = "recipe.json"


@dataclass
class Stage:
    """
    One stage of training.

    :param str stage: ``"initial"``, ``"single"`` or ``"end_to_end"``.
    :param int steps: optimiser steps.
    :param int batch_size: images per step.
    :param int, None size: side of the images: crops of a folder of photographs. Other images are as they are.
    :param float lr: learning rate of the networks.
    :param float lr_scalars: that of the multipliers of rho, delta and lambda (default: 3e-3).
    """

    stage: str
    steps: int
    batch_size: int
    size: int | None = None
    lr: float = 4e-4
    lr_scalars: float = 3e-3

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {list(STAGES)}, got {self.stage!r}")
        for name in ("steps", "batch_size"):
            check_count(name, getattr(self, name))


@dataclass
class Recipe:
    r"""
    All numbers of a distillation.

    :param list[Stage] stages: the stages, in order.
    :param list[float] sigmas: levels of the sampler, strictly decreasing.
    :param float, None nominal_rmse: see :class:`deepinv_ud2m.UD2M`. It needs a learned initial estimate.
    :param list[float] delta: multipliers of the noise before training, one for each of the K iterations.
    :param list[float] rho: multipliers of the coupling, likewise.
    :param float reference_level: see :class:`deepinv_ud2m.initializers.Initializer`.
    :param bool learned: whether the initial estimate is learned, by a copy of the network of the prior, or
        that of the Wiener filter.
    :param bool fit_wiener: fit the Wiener filter to the images, rather than that of photographs (default:
        ``False``).
    :param int rank: of the LoRA on all convolutions of the prior; 0 trains all its weights.
    :param list[str] tasks: names of :data:`deepinv_ud2m.physics.TASKS`, where no physics is given.
    :param list[float] sigma_y: range of the noise of their measurements, drawn for each image.
    :param float patch_weight: weight of the energy score of patches (default: 0, none).
    :param int patch_size: their side, in pixels.
    :param str, None features: network of :class:`deepinv_ud2m.metrics.PerceptualDistance` whose energy score
        is added, or the folder of a :class:`deepinv_ud2m.metrics.DigitClassifier`.
    :param float feature_weight: its weight.
    :param float kappa: exponent of the controller of diversity, 0 for none (default: 0.5).
    :param int evaluations: evaluations in each stage of samples; the controller acts after each (default: 8).
    :param int validation_images: images that are held out (default: 8).
    :param int validation_samples: samples of each (default: 8).
    :param list[float] factors: factors on all :math:`\delta_k`, of which the best by energy score on
        validation images is kept at the end.
    :param int seed: of the run (default: 0).
    """

    stages: list[Stage]
    sigmas: list[float]
    delta: list[float]
    rho: list[float]
    nominal_rmse: float | None = None
    reference_level: float = 0.08
    learned: bool = True
    fit_wiener: bool = False
    rank: int = 0
    tasks: list[str] = field(default_factory=list)
    sigma_y: list[float] = field(default_factory=lambda: [0.005, 0.1])
    patch_weight: float = 0.0
    patch_size: int = 8
    features: str | None = None
    feature_weight: float = 5.0
    kappa: float = 0.5
    evaluations: int = 8
    validation_images: int = 8
    validation_samples: int = 8
    factors: list[float] = field(default_factory=lambda: [0.9, 0.95, 1.0, 1.05, 1.1])
    seed: int = 0

    def __post_init__(self):
        if len(self.delta) != len(self.rho):
            raise ValueError(f"delta and rho must have one value per iteration, got {self.delta}, {self.rho}")
        if self.nominal_rmse is not None and not self.learned:
            raise ValueError("nominal_rmse needs learned: true, an initial estimate that predicts its error")

    @classmethod
    def read(cls, file: str | Path) -> Recipe:
        """
        A recipe from a YAML file.

        :param str, pathlib.Path file: the file, or the name of a recipe that ships: ``"default"``.
        :raises ValueError: for keys that are unknown or missing, or values of other types; it names them.
        """
        try:
            from jsonargparse import ArgumentParser
        except ImportError as error:
            raise ImportError("recipes in YAML need jsonargparse: pip install jsonargparse") from error
        shipped = files("deepinv_ud2m.training") / "recipes" / f"{file}.yaml"
        path = Path(str(shipped)) if shipped.is_file() else Path(file)
        if not path.is_file():
            raise ValueError(
                f"recipe must be 'default', a Recipe or a YAML file, got {str(file)!r}, which is no file"
            )
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            return cls(**vars(parser.instantiate_classes(parser.parse_path(path))))
        except Exception as error:  # jsonargparse's own and those of its parsers
            raise ValueError(f"{path} is no recipe: {error}") from error


def distill(
    prior: Denoiser | str,
    physics: Sequence[Physics | tuple] | None,
    images: str | Path | Tensor | Dataset,
    recipe: Recipe | str | Path = "default",
    save_path: str | Path = "runs/distilled",
    *,
    initial: nn.Module | None = None,
    fast: bool = False,
    device: torch.device | str | None = None,
    verbose: bool = True,
) -> UD2M:
    r"""
    A trained posterior sampler, from a prior, physics and images.

    A run that was stopped goes on when it is started again with the same arguments. ``save_path`` gets a
    folder for each stage, with curves and samples of validation images, and the sampler, as ``model``.

    :param deepinv.models.Denoiser, str prior: the prior, or the name or folder of one
        (:func:`deepinv_ud2m.load_prior`).
    :param Sequence physics: the physics to train for, with their noise models. A pair ``(physics,
        generator)`` draws an operator for each image. ``None`` takes the tasks of the recipe.
    :param str, Tensor, Dataset images: a folder of photographs, of which random crops are taken; or images
        `[N, C, H, W]` in [0, 1], or a dataset of images `[C, H, W]`. The last ones are held out.
    :param Recipe, str, pathlib.Path recipe: a recipe, a YAML file, or the name of one that ships (default:
        ``"default"``, small, for one kind of images).
    :param str, pathlib.Path save_path: folder of the run.
    :param deepinv_ud2m.initializers.Initializer initial: in place of that of the recipe.
    :param bool fast: compile the networks, and compute in bfloat16 (default: ``False``).
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
        ...     [Stage("single", 1, 2)], sigmas=[78.7, 0.2], delta=[2.0], rho=[2.0], learned=False,
        ...     evaluations=1, validation_images=2, validation_samples=2, factors=[1.0],
        ... )
        >>> noise = dinv.physics.GaussianNoise(0.05)
        >>> physics = dinv.physics.Inpainting((1, 32, 32), mask=0.3, noise_model=noise)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = distill("mnist", [physics], mnist_digits(num=8), recipe, folder, verbose=False)
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    if not physics and not recipe.tasks:
        raise ValueError("physics must be given, or be tasks of the recipe")
    check_device(device)
    device, folder = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), Path(save_path)
    _check_folder(folder, recipe)
    torch.manual_seed(recipe.seed)
    model = _sampler(prior, recipe, initial, images)
    features = _features(recipe, device)
    # All stages are made ready before the first is trained: what is wrong with the last is told at once.
    crops, ready = {}, []
    for number, stage in enumerate(recipe.stages):
        train, held_out = _data(images, recipe, stage, model.unfolded.prior_info, crops)
        pairs = _physics(physics, recipe, stage, tuple(held_out.shape[1:]), device)
        ready.append((stage, folder / f"{number}_{stage.stage}", pairs, train, held_out))
    write_file(folder / _RECIPE, json.dumps(asdict(recipe), indent=1) + "\n")
    options = {"fast": fast, "device": device, "verbose": verbose}
    for stage in ready:
        _run_stage(model, recipe, features, *stage, **options)
    factor = _set_noise(model, recipe, pairs, held_out, verbose) if len(recipe.factors) > 1 else 1.0
    metadata = {"recipe": asdict(recipe), "factor of delta": factor}
    model.save_pretrained(folder / "model", metadata=metadata, dtype=torch.float16)
    return model.eval()


def _check_folder(folder: Path, recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file, wanted = folder / _RECIPE, json.loads(json.dumps(asdict(recipe)))
    there = read_json(file) if file.is_file() else wanted
    changed = [name for name in wanted if there.get(name) != wanted[name]]
    if changed:
        raise ValueError(
            f"save_path {folder} holds a run of another recipe, with other {', '.join(changed)}: give "
            "another folder, or delete it"
        )


def _sampler(prior, recipe: Recipe, initial: nn.Module | None, images) -> UD2M:
    name = prior if isinstance(prior, str) else None
    prior = load_prior(prior) if name else prior
    if initial is None:
        initial = WienerInitializer(reference_level=recipe.reference_level)
        if recipe.fit_wiener:
            if isinstance(images, str | Path):
                raise ValueError("fit_wiener needs images as a tensor or a dataset, got a folder")
            some = torch.stack([images[i] for i in range(min(len(images), _FITTED))])
            initial = WienerInitializer.fit(some, reference_level=recipe.reference_level)
        if recipe.learned and name is None:
            raise ValueError(
                "learned: true needs a prior by name or folder; give initial=..., or learned: false"
            )
        if recipe.learned:
            initial = PosteriorMeanInitializer.from_prior(
                name, initial, reference_level=recipe.reference_level
            )
    if recipe.rank:
        add_lora(prior, recipe.rank, targets="all-convs")
    unfolded = UnfoldedDenoiser(
        prior,
        len(recipe.delta),
        initial,
        delta=recipe.delta,
        rho=recipe.rho,
        train_prior="adapter" if recipe.rank else "all",
    )
    return UD2M(unfolded, sigmas=recipe.sigmas, nominal_rmse=recipe.nominal_rmse)


def _data(images, recipe: Recipe, stage: Stage, info, crops: dict) -> tuple[Dataset, Tensor]:
    """Training images, and those that are held out. Photographs are read once for each size of crops."""
    held = recipe.validation_images
    if isinstance(images, str | Path):
        if stage.size is None:
            raise ValueError(f"size of the stage {stage.stage!r} must be given, for crops of photographs")
        if stage.size not in crops:
            read = RandomCrops(images, stage.size, 1, getattr(info, "channels", 3), skip_small=True)
            crops[stage.size] = read, read.hold_out(held)
        read, held_out = crops[stage.size]
        train = copy.copy(read)
        train.num = stage.steps * stage.batch_size
        return train, held_out
    if len(images) < held + stage.batch_size:
        raise ValueError(
            f"images must be at least {held + stage.batch_size}, {held} that are held out "
            f"(validation_images) and a batch of {stage.batch_size}; got {len(images)}"
        )
    count = len(images) - held
    return Subset(images, range(count)), torch.stack([images[i] for i in range(count, len(images))])


def _physics(given, recipe: Recipe, stage: Stage, shape, device) -> list[tuple]:
    if given:
        pairs = [one if isinstance(one, tuple) else (one, None) for one in given]
    else:
        options = {"sigma_y": tuple(recipe.sigma_y), "seed": recipe.seed, "device": device}
        pairs = [
            (make_physics(task, shape, device=device), make_generator(task, shape, **options))
            for task in recipe.tasks
        ]
    if stage.stage == "initial":  # is learned for linear operators only
        pairs = [pair for pair in pairs if is_linear(pair[0])]
    if not pairs:
        raise ValueError("physics must have a linear one for the stage 'initial'")
    if len({generator is None for _, generator in pairs}) > 1:
        raise ValueError("physics must all come with a generator, or all without one")
    return pairs


def _run_stage(
    model, recipe, features, stage, folder, pairs, train, held_out, *, fast, device, verbose
) -> None:
    physics, generators = zip(*pairs, strict=True)
    if (folder / "final").is_dir():  # done before
        model.unfolded.load_state(UD2M.from_pretrained(folder / "final", merge=False).unfolded.state())
        return
    of_samples = stage.stage != "initial"
    controller = DiversityController(physics, recipe.kappa) if of_samples and recipe.kappa else None
    loss = _losses(recipe, controller, features) if of_samples else GaussianNLLLoss()
    groups = parameter_groups(model.unfolded, stage.lr, stage.lr_scalars, stage.lr)
    loader = DataLoader(train, stage.batch_size, shuffle=not isinstance(train, RandomCrops), drop_last=True)
    DistillationTrainer(
        model=model,
        physics=list(physics),
        physics_generator=None if generators[0] is None else list(generators),
        train_dataloader=loader,
        eval_dataloader=DataLoader(held_out, len(held_out)) if of_samples else None,
        stage=stage.stage,
        steps=stage.steps,
        losses=loss,
        sigmas=StateSigmas(model, 0.5 if stage.stage == "initial" else 0.25),
        optimizer=torch.optim.AdamW(groups, betas=(0.9, 0.99)),
        lr_schedule=warmup_cosine(stage.steps, min(100, stage.steps)),
        grad_clip=1.0,
        compile=fast,
        mixed_precision="bfloat16" if fast else False,
        sample_metrics={"energy score": energy_score, "spread-skill ratio": spread_skill_ratio},
        controller=controller,
        eval_samples=recipe.validation_samples,
        eval_interval=-(-stage.steps // recipe.evaluations),
        ckp_interval=min(100, stage.steps),
        plot_images=True,
        save_path=folder,
        settings={"recipe": asdict(recipe), "stage": folder.name},
        seed=recipe.seed,
        device=device,
        verbose=verbose,
    ).train()


def _features(recipe: Recipe, device) -> Callable[[Tensor], Tensor] | None:
    if not recipe.features:
        return None
    is_folder = Path(recipe.features).is_dir()
    network = DigitClassifier.from_pretrained(recipe.features) if is_folder else recipe.features
    return PerceptualDistance(network, device=device).embedding


def _losses(recipe: Recipe, controller: DiversityController | None, features) -> list[EnergyScoreLoss]:
    options = {"diversity_weight": controller.weights if controller else 1.0}
    losses = [EnergyScoreLoss(**options)]
    if recipe.patch_weight:
        losses.append(EnergyScoreLoss(patch_size=recipe.patch_size, weight=recipe.patch_weight, **options))
    if features is not None:
        losses.append(EnergyScoreLoss(features=features, weight=recipe.feature_weight, **options))
    return losses


@torch.no_grad()
def _set_noise(model: UD2M, recipe: Recipe, pairs: list[tuple], x: Tensor, verbose: bool) -> float:
    """Multiply all delta by the factor of the best energy score, relative to the mean of each physics."""
    device, start = next(model.parameters()).device, model.unfolded.log_delta.clone()
    scores, x = [], x.to(device)
    for factor in tqdm(recipe.factors, desc="factor of delta", disable=not verbose):
        model.unfolded.log_delta.copy_(start + torch.tensor(factor).log())
        scores.append([])
        for i, (physics, generator) in enumerate(pairs):
            seed_all([recipe.seed, i], find_generators([physics], [generator]))
            if generator is not None:
                physics.update(**generator.step(len(x)))
            samples = model.sample(physics(x), physics, recipe.validation_samples)
            scores[-1].append(energy_score(samples, x).mean())
    scores = torch.tensor(scores)
    best = recipe.factors[int((scores / scores.mean(0)).mean(1).argmin())]
    model.unfolded.log_delta.copy_(start + torch.tensor(best).log())
    return best
