r"""
What the samples say of the error
=================================

A photograph is reduced by a factor of 4. From samples of the posterior we take a standard deviation and an
interval for every pixel. The standard deviation should be large where the estimate is wrong, and an interval
of 90 % should hold the truth in 90 % of the pixels. This script checks both, and mends the intervals by
conformal calibration.
"""

# %%
# The problem, and 19 samples, the fewest for an interval of 90 %.
import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from helpers import OUT

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import photograph
from deepinv_ud2m.uncertainty import Conformal, inside, plot, summary, toward_mean

photo = photograph("chelsea")
x = photo[..., :128, 64:192]
physics = dinv.physics.Downsampling(img_size=x.shape[1:], filter="gaussian", factor=4, padding="circular")
physics.set_noise_model(dinv.physics.GaussianNoise(0.025, rng=torch.Generator().manual_seed(0)))
y = physics(x)
model = UD2M.from_pretrained("photos")
samples = model.sample(y, physics, num_samples=19, generator=torch.Generator().manual_seed(1))

# %%
# Mean, standard deviation, interval. Without the truth, ``summary(samples)`` gives all but the last two.
found = summary(samples, x)
error = (found.mean - x).abs()
correlation = torch.corrcoef(torch.stack([found.std.flatten(), error.flatten()]))[0, 1]
print(f"correlation of standard deviation and absolute error: {correlation:.2f}")
print(f"error of the mean over the one that the samples predict: {found.spread_skill_ratio.item():.2f}")
print(f"the intervals of 90 % hold the truth in {found.coverage.item():.0%} of the pixels")

# %%
# Conformal calibration: images whose truth is known give the factor on the standard deviation that makes
# intervals cover. It holds for images of the same kind, the same operator and the same noise. Here they are
# twelve crops of the rest of the picture, to keep the example small. They are not independent: take one crop
# of each of many photographs.
around = [(i, j) for i in (0, 64, 128, 192) for j in (0, 64, 128, 192) if i >= 128 or j in (0, 192)]
crops = torch.cat([photo[..., i : i + 64, j : j + 64] for i, j in around])
small = dinv.physics.Downsampling(img_size=(3, 64, 64), filter="gaussian", factor=4, padding="circular")
small.set_noise_model(physics.noise_model)
conformal = Conformal.fit(model, crops, small, num_samples=19, generator=torch.Generator().manual_seed(2))
low, high = conformal.interval(samples)
print(f"mean -+ {conformal.factor:.2f} standard deviations hold it in {inside(x, low, high).item():.0%}")

# %%
# Images between the mean, which has the least error, and the samples, which have texture.
psnr = dinv.metric.PSNR()
for a in (0, 0.5, 1):
    moved = toward_mean(samples, a)
    print(
        f"mean + {a:3.1f} (sample - mean): PSNR {psnr(moved[:, 0], x.expand_as(moved[:, 0])).mean():.2f} dB"
    )

# %%
# Truth, measurement, samples, mean; standard deviation and error on one scale.
figure = plot(samples, x, y)
OUT.mkdir(exist_ok=True)
figure.savefig(OUT / "uncertainty.webp", dpi=100)
plt.close(figure)
print(f"saved {OUT / 'uncertainty.webp'}")
