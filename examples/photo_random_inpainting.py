r"""
Random inpainting of a photograph
=================================

Seven pixels of ten are missing, and the others are noisy:

.. math:: y = m \odot (x + \sigma_y n), \qquad \sigma_y = 0.025 .

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

x = photograph("chelsea")[..., 24:184, :160]
kept = torch.rand(1, 1, *x.shape[-2:], generator=torch.Generator().manual_seed(0)) < 0.3
physics = dinv.physics.Inpainting(x.shape[1:], mask=kept.float().expand_as(x))
physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=torch.Generator().manual_seed(0)))
y = physics(x)

# %%
# Eight samples by the sampler that ships, one network for all degradations.
model = UD2M.from_pretrained("photos")
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Table and figure. DiffPIR has the settings with the best energy score on eight other photographs.
# The samples agree but for fine texture. DPIR needs an image without missing pixels to start from.
compare("photo_random_inpainting", x, y, physics, samples, model.nfe, zeta=1.0, lambda_=1.0)
