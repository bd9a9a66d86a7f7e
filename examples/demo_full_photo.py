r"""
A whole photograph
==================

The sampler was trained on crops of 64 x 64 pixels. Prior and unfolded iterations are convolutional, so
photographs of any size can be restored; here a file of yours, or two by three of the photographs that
ship, 768 x 512 pixels together:

.. code-block:: bash

    python examples/demo_full_photo.py photo.jpg

One sample takes nine evaluations of the network, and as much memory as one of them.
"""

# %%
import argparse
import resource
import time
from pathlib import Path

import deepinv as dinv
import torch

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import load_image, photograph

OUT = Path(__file__).parent / "output"
parser = argparse.ArgumentParser(description="Restore a whole photograph.")
parser.add_argument("photo", nargs="?", help="file; those that ship by default")
parser.add_argument("--samples", type=int, default=2)
args = parser.parse_args()

# %%
# The photograph.
if args.photo:
    x = load_image(args.photo, channels=3)
else:
    a, b = photograph("astronaut"), photograph("chelsea")
    x = torch.cat([torch.cat([a, b, a.flip(-1)], -1), torch.cat([b.flip(-1), a.flip(-2), b], -1)], -2)

# %%
# Half of the pixels are missing, the others are noisy.
rng = torch.Generator().manual_seed(0)
kept = torch.rand(1, 1, *x.shape[-2:], generator=rng) < 0.5
physics = dinv.physics.Inpainting(x.shape[1:], mask=kept.float().expand_as(x))
physics.set_noise_model(dinv.physics.GaussianNoise(0.05, rng=rng))
y = physics(x)

# %%
# One sample at a time, so that memory stays that of one.
model = UD2M.from_pretrained("photos")
start = time.perf_counter()
samples = model.sample(y, physics, args.samples, batch_size=1, generator=rng, verbose=True)
seconds = (time.perf_counter() - start) / args.samples
psnr = dinv.metric.PSNR()
print(f"{x.shape[-1]} x {x.shape[-2]} pixels, {seconds:.1f} s a sample, {model.nfe:.0f} evaluations")
print(
    f"PSNR: measurement {psnr(y, x).item():.2f} dB, sample {psnr(samples[0], x).item():.2f} dB, ", end=""
)
print(f"mean of {args.samples} {psnr(samples.mean(0), x).item():.2f} dB")
print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")

# %%
# The figure.
OUT.mkdir(exist_ok=True)
columns = {"truth": x, "measurement": y.clamp(0, 1), "sample": samples[0]}
columns |= {f"mean of {args.samples}": samples.mean(0)}
dinv.utils.plot(
    columns, rescale_mode="clip", show=False, save_fn=OUT / "full_photo.png", figsize=(20, 4), dpi=150
)
print(f"saved {OUT / 'full_photo.png'}")
