r"""
What the samples say about the error
====================================

A photograph is reduced four times. From sixteen samples of the posterior we take, for every pixel, a standard
deviation and intervals. The standard deviation should be large where the estimate is wrong, and an interval
should contain the truth as often as it says. This script checks both.

The sampler is ``photos-posterior``. The samples of ``photos`` are nearer to the truth one by one, because it
was trained for less diversity, so their standard deviation says too little of the error.
"""

# %%
# The problem and the samples.
import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from helpers import OUT, as_images

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import photograph

x = photograph("chelsea")[..., 32:160, 64:192]
physics = dinv.physics.Downsampling(img_size=x.shape[1:], filter="gaussian", factor=4, padding="circular")
physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=torch.Generator().manual_seed(0)))
y = physics(x)
model = UD2M.from_pretrained("photos-posterior")
samples = model.sample(y, physics, num_samples=16, generator=torch.Generator().manual_seed(1))
mean, std = samples.mean(0), samples.std(0)
error = (mean - x).abs()

# %%
# Pixels in twenty groups, sorted by their standard deviation. The root mean square error of a group should be
# its standard deviation.
groups = std.flatten().argsort().chunk(20)
rms_std, rms_error = (
    [part.flatten()[group].square().mean().sqrt().item() for group in groups] for part in (std, error)
)
correlation = torch.corrcoef(torch.stack([std.flatten(), error.flatten()]))[0, 1]
print(f"correlation of standard deviation and absolute error: {correlation:.2f}")

# %%
# Intervals from the j-th smallest to the j-th largest of S samples should hold the truth with probability
# :math:`(S + 1 - 2 j) / (S + 1)`.
below, above = (samples < x).sum(0), (samples > x).sum(0)
nominal = [(17 - 2 * j) / 17 for j in range(1, 9)]
covered = [((below >= j) & (above >= j)).float().mean().item() for j in range(1, 9)]
for expected, found in zip(nominal, covered, strict=True):
    print(f"interval of {expected:4.0%}: holds the truth in {found:.0%} of the pixels")

# %%
# The figure. Points above the dotted line of the first plot, and below that of the second, mean that the
# samples are too similar.
figure, axes = plt.subplots(2, 4, figsize=(15, 7.5), layout="constrained")
images = {"truth": x, "measurement": as_images(y, physics, x), "one sample": samples[0], "mean of 16": mean}
images |= {"error of the mean, 0 to 0.2": error.mean(1), "standard deviation, 0 to 0.2": std.mean(1)}
for axis, (title, image) in zip(axes.flat, images.items(), strict=False):
    axis.imshow(image[0].permute(1, 2, 0) if image.ndim == 4 else image[0], cmap="magma", vmin=0, vmax=0.2)
    axis.set(title=title, xticks=[], yticks=[])
for axis, end in ((axes[1, 2], max(rms_std + rms_error)), (axes[1, 3], 1)):
    axis.plot([0, end], [0, end], "k:", lw=1)
axes[1, 2].plot(rms_std, rms_error, "o-")
axes[1, 2].set(xlabel="standard deviation", ylabel="root mean square error", title="20 groups of pixels")
axes[1, 3].plot(nominal, covered, "o-")
axes[1, 3].set(xlabel="nominal", ylabel="truth inside", title="coverage of intervals")
OUT.mkdir(exist_ok=True)
figure.savefig(OUT / "uncertainty.webp", dpi=100)
plt.close(figure)
print(f"saved {OUT / 'uncertainty.webp'}")
