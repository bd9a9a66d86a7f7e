r"""JPEG as a deepinv physics: what the coder keeps of an image, and the projection on it.

A coded image says of each DCT coefficient in which interval of width q, the step of its quantisation
table, it lies: the image is in a box. The squared distance to that box takes the place of
:math:`\|Ax - y\|^2`, and its prox is a step towards the projection on the box.

The tables, the colour transform and the sampling of chroma are those of the standard (ITU-T T.81, JFIF)
as libjpeg uses them, which Pillow and most programs write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from deepinv.physics import Physics
from deepinv.physics.generator import PhysicsGenerator
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import get_sampling
from torch import Tensor

from deepinv_ud2m.checks import check_count

#: Edge of the blocks, in samples.
BLOCK = 8


class JPEG(Physics):
    r"""
    Compression by JPEG: measurements y are decoded images.

    Forward, as a coder does: 8-bit samples, YCbCr, chroma averaged over 2 x 2 pixels (4:2:0), DCT of 8
    x 8 blocks, coefficients c rounded to :math:`n = \operatorname{round}(c / q)`; and as a decoder does,
    from :math:`n q` back to an image. Roundings pass gradients straight through.

    What y says about x is the box

    .. math:: C = \{ x : |c_i(x) - n_i q_i| \leq q_i / 2 \text{ for all coefficients } i \} .

    Distances are Euclidean in YCbCr (full resolution, [0, 1] for each of the planes), in which the
    transform is orthogonal. There the nearest point of C, :meth:`project`, clamps coefficients, and a
    change of an averaged chroma sample is that of its four pixels; and
    :math:`\operatorname{argmin}_x \tfrac\gamma2\, d(x, C)^2 + \tfrac12 \|x - z\|^2`, :meth:`prox_l2`, is
    :math:`(z + \gamma P_C(z)) / (1 + \gamma)`. With it the unfolded denoiser needs to know nothing of
    JPEG.

    The box is found from y by coding it again, so y may come from a file as well as from
    :meth:`forward`: give the physics the quality and the subsampling of the file. Unlike a decoder's
    output that of the forward model is neither rounded to 8 bits nor clamped, which would lose the box
    where the image is saturated. It has the size of the coded image, whole blocks; :meth:`A_adjoint` is
    the visible part.

    Pixels agree with those of Pillow within the rounding of 8-bit samples, but for a few per cent at
    most: where the integer arithmetic of libjpeg rounds a coefficient the other way, and where its
    decoder clamps saturated samples.

    Images of any size are extended by their edges to whole blocks. Where sides are no multiples of 8
    (16 with 4:2:0), the coefficients of the cut blocks depend on each other; projecting is repeated
    ``max_iter`` times there, alternately onto the box and onto extended images, which ends inside of the
    box, but not at its nearest point.

    There is no noise but rounding: the default noise model is none, which stands for a level of 0.005.

    :param tuple[int, int, int] img_size: shape `(C, H, W)` of the images, of 1 (grey) or 3 (RGB)
        channels.
    :param int, float, torch.Tensor quality: quality factor in [1, 100], as libjpeg scales it: one for
        all images, or one per image, `[B]` (default: 10).
    :param str subsampling: of chroma, ``"4:2:0"`` or ``"4:4:4"`` (default: ``"4:2:0"``, Pillow's).
    :param int max_iter: projections where blocks are cut, at least 1 (default: 20).
    :raises ValueError: for another number of channels, quality or subsampling.
    :raises TypeError: for a quality that is not a number or a tensor.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv_ud2m.physics import JPEG
        >>> x = torch.rand(2, 3, 48, 32)
        >>> physics = JPEG((3, 48, 32), quality=10)
        >>> y = physics(x)
        >>> y.shape
        torch.Size([2, 3, 48, 32])
        >>> physics.violation(physics.project(x + 0.1, y), y) < 1e-3  # inside of the box
        tensor([True, True])
    """

    def __init__(
        self,
        img_size: Sequence[int],
        quality: float | Tensor = 10,
        subsampling: str = "4:2:0",
        max_iter: int = 20,
        **kwargs,
    ):
        super().__init__(max_iter=check_count("max_iter", max_iter), **kwargs)
        self.img_size = tuple(img_size)
        if len(self.img_size) != 3 or self.img_size[0] not in (1, 3) or min(self.img_size) < 1:
            raise ValueError(f"img_size must be (C, H, W) with 1 or 3 channels, got {img_size}")
        if subsampling not in _FACTORS:
            raise ValueError(f"subsampling must be one of {sorted(_FACTORS)}, got {subsampling!r}")
        self.subsampling = subsampling
        self.register_buffer("quality", _check_quality(quality))
        channels, height, width = self.img_size
        self._factor = _FACTORS[subsampling] if channels == 3 else 1
        for name, size in (("rows", height), ("columns", width)):
            self.register_buffer(f"_upsample_{name}", _upsampling(size, self._factor), persistent=False)
            inverse = torch.linalg.pinv(getattr(self, f"_upsample_{name}").double()).float()
            self.register_buffer(f"_unsample_{name}", inverse, persistent=False)
        self.register_buffer("_dct", _dct_matrix(), persistent=False)
        self.register_buffer("_tables", torch.tensor(_TABLES, dtype=torch.float32), persistent=False)

    @classmethod
    def read(cls, file: str | Path) -> tuple[Tensor, JPEG]:
        """
        The image of a file, and its coder.

        :param str, pathlib.Path file: a JPEG, grey or colour, as libjpeg, Pillow, OpenCV and many
            others write them.
        :returns: the image `[1, C, H, W]` as the file has it (the orientation that a camera notes is not
            applied), and the physics of its quality and subsampling.
        :raises FileNotFoundError: if there is no such file.
        :raises ValueError: if it is no JPEG, is neither grey nor RGB, has the quantisation tables of
            another coder, which are of no quality factor, or another subsampling.

        |sep|

        :Examples:

            >>> from deepinv_ud2m import UD2M
            >>> from deepinv_ud2m.physics import JPEG
            >>> y, physics = JPEG.read("photo.jpg")  # doctest: +SKIP
            >>> x_hat = UD2M.from_pretrained("photos")(y, physics)  # doctest: +SKIP
        """
        try:
            picture = Image.open(file)
            picture.load()
        except UnidentifiedImageError as error:
            raise ValueError(f"file {file} is not an image") from error
        with picture:
            if picture.format != "JPEG" or picture.mode not in ("L", "RGB"):
                raise ValueError(
                    f"file {file} must be a grey or RGB JPEG, got {picture.format}, {picture.mode}"
                )
            channels = len(picture.mode)
            sampling = get_sampling(picture) if channels == 3 else 0
            if sampling not in _SAMPLINGS:
                raise ValueError(f"file {file} must have subsampling of {sorted(_FACTORS)}")
            quality = _quality_of(picture.quantization)
            if quality is None:
                raise ValueError(
                    f"file {file} has quantisation tables of its own, those of no quality factor: it "
                    "was not written by libjpeg's rule"
                )
            pixels = torch.from_numpy(np.array(picture)).reshape(*picture.size[::-1], channels)
        y = pixels.permute(2, 0, 1)[None] / 255
        return y, cls(y.shape[1:], quality, _SAMPLINGS[sampling])

    # -- What deepinv calls -------------------------------------------------------------------------

    def update_parameters(self, quality: float | Tensor | None = None, **kwargs) -> None:
        """
        Another quality.

        :param int, float, torch.Tensor quality: see the class; unchanged by default.
        :raises ValueError: for one outside of [1, 100].
        """
        super().update_parameters(**kwargs)
        if quality is not None:
            self.quality = _check_quality(quality).to(self.quality)

    def A(self, x: Tensor, quality: float | Tensor | None = None, **kwargs) -> Tensor:
        """
        Code and decode.

        :param torch.Tensor x: images `[B, C, H, W]` in [0, 1]; values beyond are clamped, as in a file.
        :param int, float, torch.Tensor quality: as in :meth:`update_parameters`.
        :returns: decoded images, of whole blocks, `[B, C, H', W']`.
        :raises ValueError: for images of another size than ``img_size``, or another number of them than
            of qualities.
        :raises TypeError: for images of integers.
        """
        self.update_parameters(quality=quality)
        self._check_images(x, self.img_size)
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating type, an image in [0, 1], got {x.dtype}")
        with torch.autocast(x.device.type, enabled=False):
            planes = [_round(plane) for plane in self._to_planes(_round(255 * x.clamp(0, 1)))]
            quantised = [
                _quantise(c, q) for c, q in zip(self._encode(planes, True), self._steps(x), strict=True)
            ]
            return self._decode(quantised) / 255

    def A_adjoint(self, y: Tensor, **kwargs) -> Tensor:
        """
        The decoded image itself, its visible part. (Not an adjoint: coding is not linear.)

        :param torch.Tensor y: decoded images, of whole blocks or as they are seen, `[B, C, H, W]`.
        """
        return self._whole(y)[..., : self.img_size[1], : self.img_size[2]]

    def A_dagger(self, y: Tensor, **kwargs) -> Tensor:
        """The decoded image, as :meth:`A_adjoint`: it has the coefficients at the centre of the box."""
        return self.A_adjoint(y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float | Tensor, **kwargs) -> Tensor:
        r"""
        :math:`(z + \gamma P_C(z)) / (1 + \gamma)`, see the class.

        :param torch.Tensor z: images `[B, C, H, W]`.
        :param torch.Tensor y: decoded images, see :meth:`A_adjoint`.
        :param float, torch.Tensor gamma: a scalar, `[B]` or `[B, 1, 1, 1]`, non-negative.
        """
        if isinstance(gamma, Tensor):
            gamma = gamma.reshape(-1, 1, 1, 1)
        return z + gamma / (1 + gamma) * (self.project(z, y) - z)

    # -- The box ------------------------------------------------------------------------------------

    def project(self, z: Tensor, y: Tensor) -> Tensor:
        """
        The point of the box of y nearest to z, see the class.

        :param torch.Tensor z: images `[B, C, H, W]`, not necessarily in [0, 1].
        :param torch.Tensor y: decoded images, see :meth:`A_adjoint`.
        :returns: images of the shape of z.
        :raises ValueError: for images of another size than ``img_size``.
        """
        self._check_images(z, self.img_size)
        dtype = torch.promote_types(z.dtype, torch.float32)
        with torch.autocast(z.device.type, enabled=False):
            planes, steps = self._to_planes(255 * z.to(dtype)), self._steps(z)
            centres = self._centres(y.to(dtype), steps)
            whole = all(n % (BLOCK * self._factor) == 0 for n in self.img_size[1:])
            for _ in range(1 if whole else self.max_iter):
                planes = self._clamp_coefficients(planes, centres, steps)
            return (self._to_image(planes) / 255).to(z.dtype)

    def violation(self, x: Tensor, y: Tensor) -> Tensor:
        r"""
        How far coefficients are outside of the box of y, in steps: the largest of
        :math:`|c_i(x) - n_i q_i| / q_i - 1/2` of each image, not below 0.

        :param torch.Tensor x: images `[B, C, H, W]`.
        :param torch.Tensor y: decoded images, see :meth:`A_adjoint`.
        :returns: `[B]`.
        """
        steps = self._steps(x)
        coefficients = self._encode(self._to_planes(255 * x))
        outside = [
            ((c - n) / q).abs().flatten(1).amax(1) - 0.5
            for c, n, q in zip(coefficients, self._centres(y, steps), steps, strict=True)
        ]
        return torch.stack(outside).amax(0).clamp(min=0)

    def mismatch(self, y: Tensor) -> Tensor:
        """
        How little decoded images look like ones of this quality: mean distance of the luma coefficients
        that are not zero from their multiples of a step, in steps of at least 4 levels of 255, which the
        rounding of pixels does not blur. Near 0.03 for the right quality; 0.25 is chance, which wrong
        ones reach unless the steps of one are multiples of the other's.

        :param torch.Tensor y: decoded images, see :meth:`A_adjoint`.
        :returns: `[B]`.
        """
        steps = self._steps(y)[0]
        ratio = self._transform(self._to_planes(255 * self._whole(y))[0]) / steps
        counted = ((ratio.abs() > 0.5) & (steps >= 4)).flatten(1)
        distance = (ratio - ratio.round()).abs().flatten(1)
        return (distance * counted).sum(1) / counted.sum(1).clamp(min=1)

    def _centres(self, y: Tensor, steps: list[Tensor]) -> list[Tensor]:
        """The coefficients that were decoded to y."""
        luma, *chroma = self._to_planes(255 * self._whole(y))
        planes = [luma, *(self._unsample_rows @ c @ self._unsample_columns.T for c in chroma)]
        coefficients = [self._transform(plane) for plane in planes]
        return [torch.round(c / q) * q for c, q in zip(coefficients, steps, strict=True)]

    def _clamp_coefficients(self, planes, centres, steps) -> list[Tensor]:
        """One projection of the extended planes; the visible part of the result."""
        moved = []
        _, height, width = self.img_size
        coefficients = self._encode(planes)
        for i, (plane, c, n, q) in enumerate(zip(planes, coefficients, centres, steps, strict=True)):
            change = self._transform_back(torch.clamp(c, n - q / 2, n + q / 2) - c)
            if i and self._factor > 1:  # an averaged sample stands for all its pixels
                change = change.repeat_interleave(self._factor, -1).repeat_interleave(self._factor, -2)
            moved.append(plane + _fold(change, height, width))
        return moved

    # -- The coder ----------------------------------------------------------------------------------

    def _encode(self, planes: list[Tensor], integers: bool = False) -> list[Tensor]:
        """Coefficients of visible planes, in units of 1/255; averages rounded as a coder does."""
        luma, *chroma = planes
        _, rows, columns = self._whole_size
        extended = [_extend(luma, rows, columns)]
        for plane in chroma:
            # As libjpeg: pixels are repeated to the right; downwards, to an even number, then averages.
            even = -(-plane.shape[-2] // self._factor) * self._factor
            plane = _extend(plane, even, columns)
            if self._factor > 1:
                plane = _average(plane, integers)
            extended.append(_extend(plane, rows // self._factor, columns // self._factor))
        return [self._transform(plane) for plane in extended]

    def _decode(self, coefficients: list[Tensor]) -> Tensor:
        luma, *chroma = [self._transform_back(c) for c in coefficients]
        return self._to_image(
            [luma, *(self._upsample_rows @ c @ self._upsample_columns.T for c in chroma)]
        )

    def _transform(self, plane: Tensor) -> Tensor:
        """DCT of the blocks, `[B, h, 8, w, 8]`."""
        blocks = plane.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        dct = self._dct.to(plane.dtype)
        return torch.einsum("ui,bhiwj,vj->bhuwv", dct, blocks, dct)

    def _transform_back(self, coefficients: Tensor) -> Tensor:
        dct = self._dct.to(coefficients.dtype)
        return torch.einsum("ui,bhuwv,vj->bhiwj", dct, coefficients, dct).flatten(-2).flatten(-3, -2)

    def _to_planes(self, images: Tensor) -> list[Tensor]:
        """Y, Cb and Cr, or grey, all centred at 0, in units of 1/255."""
        if images.shape[1] == 1:
            return [images[:, 0] - 128]
        y, cb, cr = torch.einsum("pc,bchw->pbhw", images.new_tensor(_TO_YCBCR), images)
        return [y - 128, cb, cr]

    def _to_image(self, planes: list[Tensor]) -> Tensor:
        if len(planes) == 1:
            return planes[0][:, None] + 128
        y, cb, cr = planes
        inverse = torch.linalg.inv(torch.tensor(_TO_YCBCR, dtype=torch.float64)).to(y)
        return torch.einsum("cp,pbhw->bchw", inverse, torch.stack([y + 128, cb, cr]))

    def _steps(self, images: Tensor) -> list[Tensor]:
        """Steps q of each plane, `[B or 1, 1, 8, 1, 8]`."""
        quality = self.quality
        if len(quality) not in (1, images.shape[0]):
            raise ValueError(
                f"quality has {len(quality)} values, for as many images; got {images.shape[0]} images"
            )
        tables = _scaled(self._tables, quality)
        luma, chroma = tables.to(torch.promote_types(images.dtype, torch.float32)).unbind(1)
        of_planes = [luma, chroma, chroma][: self.img_size[0]]
        return [table[:, None, :, None, :] for table in of_planes]

    # -- Sizes --------------------------------------------------------------------------------------

    @property
    def _whole_size(self) -> tuple[int, int, int]:
        unit = BLOCK * self._factor
        channels, height, width = self.img_size
        return channels, -(-height // unit) * unit, -(-width // unit) * unit

    def _whole(self, y: Tensor) -> Tensor:
        """Decoded images of whole blocks; what a decoder cut off is extended from the edge."""
        if tuple(y.shape[1:]) == self.img_size:
            return _extend(y, *self._whole_size[1:])
        self._check_images(y, self._whole_size)
        return y

    def _check_images(self, images: Tensor, size: tuple[int, int, int]) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != size:
            raise ValueError(
                f"images must be of shape [B, {', '.join(map(str, size))}] for this JPEG of img_size "
                f"{self.img_size}, got {list(images.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.img_size}, quality={self.quality.tolist()}, subsampling={self.subsampling!r}"


class JPEGQualityGenerator(PhysicsGenerator):
    """
    Random quality factors, uniform over the integers of a range, one per image.

    :param int quality_min: smallest, at least 1 (default: 5).
    :param int quality_max: largest, at most 100 (default: 40).
    :param torch.Generator rng: random generator; a generator of its own, seeded 0, by default.
    :param str device: device of the factors.
    :raises ValueError: for a range outside of [1, 100].
    """

    def __init__(
        self,
        quality_min: int = 5,
        quality_max: int = 40,
        rng: torch.Generator | None = None,
        device: str = "cpu",
    ):
        if not 1 <= quality_min <= quality_max <= 100:
            raise ValueError(
                f"quality_min and quality_max must satisfy 1 <= quality_min <= quality_max <= 100, got "
                f"{quality_min} and {quality_max}"
            )
        rng = rng if rng is not None else torch.Generator(device).manual_seed(0)
        super().__init__(rng=rng, device=device)
        self.quality_min, self.quality_max = quality_min, quality_max

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs) -> dict:
        """
        Draw a batch of factors.

        :param int batch_size: number of factors.
        :param int seed: seeds the generator first, when given.
        :returns: ``{"quality": tensor of shape (batch_size,)}``.
        """
        self.rng_manual_seed(seed)
        limits = self.quality_min, self.quality_max + 1
        options = {"generator": self.rng, "device": self.rng.device}
        return {"quality": torch.randint(*limits, (batch_size,), **options).float()}


def _quality_of(tables: Mapping[int, Sequence[int]]) -> int | None:
    """The quality factor of a file's tables, the largest of those that share them; none has others."""
    standard = torch.tensor(_TABLES, dtype=torch.float32)
    for quality in range(100, 0, -1):
        scaled = _scaled(standard, torch.tensor([float(quality)]))[0].flatten(1).tolist()
        if all(list(table) == scaled[min(i, 1)] for i, table in tables.items()):
            return quality
    return None


def _scaled(tables: Tensor, quality: Tensor) -> Tensor:
    """libjpeg's tables of luma and chroma for quality factors, `[B, 2, 8, 8]`."""
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    return ((tables * scale.view(-1, 1, 1, 1) + 50) / 100).floor().clamp(1, 255)


def _check_quality(quality: float | Tensor) -> Tensor:
    if not isinstance(quality, Number | Tensor):
        raise TypeError(f"quality must be a number or a tensor, got {quality!r}")
    quality = torch.as_tensor(quality, dtype=torch.float32).detach().reshape(-1)
    if len(quality) == 0 or not bool(((quality >= 1) & (quality <= 100)).all()):
        raise ValueError(f"quality must be in [1, 100], got {quality.tolist()}")
    return quality


def _round(x: Tensor) -> Tensor:
    """To integers, halves away from zero as in the coder; the gradient passes."""
    return x + (x.sign() * (x.abs() + 0.5).floor() - x).detach()


def _quantise(coefficients: Tensor, steps: Tensor) -> Tensor:
    """To multiples of the steps. A coder's DCT gives eighths, so that halves of a step are frequent."""
    return _round(_round(8 * coefficients) / (8 * steps)) * steps


def _average(plane: Tensor, integers: bool) -> Tensor:
    """Of 2 x 2 samples. libjpeg rounds a half down and up, column by column in turn."""
    mean = F.avg_pool2d(plane, 2)
    if not integers:
        return mean
    # (sum + 1) >> 2 and (sum + 2) >> 2
    bias = torch.tensor([0.25, 0.5], dtype=plane.dtype, device=plane.device)
    rounded = (mean.unflatten(-1, (-1, 2)) + bias).floor().flatten(-2)
    return mean + (rounded - mean).detach()


def _extend(plane: Tensor, rows: int, columns: int) -> Tensor:
    """By repeating the last row and column, of `[B, H, W]` or `[B, C, H, W]`."""
    pad = (0, columns - plane.shape[-1], 0, rows - plane.shape[-2])
    return F.pad(plane, pad, mode="replicate") if any(pad) else plane


def _fold(plane: Tensor, rows: int, columns: int) -> Tensor:
    """The visible part of the extended plane nearest to a plane: repeated samples become their mean."""
    for dim, size in ((-2, rows), (-1, columns)):
        kept, edge = plane.split([size - 1, plane.shape[dim] - size + 1], dim)
        plane = torch.cat([kept, edge.mean(dim, keepdim=True)], dim)
    return plane


def _upsampling(size: int, factor: int) -> Tensor:
    """
    Linear interpolation of averages to pixels along one side, `[whole, whole / factor]`.

    The decoder knows of the visible samples only, at the edge it repeats the last; the others are
    interpolated among themselves, so that nothing of them is lost.
    """
    unit = BLOCK * factor
    whole = -(-size // unit) * unit
    if factor == 1:
        return torch.eye(whole)
    visible = -(-size // factor)
    parts = [n for n in (visible, whole // factor - visible) if n]
    return torch.block_diag(
        *(F.interpolate(torch.eye(n)[:, None], scale_factor=2, mode="linear")[:, 0].T for n in parts)
    )


def _dct_matrix() -> Tensor:
    """Orthonormal DCT-II, a row per frequency."""
    k, i = torch.meshgrid(torch.arange(BLOCK), torch.arange(BLOCK), indexing="ij")
    matrix = torch.cos(math.pi * (2 * i + 1) * k / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix


_FACTORS = {"4:2:0": 2, "4:4:4": 1}

#: As Pillow numbers them.
_SAMPLINGS = {0: "4:4:4", 2: "4:2:0"}

#: JFIF; rows Y, Cb, Cr.
_TO_YCBCR = [
    [0.299, 0.587, 0.114],
    [-0.299 / 1.772, -0.587 / 1.772, 0.5],
    [0.5, -0.587 / 1.402, -0.114 / 1.402],
]

#: ITU-T T.81, Annex K, tables K.1 (luma) and K.2 (chroma), for quality 50.
_TABLES = [
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    [
        [17, 18, 24, 47, 99, 99, 99, 99],
        [18, 21, 26, 66, 99, 99, 99, 99],
        [24, 26, 56, 99, 99, 99, 99, 99],
        [47, 66, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
    ],
]
