r"""Training of an unconditional denoiser :math:`D(w, \delta) \approx E[x \mid x + \delta n = w]`.

After Karras et al. 2022 (*Elucidating the design space of diffusion-based generative models*): noise levels
over several decades, a loss that weighs them alike, and a moving average of the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast, broadcast_object_list
from deepinv.models import Denoiser
from deepinv.utils import get_device
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from deepinv_ud2m.priors import build_network
from deepinv_ud2m.training.averages import MovingAverage
from deepinv_ud2m.training.checkpoints import (
    check_same_run,
    lock,
    read_checkpoint,
    uninterrupted,
    write_checkpoint,
)
from deepinv_ud2m.training.randomness import BatchStream, seed_all
from deepinv_ud2m.training.updates import Update, start_accelerator, warmup_cosine

#: Steps in a row without a finite loss, after which training stops.
_MAX_SKIPPED = 10


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
    Train a prior from random weights, or on from ``checkpoint``: a run that was stopped goes on when it is
    started again with the same arguments, and gives the same weights as one that was never stopped.

    Processes of ``torchrun`` share the work. Each loads batches of its own, and all return the same network.

    :param Mapping config: ``"network"`` and ``"prior"``, see :func:`deepinv_ud2m.save_prior`.
    :param torch.utils.data.DataLoader loader: gives clean images `[B, C, H, W]` in [0, 1]. Its length is an
        epoch, after each of which a checkpoint is written.
    :param int epochs: epochs of the whole run; the learning rate falls to 1 % of ``lr`` at its end.
    :param float lr: largest learning rate of Adam (default: 2e-3).
    :param float median: median of the noise levels of training, in units of the image (default: 0.25).
    :param str, pathlib.Path checkpoint: file to write and to resume from, in a folder of this run alone
        (default: ``None``, nothing is written).
    :param int seed: of weights, levels and order of the data (default: 0).
    :param Sequence[torch.Generator] generators: further generators that the data are drawn with.
    :param bool fast: compile the network and run it in bfloat16 (default: ``False``).
    :param torch.device, str device: where to train (default: a GPU if there is one).
    :param bool verbose: show progress (default: ``True``).
    :returns: the moving average of the weights, as a frozen network in evaluation mode.
    :raises ValueError: if ``checkpoint`` is damaged or of another run; it is left as it is.
    :raises RuntimeError: if another run uses its folder, or the loss is not finite in ten steps in a row.
    """
    accelerator, device = start_accelerator(torch.device(device or get_device(verbose=False)))
    torch.manual_seed(seed)
    prior = build_network(config).train().requires_grad_(True).to(device)
    broadcast([parameter.data for parameter in prior.parameters()])
    if fast:
        prior.compile()
    steps, limits = epochs * len(loader), (config["prior"]["sigma_min"], config["prior"]["sigma_max"])
    optimizer = torch.optim.Adam(prior.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = warmup_cosine(steps)
    update = Update(accelerator, optimizer, prior.parameters(), grad_clip=1.0, lr_schedule=schedule)
    average = MovingAverage(prior.parameters(), decay=0.9995)
    run = {
        "config": {name: config[name] for name in ("prior", "network")},
        "processes": accelerator.num_processes,
    }
    run |= {"epochs": epochs, "batches": len(loader), "batch_size": loader.batch_size, "fast": fast}
    run = json.loads(json.dumps(run | {"lr": lr, "median": median, "seed": seed}))
    file = Path(checkpoint) if checkpoint is not None and accelerator.is_main_process else None
    with lock(file.parent, file.name) if file else nullcontext():
        (state,) = broadcast_object_list([read_checkpoint(file) if file and file.is_file() else None])
        if state is not None:
            check_same_run(Path(str(checkpoint)), state["run"], run)
            prior.load_state_dict(state["prior"])
            average.load(state["average"])
            optimizer.load_state_dict(state["optimizer"])
        start = 0 if state is None else state["epoch"] * len(loader)
        stream = BatchStream(loader, [seed, accelerator.process_index])
        stream.seek(start // len(loader), 0)
        bar = tqdm(range(start, steps), disable=not (verbose and accelerator.is_main_process))
        skipped = 0
        for step in bar:
            seed_all([seed, step, accelerator.process_index], generators)
            x = next(stream).to(device)
            sigma = training_sigmas(len(x), median, *limits).to(x)
            w = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
            with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                denoised = prior(w, sigma)
            update.start(step)
            (loss,) = update.add(
                [edm_loss(denoised.float(), x, sigma, config["network"]["pixel_std"]).mean()]
            )
            update.finish()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss:.4g}")
            skipped = 0 if update.finite else skipped + 1
            if skipped == _MAX_SKIPPED:
                raise RuntimeError(f"the loss was not finite in {skipped} steps in a row, up to step {step}")
            with uninterrupted():
                if update.finite:
                    update.apply()
                    average.update(step)
                if file and (step + 1) % len(loader) == 0:
                    state = {"run": run, "epoch": (step + 1) // len(loader), "average": average.values}
                    state |= {"prior": prior.state_dict(), "optimizer": optimizer.state_dict()}
                    write_checkpoint(state, file)
    average.assign()
    return prior.eval().requires_grad_(False)


def training_sigmas(batch_size: int, median: float, sigma_min: float, sigma_max: float) -> Tensor:
    r"""
    Noise levels, `[batch_size]`: nine in ten :math:`\log\sigma \sim \mathcal N(\log m, 1.4^2)` with the
    median m, clamped to the range, the others log-uniform in the range, so that every level is seen.
    """
    log_normal = math.log(median) + 1.4 * torch.randn(batch_size)
    log_uniform = math.log(sigma_min) + math.log(sigma_max / sigma_min) * torch.rand(batch_size)
    is_uniform = torch.rand(batch_size) < 0.1
    return torch.where(is_uniform, log_uniform, log_normal).exp().clamp(sigma_min, sigma_max)


def edm_loss(denoised: Tensor, x: Tensor, sigma: Tensor, pixel_std: float) -> Tensor:
    r"""
    Denoising loss, `[B]`, weighted so that every noise level counts alike (Karras et al. 2022, Table 1):
    :math:`(\sigma^2 + \sigma_d^2) / (\sigma \sigma_d)^2 \, \| D(x + \sigma n, \sigma) - x \|^2 / d`, where
    :math:`\sigma_d` is the root mean square of the pixels, as in the preconditioning of the network.
    """
    weight = (sigma**2 + pixel_std**2) / (sigma * pixel_std) ** 2
    return weight * (denoised - x).square().flatten(1).mean(1)


@torch.no_grad()
def denoising_psnr(
    denoiser: Denoiser, x: Tensor, sigma: float, seed: int = 0, batch_size: int = 250
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
