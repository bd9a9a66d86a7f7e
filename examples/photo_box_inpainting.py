r"""
Box inpainting of a photograph
==============================

A box of 64 x 64 pixels is missing, and the rest is noisy:

.. math:: y = m \odot (x + \sigma_y n), \qquad \sigma_y = 0.025 .

Only its surroundings tell what is inside the box.

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

x = photograph("chelsea")[..., 32:224, 32:224]
mask = torch.ones_like(x)
mask[..., 64:128, 64:128] = 0
physics = dinv.physics.Inpainting(x.shape[1:], mask=mask)
physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=torch.Generator().manual_seed(0)))
y = physics(x)

# %%
# Eight samples by the sampler that ships, one network for all degradations.
model = UD2M.from_pretrained("photos")
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Table and figure. DiffPIR has the settings with the best energy score on eight other photographs.
# The samples fill the box with textures, each with another, and the deviation is large there alone. None has
# the second eye: so small a network does not know cats.
compare("photo_box_inpainting", x, y, physics, samples, model.nfe, zeta=0.1, lambda_=7.0)
