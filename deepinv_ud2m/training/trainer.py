r"""Distillation: training an unfolded denoiser to draw from :math:`p(x \mid y, x_s)`.

One step (Mbakam et al. 2025, section 4): images x from the data, measurements y of them through one of
the physics, a level s per image, states :math:`x_s = x + s \varepsilon`, and draws
:math:`\hat x = L(y, x_s, s)`. What is trainable in the unfolded denoiser (LoRA, the logarithms of rho,
lambda and delta, an initialiser) follows the gradient of the losses, a discriminator that of its own.

This is the one file that builds on deepinv's trainers.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from deepinv.loss import Loss
from deepinv.loss.metric import Metric
from deepinv.physics import Physics
from deepinv.training import AdversarialOptimizer, AdversarialTrainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from deepinv_ud2m.batching import RepeatedPhysics, is_shared, repeat_batch
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.lora import has_merged_lora, lora_parameters
from deepinv_ud2m.metrics import energy_score
from deepinv_ud2m.posterior_mean import PosteriorMeanInitializer
from deepinv_ud2m.pretrained import (
    describe,
    load_trained_state_dict,
    save_pretrained,
    trained_state_dict,
)
from deepinv_ud2m.proximal import check_has_prox, expand_scalar, noise_level
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.schedule import VPSchedule, check_levels
from deepinv_ud2m.training.checkpoint import read_checkpoint, write_checkpoint
from deepinv_ud2m.training.figures import plot_curves, plot_samples
from deepinv_ud2m.training.losses import condition
from deepinv_ud2m.training.parallel import gather, rank, share, share_buffers, sum_gradients, world_size
from deepinv_ud2m.training.randomness import BatchStream, find_generators, seed_all
from deepinv_ud2m.unfolded import UnfoldedDenoiser

# Images may leave [0, 1] by that much: resampling overshoots.
_MARGIN = 0.2

# Kinds of randomness, so that no two share a seed.
_STEP, _DATA, _EVALUATION, _DISCRIMINATOR = range(4)


def parameter_groups(
    unfolded: UnfoldedDenoiser,
    lr: float = 1e-4,
    lr_scalars: float = 1e-3,
    lr_initializer: float = 1e-5,
    weight_decay: float = 0.01,
) -> list[dict]:
    """
    What is trainable in an unfolded denoiser, as parameter groups of an optimiser.

    :param deepinv_ud2m.UnfoldedDenoiser unfolded: the unfolded denoiser.
    :param float lr: learning rate of the adapter and of whatever else of the prior is trainable
        (default: 1e-4, as in the paper's Table 9).
    :param float lr_scalars: of the logarithms of rho, lambda and delta (default: 1e-3).
    :param float lr_initializer: of an initialiser, RAM say (default: 1e-5, Table 9).
    :param float weight_decay: of all but the scalars (default: 0.01, Table 9).
    :returns: the groups that have parameters, each with its ``name``.
    """
    scalars = {"log_rho", "log_delta", "log_lambda"}
    trainable = {n: p for n, p in unfolded.named_parameters() if p.requires_grad}
    rates = {"prior": lr, "scalars": lr_scalars, "initializer": lr_initializer}
    groups = {name: [] for name in rates}
    for name, parameter in trainable.items():
        in_initializer = name.startswith("initializer.")
        group = "scalars" if name in scalars else "initializer" if in_initializer else "prior"
        groups[group].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates[name],
            "weight_decay": 0.0 if name == "scalars" else weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]


@dataclass(kw_only=True)
class DistillationTrainer(AdversarialTrainer):
    r"""
    Trains the unfolded denoiser of a :class:`deepinv_ud2m.UD2M`; evaluation runs the full sampler.

    It is deepinv's :class:`deepinv.training.AdversarialTrainer`, with its data (``train_dataloader``
    gives images x, or x and y with ``online_measurements=False``), physics, ``physics_generator``,
    metrics, loggers and :meth:`test`. It counts in optimiser steps rather than epochs: ``steps``,
    ``eval_interval`` and ``ckp_interval``; ``epochs`` and ``max_batch_steps`` are not used. A learning
    rate per step (``lr_schedule``) stands in place of ``scheduler``, and ``resume`` in place of
    ``ckpt_pretrained``.

    Several physics (with one loader for all, or one each) are the multi-operator setting: each is used
    once, in random order, before any is used again.

    A run is repeatable: all that is random in a step follows from ``seed`` and the number of the step
    (the global random generators are seeded by it). With ``save_path``, a checkpoint is written every
    ``ckp_interval`` steps, and a run that was stopped at any moment goes on from it when it is started
    again with the same arguments; on a CPU it ends with the same bits as one that was never stopped.

    Under ``torchrun``, after ``torch.distributed.init_process_group``, processes share the batches of
    each step, ``accumulate`` in number, and those of evaluations; the first one writes and logs.
    The run is the same, up to the rounding of sums, for any number of processes, and may go on with
    another number. Each loads all batches and uses its own: ``num_workers`` should keep up.

    When training ends the model holds the moving average of what was trained, which is also what is
    evaluated and exported.

    :param deepinv_ud2m.UD2M model: the sampler, with an :class:`deepinv_ud2m.UnfoldedDenoiser`; what
        has ``requires_grad`` in it is trained. Put LoRA on its prior first
        (:func:`deepinv_ud2m.add_lora`).
    :param deepinv.physics.Physics, list physics: one or several.
    :param torch.utils.data.DataLoader, list train_dataloader: images.
    :param Loss, list[Loss] losses: losses of the draws (:mod:`deepinv_ud2m.training.losses`), which
        are added up; any deepinv loss of ``x`` and ``x_net`` will do.
    :param Loss, list[Loss] losses_d: losses of the discriminator.
    :param torch.nn.Module D: the discriminator, if there is one.
    :param torch.optim.Optimizer, AdversarialOptimizer optimizer: of :func:`parameter_groups`, with a
        discriminator both. AdamW by default, as in the paper's Table 9.
    :param Callable lr_schedule: factor on the learning rates as a function of the step, such as
        :func:`deepinv_ud2m.training.warmup_cosine`; constant by default.
    :param int steps: optimiser steps of the whole run (default: 10000).
    :param Callable levels: ``levels(batch_size) -> Tensor [batch_size]`` draws the levels s of the
        states; those of :meth:`deepinv_ud2m.VPSchedule.training_levels` by default.
    :param bool end_to_end: train the samples of the whole sampler, through all of its levels, rather
        than draws at one random level (default: ``False``). It takes N times the work of a step and
        suits the end of a training: a proper score of the samples is what the sampler is used for, while
        draws at each level may be good and their composition in few levels still be off. Losses that
        need one level, such as the adversarial one, are for draws at a level.
    :param Sequence physics_levels: for each physics the levels of the sampler that it is trained, with
        ``end_to_end``, and evaluated with, or ``None`` for those of ``model``: a physics that leaves
        much open may take more levels, with the same weights (default: ``None``, those of ``model``
        for all).
    :param int accumulate: batches per optimiser step (default: 1); processes share them, so it must be a
        multiple of their number.
    :param bool checkpointing: keep only the input of each unfolded iteration for the backward pass
        (default: ``False``).
    :param bool compile: run the prior, and the network of a
        :class:`deepinv_ud2m.PosteriorMeanInitializer`, through :func:`torch.compile` in training steps;
        evaluation does without. The first step takes a minute or two then (default: ``False``).
    :param float ema_decay: decay of the moving average per step, warmed up (default: 0.999).
    :param int max_skipped: steps in a row without finite loss and gradient, of the model or of the
        discriminator, each of them skipped, after which training stops (default: 10).
    :param int eval_samples: samples of each measurement in evaluation (default: 4).
    :param Mapping sample_metrics: metrics of the samples, ``name: f(samples, x) -> Tensor [B]``, smaller
        is better; the first decides which weights are the best. The energy score by default.
    :param int eval_interval: steps between evaluations, if there is an ``eval_dataloader``
        (default: 1000).
    :param int ckp_interval: steps between checkpoints (default: 500).
    :param int log_interval: steps whose mean is one point of the history (default: 50).
    :param str, pathlib.Path save_path: folder for ``checkpoint.pt``, ``history.json``, ``curves.png``,
        with ``plot_images`` pictures of evaluations, and the exported models ``best`` and ``final``
        (default: ``None``, nothing is written).
    :param bool resume: go on from the checkpoint in ``save_path``, if there is one (default: ``True``).
    :param Mapping settings: what else makes a run another one and the trainer cannot see, such as the
        ranges of random operators; a checkpoint with other settings is refused. Of what JSON holds
        (default: nothing).
    :param int seed: of the run (default: 0).
    :raises TypeError, ValueError: for arguments that cannot work, before anything is computed.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora, load_prior
        >>> from deepinv_ud2m.data import mnist_digits
        >>> from deepinv_ud2m.training import DistillationTrainer, L2Loss
        >>> prior = load_prior("mnist")
        >>> layers = add_lora(prior)
        >>> trainer = DistillationTrainer(
        ...     model=UD2M(UnfoldedDenoiser(prior, num_iterations=1)),
        ...     physics=dinv.physics.Inpainting((1, 32, 32), mask=0.3,
        ...                                     noise_model=dinv.physics.GaussianNoise(0.05)),
        ...     train_dataloader=torch.utils.data.DataLoader(mnist_digits(num=4), batch_size=2),
        ...     losses=L2Loss(), steps=1, device="cpu", verbose=False,
        ... )
        >>> model = trainer.train()
    """

    optimizer: torch.optim.Optimizer | AdversarialOptimizer | None = None
    losses: Loss | list[Loss] = None
    lr_schedule: Callable[[int], float] | None = None
    steps: int = 10_000
    levels: Callable[[int], Tensor] | None = None
    end_to_end: bool = False
    physics_levels: Sequence[Sequence[float] | None] | None = None
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False
    ema_decay: float = 0.999
    max_skipped: int = 10
    eval_samples: int = 4
    sample_metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None
    eval_interval: int = 1000
    ckp_interval: int = 500
    log_interval: int = 50
    save_path: str | Path | None = None
    resume: bool = True
    settings: Mapping | None = None
    seed: int = 0
    online_measurements: bool = True
    optimizer_step_multi_dataset: bool = False
    compute_train_metrics: bool = False
    freq_update_progress_bar: int = 10
    non_blocking_transfers: bool = False
    history: dict[str, list[tuple[int, float]]] = field(init=False, default_factory=dict)

    def __post_init__(self):
        self._check()
        super().__post_init__()
        self.model.to(self.device)
        self.physics = [physics.to(self.device) for physics in _as_list(self.physics)]
        self.losses, self.losses_d = _as_list(self.losses), _as_list(self.losses_d)
        self.physics_generator = self.physics_generator and _as_list(self.physics_generator)
        self.metrics = _as_list(self.metrics)
        self.train_dataloader = self._loader_of_each(self.train_dataloader)
        self.eval_dataloader = self._loader_of_each(self.eval_dataloader)
        if self.sample_metrics is None:
            self.sample_metrics = {"energy score": energy_score} if self.eval_samples > 1 else {}
        if self.levels is None:
            self.levels = VPSchedule().training_levels
        self._samplers = [
            self.model if levels is None else self._sampler_with(levels)
            for levels in self.physics_levels or [None] * len(self.physics)
        ]
        self.folder = Path(self.save_path) if self.save_path else None
        self.num_draws = max(getattr(loss, "num_samples", 1) for loss in self.losses)
        self.unfolded.checkpointing = self.checkpointing
        if self.compile:
            self.unfolded.denoiser.compile()
            if isinstance(self.unfolded.initializer, PosteriorMeanInitializer):
                self.unfolded.initializer.network.compile()
        self._mode = self._condition_mode()
        self._set_up_optimizers()

    # ---------------------------------------------------------------------------------------------
    # Setting up

    @property
    def unfolded(self) -> UnfoldedDenoiser:
        """The unfolded denoiser that is trained."""
        return self.model.unfolded

    @property
    def writes(self) -> bool:
        """Whether this process writes to ``save_path``: the first one, if there is a folder."""
        return self.folder is not None and rank() == 0

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained, those of the discriminator apart."""
        return [parameter for parameter in self.unfolded.parameters() if parameter.requires_grad]

    def _check(self) -> None:
        if not isinstance(self.model, UD2M) or not isinstance(self.model.unfolded, UnfoldedDenoiser):
            raise TypeError(
                f"model must be UD2M(UnfoldedDenoiser(prior)), got {type(self.model).__name__}"
            )
        factors = lora_parameters(self.model.unfolded)
        if has_merged_lora(self.model.unfolded) and any(factor.requires_grad for factor in factors):
            raise ValueError(
                "model has a merged adapter, whose factors get no gradient: load it with "
                "from_pretrained(..., merge=False), or call unmerge_lora(model.unfolded.denoiser)"
            )
        if self.save_path and Path(self.save_path).exists() and not Path(self.save_path).is_dir():
            raise ValueError(f"save_path must be a folder, got the file {self.save_path}")
        for name in ("physics", "train_dataloader"):
            if not _as_list(getattr(self, name)):
                raise ValueError(f"{name} must be given, one or a list, got {getattr(self, name)!r}")
        if not self.losses:
            raise ValueError("losses is empty: give at least one loss, such as L2Loss()")
        for name in (
            "steps", "accumulate", "max_skipped", "eval_samples", "eval_interval", "ckp_interval",
            "log_interval", "step_ratio_D",
        ):  # fmt: skip
            check_count(name, getattr(self, name))
        for name in ("levels", "lr_schedule"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise TypeError(f"{name} must be a function, see its description, got {given!r}")
        for name in ("losses", "losses_d"):
            for loss in _as_list(getattr(self, name)):
                if not isinstance(loss, Loss):
                    raise TypeError(
                        f"{name} must be of deepinv's Loss, such as those of deepinv_ud2m.training, "
                        f"got {type(loss).__name__}"
                    )
        for name, instead in (
            ("scheduler", "lr_schedule, a factor per step"),
            ("ckpt_pretrained", "save_path and resume=True"),
            ("early_stop", "save_path, whose folder best holds the best model"),
        ):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not available: use {instead}")
        if self.accumulate % world_size():
            raise ValueError(
                f"accumulate must be a multiple of the number of processes, {world_size()}, which share "
                f"the batches of a step; got {self.accumulate}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if (self.D is None) != (not self.losses_d):
            raise ValueError("D and losses_d belong together: give both or none")
        if self.end_to_end and self.D is not None:
            raise ValueError(
                "end_to_end has no level to give a discriminator: use losses of the samples, such as "
                "EnergyScoreLoss, or end_to_end=False"
            )
        self._check_physics_levels()
        if self.mixed_precision in (True, "float16", "fp16", torch.float16):
            raise ValueError("mixed_precision must be 'bfloat16' or False, got float16")
        if self.compute_eval_losses or self.compute_train_metrics:
            raise ValueError(
                "compute_eval_losses and compute_train_metrics are not available: losses are of draws "
                "at random levels, metrics of samples"
            )
        if not self.trained:
            raise ValueError(
                "model has nothing to train: put LoRA on its prior with add_lora(denoiser) before"
            )
        if self.eval_dataloader and self.eval_samples == 1 and not _as_list(self.metrics):
            raise ValueError(
                "eval_samples = 1 leaves no energy score to tell the best weights by: take more, or "
                "give metrics"
            )
        for physics in _as_list(self.physics):
            check_has_prox(physics)
        generators = _as_list(self.physics_generator)
        if generators and len(generators) != len(_as_list(self.physics)):
            raise ValueError(
                f"physics_generator must be one per physics, {len(_as_list(self.physics))}, "
                f"got {len(generators)}"
            )

    def _sampler_with(self, levels: Sequence[float]) -> UD2M:
        names = ("eta", "output_range", "reference_error", "sigma_y")
        shared = {name: getattr(self.model, name) for name in names}
        return UD2M(self.unfolded, levels=levels, **shared)

    def _check_physics_levels(self) -> None:
        if self.physics_levels is None:
            return
        if not self.end_to_end:
            raise ValueError("physics_levels are of whole samplers: they need end_to_end=True")
        if len(self.physics_levels) != len(_as_list(self.physics)):
            raise ValueError(
                f"physics_levels must be one per physics, {len(_as_list(self.physics))}, "
                f"got {len(self.physics_levels)}"
            )
        for levels in self.physics_levels:
            try:
                if levels is not None:
                    check_levels(levels)
            except ValueError as error:
                raise ValueError(f"physics_levels: {error}") from error

    def _check_batch(self, batch) -> None:
        """Images that cannot be trained on would fail far from here, or train something else."""
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
        if self.unfolded.prior_info is not None:
            self.unfolded.prior_info.check_images(x.shape)

    def _loader_of_each(self, loaders) -> list | None:
        """One loader per physics; a single one serves all."""
        if loaders is None:
            return None
        loaders, number = _as_list(loaders), len(self.physics)
        if len(loaders) not in (1, number):
            raise ValueError(
                f"data loaders must be one, or one per physics ({number}), got {len(loaders)}"
            )
        for loader in loaders:
            if len(loader) == 0:
                raise ValueError(
                    "a data loader has no batch: its dataset is empty, or smaller than a batch with "
                    "drop_last=True"
                )
        return loaders * number if len(loaders) == 1 else loaders

    def _condition_mode(self) -> str:
        """How the adversarial losses want the measurement shown to the discriminator."""
        modes = {loss.mode for loss in [*self.losses, *self.losses_d] if hasattr(loss, "mode")}
        if len(modes) > 1:
            raise ValueError(f"the adversarial losses must have one mode, got {sorted(modes)}")
        return modes.pop() if modes else "tikhonov"

    def _set_up_optimizers(self) -> None:
        optimizer = self.optimizer
        if optimizer is None:
            optimizer = torch.optim.AdamW(parameter_groups(self.unfolded))
            if self.D is not None:
                of_d = torch.optim.AdamW(self.D.parameters(), lr=1e-4, weight_decay=0.01)
                optimizer = AdversarialOptimizer(optimizer, of_d)
        if (self.D is not None) != isinstance(optimizer, AdversarialOptimizer):
            raise TypeError(
                "optimizer must be an AdversarialOptimizer with a discriminator, and a torch optimizer "
                f"without; got {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        both = [optimizer.G, optimizer.D] if self.D is not None else [optimizer]
        self.optimizer_g, self.optimizers = both[0], both
        if self.D is not None:
            self.D.to(self.device)
        self._check_held("the model", self.trained, self.optimizer_g)
        if self.D is not None:
            self._check_held("the discriminator", self.D.parameters(), both[1])
        factor = self.lr_schedule or (lambda step: 1.0)
        self.schedulers = [LambdaLR(optimizer, factor) for optimizer in both]

    def _check_held(self, whose: str, parameters, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = sum(id(p) not in held for p in parameters)
        if missing:
            raise ValueError(
                f"optimizer does not hold {missing} of the trainable parameters of {whose}: make it "
                "after add_lora, of parameter_groups(model.unfolded)"
            )

    def setup_train(self, train: bool = True, **kwargs) -> None:
        """deepinv's set-up of metrics and loggers, without the folder named by the second."""
        save_path, self.save_path = self.save_path, None
        super().setup_train(train=train, **kwargs)
        self.save_path = save_path
        if not train:
            return
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)  # found out now rather than at a checkpoint
        self.step_start, self.skipped, self._skipped_in_a_row = 0, 0, 0
        self._last_good = 0, []
        self.best = math.inf
        self.history = defaultdict(list)
        self._sums, self._counts = defaultdict(float), defaultdict(int)
        self._ema = [parameter.detach().clone() for parameter in self.trained]
        self._generators = find_generators(
            self.physics, self.physics_generator, self.losses, self.losses_d, self.levels
        )
        distinct = {id(loader): loader for loader in self.train_dataloader}
        streams = {
            key: BatchStream(loader, [self.seed, _DATA, i], self._check_batch)
            for i, (key, loader) in enumerate(distinct.items())
        }
        self._streams = [streams[id(loader)] for loader in self.train_dataloader]
        if self.folder and self.resume and share((self.folder / "checkpoint.pt").is_file()):
            self._load(self.folder / "checkpoint.pt")

    def load_model(self, ckpt_pretrained=None, strict: bool = True) -> None:
        """deepinv's way to resume, which unpickles; not used."""

    # ---------------------------------------------------------------------------------------------
    # Training

    def train(self) -> UD2M:
        """
        Train, from the checkpoint in ``save_path`` where there is one.

        :returns: the model, with the moving average of what was trained.
        :raises RuntimeError: after ``max_skipped`` steps in a row without finite loss; the state before
            them is in the checkpoint (but for updates of a discriminator in the first of them).
        :raises ValueError: if the checkpoint is damaged or of another run; it is left as it is.
        """
        self.setup_train()
        bar = tqdm(
            initial=self.step_start,
            total=self.steps,
            desc="Distillation",
            disable=not (self.verbose and self.show_progress_bar and rank() == 0),
        )
        step = self.step_start
        try:
            for step in range(self.step_start, self.steps):
                logs = self.train_step(step)
                self._log(step, logs, bar)
                if self.eval_dataloader and (step + 1) % self.eval_interval == 0:
                    self._evaluate_and_keep_the_best(step + 1)
                if (step + 1) % self.ckp_interval == 0:
                    self._save(step + 1)
        except KeyboardInterrupt:
            # A step cut short may have moved a part of the weights: nothing is saved here.
            bar.write(
                f"interrupted at step {step}"
                + (": start again to go on from the last checkpoint" if self.folder else "")
            )
            raise
        finally:
            bar.close()
        return self._finish()

    def train_step(self, step: int) -> dict[str, float]:
        """
        One optimiser step; skipped if the loss or its gradient is not finite.

        :param int step: number of the step, which fixes its randomness.
        :returns: losses, gradient norms and learning rate, by name.
        """
        logs = defaultdict(float)
        places = self._places()
        self.optimizer_g.zero_grad(set_to_none=True)
        batches, finite = [], True
        for i in range(self.accumulate):
            micro_step = step * self.accumulate + i
            if i % world_size() != rank() or not finite:
                next(self._streams[self._operator(micro_step)])  # keeps all at the same place
                continue
            loss, batch, terms = self._backward(micro_step, step)
            for name, value in terms.items():
                logs[name] += value / self.accumulate
            batches.append(batch)
            finite = math.isfinite(loss)
        logs, finite = _total(logs), all(gather(finite))
        if finite:
            sum_gradients(self.trained)
            norm = nn.utils.clip_grad_norm_(self.trained, self.grad_clip or math.inf).item()
            logs["gradient norm"] = norm
            finite = math.isfinite(norm)
        # The discriminator first: where it is not finite, the model stays as it is.
        for i in range(self.step_ratio_D if finite and self.D is not None else 0):
            terms, finite = self._train_discriminator(batches, i)
            logs |= terms
            if not finite:
                break
        if finite:
            self.optimizer_g.step()
            self._update_average(step)
        logs["learning rate"] = self.optimizer_g.param_groups[0]["lr"]
        for scheduler in self.schedulers:
            scheduler.step()
        if not finite:
            self._skip(step, places)
            return {}
        self._skipped_in_a_row = 0
        return logs

    def _backward(self, micro_step: int, step: int) -> tuple[float, dict, dict[str, float]]:
        """Losses of one batch, and their gradients; the draws serve the discriminator too."""
        seed_all([self.seed, _STEP, micro_step], self._generators)
        operator = self._operator(micro_step)
        x, y, physics = self.get_samples(self._streams, operator)
        batch = self.draw(x, y, physics, operator) | {"step": step, "micro_step": micro_step}
        with self.get_autocast_context():
            losses = [self._loss(loss, batch) for loss in self.losses]
        total = sum(losses)
        if total.isfinite():
            (total / self.accumulate).backward()
        terms = {"loss": total.item()}
        if len(losses) > 1:
            terms |= dict(zip(_names(self.losses), (loss.item() for loss in losses), strict=True))
        batch["samples"], batch["x_net"] = batch["samples"].detach(), batch["x_net"].detach()
        return total.item(), batch, terms

    def draw(self, x: Tensor, y: Tensor, physics: Physics, operator: int = 0) -> dict:
        r"""
        States at random levels, and draws from the unfolded denoiser.

        :param torch.Tensor x: images, `[B, C, H, W]`.
        :param torch.Tensor y: their measurements.
        :param deepinv.physics.Physics physics: the physics.
        :param int operator: its place among those of the trainer, which tells its ``physics_levels``.
        :returns: what losses are called with: ``x, x_net, samples, x_s, sigma, y, physics, condition``.
        """
        draws, stated = self.num_draws, self.model.sigma_y
        level = noise_level(physics, stated)
        if not bool((torch.as_tensor(level) > 0).all()):
            raise ValueError(
                f"physics must have noise of a positive level, got {torch.as_tensor(level).tolist()}; "
                "a ZeroNoise stands for a small floor"
            )
        repeated = physics
        if stated is not None or (draws > 1 and not is_shared(physics, x, level)):
            repeated = RepeatedPhysics(physics, x, draws, level)
        with self.get_autocast_context():
            if self.end_to_end:
                drawn = self._draw_whole(x, repeat_batch(y, draws), repeated, self._samplers[operator])
            else:
                drawn = self._draw_level(x, repeat_batch(y, draws), repeated)
        samples = drawn["samples"].unflatten(0, (draws, len(x)))
        batch = {"x": x, "y": y, "physics": physics, **drawn}
        batch |= {"samples": samples, "x_net": samples[0]}
        if self.D is not None:
            batch["condition"] = condition(y, physics, self._mode, sigma_y=stated)
        return batch

    def _draw_level(self, x: Tensor, y: Tensor, physics: Physics) -> dict[str, Tensor]:
        """States of x at random levels, the levels, and draws of x from the states."""
        x_s, sigma = self._states(x)
        states = repeat_batch(x_s, self.num_draws)
        samples = self.unfolded(y, physics, states, sigma.repeat(self.num_draws))
        return {"x_s": x_s, "sigma": sigma, "samples": samples}

    def _states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States of x at random levels, and the levels."""
        sigma = self.levels(len(x)).to(x)
        return x + expand_scalar(sigma, x, "levels") * torch.randn_like(x), sigma

    def _draw_whole(self, x: Tensor, y: Tensor, physics: Physics, sampler: UD2M) -> dict[str, Tensor]:
        """The last states of chains through all levels, their level, and samples."""
        states = sampler.first_state(repeat_batch(x, self.num_draws))
        *_, (sigma, states, samples) = sampler.chain(y, physics, states)
        return {"x_s": states[: len(x)], "sigma": sigma[: len(x)], "samples": samples}

    def _loss(self, loss: Loss, batch: dict) -> Tensor:
        return loss(**batch, model=self.model, D=self.D, epoch=0).mean()

    def _train_discriminator(self, batches: list[dict], turn: int) -> tuple[dict[str, float], bool]:
        """One update; its losses, and whether they and the gradient are finite."""
        logs = defaultdict(float)
        optimizer = self.optimizers[1]
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            seed_all([self.seed, _DISCRIMINATOR, batch["micro_step"], turn], self._generators)
            with self.get_autocast_context():
                losses = [self._loss(loss, batch) for loss in self.losses_d]
            (sum(losses) / self.accumulate).backward()
            for name, loss in zip(_names(self.losses_d), losses, strict=True):
                logs[f"D {name}"] += loss.item() / self.accumulate
        logs = _total(logs)
        sum_gradients(self.D.parameters())
        share_buffers(self.D)
        norm = nn.utils.clip_grad_norm_(self.D.parameters(), self.grad_clip or math.inf)
        finite = bool(norm.isfinite())
        if finite:
            optimizer.step()
        return logs, finite

    def _operator(self, micro_step: int) -> int:
        """Each physics once in every round, in an order that follows from the round."""
        turn, place = divmod(micro_step, len(self.physics))
        order = np.random.default_rng([self.seed, _STEP, turn]).permutation(len(self.physics))
        return int(order[place])

    def _skip(self, step: int, places: list[tuple[int, int]]) -> None:
        """Count a step that was not finite; stop after too many in a row."""
        self.optimizer_g.zero_grad(set_to_none=True)
        if self._skipped_in_a_row == 0:
            self._last_good = step, places
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skipped:
            good, places = self._last_good
            for scheduler in self.schedulers:  # the learning rate of that step, to go on from it
                scheduler.last_epoch = good - 1
                scheduler.step()
            if self.folder:
                self._save(good, places)
            raise RuntimeError(
                f"the loss or its gradient was not finite in {self._skipped_in_a_row} steps in a row, "
                f"from step {good} on; the last weights are "
                + (f"in {self.folder / 'checkpoint.pt'}" if self.folder else "in the model")
            )

    def _places(self) -> list[tuple[int, int]]:
        """Where the data are, per physics: epoch, and batches of it that were used."""
        return [(stream.epoch, stream.position) for stream in self._streams]

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        # Short at first, so that a short run is not an average with the starting point.
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._ema, [p.detach() for p in self.trained], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the moving average in place of the weights of the last step."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        for parameter, average in zip(self.trained, self._ema, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def _finish(self) -> UD2M:
        if self.folder:
            self._save(self.steps)
        with torch.no_grad():
            for parameter, average in zip(self.trained, self._ema, strict=True):
                parameter.copy_(average)
        if self.writes:
            self._export("final")
        if self.wandb_vis:
            import wandb

            wandb.finish()
        if self.mlflow_vis:
            import mlflow

            mlflow.end_run()
        return self.model.eval()

    def _export(self, name: str, metadata: Mapping | None = None) -> None:
        save_pretrained(self.model, self.folder / name, metadata=metadata)

    # ---------------------------------------------------------------------------------------------
    # What deepinv's test() and its evaluation call

    def compute_loss(self, physics, x, y, train=True, epoch=None, step=False):
        """deepinv's loss of a batch; in evaluation there is none, only metrics of samples."""
        if train:
            raise NotImplementedError("train() goes by train_step")
        return 0.0, None, {}

    def model_inference(self, y, physics, x=None, train=False, **kwargs) -> Tensor:
        """One posterior sample of the full sampler."""
        return self.model(y, physics)

    def test(self, test_dataloader, *args, **kwargs) -> dict:
        """deepinv's test; one data loader serves all physics, or there is one for each."""
        return super().test(self._loader_of_each(test_dataloader), *args, **kwargs)

    # ---------------------------------------------------------------------------------------------
    # Evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """
        Metrics of the full sampler on ``eval_dataloader``, with the moving average.

        Measurements and samples are the same at each evaluation.

        :returns: mean of each metric over physics and images; with several physics also of each, by
            ``name/number of the physics``.
        :raises ValueError: without ``eval_dataloader``.
        """
        if not self.eval_dataloader:
            raise ValueError("evaluate needs images: give the trainer an eval_dataloader")
        if not hasattr(self, "_ema"):  # before train()
            self.setup_train()
        values = defaultdict(list)
        with self.averaged(), self._without_compiling():
            for operator, loader in enumerate(self.eval_dataloader):
                for name, value in self._evaluate_on(operator, loader).items():
                    values[name].append(value)
                    if len(self.physics) > 1:
                        values[f"{name}/{operator}"].append(value)
        return {name: float(np.mean(of)) for name, of in values.items()}

    def _without_compiling(self) -> AbstractContextManager:
        """Evaluation has other shapes and no gradients: compiling for it costs more than it saves."""
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()

    def _evaluate_on(self, operator: int, loader) -> dict[str, float]:
        values = defaultdict(list)
        stream = BatchStream(loader, [self.seed, _EVALUATION, operator])
        for i in range(len(loader)):
            seed_all([self.seed, _EVALUATION, operator, i], self._generators)
            if i % world_size() != rank():
                next(stream)
                continue
            x, y, physics = self.get_samples({operator: stream}, operator)
            samples = self._samplers[operator].sample(y, physics, self.eval_samples)
            for name, metric in zip(_names(self.metrics), self.metrics, strict=True):
                of = metric(x=x, x_net=samples[0], y=y, physics=physics, model=self.model)
                values[name] += of.flatten().tolist()
            for name, metric in self.sample_metrics.items():
                values[name] += metric(samples, x).flatten().tolist()
            if i == 0 and self.plot_images and self.writes:
                picture = self.folder / f"samples_{operator}.png"
                plot_samples(picture, x, y, physics, samples, sigma_y=self.model.sigma_y)
        gathered = gather(dict(values))
        names = dict.fromkeys(name for of_rank in gathered for name in of_rank)
        return {
            name: float(np.mean([v for of_rank in gathered for v in of_rank.get(name, [])]))
            for name in names
        }

    def _evaluate_and_keep_the_best(self, step: int) -> None:
        results = self.evaluate()
        for name, value in results.items():
            self.history[f"eval: {name}"].append((step, value))
        if rank() == 0:
            self.log_metrics_mlops(results, step=step, train=False)
        score = self._score(results)
        if score < self.best:
            self.best = score
            if self.writes:
                with self.averaged():
                    self._export("best", {"step": step, **results})
        if self.verbose and rank() == 0:
            text = ", ".join(f"{name} {value:.4g}" for name, value in results.items() if "/" not in name)
            tqdm.write(f"step {step}: {text}")
        self._write_history()

    def _score(self, results: dict[str, float]) -> float:
        """What the best weights are best in, smaller is better."""
        if self.sample_metrics:
            return results[next(iter(self.sample_metrics))]
        if not self.metrics:
            return 0.0
        metric: Metric = self.metrics[0]
        value = results[_names(self.metrics)[0]]
        return value if getattr(metric, "lower_better", True) else -value

    # ---------------------------------------------------------------------------------------------
    # Records

    def _log(self, step: int, logs: dict[str, float], bar: tqdm) -> None:
        for name, value in logs.items():
            self._sums[name] += value
            self._counts[name] += 1
        bar.update()
        if (step + 1) % self.freq_update_progress_bar == 0:
            means = {name: self._sums[name] / self._counts[name] for name in self._sums}
            bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()} | self._skips())
        if (step + 1) % self.log_interval == 0:
            means = {name: self._sums[name] / self._counts[name] for name in self._sums}
            for name, value in means.items():
                self.history[name].append((step + 1, value))
            if rank() == 0:
                self.log_metrics_mlops(means, step=step + 1, train=True)
            self._sums.clear()
            self._counts.clear()

    def _skips(self) -> dict[str, int]:
        return {"skipped": self.skipped} if self.skipped else {}

    def _write_history(self) -> None:
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "history.json").write_text(json.dumps(self.history, indent=1) + "\n")
            plot_curves(self.folder / "curves.png", self.history)

    def _save(self, step: int, places: list[tuple[int, int]] | None = None) -> None:
        if not self.writes:
            return
        names = [name for name, p in self.unfolded.named_parameters() if p.requires_grad]
        state = {
            "run": self._identity(),
            "step": step,
            "trained": trained_state_dict(self.unfolded),
            "average": dict(zip(names, self._ema, strict=True)),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [_plain(scheduler.state_dict()) for scheduler in self.schedulers],
            "D": self.D.state_dict() if self.D is not None else {},
            "data": self._places() if places is None else places,
            "history": {name: list(points) for name, points in self.history.items()},
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "skipped": self.skipped,
            "skipped in a row": self._skipped_in_a_row if places is None else 0,
            "best": self.best,
        }
        write_checkpoint(state, self.folder / "checkpoint.pt")
        self._write_history()

    def _load(self, file: Path) -> None:
        state = read_checkpoint(file)
        self._check_identity(file, state["run"])
        if state["step"] > self.steps:
            raise ValueError(
                f"steps is {self.steps}, but the checkpoint {file} is at step {state['step']} already"
            )
        load_trained_state_dict(self.unfolded, state["trained"])
        averages = zip(self.trained, state["average"].values(), strict=True)
        self._ema = [average.to(parameter) for parameter, average in averages]
        for optimizer, of in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(of)
        for scheduler, of in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(of)
        if self.D is not None:
            self.D.load_state_dict(state["D"])
        places = dict(zip(map(id, self._streams), state["data"], strict=True))
        for stream in {id(stream): stream for stream in self._streams}.values():
            stream.seek(*places[id(stream)])
        self.history |= {name: [tuple(p) for p in points] for name, points in state["history"].items()}
        self._sums.update(state["sums"])
        self._counts.update(state["counts"])
        self.step_start, self.skipped, self.best = state["step"], state["skipped"], state["best"]
        self._skipped_in_a_row = state["skipped in a row"]
        self._last_good = self.step_start - self._skipped_in_a_row, self._places()
        if self.verbose and rank() == 0:
            tqdm.write(f"going on from step {self.step_start} of {file}")

    def _identity(self) -> dict:
        """What must be equal for a checkpoint to be of the same run."""
        shapes = {n: list(p.shape) for n, p in self.unfolded.named_parameters() if p.requires_grad}
        batches = [[getattr(of, "batch_size", None), len(of)] for of in self.train_dataloader]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        sampler = describe(self.model)
        return {
            "prior": sampler.pop("prior")["fingerprint"],
            **{f"{name}: {key}": v for name, of in sampler.items() for key, v in (of or {}).items()},
            "settings": json.loads(json.dumps(self.settings or {})),
            "trained parameters": shapes,
            "end_to_end": self.end_to_end,
            "physics_levels": self._levels_of_physics(),
            "discriminator": type(self.D).__name__ if self.D is not None else None,
            "physics": [type(physics).__name__ for physics in self.physics],
            "losses": [repr(loss) for loss in [*self.losses, *self.losses_d]],
            "learning rates": [group["initial_lr"] for group in groups],
            "batch sizes and batches": batches,
            "accumulate": self.accumulate,
            "seed": self.seed,
        }

    def _levels_of_physics(self) -> list[list[float] | None] | None:
        if self.physics_levels is None:
            return None
        return [None if levels is None else [*map(float, levels)] for levels in self.physics_levels]

    def _check_identity(self, file: Path, stored: dict) -> None:
        here = self._identity()
        differ = [name for name in here if here[name] != stored.get(name)]
        if differ:
            name = differ[0]
            raise ValueError(
                f"the checkpoint {file} is of another run: its {name} is {_short(stored.get(name))}, "
                f"here it is {_short(here[name])}. Choose another save_path, or "
                "resume=False to overwrite it"
            )


def _as_list(things) -> list:
    if things is None:
        return []
    return list(things) if isinstance(things, list | tuple) else [things]


def _total(logs: Mapping[str, float]) -> dict[str, float]:
    """The sum over processes."""
    total = defaultdict(float)
    for of in gather(dict(logs)):
        for name, value in of.items():
            total[name] += value
    return total


def _names(things: Sequence) -> list[str]:
    """Class names, numbered where they repeat."""
    names = [type(thing).__name__ for thing in things]
    return [
        f"{name} {names[:i].count(name) + 1}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _plain(state: dict) -> dict:
    """Without the functions of the schedule, which are given anew."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"} | {
        "lr_lambdas": [None] * len(state["lr_lambdas"])
    }


def _short(value) -> str:
    text = str(value)
    return text if len(text) < 200 else text[:200] + "..."
