"""What is painted on the page, as masks and kernels; results as pictures, words and files."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from deepinv_ud2m.app.restore import DIFFPIR, FOR_QUANTILES, Result
from deepinv_ud2m.pictures import write_png

#: Standard deviation that is drawn as the end of the scale.
STD_MAX = 0.2


def painted(value: dict | None) -> Tensor:
    """
    Where an image editor was painted.

    :param dict, None value: what the editor gives: ``"layers"``, arrays `[H, W, 4]` whose last channel says
        what is painted.
    :returns: how much each pixel is painted, `[1, 1, H, W]` in [0, 1].
    :raises ValueError: if nothing was painted.
    """
    layers = [np.asarray(layer)[..., 3] for layer in (value or {}).get("layers") or []]
    if not layers or not max(layer.max() for layer in layers):
        raise ValueError("Nothing is painted yet. Paint with the mouse first.")
    return torch.from_numpy(np.maximum.reduce(layers)).float()[None, None] / 255


def drawn_kernel(value: dict | None, side: int) -> Tensor:
    """
    A kernel from a drawing.

    :param dict, None value: as for :func:`painted`.
    :param int side: side of the kernel, in pixels.
    :returns: the kernel `[1, 1, side, side]`, of sum 1.
    :raises ValueError: if nothing was drawn.
    """
    kernel = torch.nn.functional.adaptive_avg_pool2d(painted(value), int(side))
    return kernel / kernel.sum()


def as_picture(image: Tensor) -> np.ndarray:
    """An image `[1, C, H, W]` in [0, 1] as the page shows it: bytes, `[H, W, 3]`."""
    values = (image[0].detach().cpu().clamp(0, 1) * 255).round().byte()
    return values.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def as_map(std: Tensor) -> np.ndarray:
    """A standard deviation `[1, C, H, W]` in colours from 0 to :data:`STD_MAX`, with a bar of the scale."""
    values = std[0].square().mean(0).sqrt().cpu().numpy() / STD_MAX
    height = len(values)
    bar = np.repeat(np.linspace(1, 0, height)[:, None], max(height // 20, 6), 1)
    white = np.full((height, max(height // 7, 34), 3), 255, np.uint8)
    parts = [(colormaps["magma"](one.clip(0, 1))[..., :3] * 255).astype(np.uint8) for one in (values, bar)]
    picture = Image.fromarray(np.concatenate([parts[0], white[:, :6], parts[1], white], 1))
    draw, left = ImageDraw.Draw(picture), values.shape[1] + bar.shape[1] + 10
    size = max(height // 16, 11)
    for share in (1.0, 0.5, 0.0):
        top = (height - size - 3) * (1 - share)
        draw.text((left, top), f"{share * STD_MAX:g}", fill="black", font_size=size)
    return np.asarray(picture)


def explain(result: Result, model_name: str) -> str:
    """What there is to say about a result, in Markdown."""
    count, lines = len(result.samples), []
    lines += [f"**Note.** {message}\n" for message in result.messages]
    if result.psnr:
        lines += ["| | " + " | ".join(result.psnr) + " |", "|---" * (len(result.psnr) + 1) + "|"]
        lines += ["| PSNR to the truth | " + " | ".join(f"{v:.1f} dB" for v in result.psnr.values()) + " |\n"]
    if result.noise is None:
        lines.append("- **Noise:** none; how coarsely the file was rounded is known from its JPEG tables.")
    else:
        lines.append(f"- **Noise:** standard deviation {result.noise:.3f}, where white is 1.")
    if result.residual is not None:
        lines.append(
            f"- **Fit:** the residual of a sample is {result.residual:.2f} times the noise. It is about 1 "
            "if the degradation and the noise are right."
        )
    if count >= FOR_QUANTILES:
        lines.append("- **Interval of 90 %:** between the quantiles of the samples.")
    elif count > 1:
        lines.append(
            f"- **Interval of 90 %:** as for a normal variable of which {count} draws are known. Quantiles "
            f"need {FOR_QUANTILES} samples."
        )
    else:
        lines.append("- One sample has no standard deviation and no interval: ask for two or more.")
    if model_name == "photos" and count > 1:
        lines.append(
            "- **Caution:** the samples of this model differ too little. In tests the error of the mean was "
            "1.15 to 1.44 times what they predict."
        )
    if result.diffpir is not None:
        lines.append(
            f"- **DiffPIR:** the same settings for all degradations (zeta = {DIFFPIR['zeta']:g}, lambda = "
            f"{DIFFPIR['lambda_']:g}). Settings searched for this one might do better."
        )
    drawn = "1 sample" if count == 1 else f"{count} samples"
    lines.append(f"- {drawn}, {result.nfe:.0f} network evaluations each, {result.seconds:.0f} s.")
    if count > 1:
        lines.append("\nFlip through the samples by a click on their small pictures, or by the arrow keys.")
    return "\n".join(lines)


def pictures(result: Result) -> list[tuple[np.ndarray, str]]:
    """The pictures of the overview, each with its caption."""
    shown = [(as_picture(result.y), "given")]
    if result.std is not None and result.low is not None and result.high is not None:
        shown += [(as_picture(result.mean), f"mean of {len(result.samples)}")]
        shown += [(as_map(result.std), "standard deviation")]
        shown += [(as_picture(result.low), "interval of 90 %, lower end")]
        shown += [(as_picture(result.high), "interval of 90 %, upper end")]
    if result.residuals is not None:
        caption = "what is left of the measurement, -3 to 3 times the noise: no structure if all is right"
        shown += [(as_picture(0.5 + result.residuals / 6), caption)]
    shown += [] if result.diffpir is None else [(as_picture(result.diffpir), "DiffPIR")]
    return shown + ([] if result.x is None else [(as_picture(result.x), "truth")])


def pack(file: str | Path, result: Result, text: str) -> None:
    """
    The results as a zip file: samples, mean, standard deviation and measurements as PNG of 16 bits.

    :param str, pathlib.Path file: the file.
    :param Result result: the result.
    :param str text: what is said about it, for ``summary.md``.
    """
    images = {f"sample{i + 1:02d}": one for i, one in enumerate(result.samples)}
    for name in ("mean", "std", "low", "high", "y", "x", "diffpir"):
        images |= {} if getattr(result, name) is None else {name: getattr(result, name)}
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(file, "w") as archive:
        for name, image in images.items():
            write_png(Path(folder) / f"{name}.png", image[0])
            archive.write(Path(folder) / f"{name}.png", f"{name}.png")
        archive.writestr("summary.md", text)
