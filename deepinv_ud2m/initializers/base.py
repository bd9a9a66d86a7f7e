r"""The base class of initializers: an initial estimate of x from y and x_s, and the scale of its error."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepinv_ud2m.checks import Scalar, check_number, expand_scalar
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.proximal import joint_level


class Initializer(nn.Module):
    r"""
    Base class: the first iterate of an :class:`deepinv_ud2m.UnfoldedDenoiser`, and the scale h of its error.
    The couplings :math:`\rho_k` and the noise levels :math:`\delta_k` are multiples of h.

    A new initializer is one class with an ``estimate`` and a ``config``. By default h is

    .. math:: h = \frac{\tilde\sigma s}{\sqrt{\tilde\sigma^2 + s^2}}, \qquad
        \tilde\sigma = (\sigma_y^2 + \sigma_0^2)^{1/2} ,

    the error of x given the state and one more observation of level :math:`\tilde\sigma`. An initializer that
    predicts the error of its own estimate overrides :meth:`forward` and sets ``predicts_rmse``.

    :param float reference_level: :math:`\sigma_0`, in units of the image, non-negative (default: 0.2). It
        stands for the uncertainty under the prior where y has no information.
    :raises ValueError: for another value.

    |sep|

    :Examples:

        >>> from deepinv_ud2m import Initializer, UnfoldedDenoiser, load_prior
        >>> class Adjoint(Initializer):
        ...     def estimate(self, problem, x_s, sigma):
        ...         return problem.adjoint
        >>> unfolded = UnfoldedDenoiser(load_prior("mnist"), initializer=Adjoint(reference_level=0.3))
        >>> unfolded.initializer
        Adjoint(reference_level=0.3)
    """

    #: Whether h is a prediction of the root mean square error of the estimate.
    predicts_rmse = False

    #: Whether ``from_pretrained`` can rebuild it from :meth:`config` and the stored parameters.
    is_rebuilt = True

    #: Initializers by the name of their class, for checkpoints.
    registry: dict[str, type[Initializer]] = {}  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Initializer.registry[cls.__name__] = cls

    def __init__(self, reference_level: float = 0.2):
        super().__init__()
        self.reference_level = check_number("reference_level", reference_level, low=0)

    def forward(self, problem: Problem, x_s: Tensor, sigma: Scalar) -> tuple[Tensor, Tensor]:
        """
        :param deepinv_ud2m.Problem problem: measurements, physics and noise level.
        :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`.
        :param float, torch.Tensor sigma: level of ``x_s``, a scalar, `[B]` or `[B, 1, 1, 1]`.
        :returns: the estimate, `[B, C, H, W]`, and h, `[B, 1, 1, 1]`.
        """
        sigma = expand_scalar(sigma, x_s, "sigma")
        return self.estimate(problem, x_s, sigma), self.rmse_scale(problem.sigma_y.to(x_s.dtype), sigma)

    def rmse_scale(self, sigma_y: Tensor, sigma: Tensor) -> Tensor:
        """h by the formula above. The noise levels broadcast."""
        return joint_level(sigma, sigma_y, self.reference_level)

    def estimate(self, problem: Problem, x_s: Tensor, sigma: Tensor) -> Tensor:
        """The estimate alone. Here ``sigma`` has the shape `[B, 1, 1, 1]`."""
        raise NotImplementedError

    def config(self) -> dict:
        """The arguments it was made with, as JSON holds them."""
        return {"reference_level": self.reference_level}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes and a checkpoint stores, by name: none by default."""
        return {}

    @property
    def networks(self) -> list[nn.Module]:
        """The networks whose calls count as network evaluations (NFE)."""
        return []

    def __repr__(self) -> str:
        # Without the layers of networks: the representation of a sampler contains this one.
        arguments = ", ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, value in self.config().items()
            if not isinstance(value, dict)
        )
        return f"{type(self).__name__}({arguments})"
