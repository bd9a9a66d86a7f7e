r"""
Motion deblurring of a photograph
=================================

The camera moved along a random path while the shutter was open,

.. math:: y = h * x + \sigma_y n, \qquad \sigma_y = 0.025 ;

the kernel h is drawn by deepinv's generator of such paths.

UD2M draws samples of the posterior, with nine network evaluations each: what the measurement determines
is the same in all of them, what it leaves open differs. Beside it are deepinv's DiffPIR, with the same
prior and 100 evaluations, and the pseudo-inverse.
"""

# %%
from pathlib import Path

import deepinv as dinv
import torch

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.benchmark.comparison import compare
from deepinv_ud2m.benchmark.tune import shipped_settings
from deepinv_ud2m.data import photograph

OUT = Path(__file__).parent / "output"

# %%
# The problem. Any image will do: ``load_images("photo.jpg", channels=3, size=256)`` reads its centre,
# ``load_image("photo.jpg", channels=3)`` the whole.
x = photograph("astronaut")
kernels = dinv.physics.generator.MotionBlurGenerator((31, 31), rng=torch.Generator().manual_seed(0))
physics = dinv.physics.BlurFFT(img_size=x.shape[1:], filter=kernels.step(1)["filter"])
physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=torch.Generator().manual_seed(0)))
y = physics(x)

# %%
# The sampler that ships, for all degradations at once, 8 samples.
model = UD2M.from_pretrained("photos")
# DiffPIR has the settings that were best on other photographs.
diffpir = shipped_settings("photos", "deblur-motion", "diffpir")
comparison = compare(x, y, physics, model, load_prior("photos"), num_samples=8, **diffpir)
print(comparison)

# %%
# The figure: the whole image, and its centre enlarged.
comparison.plot(OUT / "photo_motion_deblurring.png")
print(f"saved {OUT / 'photo_motion_deblurring.png'}")
