r"""
Your own denoiser as the prior
==============================

The prior enters by its denoiser :math:`D(w, \delta) \approx E[x \mid x + \delta n = w]` only. So any deepinv
``Denoiser`` will do: a network of yours, one of deepinv, or no network at all. Nothing has to be trained:
untrained, UD2M is zero-shot LATINO. Here the denoiser thresholds the cosine transforms of overlapping
patches, in ten lines.
"""

# %%
# The denoiser takes images `[B, C, H, W]` in [0, 1] with noise of standard deviation ``sigma``, one for each
# image.
import math

import deepinv as dinv
import torch
from helpers import as_images, save
from torch.nn.functional import fold, pad, unfold

from deepinv_ud2m import UD2M, PriorInfo, UnfoldedDenoiser, WienerInitializer
from deepinv_ud2m.data import photograph


class PatchDenoiser(dinv.models.Denoiser):
    """Hard thresholding of the cosine transform of all patches of 8 x 8 pixels, at 2.7 sigma."""

    def __init__(self):
        super().__init__()
        n = torch.arange(8)
        basis = torch.cos(math.pi / 8 * (n + 0.5) * n[:, None]) / 2
        basis[0] /= 2**0.5
        self.register_buffer("transform", torch.kron(basis, basis))

    def forward(self, x, sigma):
        planes = pad(x, (8, 8, 8, 8), mode="reflect").flatten(0, 1)[:, None]
        coefficients = self.transform @ unfold(planes, 8, stride=2)
        sigma = sigma.reshape(-1, 1).expand(x.shape[:2]).reshape(-1, 1, 1)
        kept = coefficients.abs() > 2.7 * sigma
        kept[:, 0] = True  # the mean of the patch
        weight = 1 / kept.sum(1, keepdim=True)  # patches of few coefficients count more
        patches = weight * (self.transform.T @ (kept * coefficients))
        weight = weight.expand_as(patches)
        total, weights = (fold(part, planes.shape[-2:], 8, stride=2) for part in (patches, weight))
        return (total / weights)[..., 8:-8, 8:-8].reshape(x.shape)


# %%
# What the denoiser is for. This is optional: with it, images of another kind are refused, and levels out of
# its range are clamped.
denoiser = PatchDenoiser()
denoiser.prior_info = PriorInfo("patches", channels=3, sigma_min=0.002, sigma_max=1.0)

# %%
# The sampler. ``reference_level`` is about the error of the restored image where y says nothing: 0.2 for
# digits, which is the default, and 0.08 for photographs. Photographs also need lower last levels.
initializer = WienerInitializer(reference_level=0.08)
model = UD2M(UnfoldedDenoiser(denoiser, num_iterations=3, initializer=initializer), sigmas=(78.7, 0.2, 0.04))

# %%
# Two problems, four samples each.
x = photograph("chelsea")[..., 64:192, 64:192]
shape, rng, psnr = x.shape[1:], torch.Generator().manual_seed(0), dinv.metric.PSNR()
kept = torch.rand(1, 1, *shape[1:], generator=rng) < 0.3
problems = {
    "inpainting": dinv.physics.Inpainting(shape, mask=kept.float().expand_as(x)),
    "deblurring": dinv.physics.BlurFFT(shape, filter=dinv.physics.functional.gaussian_blur(sigma=(2.0, 2.0))),
}
rows = []
for name, physics in problems.items():
    physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=rng))
    y = physics(x)
    samples = model.sample(y, physics, num_samples=4, generator=rng)
    rows.append([x, as_images(y, physics, x), samples[0], samples.mean(0)])
    measured, one, mean = (psnr(image, x).item() for image in rows[-1][1:])
    print(f"{name}: PSNR {measured:.2f} dB measured, {one:.2f} dB one sample, {mean:.2f} dB mean of 4")
titles = ["truth", "measurement", "sample", "mean of 4"]
save("your_prior", dict(zip(titles, map(torch.cat, zip(*rows, strict=True)), strict=True)))
