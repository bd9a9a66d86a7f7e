r"""
Is the sampler right? A problem with a known answer
===================================================

For a Gaussian prior :math:`x \sim \mathcal N(\mu, C)` and a linear measurement, everything is known in closed
form: the denoiser :math:`D(w, \delta) = \mu + C (C + \delta^2 I)^{-1} (w - \mu)`, the posterior of x given y,
and the law :math:`p(x \mid y, x_s)` from which each step of UD2M draws.

With exact draws and :math:`\eta = 1`, UD2M is exact for any number of levels. With untrained LATINO
iterations in their place, its samples follow another Gaussian. Distillation is there to close that gap.
"""

# %%
# A smooth Gaussian prior on small images, and its exact denoiser.
import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from helpers import OUT

from deepinv_ud2m import UD2M, UnfoldedDenoiser
from deepinv_ud2m.randomness import randn

NUM_SAMPLES, SIDE, SIGMA_Y = 20_000, 6, 0.1
d = SIDE * SIDE
torch.manual_seed(0)
pixels = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
C = 0.04 * torch.exp(-0.5 * (torch.cdist(pixels, pixels) / 1.5) ** 2) + 0.002 * torch.eye(d)
mu = torch.full((d,), 0.5, dtype=torch.float64)


class GaussianDenoiser(dinv.models.Denoiser):
    def forward(self, w, sigma):
        eigenvalues, basis = torch.linalg.eigh(C)
        shrink = eigenvalues / (eigenvalues + sigma.reshape(-1, 1) ** 2)
        return (mu + (shrink * ((w.flatten(1) - mu) @ basis)) @ basis.T).reshape(w.shape)


# %%
# Half of the pixels are measured, with noise.
mask = (torch.rand(1, 1, SIDE, SIDE) < 0.5).double()
physics = dinv.physics.Inpainting((1, SIDE, SIDE), mask=mask, noise_model=dinv.physics.GaussianNoise(SIGMA_Y))
x = (mu + torch.linalg.cholesky(C) @ torch.randn(d, dtype=torch.float64)).reshape(1, 1, SIDE, SIDE)
y = physics(x)


def posterior(x_s=None, s=None):
    """Mean and covariance of p(x | y), or of p(x | y, x_s)."""
    precision = torch.linalg.inv(C) + torch.diag(mask.flatten()) / SIGMA_Y**2
    right = torch.linalg.solve(C, mu) + y.flatten() / SIGMA_Y**2
    if x_s is not None:
        precision, right = precision + torch.eye(d) / s**2, right + x_s.flatten(1) / s**2
    covariance = torch.linalg.inv(precision)
    return right @ covariance, covariance


class ExactDraw(torch.nn.Module):
    """What an unfolded denoiser approximates: exact draws from p(x | y, x_s)."""

    def draw(self, problem, x_s, sigma, *, generator=None):
        mean, covariance = posterior(x_s, sigma)
        noise = randn(x_s, generator).flatten(1)
        return (mean + noise @ torch.linalg.cholesky(covariance).T).reshape(x_s.shape)


# %%
# Mean and standard deviation of the samples. The error of the mean is relative to the exact standard
# deviation; chance alone gives 1 / sqrt(20 000) = 0.007.
exact_mean, exact_covariance = posterior()
exact_std = exact_covariance.diagonal().sqrt()
samplers = {
    "exact draws, N = 1": UD2M(ExactDraw(), num_steps=1, output_range=None),
    "exact draws, N = 3": UD2M(ExactDraw(), num_steps=3, output_range=None),
    "LATINO, K = 3, N = 3": UD2M(UnfoldedDenoiser(GaussianDenoiser(), 3), output_range=None),
}
moments = {"exact posterior": (exact_mean, exact_std)}
print(f"{'':24s} {'error of mean':>14s} {'std / exact std':>16s}")
for name, model in samplers.items():
    samples = model.sample(y, physics, NUM_SAMPLES, batch_size=5000)[:, 0].flatten(1)
    moments[name] = mean, std = samples.mean(0), samples.std(0)
    error = ((mean - exact_mean) / exact_std).square().mean().sqrt()
    print(f"{name:24s} {error:14.3f} {(std / exact_std).mean():16.3f}")

# %%
# The figure.
fig, axes = plt.subplots(2, len(moments), figsize=(2.6 * len(moments), 5), layout="constrained")
for column, (name, (mean, std)) in zip(axes.T, moments.items(), strict=True):
    column[0].imshow(mean.reshape(SIDE, SIDE), vmin=0, vmax=1, cmap="gray")
    column[1].imshow(std.reshape(SIDE, SIDE), vmin=0, vmax=exact_std.max(), cmap="viridis")
    column[0].set_title(name, fontsize=10)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("mean")
axes[1, 0].set_ylabel("standard deviation")
OUT.mkdir(exist_ok=True)
fig.savefig(OUT / "exact_posterior.webp", dpi=100)
plt.close(fig)
print(f"saved {OUT / 'exact_posterior.webp'}")
