r"""
Tomography from few angles
==========================

A slice of a head is seen by parallel rays from 40 angles, with noise:

.. math:: y = A x + \sigma_y n, \qquad \sigma_y = 0.01 , \quad \|A\| = 1 .

The sampler knows photographs in colour. It takes the grey slice as the mean of three channels.
"""

# %%
# The problem. deepinv's operator is slow; as a sparse matrix, of 57 MB, it is three to four times as fast.
import deepinv as dinv
import torch
from helpers import DATA, compare

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import load_image
from deepinv_ud2m.physics import tabulate

x = load_image(DATA / "brain.png", channels=1)
scanner = dinv.physics.Tomography(angles=40, img_width=160, normalize=True)
scanner.set_noise_model(dinv.physics.GaussianNoise(0.01, rng=torch.Generator().manual_seed(0)))
y = scanner(x)
physics = tabulate(scanner, x.shape[1:])

# %%
# Eight samples, and the filtered backprojection.
model = UD2M.from_pretrained("photos")
samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))
print(f"residual of a sample, 1 if all is right: {model.residual.item():.2f}")

# %%
# Table and figure. DiffPIR has the best of eight settings for this slice.
options = {"zeta": 0.3, "lambda_": 1.0, "std_max": 0.1, "shown": scanner.A_dagger(y)}
compare("scan_ct", x, y, physics, samples, model.nfe, **options)
