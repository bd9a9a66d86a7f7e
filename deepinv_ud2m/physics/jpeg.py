r"""JPEG as a deepinv physics: what the coder keeps of an image, and the projection on it.

A JPEG file says of each DCT coefficient in which interval it lies. The width of the interval is the
step q of the quantisation table. So the image lies in a box. The squared distance to that box takes the
place of :math:`\|Ax - y\|^2`, and its prox is a step towards the projection on the box.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from deepinv.physics import Physics
from torch import Tensor

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.physics import jpeg_codec as codec
from deepinv_ud2m.physics.jpeg_codec import BLOCK
from deepinv_ud2m.physics.jpeg_file import read_jpeg


class JPEG(Physics):
    r"""
    Compression by JPEG: measurements y are decoded images.

    The forward model does what a coder does: 8-bit samples, YCbCr, chroma averaged over 2 x 2 pixels
    (4:2:0), DCT of 8 x 8 blocks, coefficients c rounded to :math:`n = \operatorname{round}(c / q)`. Then
    it decodes :math:`n q` to an image. Gradients pass straight through the roundings.

    The measurement y says that x is in the box

    .. math:: C = \{ x : |c_i(x) - n_i q_i| \leq q_i / 2 \text{ for all coefficients } i \} .

    Distances are Euclidean in YCbCr (full resolution, each plane in [0, 1]), where the DCT is
    orthogonal. There the nearest point of C, :meth:`project`, clamps the coefficients; a change of an
    averaged chroma sample is added to its four pixels. :meth:`prox_l2` is

    .. math::

        \operatorname{argmin}_x \tfrac\gamma2\, d(x, C)^2 + \tfrac12 \|x - z\|^2
        = (z + \gamma P_C(z)) / (1 + \gamma) .

    The physics finds the box by coding y again. So y may come from a file as well as from the forward
    model: :meth:`read` gives the image of a file and the physics of its quality. A decoder rounds to 8
    bits and clamps. The forward model does neither, because clamping would lose the box where the image
    is saturated. Its output has whole blocks, and :meth:`A_adjoint` is the visible part.

    Pixels agree with Pillow's within the rounding of 8-bit samples, except for a few per cent at most:
    where libjpeg's integer arithmetic rounds a coefficient the other way, and where its decoder clamps
    saturated samples.

    Images may have any size. They are extended by their edges to whole blocks. If a side is no multiple
    of 8 (16 with 4:2:0), the coefficients of the cut blocks depend on each other. There we project
    ``max_iter`` times, alternately onto the box and onto extended images. This ends inside the box, but
    not at its nearest point.

    There is no noise except rounding: the noise model is none by default, which stands for a level of
    0.005.

    :param tuple[int, int, int] img_size: shape `(C, H, W)` of the images, of 1 (grey) or 3 (RGB)
        channels.
    :param int, float, torch.Tensor quality: libjpeg's quality factor in [1, 100]: one for all images, or
        one for each image, `[B]` (default: 10).
    :param str subsampling: of chroma, ``"4:2:0"`` or ``"4:4:4"`` (default: ``"4:2:0"``, Pillow's).
    :param int max_iter: projections of cut blocks, at least 1 (default: 20).
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
        >>> physics.violation(physics.project(x + 0.1, y), y) < 1e-3  # inside the box
        tensor([True, True])
    """

    quality: Tensor

    def __init__(
        self,
        img_size: Sequence[int],
        quality: float | Tensor = 10,
        subsampling: str = "4:2:0",
        max_iter: int = 20,
        **kwargs: Any,
    ):
        super().__init__(max_iter=check_count("max_iter", max_iter), **kwargs)
        self.img_size = tuple(img_size)
        if len(self.img_size) != 3 or self.img_size[0] not in (1, 3) or min(self.img_size) < 1:
            raise ValueError(f"img_size must be (C, H, W) with 1 or 3 channels, got {img_size}")
        if subsampling not in codec.FACTORS:
            raise ValueError(f"subsampling must be one of {sorted(codec.FACTORS)}, got {subsampling!r}")
        self.subsampling = subsampling
        self.register_buffer("quality", _check_quality(quality))
        self._factor = codec.FACTORS[subsampling] if self.img_size[0] == 3 else 1

    @classmethod
    def read(cls, file: str | Path) -> tuple[Tensor, JPEG]:
        """
        The image of a file, and its physics.

        The largest image has twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, 179 million by default; Pillow
        warns from half of that on.

        :param str, pathlib.Path file: a JPEG file, grey or colour, as libjpeg, Pillow, OpenCV and many
            other programs write it.
        :returns: the image `[1, C, H, W]` as the file has it (the orientation that a camera notes is not
            applied), and the physics of its quality and subsampling.
        :raises FileNotFoundError: if there is no such file.
        :raises ValueError: if it is not a JPEG file, is damaged or too large, is neither grey nor
            YCbCr, has quantisation tables of no quality factor, or another subsampling.

        |sep|

        :Examples:

            >>> from deepinv_ud2m import UD2M
            >>> from deepinv_ud2m.physics import JPEG
            >>> y, physics = JPEG.read("photo.jpg")  # doctest: +SKIP
            >>> x_hat = UD2M.from_pretrained("photos")(y, physics)  # doctest: +SKIP
        """
        y, quality, subsampling = read_jpeg(file)
        return y, cls(y.shape[1:], quality, subsampling)

    # -- What deepinv calls -------------------------------------------------------------------------

    def update_parameters(self, quality: float | Tensor | None = None, **kwargs: Any) -> None:
        """
        Set the quality.

        :param int, float, torch.Tensor quality: see the class; unchanged by default.
        :raises ValueError: for a quality outside [1, 100].
        """
        super().update_parameters(**kwargs)
        if quality is not None:
            self.quality = _check_quality(quality).to(self.quality)

    def A(self, x: Tensor, quality: float | Tensor | None = None, **kwargs: Any) -> Tensor:
        """
        Code and decode.

        :param torch.Tensor x: images `[B, C, H, W]` in [0, 1]; other values are clamped, as in a file.
        :param int, float, torch.Tensor quality: as in :meth:`update_parameters`.
        :returns: decoded images, of whole blocks, `[B, C, H', W']`.
        :raises ValueError: for images of another size than ``img_size``, or another number of images
            than of qualities.
        :raises TypeError: for images of integers.
        """
        self.update_parameters(quality=quality)
        self._check_images(x, self.img_size)
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating type, an image in [0, 1], got {x.dtype}")
        with torch.autocast(x.device.type, enabled=False):
            samples = codec.round_half_away(255 * x.clamp(0, 1))
            planes = [codec.round_half_away(plane) for plane in codec.to_planes(samples)]
            coefficients = codec.encode(planes, self._factor, as_integers=True)
            pairs = zip(coefficients, self._steps(x), strict=True)
            coefficients = [codec.quantise(c, q) for c, q in pairs]
            return codec.to_image(codec.decode(coefficients, self._factor, self.img_size[1:])) / 255

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """
        The visible part of the decoded image. (It is not an adjoint: coding is not linear.)

        :param torch.Tensor y: decoded images `[B, C, H, W]`, of whole blocks or their visible part.
        """
        return self._whole(y)[..., : self.img_size[1], : self.img_size[2]]

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """As :meth:`A_adjoint`: the coefficients of the decoded image are the centre of the box."""
        return self.A_adjoint(y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float | Tensor, **kwargs: Any) -> Tensor:
        r"""
        :math:`(z + \gamma P_C(z)) / (1 + \gamma)`, see the class.

        :param torch.Tensor z: images `[B, C, H, W]`.
        :param torch.Tensor y: decoded images, see :meth:`A_adjoint`.
        :param float, torch.Tensor gamma: a scalar, `[B]` or `[B, 1, 1, 1]`, non-negative.
        """
        if isinstance(gamma, Tensor):
            gamma = gamma.reshape(-1, 1, 1, 1)
        return z + gamma / (1 + gamma) * (self.project(z, y) - z)

    # -- What the samplers ask ----------------------------------------------------------------------

    def is_per_image(self, batch_size: int) -> bool:
        """Whether each image has a quality of its own."""
        return len(self.quality) > 1

    def complaint(self, y: Tensor) -> str | None:
        """
        What about y does not fit this physics.

        :param torch.Tensor y: decoded images, see :meth:`A_adjoint`.
        :returns: a sentence for a warning, if y looks like images of another quality.
        """
        if not bool((self.mismatch(y) > _MISMATCH).any()):
            return None
        return (
            f"y does not look like images decoded from JPEG files of quality {self.quality.tolist()}: "
            "JPEG.read(file) tells the quality of a file"
        )

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
            steps = self._steps(z)
            planes = codec.to_planes(255 * z.to(dtype))
            planes = self._clamp(planes, self._centres(y.to(dtype), steps), steps)
            return (codec.to_image(planes) / 255).to(z.dtype)

    def violation(self, x: Tensor, y: Tensor) -> Tensor:
        r"""
        How far coefficients are outside the box of y, in steps: the largest of
        :math:`|c_i(x) - n_i q_i| / q_i - 1/2` of each image, at least 0.

        :param torch.Tensor x: images `[B, C, H, W]`.
        :param torch.Tensor y: decoded images, see :meth:`A_adjoint`.
        :returns: `[B]`.
        """
        steps = self._steps(x)
        coefficients = codec.encode(codec.to_planes(255 * x), self._factor)
        outside = [
            ((c - n) / q).abs().flatten(1).amax(1) - 0.5
            for c, n, q in zip(coefficients, self._centres(y, steps), steps, strict=True)
        ]
        return torch.stack(outside).amax(0).clamp(min=0)

    def mismatch(self, y: Tensor) -> Tensor:
        """
        How little decoded images look like images of this quality.

        It is the mean distance of luma coefficients from the nearest multiple of their step, in steps.
        Coefficients that round to zero do not count, nor do steps below 4 of 255 levels, which the
        rounding of pixels blurs. It is near 0.03 for the right quality. Another quality gives up to
        0.25, which is chance, unless its steps divide the right ones.

        :param torch.Tensor y: decoded images, see :meth:`A_adjoint`.
        :returns: `[B]`.
        """
        with torch.autocast(y.device.type, enabled=False):
            steps = self._steps(y)[0]
            ratio = codec.dct(codec.to_planes(255 * self._whole(y))[0]) / steps
        counted = ((ratio.abs() > 0.5) & (steps >= 4)).flatten(1)
        distance = (ratio - ratio.round()).abs().flatten(1)
        return (distance * counted).sum(1) / counted.sum(1).clamp(min=1)

    def _centres(self, y: Tensor, steps: list[Tensor]) -> list[Tensor]:
        """The coefficients that were decoded to y."""
        size = self.img_size[1:]
        coefficients = codec.undo_decode(codec.to_planes(255 * self._whole(y)), self._factor, size)
        return [torch.round(c / q) * q for c, q in zip(coefficients, steps, strict=True)]

    def _clamp(self, planes: list[Tensor], centres: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
        """Planes whose coefficients are in the box. Only cut blocks need several projections."""
        unit = BLOCK * self._factor
        for side, blocks in ((-2, -4), (-1, -2)):
            size = planes[0].shape[side]
            whole = size // unit * unit
            if 0 < whole < size:
                parts = zip(*(plane.tensor_split([whole], side) for plane in planes), strict=True)
                cuts = [whole // BLOCK, whole // unit, whole // unit]
                of_parts = (c.tensor_split([n], blocks) for c, n in zip(centres, cuts, strict=False))
                pairs = zip(parts, zip(*of_parts, strict=True), strict=True)
                clamped = [self._clamp(list(part), list(box), steps) for part, box in pairs]
                return [torch.cat(pair, side) for pair in zip(*clamped, strict=True)]
        cut = any(n % unit for n in planes[0].shape[-2:])
        for _ in range(self.max_iter if cut else 1):
            planes = self._clamp_once(planes, centres, steps)
        return planes

    def _clamp_once(self, planes: list[Tensor], centres: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
        """One projection of the extended planes; the visible part of the result."""
        moved = []
        coefficients = codec.encode(planes, self._factor)
        for i, (plane, c, n, q) in enumerate(zip(planes, coefficients, centres, steps, strict=True)):
            change = codec.inverse_dct(torch.clamp(c, n - q / 2, n + q / 2) - c)
            if i and self._factor > 1:  # an averaged sample stands for its four pixels
                change = change.repeat_interleave(self._factor, -1).repeat_interleave(self._factor, -2)
            moved.append(plane + codec.fold(change, *plane.shape[-2:]))
        return moved

    def _steps(self, images: Tensor) -> list[Tensor]:
        """Steps q of each plane, `[B or 1, 1, 8, 1, 8]`."""
        if len(self.quality) not in (1, images.shape[0]):
            raise ValueError(
                f"quality has {len(self.quality)} values, for as many images; got {len(images)} images"
            )
        tables = codec.step_tables(self.quality).to(torch.promote_types(images.dtype, torch.float32))
        luma, chroma = tables[:, :, None, :, None].unbind(1)
        return [luma, chroma, chroma][: self.img_size[0]]

    # -- Sizes --------------------------------------------------------------------------------------

    def _whole(self, y: Tensor) -> Tensor:
        """Decoded images of whole blocks; what a decoder cut off is extended from the edge."""
        size = codec.whole_size(self.img_size[1:], self._factor)
        if tuple(y.shape[1:]) == self.img_size:
            return codec.extend(y, *size)
        self._check_images(y, (self.img_size[0], *size))
        return y

    def _check_images(self, images: Tensor, size: tuple[int, ...]) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != size:
            raise ValueError(
                f"images must be of shape [B, {', '.join(map(str, size))}] for this JPEG of img_size "
                f"{self.img_size}, got {list(images.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.img_size}, quality={self.quality.tolist()}, subsampling={self.subsampling!r}"


def _check_quality(quality: float | Tensor) -> Tensor:
    if not isinstance(quality, Number | Tensor):
        raise TypeError(f"quality must be a number or a tensor, got {quality!r}")
    quality = torch.as_tensor(quality, dtype=torch.float32).detach().reshape(-1)
    if len(quality) == 0 or not bool(((quality >= 1) & (quality <= 100)).all()):
        raise ValueError(f"quality must be in [1, 100], got {quality.tolist()}")
    return quality


#: Between the mismatch of the right quality and that of others.
_MISMATCH = 0.15
