r"""The unfolded denoiser: K iterations of LATINO, a Monte Carlo kernel for :math:`p(x \mid y, x_s)`.

One iteration (Mbakam et al. 2025, Algorithm 2; LATINO: Spagnoletti et al. 2025), with learned
positive :math:`\rho_k, \lambda_k, \delta_k`:

1. prox: :math:`z = \operatorname{argmin}_z \|Az - y\|^2 / (2\lambda_k\sigma_y^2)
   + \|z - x_s\|^2 / (2s^2) + \|z - x\|^2 / (2\rho_k^2)`,
2. noise: :math:`w = z + \delta_k n`, with fresh :math:`n \sim \mathcal N(0, I)`,
3. denoise: :math:`x \leftarrow D(w, \delta_k)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepinv.models import Denoiser, Reconstructor
from deepinv.physics import Physics
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.lora import freeze_prior, has_lora
from deepinv_ud2m.priors import PriorInfo
from deepinv_ud2m.proximal import (
    Scalar,
    check_has_prox,
    expand_scalar,
    joint_level,
    noise_level,
    posterior_prox,
    remember_backprojection,
)
from deepinv_ud2m.randomness import SampleStreams, randn
from deepinv_ud2m.wiener import WienerInitializer

#: Untrained multipliers of delta in the first and in the last iteration, and of rho; the level of
#: detail that the prior works at beyond the noise. The winners, among the exact steps, of the search by
#: examples/tune_zero_shot.py, stored in benchmark/results/zero_shot.json.
DELTA_FIRST, DELTA_LAST, RHO, REFERENCE_LEVEL = 4.0, 1.0, 2.0, 0.2


class UnfoldedDenoiser(Reconstructor):
    r"""
    Draws from :math:`p(x \mid y, x_s)` by K unfolded LATINO iterations.

    The couplings start from the level of a Gaussian observation of noise
    :math:`\tilde\sigma = (\sigma_y^2 + \sigma_0^2)^{1/2}` joined with the state,

    .. math::
        h = \frac{\tilde\sigma s}{\sqrt{\tilde\sigma^2 + s^2}}, \qquad
        \rho_k = r_k e^{\log\hat\rho_k} h, \quad
        \delta_k = d_k e^{\log\hat\delta_k} h, \quad
        \lambda_k = l_k e^{\log\hat\lambda_k} .

    An initialiser that states the error of its first guess gives h in its place
    (:class:`deepinv_ud2m.PosteriorMeanInitializer`). The logarithms are learned and start at zero, so
    that an untrained network is zero-shot LATINO with the decreasing schedule :math:`d_k`. Being
    relative to h, what was learned carries over to other levels. With :math:`\sigma_0 = 0` the starting
    values are those of the paper; see the README for why the default is not.

    :param deepinv.models.Denoiser denoiser: the prior, :math:`D(w, \delta)`. It is frozen: kept in
        evaluation mode, without gradients for its parameters but for those of a LoRA on it.
    :param int num_iterations: number K of iterations (default: 3).
    :param torch.nn.Module initializer: gives the first iterate
        (default: :class:`deepinv_ud2m.WienerInitializer`).
    :param float, Sequence[float] rho: untrained multipliers :math:`r_k`, one or K, positive
        (default: 2).
    :param float, Sequence[float] delta: untrained multipliers :math:`d_k`, likewise (default:
        geometric from 4 in the first to 1 in the last iteration).
    :param float, Sequence[float] lambda_: untrained :math:`l_k`, likewise (default: 1).
    :param float reference_level: :math:`\sigma_0`, in units of the image, non-negative
        (default: 0.2).
    :param bool shared: learn one set of scalars for all iterations rather than one per iteration
        (default: ``False``).
    :param float tol: relative error of the prox where it is iterative (default: 1e-5).
    :param int max_iter: most iterations of the prox where it is iterative (default: 1000).
    :raises TypeError: if ``denoiser`` or ``initializer`` is not a module.
    :raises ValueError: for K < 1, or multipliers that are not positive or of another number.

    Set the attribute ``checkpointing`` to ``True`` to keep only the input of each iteration for the
    backward pass and compute the rest again: about 1/K of the memory, a third more time.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import UnfoldedDenoiser, load_prior
        >>> unfolded = UnfoldedDenoiser(load_prior("mnist"), num_iterations=3)
        >>> physics = dinv.physics.Inpainting((1, 32, 32), mask=0.5,
        ...                                   noise_model=dinv.physics.GaussianNoise(0.05))
        >>> x = torch.zeros(1, 1, 32, 32)
        >>> draw = unfolded(physics(x), physics, x_s=x, sigma=0.5)
        >>> draw.shape
        torch.Size([1, 1, 32, 32])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        num_iterations: int = 3,
        initializer: nn.Module | None = None,
        *,
        rho: float | Sequence[float] = RHO,
        delta: float | Sequence[float] | None = None,
        lambda_: float | Sequence[float] = 1.0,
        reference_level: float = REFERENCE_LEVEL,
        shared: bool = False,
        tol: float = 1e-5,
        max_iter: int = 1000,
    ):
        super().__init__()
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a deepinv Denoiser, got {type(denoiser).__name__}")
        if initializer is not None and not isinstance(initializer, nn.Module):
            raise TypeError(f"initializer must be a module, got {type(initializer).__name__}")
        if not 0 <= reference_level < float("inf"):
            raise ValueError(f"reference_level must be finite and >= 0, got {reference_level}")
        if not tol > 0:
            raise ValueError(f"tol must be positive, got {tol}")
        self.denoiser = denoiser
        self.num_iterations = check_count("num_iterations", num_iterations)
        check_count("max_iter", max_iter)
        self.initializer = initializer if initializer is not None else WienerInitializer()
        self.reference_level, self.tol, self.max_iter = reference_level, tol, max_iter
        if delta is None:
            ends = torch.tensor([DELTA_LAST, DELTA_FIRST]).log10()
            delta = torch.logspace(*ends, num_iterations).flip(0)
        num_learned = 1 if shared else num_iterations
        for name, start in (("rho", rho), ("delta", delta), ("lambda", lambda_)):
            argument = "lambda_" if name == "lambda" else name
            multipliers = self._multipliers(argument, start)
            self.register_buffer(f"start_{name}", multipliers)
            setattr(self, f"log_{name}", nn.Parameter(torch.zeros(num_learned)))
        self.checkpointing = False
        freeze_prior(denoiser)

    def _multipliers(self, name: str, values: float | Sequence[float]) -> Tensor:
        try:
            given = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} must be a number or a sequence of numbers, got {values!r}"
            ) from error
        positive = bool(((given > 0) & given.isfinite()).all())
        if len(given) not in (1, self.num_iterations) or not positive:
            raise ValueError(
                f"{name} must be one positive number or {self.num_iterations} "
                f"(num_iterations), finite; got {given.tolist()}"
            )
        return given.expand(self.num_iterations).clone()

    def forward(
        self,
        y: Tensor,
        physics: Physics,
        x_s: Tensor,
        sigma: Scalar,
        *,
        sigma_y: Scalar | None = None,
        generator: torch.Generator | SampleStreams | None = None,
        first_guess: tuple[Tensor, Tensor] | None = None,
        return_iterates: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        r"""
        Draw x from :math:`p(x \mid y, x_s)`.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.Physics physics: the physics, per-sample operators included.
        :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`.
        :param float, torch.Tensor sigma: their level s, a scalar, `[B]` or `[B, 1, 1, 1]`, positive.
        :param float, torch.Tensor sigma_y: noise level of ``y``; that of the physics by default.
        :param torch.Generator, SampleStreams generator: source of the K noise images.
        :param tuple[torch.Tensor, torch.Tensor] first_guess: what :meth:`first_guess` gave for these
            arguments, where it is known already; found by default.
        :param bool return_iterates: also return the list of the K iterates.
        :returns: draws, of shape `[B, C, H, W]`.
        """
        sigma_y = expand_scalar(noise_level(physics, sigma_y), x_s, "sigma_y")
        sigma = expand_scalar(sigma, x_s, "sigma")
        with torch.autocast(x_s.device.type, enabled=False):  # operators lose too much in bfloat16
            physics = remember_backprojection(physics, y)
        if first_guess is None:
            with record_function("UD2M initialise"):
                first_guess = self.first_guess(y, physics, x_s, sigma, sigma_y)
        x, level = first_guess
        iterates = []
        for k in range(self.num_iterations):
            with record_function("UD2M noise"):
                noise = randn(x_s, generator)
            arguments = (k, x, y, physics, x_s, sigma, sigma_y, level, noise)
            if self.checkpointing and torch.is_grad_enabled():
                # The noise is an argument, so nothing random has to be repeated.
                x = checkpoint(self.iterate, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.iterate(*arguments)
            iterates.append(x)
        return (x, iterates) if return_iterates else x

    def first_guess(
        self, y: Tensor, physics: Physics, x_s: Tensor, sigma: Scalar, sigma_y: Scalar | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""
        The first iterate, and the level h of what is unknown, which the couplings are relative to: that
        of the initialiser, where it states one (:class:`deepinv_ud2m.PosteriorMeanInitializer`).

        :returns: images `[B, C, H, W]`, and levels that broadcast with them. The arguments are those of
            :meth:`forward`.
        """
        sigma = expand_scalar(sigma, x_s, "sigma")
        sigma_y = expand_scalar(noise_level(physics, sigma_y), x_s, "sigma_y")
        if self.states_error:
            return self.initializer.estimate(y, physics, x_s, sigma, sigma_y)
        with torch.autocast(x_s.device.type, enabled=False):
            x = self.initializer(y, physics, x_s, sigma, sigma_y)
        return x, joint_level(sigma, sigma_y, self.reference_level)

    def iterate(self, k, x, y, physics, x_s, sigma, sigma_y, level, noise) -> Tensor:
        """
        One iteration, prox, noise, denoise; the arguments are those of :meth:`forward`, the level h, and
        noise.
        """
        rho, delta, lambda_ = self.scalars(k, level)
        with record_function("UD2M prox"):
            z = posterior_prox(
                x, y, physics, x_s, sigma, rho, lambda_, sigma_y, tol=self.tol, max_iter=self.max_iter
            )
        with record_function("UD2M denoise"):
            return self.denoise(z + delta * noise, delta)

    def scalars(self, k: int, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""
        :math:`\rho_k, \delta_k, \lambda_k` at a level.

        :param int k: iteration, from 0.
        :param torch.Tensor level: level h, see :meth:`first_guess`.
        :returns: three tensors that broadcast with ``level``; delta stays inside the levels of the
            prior.
        """
        delta = self._learned("delta", k) * level
        if self.prior_info is not None:
            delta = delta.clamp(self.prior_info.sigma_min, self.prior_info.sigma_max)
        return self._learned("rho", k) * level, delta, self._learned("lambda", k)

    def _learned(self, name: str, k: int) -> Tensor:
        logarithms = getattr(self, f"log_{name}")
        return getattr(self, f"start_{name}")[k] * logarithms[min(k, len(logarithms) - 1)].exp()

    def denoise(self, w: Tensor, delta: Tensor) -> Tensor:
        """The prior, in the precision of its own weights."""
        dtype = next((p.dtype for p in self.denoiser.parameters() if p.is_floating_point()), w.dtype)
        delta = delta.expand(w.shape[0], *delta.shape[1:]).reshape(-1)
        return self.denoiser(w.to(dtype), delta.to(dtype)).to(w.dtype)

    @property
    def states_error(self) -> bool:
        """Whether the initialiser states the error of its first guess."""
        return hasattr(self.initializer, "estimate")

    @property
    def prior_info(self) -> PriorInfo | None:
        """What the prior was trained for, where it says so."""
        return getattr(self.denoiser, "prior_info", None)

    @property
    def networks(self) -> list[nn.Module]:
        """The networks whose calls count as network evaluations (NFE)."""
        return [self.denoiser, *getattr(self.initializer, "networks", [])]

    def check(self, physics: Physics, shape: torch.Size, levels: Tensor, sigma_y: Tensor) -> None:
        """
        Check a problem before any network call.

        :param deepinv.physics.Physics physics: the physics.
        :param torch.Size shape: shape of the images, `[B, C, H, W]`.
        :param torch.Tensor levels: levels of the states to come.
        :param torch.Tensor sigma_y: noise level of the measurements.
        :raises TypeError: if the physics has no ``prox_l2``.
        :raises ValueError: if the prior cannot take the images. It warns if they, or the levels
            that the prior would be asked to denoise, are outside of what it was trained for.
        """
        check_has_prox(physics)
        if self.prior_info is None:
            return
        self.prior_info.check_images(shape)
        if self.states_error:
            return  # its levels are only known with its estimate
        sigma_y = sigma_y.to(self.log_delta.device).reshape(1, -1)
        level = joint_level(levels.to(sigma_y.device)[:, None], sigma_y, self.reference_level)
        deltas = torch.stack([self._learned("delta", k) * level for k in range(self.num_iterations)])
        self.prior_info.check_levels(deltas)

    def __repr__(self) -> str:
        prior = self.prior_info.name if self.prior_info else type(self.denoiser).__name__
        if has_lora(self.denoiser):
            prior += " + LoRA"
        multipliers = []
        for name in ("rho", "delta", "lambda"):
            values = [self._learned(name, k).item() for k in range(min(self.num_iterations, 4))]
            dots = ", ..." if self.num_iterations > 4 else ""
            multipliers.append(f"{name}=[{', '.join(f'{value:.4g}' for value in values)}{dots}]")
        return (
            f"UnfoldedDenoiser({prior}, K={self.num_iterations}, {self.initializer}, "
            f"{', '.join(multipliers)}, reference_level={self.reference_level})"
        )
