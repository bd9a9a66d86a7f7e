r"""Distillation: training an unfolded denoiser to sample from :math:`p(x \mid y, x_s)`.

One step (Mbakam et al. 2025, Section 4): images x from the data, measurements y of them through one of the
physics, a noise level s per image, states :math:`x_s = x + s \varepsilon`, and samples
:math:`\hat x = L(y, x_s, s)`. What is trained in the unfolded denoiser follows the gradient of the losses.

Several processes share the batches of each step, by accelerate. The script is the same:

.. code-block:: bash

    torchrun --standalone --nproc_per_node=2 train.py                    # one node, CPU or GPU
    accelerate launch --num_processes 2 train.py                         # one node, GPU
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 \
        --master_addr=HOST --master_port=29500 train.py                  # on each node, with its rank

On a CPU use ``torchrun``, and ``device="cpu"`` in the trainer. ``accelerate launch --cpu`` starts one
process, whatever ``--num_processes`` says, unless it launches through MPI.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from deepinv.loss import Loss
from deepinv.physics import Physics
from deepinv.training import Trainer
from torch import Tensor
from tqdm.auto import tqdm

from deepinv_ud2m.metrics import energy_score
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.schedule import VPSchedule
from deepinv_ud2m.training import arguments, checkpoints
from deepinv_ud2m.training.adversarial import Adversary
from deepinv_ud2m.training.arguments import as_list, loader_of_each, names_of
from deepinv_ud2m.training.averages import MovingAverage
from deepinv_ud2m.training.controller import Controller
from deepinv_ud2m.training.evaluation import evaluate, score_of
from deepinv_ud2m.training.history import History
from deepinv_ud2m.training.randomness import Turns, find_generators, seed_all
from deepinv_ud2m.training.stages import STAGES
from deepinv_ud2m.training.updates import Update, parameter_groups, start_accelerator

# Kinds of randomness, so that no two share a seed.
_STEP, _DATA, _EVALUATION, _DISCRIMINATOR = range(4)


@dataclass(kw_only=True)
class DistillationTrainer(Trainer):
    r"""
    Trains the unfolded denoiser of a :class:`deepinv_ud2m.UD2M`. Evaluation runs the whole sampler.

    It is deepinv's :class:`deepinv.training.Trainer`, with its data (``train_dataloader`` gives images x, or
    x and y with ``online_measurements=False``), physics, ``physics_generator``, metrics, loggers and
    :meth:`test`. It counts in optimiser steps, not in epochs, and losses get the step as their ``epoch``.
    Arguments of deepinv's trainer that have no meaning here are refused
    (:data:`deepinv_ud2m.training.arguments.UNUSED`). Several physics, with one loader for all or one each,
    take turns in random order.

    A run is repeatable: in each step all random generators are seeded from ``seed`` and the number of the
    step. These are the global ones, and those in the attributes of physics, noise models, physics generators
    and losses, and in lists of these. Register one that a function holds by ``generators``.

    With ``save_path``, a run that was stopped goes on from its last checkpoint when it is started again with
    the same arguments. On a CPU it ends with the same bits as one that was never stopped. Ctrl-C writes a
    checkpoint of the last complete step.

    Processes share the ``accumulate`` batches of each step, and those of evaluations; the first one writes.
    The result is the same for any number of processes, up to the rounding of sums.

    When training ends the model holds the moving average of what was trained, which is also what is evaluated
    and exported.

    :param deepinv_ud2m.UD2M model: the sampler, with an :class:`deepinv_ud2m.UnfoldedDenoiser`, whose
        ``trained_parameters`` are trained. Put LoRA on its prior first (:func:`deepinv_ud2m.add_lora`).
    :param deepinv.physics.Physics, list physics: one or several.
    :param torch.utils.data.DataLoader, list train_dataloader: images.
    :param Loss, list[Loss] losses: losses of the samples (:mod:`deepinv_ud2m.training.losses`), which are
        added up; any deepinv loss of ``x`` and ``x_net`` will do.
    :param torch.optim.Optimizer optimizer: of :func:`parameter_groups` (default: AdamW).
    :param Adversary adversary: a discriminator with its losses and optimiser (default: ``None``).
    :param str stage: what is trained (default: ``"single"``):

        - ``"initial"``: the initializer's estimate and predicted RMSE, which losses get as ``rmse``; one
          network pass per image;
        - ``"single"``: samples of :math:`p(x \mid y, x_s)` at random levels s, one for each image;
        - ``"end_to_end"``: samples of the whole sampler, through all of its levels.
    :param int steps: optimiser steps of the whole run (default: 10000).
    :param Callable sigmas: ``sigmas(batch_size) -> Tensor [batch_size]`` gives the levels of the states,
        except ``"end_to_end"`` (default: :meth:`deepinv_ud2m.VPSchedule.training_sigmas`).
    :param Callable lr_schedule: factor on the learning rates as a function of the step (default: 1).
    :param float grad_clip: largest norm of the gradient (default: ``None``, any).
    :param bool, str mixed_precision: ``"bfloat16"`` or ``False`` (default: what ``accelerate launch`` says).
    :param int accumulate: batches per optimiser step, a multiple of the number of processes (default: 1).
    :param bool checkpointing: keep only the input of each unfolded iteration for the backward pass (default:
        ``False``).
    :param bool compile: run the networks through :func:`torch.compile` in training steps; the first step
        takes a minute or two then (default: ``False``).
    :param float ema_decay: decay of the moving average, in [0, 1); smaller in the first steps (default:
        0.999).
    :param int max_skipped: steps in a row whose loss or gradient is not finite, each of them skipped, after
        which training stops (default: 10).
    :param int eval_samples: samples of each measurement in evaluation (default: 4).
    :param Mapping sample_metrics: metrics of the samples of all evaluation images of a physics together,
        ``name: f(samples, x) -> Tensor``, of which the mean counts. The first one, or without one the first
        of ``metrics``, decides which model is the best: smaller is better (default: the energy score).
    :param Callable controller: called with the results of each evaluation, such as
        :class:`deepinv_ud2m.training.DiversityController`; what it returns is recorded. Its ``state()`` is
        stored in checkpoints, and set by ``load(state)`` (default: ``None``).
    :param int eval_interval: steps between evaluations, with an ``eval_dataloader`` (default: 1000).
    :param int ckp_interval: steps between checkpoints (default: 500).
    :param int log_interval: steps whose mean is one point of the history (default: 50).
    :param str, pathlib.Path save_path: folder of this run alone, for ``checkpoint.pt``, ``history.json``,
        ``curves.png`` (drawn at evaluations and at the end), pictures of evaluations with ``plot_images``,
        and the exported models ``best`` and ``final`` (default: ``None``, nothing is written).
    :param bool resume: go on from the checkpoint in ``save_path``, if there is one (default: ``True``).
    :param Sequence[torch.Generator] generators: further random generators to seed in each step.
    :param Mapping settings: what else makes a run another one, such as the ranges of random operators, as
        JSON holds it; a checkpoint with other settings is refused (default: nothing).
    :param int seed: of the run (default: 0).
    :raises TypeError, ValueError: for arguments that cannot work, before anything is computed.

    |sep|

    :Examples:

        >>> import deepinv as dinv
        >>> from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora, load_prior
        >>> from deepinv_ud2m.data import mnist_digits
        >>> from deepinv_ud2m.training import DistillationTrainer, L2Loss
        >>> layers = add_lora(prior := load_prior("mnist"))
        >>> noise = dinv.physics.GaussianNoise(0.05)
        >>> trainer = DistillationTrainer(
        ...     model=UD2M(UnfoldedDenoiser(prior, num_iterations=1)),
        ...     physics=dinv.physics.Inpainting((1, 32, 32), mask=0.3, noise_model=noise),
        ...     train_dataloader=torch.utils.data.DataLoader(mnist_digits(num=4), batch_size=2),
        ...     losses=L2Loss(), steps=1, device="cpu", verbose=False,
        ... )
        >>> model = trainer.train()
    """

    optimizer: torch.optim.Optimizer | None = None
    losses: Loss | list[Loss] = None
    adversary: Adversary | None = None
    stage: str = "single"
    steps: int = 10_000
    sigmas: Callable[[int], Tensor] | None = None
    lr_schedule: Callable[[int], float] | None = None
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False
    ema_decay: float = 0.999
    max_skipped: int = 10
    eval_samples: int = 4
    sample_metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None
    controller: Controller | None = None
    eval_interval: int = 1000
    ckp_interval: int = 500
    log_interval: int = 50
    save_path: str | Path | None = None
    resume: bool = True
    generators: Sequence[torch.Generator] = ()
    settings: Mapping | None = None
    seed: int = 0
    online_measurements: bool = True
    compute_train_metrics: bool = False
    freq_update_progress_bar: int = 10
    non_blocking_transfers: bool = False
    history: History = field(init=False, default_factory=History)

    def __post_init__(self) -> None:
        arguments.check(self)
        super().__post_init__()
        self._start_accelerator()
        self.model.to(self.device)
        self.physics: list[Physics] = [physics.to(self.device) for physics in as_list(self.physics)]
        self.losses = as_list(self.losses)
        self.metrics: list = as_list(self.metrics)
        self.physics_generator: list | None = as_list(self.physics_generator) or None
        self.train_dataloader: Any = loader_of_each(self.train_dataloader, len(self.physics))
        self.eval_dataloader: Any = loader_of_each(self.eval_dataloader, len(self.physics))
        if self.sample_metrics is None:
            self.sample_metrics = {"energy score": energy_score} if self.eval_samples > 1 else {}
        if self.sigmas is None:
            self.sigmas = VPSchedule().training_sigmas
        self.folder: Any = Path(self.save_path) if self.save_path else None
        self.num_samples = max(getattr(loss, "num_samples", 1) for loss in self.losses)
        self.unfolded = self.model.unfolded
        self.trained = {n: p for n, p in self.unfolded.trained_parameters().items() if p.requires_grad}
        arguments.check_model(self.unfolded, self.trained, self.stage, self.num_samples)
        self.unfolded.checkpointing = self.checkpointing
        for network in self.unfolded.networks if self.compile else []:
            network.compile()
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameter_groups(self.unfolded))
        self.update = self._update_of(self.optimizer, self.trained.values())
        if self.adversary is not None:
            D = self.adversary.D.to(self.device)
            self.adversary.update = self._update_of(self.adversary.optimizer, D.parameters(), D.buffers())

    @property
    def writes(self) -> bool:
        """Whether this process writes to ``save_path``: the first one, if there is a folder."""
        return self.folder is not None and self.accelerator.is_main_process

    # ---------------------------------------------------------------------------------------------
    # Setting up

    def _start_accelerator(self) -> None:
        self.accelerator, device = start_accelerator(self.device)
        self.device: torch.device = device
        processes = self.accelerator.num_processes
        if self.accumulate % processes:
            raise ValueError(
                f"accumulate must be a multiple of the number of processes, {processes}, which share the "
                f"batches of a step; got {self.accumulate}"
            )
        if not self.mixed_precision and self.accelerator.mixed_precision == "bf16":
            self.mixed_precision: Any = torch.bfloat16
        if self.mixed_precision == torch.float16 or self.accelerator.mixed_precision in ("fp16", "fp8"):
            raise ValueError("mixed_precision must be 'bfloat16' or False: others need scaled gradients")
        if not self.accelerator.is_main_process:
            self.verbose = self.wandb_vis = self.mlflow_vis = False

    def _update_of(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()
    ) -> Update:
        tensors = [*parameters, *buffers]
        broadcast([tensor.data for tensor in tensors])  # all processes start from those of the first
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        batches = self.accumulate // self.accelerator.num_processes
        return Update(self.accelerator, optimizer, trained, batches, self.grad_clip, self.lr_schedule)

    def setup_train(self, train: bool = True, **kwargs: Any) -> None:
        """deepinv's set-up of metrics and loggers, and the state of a run: new, or that of a checkpoint."""
        save_path, self.save_path = self.save_path, None  # deepinv would make a folder named by the second
        super().setup_train(train=train, **kwargs)
        self.save_path = save_path
        if not train:
            return
        self.completed, self.evaluated, self._saved = 0, 0, 0
        self.skipped, self.skipped_in_a_row, self.best = 0, 0, math.inf
        self.found: dict[str, float] = {}
        self.history, self.averaged = History(), MovingAverage(self.trained.values(), self.ema_decay)
        losses = [*self.losses, *(self.adversary.losses if self.adversary else [])]
        self.seeded = find_generators(self.physics, self.physics_generator, losses, list(self.generators))
        check = partial(arguments.check_batch, prior_info=self.unfolded.prior_info)
        self.turns = Turns(self.train_dataloader, [self.seed, _DATA], check)
        self.places, self.run = self.turns.places, checkpoints.describe_run(self)
        if self.resume and self.folder:
            checkpoints.load_run(self, self.folder / "checkpoint.pt")
            self._saved = self.completed

    def load_model(self, ckpt_pretrained: str | Path | None = None, strict: bool = True) -> None:
        """deepinv's way to resume, which unpickles, is refused."""
        if ckpt_pretrained is not None:
            raise NotImplementedError(
                "train() resumes; UD2M.from_pretrained(save_path / 'best') loads the best"
            )

    # ---------------------------------------------------------------------------------------------
    # Training

    def train(self) -> UD2M:
        """
        Train, from the checkpoint in ``save_path`` where there is one.

        :returns: the model, with the moving average of what was trained.
        :raises RuntimeError: after ``max_skipped`` steps in a row without finite loss or gradient, with the
            last weights in the checkpoint; or if another run uses ``save_path``.
        :raises ValueError: if the checkpoint is damaged or of another run; it is left as it is.
        :raises OSError: if ``save_path`` cannot be written to; what is there is left as it is.
        """
        with checkpoints.lock(self.folder) if self.writes else nullcontext():
            self.setup_train()
            show = self.verbose and self.show_progress_bar
            title = (self.settings or {}).get("stage", self.stage)
            with tqdm(desc=title, total=self.steps, initial=self.completed, disable=not show) as bar:
                try:
                    self._train(bar)
                except KeyboardInterrupt:
                    self.averaged.restore()
                    self._save()
                    if self.writes and self._saved:
                        bar.write(f"interrupted; step {self._saved} is in {self.folder}: run again to go on")
                    raise
            self.averaged.assign()
            for network in self.unfolded.networks if self.compile else []:
                network._compiled_call_impl = None  # for samples of other shapes it would compile anew
            if self.writes:
                self.model.save_pretrained(self.folder / "final")
                self.history.draw(self.folder)
        if self.wandb_vis:
            import_module("wandb").finish()
        if self.mlflow_vis:
            import_module("mlflow").end_run()
        return self.model.eval()

    def _train(self, bar: tqdm) -> None:
        while True:
            is_done = self.completed == self.steps
            if self.eval_dataloader and self.completed % self.eval_interval == 0:
                self._evaluate_and_keep_the_best()
            if is_done or self.completed % self.ckp_interval == 0 or self._saved < self.evaluated:
                self._save()
            if is_done:
                return
            logs = self.train_step(self.completed)
            bar.update()
            if self.completed % self.freq_update_progress_bar == 0:
                shown = logs | {n: v for n, v in self.found.items() if "/" not in n}
                bar.set_postfix({n: f"{v:.4g}" for n, v in shown.items()} | {"skipped": self.skipped})
            if self.skipped_in_a_row >= self.max_skipped:
                self._save()
                raise RuntimeError(
                    f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row, "
                    f"up to step {self.completed - 1}; the last weights are "
                    + (f"in {self.folder / 'checkpoint.pt'}" if self.folder else "in the model")
                )

    def train_step(self, step: int) -> dict[str, float]:
        """
        One optimiser step; skipped if the loss or its gradient is not finite in any process.

        :param int step: number of the step, which fixes its randomness.
        :returns: losses, gradient norm and learning rate, by name; nothing of a skipped step.
        """
        update, processes, names = self.update, self.accelerator.num_processes, names_of(self.losses)
        logs: dict[str, float] = defaultdict(float)
        batches = []
        update.start(step)
        for micro_step in range(step * self.accumulate, (step + 1) * self.accumulate):
            turn = self.turns[micro_step]
            if micro_step % processes != self.accelerator.process_index or not update.finite:
                next(self.turns.streams[turn])  # all processes are at the same place in the data
                continue
            seed_all([self.seed, _STEP, micro_step], self.seeded)
            batch = self.draw(*self.get_samples(self.turns.streams, turn))
            batch |= {"epoch": step, "micro_step": micro_step}
            for name, value in zip(names, update.add(self._compute(self.losses, batch)), strict=True):
                logs[name] += value / update.batches
            if self.adversary is not None:
                batches.append({n: v.detach() if isinstance(v, Tensor) else v for n, v in batch.items()})
        with checkpoints.uninterrupted():
            logs["loss"] = sum(logs.values())
            logs["gradient norm"] = update.finish()
            logs["learning rate"] = update.optimizer.param_groups[0]["lr"]
            finite = update.finite
            if finite and self.adversary is not None:  # where it is not finite, the model stays too
                logs |= self.adversary.step(step, batches, self._compute_for_adversary)
                finite = self.adversary.update.finite
            if finite:
                update.apply()
                self.averaged.update(step)
            logs = logs if finite else {}
            self._complete(step, logs)
        return logs

    def draw(self, x: Tensor, y: Tensor, physics: Physics) -> dict:
        r"""
        What the losses are called with.

        :param torch.Tensor x: images, `[B, C, H, W]`.
        :param torch.Tensor y: their measurements.
        :param deepinv.physics.Physics physics: the physics.
        :returns: ``x, y, physics, samples`` `[S, B, C, H, W]` and ``x_net``, the first of these; states
            ``x_s`` and their ``sigma``, but not of ``"end_to_end"``; ``rmse`` of an initial estimate; and
            what the adversary adds.
        """
        problem = Problem(y, physics, sigma_y=self.model.sigma_y)
        batch = {"x": x, "y": y, "physics": physics}
        if self.adversary is not None:
            batch |= self.adversary.context(problem)
        with self.get_autocast_context():
            batch |= STAGES[self.stage](self.model, problem, x, self.sigmas, self.num_samples)
        return batch | {"x_net": batch["samples"][0]}

    def _compute(self, losses: Sequence[Loss], batch: dict) -> list[Tensor]:
        with self.get_autocast_context():
            return [loss(**batch, model=self.model).mean() for loss in losses]

    def _compute_for_adversary(self, losses: Sequence[Loss], batch: dict, turn: int) -> list[Tensor]:
        seed_all([self.seed, _DISCRIMINATOR, batch["micro_step"], turn], self.seeded)
        return self._compute(losses, batch)

    def _complete(self, step: int, logs: Mapping[str, float]) -> None:
        """A step is complete: this is what a checkpoint holds from here on."""
        self.completed, self.places = step + 1, self.turns.places
        self.skipped += not logs
        self.skipped_in_a_row = 0 if logs else self.skipped_in_a_row + 1
        self.history.add(logs)
        if self.completed % self.log_interval == 0:
            self._record(self.history.means())

    def _record(self, values: dict[str, float], prefix: str = "") -> None:
        self.history.record(self.completed, values, prefix)
        self.log_metrics_mlops(values, step=self.completed, train=not prefix)

    # ---------------------------------------------------------------------------------------------
    # Evaluation

    def test(self, test_dataloader: Any, *args: Any, **kwargs: Any) -> dict:
        """deepinv's test; one data loader serves all physics, or there is one for each."""
        return super().test(loader_of_each(test_dataloader, len(self.physics)), *args, **kwargs)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """
        Metrics of the whole sampler on ``eval_dataloader``, with the moving average, the same measurements
        and the same random numbers each time.

        :returns: mean of each metric over physics and images; with several physics also of each, by
            ``name/number of the physics``.
        :raises ValueError: without ``eval_dataloader``.
        """
        if not self.eval_dataloader:
            raise ValueError("evaluate needs images: give the trainer an eval_dataloader")
        if not hasattr(self, "seeded"):  # before train()
            self.setup_train()
        # Evaluation has other shapes and no gradients: compiling for it costs more than it saves.
        eager = torch.compiler.set_stance("force_eager") if self.compile else nullcontext()
        with self.averaged(), eager:
            return evaluate(self, [self.seed, _EVALUATION])

    def _evaluate_and_keep_the_best(self) -> None:
        if self.evaluated == self.completed:
            return
        self._save()  # an evaluation may fail
        results = self.evaluate()
        score = score_of(self, results)
        with checkpoints.uninterrupted():
            if self.controller is not None:
                results |= self.controller(results)
            self._record(results, "eval: ")
            self.found = results
            self.evaluated, self._saved = self.completed, -1  # what was found is not written yet
            if score < self.best:
                self.best = score
                if self.writes:
                    with self.averaged():
                        metadata = {"step": self.completed, **results}
                        self.model.save_pretrained(self.folder / "best", metadata=metadata)
        if self.writes:
            self.history.draw(self.folder)
        if self.verbose:
            text = ", ".join(f"{name} {value:.4g}" for name, value in results.items() if "/" not in name)
            tqdm.write(f"step {self.completed}: {text}")

    def _save(self) -> None:
        """Write the last complete step, if it is not written yet."""
        if self.writes and self._saved < self.completed:
            checkpoints.save_run(self, self.folder / "checkpoint.pt")
            self._saved = self.completed
            self.history.write(self.folder)
