r"""UD2M: a posterior sampler that needs few network evaluations (Mbakam et al. 2025, Algorithm 1).

Levels :math:`s_N > \dots > s_1 > s_0 = 0`, and :math:`x_{s_N} \sim \mathcal N(1/2, s_N^2 I)`.
For n = N, ..., 1:

.. math::
    x_0 &\leftarrow L(y, x_{s_n}, s_n) \quad \text{(a draw from } p(x \mid y, x_{s_n})), \\
    x_{s_{n-1}} &= x_0 + \sqrt{s_{n-1}^2 - \tau_n^2}\; (x_{s_n} - x_0) / s_n + \tau_n\, \varepsilon,
    \qquad \tau_n = \eta\, s_{n-1} \sqrt{1 - s_{n-1}^2 / s_n^2} .

The last :math:`x_0` is the sample. With :math:`\eta = 1` a step is the exact posterior of the diffusion
for any gap between levels, with :math:`\eta = 0` it is deterministic DDIM.

With a reference error :math:`h^*` the levels between the first and the last follow what each measurement
leaves open: with h the error that the first guess states at the first level,

.. math::
    s_n(y) = \max(s_1, \min(s_N, s_n\, h(y) / h^*)), \qquad N > n > 1 .
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from deepinv.models import Denoiser, Reconstructor
from deepinv.physics import LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm.auto import tqdm

from deepinv_ud2m.batching import RepeatedPhysics, is_shared, repeat_batch
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.physics import JPEG
from deepinv_ud2m.proximal import (
    Scalar,
    check_has_prox,
    expand_scalar,
    noise_level,
    remember_backprojection,
)
from deepinv_ud2m.randomness import SampleStreams, draw_seeds, randn
from deepinv_ud2m.schedule import VPSchedule, check_levels


@dataclass
class Trajectory:
    """
    What a sampler went through.

    :param torch.Tensor levels: the levels s_N, ..., s_1, of shape `[N]`; those of each sample, of shape
        `[N, num_samples, B]`, from a sampler with a ``reference_error``.
    :param torch.Tensor x0: the draws at each level, of shape `[N, num_samples, B, C, H, W]`.
    :param torch.Tensor x_s: the states before each draw, of the same shape.
    """

    levels: Tensor
    x0: Tensor
    x_s: Tensor


class UD2M(Reconstructor):
    r"""
    Posterior sampler: :math:`\hat x \sim p(x \mid y)` in N steps of an unfolded denoiser.

    It samples; gradients do not flow through it. To train, train the unfolded denoiser.

    :param torch.nn.Module unfolded: the unfolded denoiser
        (:class:`deepinv_ud2m.UnfoldedDenoiser`), or any module that draws from
        :math:`p(x \mid y, x_s)` when called as ``(y, physics, x_s, sigma, *, generator=None)``;
        it draws its noise with :func:`deepinv_ud2m.randomness.randn`.
    :param int, None num_steps: number N of levels (default: 3).
    :param float eta: randomness of the steps, in [0, 1] (default: 1, the exact step).
    :param deepinv_ud2m.VPSchedule schedule: where the levels are taken from; the linear schedule of
        1000 times by default.
    :param Sequence[float] levels: levels to use in place of ``num_steps`` and ``schedule``, positive
        and strictly decreasing.
    :param tuple[float, float], None output_range: samples are clamped to it (default: (0, 1));
        ``None`` leaves them as they are.
    :param float, None reference_error: :math:`h^*`, positive, in units of the image: the levels between
        the first and the last are for measurements of which the first guess states this error, and
        others' are scaled by theirs over it (see the module; default: ``None``, the same levels for
        all). It costs no network evaluation, and needs an initialiser that states its error
        (:class:`deepinv_ud2m.PosteriorMeanInitializer`).
    :param float, torch.Tensor, None sigma_y: noise level of all measurements, where the call gives none;
        that of the physics by default. It is what measurements without a Gaussian level need in
        ``deepinv.test`` and other callers that do not know of it; an attribute, which can be set later
        and, being of the measurements, is not stored by :meth:`save_pretrained`.
    :raises TypeError: if ``unfolded`` is not a module, or ``reference_error`` not a number.
    :raises ValueError: for N < 1, eta outside [0, 1], levels that do not decrease, or levels together
        with ``num_steps`` or ``schedule``; for a ``reference_error`` that is not positive, or where no
        first guess states its error.

    The number of network evaluations that the last call spent per sample, found by counting calls,
    is in the attribute ``nfe``; it is ``None`` for an ``unfolded`` that does not name its
    ``networks``.

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

    def __init__(
        self,
        unfolded: nn.Module,
        num_steps: int | None = None,
        eta: float = 1.0,
        schedule: VPSchedule | None = None,
        *,
        levels: Sequence[float] | Tensor | None = None,
        output_range: tuple[float, float] | None = (0.0, 1.0),
        reference_error: float | None = None,
        sigma_y: Scalar | None = None,
    ):
        super().__init__()
        if not isinstance(unfolded, nn.Module) or isinstance(unfolded, Denoiser):
            raise TypeError(
                f"unfolded must be an unfolded denoiser, got {type(unfolded).__name__}; for a prior D, "
                "write UD2M(UnfoldedDenoiser(D))"
            )
        if schedule is not None and not isinstance(schedule, VPSchedule):
            raise TypeError(f"schedule must be a VPSchedule, got {schedule!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if output_range is not None and not output_range[0] < output_range[1]:
            raise ValueError(f"output_range must be (low, high) with low < high, got {output_range}")
        if levels is not None and (num_steps is not None or schedule is not None):
            raise ValueError("levels stand in place of num_steps and schedule: give one or the other")
        _check_reference_error(reference_error, unfolded)
        self.unfolded, self.eta, self.output_range = unfolded, eta, output_range
        self.reference_error, self.sigma_y = reference_error, sigma_y
        if levels is None:
            schedule = schedule if schedule is not None else VPSchedule()
            levels = schedule.sampling_levels(
                3 if num_steps is None else check_count("num_steps", num_steps)
            )
        self.register_buffer("levels", check_levels(levels), persistent=False)
        self.nfe: float | None = None

    @property
    def num_steps(self) -> int:
        """Number N of levels."""
        return len(self.levels)

    def forward(
        self,
        y: Tensor,
        physics: Physics,
        *,
        generator: torch.Generator | None = None,
        sigma_y: Scalar | None = None,
    ) -> Tensor:
        r"""
        One posterior sample per measurement.

        :param torch.Tensor y: measurements, finite.
        :param deepinv.physics.Physics physics: the physics that made them.
        :param torch.Generator generator: random generator, on the device of ``y``; the same seed
            gives the same sample. PyTorch's own by default.
        :param float, torch.Tensor sigma_y: noise level, where the physics does not tell it.
        :returns: samples, of shape `[B, C, H, W]`.
        :raises ValueError, TypeError: if the problem is not one the sampler can take.
        """
        return self.sample(y, physics, 1, generator=generator, sigma_y=sigma_y)[0]

    @torch.no_grad()
    def sample(
        self,
        y: Tensor,
        physics: Physics,
        num_samples: int = 1,
        *,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        sigma_y: Scalar | None = None,
        return_trajectory: bool = False,
        verbose: bool = False,
    ) -> Tensor | tuple[Tensor, Trajectory]:
        r"""
        Several posterior samples per measurement.

        The samples of one call are drawn together. Each has a random stream of its own, so the
        result does not depend on ``batch_size`` but for rounding: to some 1e-3 where the first guess is
        iterative, rarely 1e-2, where rounding decides on its last iteration.

        :param torch.Tensor y: measurements, finite.
        :param deepinv.physics.Physics physics: the physics that made them.
        :param int num_samples: samples S per measurement, at least 1 (default: 1).
        :param int, None batch_size: most images in one network pass; at least the B images of one
            sample of each measurement are. All at once by default.
        :param torch.Generator generator: random generator, on the device of ``y``.
        :param float, torch.Tensor sigma_y: noise level, where the physics does not tell it.
        :param bool return_trajectory: also return all draws and states (default: ``False``).
        :param bool verbose: show a progress bar over levels and batches (default: ``False``).
        :returns: samples of shape `[S, B, C, H, W]`, and a :class:`Trajectory` if asked for.
        :raises ValueError, TypeError: if the problem is not one the sampler can take.
        """
        sigma_y = self.sigma_y if sigma_y is None else sigma_y
        like = self._check(y, physics, num_samples, batch_size, generator, sigma_y)
        batch = like.shape[0]
        seeds = draw_seeds(num_samples * batch, generator)
        per_pass = num_samples if batch_size is None else max(1, batch_size // batch)
        passes = [seeds[i : i + per_pass * batch] for i in range(0, len(seeds), per_pass * batch)]
        networks = getattr(self.unfolded, "networks", None)
        kept = None if return_trajectory else 1
        levels, states, x0s = [], [], []
        with (
            CallCounter(networks or []) as counter,
            tqdm(total=len(passes) * self.num_steps, desc="UD2M", disable=not verbose) as bar,
        ):
            for seeds_of_pass in passes:
                chain = self._chain(y, physics, like, sigma_y, seeds_of_pass, bar)
                visited = (torch.stack(part) for part in zip(*deque(chain, kept), strict=True))
                for parts, part in zip((levels, states, x0s), visited, strict=True):
                    parts.append(part.unflatten(1, (-1, batch)))
        self.nfe = None if networks is None else counter.images / (num_samples * batch)
        x0 = torch.cat(x0s, 1)
        _warn_of_misfit(y, physics, x0[-1, 0], noise_level(physics, sigma_y))
        samples = x0[-1] if self.output_range is None else x0[-1].clamp(*self.output_range)
        if not return_trajectory:
            return samples
        levels = torch.cat(levels, 1) if self.reference_error is not None else self.levels.clone()
        return samples, Trajectory(levels, x0, torch.cat(states, 1))

    def _chain(self, y, physics, like, sigma_y, seeds, bar) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Go down the levels for one batch of streams; yields what :meth:`chain` does."""
        repeats = len(seeds) // like.shape[0]
        level = noise_level(physics, sigma_y)
        if sigma_y is not None or (repeats > 1 and not is_shared(physics, like, level)):
            physics = RepeatedPhysics(physics, like, repeats, level)
        y, like = repeat_batch(y, repeats), repeat_batch(like, repeats)
        streams = SampleStreams(seeds, like.device, block=self._draws())
        for states in self.chain(y, physics, self.first_state(like, streams), streams):
            bar.update()
            yield states

    def first_state(self, like: Tensor, generator: torch.Generator | SampleStreams | None = None):
        """
        State at the first level, which is noise alone.

        :param torch.Tensor like: images of the shape `[B, C, H, W]`, dtype and device to draw.
        :param torch.Generator, SampleStreams generator: source of the noise.
        :returns: the state, `[B, C, H, W]`.
        """
        return 0.5 + self.levels[0].to(like) * randn(like, generator)

    def chain(
        self,
        y: Tensor,
        physics: Physics,
        x_s: Tensor,
        generator: torch.Generator | SampleStreams | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """
        Go down the levels, with gradients where they are enabled; nothing is checked or clamped.

        :param torch.Tensor y: measurements, as many as states.
        :param deepinv.physics.Physics physics: the physics.
        :param torch.Tensor x_s: states at the first level, `[B, C, H, W]`.
        :param torch.Generator, SampleStreams generator: source of the noise.
        :returns: an iterator over the N levels: the level of each state, `[B]`, the states, and the
            draws of x from them.
        """
        # Once for all levels; operators lose too much in bfloat16.
        with record_function("UD2M initialise"), torch.autocast(x_s.device.type, enabled=False):
            physics = remember_backprojection(physics, y)
        levels, known = self._levels_of(y, physics, x_s)
        for n in range(self.num_steps):
            x0 = self.unfolded(
                y, physics, x_s, levels[n], generator=generator, **(known if n == 0 else {})
            )
            yield levels[n].expand(len(x_s), 1, 1, 1).flatten(), x_s, x0
            if n + 1 < self.num_steps:
                with record_function("UD2M step"):
                    x_s = self.step(x0, x_s, levels[n], levels[n + 1], generator)

    def _levels_of(self, y, physics, x_s) -> tuple[Tensor, dict]:
        """
        The levels, `[N]` or `[N, B, 1, 1, 1]`, and what finding them told of the first draw already.
        """
        levels = self.levels.to(x_s.device, x_s.dtype)
        if self.reference_error is None:
            return levels, {}
        with record_function("UD2M initialise"):
            guess = self.unfolded.first_guess(y, physics, x_s, levels[0])
        # A level is where a draw is made, not something that losses should pull at.
        scale = guess[1].detach().to(x_s.dtype) / self.reference_error
        relative = (levels.view(-1, 1, 1, 1, 1) * scale).clamp(levels[-1], levels[0])
        relative[0], relative[-1] = levels[0], levels[-1]
        return relative, {"first_guess": guess}

    def step(
        self,
        x0: Tensor,
        x_s: Tensor,
        sigma: Scalar,
        sigma_next: Scalar,
        generator: torch.Generator | SampleStreams | None = None,
    ) -> Tensor:
        r"""
        From level s to the next, given a draw of x.

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

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        prior: str | None = None,
        metadata: Mapping | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Write what was trained, and how to build the rest; see
        :func:`deepinv_ud2m.pretrained.save_pretrained`.
        """
        from deepinv_ud2m.pretrained import save_pretrained

        save_pretrained(self, folder, prior=prior, metadata=metadata, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        prior: Denoiser | str | Path | None = None,
        initializer: nn.Module | None = None,
        device: torch.device | str | None = None,
        merge: bool = True,
        revision: str | None = None,
    ) -> UD2M:
        """
        A trained sampler by name, from a folder, or from the Hugging Face Hub; see
        :func:`deepinv_ud2m.pretrained.from_pretrained`.
        """
        from deepinv_ud2m.pretrained import from_pretrained

        return from_pretrained(
            name_or_path,
            prior=prior,
            initializer=initializer,
            device=device,
            merge=merge,
            revision=revision,
        )

    def push_to_hub(self, repo_id: str, **options) -> str:
        """
        Upload what :meth:`save_pretrained` writes to the Hugging Face Hub; see
        :func:`deepinv_ud2m.pretrained.push_to_hub` for the options.
        """
        from deepinv_ud2m.pretrained import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def _draws(self) -> int:
        """Noise images of one sample: the start, K for each draw of x, one for each step between."""
        return self.num_steps * (getattr(self.unfolded, "num_iterations", 1) + 1)

    def _check(self, y, physics, num_samples, batch_size, generator, sigma_y) -> Tensor:
        """Refuse what cannot work before any network call; an image of the right shape otherwise."""
        check_count("num_samples", num_samples)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        check_has_prox(physics)
        if generator is not None and not hasattr(generator, "device"):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        for part in y if isinstance(y, TensorList) else [y]:
            if not isinstance(part, Tensor):
                raise TypeError(f"y must be a tensor or a TensorList, got {type(part).__name__}")
            if not (part.is_floating_point() or part.is_complex()):
                raise TypeError(
                    f"y must be of a floating type, measurements of images in [0, 1]; got {part.dtype}"
                )
            if part.numel() == 0:
                raise ValueError(f"y is empty: its shape is {list(part.shape)}")
            if not bool(torch.isfinite(part).all()):
                raise ValueError("y must be finite, but it has NaN or infinite values")
        level = torch.as_tensor(noise_level(physics, sigma_y))
        if not bool(((level > 0) & level.isfinite()).all()):
            raise ValueError(
                f"sigma_y must be positive and finite, got {level.tolist()}; for measurements without "
                "noise give the physics a ZeroNoise, which stands for a small floor"
            )
        self._check_device(y)
        like = _image_like(y, physics)
        expand_scalar(level, like, "sigma_y")
        if generator is not None and generator.device.type != like.device.type:
            raise ValueError(
                f"generator must be on the device of y, {like.device}, got one on {generator.device}"
            )
        if bool((level > 1).any()):
            warnings.warn(
                f"sigma_y is {level.max().item():.3g}: it is a standard deviation, in the units of "
                "images in [0, 1] (25 of 255 is 0.098)",
                stacklevel=4,
            )
        if hasattr(self.unfolded, "check"):
            self.unfolded.check(physics, like.shape, self.levels, level)
        return like

    def _check_device(self, y: Tensor | TensorList) -> None:
        weight = next(self.unfolded.parameters(), None)
        device = y[0].device if isinstance(y, TensorList) else y.device
        if weight is not None and weight.device != device:
            raise ValueError(
                f"y must be on the device of the model, {weight.device}, got y on {device}: move one "
                "with .to(device)"
            )

    def __repr__(self) -> str:
        levels = [f"{level:.4g}" for level in self.levels.tolist()]
        if len(levels) > 6:
            levels = [*levels[:3], "...", *levels[-2:]]
        return (
            f"UD2M({self.unfolded}, N={self.num_steps}, levels=[{', '.join(levels)}], eta={self.eta}, "
            f"output_range={self.output_range}, reference_error={self.reference_error})"
        )


def _check_reference_error(reference_error: float | None, unfolded: nn.Module) -> None:
    if reference_error is None:
        return
    if not isinstance(reference_error, int | float):
        raise TypeError(f"reference_error must be a number or None, got {reference_error!r}")
    if not 0 < reference_error < float("inf"):
        raise ValueError(f"reference_error must be positive and finite, got {reference_error!r}")
    if not getattr(unfolded, "states_error", False):
        raise ValueError(
            f"reference_error={reference_error!r} needs a first guess that states its error, as that of "
            "a PosteriorMeanInitializer does; that of this unfolded denoiser states none"
        )


#: Between the right quality and others, see :meth:`deepinv_ud2m.physics.JPEG.mismatch`.
_JPEG_MISMATCH = 0.15


def _warn_of_misfit(y: Tensor | TensorList, physics: Physics, x: Tensor, sigma_y: Scalar) -> None:
    """Images of another range, or noise in other units, leave residuals that no sample can explain."""
    if isinstance(physics, JPEG) and bool((physics.mismatch(y) > _JPEG_MISMATCH).any()):
        warnings.warn(
            "y does not look like images decoded from JPEG files of quality "
            f"{physics.quality.tolist()}: JPEG.read(file) tells the quality of a file",
            stacklevel=4,
        )
    if not isinstance(physics, LinearPhysics):
        return
    with torch.autocast(x.device.type, enabled=False):
        of_x = physics.A(x)
    level = torch.as_tensor(sigma_y, device=x.device).flatten()
    pairs = list(zip(of_x, y, strict=True)) if isinstance(y, TensorList) else [(of_x, y)]
    residual = torch.stack([_root_mean_square(a - b) for a, b in pairs]).amax(0)
    size = torch.stack([_root_mean_square(b) for _, b in pairs]).amax(0)
    # What poor samples leave too is let pass: some levels of noise, some of the image, some of y.
    allowed = torch.maximum(5 * level, 0.3 * size).clamp(min=0.2)
    excess, worst = (residual / allowed).max(0)
    if bool(excess > 1):
        level = level.expand(len(residual))[worst].item()
        warnings.warn(
            f"the samples leave residuals of {residual[worst].item():.3g}, "
            f"{residual[worst].item() / level:.3g} times the noise level: is y made of images in "
            f"[0, 1], by this physics, and sigma_y = {level:.3g} its noise in those units?",
            stacklevel=4,
        )


def _root_mean_square(batch: Tensor) -> Tensor:
    return batch.abs().square().flatten(1).mean(1).sqrt()


class CallCounter:
    """
    Counts, by hooks, the images that go through networks; a context manager.

    :param Iterable[torch.nn.Module] networks: the networks to watch.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        self.networks = list(networks)
        self.images = 0

    def __enter__(self) -> CallCounter:
        self._hooks = [net.register_forward_hook(self._count) for net in self.networks]
        return self

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()

    def _count(self, network, inputs, output):
        self.images += output.shape[0]


def _image_like(y: Tensor | TensorList, physics: Physics) -> Tensor:
    """An image of the shape that the physics gives to y, which only the physics can tell."""
    is_stack = isinstance(y, TensorList)
    shapes = [list(part.shape) for part in y] if is_stack else list(y.shape)
    try:
        # Under autocast the image would be of half precision, and so all that is drawn like it.
        with torch.autocast((y[0] if is_stack else y).device.type, enabled=False):
            like = physics.A_adjoint(y)
            again = physics.A(like)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise ValueError(
            f"y of shape {shapes} does not fit the physics {type(physics).__name__}: {error}"
        ) from error
    expected = [list(p.shape) for p in again] if is_stack else list(again.shape)
    if like.is_complex():
        raise ValueError(
            f"the physics {type(physics).__name__} gives complex images, and they must be real: let its "
            "adjoint take the real part, or real and imaginary part as two channels"
        )
    # What is not linear checks y itself: JPEG takes whole blocks and the visible image alike.
    if isinstance(physics, LinearPhysics) and expected != shapes:
        raise ValueError(
            f"y of shape {shapes} does not fit the physics {type(physics).__name__}, whose "
            f"measurements would have shape {expected}"
        )
    return like
