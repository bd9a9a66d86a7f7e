r"""The unfolded denoiser: K iterations of LATINO, a Monte Carlo kernel for :math:`p(x \mid y, x_s)`.

One iteration (Mbakam et al. 2025, Algorithm 2; LATINO: Spagnoletti et al. 2025), with learned
positive :math:`\rho_k, \lambda_k, \delta_k`:

1. prox: :math:`z = \operatorname{argmin}_z \|Az - y\|^2 / (2\lambda_k\sigma_y^2)
   + \|z - x_s\|^2 / (2s^2) + \|z - x\|^2 / (2\rho_k^2)`,
2. noise: :math:`w = z + \delta_k n`, with fresh :math:`n \sim \mathcal N(0, I)`,
3. denoise: :math:`x \leftarrow D(w, \delta_k)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepinv.models import Denoiser, Reconstructor
from deepinv.physics import Physics
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from deepinv_ud2m.checks import (
    LARGEST,
    SMALLEST,
    Scalar,
    check_count,
    check_number,
    differences,
    expand_scalar,
    shapes,
    shorten,
)
from deepinv_ud2m.initializers import Initializer, WienerInitializer
from deepinv_ud2m.priors import (
    PriorInfo,
    freeze_prior,
    has_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    prior_parameters,
    prior_state_dict,
)
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.proximal import posterior_prox
from deepinv_ud2m.randomness import SampleStreams, randn

#: Untrained multipliers of delta in the first and in the last iteration, and of rho: the winners, among
#: the exact steps, of a search on digits.
DELTA_FIRST, DELTA_LAST, RHO = 4.0, 1.0, 2.0

_SCALARS = ("rho", "delta", "lambda")


class UnfoldedDenoiser(Reconstructor):
    r"""
    Draws from :math:`p(x \mid y, x_s)` by K unfolded LATINO iterations.

    The couplings are multiples of h, the scale of the error of the initial estimate
    (:class:`deepinv_ud2m.initializers.Initializer`),

    .. math::
        \rho_k = r_k e^{\log\hat\rho_k} h, \quad
        \delta_k = d_k e^{\log\hat\delta_k} h, \quad
        \lambda_k = l_k e^{\log\hat\lambda_k} .

    The logarithms are learned. They start at zero: an untrained network is zero-shot LATINO with the
    decreasing schedule :math:`d_k`. Learned values carry over to other noise levels, because they are
    relative to h. An initializer with ``reference_level=0`` gives the starting values of the paper.

    :param deepinv.models.Denoiser denoiser: the prior, :math:`D(w, \delta)`. It is kept in evaluation mode,
        and frozen except for what ``train_prior`` names.
    :param int num_iterations: number K of iterations (default: 3).
    :param deepinv_ud2m.initializers.Initializer initializer: gives the first iterate
        (default: :class:`deepinv_ud2m.WienerInitializer`).
    :param float, Sequence[float] rho: untrained multipliers :math:`r_k`, one or K, in [1e-6, 1e6]
        (default: 2).
    :param float, Sequence[float] delta: untrained multipliers :math:`d_k`, likewise (default:
        geometric from 4 in the first to 1 in the last iteration).
    :param float, Sequence[float] lambda_: untrained multipliers :math:`l_k`, likewise (default: 1).
    :param bool shared: learn one set of scalars for all iterations rather than one per iteration
        (default: ``False``).
    :param float tol: root mean square error of a prox that is iterative, in units of the noise
        :math:`\delta_k` that follows it (default: 0.01, which cannot matter).
    :param int max_iter: most iterations of the prox where it is iterative (default: 1000).
    :param str, Sequence[str] train_prior: what of the prior is trained, and stored in a checkpoint.
        ``"adapter"`` (default): the factors of its LoRA, if it has one. ``"all"``: all its weights. Names
        of layers or parameters: these, and the LoRA; the paper trains the output layer so. A LoRA must be
        on the prior before (:func:`deepinv_ud2m.add_lora`), because adding one freezes all else.
    :raises TypeError: for an argument of a wrong type.
    :raises ValueError: for K < 1, multipliers of another number or out of range, a ``tol`` that is not
        positive, or a ``train_prior`` that the prior does not have.

    With the attribute ``checkpointing`` set to ``True``, the backward pass keeps only the input of each
    iteration and computes the rest again: about 1/K of the memory, a third more time.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import UnfoldedDenoiser, load_prior
        >>> unfolded = UnfoldedDenoiser(load_prior("mnist"), num_iterations=3)
        >>> physics = dinv.physics.Inpainting((1, 32, 32), mask=0.5,
        ...                                   noise_model=dinv.physics.GaussianNoise(0.05))
        >>> x = torch.zeros(1, 1, 32, 32)
        >>> sample = unfolded(physics(x), physics, x_s=x, sigma=0.5)
        >>> sample.shape
        torch.Size([1, 1, 32, 32])
    """

    log_rho: nn.Parameter
    log_delta: nn.Parameter
    log_lambda: nn.Parameter
    start_rho: Tensor
    start_delta: Tensor
    start_lambda: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        num_iterations: int = 3,
        initializer: Initializer | None = None,
        *,
        rho: float | Sequence[float] | Tensor = RHO,
        delta: float | Sequence[float] | Tensor | None = None,
        lambda_: float | Sequence[float] | Tensor = 1.0,
        shared: bool = False,
        tol: float = 0.01,
        max_iter: int = 1000,
        train_prior: str | Sequence[str] = "adapter",
    ):
        super().__init__()
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a deepinv Denoiser, got {type(denoiser).__name__}")
        if initializer is None:
            initializer = WienerInitializer()
        if not isinstance(initializer, Initializer):
            raise TypeError(
                f"initializer must be an Initializer of deepinv_ud2m, got {type(initializer).__name__}"
            )
        self.denoiser, self.initializer = denoiser, initializer
        self.num_iterations = check_count("num_iterations", num_iterations)
        self.shared, self.tol = bool(shared), check_number("tol", tol, positive=True)
        self.max_iter = check_count("max_iter", max_iter)
        if delta is None:
            last, first = torch.tensor([DELTA_LAST, DELTA_FIRST]).log10()
            delta = torch.logspace(last, first, num_iterations).flip(0)
        for name, start in zip(_SCALARS, (rho, delta, lambda_), strict=True):
            argument = "lambda_" if name == "lambda" else name
            self.register_buffer(f"start_{name}", self._multipliers(argument, start))
            setattr(self, f"log_{name}", nn.Parameter(torch.zeros(1 if shared else num_iterations)))
        self.checkpointing = False
        self.train_prior = train_prior if isinstance(train_prior, str) else _names(train_prior)
        # A prior with LoRA was frozen when it got it: what needs a gradient now was freed by its owner.
        freed = [n for n, p in denoiser.named_parameters() if p.requires_grad] if has_lora(denoiser) else []
        freeze_prior(denoiser)
        for parameter in self._prior_parameters().values():
            parameter.requires_grad_(True)
        if frozen := [n for n in freed if not denoiser.get_parameter(n).requires_grad]:
            warnings.warn(
                f"{shorten(frozen)} of the prior are frozen again, though they required a gradient: name "
                "them in train_prior to train and store them",
                stacklevel=2,
            )

    def _multipliers(self, name: str, values: float | Sequence[float] | Tensor) -> Tensor:
        try:
            given = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a number or a sequence of numbers, got {values!r}") from error
        # NaN fails the comparisons.
        in_range = bool(((given >= SMALLEST) & (given <= LARGEST)).all())
        if len(given) not in (1, self.num_iterations) or not in_range:
            raise ValueError(
                f"{name} must be one positive number or {self.num_iterations} (num_iterations), in "
                f"[{SMALLEST:g}, {LARGEST:g}]; got {values!r}"
            )
        return given.expand(self.num_iterations).clone()

    # ---------------------------------------------------------------------------------------------
    # Sampling

    def forward(
        self,
        y: Tensor,
        physics: Physics,
        x_s: Tensor,
        sigma: Scalar,
        *,
        sigma_y: Scalar | None = None,
        generator: torch.Generator | SampleStreams | None = None,
    ) -> Tensor:
        r"""
        Draw x from :math:`p(x \mid y, x_s)`.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.Physics physics: the physics, per-sample operators included.
        :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`; taken in the precision of ``y``.
        :param float, torch.Tensor sigma: their level s, a scalar, `[B]` or `[B, 1, 1, 1]`, positive.
        :param float, torch.Tensor sigma_y: noise level of ``y``; that of the physics by default.
        :param torch.Generator, SampleStreams generator: source of the K noise images.
        :returns: samples, of shape `[B, C, H, W]`.
        :raises TypeError, ValueError: for a problem that :class:`deepinv_ud2m.Problem` refuses, or levels out
            of range.
        """
        if isinstance(sigma, Tensor) and not bool(((sigma >= SMALLEST) & (sigma <= LARGEST)).all()):
            raise ValueError(f"sigma must be in [{SMALLEST:g}, {LARGEST:g}], got {sigma.tolist()}")
        problem = Problem(y, physics, sigma_y, x_s.shape[1])
        if problem.adjoint.dtype in (torch.float32, torch.float64):
            x_s = x_s.to(problem.adjoint.dtype)  # the precision in which the prox is solved
        return self.draw(problem, x_s, sigma, generator=generator)

    def draw(
        self,
        problem: Problem,
        x_s: Tensor,
        sigma: Scalar,
        *,
        generator: torch.Generator | SampleStreams | None = None,
        initial: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        r"""
        Draw x from :math:`p(x \mid y, x_s)` of a problem that was checked before.

        :param deepinv_ud2m.Problem problem: the problem, of as many images as states.
        :param tuple[torch.Tensor, torch.Tensor] initial: the result of :meth:`initial_estimate` for these
            arguments, if it is known already.

        The other arguments are those of :meth:`forward`.
        """
        sigma = expand_scalar(sigma, x_s, "sigma")
        x, h = self.initial_estimate(problem, x_s, sigma) if initial is None else initial
        for k in range(self.num_iterations):
            with record_function("UD2M noise"):
                noise = randn(x_s, generator)
            if self.checkpointing and torch.is_grad_enabled():
                # The noise is an argument, so the second pass draws nothing.
                arguments = (k, x, problem, x_s, sigma, h, noise)
                x = checkpoint(self.iterate, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.iterate(k, x, problem, x_s, sigma, h, noise)
        return x

    def initial_estimate(self, problem: Problem, x_s: Tensor, sigma: Scalar) -> tuple[Tensor, Tensor]:
        """The first iterate, `[B, C, H, W]`, and the scale h of its error, `[B, 1, 1, 1]`."""
        with record_function("UD2M initialise"):
            return self.initializer(problem, x_s, sigma)

    def iterate(
        self, k: int, x: Tensor, problem: Problem, x_s: Tensor, sigma: Tensor, h: Tensor, noise: Tensor
    ) -> Tensor:
        """Iteration k, from 0: prox, noise, denoise."""
        rho, delta, lambda_ = self.scalars(k, h)
        with record_function("UD2M prox"):
            accuracy: dict[str, Any] = {"atol": self.tol * delta.detach(), "max_iter": self.max_iter}
            z = posterior_prox(problem, x, x_s, sigma, rho, lambda_, **accuracy)
        with record_function("UD2M denoise"):
            return self.denoise(z + delta * noise, delta)

    def scalars(self, k: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""
        :math:`\rho_k, \delta_k, \lambda_k` for a scale h. delta is clamped to the levels of the prior.

        :param int k: iteration, from 0.
        :param torch.Tensor h: see :meth:`initial_estimate`.
        :returns: three tensors that broadcast with ``h``.
        """
        delta = self._learned("delta", k) * h
        if self.prior_info is not None:
            delta = delta.clamp(self.prior_info.sigma_min, self.prior_info.sigma_max)
        return self._learned("rho", k) * h, delta, self._learned("lambda", k)

    def _learned(self, name: str, k: int) -> Tensor:
        logarithms = getattr(self, f"log_{name}")
        return getattr(self, f"start_{name}")[k] * logarithms[min(k, len(logarithms) - 1)].exp()

    def denoise(self, w: Tensor, delta: Tensor) -> Tensor:
        """The prior, in the precision of its own weights."""
        dtype = next((p.dtype for p in self.denoiser.parameters() if p.is_floating_point()), w.dtype)
        delta = delta.expand(w.shape[0], *delta.shape[1:]).reshape(-1)
        return self.denoiser(w.to(dtype), delta.to(dtype)).to(w.dtype)

    # ---------------------------------------------------------------------------------------------
    # What is trained and stored

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """
        The parameters that training changes, by name.

        These are ``log_rho``, ``log_delta`` and ``log_lambda``; under ``denoiser.`` the parameters that
        ``train_prior`` names and the adapter; under ``initializer.`` those that the initializer declares
        and its adapter.
        """
        trained = {f"log_{name}": getattr(self, f"log_{name}") for name in _SCALARS}
        own = {
            "denoiser": self._prior_parameters(),
            "initializer": self.initializer.trained_parameters(),
        }
        for prefix, parameters in own.items():
            trained |= {f"{prefix}.{name}": parameter for name, parameter in parameters.items()}
            factors = enumerate(lora_parameters(getattr(self, prefix)))
            trained |= {f"{prefix}.lora.{i}": factor for i, factor in factors}
        return trained

    def state(self) -> dict[str, Tensor]:
        """
        The tensors that a checkpoint stores: the trained ones, whatever their ``requires_grad``.

        - ``scalars.log_rho``, ``scalars.log_delta``, ``scalars.log_lambda``, of shape `[K]` or `[1]`;
        - ``lora.<key>``: the adapter of the denoiser;
        - ``denoiser.<name>``: parameters that ``train_prior`` names, by their names without adapter;
        - ``initializer.lora.<key>`` and ``initializer.<name>``: the same of the initializer.

        They are the same while an adapter is merged.

        :returns: detached tensors that share the memory of the parameters. Clone them to keep their values.
        """
        state = {f"scalars.log_{name}": getattr(self, f"log_{name}").detach() for name in _SCALARS}
        for module, names, prefix, lora_prefix in self._stored():
            weights = prior_state_dict(module)
            state |= {prefix + name: weights[name].detach() for name in names}
            state |= {lora_prefix + key: factor for key, factor in lora_state_dict(module).items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """
        Load the result of :meth:`state`, to the bit if the types are the same. A merged adapter is merged
        anew.

        :param Mapping[str, torch.Tensor] state: tensors on any device and of any floating point type.
        :raises ValueError: if tensors are missing, unexpected, or of another shape; it names them. Nothing
            is changed then.
        """
        complaints = differences(shapes(self.state()), shapes(state))
        if complaints:
            raise ValueError(
                "state does not fit this unfolded denoiser (same K, same adapter, same train_prior?). "
                f"Tensors {complaints}"
            )
        with torch.no_grad():
            for name in _SCALARS:
                getattr(self, f"log_{name}").copy_(state[f"scalars.log_{name}"])
            for module, names, prefix, lora_prefix in self._stored():
                weights = prior_state_dict(module)
                for name in names:
                    weights[name].copy_(state[prefix + name])
                # The factors last: if they are merged, this merges them into the weights just loaded.
                factors = lora_state_dict(module)
                load_lora_state_dict(module, {key: state[lora_prefix + key] for key in factors})

    def config(self) -> dict:
        """Its arguments, except for the networks, as values of JSON."""
        return {
            "num_iterations": self.num_iterations,
            "shared": self.shared,
            "rho": self.start_rho.tolist(),
            "delta": self.start_delta.tolist(),
            "lambda_": self.start_lambda.tolist(),
            "tol": self.tol,
            "max_iter": self.max_iter,
            "train_prior": self.train_prior,
        }

    def _stored(self) -> list[tuple[nn.Module, list[str], str, str]]:
        """Each network with the names of its stored parameters, their prefix, and that of its adapter."""
        of_initializer = list(self.initializer.trained_parameters())
        return [
            (self.denoiser, list(self._prior_parameters()), "denoiser.", "lora."),
            (self.initializer, of_initializer, "initializer.", "initializer.lora."),
        ]

    def _prior_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the prior that ``train_prior`` names, without the adapter."""
        if self.train_prior == "adapter":
            return {}
        parameters = dict(prior_parameters(self.denoiser))
        if self.train_prior == "all":
            return parameters
        names = [self.train_prior] if isinstance(self.train_prior, str) else self.train_prior
        named: dict[str, nn.Parameter] = {}
        for name in names:
            found = {k: p for k, p in parameters.items() if k == name or k.startswith(f"{name}.")}
            if not found:
                raise ValueError(
                    f"train_prior must be 'adapter', 'all', or names of layers of the prior; it has none "
                    f"of the name {name!r}"
                )
            named |= found
        return {key: parameter for key, parameter in parameters.items() if key in named}

    # ---------------------------------------------------------------------------------------------
    # What it says of itself

    @property
    def predicts_rmse(self) -> bool:
        """Whether the initializer predicts the error of its estimate."""
        return self.initializer.predicts_rmse

    @property
    def prior_info(self) -> PriorInfo | None:
        """What the prior was trained for, where it says so."""
        return getattr(self.denoiser, "prior_info", None)

    @property
    def networks(self) -> list[nn.Module]:
        """The networks whose calls are counted as network evaluations (NFE)."""
        return [self.denoiser, *self.initializer.networks]

    def check(self, problem: Problem, sigmas: Tensor) -> None:
        """
        Check before any network call that the prior suits a problem.

        It warns of images of another size, or noise levels of another range, than the prior was trained on.

        :param deepinv_ud2m.Problem problem: the problem.
        :param torch.Tensor sigmas: levels of the sampler.
        :raises ValueError: if the prior cannot take the images.
        """
        if self.prior_info is None:
            return
        self.prior_info.check_images(problem.shape)
        if self.predicts_rmse:
            return  # its levels are only known with its estimate
        scales = [self.initializer.rmse_scale(problem.sigma_y, sigma) for sigma in sigmas.to(problem.sigma_y)]
        multipliers = [self._learned("delta", k).to(problem.sigma_y) for k in range(self.num_iterations)]
        self.prior_info.check_levels(torch.stack([m * scale for m in multipliers for scale in scales]))

    def __repr__(self) -> str:
        prior = self.prior_info.name if self.prior_info else type(self.denoiser).__name__
        if has_lora(self.denoiser):
            prior += " + LoRA"
        multipliers = []
        for name in _SCALARS:
            values = [self._learned(name, k).item() for k in range(min(self.num_iterations, 4))]
            dots = ", ..." if self.num_iterations > 4 else ""
            multipliers.append(f"{name}=[{', '.join(f'{value:.4g}' for value in values)}{dots}]")
        return (
            f"UnfoldedDenoiser({prior}, K={self.num_iterations}, {self.initializer}, "
            f"{', '.join(multipliers)})"
        )


def _names(train_prior: Sequence[str]) -> list[str]:
    if not isinstance(train_prior, Sequence) or not all(isinstance(name, str) for name in train_prior):
        raise TypeError(f"train_prior must be 'adapter', 'all' or a list of names, got {train_prior!r}")
    return list(train_prior)
