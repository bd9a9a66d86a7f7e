r"""
Operators that were not in the training
=======================================

The sampler of photographs was trained on blurs, masks, decimation and JPEG. The operator is not learned,
though: it enters by its proximal step, so any deepinv physics with ``prox_l2`` will do. Here are four
others on one photograph:

- compressed sensing: a third as many random combinations of pixels as there are pixels,
- tomography: projections from 40 angles of each colour,
- a mask in the Fourier domain as in magnetic resonance imaging, in five lines,
- motion blur with a kernel that is read from an image file.

The sampler stays better than the pseudo-inverse on each; how far it goes is up to the reader to see.
"""

# %%
from pathlib import Path

import deepinv as dinv
import torch
from torchvision.utils import save_image

from deepinv_ud2m import UD2M
from deepinv_ud2m.benchmark.comparison import as_images
from deepinv_ud2m.data import load_images, photograph

OUT = Path(__file__).parent / "output"
OUT.mkdir(exist_ok=True)
x = photograph("astronaut")[..., 32:96, 80:144]
shape = x.shape[1:]


def rng():
    return torch.Generator().manual_seed(0)


# %%
# Compressed sensing, by a Gaussian matrix for each colour.
compressed_sensing = dinv.physics.CompressedSensing(m=1365, img_size=shape, channelwise=True, rng=rng())

# %%
# Tomography, normalised to a norm of one, so that the noise means what it means elsewhere.
tomography = dinv.physics.Tomography(angles=40, img_width=64, circle=False, normalize=True)

# %%
# A mask in the Fourier domain: all low frequencies and a third of the rest. A physics of one's own whose
# singular value decomposition is fast needs its two transforms and its singular values.
kept = torch.rand(1, 1, 64, 64, generator=rng()) < 0.33
low = torch.fft.fftfreq(64).abs() < 0.06
kept |= low[:, None] & low
fourier = dinv.physics.DecomposablePhysics(
    V_adjoint=lambda image: torch.fft.fft2(image, norm="ortho"),
    V=lambda spectrum: torch.fft.ifft2(spectrum, norm="ortho").real,
    mask=kept.expand(1, *shape).float(),
    img_size=shape,
)

# %%
# A kernel from a file, grey, of odd sides.
path = torch.zeros(1, 21, 21)
path[0, range(3, 18), [4, 4, 5, 6, 7, 8, 9, 10, 10, 11, 13, 14, 16, 17, 17]] = 1
save_image(path, OUT / "kernel.png")
kernel = load_images(OUT / "kernel.png", channels=1, size=21)
motion = dinv.physics.BlurFFT(img_size=shape, filter=kernel / kernel.sum())

# %%
# Each with noise of 0.025, four samples.
model = UD2M.from_pretrained("photos")
psnr = dinv.metric.PSNR()
rows = []
print(f"{'PSNR (dB)':24s} {'pseudo-inverse':>14s} {'one sample':>11s} {'mean of 4':>10s}")
for name, physics in {
    "compressed sensing": compressed_sensing,
    "tomography": tomography,
    "Fourier mask": fourier,
    "kernel from a file": motion,
}.items():
    physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=rng()))
    y = physics(x)
    samples = model.sample(y, physics, num_samples=4, generator=rng())
    pseudo_inverse = physics.A_dagger(y).clamp(0, 1)
    shown = [pseudo_inverse, samples[0], samples.mean(0)]
    numbers = [psnr(image, x).item() for image in shown]
    print(f"{name:24s} {numbers[0]:14.2f} {numbers[1]:11.2f} {numbers[2]:10.2f}")
    std = (samples.std(0).mean(1, keepdim=True).expand_as(x) / 0.2).clamp(0, 1)
    rows.append([x, as_images(y, physics, x), *shown, std])

# %%
# The figure, one physics a row.
titles = ["truth", "measurement", "pseudo-inverse", "sample", "mean of 4", "std, 0 to 0.2"]
columns = {
    title: torch.cat(images) for title, images in zip(titles, zip(*rows, strict=True), strict=True)
}
dinv.utils.plot(
    columns, rescale_mode="clip", show=False, save_fn=OUT / "any_physics.png", figsize=(12, 8), dpi=100
)
print(f"saved {OUT / 'any_physics.png'}")
