"""UD2M beside deepinv's DiffPIR and the pseudo-inverse on one problem: a table and a figure.

The scripts in ``examples/`` use it; the benchmark proper is :mod:`deepinv_ud2m.benchmark.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import deepinv as dinv
import torch
from deepinv.models import Denoiser
from deepinv.physics import Physics
from torch import Tensor
from torch.nn.functional import interpolate

from deepinv_ud2m.benchmark.run import perceptual_distance, perceptual_network, synchronize
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.proximal import noise_level
from deepinv_ud2m.sampler import UD2M, CallCounter


@dataclass(frozen=True)
class Estimate:
    """
    What one method made of the measurements.

    :param str name: of the method.
    :param torch.Tensor images: estimates, of shape `[B, C, H, W]`.
    :param float nfe: network evaluations per image.
    :param float seconds: for the whole batch.
    """

    name: str
    images: Tensor
    nfe: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """
    Estimates of the same images, with the samples of UD2M.

    :param torch.Tensor x: the truth, of shape `[B, C, H, W]`.
    :param torch.Tensor measured: the measurements as images of that shape, for the figure.
    :param torch.Tensor samples: of UD2M, of shape `[S, B, C, H, W]`.
    :param list[Estimate] estimates: one sample and the mean of UD2M, then the others.
    """

    x: Tensor
    measured: Tensor
    samples: Tensor
    estimates: list[Estimate]

    def __str__(self) -> str:
        """PSNR and perceptual distance, mean over the images, network evaluations and seconds."""
        network = perceptual_network(tuple(self.x.shape[1:]))
        head = "perceptual" if network else ""
        lines = [f"{'':24s} {'PSNR (dB)':>9s} {head:>10s} {'NFE':>5s} {'seconds':>8s}"]
        for estimate in self.estimates:
            psnr = dinv.metric.PSNR()(estimate.images, self.x).mean().item()
            distance = ""
            if network:
                distance = f"{perceptual_distance(network)(estimate.images, self.x).mean().item():.3f}"
            lines.append(
                f"{estimate.name:24s} {psnr:9.2f} {distance:>10s} {estimate.nfe:5.0f} "
                f"{estimate.seconds:8.1f}"
            )
        if network:
            lines.append(f"perceptual: distance by {perceptual_distance(network).network}")
        return "\n".join(lines)

    def plot(self, file: str | Path, image: int = 0, zoom: int = 4, std_range: float = 0.2) -> None:
        """
        Save a figure: truth, measurement, the other methods, three samples, mean and standard
        deviation; below, the centre of each, enlarged.

        :param str, pathlib.Path file: where to save it; its folder is made.
        :param int image: which of the images (default: 0).
        :param int zoom: enlargement of the centre (default: 4).
        :param float std_range: standard deviation that is shown white (default: 0.2).
        """
        columns = {"truth": self.x, "measurement": self.measured}
        columns |= {estimate.name: estimate.images for estimate in self.estimates[2:]}
        columns |= {f"sample {i + 1}": sample for i, sample in enumerate(self.samples[:3])}
        std = self.samples.std(0).mean(1, keepdim=True).expand_as(self.x) / std_range
        columns |= {"mean": self.samples.mean(0), f"std, 0 to {std_range:g}": std}
        rows = {name: _with_centre(images[image], zoom) for name, images in columns.items()}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        dinv.utils.plot(
            rows,
            rescale_mode="clip",
            show=False,
            save_fn=file,
            figsize=(2 * len(rows), 4.3),
            fontsize=11,
            dpi=100,
        )


def compare(
    x: Tensor,
    y: Tensor,
    physics: Physics,
    model: UD2M,
    prior: Denoiser,
    *,
    num_samples: int = 8,
    zeta: float = 0.1,
    lambda_: float = 7.0,
    seed: int = 0,
) -> Comparison:
    """
    Restore measurements by UD2M, deepinv's DiffPIR in 100 steps, and the pseudo-inverse.

    :param torch.Tensor x: the truth, of shape `[B, C, H, W]`.
    :param torch.Tensor y: measurements.
    :param deepinv.physics.Physics physics: the physics that made them.
    :param deepinv_ud2m.UD2M model: the sampler.
    :param deepinv.models.Denoiser prior: the prior of DiffPIR.
    :param int num_samples: samples of UD2M, at least 2 (default: 8).
    :param float zeta: of DiffPIR, share of fresh noise in a step (default: 0.1).
    :param float lambda_: of DiffPIR, weight of the prior (default: 7).
    :param int seed: of all samples (default: 0).
    :raises ValueError: for fewer than 2 samples.

    DiffPIR takes one noise level: the mean, where each image has its own.
    """
    if check_count("num_samples", num_samples) < 2:
        raise ValueError(f"num_samples must be at least 2, for a standard deviation, got {num_samples}")
    samples, one, mean = _restore_by_ud2m(y, physics, model, num_samples, seed)
    sigma_y = float(torch.as_tensor(noise_level(physics)).mean())
    diffpir = dinv.sampling.DiffPIR(
        prior,
        dinv.optim.data_fidelity.L2(),
        sigma=sigma_y,
        max_iter=100,
        zeta=zeta,
        lambda_=lambda_,
        device=x.device,
    )
    others = [
        _timed("DiffPIR", prior, len(x), lambda: diffpir(y, physics, seed=seed + 1)),
        _timed("pseudo-inverse", prior, len(x), lambda: physics.A_dagger(y)),
    ]
    return Comparison(x, as_images(y, physics, x), samples, [one, mean, *others])


def _restore_by_ud2m(y, physics, model, num_samples, seed):
    generator = torch.Generator(y.device).manual_seed(seed)
    synchronize(y)
    start = time.perf_counter()
    samples = model.sample(y, physics, num_samples, generator=generator)
    synchronize(y)
    seconds = time.perf_counter() - start
    one = Estimate("UD2M, one sample", samples[0], model.nfe, seconds / num_samples)
    mean = Estimate(f"UD2M, mean of {num_samples}", samples.mean(0), num_samples * model.nfe, seconds)
    return samples, one, mean


@torch.no_grad()
def _timed(name: str, prior: Denoiser, batch: int, restore: Callable[[], Tensor]) -> Estimate:
    start = time.perf_counter()
    with CallCounter([prior]) as counter:
        images = restore().clamp(0, 1)
    synchronize(images)
    return Estimate(name, images, counter.images / batch, time.perf_counter() - start)


def as_images(y: Tensor, physics: Physics, x: Tensor) -> Tensor:
    """
    Measurements as images of the shape of ``x``, to look at: small ones enlarged, and what is no image
    by the pseudo-inverse.

    :param torch.Tensor y: measurements.
    :param deepinv.physics.Physics physics: the physics.
    :param torch.Tensor x: images `[B, C, H, W]`.
    """
    is_image = (
        isinstance(y, Tensor) and not y.is_complex() and y.ndim == 4 and y.shape[:2] == x.shape[:2]
    )
    if not is_image:
        y = physics.A_dagger(y)
    return interpolate(y, size=x.shape[-2:], mode="nearest").clamp(0, 1)


def _with_centre(image: Tensor, zoom: int) -> Tensor:
    """An image and its centre, enlarged to the same size, `[2, C, H, W]`."""
    height, width = image.shape[-2:]
    h, w = height // zoom, width // zoom
    top, left = (height - h) // 2, (width - w) // 2
    centre = image[None, :, top : top + h, left : left + w]
    return torch.cat([image[None], interpolate(centre, size=(height, width), mode="nearest")])
