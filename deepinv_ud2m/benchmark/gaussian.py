r"""Every method on a prior in closed form, where the true posterior is known.

The prior is :math:`x \sim \mathcal N(\mu, C)` with a stationary covariance, so that its exact denoiser
is a filter, and the posterior of a linear measurement is Gaussian, with a mean and a covariance that a
dense solve gives. Nothing is learned, so what a method gets wrong here is the method's own: its
approximations, its number of steps, its settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from deepinv.models import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor, nn
from tqdm import tqdm

from deepinv_ud2m.benchmark.methods import Sampler
from deepinv_ud2m.benchmark.run import draw, machine, measure, parse_method
from deepinv_ud2m.benchmark.tasks import TASKS, make_physics
from deepinv_ud2m.benchmark.tune import best_settings
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.metrics import coverage_curve, coverage_error, coverage_error_quantile, credible_level
from deepinv_ud2m.priors import PriorInfo
from deepinv_ud2m.proximal import noise_level
from deepinv_ud2m.randomness import randn

#: Label of the samples drawn from the true posterior.
EXACT = "exact"

#: The dense solve takes the cube of the number of pixels: seconds at this side.
_LARGEST_SIZE = 64


def gaussian_report(
    folder: str | Path,
    methods: Sequence[str],
    num_images: int = 256,
    num_samples: int = 16,
    tasks: Sequence[str] = ("inpaint-random", "deblur-gaussian"),
    sigma_y: float = 0.05,
    seed: int = 0,
    size: int = 16,
    settings: dict | None = None,
    progress: bool = True,
) -> list[dict]:
    r"""
    Compare samples of every method with the true posterior, images drawn from :class:`GaussianPrior`.

    For each task and method, and for samples of the true posterior under the name ``"exact"``:

    - ``coverage_error``: largest deviation of the coverage of norm balls from nominal
      (:func:`deepinv_ud2m.metrics.coverage_error`), and ``coverage_noise``, which an exact sampler
      stays below with a probability of 95 %.
      It says whether the spread fits the errors, also for samples that ignore the measurement;
    - ``mean_error``: root mean square distance of the mean of a method's samples to the true posterior
      mean, in units of the true posterior standard deviation, without the part that comes from the
      finite number of samples; 0 for an exact sampler;
    - ``std_ratio``: standard deviation of the samples of a method over that of the true posterior, both
      root mean squares over pixels and images; 1 for an exact sampler.

    Written are ``gaussian.json``, ``gaussian.md`` with a table, and ``gaussian.png`` with the coverage
    curves. A method that does not apply to a task is left out, as in a run; of one that is not random
    only the error of the mean is reported.

    :param str, pathlib.Path folder: where to write; made if it does not exist.
    :param Sequence[str] methods: labels of methods, see :func:`deepinv_ud2m.benchmark.run.parse_method`.
    :param int num_images: number of images.
    :param int num_samples: samples per image, at least 2.
    :param Sequence[str] tasks: names of tasks.
    :param float sigma_y: noise level.
    :param int seed: of images, measurements and samples.
    :param int size: side of the images.
    :param dict, None settings: result of :func:`deepinv_ud2m.benchmark.tune.tune`; by default the
        methods run with their defaults. The settings in a label win over both.
    :param bool progress: show a progress bar.
    :returns: one line per task and method.
    :raises ValueError: for unknown tasks or methods, numbers out of range, a size that a task or the
        dense solve cannot take, or samples that are not finite.
    """
    check_count("num_images", num_images)
    if check_count("num_samples", num_samples) < 2:
        raise ValueError(f"num_samples must be at least 2 to have a coverage, got {num_samples}")
    if check_count("size", size) > _LARGEST_SIZE:
        raise ValueError(f"size must be at most {_LARGEST_SIZE} for the dense solve, got {size}")
    if not tasks:
        raise ValueError("tasks must name at least one task, got none")
    prior = GaussianPrior()
    problems = {task: _physics(task, size, sigma_y) for task in tasks}
    for task, physics in problems.items():
        if not isinstance(physics, LinearPhysics):
            raise ValueError(f"tasks must be linear, to have a Gaussian posterior; got {task!r}")
    samplers = {
        task: _samplers(prior, task, physics, methods, sigma_y, settings)
        for task, physics in problems.items()
    }
    folder = _make_folder(folder)
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(3)]
    x = prior.draw(num_images, size, torch.Generator().manual_seed(seeds[0]))
    lines = []
    for task, physics in problems.items():
        y = measure(physics, x, range(num_images), seeds[1])
        posterior = GaussianPosterior(prior, physics, x.shape[1:])
        runs = {EXACT: (posterior.sampler(), {}, True)} | samplers[task]
        bar = tqdm(runs.items(), desc=task, disable=not progress)
        for method, (sampler, used, random) in bar:
            bar.set_postfix_str(method)
            samples, cost = draw(sampler, prior, y, physics, num_samples if random else 1, seeds[2])
            if not samples.isfinite().all():
                raise ValueError(f"the samples of {method} on {task} are not finite, settings {used}")
            head = {"task": task, "method": method, "settings": used, "images": num_images}
            cost = {key: cost[key] for key in ("nfe", "nfe_backward", "seconds")}
            lines.append(head | compare(samples, x, posterior, y) | cost)
    _write(folder, {"prior": repr(prior), "size": size, "sigma_y": sigma_y, "seed": seed}, lines)
    return lines


def compare(samples: Tensor, x: Tensor, posterior: GaussianPosterior, y: Tensor) -> dict:
    """
    Samples against the true posterior, the numbers told in :func:`gaussian_report`.

    :param torch.Tensor samples: samples of each image, `[S, N, C, H, W]`; one if they are not random.
    :param torch.Tensor x: the true images.
    :param GaussianPosterior posterior: the true posterior.
    :param torch.Tensor y: the measurements.
    """
    num_images, num_samples = len(x), len(samples)
    line = {"samples": num_samples}
    true_variance = posterior.std.square().mean()
    samples = samples.double()
    square = (samples.mean(0) - posterior.mean(y)).square().mean()
    if num_samples > 1:
        variance = samples.var(0).mean()
        square = square - variance / num_samples  # the part of the finite number of samples
        levels = torch.arange(1, num_samples + 1, dtype=torch.float64) / (num_samples + 1)
        shares = coverage_curve(credible_level(samples, x), levels)
        line |= {
            "levels": levels.tolist(),
            "coverage": shares.tolist(),
            "coverage_error": coverage_error(levels, shares).item(),
            "coverage_noise": coverage_error_quantile(num_images, num_samples),
            "std_ratio": (variance / true_variance).sqrt().item(),
        }
    return line | {"mean_error": (square.clamp(min=0) / true_variance).sqrt().item()}


# -- The prior and the posterior ------------------------------------------------------------------


class GaussianPrior(Denoiser):
    r"""
    :math:`x \sim \mathcal N(\mu, C)`, and its exact denoiser.

    :math:`C` is a Matern covariance on the torus, with the spectrum
    :math:`\lambda(\omega) \propto (1 + \ell^2 |\omega|^2)^{-2}`, the same at every image size: smooth
    images of any size and number of channels. The denoiser

    .. math:: \mathbb E[x \mid x + \sigma \varepsilon = w] =
              \mu + \mathcal F^{-1} \frac{\lambda}{\lambda + \sigma^2} \mathcal F (w - \mu)

    is defined for all levels :math:`\sigma \geq 0`.

    :param float mean: mean :math:`\mu` of a pixel.
    :param float std: standard deviation of a pixel, positive. By default [0, 1] is five of them to each
        side of the mean, so that samplers may clamp to [0, 1] without a noticeable bias.
    :param float length: correlation length :math:`\ell`, in pixels, positive.
    :raises ValueError: if ``std`` or ``length`` is not positive.
    """

    def __init__(self, mean: float = 0.5, std: float = 0.1, length: float = 2.0):
        super().__init__()
        for name, value in (("std", std), ("length", length)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        # A parameter, as samplers ask the prior for its device through its parameters.
        self.mean = nn.Parameter(torch.tensor(float(mean)), requires_grad=False)
        self.std, self.length = std, length
        self.prior_info = PriorInfo("gaussian", channels=1, sigma_min=0.0, sigma_max=math.inf)

    def forward(self, x: Tensor, sigma: float | Tensor, **kwargs) -> Tensor:
        r"""
        :param torch.Tensor x: noisy images, `[B, C, H, W]`.
        :param float, torch.Tensor sigma: noise level, one or one per image.
        :returns: the posterior means.
        """
        variance = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1) ** 2
        spectrum = self.spectrum(*x.shape[-2:]).to(x)
        return self.mean + _filter(x - self.mean, spectrum / (spectrum + variance))

    def draw(self, num: int, size: int, generator: torch.Generator | None = None) -> Tensor:
        """
        Grey images of the prior.

        :param int num: how many.
        :param int size: side of the images.
        :param torch.Generator generator: random generator, on the device of the prior.
        :returns: images, `[num, 1, size, size]`.
        """
        noise = randn(self.mean.new_empty(num, 1, size, size), generator)
        return self.mean + _filter(noise, self.spectrum(size, size).sqrt().to(noise))

    def spectrum(self, height: int, width: int) -> Tensor:
        """Eigenvalues of the covariance, one per frequency `[height, width]`, in double precision."""
        rows, columns = (
            2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width)
        )
        spectrum = (1 + self.length**2 * (rows[:, None] ** 2 + columns**2)) ** -2
        # The mean of the eigenvalues is the variance of a pixel.
        return self.std**2 * spectrum / spectrum.mean()

    def covariance(self, shape: Sequence[int]) -> Tensor:
        """The dense covariance of images of shape `(C, H, W)`, in double precision."""
        d = math.prod(shape)
        identity = torch.eye(d, dtype=torch.float64).reshape(d, *shape)
        return _filter(identity, self.spectrum(*shape[-2:])).reshape(d, d)

    def extra_repr(self) -> str:
        return f"mean={self.mean.item():.3g}, std={self.std}, length={self.length}"


class GaussianPosterior:
    r"""
    :math:`p(x \mid y)` of a linear physics with Gaussian noise under a :class:`GaussianPrior`:

    .. math::
        G = C A^\top (A C A^\top + \sigma_y^2 I)^{-1}, \qquad
        x \mid y \sim \mathcal N(\mu + G (y - A \mu), \; C - G A C) .

    :param GaussianPrior prior: the prior.
    :param deepinv.physics.LinearPhysics physics: the physics, the same for all images.
    :param Sequence[int] shape: shape `(C, H, W)` of the images.
    :raises TypeError: if the physics is not linear.
    """

    def __init__(self, prior: GaussianPrior, physics: Physics, shape: Sequence[int]):
        if not isinstance(physics, LinearPhysics):
            raise TypeError(f"physics must be a LinearPhysics, got {type(physics).__name__}")
        self.shape = tuple(shape)
        d = math.prod(shape)
        A = physics.A(torch.eye(d).reshape(d, *shape)).flatten(1).double().T
        prior_covariance = prior.covariance(shape)
        covariance_of_y = A @ prior_covariance @ A.T
        covariance_of_y.diagonal().add_(noise_level(physics).double() ** 2)
        self._gain = torch.linalg.solve(covariance_of_y, A @ prior_covariance).T
        self._prior_mean = prior.mean.double().expand(d)
        self._mean_of_y = A @ self._prior_mean
        #: The dense covariance, the same for all measurements.
        self.covariance = prior_covariance - self._gain @ A @ prior_covariance
        self._factor = torch.linalg.cholesky(self.covariance)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each pixel, `[C, H, W]`."""
        return self.covariance.diagonal().sqrt().reshape(self.shape)

    def mean(self, y: Tensor) -> Tensor:
        """
        :param torch.Tensor y: measurements of B images.
        :returns: posterior means, `[B, C, H, W]`, in double precision.
        """
        mean = self._prior_mean + (y.flatten(1).double() - self._mean_of_y) @ self._gain.T
        return mean.reshape(-1, *self.shape)

    def draw(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """
        :param torch.Tensor y: measurements of B images.
        :param torch.Generator generator: random generator.
        :returns: a sample for each, `[B, C, H, W]`, in double precision.
        """
        mean = self.mean(y)
        return mean + (randn(mean, generator).flatten(1) @ self._factor.T).reshape(mean.shape)

    def sampler(self) -> Sampler:
        """The posterior as a sampler of the benchmark."""
        return lambda y, physics, seed: self.draw(y, torch.Generator().manual_seed(seed))


def _filter(x: Tensor, transfer: Tensor) -> Tensor:
    """Multiply by a real and even function of the frequencies."""
    height, width = x.shape[-2:]
    half = transfer[..., : width // 2 + 1]
    return torch.fft.irfft2(torch.fft.rfft2(x) * half, s=(height, width))


# -- The parts of the report ----------------------------------------------------------------------


def _physics(task: str, size: int, sigma_y: float) -> Physics:
    physics = make_physics(task, (1, size, size), sigma_y)
    kernel = getattr(physics, "filter", None)
    # deepinv's proximal operators are wrong for kernels that the image does not hold.
    if kernel is not None and max(kernel.shape[-2:]) > size:
        raise ValueError(
            f"size must be at least {max(kernel.shape[-2:])}, that of the kernel of {task}, got {size}"
        )
    return physics


def _samplers(
    prior: Denoiser,
    task: str,
    physics: Physics,
    methods: Sequence[str],
    sigma_y: float,
    tuned: dict | None,
) -> dict[str, tuple[Callable, dict, bool]]:
    """Per method that applies its sampler, its settings, and whether it is random."""
    samplers = {}
    for method in methods:
        entry, overrides = parse_method(method)
        if not entry.applies(physics):
            continue
        found = {} if tuned is None else best_settings(tuned, task, method)
        used = dict(entry.defaults) | found | overrides
        samplers[method] = (entry.build(prior, sigma_y, **used), used, entry.random)
    return samplers


def _make_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder must be one that can be written to, got {folder}: {error}") from error
    return folder


def _write(folder: Path, setup: dict, lines: list[dict]) -> None:
    about = {"setup": setup, "machine": machine()}
    (folder / "gaussian.json").write_text(json.dumps(about | {"lines": lines}, indent=1) + "\n")
    (folder / "gaussian.md").write_text(_markdown(about, lines))
    _plot(folder / "gaussian.png", lines)


def _markdown(about: dict, lines: list[dict]) -> str:
    setup, machine = about["setup"], about["machine"]
    first = lines[0]
    parts = [
        "# Gaussian prior",
        "",
        f"`{setup['prior']}`, {first['images']} images of {setup['size']}x{setup['size']} pixels drawn "
        f"from it, {first['samples']} samples of each, noise {setup['sigma_y']}, seed {setup['seed']}; "
        f"deepinv {machine['deepinv']}, torch {machine['torch']}, commit {machine['commit']}. The "
        "denoiser of all methods is the exact one of this prior.",
        "",
        "Coverage error: largest deviation of the coverage of norm balls from nominal; 95 % of runs of "
        f"an exact sampler stay below **{first['coverage_noise']:.3f}**. Samples that ignore the "
        "measurement are covered as well: read it together with the error of the mean, the distance of "
        "the mean of the samples to the true posterior mean, in true posterior standard deviations, "
        "without the part of the finite number of samples; 0 if exact. Ratio of spread: standard "
        "deviation of the samples over that of the true posterior; 1 if exact. NFE: forward (+ "
        f"backward) evaluations of the prior per sample. `{EXACT}` draws from the true posterior.",
    ]
    head = ["method", "settings", "NFE", "coverage error", "within noise", "error of the mean"]
    head += ["ratio of spread"]
    for task in dict.fromkeys(line["task"] for line in lines):
        parts += ["", f"## {TASKS[task].title}", "", _row(head), _row(["---"] * len(head))]
        parts += [_row(_cells(line)) for line in lines if line["task"] == task]
    return "\n".join(parts) + "\n"


def _cells(line: dict) -> list[str]:
    backward = f" + {line['nfe_backward']:.0f}" if line["nfe_backward"] else ""
    cells = [
        line["method"],
        ", ".join(f"{name} {value}" for name, value in line["settings"].items()) or "-",
        f"{line['nfe']:.0f}{backward}",
    ]
    if "coverage_error" not in line:
        return [*cells, "-", "-", f"{line['mean_error']:.2f}", "-"]
    return [
        *cells,
        f"{line['coverage_error']:.3f}",
        "yes" if line["coverage_error"] < line["coverage_noise"] else "no",
        f"{line['mean_error']:.2f}",
        f"{line['std_ratio']:.2f}",
    ]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plot(file: Path, lines: list[dict]) -> None:
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    fig, axes = plt.subplots(1, len(tasks), figsize=(3.8 * len(tasks), 3.8), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        of_task = [line for line in lines if line["task"] == task and "coverage" in line]
        _plot_band(axis, of_task[0]["coverage_noise"])
        for line in of_task:
            style = {"color": "black", "linestyle": "--"} if line["method"] == EXACT else {}
            axis.plot([0, *line["levels"], 1], [0, *line["coverage"], 1], label=line["method"], **style)
        axis.set(title=TASKS[task].title, xlabel="nominal level", ylabel="coverage", aspect="equal")
        axis.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(file, dpi=110)
    plt.close(fig)


def _plot_band(axis: plt.Axes, noise: float) -> None:
    """Where 95 % of the curves of an exact sampler are in whole."""
    diagonal = np.linspace(0, 1, 101)
    low, high = (diagonal - noise).clip(0), (diagonal + noise).clip(max=1)
    axis.fill_between(diagonal, low, high, color="grey", alpha=0.25, linewidth=0)
