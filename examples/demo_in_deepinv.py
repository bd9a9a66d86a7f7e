r"""
UD2M inside deepinv
===================

The sampler is a deepinv ``Reconstructor``: wherever deepinv takes one, it goes in unchanged. Here it is
tested by ``dinv.test`` as deepinv's public benchmark does it (one image at a time, on deblurring without
borders, inpainting and super-resolution without noise, denoising), on the shipped digits or on a folder
of images, and its samples are averaged by ``dinv.sampling.DiffusionSampler``.

.. code-block:: bash

    python examples/demo_in_deepinv.py --images my_digits/
"""

# %%
import argparse

import deepinv as dinv
import torch
from deepinv.physics.functional import gaussian_blur
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
from deepinv_ud2m.data import load_images, mnist_digits

parser = argparse.ArgumentParser(description="UD2M in deepinv's own pipelines.")
parser.add_argument("--images", help="folder of images of digits; shipped test digits by default")
parser.add_argument("--num", type=int, default=8, help="how many")
args = parser.parse_args()

torch.manual_seed(0)
model = UD2M(UnfoldedDenoiser(load_prior("mnist")))

# %%
# Any dataset that deepinv accepts: here images alone, from which deepinv makes the measurements. The
# prior takes grey images of 32x32 pixels, so larger ones of a folder are cropped.
if args.images:
    x = load_images(args.images, channels=1, size=32, num=args.num)
else:
    x = mnist_digits("test", num=args.num)

# %%
# The problems of the public benchmark. Physics without noise get a small floor, 0.005.
shape = (1, 32, 32)
mask = (torch.rand(1, *shape) < 0.7).float()
problems = {
    "deblurring, valid borders": dinv.physics.Blur(
        gaussian_blur(sigma=(1.0, 1.0)), padding="valid", noise_model=dinv.physics.GaussianNoise(0.05)
    ),
    "inpainting, no noise": dinv.physics.Inpainting(shape, mask=mask),
    "super-resolution x2, no noise": dinv.physics.Downsampling(filter="bicubic", factor=2),
    "denoising": dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1)),
}
for name, physics in problems.items():
    results = dinv.test(
        model,
        DataLoader(x, batch_size=1),
        physics,
        online_measurements=True,
        metrics=[dinv.metric.PSNR(), dinv.metric.SSIM()],
        device="cpu",
        compare_no_learning=False,
        verbose=False,
    )
    print(
        f"{name:32s} PSNR {results['PSNR']:.2f} +- {results['PSNR_std']:.2f} dB, "
        f"SSIM {results['SSIM']:.3f}, {model.nfe:.0f} network evaluations per sample"
    )

# %%
# deepinv's own way of averaging a diffusion sampler: one call per sample. It counts its starting point
# as a sample, so its moments are a little off; ``model.sample`` draws all samples in one pass.
x = x[:2]
physics = problems["denoising"]
y = physics(x)
sampler = dinv.sampling.DiffusionSampler(model, max_iter=16, verbose=False)
mean, variance = sampler(y, physics, seed=0)
samples = model.sample(y, physics, num_samples=16, generator=torch.Generator().manual_seed(0))
psnr = dinv.metric.PSNR()
print(f"mean of 16 by DiffusionSampler: {psnr(mean, x).mean():.2f} dB")
print(f"mean of 16 by model.sample:     {psnr(samples.mean(0), x).mean():.2f} dB")
