"""What a distillation needs, made ready by its recipe: prior, images, physics, sampler."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import deepinv as dinv
import torch
from deepinv.loss import Loss
from deepinv.physics import Physics
from deepinv.utils import get_device
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from deepinv_ud2m.checks import check_device, check_path
from deepinv_ud2m.data.crops import RandomCrops, ResizedCrops
from deepinv_ud2m.files import cached_download, make_folder, read_json
from deepinv_ud2m.initializers import (
    Initializer,
    PosteriorMeanInitializer,
    PseudoInverseInitializer,
    RAMInitializer,
    WienerInitializer,
)
from deepinv_ud2m.physics import make_generator, make_physics
from deepinv_ud2m.physics.traits import check_has_prox, is_linear
from deepinv_ud2m.priors import PUBLISHED, PriorInfo, add_lora, load_prior, random_prior
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.training.adversarial import Adversary
from deepinv_ud2m.training.checkpoints import identity
from deepinv_ud2m.training.controller import DiversityController
from deepinv_ud2m.training.objectives import Setting, make_losses
from deepinv_ud2m.training.recipe import Recipe, Stage
from deepinv_ud2m.training.updates import start_accelerator
from deepinv_ud2m.unfolded import UnfoldedDenoiser

#: Images that the Wiener filter is fitted to.
_FITTED = 10_000

#: Most steps of an epoch of crops.
_EPOCH = 100

_RAM_URL = "https://huggingface.co/mterris/ram/resolve/main/ram.pth.tar"

#: The recipe of a run, in its folder.
RECIPE = "recipe.json"

_T = TypeVar("_T")


@dataclass
class Run:
    """
    What all stages share, see :func:`deepinv_ud2m.training.distill`.

    ``missing`` is a list in a run that is only planned: it gets a message of all that is not here, and random
    weights stand in for it. ``writes`` is true in the first of several processes.
    """

    recipe: Recipe
    folder: Path
    device: torch.device
    fast: bool = False
    checkpointing: bool = False
    download: bool = False
    smoke: bool = False
    verbose: bool = True
    missing: list[str] | None = field(default=None)
    writes: bool = True

    @classmethod
    def of(
        cls,
        recipe: Recipe | str | Path,
        save_path: str | Path,
        device: torch.device | str | None,
        smoke: bool = False,
        **options: Any,
    ) -> Run:
        """A run from what a user gives."""
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
        check_device(device)
        # The device of this process, before anything is put on one.
        accelerator, device = start_accelerator(torch.device(device or get_device(verbose=False)))
        recipe = recipe.miniature() if smoke else recipe
        run = cls(recipe, check_path("save_path", save_path), device, smoke=smoke, **options)
        run.writes = accelerator.is_main_process
        run.verbose = run.verbose and run.writes
        return run

    def losses(
        self, channels: int, controller: DiversityController | None = None
    ) -> tuple[list[Loss], Adversary | None]:
        """The losses of samples, and the adversary, if there is one."""

        def make(random: bool) -> tuple[list[Loss], Adversary | None]:
            setting = Setting(channels, self.device, controller, self.download, random)
            return make_losses(self.recipe.losses, setting)

        return self.get(lambda: make(self.smoke), lambda: make(True))

    def get(self, load: Callable[[], _T], stand_in: Callable[[], _T]) -> _T:
        """What is loaded, or in a run that is only planned what stands in for it."""
        try:
            return load()
        except (OSError, RuntimeError, ImportError) as error:
            if self.missing is None:
                raise
            if str(error) not in self.missing:
                self.missing.append(str(error))
            return stand_in()


class Prepared(NamedTuple):
    """
    A stage that is ready: its folder's name, physics with their generators, and images; ``given`` says what
    tells physics and images from others.
    """

    stage: Stage
    name: str
    pairs: list[tuple]
    train: Dataset
    held_out: Tensor
    given: dict[str, Any]


def prepare(
    run: Run,
    prior: Any,
    physics: Sequence[Physics | tuple] | None,
    images: Any,
    initial: Initializer | None,
    weights: str | Path | None,
) -> tuple[UD2M, list[Prepared]]:
    """
    The sampler before training, and all stages: what is wrong with the last one is told before any is
    trained.

    The arguments are those of :func:`deepinv_ud2m.training.distill`.
    """
    recipe = run.recipe
    prior = recipe.prior if prior is None else prior
    if prior is None:
        raise ValueError("prior must be given, or be named by the recipe")
    _check_physics(physics, recipe)
    _check_images(images)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if wrong := [stage.accumulate for stage in recipe.stages if stage.accumulate % processes]:
        raise ValueError(
            f"accumulate of each stage must be a multiple of the number of processes, {processes}, which "
            f"share the batches of a step; got {wrong[0]}"
        )
    if run.missing is None and run.writes:
        _check_folder(run)
    torch.manual_seed(recipe.seed)  # for random weights
    name, prior = _prior(run, prior, weights)
    info = getattr(prior, "prior_info", None)
    crops = _crops(images, recipe, info) if isinstance(images, str | Path) else {}
    stages = []
    for number, stage in enumerate(recipe.stages):
        train, held_out = _data(images, recipe, stage, info, crops)
        pairs = _physics(physics, recipe, stage, tuple(held_out.shape[1:]), run.device)
        for pair in pairs if physics else []:
            _check_measures(pair, held_out[:1].to(run.device))
        # Physics whose parameters are drawn have those of the last draw.
        used = [one if generator is None else (type(one).__name__, generator) for one, generator in pairs]
        given = {"physics": identity(used), "images": [count_images(train), identity(held_out)]}
        stages.append(Prepared(stage, f"{number}_{stage.stage}", pairs, train, held_out, given))
    run.losses(held_out.shape[1])
    # Only now, as it may add an adapter to the caller's prior.
    torch.manual_seed(recipe.seed)
    model = _sampler(run, prior, _initial(run, name, images) if initial is None else initial)
    return model, stages


def _check_physics(physics: Sequence[Physics | tuple] | None, recipe: Recipe) -> None:
    if physics is None and recipe.tasks:
        return
    if not physics:
        raise ValueError("physics must be one or more, or None where the recipe has tasks")
    for one in physics:
        one = one[0] if isinstance(one, tuple) else one
        if not isinstance(one, Physics):
            raise TypeError(f"physics must be of deepinv, or pairs of one and its generator, got {one!r}")
        check_has_prox(one)


def _check_measures(pair: tuple, x: Tensor) -> None:
    physics, generator = pair
    physics.to(x.device)
    try:
        if generator is not None:
            physics.update(**generator.step(1))
        physics(x)
    except Exception as error:  # of any kind, as physics may be of the user
        name, size = type(physics).__name__, list(x.shape[1:])
        raise ValueError(f"physics: {name} cannot measure the images of a stage, {size}: {error}") from error


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


def _check_folder(run: Run) -> None:
    make_folder(run.folder)
    file, wanted = run.folder / RECIPE, json.loads(json.dumps(run.recipe.as_json()))
    there = read_json(file) if file.is_file() else wanted
    changed = [name for name in wanted if there.get(name) != wanted[name]]
    if changed:
        raise ValueError(
            f"save_path {run.folder} holds a run of another recipe, with other {', '.join(changed)}: give "
            "another folder, or delete it"
        )


def _prior(run: Run, prior: Any, weights: str | Path | None) -> tuple[str | None, Any]:
    """The prior, and its name or folder, if that was given."""
    if not isinstance(prior, str | Path):
        return None, prior
    name = str(prior)
    if name in PUBLISHED and run.smoke:
        return name, random_prior(name)
    return name, run.get(
        lambda: load_prior(name, weights=weights, download=run.download),
        lambda: random_prior(name, full_size=True),
    )


def _sampler(run: Run, prior: Any, initial: Initializer) -> UD2M:
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


def _initial(run: Run, name: str | None, images: Any) -> Initializer:
    recipe = run.recipe
    level: dict[str, Any] = {"reference_level": recipe.reference_level}
    if recipe.initial == "pseudo-inverse":
        return PseudoInverseInitializer(**level)
    if recipe.initial == "ram":
        ram = run.get(lambda: _ram(run.smoke, run.download), lambda: dinv.models.RAM(pretrained=False))
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


def _ram(smoke: bool, download: bool) -> nn.Module:
    """deepinv's RAM. It would download without being asked, and unpickle what it gets."""
    if smoke:
        return dinv.models.RAM(pretrained=False)
    # The name is deepinv's: it finds the file there, too.
    needs = "the weights of deepinv's RAM are not here"
    file = cached_download(_RAM_URL, needs, "about 140 MB", "set download=True", download)
    return dinv.models.RAM(pretrained=str(file))


def _crops(folder: str | Path, recipe: Recipe, info: PriorInfo | None) -> dict[tuple, tuple]:
    """By size and scale: crops to train with, and those of the photographs held out, the same for all."""
    channels, crops = getattr(info, "channels", 3), {}
    sizes: set[tuple[int, float]] = set()
    for stage in recipe.stages:
        if stage.size is None:
            raise ValueError(f"size of the stage {stage.stage!r} must be given, for crops of photographs")
        sizes.add((stage.size, stage.max_scale))
    held: int | list[str] = recipe.validation_images
    # The photographs that are held out have room for all crops.
    for size, max_scale in sorted(sizes, reverse=True):
        if recipe.resized:
            read: ResizedCrops | RandomCrops = ResizedCrops(folder, size, 1, channels)
        else:
            read = RandomCrops(folder, size, 1, channels, max_scale, skip_small=True)
        if isinstance(held, int) and held < len(read.labels):  # or else hold_out says so
            held = read.labels[-held:]
        crops[size, max_scale] = read, read.hold_out(held)
    return crops


def _data(
    images: Any, recipe: Recipe, stage: Stage, info: PriorInfo | None, crops: dict
) -> tuple[Dataset, Tensor]:
    """Training images, and those that are held out."""
    held, batch = recipe.validation_images, stage.batch_size * stage.accumulate
    if crops:
        read, held_out = crops[stage.size, stage.max_scale]
        train = copy.copy(read)
        # Crops have no order. Of a long epoch, a run that goes on would read and drop all it has had.
        train.num = min(stage.steps, _EPOCH) * batch
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


def count_images(train: Any) -> int:
    """Photographs, where the images are crops of them."""
    return len(train.labels if hasattr(train, "labels") else train)


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
