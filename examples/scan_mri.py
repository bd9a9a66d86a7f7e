r"""
Magnetic resonance imaging with one coil and with four
======================================================

A quarter of the columns of the Fourier transform of a slice are measured, by one coil, or by four that each
see their side of the head:

.. math:: y_c = M F (s_c \, x) + \sigma_y n .

deepinv has the real and the imaginary part of an image as two channels. ``ChannelMap.real`` says that the
slice is real: its phase is known, and removed.
"""

# %%
# The problem.
import deepinv as dinv
import torch
from helpers import DATA, compare

from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
from deepinv_ud2m.data import load_image
from deepinv_ud2m.physics import ChannelMap

x = load_image(DATA / "brain.png", channels=1)
shape = (2, 160, 160)
rng = torch.Generator().manual_seed(0)
mask = dinv.physics.generator.RandomMaskGenerator(shape, acceleration=4, rng=rng).step(1)["mask"]
rows, columns = torch.meshgrid(*2 * [torch.linspace(-1, 1, 160)], indexing="ij")
coils = [
    torch.exp(-((rows - a) ** 2) - (columns - b) ** 2 + 1j * a * columns) for a in (-1, 1) for b in (-1, 1)
]
coils = torch.stack(coils)[None] / torch.stack(coils).abs().square().sum(0).sqrt()
scanners = {
    "one_coil": dinv.physics.MRI(mask, img_size=shape),
    "four_coils": dinv.physics.MultiCoilMRI(mask, coil_maps=coils, img_size=shape),
}

# %%
# Eight samples of each. The sampler ``photos`` is over-confident for masks in the Fourier domain. So UD2M
# comes as it is before training, with more levels. DiffPIR has the best of eight settings for this slice and
# one coil. With one coil it is the better one: even the mean of UD2M's samples has the lower PSNR.
model = UD2M(UnfoldedDenoiser(load_prior("photos"), num_iterations=4), num_steps=6)
for name, scanner in scanners.items():
    physics = ChannelMap.real(scanner)
    physics.set_noise_model(dinv.physics.GaussianNoise(0.02, rng=rng))
    y = physics(x)
    samples = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))
    print(f"{name}, residual of a sample, 1 if all is right: {model.residual.item():.2f}")
    compare(f"scan_mri_{name}", x, y, physics, samples, model.nfe, zeta=1.0, lambda_=3.0, std_max=0.1)
