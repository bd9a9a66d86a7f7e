r"""
Deblurring of digits, with a kernel per image
=============================================

Each digit is blurred by a kernel of its own and noised,

.. math:: y_i = h_i * x_i + \sigma_y n_i, \qquad \sigma_y = 0.05 ,

with Gaussian kernels of growing width from row to row. One call restores the batch: the sampler asks
the physics for its prox, which is exact for every kernel. The wider the kernel, the more the samples
differ.
"""

# %%
from pathlib import Path

import deepinv as dinv
import torch
from deepinv.physics.functional import gaussian_blur

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits

OUT = Path(__file__).parent / "output"
OUT.mkdir(exist_ok=True)
generator = torch.Generator().manual_seed(0)
x = mnist_digits("test", num=4)

# %%
# Kernels of width 0.5 to 3 pixels, one per image (a pair of widths makes deepinv's kernel 2-D).
widths = [0.5, 1.0, 2.0, 3.0]
kernels = torch.cat([gaussian_blur(psf_size=(15, 15), sigma=(width, width)) for width in widths])
noise = dinv.physics.GaussianNoise(0.05, rng=generator)
physics = dinv.physics.BlurFFT((1, 32, 32), filter=kernels, noise_model=noise)
y = physics(x)

# %%
# Sixteen samples of each digit, drawn together; their mean and standard deviation.
model = UD2M.from_pretrained("mnist")
samples = model.sample(y, physics, num_samples=16, generator=generator)
mean, std = samples.mean(0), samples.std(0)
psnr = dinv.metric.PSNR()
of_sample, of_mean = psnr(samples[0], x), psnr(mean, x)
for i, width in enumerate(widths):
    print(
        f"kernel width {width}: PSNR of a sample {of_sample[i]:.2f} dB, of the mean of 16 "
        f"{of_mean[i]:.2f} dB, mean standard deviation {std[i].mean():.3f}"
    )

# %%
# The figure.
columns = {"measurement": y.clamp(0, 1), "truth": x}
columns |= {f"sample {i + 1}": samples[i] for i in range(4)}
columns |= {"mean": mean, "std (0 to 0.5)": (2 * std).clamp(0, 1)}
dinv.utils.plot(
    columns,
    rescale_mode="clip",
    show=False,
    save_fn=OUT / "deblurring.png",
    figsize=(1.3 * len(columns), 1.4 * len(x)),
    fontsize=9,
    dpi=100,
)
print(f"saved {OUT / 'deblurring.png'}")
