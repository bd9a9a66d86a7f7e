r"""
Super-resolution of a photograph
================================

A file of a quarter of the sides, made by Pillow's bicubic filter, with noise of the standard deviation 0.01.
deepinv's ``DownsamplingMatlab`` is this filter. Others, such as that of ``Downsampling("gaussian")``, would
leave a pattern on such a file.

UD2M draws samples of the posterior, with nine network evaluations each. Samples agree where the measurement
determines the image, and differ elsewhere. deepinv's DiffPIR has the same prior and 100 evaluations.
"""

# %%
# The problem. For a file of your own, ``y = load_image("small.png", channels=3)``.
import deepinv as dinv
import torch
from helpers import compare, shrunk

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import photograph

x = photograph("astronaut")[..., :160, 40:200]
physics = dinv.physics.DownsamplingMatlab(factor=4, noise_model=dinv.physics.GaussianNoise(0.01))
y = shrunk(x, factor=4, noise=0.01)

# %%
# Eight samples by the sampler that ships, one network for all degradations.
model = UD2M.from_pretrained("photos")
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Table and figure. DiffPIR has the settings with the best energy score on eight other photographs, with noise
# 0.025.
# Four by four pixels are one here: the samples agree on shapes, and differ in the mouth and in textures. Some
# have marks that no face has. The mean is smooth.
compare("photo_superresolution", x, y, physics, samples, model.nfe, zeta=0.1, lambda_=3.0)
