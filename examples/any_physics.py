r"""
Any deepinv physics
===================

The sampler of photographs was trained with blurs, masks, super-resolution, demosaicing, JPEG and MRI of grey
images with one coil. In its iterations the physics enters by the proximal step alone. So any deepinv physics
with ``prox_l2`` will do. The first two here were not in the training. The other two are like operators of the
training, but made by hand:

- compressed sensing: a third as many random combinations of pixels as there are pixels,
- tomography: projections of each colour from 40 angles,
- a mask in the Fourier domain, as in magnetic resonance imaging,
- motion blur with a kernel that is read from an image file.
"""

# %%
# Compressed sensing, and tomography. Tomography is normalised to a norm of one, so that the noise is as
# strong as elsewhere.
import deepinv as dinv
import torch
from helpers import OUT, as_images, coloured, save
from torchvision.utils import save_image

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import load_images, photograph


def rng():
    return torch.Generator().manual_seed(0)


x = photograph("astronaut")[..., 32:96, 80:144]
shape = x.shape[1:]
problems = {
    "compressed sensing": dinv.physics.CompressedSensing(m=1365, img_size=shape, channelwise=True, rng=rng()),
    "tomography": dinv.physics.Tomography(angles=40, img_width=64, circle=False, normalize=True),
}

# %%
# A physics of your own: the mask keeps all low frequencies and a third of the others. Where you know a fast
# singular value decomposition, give its two transforms and its singular values, and the proximal step is
# exact.
low = torch.fft.fftfreq(64).abs() < 0.06
kept = (torch.rand(1, 1, 64, 64, generator=rng()) < 0.33) | (low[:, None] & low)
problems["Fourier mask"] = dinv.physics.DecomposablePhysics(
    V_adjoint=lambda image: torch.fft.fft2(image, norm="ortho"),
    V=lambda spectrum: torch.fft.ifft2(spectrum, norm="ortho").real,
    mask=kept.expand(1, *shape).float(),
    img_size=shape,
)

# %%
# A kernel from a file, grey and of odd sides.
OUT.mkdir(exist_ok=True)
path = torch.zeros(1, 21, 21)
path[0, range(3, 18), [4, 4, 5, 6, 7, 8, 9, 10, 10, 11, 13, 14, 16, 17, 17]] = 1
save_image(path, OUT / "kernel.png")
kernel = load_images(OUT / "kernel.png", channels=1, size=21)
problems["kernel from a file"] = dinv.physics.BlurFFT(img_size=shape, filter=kernel / kernel.sum())

# %%
# Noise of standard deviation 0.025 on each, and four samples.
model = UD2M.from_pretrained("photos")
psnr, rows = dinv.metric.PSNR(), []
print(f"{'PSNR (dB)':20s} {'pseudo-inverse':>14s} {'one sample':>11s} {'mean of 4':>10s}")
for name, physics in problems.items():
    physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=rng()))
    y = physics(x)
    samples = model.sample(y, physics, num_samples=4, generator=rng())
    shown = [physics.A_dagger(y).clamp(0, 1), samples[0], samples.mean(0)]
    inverse, one, mean = (psnr(image, x).item() for image in shown)
    print(f"{name:20s} {inverse:14.2f} {one:11.2f} {mean:10.2f}")
    rows.append([x, as_images(y, physics, x), *shown, coloured(samples.std(0))])

# %%
# The figure, one physics a row.
titles = ["truth", "measurement", "pseudo-inverse", "sample", "mean of 4", "std, 0 to 0.2"]
save("any_physics", dict(zip(titles, map(torch.cat, zip(*rows, strict=True)), strict=True)))
