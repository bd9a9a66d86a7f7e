r"""The steps of a JPEG coder: colours, sampling of chroma, DCT, quantisation.

Tables, colour transform and chroma sampling are those of the standard (ITU-T T.81, JFIF) as libjpeg
implements them. Pillow and most other programs use libjpeg.

Planes are `[B, H, W]`, one of luma and two of chroma, centred at 0, in units of 1/255. Coefficients are
`[B, h, 8, w, 8]`: row of blocks, vertical frequency, column of blocks, horizontal frequency. The factor
is 2 where chroma has half the resolution along each side (4:2:0), and 1 where it has the full one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Side of the blocks, in samples.
BLOCK = 8

#: The factor of each subsampling.
FACTORS = {"4:2:0": 2, "4:4:4": 1}

# -- Quantisation ----------------------------------------------------------------------------------


def step_tables(quality: Tensor) -> Tensor:
    """Quantisation steps `[B, 2, 8, 8]` of luma and chroma, as libjpeg's, for quality factors `[B]`."""
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    return ((_TABLES.to(quality) * scale.view(-1, 1, 1, 1) + 50) / 100).floor().clamp(1, 255)


def quality_of(tables: Sequence[Sequence[int]]) -> int | None:
    """The largest quality factor that gives these tables, one of 64 numbers for each component, if any."""
    qualities = torch.arange(100.0, 0, -1)
    steps = step_tables(qualities).flatten(2)[:, [0, 1, 1][: len(tables)]]
    fits = (steps == torch.tensor([list(table) for table in tables])).all(2).all(1)
    return int(qualities[fits][0]) if fits.any() else None


def round_half_away(x: Tensor) -> Tensor:
    """To integers, halves away from zero as in libjpeg. The gradient passes unchanged."""
    return x + (x.sign() * (x.abs() + 0.5).floor() - x).detach()


def quantise(coefficients: Tensor, steps: Tensor) -> Tensor:
    """To the nearest multiples of the steps, of eighths: the resolution of libjpeg's DCT."""
    return round_half_away(round_half_away(8 * coefficients) / (8 * steps)) * steps


# -- Colours ---------------------------------------------------------------------------------------


def to_planes(images: Tensor) -> list[Tensor]:
    """Planes Y, Cb and Cr of images `[B, 3, H, W]`, or the plane of grey images, in [0, 255]."""
    if images.shape[1] == 1:
        return [images[:, 0] - 128]
    y, cb, cr = torch.einsum("pc,bchw->pbhw", images.new_tensor(_TO_YCBCR), images)
    return [y - 128, cb, cr]


def to_image(planes: list[Tensor]) -> Tensor:
    """The inverse of :func:`to_planes`."""
    if len(planes) == 1:
        return planes[0][:, None] + 128
    y, cb, cr = planes
    inverse = torch.linalg.inv(torch.tensor(_TO_YCBCR, dtype=torch.float64)).to(y)
    return torch.einsum("cp,pbhw->bchw", inverse, torch.stack([y + 128, cb, cr]))


# -- DCT -------------------------------------------------------------------------------------------


def dct(plane: Tensor) -> Tensor:
    """Orthonormal DCT of the blocks of a plane."""
    blocks = plane.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    matrix = _DCT.to(plane)
    return torch.einsum("ui,bhiwj,vj->bhuwv", matrix, blocks, matrix)


def inverse_dct(coefficients: Tensor) -> Tensor:
    """The plane of coefficients."""
    matrix = _DCT.to(coefficients)
    blocks = torch.einsum("ui,bhuwv,vj->bhiwj", matrix, coefficients, matrix)
    return blocks.flatten(-2).flatten(-3, -2)


# -- Coder and decoder -----------------------------------------------------------------------------


def encode(planes: list[Tensor], factor: int, as_integers: bool = False) -> list[Tensor]:
    """
    Coefficients of planes of any size, before quantisation.

    :param bool as_integers: round averages of chroma as libjpeg does (default: ``False``).
    """
    luma, *chroma = planes
    rows, columns = whole_size(luma.shape[-2:], factor)
    extended = [extend(luma, rows, columns)]
    for plane in chroma:
        # As libjpeg: pixels are repeated to the right; downwards, to an even number, then averages.
        plane = extend(plane, -(-plane.shape[-2] // factor) * factor, columns)
        if factor > 1:
            plane = _average(plane, as_integers)
        extended.append(extend(plane, rows // factor, columns // factor))
    return [dct(plane) for plane in extended]


def decode(coefficients: list[Tensor], factor: int, size: Sequence[int]) -> list[Tensor]:
    """Planes of whole blocks, chroma at full resolution; ``size`` is that of the visible image."""
    luma, *chroma = [inverse_dct(c) for c in coefficients]
    if factor > 1:
        chroma = [upsample(plane, size) for plane in chroma]
    return [luma, *chroma]


def undo_decode(planes: list[Tensor], factor: int, size: Sequence[int]) -> list[Tensor]:
    """The inverse of :func:`decode`; of other planes, the coefficients that decode to the nearest."""
    luma, *chroma = planes
    if factor > 1:
        chroma = [undo_upsample(plane, size) for plane in chroma]
    return [dct(plane) for plane in (luma, *chroma)]


def whole_size(size: Sequence[int], factor: int) -> tuple[int, int]:
    """Height and width of the whole blocks that hold an image."""
    unit = BLOCK * factor
    return -(-size[0] // unit) * unit, -(-size[1] // unit) * unit


def extend(plane: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat the last row and column, of `[B, H, W]` or `[B, C, H, W]`, up to a size."""
    pad = (0, columns - plane.shape[-1], 0, rows - plane.shape[-2])
    return F.pad(plane, pad, mode="replicate") if any(pad) else plane


def fold(plane: Tensor, rows: int, columns: int) -> Tensor:
    """The plane of a size whose extension is nearest to a plane: repeated samples are averaged."""
    for dim, size in ((-2, rows), (-1, columns)):
        kept, edge = plane.split([size - 1, plane.shape[dim] - size + 1], dim)
        plane = torch.cat([kept, edge.mean(dim, keepdim=True)], dim)
    return plane


def _average(plane: Tensor, as_integers: bool) -> Tensor:
    """Average 2 x 2 samples. libjpeg rounds a half down and up, column by column in turn."""
    mean = F.avg_pool2d(plane, 2)
    if not as_integers:
        return mean
    # (sum + 1) >> 2 and (sum + 2) >> 2
    bias = torch.tensor([0.25, 0.5], dtype=plane.dtype, device=plane.device)
    rounded = (mean.unflatten(-1, (-1, 2)) + bias).floor().flatten(-2)
    return mean + (rounded - mean).detach()


# -- Chroma between the resolutions ----------------------------------------------------------------


def upsample(samples: Tensor, size: Sequence[int]) -> Tensor:
    """
    Chroma samples to pixels, twice as many along each side, by linear interpolation as libjpeg's.

    The decoder sees only the samples of the visible image, whose ``size`` is given, and repeats the last ones
    at its edge. The others, which fill blocks, are interpolated among themselves, so that nothing of them is
    lost.
    """
    return _along_sides(_interpolate, samples, [-(-n // 2) for n in size])


def undo_upsample(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """The samples whose pixels, by :func:`upsample`, are nearest to the given ones."""
    return _along_sides(_deinterpolate, pixels, [2 * -(-n // 2) for n in size])


def _along_sides(function: Callable[[Tensor], Tensor], plane: Tensor, seen: Sequence[int]) -> Tensor:
    """Apply a function along the rows and the columns, to what is seen and to the rest."""
    for n in seen:
        plane = plane.transpose(-2, -1)
        parts = plane.split([n, plane.shape[-1] - n], -1)
        plane = torch.cat([function(part) for part in parts if part.shape[-1]], -1)
    return plane


def _interpolate(c: Tensor) -> Tensor:
    """U c along the last side: `v[2i] = (c[i-1] + 3 c[i]) / 4`, `v[2i+1] = (3 c[i] + c[i+1]) / 4`."""
    before = torch.cat([c[..., :1], c[..., :-1]], -1)
    after = torch.cat([c[..., 1:], c[..., -1:]], -1)
    return torch.stack([0.75 * c + 0.25 * before, 0.75 * c + 0.25 * after], -1).flatten(-2)


def _deinterpolate(v: Tensor) -> Tensor:
    r"""
    The pseudo-inverse of U along the last side.

    Edges are repeated, which is a mirror, so all of this is convolution of mirrored signals. The rows of
    :math:`U^T U` are (3, 10, 3) / 8, whose inverse is :math:`(-1/3)^{|k|}`, and with :math:`U^T` it is

    .. math:: c_i = \tfrac23 \sum_{k \geq 0} (-1/3)^k (v_{2(i-k)} + v_{2(i+k)+1}) .

    We stop at k = 31, where a term is below the rounding of float64.
    """
    return 2 / 3 * (_decaying_sum(v) + _decaying_sum(v.flip(-1)).flip(-1))


def _decaying_sum(v: Tensor) -> Tensor:
    """`sum_{k < 32} (-1/3)^k v[2(i-k)]`: the product of `1 + (-1/3)^n shift^n`, n = 1, 2, 4, 8, 16."""
    size = v.shape[-1]
    index = 2 * torch.arange(-31, size // 2, device=v.device) % (2 * size)
    e = v[..., torch.minimum(index, 2 * size - 1 - index)]
    for n in (1, 2, 4, 8, 16):
        e = e[..., n:] + (-1 / 3) ** n * e[..., :-n]
    return e


# -- Constants -------------------------------------------------------------------------------------


def _dct_matrix() -> Tensor:
    """Orthonormal DCT-II, a row for each frequency."""
    k, i = torch.meshgrid(torch.arange(BLOCK), torch.arange(BLOCK), indexing="ij")
    matrix = torch.cos(math.pi * (2 * i + 1) * k / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix


_DCT = _dct_matrix()

#: JFIF; rows Y, Cb, Cr.
_TO_YCBCR = [
    [0.299, 0.587, 0.114],
    [-0.299 / 1.772, -0.587 / 1.772, 0.5],
    [0.5, -0.587 / 1.402, -0.114 / 1.402],
]

#: ITU-T T.81, Annex K, tables K.1 (luma) and K.2 (chroma), for quality 50.
_TABLES = torch.tensor(
    [
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
)
