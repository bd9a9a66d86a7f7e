r"""
Super-resolution of digits: samples of the posterior
====================================================

A digit is blurred, decimated by four and noised,

.. math:: y = (h * x)\!\downarrow_4 + \sigma_y n, \qquad \sigma_y = 0.05 .

Eight by eight pixels do not determine a digit. A posterior sampler answers with several digits that
all agree with the measurement; their mean is the best estimate in mean squared error, their
standard deviation says where it is to be trusted. The sampler that ships with the package, a diffusion
prior distilled for several tasks, needs nine network evaluations for a sample. Here it runs next to
deepinv's DiffPIR on the same prior.
"""

# %%
import time
from pathlib import Path

import deepinv as dinv
import matplotlib
import torch

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.sampler import CallCounter

matplotlib.use("Agg")
OUT = Path(__file__).parent / "output"
NUM_DIGITS, NUM_SAMPLES, SHOWN = 16, 8, 4
generator = torch.Generator().manual_seed(0)

# %%
# The problem: test digits, which the prior has never seen, and a deepinv physics.
x = mnist_digits("test", num=NUM_DIGITS)
physics = dinv.physics.Downsampling(
    img_size=(1, 32, 32), filter="gaussian", factor=4, padding="circular"
)
physics.set_noise_model(dinv.physics.GaussianNoise(0.05, rng=generator))
y = physics(x)

# %%
# UD2M: K = 3 unfolded iterations at each of N = 3 noise levels. Without training it would be
# ``UD2M(UnfoldedDenoiser(load_prior("mnist")))``.
model = UD2M.from_pretrained("mnist")
start = time.perf_counter()
samples = model.sample(y, physics, NUM_SAMPLES, generator=generator, verbose=True)
ud2m_seconds = (time.perf_counter() - start) / NUM_SAMPLES
mean, std = samples.mean(0), samples.std(0)

# %%
# DiffPIR: the same prior, 100 network evaluations, its two parameters tuned on other digits
# (``python -m deepinv_ud2m.benchmark tune --tasks sr4 --methods diffpir``).
prior = load_prior("mnist")
diffpir = dinv.sampling.DiffPIR(
    prior, dinv.optim.data_fidelity.L2(), sigma=0.05, max_iter=100, zeta=0.6, lambda_=3.0
)
start = time.perf_counter()
with torch.no_grad(), CallCounter([prior]) as counter:
    x_diffpir = diffpir(y, physics, seed=1).clamp(0, 1)
diffpir_seconds = time.perf_counter() - start

# %%
# Numbers: PSNR in dB, mean and standard error over the digits; network evaluations (counted) and
# seconds for one sample of all the digits.
psnr = dinv.metric.PSNR()


def report(name, estimate, nfe, seconds):
    values = psnr(estimate, x)
    error = values.std() / len(values) ** 0.5
    print(f"{name:28s} {values.mean():6.2f} +- {error:.2f} {nfe:5.0f} {seconds:9.2f}")


print(f"{'':28s} {'PSNR (dB)':>14s} {'NFE':>5s} {'seconds':>9s}")
report("UD2M, one sample", samples[0], model.nfe, ud2m_seconds)
report(f"UD2M, mean of {NUM_SAMPLES}", mean, NUM_SAMPLES * model.nfe, NUM_SAMPLES * ud2m_seconds)
report("DiffPIR", x_diffpir, counter.images / NUM_DIGITS, diffpir_seconds)

# %%
# The figure.
upsampled = torch.nn.functional.interpolate(y.clamp(0, 1), scale_factor=4)
columns = {"measurement": upsampled, "truth": x, "DiffPIR": x_diffpir}
columns |= {f"sample {i + 1}": samples[i] for i in range(4)}
columns |= {"mean": mean, "std (0 to 0.5)": (2 * std).clamp(0, 1)}
OUT.mkdir(exist_ok=True)
dinv.utils.plot(
    {name: image[:SHOWN] for name, image in columns.items()},
    rescale_mode="clip",
    show=False,
    save_fn=OUT / "superresolution.png",
    figsize=(1.3 * len(columns), 1.4 * SHOWN),
    fontsize=9,
    dpi=100,
)
print(f"saved {OUT / 'superresolution.png'}")
