r"""Training an unconditional denoiser :math:`D(w, \delta) \approx E[x \mid x + \delta n = w]`.

This is ordinary denoising, so everything is deepinv's: the physics is
:class:`deepinv.physics.Denoising`, the model an :class:`deepinv.models.ArtifactRemoval` in
``direct`` mode, the loop :class:`deepinv.Trainer`. What is added here is what a diffusion prior
needs on top: noise levels drawn over several decades, the EDM weighting of the loss over levels
(Karras et al. 2022, *Elucidating the design space of diffusion-based generative models*), an
exponential moving average of the weights, a learning rate that follows the step, and a checkpoint
from which an interrupted run goes on exactly where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from deepinv import Trainer
from deepinv.loss import Loss
from deepinv.models import ArtifactRemoval, Denoiser
from deepinv.physics import Denoising, GaussianNoise
from deepinv.physics.generator import PhysicsGenerator
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.priors import build_network
from deepinv_ud2m.training.checkpoint import read_checkpoint, write_checkpoint
from deepinv_ud2m.training.parallel import own_device, rank, world_size


def train_prior(
    config: Mapping,
    loader: DataLoader,
    epochs: int,
    *,
    lr: float = 2e-3,
    median: float = 0.25,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    generators: Sequence[torch.Generator] = (),
    fast: bool = False,
    device: torch.device | str | None = None,
    verbose: bool = True,
) -> Denoiser:
    """
    Train a prior from random weights, or on from ``checkpoint``: a run that was stopped goes on when it
    is started again with the same arguments.

    Under ``torchrun`` the processes share the work (the caller initialises the process group): each
    draws batches of its own, and all return the same network.

    :param Mapping config: ``"network"`` and ``"prior"``, see :func:`deepinv_ud2m.save_prior`.
    :param torch.utils.data.DataLoader loader: gives clean images `[B, C, H, W]` in [0, 1]. Its length is
        an epoch, after each of which a checkpoint is written.
    :param int epochs: epochs of the whole run; the learning rate falls to 1 % of ``lr`` at its end.
    :param float lr: largest learning rate of Adam (default: 2e-3).
    :param float median: median of the noise levels of training, in units of the image (default: 0.25).
    :param str, pathlib.Path checkpoint: file to write and to resume from; none by default.
    :param int seed: of weights, levels and order of the data (default: 0).
    :param Sequence[torch.Generator] generators: generators that the data are drawn with, if not
        PyTorch's own.
    :param bool fast: compile the network and run it in bfloat16 (default: ``False``).
    :param torch.device, str device: a GPU if there is one by default.
    :param bool verbose: show progress (default: ``True``).
    :returns: the moving average of the weights, as a frozen network in evaluation mode.
    :raises ValueError: if ``checkpoint`` is damaged or of another run; it is left as it is.
    """
    device = device or own_device()
    torch.manual_seed(seed)
    prior = build_network(config).train().requires_grad_(True).to(device)
    if fast:
        prior.compile()
    model = ArtifactRemoval(prior, mode="direct")
    if world_size() > 1:
        model = DistributedDataParallel(model)
    limits = {name: config["prior"][name] for name in ("sigma_min", "sigma_max")}
    levels = LogNormalSigmaGenerator(
        median, **limits, rng=torch.Generator(device), device=str(torch.device(device))
    )
    optimizer = torch.optim.Adam(prior.parameters(), lr=lr, betas=(0.9, 0.99))
    trainer = PriorTrainer(
        model=model,
        physics=Denoising(GaussianNoise()).to(device),
        physics_generator=levels,
        online_measurements=True,
        optimizer=optimizer,
        step_scheduler=LambdaLR(optimizer, warmup_cosine(epochs * len(loader))),
        train_dataloader=loader,
        epochs=epochs,
        losses=EDMLoss(config["network"]["pixel_std"]),
        metrics=[],
        compute_train_metrics=False,
        grad_clip=1.0,
        check_grad=True,  # deepinv 0.5.0 cannot clip without it
        mixed_precision="bfloat16" if fast else False,
        device=device,
        checkpoint=checkpoint,
        seed=seed,
        generators=[*generators, levels.rng],
        identity={
            "config": json.loads(json.dumps({name: config[name] for name in ("prior", "network")})),
            "epochs": epochs,
            "batches": len(loader),
            "batch_size": loader.batch_size,
            "lr": lr,
            "median": median,
            "seed": seed,
            "fast": fast,
            "processes": world_size(),
        },
        verbose=verbose and rank() == 0,
        show_progress_bar=verbose and rank() == 0,
        freq_update_progress_bar=20,
    )
    trainer.train()
    return trainer.ema.module.backbone_net.eval().requires_grad_(False)


class LogNormalSigmaGenerator(PhysicsGenerator):
    r"""
    Noise levels for training a prior: mostly log-normal, a few log-uniform.

    With probability ``uniform_share`` a level is log-uniform in ``[sigma_min, sigma_max]``, so that
    every level is seen; otherwise :math:`\log\sigma \sim \mathcal N(\log m, s^2)`, clamped to the
    same range (EDM, Karras et al. 2022, Table 1).

    :param float median: median :math:`m` of the log-normal part, in units of the image (default: 0.25).
    :param float spread: standard deviation :math:`s` of :math:`\log\sigma` (default: 1.4).
    :param float sigma_min: smallest level (default: 0.002).
    :param float sigma_max: largest level (default: 80).
    :param float uniform_share: share of log-uniform levels, in [0, 1] (default: 0.1).
    :param torch.Generator rng: random generator; a generator of its own, seeded 0, by default.
    :param str device: device of the levels.
    """

    def __init__(
        self,
        median: float = 0.25,
        spread: float = 1.4,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        uniform_share: float = 0.1,
        rng: torch.Generator | None = None,
        device: str = "cpu",
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, "
                f"got {sigma_min} and {sigma_max}"
            )
        rng = rng if rng is not None else torch.Generator(device).manual_seed(0)
        super().__init__(rng=rng, device=device)
        self.median, self.spread = median, spread
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.uniform_share = uniform_share

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs) -> dict:
        """
        Draw a batch of levels.

        :param int batch_size: number of levels.
        :param int seed: seeds the generator first, when given.
        :returns: ``{"sigma": tensor of shape (batch_size,)}``.
        """
        self.rng_manual_seed(seed)
        options = {"generator": self.rng, **self.factory_kwargs}
        log_normal = math.log(self.median) + self.spread * torch.randn(batch_size, **options)
        log_uniform = math.log(self.sigma_min) + torch.rand(batch_size, **options) * math.log(
            self.sigma_max / self.sigma_min
        )
        uniform = torch.rand(batch_size, **options) < self.uniform_share
        sigma = torch.where(uniform, log_uniform, log_normal).exp()
        return {"sigma": sigma.clamp(self.sigma_min, self.sigma_max)}


class EDMLoss(Loss):
    r"""
    Denoising loss, weighted so that every noise level counts alike (Karras et al. 2022, Table 1):

    .. math::
        \frac{\sigma^2 + \sigma_d^2}{(\sigma \sigma_d)^2} \, \| D(x + \sigma n, \sigma) - x \|^2 / d .

    :param float pixel_std: :math:`\sigma_d`, root mean square of the training pixels, the same as
        in the preconditioning of the network.
    """

    def __init__(self, pixel_std: float):
        super().__init__()
        self.pixel_std = pixel_std

    def forward(self, x_net, x, physics, **kwargs):
        """
        :param torch.Tensor x_net: denoised images, of shape `[B, C, H, W]`.
        :param torch.Tensor x: clean images, of the same shape.
        :param deepinv.physics.Physics physics: its noise model holds the levels, `[B]` or a scalar.
        :returns: losses of shape `[B]`.
        """
        sigma = physics.noise_model.sigma
        weight = (sigma**2 + self.pixel_std**2) / (sigma * self.pixel_std) ** 2
        return weight * (x_net - x).square().flatten(1).mean(1)


def warmup_cosine(total_steps: int, warmup_steps: int = 200, floor: float = 0.01):
    """
    Factor on the learning rate: linear warm-up, then half a cosine down to ``floor``.

    :param int total_steps: number of optimiser steps of the whole run.
    :param int warmup_steps: length of the warm-up, in steps (default: 200).
    :param float floor: factor at the end (default: 0.01).
    :returns: a function of the step, for :class:`torch.optim.lr_scheduler.LambdaLR`.
    :raises ValueError: for fewer than one step of either.
    """
    check_count("total_steps", total_steps)
    check_count("warmup_steps", warmup_steps)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
        return min(1.0, (step + 1) / warmup_steps) * (floor + (1 - floor) * cosine)

    return factor


@dataclass(kw_only=True)
class PriorTrainer(Trainer):
    """
    deepinv's :class:`deepinv.Trainer` with an average of the weights, a learning rate per step and
    checkpoints that resume.

    The random generators are seeded anew at each epoch, from ``seed``, the epoch and the rank, so a
    run that is stopped and started again with the same arguments gives the same weights as one that
    was never stopped. Under ``torchrun``, with a model wrapped in
    ``DistributedDataParallel``, rank 0 alone writes.

    :param torch.optim.lr_scheduler.LambdaLR step_scheduler: stepped after each optimiser step.
    :param float ema_decay: decay of the moving average of the weights per step (default: 0.9995);
        it warms up with the number of steps, so that a short run is not an average of noise.
    :param str, pathlib.Path checkpoint: file to write after each epoch and to resume from if it
        exists. ``None`` writes nothing.
    :param int seed: of the run (default: 0).
    :param list[torch.Generator] generators: generators of the data order and of the physics.
    :param Mapping identity: what makes a run another one, of what JSON holds; a checkpoint of another
        run is refused.
    :raises ValueError: for such a checkpoint, or a damaged one; it is left as it is.
    """

    step_scheduler: LambdaLR
    ema_decay: float = 0.9995
    checkpoint: str | Path | None = None
    seed: int = 0
    generators: list = field(default_factory=list)
    identity: Mapping = field(default_factory=dict)

    @property
    def network(self) -> torch.nn.Module:
        """The model without its distributed wrapper."""
        return getattr(self.model, "module", self.model)

    def setup_train(self, train: bool = True, **kwargs):
        """Set the run up, resuming from ``checkpoint`` where it exists."""
        self.save_path = None  # deepinv would make a folder named by the second
        if train and self.checkpoint is not None and rank() == 0:
            # What cannot be written to is found out before the first epoch.
            Path(self.checkpoint).parent.mkdir(parents=True, exist_ok=True)
        self.ema = AveragedModel(self.network, multi_avg_fn=_warm_average(self.ema_decay))
        super().setup_train(train=train, **kwargs)
        if train:
            self._seed_epoch(self.epoch_start)

    def load_model(self, ckpt_pretrained=None, strict: bool = True) -> dict | None:
        """Resume from ``checkpoint``, where there is one."""
        path = Path(ckpt_pretrained or self.checkpoint or "")
        if not path.is_file():
            return None
        state = read_checkpoint(path)
        there = state.get("identity", {})
        for name, value in self.identity.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{path} is of another run: its {name} is {there.get(name)!r}, here it is "
                    f"{value!r}. Choose another checkpoint, or the same arguments"
                )
        self.network.load_state_dict(state["model"], strict=strict)
        self.ema.load_state_dict(state["ema"], strict=strict)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_scheduler.load_state_dict(state["step_scheduler"])
        self.loss_history = state["loss_history"]
        self.epoch_start = state["epoch"] + 1
        return state

    def save_model(self, filename, epoch, state=None):
        """Write everything a resumed run needs to ``checkpoint``."""
        if self.checkpoint is None or rank() != 0:
            return
        state = (state or {}) | {
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step_scheduler": self.step_scheduler.state_dict(),
            "loss_history": {k: [float(v) for v in h] for k, h in self.loss_history.items()},
            "epoch": epoch,
            "identity": dict(self.identity),
        }
        write_checkpoint(state, Path(self.checkpoint))

    def step(self, epoch, progress_bar, train_ite=None, train=True, **kwargs):
        """One deepinv step; after a training step, the average and the learning rate move too."""
        super().step(epoch, progress_bar, train_ite=train_ite, train=train, **kwargs)
        if train:
            self.ema.update_parameters(self.network)
            self.step_scheduler.step()
            if kwargs.get("last_batch"):  # before the workers of the next epoch start
                self._seed_epoch(epoch + 1)

    def _seed_epoch(self, epoch: int):
        seeds = np.random.SeedSequence([self.seed, epoch, rank()]).generate_state(
            1 + len(self.generators), np.uint64
        )
        torch.manual_seed(int(seeds[0]) >> 1)
        for generator, seed in zip(self.generators, seeds[1:], strict=True):
            generator.manual_seed(int(seed) >> 1)


def _warm_average(decay: float):
    """An update for :class:`AveragedModel`: decay min(decay, (1 + n) / (10 + n)) after n steps."""

    @torch.no_grad()
    def update(averages, weights, num_averaged):
        n = float(num_averaged)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    return update


@torch.no_grad()
def denoising_psnr(
    denoiser: Denoiser, x: torch.Tensor, sigma: float, seed: int = 0, batch_size: int = 250
) -> float:
    r"""
    Mean denoising PSNR of a prior, :math:`-10 \log_{10} \| D(x + \sigma n, \sigma) - x \|^2 / d`.

    :param deepinv.models.Denoiser denoiser: the prior.
    :param torch.Tensor x: clean images in [0, 1], of shape `[B, C, H, W]`.
    :param float sigma: noise level, in units of the image.
    :param int seed: of the noise (default: 0).
    :param int batch_size: images per network pass (default: 250).
    :returns: mean PSNR over the images, in dB.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    psnr = []
    for images in x.split(batch_size):
        noise = torch.randn(images.shape, generator=generator, device=x.device)
        levels = torch.full((len(images),), sigma, device=x.device)
        error = (denoiser(images + sigma * noise, levels) - images).square().flatten(1).mean(1)
        psnr.append(-10 * error.log10())
    return torch.cat(psnr).mean().item()
