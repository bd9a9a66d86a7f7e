r"""
Files of a camera: the right operator and wrong ones
====================================================

Photographs are degraded outside of the package, as cameras and image editors do it: blurred by light from
beyond their borders, with noise, or reduced by Pillow. They are restored with the operator that fits, and
with those that are often taken in its place. The table has the PSNR of the mean of the samples, and whether a
warning said that something is wrong.

.. code-block:: bash

    python examples/real_photographs.py --images photographs --out real.csv

takes 128x128 pixels of each photograph of a folder. Without a folder it takes the two that ship.
"""

import argparse
import warnings

import deepinv as dinv
import pandas as pd
import torch
from helpers import photographed, shrunk
from torch.nn.functional import interpolate, pad

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import load_images, photograph

parser = argparse.ArgumentParser()
parser.add_argument("--images", help="folder of photographs")
parser.add_argument("--num", type=int, default=8, help="photographs")
parser.add_argument("--samples", type=int, default=8)
parser.add_argument("--model", default="photos")
parser.add_argument("--out", help="CSV file of the table")
args = parser.parse_args()

# %%
# The photographs, and what is seen of them.
if args.images:
    x = load_images(args.images, 3, 128, num=args.num, skip_small=True)
else:
    x = torch.cat([photograph(name)[..., 32:160, 64:192] for name in ("astronaut", "chelsea")])
size = torch.arange(-7, 8)
kernel = torch.exp(-(size[:, None] ** 2 + size**2) / (2 * 2.5**2))[None, None]
kernel = kernel / kernel.sum()
blurred, small = photographed(x, kernel, noise=0.02), shrunk(x, 4, noise=0)
seen = (3, *blurred.shape[2:])

# %%
# Operators: what is assumed, the noise level in the physics, and what is compared with the photograph.
P, noise = dinv.physics, dinv.physics.GaussianNoise
inner = (..., slice(7, -7), slice(7, -7))
cases = {
    "blur": {
        "valid, noise 0.02": (P.Blur(kernel, padding="valid", noise_model=noise(0.02)), None),
        "valid, estimated noise": (P.Blur(kernel, padding="valid"), "estimate"),
        "valid, no noise level": (P.Blur(kernel, padding="valid"), None),
        "valid, noise 0.005": (P.Blur(kernel, padding="valid", noise_model=noise(0.005)), None),
        "valid, noise 0.08": (P.Blur(kernel, padding="valid", noise_model=noise(0.08)), None),
        "circular, noise 0.02": (P.BlurFFT(seen, kernel, noise_model=noise(0.02)), None),
        "reflected, noise 0.02": (P.Blur(kernel, padding="reflect", noise_model=noise(0.02)), None),
        "kernel twice as wide": (P.Blur(interpolate(kernel, size=29) / 4, padding="valid"), 0.02),
    },
    "shrunk by 4": {
        "DownsamplingMatlab": (P.DownsamplingMatlab(factor=4), None),
        'Downsampling("gaussian")': (P.Downsampling(filter="gaussian", factor=4, padding="circular"), None),
    },
}

# %%
# The mean of the samples, on the pixels that are seen.
model, psnr, rows = UD2M.from_pretrained(args.model), dinv.metric.PSNR(), []
simple = {"blur": blurred, "shrunk by 4": interpolate(small, size=x.shape[2:], mode="bicubic").clamp(0, 1)}
for measurement, operators in cases.items():
    y = blurred if measurement == "blur" else small
    truth = x[inner] if measurement == "blur" else x
    rows.append([measurement, "as it is" if measurement == "blur" else "bicubic interpolation", ""])
    rows[-1] += psnr(simple[measurement], truth).tolist()
    for name, (physics, sigma_y) in operators.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generator = torch.Generator().manual_seed(0)
            samples = model.sample(y, physics, args.samples, sigma_y=sigma_y, generator=generator)
        warned = [
            str(w.message) for w in caught if "explain y" in str(w.message) or "nearer to y" in str(w.message)
        ]
        mean = samples.mean(0)
        margin = (mean.shape[-1] - truth.shape[-1]) // 2
        mean = pad(mean, [-margin] * 4)
        rows.append([measurement, name, "yes" if warned else "", *psnr(mean, truth).tolist()])
        print(f"{measurement}, {name}: {rows[-1][3:]}", *warned, sep="\n  ")

# %%
# The table.
columns = ["measurement", "operator", "warns", *(f"image {i + 1}" for i in range(len(x)))]
table = pd.DataFrame(rows, columns=columns)
print(table.to_string(index=False, float_format="%.1f"))
if args.out:
    table.to_csv(args.out, index=False, float_format="%.2f")
