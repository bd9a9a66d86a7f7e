r"""An inverse problem as one object: measurements, their physics and their noise level.

User input is checked here, once. Later code trusts a :class:`Problem`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_ud2m.checks import Scalar, check_count, expand_scalar
from deepinv_ud2m.conjugate_gradients import regularised_least_squares
from deepinv_ud2m.measurements import check_level, check_measurements, check_operator, parts, shapes_of
from deepinv_ud2m.physics.channels import ChannelMap
from deepinv_ud2m.physics.traits import (
    check_has_prox,
    complaints,
    has_closed_form,
    has_noise,
    is_linear,
    is_per_image,
    noise_level,
    operator_tensors,
)
from deepinv_ud2m.structure import find_structure, repeated

#: What a physics raises for measurements of another shape.
_MISFITS = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError)


class Problem:
    r"""
    Measurements :math:`y = A x + \sigma_y n` of B images, checked.

    :param torch.Tensor, deepinv.utils.TensorList y: measurements, floating point or complex, finite.
    :param deepinv.physics.Physics physics: the physics that made them. It has a ``prox_l2``. Its operator
        may differ from image to image.
    :param float, torch.Tensor sigma_y: noise level, positive: a scalar, `[B]` or `[B, 1, 1, 1]` (default:
        the level of the physics, see :func:`deepinv_ud2m.physics.traits.noise_level`).
    :param int channels: channels C of the images (default: those of the physics). A physics of one channel is
        then applied to the mean of the channels, by
        :class:`deepinv_ud2m.physics.ChannelMap`.
    :raises TypeError: for a physics without ``prox_l2``, or arguments that are not of these types.
    :raises ValueError: for measurements that are empty, not finite or do not fit the physics, for complex
        images, and for a noise level that is missing or not positive.

    It warns if a noise level is above 1, if y is of 8 bits, if the weights of a ``filter`` do not sum to 1,
    if y is not zero where the operator measures nothing, if the adjoint of the physics is none, and if the
    physics has a ``complaint`` about y (:mod:`deepinv_ud2m.physics.traits`).

    ============ =========================================================================
    ``y``        the measurements, as given
    ``physics``  the physics of the images
    ``shape``    shape of the images, `[B, C, H, W]`
    ``sigma_y``  the noise level, `[B, 1, 1, 1]`
    ``adjoint``  :math:`A^\top y`, `[B, C, H, W]`, which gives images their dtype and device
    ``is_grey``  whether the mean of the channels is what was asked for
    ============ =========================================================================

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import Problem
        >>> physics = dinv.physics.Inpainting((1, 8, 8), mask=0.5,
        ...                                   noise_model=dinv.physics.GaussianNoise(0.1))
        >>> problem = Problem(physics(torch.rand(2, 1, 8, 8)), physics)
        >>> problem.shape, problem.repeat(3).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([6, 1, 8, 8]))
        >>> problem.prox(mean=torch.zeros(2, 1, 8, 8), gamma=torch.ones(2, 1, 1, 1)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        y: Tensor | TensorList,
        physics: Physics,
        sigma_y: Scalar | None = None,
        channels: int | None = None,
    ):
        check_has_prox(physics)
        if channels is not None:
            check_count("channels", channels)
        check_measurements(y)
        level = check_level(noise_level(physics, sigma_y))
        # Without a noise model, and without a level in its place, a floor is assumed.
        self.level_is_assumed = sigma_y is None and not has_noise(physics)
        self.y, self.physics = y, physics
        self.is_linear = is_linear(physics)
        self.adjoint, again = self._adjoint_of(y)
        if self.is_linear:
            check_operator(physics, parts(y), parts(again), self.adjoint, level)
        channels = 1 if channels is None else channels
        self.is_grey = self.shape[1] == 1 and channels != 1
        if self.is_grey:
            self.physics = ChannelMap.grey(physics, channels)
            self.physics.weights = self.physics.weights.to(self.adjoint)  # once, and not in each call
            self.adjoint = self.adjoint.expand(-1, channels, -1, -1) / channels
        self.sigma_y = expand_scalar(level, self.adjoint, "sigma_y")
        self.is_per_image = is_per_image(self.physics, len(self.adjoint))
        # The measurements of each copy, if copies go through the physics one by one.
        self._copies: list | None = None
        self._view = self._remember_adjoint()
        self._structure: Any = None
        if self.is_linear and not self.has_closed_form():
            if self.adjoint.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"y must be of single or double precision for {type(physics).__name__}, whose prox has "
                    f"no closed form, got {self.adjoint.dtype}: give y.float() and physics.float()"
                )
            with torch.autocast(self.device.type, enabled=False):
                self._structure = find_structure(self.physics, self.shape, y, self.adjoint, self.is_per_image)
        for complaint in complaints(physics, y):
            warnings.warn(complaint, stacklevel=3)

    @property
    def shape(self) -> torch.Size:
        """Shape of the images, `[B, C, H, W]`."""
        return self.adjoint.shape

    @property
    def device(self) -> torch.device:
        """Device of measurements and images."""
        return self.adjoint.device

    def repeat(self, copies: int) -> Problem:
        """
        The problem of several samples per measurement: copies of the batch, one after the other.

        An operator that differs from image to image is applied to one copy after the other. An operator
        that is the same for all images is applied to all copies in one call.

        :param int copies: number of copies, at least 1.
        :returns: the problem of ``copies * B`` images.
        """
        if check_count("copies", copies) == 1:
            return self
        repeated = copy.copy(self)
        repeated.y = _repeat(self.y, copies)
        repeated.adjoint, repeated.sigma_y = _repeat(self.adjoint, copies), _repeat(self.sigma_y, copies)
        if self.is_per_image:
            repeated._copies = (self._copies or [self.y]) * copies
        else:
            repeated._view = repeated._remember_adjoint()
        return repeated

    def of(self, y: Tensor | TensorList, sigma_y: Tensor) -> Problem:
        """
        The same operator with other measurements. Nothing is checked.

        :param torch.Tensor, deepinv.utils.TensorList y: measurements, of the shape of the present ones.
        :param torch.Tensor sigma_y: their noise level, `[B, 1, 1, 1]`.
        """
        other = copy.copy(self)
        other.y, other.sigma_y, other.adjoint = y, sigma_y, self.A_adjoint(y)
        if self._copies is None:
            other._view = other._remember_adjoint()
        else:
            other._copies = _split(y, len(self._copies))
        return other

    def A(self, x: Tensor) -> Tensor | TensorList:
        """:math:`A x`, without noise, of images `[B, C, H, W]`."""
        return self._by_copy(self.physics.A, x)

    def A_adjoint(self, y: Tensor | TensorList) -> Tensor:
        r""":math:`A^\top y`, `[B, C, H, W]`, of measurements."""
        return self._by_copy(self.physics.A_adjoint, y)

    def A_adjoint_A(self, x: Tensor) -> Tensor:
        r""":math:`A^\top A x`, of images `[B, C, H, W]`; by the structure of the operator, if it has one."""
        if hasattr(self._structure, "normal"):
            with torch.autocast(self.device.type, enabled=False):
                return self._structure.normal(x)
        return self._by_copy(self.physics.A_adjoint_A, x)

    def circular_spectra(self) -> tuple[Tensor, Tensor] | None:
        r"""
        The eigenvalues of a circular convolution that is near :math:`A^\top A`, for the mean over channels
        and for deviations from it, `[B or 1, 1, H, W // 2 + 1]`; ``None`` if none is known to be near
        (:class:`deepinv_ud2m.structure.NearlyCircular`).
        """
        found = getattr(self._structure, "spectra", None)
        return found and tuple(repeated(spectrum, self.shape[0]) for spectrum in found)

    def A_dagger(self) -> Tensor:
        r""":math:`A^\dagger y` of the measurements of this problem, `[B, C, H, W]`."""
        physics = copy.copy(self.physics)  # deepinv's stores its solver in the physics
        return self._by_copy(physics.A_dagger, self.y)

    def has_closed_form(self) -> bool:
        """Whether the prox is exact without iterations."""
        return has_closed_form(self.physics, self.shape)

    def prox(
        self,
        mean: Tensor,
        gamma: Tensor,
        *,
        tol: float = 1e-5,
        atol: Tensor | float = 0.0,
        max_iter: int = 1000,
    ) -> Tensor:
        r"""
        :math:`\operatorname{argmin}_z \tfrac\gamma2 \|A z - y\|^2 + \tfrac12 \|z - m\|^2`. It is exact where
        the physics has a closed form, or a :mod:`structure <deepinv_ud2m.structure>` that has one, and by
        :func:`deepinv_ud2m.conjugate_gradients.regularised_least_squares` elsewhere.

        The settings of a solver that are stored in the physics are neither used nor changed.

        :param torch.Tensor mean: m, of shape `[B, C, H, W]`, single precision or better.
        :param torch.Tensor gamma: :math:`\gamma`, of shape `[B, 1, 1, 1]`.
        :param float tol: bound on the error of an iterative solution, relative to z (default: 1e-5).
        :param torch.Tensor, float atol: bound on its root mean square error in units of the image, a number
            or of shape `[B, 1, 1, 1]`; the looser of both counts (default: 0).
        :param int max_iter: most iterations (default: 1000).
        :returns: the minimiser, of the shape of m.
        :raises ValueError: if parameters of the physics do not fit the images.
        """
        if self.has_closed_form():
            z = self._by_copy(self._view.prox_l2, mean, self._copies or self.y, gamma)
            # deepinv broadcasts parameters of too few dimensions, such as a filter [1, 1, w], silently.
            if z.shape != mean.shape:
                raise ValueError(
                    f"the prox of {type(self.physics).__name__} turned images of shape "
                    f"{list(mean.shape)} into {list(z.shape)}: its parameters (filters must be "
                    "[b, c, h, w]) do not fit the images"
                )
            return z
        with torch.autocast(self.device.type, enabled=False):
            if hasattr(self._structure, "prox"):
                return self._structure.prox(mean, self.y, gamma)
            return regularised_least_squares(
                *(mean, self.adjoint, gamma, self.A_adjoint_A),
                tol=tol,
                atol=atol,
                max_iter=max_iter,
                preconditioner=self._structure and self._structure.preconditioner(gamma),
                operator=lambda: operator_tensors(self.physics),
            )

    def _by_copy(self, function: Callable, *batches: Tensor | TensorList | list) -> Any:
        """
        Apply a function to all images at once, or to one copy after the other. Autocast is off: operators
        lose too much precision in bfloat16, and nothing else around them is affected by it.
        """
        with torch.autocast(self.device.type, enabled=False):
            if self._copies is None:
                return function(*batches)
            parts = zip(*(_split(batch, len(self._copies)) for batch in batches), strict=True)
            return _join([function(*part) for part in parts])

    def _remember_adjoint(self) -> Physics:
        r"""
        A view of the physics that returns :math:`A^\top y` without computing it. deepinv's closed forms
        compute it in each prox, which is most of the cost of super-resolution. The view shares all
        parameters of the physics.
        """
        view, y, adjoint, physics = copy.copy(self.physics), self.y, self.adjoint, self.physics

        def A_adjoint(measurements: Tensor | TensorList, **kwargs: Any) -> Tensor:
            if measurements is y and not kwargs:
                return adjoint
            return physics.A_adjoint(measurements, **kwargs)

        view.A_adjoint = A_adjoint
        return view

    def _adjoint_of(self, y: Tensor | TensorList) -> tuple[Tensor, Tensor | TensorList]:
        r"""
        :math:`A^\top y` and :math:`A A^\top y`. Only the physics knows the shape of the images, which is that
        of the adjoint.
        """
        is_stack, name = isinstance(y, TensorList), type(self.physics).__name__
        shapes = shapes_of(y)
        try:
            # The images take their dtype from the adjoint, which autocast would make half precision.
            with torch.autocast((y[0] if is_stack else y).device.type, enabled=False):
                adjoint = self.physics.A_adjoint(y)
                # A physics that is not linear checks y itself: JPEG accepts two shapes of y.
                again = self.physics.A(adjoint) if self.is_linear else y
        except torch.OutOfMemoryError:
            raise
        except _MISFITS as error:
            raise ValueError(f"y of shape {shapes} does not fit the physics {name}: {error}") from error
        if not isinstance(adjoint, Tensor):
            raise ValueError(f"y of shape {shapes} does not fit the physics {name}, which is no stack")
        if adjoint.is_complex():
            raise ValueError(
                f"the physics {name} gives complex images, and they must be real: let its adjoint take "
                "the real part, or real and imaginary part as two channels"
            )
        if shapes_of(again) != shapes:
            raise ValueError(
                f"y of shape {shapes} does not fit the physics {name}, whose measurements would have "
                f"shape {shapes_of(again)}"
            )
        return adjoint, again


def _repeat(batch: Tensor | TensorList, copies: int) -> Tensor | TensorList:
    if isinstance(batch, TensorList):
        return TensorList([_repeat(part, copies) for part in batch])
    return batch.repeat(copies, *[1] * (batch.ndim - 1))


def _split(batch: Tensor | TensorList | list, parts: int) -> list:
    if isinstance(batch, list):
        return batch
    if isinstance(batch, TensorList):
        return [TensorList(list(part)) for part in zip(*(b.chunk(parts) for b in batch), strict=True)]
    return list(batch.chunk(parts))


def _join(parts: list) -> Tensor | TensorList:
    if isinstance(parts[0], TensorList):
        return TensorList([torch.cat(part) for part in zip(*parts, strict=True)])
    return torch.cat(parts)
