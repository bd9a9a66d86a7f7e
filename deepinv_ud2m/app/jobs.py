r"""One job of the page: an image and what happened to it in, samples out."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import deepinv as dinv
import torch
from deepinv.models import Denoiser
from deepinv.physics import Physics
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

from deepinv_ud2m.app.restore import Report, Result, Stopped, diffpir, restore
from deepinv_ud2m.app.views import drawn_kernel, painted
from deepinv_ud2m.checks import check_number
from deepinv_ud2m.photographs import physics_of, read_kernel, read_photograph
from deepinv_ud2m.physics import JPEG
from deepinv_ud2m.sampler import UD2M

# Where crops begin and end: blocks of a JPEG file with 4:2:0 have this side.
_BLOCK = 16

# Pixels of the largest file that is decoded: each takes 12 bytes, several times.
_MAX_READ = 50_000_000

# Number of the tag by which cameras say how a photograph is turned.
_ORIENTATION = 274


@dataclass(frozen=True)
class Degradation:
    """
    What happened to an image, besides noise.

    :param str kind: ``"jpeg"``, or one of :data:`deepinv_ud2m.photographs.DEGRADATIONS`.
    :param float, None gaussian: blur: standard deviation of a Gaussian kernel, in pixels.
    :param torch.Tensor, None kernel: blur: the kernel `[1, 1, h, w]`, in place of ``gaussian``.
    :param int factor: low resolution: by how much both sides were reduced.
    :param torch.Tensor, None mask: hole: 1 where pixels are missing, `[1, 1, H, W]`.
    :param int quality: JPEG: quality of a file that is made here.
    """

    kind: str
    gaussian: float | None = None
    kernel: Tensor | None = None
    factor: int = 2
    mask: Tensor | None = None
    quality: int = 15

    def physics(self, image: Tensor) -> Physics:
        """The physics for measurements, or true images, of this size."""
        blur, factor, mask = self.gaussian, self.factor, self.mask
        return physics_of(image, self.kind, gaussian=blur, kernel=self.kernel, factor=factor, mask=mask)


@dataclass(frozen=True)
class Job:
    """
    What a user of the page asks for.

    :param str, pathlib.Path file: the image.
    :param Degradation degradation: what happened to it.
    :param bool is_truth: whether the image is the truth, to be degraded first.
    :param float added: standard deviation of the noise that is added then.
    :param float, None noise: noise level for the sampler, or ``None`` to estimate it. JPEG has none.
    :param int count: number of samples.
    :param int seed: of noise and samples.
    :param bool crop: take the centre of an image that is too large, instead of an error.
    :param bool with_diffpir: restore it by DiffPIR too.
    :param int max_pixels: largest number of pixels of a restored image.
    :param float max_seconds: when to stop. Samples that are complete by then are kept.
    """

    file: str | Path
    degradation: Degradation
    is_truth: bool = False
    added: float = 0.02
    noise: float | None = None
    count: int = 4
    seed: int = 0
    crop: bool = False
    with_diffpir: bool = False
    max_pixels: int = 500_000
    max_seconds: float = 600.0


def job_of(given: dict, max_pixels: int, max_seconds: float) -> Job:
    """
    The job that is set on the page.

    :param dict given: values of the components, by their names in :mod:`deepinv_ud2m.app.page`.
    :param int max_pixels: see :class:`Job`.
    :param float max_seconds: see :class:`Job`.
    :returns: the job.
    :raises ValueError: if something is missing.
    """
    if given["file"] is None:
        raise ValueError("Upload a photograph first, or choose one of the two below it.")
    kind, options = given["kind"], {}
    if kind == "blur" and given["blur"] == "gaussian":
        options["gaussian"] = given["gaussian"]
    elif kind == "blur" and given["blur"] == "drawn":
        options["kernel"] = drawn_kernel(given["drawing"], given["side"])
    elif kind == "blur":
        if given["kernel"] is None:
            raise ValueError("Upload the kernel of the blur first.")
        options["kernel"] = read_kernel(given["kernel"])
    elif kind == "inpaint":
        options["mask"] = (painted(given["hole"]) > 0.5).float()
    return Job(
        given["file"],
        Degradation(kind, factor=given["factor"], quality=given["quality"], **options),
        is_truth=given["is_truth"],
        added=given["level"],
        noise=None if given["is_estimated"] else given["level"],
        count=int(given["count"]),
        seed=int(given["seed"] or 0),
        crop=given["crop"],
        with_diffpir=given["with_diffpir"],
        max_pixels=max_pixels,
        max_seconds=max_seconds,
    )


def window(
    height: int, width: int, max_pixels: int, factor: int = 1, crop: bool = False
) -> tuple[slice, slice]:
    """
    Which part of an image to take.

    :param int height: height H of the image.
    :param int width: width W.
    :param int max_pixels: largest number of pixels of the restored image.
    :param int factor: by how much the sides of the restored image are larger.
    :param bool crop: take the centre of an image that is too large.
    :returns: slices of rows and columns. They begin at whole blocks of JPEG.
    :raises ValueError: if the image is too large and must not be cropped.
    """
    pixels = height * width * factor**2
    if pixels <= max_pixels:
        return slice(None), slice(None)
    if not crop:
        raise ValueError(
            f"The restored image would have {pixels / 1e6:.2f} megapixels. This page takes at most "
            f"{max_pixels / 1e6:.2f}. Tick 'Crop to the centre', or start it with a larger --max-pixels."
        )
    share = math.sqrt(max_pixels / pixels)
    sides = [max(int(n * share) // _BLOCK, 1) * _BLOCK for n in (height, width)]
    parts = []
    for n, side in zip((height, width), sides, strict=True):
        start = max(n - side, 0) // 2 // _BLOCK * _BLOCK
        parts.append(slice(start, start + side))
    return parts[0], parts[1]


def degrade(
    x: Tensor, degradation: Degradation, noise: float, seed: int = 0
) -> tuple[Tensor, Tensor, Physics]:
    """
    Measurements of a true image.

    :param torch.Tensor x: the image `[1, C, H, W]` in [0, 1].
    :param Degradation degradation: what happens to it.
    :param float noise: standard deviation of Gaussian noise, in [0, 1]; JPEG has none.
    :param int seed: of the noise.
    :returns: the image, without rows and columns that do not fit the reduction; measurements; the physics.
    :raises ValueError: for arguments of no use.
    """
    if degradation.kind == "jpeg":
        quality = int(check_number("quality", degradation.quality, 1, 100))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "x.jpg"
            to_pil_image(x[0]).save(file, quality=quality)
            return x, *JPEG.read(file)
    if degradation.kind == "sr":
        height, width = (n // degradation.factor * degradation.factor for n in x.shape[-2:])
        x = x[..., :height, :width]
    physics = degradation.physics(x)
    level = check_number("noise", noise, 0, 1)
    if level > 0:
        generator = torch.Generator(x.device).manual_seed(seed)
        physics.set_noise_model(dinv.physics.GaussianNoise(level, rng=generator))
    return x, physics(x), physics


def read_measured(
    file: str | Path, degradation: Degradation, part: tuple[slice, slice] = (slice(None), slice(None))
) -> tuple[Tensor, Physics]:
    """
    Measurements from a file.

    :param str, pathlib.Path file: the image file.
    :param Degradation degradation: what happened to it.
    :param tuple[slice, slice] part: rows and columns to take, see :func:`window`.
    :returns: measurements `[1, C, H, W]` and their physics.
    :raises ValueError: if the file cannot be read, or does not fit.
    """
    if degradation.kind != "jpeg":
        y = read_photograph(file)[..., part[0], part[1]]
        physics = degradation.physics(y)
        # What is in the hole counts as nothing, black or not.
        return (physics.A(y) if degradation.kind == "inpaint" else y), physics
    y, physics = JPEG.read(file)
    y = y[..., part[0], part[1]]
    return y, JPEG(y.shape[1:], physics.quality, physics.subsampling)


def run_job(model: UD2M, job: Job, *, prior: Denoiser | None = None, report: Report | None = None) -> Result:
    """
    All of one job.

    :param deepinv_ud2m.UD2M model: the sampler.
    :param Job job: the job.
    :param deepinv.models.Denoiser prior: prior of DiffPIR, needed if the job asks for it.
    :param Callable report: as for :func:`restore`.
    :returns: the result.
    :raises ValueError, TypeError: if the image, or a setting, is of no use; with a message for the user.
    """
    deadline = time.monotonic() + check_number("max_seconds", job.max_seconds, positive=True)
    device = next(model.unfolded.parameters()).device

    def told(share: float, text: str) -> None:
        if time.monotonic() > deadline:
            raise Stopped(f"The time limit of {job.max_seconds:.0f} seconds is over.")
        if report is not None:
            report(share, text)

    height, width = size_of(job.file, is_turned=job.is_truth or job.degradation.kind != "jpeg")
    factor = job.degradation.factor if job.degradation.kind == "sr" and not job.is_truth else 1
    part, degradation = window(height, width, job.max_pixels, factor, job.crop), job.degradation
    if degradation.mask is not None:
        degradation = replace(degradation, mask=degradation.mask[..., part[0], part[1]])
    x = None
    if job.is_truth:
        x = read_photograph(job.file)[..., part[0], part[1]]
        x, y, physics = degrade(x, degradation, job.added, job.seed)
        x = x.to(device)
    else:
        y, physics = read_measured(job.file, degradation, part)
    y, physics = y.to(device), physics.to(device)
    noise = None if degradation.kind == "jpeg" else "estimate" if job.noise is None else job.noise
    result = restore(model, y, physics, job.count, noise=noise, seed=job.seed, report=told)
    if job.with_diffpir:
        try:
            result.diffpir = diffpir(prior, y, physics, result.noise, job.seed, told)
        except (ValueError, RuntimeError, Stopped) as error:  # what UD2M drew is not lost
            result.messages.append(f"DiffPIR is not shown: {error}")
    if x is not None:
        result.x, result.psnr = x, _psnr(result, x, degradation.kind == "sr")
    return result


def size_of(file: str | Path, is_turned: bool = False) -> tuple[int, int]:
    """
    Height and width of an image file, which is not decoded: it may be too large for that.

    :param str, pathlib.Path file: the file.
    :param bool is_turned: whether the orientation counts that a camera noted.
    :raises ValueError: if it is no image, or of more than 50 megapixels.
    """
    try:
        with Image.open(file) as picture:
            width, height = picture.size
            orientation = picture.getexif().get(_ORIENTATION, 1) if is_turned else 1
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError("The file cannot be read as an image.") from error
    if width * height > _MAX_READ:
        raise ValueError(
            f"The photograph has {width * height / 1e6:.0f} megapixels. This page reads at most "
            f"{_MAX_READ / 1e6:.0f}: reduce or crop it first."
        )
    return (width, height) if orientation > 4 else (height, width)  # from 5 on, sides are swapped


def _psnr(result: Result, x: Tensor, is_reduced: bool) -> dict[str, float]:
    """PSNR of what there is, over the pixels that a blur with real borders sees."""
    given, size = result.y, x.shape[-2:]
    if is_reduced:
        given = interpolate(given, size, mode="bicubic")
    starts = [(a - b) // 2 for a, b in zip(size, given.shape[-2:], strict=True)]
    rows, columns = (slice(a, a + b) for a, b in zip(starts, given.shape[-2:], strict=True))
    images = {"one sample": result.samples[0]}
    images |= {} if result.std is None else {f"mean of {len(result.samples)}": result.mean}
    images |= {} if result.diffpir is None else {"DiffPIR": result.diffpir}
    psnr, truth = dinv.metric.PSNR(), x[..., rows, columns]
    found = {name: psnr(image[..., rows, columns], truth).item() for name, image in images.items()}
    return {"given": psnr(given.clamp(0, 1), truth).item()} | found
