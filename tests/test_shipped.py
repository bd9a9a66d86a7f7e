"""The sampler of photographs that ships, on photographs and operators that it was not trained on."""

import deepinv as dinv
import pytest
import torch
from deepinv.physics import BlurFFT, Downsampling, Inpainting
from deepinv.physics.functional import gaussian_blur

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import photograph

SHAPE = (3, 128, 128)


def seeded():
    return torch.Generator().manual_seed(0)


def random_mask(kept: float):
    return (torch.rand(1, 1, *SHAPE[1:], generator=seeded()) < kept).float().expand(1, *SHAPE)


# Beyond the ranges of training, which end at noise 0.1, width 4, 10 % of the pixels, factor 4.
OUTSIDE = {
    "noise 0.15": (BlurFFT(SHAPE, filter=gaussian_blur(sigma=(2.0, 2.0))), 0.15),
    "width 8": (BlurFFT(SHAPE, filter=gaussian_blur(sigma=(8.0, 8.0))), 0.025),
    "10 % of the pixels": (Inpainting(SHAPE, mask=random_mask(0.1)), 0.025),
    "factor 8": (Downsampling(img_size=SHAPE, filter="gaussian", factor=8, padding="circular"), 0.025),
}


@pytest.fixture(scope="module")
def photographs():
    return torch.cat([photograph(name)[..., 32:160, 64:192] for name in ("astronaut", "chelsea")])


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_training_it_is_better_than_the_pseudo_inverse(photographs, name):
    physics, sigma_y = OUTSIDE[name]
    physics.set_noise_model(dinv.physics.GaussianNoise(sigma_y, rng=seeded()))
    y = physics(photographs)
    sample = UD2M.from_pretrained("photos")(y, physics, generator=seeded())
    assert bool(sample.isfinite().all())
    pseudo_inverse = physics.A_dagger(y).clamp(0, 1)
    psnr = dinv.metric.PSNR()
    assert bool((psnr(sample, photographs) > psnr(pseudo_inverse, photographs)).all())


@pytest.mark.slow
def test_samples_agree_where_pixels_are_known(photographs):
    mask = random_mask(0.3)
    physics = Inpainting(SHAPE, mask=mask, noise_model=dinv.physics.GaussianNoise(0.01, rng=seeded()))
    samples = UD2M.from_pretrained("photos").sample(physics(photographs), physics, 4, generator=seeded())
    std, known = samples.std(0), mask.bool().expand_as(photographs)
    assert std[known].mean() < 0.02  # twice the noise
    assert std[~known].mean() > 2 * std[known].mean()
