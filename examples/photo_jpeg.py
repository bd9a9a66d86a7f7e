r"""
Restoration of a JPEG
=====================

The photograph is saved as a JPEG of quality 10. The coder rounds the coefficients :math:`Cx` of blocks of 8 x
8 pixels to multiples of the steps q of its table:

.. math:: y = C^{-1} \left( q \odot \operatorname{round} (Cx / q) \right) .

So each coefficient of x is known up to half a step.

UD2M draws samples of the posterior, with six network evaluations each. Samples agree where the measurement
determines the image, and differ elsewhere. deepinv's DiffPIR has the same prior and 100 evaluations.
"""

# %%
# The problem. ``y, physics = JPEG.read("photo.jpg")`` takes a file that is a JPEG already, to restore it as
# it is.
import torch
from helpers import compare

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import photograph
from deepinv_ud2m.physics import JPEG

x = photograph("chelsea")[..., 24:184, :160]
physics = JPEG(x.shape[1:], quality=10)
y = physics(x)

# %%
# Eight samples by the sampler that ships, one network for all degradations.
model = UD2M.from_pretrained("photos")
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Table and figure. DiffPIR has the settings with the best energy score on eight other photographs.
# Blocks and colour fringes are gone, and the samples have textures that the coder removed. The mean of eight
# has no higher PSNR than the decoded file.
compare("photo_jpeg", x, y, physics, samples, model.nfe, zeta=0.03, lambda_=0.1)
