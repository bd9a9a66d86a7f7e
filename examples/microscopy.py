r"""
Deconvolution of a microscope image
===================================

A grey image of stained tissue, out of focus, with noise of a level that is not known:

.. math:: y = h * x + \sigma_y n .

What is beyond the borders of y is not known either.
"""

# %%
# The problem. The point spread function is that of a small defocus.
import deepinv as dinv
import torch
from helpers import DATA, compare, photographed

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import load_image

x = load_image(DATA / "tissue.png", channels=1)
offsets = torch.arange(-5, 6)
disc = (4.5 - (offsets[:, None] ** 2 + offsets**2).sqrt()).clamp(0, 1)[None, None]
physics = dinv.physics.Blur(disc / disc.sum(), padding="valid")
y = photographed(x, physics.filter, noise=0.02)

# %%
# The noise level is found, and eight samples are drawn.
model = UD2M.from_pretrained("photos")
sigma_y = model.estimate_sigma_y(y, physics, generator=torch.Generator().manual_seed(0))
print(f"noise level {sigma_y.item():.4f}, in truth 0.02")
physics.set_noise_model(dinv.physics.GaussianNoise(sigma_y.item()))
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Table and figure. DiffPIR has the best of four settings for this image.
compare("microscopy", x, y, physics, samples, model.nfe, zeta=0.3, lambda_=10.0, std_max=0.1)
