r"""
A whole photograph
==================

The sampler was trained on crops of 64 x 64 and 128 x 128 pixels. Prior and iterations are convolutional, so
it restores photographs of any size. Here half of the pixels are removed first: of a file of yours, or of six
pictures that are made of the two that ship, 768 x 512 pixels together.

.. code-block:: bash

    python examples/full_photo.py photo.jpg
"""

# %%
# The photograph. Half of its pixels are missing, and the others are noisy.
import resource
import sys
import time

import deepinv as dinv
import torch
from helpers import save

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import load_image, photograph

if len(sys.argv) > 1:
    x = load_image(sys.argv[1], channels=3)
else:
    a, b = photograph("astronaut"), photograph("chelsea")
    x = torch.cat([torch.cat([a, b, a.flip(-1)], -1), torch.cat([b.flip(-1), a.flip(-2), b], -1)], -2)
rng = torch.Generator().manual_seed(0)
kept = torch.rand(1, 1, *x.shape[-2:], generator=rng) < 0.5
physics = dinv.physics.Inpainting(x.shape[1:], mask=kept.float().expand_as(x))
physics.set_noise_model(dinv.physics.GaussianNoise(0.05, rng=rng))
y = physics(x)

# %%
# Two samples, one after the other: ``batch_size=1`` needs the memory of one.
model = UD2M.from_pretrained("photos")
start = time.perf_counter()
samples = model.sample(y, physics, num_samples=2, batch_size=1, generator=rng, verbose=True)
seconds = (time.perf_counter() - start) / 2
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{x.shape[-1]} x {x.shape[-2]} pixels: {seconds:.1f} s and {model.nfe:.0f} evaluations per sample")
print(f"peak memory of the process: {memory:.1f} GiB")
images = {"measurement": y.clamp(0, 1), "sample": samples[0], "mean of 2": samples.mean(0)}
for name, image in images.items():
    print(f"{name}: PSNR {dinv.metric.PSNR()(image, x).item():.2f} dB")
save("full_photo", {"truth": x} | images, side=5)
