r"""
Super-resolution of a photograph
================================

The photograph is blurred, and one pixel of sixteen is kept, with noise:

.. math:: y = (h * x)\!\downarrow_4 + \sigma_y n, \qquad \sigma_y = 0.025 .

UD2M draws samples of the posterior, with nine network evaluations each. Samples agree where the measurement
determines the image, and differ elsewhere. deepinv's DiffPIR has the same prior and 100 evaluations.
"""

# %%
# The problem. For a photograph of your own, ``x = load_image("photo.jpg", channels=3)``.
import deepinv as dinv
import torch
from helpers import compare

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import photograph

x = photograph("astronaut")
physics = dinv.physics.Downsampling(img_size=x.shape[1:], filter="gaussian", factor=4, padding="circular")
physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=torch.Generator().manual_seed(0)))
y = physics(x)

# %%
# Eight samples by the sampler that ships, one network for all degradations.
model = UD2M.from_pretrained("photos")
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Table and figure. DiffPIR has the settings that were best on other photographs.
compare("photo_superresolution", x, y, physics, samples, model.nfe, zeta=0.03, lambda_=7.0)
