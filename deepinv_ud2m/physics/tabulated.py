r"""Operators as sparse matrices: slow operators become fast ones, at the price of memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor
from tqdm.auto import tqdm

from deepinv_ud2m.physics.traits import is_linear

#: Impulses that go through the operator in one call.
_BATCH = 256

#: Largest relative difference to the operator, on a random image.
_TOLERANCE = 1e-4


class TabulatedPhysics(LinearPhysics):
    """
    A linear operator as a sparse matrix, the same for all images and channels. :func:`tabulate` makes one.

    :param torch.Tensor matrix: sparse (COO), of shape `[m, H W]`.
    :param tuple[int, int, int] img_size: shape `(C, H, W)` of the images.
    :param tuple[int, ...] measured: shape of the measurements of one image, beginning with C.

    |sep|

    :Examples:

        >>> import deepinv as dinv
        >>> from deepinv_ud2m.physics import tabulate
        >>> scanner = dinv.physics.Tomography(angles=4, img_width=16, normalize=True)
        >>> tabulate(scanner, (1, 16, 16)).matrix.shape
        torch.Size([92, 256])
    """

    def __init__(self, matrix: Tensor, img_size: tuple[int, int, int], measured: tuple[int, ...]):
        super().__init__(img_size=img_size)
        self.img_size, self.measured = tuple(img_size), tuple(measured)
        matrix = matrix.coalesce()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.register_buffer("matrix", matrix.to_sparse_csr())
            self.register_buffer("transposed", matrix.t().coalesce().to_sparse_csr())

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The product with the matrix, of images `[B, C, H, W]`."""
        columns = x.flatten(2).flatten(0, 1).T
        return _Product.apply(columns, self.matrix, self.transposed).T.reshape(len(x), *self.measured)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """The product with its transpose, of measurements."""
        columns = y.flatten(2).flatten(0, 1).T
        return _Product.apply(columns, self.transposed, self.matrix).T.reshape(len(y), *self.img_size)

    def is_per_image(self, batch_size: int) -> bool:
        """It is not."""
        return False

    @property
    def megabytes(self) -> float:
        """Memory of the matrix and its transpose."""
        parts = [(m.values(), m.col_indices(), m.crow_indices()) for m in (self.matrix, self.transposed)]
        return sum(t.numel() * t.element_size() for part in parts for t in part) / 1e6

    def __repr__(self) -> str:
        m, n = self.matrix.shape
        return (
            f"TabulatedPhysics({m}x{n}, {self.matrix.values().numel()} values, {self.megabytes:.3g} MB, "
            f"{self.noise_model})"
        )


class _Product(torch.autograd.Function):
    """Sparse times dense. PyTorch has no gradient for it on all devices."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, matrix: Tensor, transposed: Tensor | None) -> Tensor:
        ctx.transposed = transposed
        return matrix.to(columns.dtype) @ columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Product.apply(grad, ctx.transposed, None), None, None


def tabulate(
    physics: Physics, img_size: tuple[int, int, int], *, max_megabytes: float = 2000.0, verbose: bool = False
) -> TabulatedPhysics:
    """
    A linear operator as a sparse matrix, with its noise model.

    It pays for operators whose code is slow and whose matrix is sparse. deepinv's tomography is the example:
    a product with 30 angles of 128x128 pixels takes a tenth of the time. Its matrix is read from its
    sampling grids. That of any other operator comes from impulses, one for each pixel. The matrix is tried
    on a random image before it is returned.

    :param deepinv.physics.LinearPhysics physics: the operator, the same for all images of a batch and for all
        channels. It keeps channels apart.
    :param tuple[int, int, int] img_size: shape `(C, H, W)` of the images.
    :param float max_megabytes: most memory for the matrix and its transpose (default: 2000).
    :param bool verbose: show a progress bar over the impulses (default: ``False``).
    :returns: the physics, with ``megabytes``.
    :raises TypeError: if the physics is not linear.
    :raises ValueError: for another shape, an operator that mixes channels or is another for each image, and
        for a matrix that is larger than ``max_megabytes``.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m.physics import tabulate
        >>> scanner = dinv.physics.Tomography(angles=20, img_width=32, normalize=True)
        >>> fast, x = tabulate(scanner, (1, 32, 32)), torch.rand(2, 1, 32, 32)
        >>> torch.allclose(fast(x), scanner(x), atol=1e-4)
        True
    """
    if not isinstance(physics, Physics) or not is_linear(physics):
        raise TypeError(f"physics must be a deepinv LinearPhysics, got {type(physics).__name__}")
    if len(img_size) != 3:
        raise ValueError(f"img_size must be (C, H, W), got {img_size!r}")
    channels, height, width = img_size
    like = next((t for t in physics.buffers() if t.is_floating_point()), torch.zeros(1))
    options: dict[str, Any] = {"device": like.device, "dtype": torch.float32}
    generator = torch.Generator(like.device).manual_seed(0)
    x = torch.rand(1, *img_size, generator=generator, **options)
    with torch.no_grad():
        y = physics.A(x)
        if not isinstance(y, Tensor) or y.is_complex() or y.ndim < 3 or y.shape[1] != channels:
            raise ValueError(
                "physics must have real measurements, one tensor with the channels of the images; "
                f"{type(physics).__name__} has {getattr(y, 'shape', type(y).__name__)}"
            )
        rows, grids = y[0, 0].numel(), getattr(getattr(physics, "radon", None), "all_grids", None)
        readings = [lambda: _of_grids(physics, width)] if grids is not None and height == width else []
        readings.append(lambda: _of_impulses(physics, x, max_megabytes, verbose))
        for read in readings:
            indices, values = (torch.cat(found, -1) for found in zip(*read(), strict=True))
            if 24e-6 * values.numel() > max_megabytes:
                raise ValueError(_too_large(physics, 24e-6 * values.numel(), max_megabytes))
            matrix = torch.sparse_coo_tensor(indices, values, (rows, height * width))
            tabulated = TabulatedPhysics(matrix, img_size, tuple(y.shape[1:]))
            if (tabulated.A(x) - y).norm() < _TOLERANCE * y.norm():
                tabulated.set_noise_model(physics.noise_model)
                return tabulated
    raise ValueError(
        f"{type(physics).__name__} is no matrix that is the same for all channels and images: channels are "
        "mixed, or it is random"
    )


def _of_impulses(
    physics: Physics, x: Tensor, max_megabytes: float, verbose: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    channels, height, width = x.shape[1:]
    count = 0
    for start in tqdm(range(0, height * width, _BATCH), desc="tabulate", disable=not verbose):
        pixels = torch.arange(start, min(start + _BATCH, height * width), device=x.device)
        impulses = x.new_zeros(len(pixels), channels, height * width)
        impulses[torch.arange(len(pixels)), :, pixels] = 1
        response = physics.A(impulses.unflatten(2, (height, width)))[:, 0].flatten(1)
        column, row = response.nonzero(as_tuple=True)
        count += len(row)
        if 24e-6 * count > max_megabytes:
            raise ValueError(_too_large(physics, 24e-6 * count, max_megabytes))
        yield torch.stack([row, pixels[column]]), response[column, row]


def _of_grids(physics: Physics, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Of deepinv's tomography: each ray is a sum of samples of the image, bilinear between four pixels. The
    image is padded to its diagonal, or seen through a circle.
    """
    radon = physics.radon
    angles, grids = len(radon.theta), radon.all_grids
    # All angles side by side, [1, samples, angles * detectors, 2], or [angles, 1, samples, detectors, 2].
    is_joint = grids.ndim == 4
    grids = grids[0].unflatten(1, (angles, -1)).movedim(1, 0) if is_joint else grids[:, 0]
    size = width if radon.circle else width + math.ceil(width * 2**0.5 - width)
    before = 0 if radon.circle else size // 2 - width // 2
    norm = physics.operator_norm.item() if physics.normalize else 1.0
    offsets = torch.linspace(-1, 1, width, device=grids.device)
    inside = offsets[:, None] ** 2 + offsets**2 <= 1 if radon.circle else None
    detectors = torch.arange(grids.shape[2], device=grids.device)
    for angle, grid in enumerate(grids):
        position = (grid.double() + 1) / 2 * (size - 1) - before
        lower = position.floor()
        found = []
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            pixel = lower + torch.tensor(corner, device=grid.device)
            weight = (1 - (position - pixel).abs()).prod(-1)
            column, row = pixel.long().unbind(-1)  # grids name the horizontal coordinate first
            seen = (row >= 0) & (row < width) & (column >= 0) & (column < width) & (weight > 0)
            if inside is not None:
                seen &= inside[row.clamp(0, width - 1), column.clamp(0, width - 1)]
            ray = (detectors * angles + angle).expand_as(row)
            found.append((torch.stack([ray[seen], (row * width + column)[seen]]), weight[seen] / norm))
        indices, values = (torch.cat(part, -1) for part in zip(*found, strict=True))
        shape = (grids.shape[2] * angles, width**2)
        summed = torch.sparse_coo_tensor(indices, values.float(), shape).coalesce()
        yield summed.indices(), summed.values()


def _too_large(physics: Physics, megabytes: float, most: float) -> str:
    return (
        f"the matrix of {type(physics).__name__} takes {megabytes:.4g} MB or more, and max_megabytes is "
        f"{most:.4g}: it is not sparse enough to be tabulated, or the image is too large"
    )
