r"""
Gaussian deblurring of a photograph
===================================

The photograph is blurred by a Gaussian of standard deviation 2 pixels, with noise:

.. math:: y = h * x + \sigma_y n, \qquad \sigma_y = 0.025 .

UD2M draws samples of the posterior, with nine network evaluations each. Samples agree where the measurement
determines the image, and differ elsewhere. deepinv's DiffPIR has the same prior and 100 evaluations.
"""

# %%
# The problem. The picture is blurred as by a camera: light from beyond its borders falls into it, and y is
# smaller than x. ``padding="valid"`` says so. Circular borders, as of deepinv's ``BlurFFT``, leave stripes.
# For a photograph of your own, ``y = load_image("photo.jpg", channels=3)``.
import deepinv as dinv
import torch
from helpers import compare, photographed

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import photograph

x = photograph("chelsea")[..., 24:184, :160]
kernel = dinv.physics.functional.gaussian_blur(sigma=(2.0, 2.0))
physics = dinv.physics.Blur(kernel, padding="valid", noise_model=dinv.physics.GaussianNoise(0.025))
y = photographed(x, kernel, noise=0.025)

# %%
# Eight samples by the sampler that ships, one network for all degradations.
model = UD2M.from_pretrained("photos")
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Table and figure. DiffPIR has the settings with the best energy score on eight other photographs.
# Each sample has fur of its own, so the deviation is large there and at the borders, which y does not show.
# In the eye the samples agree. DPIR leaves the unseen border black.
compare("photo_gaussian_deblurring", x, y, physics, samples, model.nfe, zeta=0.1, lambda_=3.0)
