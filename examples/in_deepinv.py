r"""
UD2M inside deepinv
===================

The sampler is a deepinv ``Reconstructor``. It goes unchanged wherever deepinv takes one. Here
``deepinv.test`` measures it as deepinv's public benchmark does, one image at a time, and
``deepinv.sampling.DiffusionSampler`` averages its samples.
"""

# %%
# The problems of the public benchmark: deblurring with valid padding, inpainting and super-resolution without
# noise, and denoising. For a physics without noise the sampler assumes a standard deviation of 0.005.
import deepinv as dinv
import torch
from deepinv.physics import Blur, Denoising, Downsampling, GaussianNoise, Inpainting
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits

torch.manual_seed(0)
model = UD2M.from_pretrained("mnist")
x = mnist_digits("test", num=8)
kernel = dinv.physics.functional.gaussian_blur(sigma=(1.0, 1.0))
mask = (torch.rand(1, 32, 32) < 0.7).float()
problems = {
    "deblurring": Blur(kernel, padding="valid", noise_model=GaussianNoise(0.05)),
    "inpainting": Inpainting((1, 32, 32), mask=mask),
    "super-resolution x2": Downsampling(filter="bicubic", factor=2),
    "denoising": Denoising(GaussianNoise(0.1)),
}

# %%
# ``deepinv.test`` makes the measurements of the images that the loader gives.
metrics = [dinv.metric.PSNR(), dinv.metric.SSIM()]
options = {"online_measurements": True, "compare_no_learning": False, "verbose": False, "device": "cpu"}
for name, physics in problems.items():
    results = dinv.test(model, DataLoader(x, batch_size=1), physics, metrics=metrics, **options)
    mean, std, ssim = (results[key] for key in ("PSNR", "PSNR_std", "SSIM"))
    print(f"{name:20s} PSNR {mean:.2f} +- {std:.2f} dB, SSIM {ssim:.3f}")

# %%
# deepinv's way of averaging a diffusion sampler, one call per sample, and ours, all samples in one pass.
# ``DiffusionSampler`` counts its starting point as a sample, so its mean is a little off.
x, physics, psnr = x[:2], problems["denoising"], dinv.metric.PSNR()
y = physics(x)
mean, variance = dinv.sampling.DiffusionSampler(model, max_iter=16, verbose=False)(y, physics, seed=0)
samples = model.sample(y, physics, num_samples=16, generator=torch.Generator().manual_seed(0))
print(f"mean of 16 by DiffusionSampler: {psnr(mean, x).mean():.2f} dB")
print(f"mean of 16 by model.sample:     {psnr(samples.mean(0), x).mean():.2f} dB")
