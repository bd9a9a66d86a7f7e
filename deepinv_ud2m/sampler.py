r"""UD2M: a posterior sampler that needs few network evaluations (Mbakam et al. 2025, Algorithm 1).

Levels :math:`s_N > \dots > s_1 > s_0 = 0`, and :math:`x_{s_N} \sim \mathcal N(1/2, s_N^2 I)`.
For n = N, ..., 1:

.. math::
    x_0 &\leftarrow L(y, x_{s_n}, s_n) \quad \text{(a draw from } p(x \mid y, x_{s_n})), \\
    x_{s_{n-1}} &= x_0 + \sqrt{s_{n-1}^2 - \tau_n^2}\; (x_{s_n} - x_0) / s_n + \tau_n\, \varepsilon,
    \qquad \tau_n = \eta\, s_{n-1} \sqrt{1 - s_{n-1}^2 / s_n^2} .

The last :math:`x_0` is the sample. With :math:`\eta = 1` a step is exact for any gap between levels: it
draws from the posterior of the diffusion. With :math:`\eta = 0` it is the deterministic step of DDIM.

A sampler with a nominal RMSE :math:`h^*` adapts its levels to each measurement. The initializer predicts
the RMSE h(y) of its estimate at the first level. All levels but the first and the last are scaled by it:

.. math::
    s_n(y) = \max(s_1, \min(s_N, s_n\, h(y) / h^*)), \qquad N > n > 1 .
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from deepinv.models import Denoiser, Reconstructor
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm.auto import tqdm

from deepinv_ud2m import checkpoint
from deepinv_ud2m.checks import Scalar, check_count, check_device, check_interval, check_number
from deepinv_ud2m.counting import CallCounter
from deepinv_ud2m.initializers import Initializer
from deepinv_ud2m.measurements import check_level
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.randomness import SampleStreams, draw_seeds, randn
from deepinv_ud2m.residual import START_LEVEL, check_residual, estimate_noise
from deepinv_ud2m.schedule import VPSchedule, check_sigmas
from deepinv_ud2m.uncertainty import Conformal


@dataclass
class Trajectory:
    """
    States and draws of a sampler, from the first level to the last.

    :param torch.Tensor sigmas: the levels s_N, ..., s_1, of shape `[N]`. A sampler with a ``nominal_rmse``
        has other levels for each sample, of shape `[N, num_samples, B]`.
    :param torch.Tensor x0: the draw of x at each level, of shape `[N, num_samples, B, C, H, W]`.
    :param torch.Tensor x_s: the state before each draw, of the same shape.

    |sep|

    :Examples:

        >>> import deepinv as dinv
        >>> import torch
        >>> from deepinv_ud2m import UD2M
        >>> model = UD2M.from_pretrained("mnist")
        >>> physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
        >>> samples, trajectory = model.sample(torch.zeros(1, 1, 32, 32), physics, 2, return_trajectory=True)
        >>> trajectory.x0.shape  # three levels, two samples, one image
        torch.Size([3, 2, 1, 1, 32, 32])
        >>> torch.equal(trajectory.x0[-1].clamp(0, 1), samples)
        True
    """

    sigmas: Tensor
    x0: Tensor
    x_s: Tensor


class UD2M(Reconstructor):
    r"""
    Posterior sampler: :math:`\hat x \sim p(x \mid y)` in N steps of an unfolded denoiser.

    Gradients do not flow through it. To train, train the unfolded denoiser.

    :param torch.nn.Module unfolded: a :class:`deepinv_ud2m.UnfoldedDenoiser`, or any module with a method
        ``draw(problem, x_s, sigma, *, generator=None)`` that draws from :math:`p(x \mid y, x_s)`. It takes
        its noise from :func:`deepinv_ud2m.randomness.randn`.
    :param int num_steps: number N of levels (default: 3).
    :param float eta: randomness of the steps, in [0, 1] (default: 1, the exact step).
    :param deepinv_ud2m.VPSchedule schedule: gives the levels (default: linear, with 1000 times).
    :param Sequence[float] sigmas: the levels, in place of ``num_steps`` and ``schedule``; strictly
        decreasing, in [1e-6, 1e6].
    :param tuple[float, float], None output_range: samples are clamped to it (default: (0, 1)). ``None``
        leaves them as they are.
    :param float, None nominal_rmse: :math:`h^*`, positive, in units of the image: the predicted RMSE for
        which the levels are taken as they are (default: ``None``, the same levels for all measurements). It
        needs an initializer that predicts its error, such as
        :class:`deepinv_ud2m.PosteriorMeanInitializer`, and costs no network evaluation.
    :param float, torch.Tensor, str, None sigma_y: noise level of measurements when the call gives none, or
        ``"estimate"`` (default: that of the physics). Callers such as ``deepinv.test`` need it where the
        noise is not Gaussian. It can be set later. :meth:`save_pretrained` does not store it.
    :param Mapping conformal: intervals of calibrated coverage by name, such as that of the task they were
        fitted to, each a :class:`deepinv_ud2m.uncertainty.Conformal` or its arguments (default: none). It is
        the attribute ``conformal``, and :meth:`save_pretrained` stores it.
    :raises TypeError: for an argument of a wrong type, or an ``unfolded`` without ``draw``.
    :raises ValueError: for other values, ``sigmas`` together with ``num_steps`` or ``schedule``, or a
        ``nominal_rmse`` where no initializer predicts its error.

    The attribute ``nfe`` is the number of network evaluations per sample in the last call. It is counted,
    in each thread by itself. It is ``None`` if ``unfolded`` does not name its ``networks``.
    The attribute ``residual``, of shape `[B]`, is the root mean square of :math:`(A \hat x - y) / \sigma_y`
    of the first sample in the last call, see :mod:`deepinv_ud2m.residual`. It is about 1 if all is right, and
    a call warns if it is not. It is ``None`` for a physics that is not linear.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
        >>> from deepinv_ud2m.data import mnist_digits
        >>> model = UD2M(UnfoldedDenoiser(load_prior("mnist")))
        >>> x = mnist_digits("test", num=2)
        >>> physics = dinv.physics.Inpainting((1, 32, 32), mask=0.3,
        ...                                   noise_model=dinv.physics.GaussianNoise(0.05))
        >>> y = physics(x)
        >>> x_hat = model(y, physics)
        >>> x_hat.shape, model.nfe
        (torch.Size([2, 1, 32, 32]), 9.0)
        >>> model.sample(y, physics, num_samples=4).shape
        torch.Size([4, 2, 1, 32, 32])
    """

    unfolded: Any  # an UnfoldedDenoiser, or any module with a method ``draw``
    sigmas: Tensor

    def __init__(
        self,
        unfolded: nn.Module,
        num_steps: int | None = None,
        eta: float = 1.0,
        schedule: VPSchedule | None = None,
        *,
        sigmas: Sequence[float] | Tensor | None = None,
        output_range: tuple[float, float] | None = (0.0, 1.0),
        nominal_rmse: float | None = None,
        sigma_y: Scalar | str | None = None,
        conformal: Mapping[str, Conformal | Mapping] | None = None,
    ):
        super().__init__()
        if not isinstance(unfolded, nn.Module) or not callable(getattr(unfolded, "draw", None)):
            raise TypeError(
                f"unfolded must be an unfolded denoiser, got {type(unfolded).__name__}; for a prior D, "
                "write UD2M(UnfoldedDenoiser(D))"
            )
        if schedule is not None and not isinstance(schedule, VPSchedule):
            raise TypeError(f"schedule must be a VPSchedule, got {schedule!r}")
        if sigmas is not None and (num_steps is not None or schedule is not None):
            raise ValueError("sigmas stand in place of num_steps and schedule: give one or the other")
        self.unfolded, self.eta = unfolded, check_number("eta", eta, 0, 1)
        self.output_range = check_interval("output_range", output_range)
        self.nominal_rmse = _check_nominal_rmse(nominal_rmse, unfolded)
        self.sigma_y = sigma_y
        if sigma_y is not None and not isinstance(sigma_y, str):
            check_level(sigma_y)
        elif sigma_y not in (None, "estimate"):
            raise ValueError(f"sigma_y must be a level or 'estimate', got {sigma_y!r}")
        if not isinstance(conformal, Mapping | None):
            raise TypeError(f"conformal must be Conformal by name, got {conformal!r}")
        self.conformal = {name: Conformal.of(one) for name, one in (conformal or {}).items()}
        if sigmas is None:
            schedule = schedule if schedule is not None else VPSchedule()
            num_steps = 3 if num_steps is None else check_count("num_steps", num_steps)
            sigmas = schedule.sampling_sigmas(num_steps)
        self.register_buffer("sigmas", check_sigmas(sigmas), persistent=False)
        self.nfe: float | None = None
        self.residual: Tensor | None = None

    @property
    def num_steps(self) -> int:
        """Number N of levels."""
        return len(self.sigmas)

    def forward(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        *,
        generator: torch.Generator | None = None,
        sigma_y: Scalar | str | None = None,
    ) -> Tensor:
        r"""
        One posterior sample per measurement.

        :param torch.Tensor y: measurements, finite.
        :param deepinv.physics.Physics physics: the physics that made them.
        :param torch.Generator generator: random generator, on the device of ``y`` (default: PyTorch's own).
            The same seed gives the same sample.
        :param float, torch.Tensor, str sigma_y: noise level, see :meth:`sample`.
        :returns: samples, of shape `[B, C, H, W]`.
        :raises ValueError, TypeError: if the problem is not one the sampler can take.
        """
        return self.sample(y, physics, 1, generator=generator, sigma_y=sigma_y)[0]

    @overload
    def sample(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        num_samples: int = 1,
        *,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        sigma_y: Scalar | str | None = None,
        return_trajectory: Literal[False] = False,
        verbose: bool = False,
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        num_samples: int = 1,
        *,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        sigma_y: Scalar | str | None = None,
        return_trajectory: Literal[True],
        verbose: bool = False,
    ) -> tuple[Tensor, Trajectory]: ...

    @torch.no_grad()
    def sample(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        num_samples: int = 1,
        *,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        sigma_y: Scalar | str | None = None,
        return_trajectory: bool = False,
        verbose: bool = False,
    ) -> Tensor | tuple[Tensor, Trajectory]:
        r"""
        Several posterior samples per measurement.

        Each sample has a random stream of its own, so the result depends on ``batch_size`` only by rounding.
        Where the initial estimate is iterative, rounding may change its last iteration: samples then
        differ by about 1e-3, rarely by 1e-2.

        :param torch.Tensor y: measurements, finite.
        :param deepinv.physics.Physics physics: the physics that made them.
        :param int num_samples: samples S per measurement, at least 1 (default: 1).
        :param int, None batch_size: largest number of images in one network pass (default: as many as a
            processor is fastest with, 8 of 128x128 on a CPU, or as the free memory of a GPU holds). A pass
            has at least B images, one sample of each measurement.
        :param torch.Generator generator: random generator, on the device of ``y`` (default: PyTorch's own).
        :param float, torch.Tensor, str sigma_y: noise level, where the physics does not tell it. With
            ``"estimate"`` it is found for each image by :meth:`estimate_sigma_y`, for one to four samples
            more. A physics without noise has the level 0.005. Too low a level hurts more than too high a one.
        :param bool return_trajectory: also return all draws and states (default: ``False``).
        :param bool verbose: show a progress bar over levels and batches (default: ``False``).
        :returns: samples of shape `[S, B, C, H, W]`, and a :class:`Trajectory` if asked for.
        :raises ValueError, TypeError: if the problem is not one the sampler can take.
        """
        sigma_y = self.sigma_y if sigma_y is None else sigma_y
        networks = getattr(self.unfolded, "networks", None)
        is_estimated = isinstance(sigma_y, str) and sigma_y == "estimate"
        problem = self._problem(y, physics, START_LEVEL if is_estimated else sigma_y)
        self._check_call(problem, num_samples, batch_size, generator)
        with CallCounter(networks or []) as counter:
            if is_estimated:
                problem = problem.of(problem.y, self._estimate(problem, generator).view(-1, 1, 1, 1))
            options = {"all_levels": return_trajectory, "verbose": verbose}
            sigmas, x_s, x0 = self._sample(problem, num_samples, batch_size, generator, **options)
        self.nfe = None if networks is None else counter.images / (num_samples * problem.shape[0])
        samples = self._as_images(problem, x0[-1])
        self.residual = check_residual(problem, samples[0])
        if not return_trajectory:
            return samples
        return samples, Trajectory(sigmas if self.nominal_rmse is not None else self.sigmas.clone(), x0, x_s)

    def _sample(
        self,
        problem: Problem,
        num_samples: int,
        batch_size: int | None,
        generator: torch.Generator | None,
        all_levels: bool = False,
        verbose: bool = False,
    ) -> tuple[Tensor, ...]:
        """Levels, states and draws `[N, S, B, ...]`, or those of the last level alone, `[1, S, B, ...]`."""
        batch = problem.shape[0]
        seeds = draw_seeds(num_samples * batch, generator)
        per_pass = max(1, (batch_size or _images_per_pass(problem)) // batch)
        passes = [seeds[i : i + per_pass * batch] for i in range(0, len(seeds), per_pass * batch)]
        noises = self.num_steps * (getattr(self.unfolded, "num_iterations", 1) + 1)  # images of one stream
        noises = min(noises, _BLOCK)
        found: tuple[list[Tensor], ...] = [], [], []
        with tqdm(total=len(passes) * self.num_steps, desc="UD2M", disable=not verbose) as bar:
            for seeds_of_pass in passes:
                streams = SampleStreams(seeds_of_pass, problem.device, block=noises)
                repeated = problem.repeat(len(seeds_of_pass) // batch)
                visited: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=None if all_levels else 1)
                for visit in self.chain(repeated, self.first_state(repeated.adjoint, streams), streams):
                    visited.append(visit)
                    bar.update()
                parts = (torch.stack(part) for part in zip(*visited, strict=True))
                for of_all, part in zip(found, parts, strict=True):
                    of_all.append(part.unflatten(1, (-1, batch)))
        return tuple(torch.cat(of_all, 1) for of_all in found)

    def _as_images(self, problem: Problem, x: Tensor) -> Tensor:
        """Draws `[..., C, H, W]` as the user gets them."""
        x = x.mean(-3, keepdim=True) if problem.is_grey else x
        return x if self.output_range is None else x.clamp(*self.output_range)

    @torch.no_grad()
    def estimate_sigma_y(
        self, y: Tensor | TensorList, physics: Physics, *, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""
        The noise level of measurements: the one whose samples leave it as their residual. It takes one to
        four samples. Its error is below 20 % for one level, and up to 50 % where levels differ between
        images, for measurements like those of training.

        :param torch.Tensor y: measurements, finite.
        :param deepinv.physics.LinearPhysics physics: the physics that made them; its noise model is not used.
        :param torch.Generator generator: as for :meth:`sample`.
        :returns: levels :math:`\sigma_y`, of shape `[B]`, in [0.001, 1].
        :raises TypeError: if the physics is not linear.
        """
        problem = self._problem(y, physics, START_LEVEL)
        self._check_call(problem, 1, None, generator)
        return self._estimate(problem, generator)

    def _estimate(self, problem: Problem, generator: torch.Generator | None) -> Tensor:
        sample = lambda p: self._as_images(p, self._sample(p, 1, None, generator)[2][-1, 0])  # noqa: E731
        return estimate_noise(problem, sample)

    def first_state(self, like: Tensor, generator: torch.Generator | SampleStreams | None = None) -> Tensor:
        """
        A state at the first level: noise around 1/2.

        :param torch.Tensor like: images of the shape `[B, C, H, W]`, dtype and device to draw.
        :param torch.Generator, SampleStreams generator: source of the noise.
        :returns: the state, `[B, C, H, W]`.
        """
        return 0.5 + self.sigmas[0].to(like) * randn(like, generator)

    def chain(
        self,
        problem: Problem,
        x_s: Tensor,
        generator: torch.Generator | SampleStreams | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """
        Go down the levels. Gradients flow where they are enabled, and draws are not clamped.

        :param deepinv_ud2m.Problem problem: the problem, of as many images as states.
        :param torch.Tensor x_s: states at the first level, `[B, C, H, W]`.
        :param torch.Generator, SampleStreams generator: source of the noise.
        :returns: an iterator over the N levels. It gives the level of each state, `[B]`, the states, and
            the draws of x from them.
        """
        sigmas, known = self._sigmas_of(problem, x_s)
        for n in range(self.num_steps):
            found = known if n == 0 else {}
            x0 = self.unfolded.draw(problem, x_s, sigmas[n], generator=generator, **found)
            yield sigmas[n].expand(len(x_s), 1, 1, 1).flatten(), x_s, x0
            if n + 1 < self.num_steps:
                with record_function("UD2M step"):
                    x_s = self.step(x0, x_s, sigmas[n], sigmas[n + 1], generator)

    def _sigmas_of(self, problem: Problem, x_s: Tensor) -> tuple[Tensor, dict]:
        """The levels, `[N]` or `[N, B, 1, 1, 1]`, and arguments for the first draw that are known already."""
        sigmas = self.sigmas.to(x_s.device, x_s.dtype)
        if self.nominal_rmse is None:
            return sigmas, {}
        initial = self.unfolded.initial_estimate(problem, x_s, sigmas[0])
        # Detached: a loss must not be lowered by moving the levels.
        scale = initial[1].detach().to(x_s.dtype) / self.nominal_rmse
        relative = (sigmas.view(-1, 1, 1, 1, 1) * scale).clamp(sigmas[-1], sigmas[0])
        relative[0], relative[-1] = sigmas[0], sigmas[-1]
        return relative, {"initial": initial}

    def step(
        self,
        x0: Tensor,
        x_s: Tensor,
        sigma: Scalar,
        sigma_next: Scalar,
        generator: torch.Generator | SampleStreams | None = None,
    ) -> Tensor:
        r"""
        The state at the next level, given a draw of x.

        :param torch.Tensor x0: draw from :math:`p(x \mid y, x_s)`, of shape `[B, C, H, W]`.
        :param torch.Tensor x_s: state at level ``sigma``, of the same shape.
        :param float, torch.Tensor sigma: level s, 0-d or broadcastable.
        :param float, torch.Tensor sigma_next: next level, below s.
        :param torch.Generator, SampleStreams generator: source of the noise.
        :returns: state at level ``sigma_next``.
        """
        ratio = sigma_next / sigma
        # tau = eta s' sqrt(1 - r^2), and sqrt(s'^2 - tau^2) / s = r sqrt(1 - eta^2 (1 - r^2))
        tau = self.eta * sigma_next * (1 - ratio**2) ** 0.5
        kept = ratio * (1 - self.eta**2 * (1 - ratio**2)) ** 0.5
        return x0 + kept * (x_s - x0) + tau * randn(x_s, generator)

    def config(self) -> dict:
        """Its arguments, except for the unfolded denoiser, as values of JSON."""
        return {
            "sigmas": self.sigmas.tolist(),
            "eta": self.eta,
            "output_range": None if self.output_range is None else list(self.output_range),
            "nominal_rmse": self.nominal_rmse,
            **({"conformal": {k: asdict(v) for k, v in self.conformal.items()}} if self.conformal else {}),
        }

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """
        Write the sampler into a folder.

        :param str, pathlib.Path folder: where to write; made if it does not exist.
        :param options: ``prior``, ``metadata`` and ``dtype`` of :func:`deepinv_ud2m.checkpoint.save`.
        """
        checkpoint.save(self.unfolded, folder, sampler=self.config(), **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        prior: Denoiser | str | Path | None = None,
        initializer: Initializer | None = None,
        device: torch.device | str | None = None,
        merge: bool = True,
        revision: str | None = None,
    ) -> UD2M:
        """
        A trained sampler by name, from a folder, or from the Hugging Face Hub.

        :param torch.device, str, None device: where to put it (default: where the prior is). The other
            arguments, and the errors, are those of :func:`deepinv_ud2m.checkpoint.load`.

        |sep|

        :Examples:

            >>> from deepinv_ud2m import UD2M
            >>> UD2M.from_pretrained("mnist").num_steps
            3
        """
        check_device(device)
        options: dict[str, Any] = {
            "prior": prior,
            "initializer": initializer,
            "merge": merge,
            "revision": revision,
        }
        model = checkpoint.load(name_or_path, make=cls, **options)
        if device is None:
            device = next((p.device for p in model.unfolded.denoiser.parameters()), "cpu")
        return model.eval().to(device)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """
        Upload what :meth:`save_pretrained` writes to the Hugging Face Hub.

        :param str repo_id: ``"user/repo"``, or ``"repo"`` in one's own name.
        :param options: those of :func:`deepinv_ud2m.checkpoint.push_to_hub`.
        :returns: address of the repository.
        """
        return checkpoint.push_to_hub(self.unfolded, repo_id, sampler=self.config(), **options)

    def _problem(self, y: Tensor | TensorList, physics: Physics, sigma_y: Any) -> Problem:
        weight = next(self.unfolded.parameters(), None)
        first = y[0] if isinstance(y, TensorList) and len(y) else y
        if weight is not None and isinstance(first, Tensor) and first.device != weight.device:
            raise ValueError(
                f"y must be on the device of the model, {weight.device}, got y on {first.device}: move "
                "one with .to(device)"
            )
        channels = getattr(getattr(self.unfolded, "prior_info", None), "channels", None)
        problem = Problem(y, physics, sigma_y, channels)
        if hasattr(self.unfolded, "check"):
            self.unfolded.check(problem, self.sigmas)
        return problem

    def _check_call(
        self, problem: Problem, num_samples: int, batch_size: int | None, generator: torch.Generator | None
    ) -> None:
        check_count("num_samples", num_samples)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if generator is not None and not hasattr(generator, "device"):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if generator is not None and generator.device.type != problem.device.type:
            raise ValueError(
                f"generator must be on the device of y, {problem.device}, got one on {generator.device}"
            )

    def __repr__(self) -> str:
        sigmas = [f"{sigma:.4g}" for sigma in self.sigmas.tolist()]
        if len(sigmas) > 6:
            sigmas = [*sigmas[:3], "...", *sigmas[-2:]]
        return (
            f"UD2M({self.unfolded}, N={self.num_steps}, sigmas=[{', '.join(sigmas)}], eta={self.eta}, "
            f"output_range={self.output_range}, nominal_rmse={self.nominal_rmse})"
        )


#: Most images of noise of one sample that are drawn at once.
_BLOCK = 32


def _images_per_pass(problem: Problem) -> int:
    pixels = 8 * 128**2  # more leave the caches of a CPU: 32 at once take 1.6 times as long
    if problem.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(problem.device)
        # PyTorch keeps memory that it will use again.
        free += torch.cuda.memory_reserved(problem.device) - torch.cuda.memory_allocated(problem.device)
        pixels = free // 2**14  # 16 kB, for the largest networks
    return max(1, pixels // (problem.shape[-2] * problem.shape[-1]))


def _check_nominal_rmse(nominal_rmse: float | None, unfolded: nn.Module) -> float | None:
    if nominal_rmse is None:
        return None
    if not getattr(unfolded, "predicts_rmse", False):
        raise ValueError(
            f"nominal_rmse={nominal_rmse!r} needs an initializer that predicts its error, such as "
            "PosteriorMeanInitializer; that of this unfolded denoiser does not"
        )
    return check_number("nominal_rmse", nominal_rmse, positive=True)
