"""Recipes: all numbers of a distillation, as YAML holds them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from deepinv_ud2m.checks import LARGEST, SMALLEST, check_count, check_number, check_path
from deepinv_ud2m.physics.tasks import TASKS
from deepinv_ud2m.schedule import check_sigmas
from deepinv_ud2m.training.objectives import check_losses
from deepinv_ud2m.training.stages import STAGES

INITIAL = ("learned", "wiener", "pseudo-inverse", "ram")


@dataclass
class Stage:
    """
    One stage of training.

    :param str stage: ``"initial"``, ``"single"`` or ``"end_to_end"``.
    :param int steps: optimiser steps.
    :param int batch_size: images per batch.
    :param int, None size: side of the images: crops of a folder of photographs. Other images are as they are.
    :param float max_scale: largest reduction of these crops (:class:`deepinv_ud2m.data.RandomCrops`). Those
        held out are reduced by it, where there is room (default: 4).
    :param float lr: learning rate of the networks.
    :param float lr_scalars: that of the multipliers of rho, delta and lambda (default: 3e-3).
    :param float, None lr_initial: that of the initial estimate (default: ``lr``).
    :param int accumulate: batches per optimiser step, a multiple of the number of processes (default: 1).

    |sep|

    :Examples:

        >>> from deepinv_ud2m.training import Stage
        >>> Stage("single", steps=1000, batch_size=16, size=64).lr
        0.0004
    """

    stage: str
    steps: int
    batch_size: int
    size: int | None = None
    lr: float = 4e-4
    lr_scalars: float = 3e-3
    lr_initial: float | None = None
    accumulate: int = 1
    max_scale: float = 4.0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {list(STAGES)}, got {self.stage!r}")
        for name in ("steps", "batch_size", "accumulate"):
            check_count(name, getattr(self, name))
        if self.size is not None:
            check_count("size", self.size)
        check_number("max_scale", self.max_scale, low=1)
        for name in ("lr", "lr_scalars", "lr_initial"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0)


@dataclass
class Recipe:
    r"""
    All numbers of a distillation.

    The sampler:

    :param list[float] delta: multipliers of the noise before training, one for each of the K iterations.
    :param list[float] rho: multipliers of the coupling, likewise.
    :param list[float], None sigmas: levels of the sampler, strictly decreasing.
    :param int, None num_steps: or their number N; they are those of :class:`deepinv_ud2m.VPSchedule` then.
    :param float eta: randomness of its steps, in [0, 1] (default: 1).
    :param float, None nominal_rmse: see :class:`deepinv_ud2m.UD2M`. It needs a learned initial estimate.
    :param str initial: the initial estimate: ``"learned"`` by a copy of the network of the prior (default),
        or that of the Wiener filter, ``"wiener"``, the ``"pseudo-inverse"``, or ``"ram"``, which is trained
        too.
    :param float reference_level: see :class:`deepinv_ud2m.initializers.Initializer` (default: 0.08).
    :param bool fit_wiener: fit the Wiener filter to the images, rather than that of photographs (default:
        ``False``).
    :param str, None prior: name of the prior, where none is given.
    :param int rank: of the LoRA on the prior; 0 trains all its weights (default: 0).
    :param str, None targets: layers of the LoRA, ``"all-convs"`` (default), or ``None``: the attention.
    :param list[str] train_prior: names of layers of the prior that are trained besides, such as its output.

    The data:

    :param list[str] tasks: names of :data:`deepinv_ud2m.physics.TASKS`, where no physics is given.
    :param list[float] sigma_y: range of the noise of their measurements, drawn for each image.
    :param bool resized: crops are of images that are reduced until they just have room, read when they are
        needed, subfolders included; or crops at random scales of a folder that is kept in memory (default).
    :param int validation_images: images that are held out (default: 8).
    :param int validation_samples: samples of each (default: 8).

    Training:

    :param list[Stage] stages: the stages, in order.
    :param list[dict] losses: of the stages of samples: ``{loss: energy}``, with ``patch_size``, ``features``
        and ``weight``; ``{loss: l2}``, with ``of: noise``; ``{loss: perceptual, network: lpips-vgg}``;
        ``{loss: adversarial}``, with ``penalty_weight`` and others of
        :mod:`deepinv_ud2m.training.objectives` (default: one energy score, of pixels).
    :param str states: noise levels of the states: ``"log-uniform"``, with a share of the first level of the
        sampler (default), or ``"uniform"`` in the times of the diffusion, as in the paper.
    :param float kappa: exponent of the controller of diversity, 0 for none (default: 0.5).
    :param int evaluations: evaluations in each stage of samples; the controller acts after each (default: 8).
    :param str schedule: of the learning rates, ``"cosine"`` after a warm-up (default), or ``"constant"``.
    :param list[float] betas: of AdamW (default: 0.9 and 0.99).
    :param float weight_decay: of AdamW (default: 0.01).
    :param float, None grad_clip: largest norm of the gradient (default: 1).
    :param float ema_decay: of the moving average of the weights (default: 0.999).
    :param list[float] factors: factors on all :math:`\delta_k`, of which one is kept at the end: of those
        whose energy score is within 1 % of the best, the one whose spread-skill ratios are nearest to 1.
    :param int seed: of the run (default: 0).
    :raises ValueError: for values that do not fit.

    |sep|

    :Examples:

        >>> from deepinv_ud2m.training import Recipe
        >>> recipe = Recipe.read("default", tasks=["sr4", "jpeg-10"])
        >>> recipe.tasks, recipe.kappa
        (['sr4', 'jpeg-10'], 0.5)
    """

    stages: list[Stage]
    delta: list[float]
    rho: list[float]
    sigmas: list[float] | None = None
    num_steps: int | None = None
    eta: float = 1.0
    nominal_rmse: float | None = None
    initial: str = "learned"
    reference_level: float = 0.08
    fit_wiener: bool = False
    prior: str | None = None
    rank: int = 0
    targets: str | None = "all-convs"
    train_prior: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    sigma_y: list[float] = field(default_factory=lambda: [0.005, 0.1])
    resized: bool = False
    validation_images: int = 8
    validation_samples: int = 8
    losses: list[dict] = field(default_factory=lambda: [{"loss": "energy"}])
    states: str = "log-uniform"
    kappa: float = 0.5
    evaluations: int = 8
    schedule: str = "cosine"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.01
    grad_clip: float | None = 1.0
    ema_decay: float = 0.999
    factors: list[float] = field(default_factory=lambda: [0.9, 1.0, 1.1])
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.delta) != len(self.rho):
            raise ValueError(f"delta and rho must have one value per iteration, got {self.delta}, {self.rho}")
        if (self.sigmas is None) == (self.num_steps is None):
            raise ValueError("either sigmas or num_steps must be given")
        states, schedules = ("log-uniform", "uniform"), ("cosine", "constant")
        for name, known in {"initial": INITIAL, "states": states, "schedule": schedules}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        self._check_numbers()
        if self.nominal_rmse is not None and self.initial != "learned":
            raise ValueError("nominal_rmse needs initial: learned, an estimate that predicts its error")
        unknown = sorted({*self.tasks} - TASKS.keys())
        if unknown:
            raise ValueError(f"tasks must be of {sorted(TASKS)}, got {unknown}")
        check_losses(self.losses)
        of_noise = any(loss.get("of") == "noise" for loss in self.losses)
        if of_noise and any(stage.stage == "end_to_end" for stage in self.stages):
            raise ValueError("losses: l2 of noise needs states of one level, not the stage end_to_end")

    def _check_numbers(self) -> None:
        for name in ("stages", "delta", "factors"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be one or more, got none")
        for name in ("delta", "rho", "factors"):
            for value in getattr(self, name):
                check_number(name, value, SMALLEST, LARGEST)
        if self.sigmas is not None:
            check_sigmas(self.sigmas)
        for name in ("sigma_y", "betas"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} must be two numbers, got {getattr(self, name)}")
        if not 0 < self.sigma_y[0] <= self.sigma_y[1] < math.inf:
            raise ValueError(f"sigma_y must be a range of positive levels, got {self.sigma_y}")
        for name in ("eta", "ema_decay"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("reference_level", "kappa", "weight_decay"):
            check_number(name, getattr(self, name), low=0)
        for beta in self.betas:
            check_number("betas", beta, 0, 1)
        if self.grad_clip is not None:
            check_number("grad_clip", self.grad_clip, positive=True)
        if self.rank < 0:
            raise ValueError(f"rank must be >= 0, got {self.rank}")
        for name in ("validation_images", "evaluations"):
            check_count(name, getattr(self, name))
        if check_count("validation_samples", self.validation_samples) < 2:
            raise ValueError("validation_samples must be at least 2, for a spread, got 1")

    @classmethod
    def read(cls, file: str | Path, **changes: Any) -> Recipe:
        """
        A recipe from a YAML file.

        :param str, pathlib.Path file: the file, or the name of a recipe that ships: ``"default"``.
        :param changes: values in the place of those of the file.
        :raises ValueError: for keys that are unknown or missing, or values of other types; it names them.
        """
        try:
            import yaml
            from jsonargparse import ArgumentParser
        except ImportError as error:
            raise ImportError("recipes in YAML need jsonargparse: pip install jsonargparse") from error
        check_path("recipe", file)
        shipped = files("deepinv_ud2m.training") / "recipes" / f"{file}.yaml"
        path = Path(str(shipped)) if shipped.is_file() else Path(file)
        if not path.is_file():
            raise ValueError(
                f"recipe must be 'default', a Recipe or a YAML file, got {str(file)!r}, which is no file"
            )
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            text = yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes})
            return cls(**vars(parser.instantiate_classes(parser.parse_string(text))))
        except Exception as error:  # jsonargparse's own and those of its parsers
            raise ValueError(f"{path} is no recipe: {error}") from error

    def miniature(self) -> Recipe:
        """The same with two steps of two small images in each stage, to try whether all of it runs."""
        size = 32 if self.stages[0].size else None
        stages = [replace(stage, steps=2, batch_size=2, size=size) for stage in self.stages]
        small = replace(self, stages=stages, evaluations=1, factors=[1.0])
        return replace(small, validation_images=2, validation_samples=2)

    def as_json(self) -> dict:
        """The recipe, as JSON holds it."""
        return asdict(self)
