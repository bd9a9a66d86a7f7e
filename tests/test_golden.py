"""Samples of one seed, for every shipped sampler and eight physics, as they were when they were stored.

``python tests/test_golden.py`` stores them anew, in ``golden.npz``: only after a change that is meant to
change samples. On the machine that stored them they are equal to the bit. Rounding differs between
processors: where the problem is solved in closed form it stays near 1e-5; iterations that stop elsewhere
and the networks after them, make up to 1e-2 of it.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import seeded
from deepinv import physics as dp
from deepinv.physics.functional import gaussian_blur

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits, photograph
from deepinv_ud2m.physics import JPEG

FILE = Path(__file__).parent / "golden.npz"
SAMPLERS = {"mnist": 1, "photos": 3}
SIZE = 32


def images(channels):
    if channels == 1:
        return mnist_digits("test", num=2)
    return torch.cat([photograph(name)[..., 96:128, 96:128] for name in ("astronaut", "chelsea")])


def rand(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed))


def kernels(batch):
    kernel = rand(batch, 1, 5, 5, seed=1)
    return kernel / kernel.sum((-2, -1), keepdim=True)


def masks(channels, batch):
    return (rand(batch, 1, SIZE, SIZE, seed=2) < 0.4).float().expand(batch, channels, SIZE, SIZE)


def stack(shape):
    inpainting = dp.Inpainting(shape, masks(shape[0], 1))
    return dp.StackedLinearPhysics([dp.Blur(kernels(1), padding="valid"), inpainting])


PHYSICS = {
    "blur, closed form": lambda shape: dp.BlurFFT(shape, gaussian_blur(sigma=(1.5, 1.5))),
    "mask for each image": lambda shape: dp.Inpainting(shape, masks(shape[0], 2)),
    "super-resolution": lambda shape: dp.Downsampling(
        img_size=shape, filter="gaussian", factor=2, padding="circular"
    ),
    "valid blur": lambda shape: dp.Blur(gaussian_blur(sigma=(1.0, 1.0)), padding="valid"),
    "kernel for each image": lambda shape: dp.Blur(kernels(2), padding="reflect"),
    "stack": stack,
    "compressed sensing": lambda shape: dp.CompressedSensing(
        m=400, img_size=shape, channelwise=True, rng=seeded(3)
    ),
    "JPEG": lambda shape: JPEG(shape, quality=torch.tensor([10.0, 30.0])),
}


CLOSED_FORM = {"blur, closed form", "super-resolution", "JPEG"}


def measure(name, x):
    """The physics, and measurements of noise 0.05, for masks of a level for each image."""
    physics = PHYSICS[name](tuple(x.shape[1:]))
    if name == "JPEG":
        return physics, physics(x)
    rng = seeded(4)
    sigma = torch.tensor([0.03, 0.06]) if name == "mask for each image" else 0.05
    if name == "stack":
        for child in physics.physics_list:
            child.set_noise_model(dp.GaussianNoise(sigma, rng=rng))
    else:
        physics.set_noise_model(dp.GaussianNoise(sigma, rng=rng))
    return physics, physics(x)


def draw(model, name, x):
    """Two samples of two images, in two batches; every third pixel."""
    physics, y = measure(name, x)
    generator = seeded(5)
    return model.sample(y, physics, 2, batch_size=2, generator=generator)[..., 1::3, 1::3]


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_those_that_were_stored(sampler, golden):
    model, x = UD2M.from_pretrained(sampler), images(SAMPLERS[sampler])
    for name in PHYSICS:
        difference = (draw(model, name, x) - golden[f"{sampler}: {name}"]).abs()
        assert difference.max() < (3e-5 if name in CLOSED_FORM else 2e-2), name
        assert difference.square().mean().sqrt() < 1e-3, name


def main():
    torch.set_num_threads(1)
    arrays = {}
    for sampler, channels in SAMPLERS.items():
        model, x = UD2M.from_pretrained(sampler), images(channels)
        arrays |= {f"{sampler}: {name}": draw(model, name, x).numpy() for name in PHYSICS}
    if "--compare" in sys.argv:
        with np.load(FILE) as stored:
            for key, samples in arrays.items():
                print(f"{key:45s} {np.abs(samples - stored[key]).max():.1e}")
        return
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
