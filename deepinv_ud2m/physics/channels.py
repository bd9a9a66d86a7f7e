r"""Operators on images of other channels: grey and complex measurements of colour images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepinv.physics import LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_ud2m.checks import Scalar
from deepinv_ud2m.physics.traits import check_has_prox, has_closed_form, is_linear, is_per_image


class ChannelMap(LinearPhysics):
    r"""
    An operator A behind a matrix W of channels: :math:`y = A (W x) + \text{noise}`, where each pixel of
    :math:`W x` is W times the channels of x.

    It lets a sampler of colour images restore measurements of grey ones: W takes the mean of the channels,
    and the mean of the channels of a sample is a sample of the grey image. :class:`deepinv_ud2m.UD2M` does
    both by itself, if the prior has more channels than the physics, which has one. Other methods, such as
    deepinv's, need this class.

    The prox is exact where that of A is, if the rows of W are orthogonal and of the same squared norm w:

    .. math:: z = m + W^\top \left( \operatorname{prox}_{w\gamma}(W m) - W m \right) / w .

    :param deepinv.physics.Physics physics: A, of images with c channels, and the noise. If it is not linear,
        as :class:`deepinv_ud2m.physics.JPEG`, this physics is not either, and W must be of that kind.
    :param torch.Tensor weights: W, of shape `[c, C]`, for images with C channels.
    :raises TypeError: if the physics has no ``prox_l2``.
    :raises ValueError: for weights of another shape or kind.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m.physics import ChannelMap
        >>> grey = dinv.physics.Blur(filter=torch.ones(1, 1, 5, 5) / 25, padding="valid")
        >>> ChannelMap.grey(grey)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 1, 28, 28])
        >>> mri = dinv.physics.MRI(torch.ones(1, 2, 32, 32), img_size=(2, 32, 32))  # of complex images
        >>> ChannelMap.real(mri)(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 2, 32, 32])
    """

    def __init__(self, physics: Physics, weights: Tensor):
        if not isinstance(physics, Physics):
            raise TypeError(f"physics must be a deepinv Physics, got {type(physics).__name__}")
        check_has_prox(physics)
        if not isinstance(weights, Tensor) or weights.ndim != 2 or not bool(weights.isfinite().all()):
            raise ValueError(f"weights must be a finite matrix [c, C] of channels, got {weights!r}")
        super().__init__()
        self.physics, self.noise_model = physics, physics.noise_model
        self.register_buffer("weights", weights)
        gram = weights @ weights.T
        self._norm = gram[0, 0].item()  # w
        self._is_orthogonal = bool(torch.allclose(gram, self._norm * torch.eye(len(gram)).to(gram)))
        self.is_linear = is_linear(physics)
        if not (self.is_linear or self._is_orthogonal):
            name = type(physics).__name__
            raise ValueError(
                f"weights must have orthogonal rows of one norm for {name}, which is not linear; W W^T is "
                f"{gram.tolist()}"
            )

    @classmethod
    def grey(cls, physics: Physics, channels: int = 3) -> ChannelMap:
        """
        Of the mean of the channels.

        :param deepinv.physics.Physics physics: the physics of grey images.
        :param int channels: channels C (default: 3).
        """
        return cls(physics, torch.full((1, channels), 1 / channels))

    @classmethod
    def real(cls, physics: Physics, channels: int = 1) -> ChannelMap:
        """
        Of a complex image whose imaginary part is zero, which deepinv's MRI has as a second channel. Its real
        part is the mean of the channels. It assumes that the phase of the image is known, and removed.

        :param deepinv.physics.LinearPhysics physics: the physics of complex images.
        :param int channels: channels C (default: 1).
        """
        return cls(physics, torch.tensor([[1 / channels], [0.0]]).expand(2, channels).clone())

    def A(self, x: Tensor, **kwargs: Any) -> Tensor | TensorList:
        """A of the mapped images. Further arguments are those of the physics."""
        return self.physics.A(self._map(x), **kwargs)

    def A_adjoint(self, y: Tensor | TensorList, **kwargs: Any) -> Tensor:
        """Its adjoint, if it is linear."""
        return self._unmap(self.physics.A_adjoint(y, **kwargs))

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        r""":math:`W^\top A^\top A W x`."""
        return self._unmap(self.physics.A_adjoint_A(self._map(x), **kwargs))

    def A_dagger(self, y: Tensor | TensorList, **kwargs: Any) -> Tensor:
        """The pseudo-inverse of A in all channels alike; exact if the rows of W are orthogonal."""
        return self._unmap(self.physics.A_dagger(y, **kwargs)) / self._norm

    def prox_l2(self, z: Tensor, y: Tensor | TensorList, gamma: Scalar, **kwargs: Any) -> Tensor:
        """The prox of the class, or that of a :class:`deepinv.physics.LinearPhysics`, which is iterative."""
        if not self._is_orthogonal:
            return super().prox_l2(z, y, gamma, **kwargs)
        mapped = self._map(z)
        found = self.physics.prox_l2(mapped, y, self._norm * gamma, **kwargs)
        return z + self._unmap(found - mapped) / self._norm

    def update_parameters(self, **kwargs: Any) -> None:
        """Update the parameters of A."""
        self.physics.update_parameters(**kwargs)

    # Noise and sensor are those of A, which may be a stack of several.

    def noise(self, x: Tensor | TensorList, **kwargs: Any) -> Tensor | TensorList:
        """Add the noise of A."""
        return self.physics.noise(x, **kwargs)

    def sensor(self, x: Tensor | TensorList) -> Tensor | TensorList:
        """Apply the sensor of A."""
        return self.physics.sensor(x)

    def set_noise_model(self, noise_model: Any, **kwargs: Any) -> None:
        """Set the noise of A."""
        self.physics.set_noise_model(noise_model, **kwargs)
        self.noise_model = noise_model

    # What the samplers ask of a physics: deepinv_ud2m.physics.traits.

    @property
    def measures_as(self) -> Physics:
        """A, whose noise is that of this physics, and whose measurements look as those of A."""
        return self.physics

    def has_closed_form_prox(self, shape: torch.Size) -> bool:
        """That of A, see the class."""
        return self._is_orthogonal and has_closed_form(self.physics, self.inner_shape(shape))

    def is_per_image(self, batch_size: int) -> bool:
        """As A is."""
        return is_per_image(self.physics, batch_size)

    def find_structure(
        self,
        find: Callable,
        shape: torch.Size,
        y: Tensor | TensorList,
        like: Tensor,
        per_image: bool,
    ) -> Any:
        """The structure of A behind W, if ``find`` finds one of A: see :mod:`deepinv_ud2m.structure`."""
        if not self._is_orthogonal:
            return NotImplemented
        inner = find(self.physics, self.inner_shape(shape), y, like, per_image)
        return inner and _MappedStructure(self, inner)

    def inner_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the images that A takes."""
        return torch.Size([shape[0], len(self.weights), *shape[2:]])

    def _map(self, x: Tensor) -> Tensor:
        return torch.einsum("cd,bdhw->bchw", self.weights.to(x), x)

    def _unmap(self, x: Tensor) -> Tensor:
        return torch.einsum("cd,bchw->bdhw", self.weights.to(x), x)


class _MappedStructure:
    """A structure of A behind W, whose rows are orthogonal. It has the methods that the other one has."""

    def __init__(self, physics: ChannelMap, inner: Any):
        self.physics, self.inner = physics, inner
        for name in ("normal", "prox", "preconditioner"):
            if hasattr(inner, name):
                setattr(self, name, getattr(self, f"_{name}"))
        weights = physics.weights
        if hasattr(inner, "spectra") and len(weights) == 1 and bool((weights == weights[0, 0]).all()):
            # The mean over channels is seen, and deviations from it are not.
            self.spectra = physics._norm * inner.spectra[0], torch.zeros_like(inner.spectra[0])

    def _normal(self, x: Tensor) -> Tensor:
        return self.physics._unmap(self.inner.normal(self.physics._map(x)))

    def _prox(self, mean: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        mapped = self.physics._map(mean)
        found = self.inner.prox(mapped, y, self.physics._norm * gamma)
        return mean + self.physics._unmap(found - mapped) / self.physics._norm

    def _preconditioner(self, gamma: Tensor) -> Callable[[Tensor], Tensor] | None:
        inner = self.inner.preconditioner(self.physics._norm * gamma)
        if inner is None:
            return None

        def precondition(r: Tensor) -> Tensor:
            mapped = self.physics._map(r)
            return r + self.physics._unmap(inner(mapped) - mapped) / self.physics._norm

        return precondition
