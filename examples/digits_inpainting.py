r"""
Inpainting of digits: where the posterior is certain, and where it is not
=========================================================================

Some pixels of each digit are missing, and the others are noisy:

.. math:: y = m \odot (x + \sigma_y n), \qquad \sigma_y = 0.05 .

Where pixels are missing at random, their neighbours tell what they are, and samples of the posterior agree.
Behind a box they do not, and samples differ there. One sampler does both.
"""

# %%
# The sampler, and two masks: 30 % of the pixels at random, and all but a box. Any other mask will do.
import deepinv as dinv
import torch
from helpers import compare

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits

model = UD2M.from_pretrained("mnist")
x = mnist_digits("test", num=16)
generator = torch.Generator().manual_seed(0)
noise = dinv.physics.GaussianNoise(0.05, rng=generator)
box = torch.ones(1, 32, 32)
box[:, 8:24, 8:24] = 0
masks = {"random": torch.rand(1, 32, 32, generator=generator) < 0.3, "box": box}

# %%
# Eight samples of each digit. Table and figure, with the settings of DiffPIR that were best on other digits.
settings = {"random": {"zeta": 0.6, "lambda_": 1.0}, "box": {"zeta": 1.0, "lambda_": 1.0}}
for name, mask in masks.items():
    physics = dinv.physics.Inpainting((1, 32, 32), mask=mask.float(), noise_model=noise)
    y = physics(x)
    samples = model.sample(y, physics, num_samples=8, generator=generator)
    options = {"prior": "mnist", "std_max": 0.5, **settings[name]}
    compare(f"digits_inpainting_{name}", x, y, physics, samples, model.nfe, **options)
