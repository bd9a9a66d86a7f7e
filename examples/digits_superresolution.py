r"""
Super-resolution of digits
==========================

Each digit is blurred and reduced to 8 x 8 pixels, with noise:

.. math:: y = (h * x)\!\downarrow_4 + \sigma_y n, \qquad \sigma_y = 0.05 .

So few pixels do not determine a digit. A posterior sampler answers with several digits, all of which agree
with the measurement. Their mean has the lowest squared error, and their standard deviation shows where to
trust it.
"""

# %%
# The problem: test digits, which no network has seen in training.
import deepinv as dinv
import torch
from helpers import compare

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits

x = mnist_digits("test", num=16)
physics = dinv.physics.Downsampling(img_size=(1, 32, 32), filter="gaussian", factor=4, padding="circular")
physics.set_noise_model(dinv.physics.GaussianNoise(0.05, rng=torch.Generator().manual_seed(0)))
y = physics(x)

# %%
# Eight samples of each digit, drawn together: three steps of three network evaluations.
model = UD2M.from_pretrained("mnist")
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Table and figure. DiffPIR has the settings that were best on other digits.
options = {"prior": "mnist", "zeta": 0.6, "lambda_": 3.0, "std_max": 0.5}
compare("digits_superresolution", x, y, physics, samples, model.nfe, **options)
