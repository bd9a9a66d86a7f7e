r"""The structure of an operator, found by trying it, so that its prox costs less than a network.

Three structures are recognised, whatever the class of the physics:

- :class:`Separable`, :math:`y = R x C^\top`: blurs with a separable kernel and any borders, and resampling
  of rows and columns. The prox is exact, by the singular values of two small matrices.
- :class:`Convolution` of padded images, of which a part is seen: any kernel, one per image and channel or
  one for all, with valid, reflected, replicated or zero borders. :math:`A^\top A` goes by the FFT.
- :class:`NearlyCircular`, where :math:`A^\top A` is not far from a circular convolution, as in tomography.
  Its inverse preconditions the conjugate gradients, which then need several times fewer iterations.

All are tried on random images before they are used, so a structure that does not fit is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor

#: Largest relative error of a structure on a random image.
_TOLERANCE = 2e-5

#: How much the inverse of a circular convolution must reduce the sine of the angle between a random image and
#: its :math:`I + \gamma A^\top A` to serve as preconditioner, for a :math:`\gamma` of so many over its norm.
_NEARLY, _GAMMA = 0.7, 100.0

#: Beyond this side the singular values of a separable operator cost more than the FFTs of a convolution.
_LARGE = 1024

#: Probes of rows and columns are this far apart: further than kernels reach.
_SPACING, _WIDTH = 32, 48


@dataclass(frozen=True)
class Separable:
    r"""
    :math:`y = R x C^\top` for each channel.

    With :math:`R = P S U^\top`, :math:`C = Q T V^\top` (singular values s and t) the prox is

    .. math::
        z = m + U \left[ \frac{\gamma s_i t_j}{1 + \gamma s_i^2 t_j^2}
        \left( P^\top (y - A m)\, Q \right)_{ij} \right] V^\top ,

    in which no coefficient exceeds :math:`\sqrt\gamma / 2`: little rounding is amplified.

    :param torch.Tensor rows: R, of shape `[h, H]`.
    :param torch.Tensor columns: C, of shape `[w, W]`.
    """

    rows: Tensor
    columns: Tensor
    _factors: dict[str, tuple[Tensor, Tensor, Tensor]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        factors = {}
        for name, matrix in (("rows", self.rows), ("columns", self.columns)):
            left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
            factors[name] = left.to(matrix), values.to(matrix), right.to(matrix)
        object.__setattr__(self, "_factors", factors)

    def A(self, x: Tensor) -> Tensor:
        """The operator, of images `[B, C, H, W]`."""
        return self.rows @ x @ self.columns.T

    def normal(self, x: Tensor) -> Tensor:
        r""":math:`A^\top A`, likewise."""
        return self.rows.T @ self.A(x) @ self.columns

    def prox(self, mean: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """The exact prox, see :meth:`deepinv_ud2m.Problem.prox`."""
        (P, s, Ut), (Q, t, Vt) = self._factors["rows"], self._factors["columns"]
        singular = s[:, None] * t
        residual = P.T @ (y - self.A(mean)) @ Q
        return mean + Ut.T @ (gamma * singular / (1 + gamma * singular**2) * residual) @ Vt


@dataclass(frozen=True)
class Convolution:
    """
    Correlation of padded images with a kernel, at the places that are seen.

    :param torch.Tensor kernel: of shape `[B or 1, C or 1, k, l]`.
    :param tuple[int, int] first: offset of its first weight from the place that is measured.
    :param tuple padding: pixels before and after, for rows and for columns.
    :param str mode: of the padding, as :func:`torch.nn.functional.pad` names it.
    :param torch.Size shape: shape of the images, `[B, C, H, W]`.
    :param tuple[int, int] seen: height and width of the measurements.
    """

    kernel: Tensor
    first: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    mode: str
    shape: torch.Size
    seen: tuple[int, int]
    _sizes: list[int] = field(init=False, repr=False, compare=False)
    _transfer: Tensor = field(init=False, repr=False, compare=False)
    _circular: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The FFT is of a size it is fast for; what is added is zero, and not seen.
        padded = [n + sum(pad) for n, pad in zip(self.shape[-2:], self.padding, strict=True)]
        object.__setattr__(self, "_sizes", [_fast_size(n) for n in padded])
        object.__setattr__(self, "_transfer", self._transform(self._sizes))
        object.__setattr__(self, "_circular", self._transform(self.shape[-2:]).abs().square())

    def _transform(self, size: Sequence[int]) -> Tensor:
        spread = self.kernel.new_zeros(*self.kernel.shape[:2], *size)
        height, width = self.kernel.shape[-2:]
        spread[..., :height, :width] = self.kernel
        return torch.fft.rfft2(spread.roll(self.first, (-2, -1)))

    @property
    def _window(self) -> tuple:
        (top, _), (left, _) = self.padding
        return (..., slice(top, top + self.seen[0]), slice(left, left + self.seen[1]))

    def A(self, x: Tensor) -> Tensor:
        """The operator, of images `[B, C, H, W]`."""
        padded = x
        if any(map(any, self.padding)):
            padded = F.pad(x, (*self.padding[1], *self.padding[0]), mode=self.mode)
        spectrum = torch.fft.rfft2(padded, s=self._sizes)
        transfer = repeated(self._transfer, len(x))
        return torch.fft.irfft2(transfer.conj() * spectrum, s=self._sizes)[self._window]

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Its adjoint, of measurements."""
        (top, bottom), (left, right) = self.padding
        height, width = self.shape[-2] + top + bottom, self.shape[-1] + left + right
        image = F.pad(y, (left, width - left - y.shape[-1], top, height - top - y.shape[-2]))
        spectrum = repeated(self._transfer, len(y)) * torch.fft.rfft2(image, s=self._sizes)
        image = torch.fft.irfft2(spectrum, s=self._sizes)[..., :height, :width]
        return self._fold(self._fold(image, -2, self.padding[0]), -1, self.padding[1])

    def _fold(self, padded: Tensor, dim: int, padding: tuple[int, int]) -> Tensor:
        """The adjoint of the padding of one dimension."""
        before, after = padding
        n = self.shape[dim]
        image = padded.narrow(dim, before, n)
        if self.mode == "constant" or not (before or after):
            return image
        if self.mode == "reflect":
            first, last = torch.arange(before, 0, -1), torch.arange(n - 2, n - 2 - after, -1)
        elif self.mode == "circular":
            first, last = torch.arange(n - before, n), torch.arange(after)
        else:
            first, last = torch.zeros(before).long(), torch.full((after,), n - 1)
        first, last = first.to(padded.device), last.to(padded.device)
        image = image.index_add(dim, first, padded.narrow(dim, 0, before))
        return image.index_add(dim, last, padded.narrow(dim, before + n, after))

    def normal(self, x: Tensor) -> Tensor:
        r""":math:`A^\top A`."""
        return self.A_adjoint(self.A(x))

    def preconditioner(self, gamma: Tensor) -> Callable[[Tensor], Tensor] | None:
        r"""
        The inverse of :math:`I + \gamma A^\top A` for circular borders. Where borders are zero or not seen,
        it saves half of the iterations or more. For reflected and replicated borders it saves none.
        """
        if self.mode != "constant":
            return None
        return _inverse(repeated(self._circular, len(gamma)), gamma, self.shape)


class NearlyCircular:
    r"""
    An operator whose :math:`A^\top A` is not far from a circular convolution.

    :param torch.Tensor spectrum: of the convolution, `[B or 1, C or 1, H, W // 2 + 1]`, non-negative.
    :param torch.Size shape: shape of the images, `[B, C, H, W]`.
    """

    def __init__(self, spectrum: Tensor, shape: torch.Size):
        self.spectrum, self.shape = spectrum, shape

    @property
    def spectra(self) -> tuple[Tensor, Tensor]:
        """The spectrum for the mean over channels, and for the deviations from it, `[B or 1, 1, ...]`."""
        spectrum = self.spectrum.mean(1, keepdim=True)
        return spectrum, spectrum

    def preconditioner(self, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        """The inverse of the convolution, see :class:`Convolution`."""
        return _inverse(repeated(self.spectrum, len(gamma)), gamma, self.shape)


def _inverse(spectrum: Tensor, gamma: Tensor, shape: torch.Size) -> Callable[[Tensor], Tensor]:
    weight = 1 / (1 + gamma * spectrum)
    return lambda r: torch.fft.irfft2(weight * torch.fft.rfft2(r), s=shape[-2:])


def repeated(values: Tensor, batch: int) -> Tensor:
    """Of copies of the batch, one after the other."""
    return values if len(values) == 1 else values.repeat(batch // len(values), 1, 1, 1)


def _fast_size(n: int) -> int:
    """The next product of powers of 2, 3 and 5."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def find_structure(
    physics: Physics, shape: torch.Size, y: Tensor | TensorList, like: Tensor, per_image: bool
) -> Separable | Convolution | NearlyCircular | None:
    """
    The structure of an operator.

    :param deepinv.physics.Physics physics: the physics, linear.
    :param torch.Size shape: shape of the images, `[B, C, H, W]`.
    :param torch.Tensor, deepinv.utils.TensorList y: measurements.
    :param torch.Tensor like: gives images their dtype and device.
    :param bool per_image: whether each image has an operator of its own.
    :returns: the structure; none where none was recognised.
    """
    said = getattr(physics, "find_structure", None)
    known = said(find_structure, shape, y, like, per_image) if callable(said) else NotImplemented
    if known is not NotImplemented:
        return known
    generator = torch.Generator(like.device).manual_seed(0)
    x = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
    x = x if per_image else x[:1]
    with torch.no_grad():
        if isinstance(y, Tensor) and not y.is_complex() and y.ndim == 4 and y.shape[:2] == shape[:2]:
            expected = physics.A(x)
            searches: list[Callable] = [_convolutions] if per_image else [_separable, _convolutions]
            for find in searches[::-1] if max(shape[-2:]) > _LARGE else searches:
                for structure in find(physics, shape, x, expected):
                    if (structure.A(x) - expected).norm() < _TOLERANCE * expected.norm():
                        return structure
        return _nearly_circular(physics, shape, x - 0.5)


def _separable(physics: Physics, shape: torch.Size, x: Tensor, expected: Tensor) -> Iterator[Separable]:
    try:
        rows = _probe(physics.A, shape[-2], expected.shape[-2], x)
        transposed = lambda images: physics.A(images.transpose(-1, -2)).transpose(-1, -2)  # noqa: E731
        columns = _probe(transposed, shape[-1], expected.shape[-1], x)
    except Exception:  # the user's operator takes no such images, and may say so in any way
        return
    product = rows @ x @ columns.T
    scale = (product * expected).sum() / product.square().sum()
    if bool(scale.isfinite() and scale != 0):
        yield Separable(rows * scale, columns)


def _probe(A: Callable[[Tensor], Tensor], size: int, measured: int, like: Tensor) -> Tensor:
    """
    The matrix of the rows, up to a factor, from images that vary from row to row only. Impulses that are
    far apart share an image, one per channel.
    """
    places = torch.arange(size, device=like.device)
    spacing = min(size, _SPACING)
    images = (places[None] % spacing == torch.arange(spacing, device=like.device)[:, None]).to(like)
    images = images[None, :, :, None].expand(1, spacing, size, _WIDTH).contiguous()
    response = A(images)[0]  # [spacing, measured, width]
    response = response[..., response.shape[-1] // 2]
    # The response at a place is that of the impulse of its image that is nearest.
    centres = torch.arange(measured, device=like.device) * (size / measured) + (size / measured - 1) / 2
    if measured != size and size % measured:  # valid borders: measurements are a part of the image
        centres = torch.arange(measured, device=like.device) + (size - measured) / 2
    distance = (centres[:, None] - places).abs()
    return torch.where(distance < spacing / 2, response.T[:, places % spacing], 0)


def _convolutions(physics: Physics, shape: torch.Size, x: Tensor, expected: Tensor) -> Iterator[Convolution]:
    height, width = expected.shape[-2:]
    if height > shape[-2] or width > shape[-1]:
        return
    impulse = torch.zeros_like(expected)
    impulse[..., height // 2, width // 2] = 1
    try:
        response = physics.A_adjoint(impulse)
    except Exception:  # likewise
        return
    support = response.abs().amax((0, 1)) > 0
    if not bool(support.any()):
        return
    spans = [torch.nonzero(support.any(dim)).flatten() for dim in (1, 0)]
    (top, bottom), (left, right) = ((int(span[0]), int(span[-1])) for span in spans)
    kernel = response[..., top : bottom + 1, left : right + 1]
    first = top - height // 2, left - width // 2
    last = bottom - height // 2, right - width // 2
    rows, columns = (
        (max(0, -low), max(0, seen - 1 + high - (n - 1)))
        for low, high, seen, n in zip(first, last, (height, width), shape[-2:], strict=True)
    )
    padding = rows, columns
    modes = ("reflect", "replicate", "circular", "constant") if any(map(any, padding)) else ("constant",)
    is_long = any(max(pad) >= n for pad, n in zip(padding, shape[-2:], strict=True))
    for mode in modes:
        if not (is_long and mode in ("reflect", "circular")):  # these cannot pad by more than the image
            yield Convolution(kernel, first, padding, mode, shape, (height, width))


def _nearly_circular(physics: Physics, shape: torch.Size, x: Tensor) -> NearlyCircular | None:
    if x.dtype not in (torch.float32, torch.float64):
        return None  # there is no FFT of half precision on a CPU
    height, width = (n // 2 for n in shape[-2:])
    impulse = torch.zeros_like(x)
    impulse[..., height, width] = 1
    try:
        response = physics.A_adjoint_A(impulse)
        found = physics.A_adjoint_A(x)
    except Exception:  # likewise
        return None
    spectrum = torch.fft.rfft2(response.roll((-height, -width), (-2, -1))).real.clamp(min=0)
    gamma = _GAMMA / spectrum.amax((1, 2, 3), keepdim=True)
    image = x + gamma * found
    preconditioned = _inverse(spectrum, gamma, shape)(image)
    is_near = _sine(preconditioned, x) < _NEARLY * _sine(image, x) or _sine(image, x) < 1e-3  # not for NaN
    return NearlyCircular(spectrum, shape) if is_near else None


def _sine(a: Tensor, b: Tensor) -> float:
    cosine = (a * b).sum() / (a.norm() * b.norm())
    return (1 - cosine**2).clamp(min=0).sqrt().item()
