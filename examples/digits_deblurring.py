r"""
Deblurring of digits, with a kernel per image
=============================================

Each image of a batch is blurred by a kernel of its own, with noise:

.. math:: y_i = h_i * x_i + \sigma_y n_i, \qquad \sigma_y = 0.05 .

Here it is one digit with four Gaussian kernels. The wider the kernel, the more the samples differ.
"""

# %%
# The problem: one physics with four kernels. (Two widths make deepinv's kernel two-dimensional.)
import deepinv as dinv
import torch
from deepinv.physics.functional import gaussian_blur
from helpers import compare

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits

x = mnist_digits("test", num=1).repeat(4, 1, 1, 1)
kernels = torch.cat([gaussian_blur(psf_size=(15, 15), sigma=(width, width)) for width in (0.5, 1, 2, 3)])
noise = dinv.physics.GaussianNoise(0.05, rng=torch.Generator().manual_seed(0))
physics = dinv.physics.BlurFFT((1, 32, 32), filter=kernels, noise_model=noise)
y = physics(x)

# %%
# Sixteen samples of each image, drawn together.
model = UD2M.from_pretrained("mnist")
samples = model.sample(y, physics, num_samples=16, generator=torch.Generator().manual_seed(0))
print("mean standard deviation of each row:", samples.std(0).mean((1, 2, 3)))

# %%
# Table and figure. DiffPIR has the settings that were best on other digits.
compare(
    "digits_deblurring", x, y, physics, samples, model.nfe, zeta=0.6, lambda_=3.0, std_max=0.5, prior="mnist"
)
