r"""
What the samples say about the error
====================================

A photograph is reduced four times. Sixteen samples of the posterior give, for every pixel, a standard
deviation, which should be large where the estimate is wrong, and intervals, which should contain the
truth as often as they say. Both are checked here: the map of standard deviations beside that of errors,
the error of pixels against their standard deviation, and the coverage of the central intervals between
order statistics: of S samples, the interval from the j-th smallest to the j-th largest should hold the
truth with probability :math:`(S + 1 - 2 j) / (S + 1)`.

The sampler is ``photos-posterior``. Samples of ``photos`` are nearer to the truth one by one, because it
was trained for less spread, so theirs says too little of the error.
"""

# %%
from pathlib import Path

import deepinv as dinv
import matplotlib
import torch

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import photograph

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parent / "output"
NUM_SAMPLES = 16

# %%
# The problem and the samples.
x = photograph("chelsea")[..., 32:160, 64:192]
physics = dinv.physics.Downsampling(
    img_size=x.shape[1:], filter="gaussian", factor=4, padding="circular"
)
physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=torch.Generator().manual_seed(0)))
y = physics(x)
model = UD2M.from_pretrained("photos-posterior")
samples = model.sample(y, physics, NUM_SAMPLES, generator=torch.Generator().manual_seed(1), verbose=True)
mean, std = samples.mean(0), samples.std(0)
error = (mean - x).abs()

# %%
# Pixels sorted by their standard deviation, in twenty groups: the root mean square error of a group
# should be its standard deviation, a little more since the mean is one of sixteen samples.
order = std.flatten().argsort()
groups = [
    (
        std.flatten()[group].square().mean().sqrt().item(),
        error.flatten()[group].square().mean().sqrt().item(),
    )
    for group in order.chunk(20)
]
correlation = torch.corrcoef(torch.stack([std.flatten(), error.flatten()]))[0, 1].item()
print(f"correlation of standard deviation and absolute error: {correlation:.2f}")

# %%
# Coverage of central intervals.
below = (samples < x).sum(0)
above = (samples > x).sum(0)
nominal, covered = [], []
for j in range(1, NUM_SAMPLES // 2 + 1):
    nominal.append((NUM_SAMPLES + 1 - 2 * j) / (NUM_SAMPLES + 1))
    covered.append(((below >= j) & (above >= j)).float().mean().item())
    print(f"interval of {nominal[-1]:4.0%}: holds the truth in {covered[-1]:.0%} of the pixels")

# %%
# The figure.
OUT.mkdir(exist_ok=True)
figure, axes = plt.subplots(2, 4, figsize=(15, 7.5))
grey = {"cmap": "magma", "vmin": 0, "vmax": 0.2}
for axis, (title, image) in zip(
    axes.flat,
    {
        "truth": x,
        "measurement": torch.nn.functional.interpolate(y.clamp(0, 1), scale_factor=4),
        "one sample": samples[0],
        f"mean of {NUM_SAMPLES}": mean,
        "error of the mean, 0 to 0.2": error.mean(1),
        "standard deviation, 0 to 0.2": std.mean(1),
    }.items(),
    strict=False,
):
    axis.imshow(image[0].permute(1, 2, 0) if image.ndim == 4 else image[0], **grey)
    axis.set_title(title)
    axis.axis("off")
of_std, of_error = zip(*groups, strict=True)
axes[1, 2].plot(of_std, of_error, "o-")
axes[1, 2].set(xlabel="standard deviation", ylabel="root mean square error", title="20 groups of pixels")
axes[1, 3].plot(nominal, covered, "o-")
axes[1, 3].set(xlabel="nominal", ylabel="truth inside", title="coverage of pixels")
for axis, end in ((axes[1, 2], max(*of_std, *of_error)), (axes[1, 3], 1.0)):
    axis.plot([0, end], [0, end], "k:", lw=1)
figure.tight_layout()
figure.savefig(OUT / "posterior_uncertainty.png", dpi=100)
print(f"saved {OUT / 'posterior_uncertainty.png'}")
