"""The samplers that ship: better than untrained ones, and fit for operators they were not trained on."""

import deepinv as dinv
import pytest
import torch
from conftest import seeded
from deepinv.physics import BlurFFT, Downsampling, GaussianNoise, Inpainting
from deepinv.physics.functional import gaussian_blur

from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
from deepinv_ud2m.checkpoint import PRETRAINED
from deepinv_ud2m.data import mnist_digits, photograph
from deepinv_ud2m.metrics import PerceptualDistance, energy_score
from deepinv_ud2m.physics import make_physics

SHAPE = (3, 128, 128)


def random_mask(kept: float, size: int = 128):
    return (torch.rand(1, 1, size, size, generator=seeded()) < kept).float().expand(1, 3, size, size)


# Bounds of two ratios: energy score over that of zero-shot UD2M, and perceptual distance of samples over that
# of the same sampler before training. On the right is what was measured with three seeds of the noise.
BOUNDS = {
    "mnist": (0.85, 0.70),  # 0.70 to 0.76 (blur) and 0.62 to 0.65 (super-resolution), 0.31 and 0.51
    "mnist-paper": (0.9, 0.4),  # 0.64 to 0.79, and 0.22 to 0.28
    "photos": (0.85, 0.97),  # 0.74 to 0.76 (blur) and 0.67 to 0.74 (inpainting), 0.86 to 0.93
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_trained_samplers_are_better_than_untrained_ones(name):
    """
    A sampler that lost its weights would have a second ratio of 1.
    """
    model, is_digit = UD2M.from_pretrained(name), name.startswith("mnist")
    x = mnist_digits("test", num=8) if is_digit else _crops(64, 64, 96)
    shape = tuple(x.shape[1:])
    tasks = {"blur": (BlurFFT(shape, gaussian_blur(sigma=(1.0, 1.0))), 0.01)}
    if name == "mnist-paper":  # trained with one operator and noise level
        tasks = {"super-resolution": (make_physics("sr4-paper", shape), 0.05)}
    elif is_digit:
        tasks["super-resolution"] = Downsampling(shape, "bicubic", 4, padding="circular"), 0.025
    else:
        tasks["inpainting"] = Inpainting(shape, random_mask(0.3, 64)), 0.025
    perceptual = PerceptualDistance("digits" if is_digit else "efficientnet")
    for task, (physics, sigma_y) in tasks.items():
        physics.set_noise_model(GaussianNoise(sigma_y, rng=seeded()))
        y = physics(x)
        trained, zero_shot, same = (
            sampler.sample(y, physics, 3 if is_digit else 2, generator=seeded())
            for sampler in (model, *_untrained(model, name.partition("-")[0]))
        )
        score = energy_score(trained, x).mean() / energy_score(zero_shot, x).mean()
        distances = [perceptual(s.flatten(0, 1), x.repeat(len(s), 1, 1, 1)).mean() for s in (trained, same)]
        ratios = score.item(), (distances[0] / distances[1]).item()
        assert all(r < bound for r, bound in zip(ratios, BOUNDS[name], strict=True)), (task, ratios)


def _untrained(model, prior):
    """Zero-shot UD2M of so many iterations, and the sampler as it was before training."""
    unfolded = model.unfolded
    yield UD2M(UnfoldedDenoiser(load_prior(prior), unfolded.num_iterations))
    settings = {**unfolded.config(), "train_prior": "adapter"}
    initializer = getattr(unfolded.initializer, "wiener", unfolded.initializer)
    before = UnfoldedDenoiser(load_prior(prior), initializer=initializer, **settings)
    yield UD2M(before, eta=model.eta, sigmas=model.sigmas)


def _crops(size, top, left):
    rows, columns = slice(top, top + size), slice(left, left + size)
    return torch.cat([photograph(name)[..., rows, columns] for name in ("astronaut", "chelsea")])


# Beyond the ranges of training, which end at noise 0.1, width 4, 10 % of the pixels, factor 4.
OUTSIDE = {
    "noise 0.15": (BlurFFT(SHAPE, filter=gaussian_blur(sigma=(2.0, 2.0))), 0.15),
    "width 8": (BlurFFT(SHAPE, filter=gaussian_blur(sigma=(8.0, 8.0))), 0.025),
    "10 % of the pixels": (Inpainting(SHAPE, mask=random_mask(0.1)), 0.025),
    "factor 8": (Downsampling(img_size=SHAPE, filter="gaussian", factor=8, padding="circular"), 0.025),
}


@pytest.fixture(scope="module")
def photographs():
    return _crops(128, 32, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_training_it_is_better_than_the_pseudo_inverse(photographs, name):
    physics, sigma_y = OUTSIDE[name]
    physics.set_noise_model(GaussianNoise(sigma_y, rng=seeded()))
    y = physics(photographs)
    sample = UD2M.from_pretrained("photos")(y, physics, generator=seeded())
    assert bool(sample.isfinite().all())
    pseudo_inverse = physics.A_dagger(y).clamp(0, 1)
    psnr = dinv.metric.PSNR()
    assert bool((psnr(sample, photographs) > psnr(pseudo_inverse, photographs)).all())


@pytest.mark.slow
def test_samples_agree_where_pixels_are_known(photographs):
    mask = random_mask(0.3)
    physics = Inpainting(SHAPE, mask=mask, noise_model=GaussianNoise(0.01, rng=seeded()))
    samples = UD2M.from_pretrained("photos").sample(physics(photographs), physics, 4, generator=seeded())
    std, known = samples.std(0), mask.bool().expand_as(photographs)
    assert std[known].mean() < 0.02  # twice the noise
    assert std[~known].mean() > 2 * std[known].mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["deblur-motion-valid", "deblur-motion-reflect", "grey-ct30", "grey-mri-coils"]
)
def test_the_tolerance_of_the_prox_does_not_matter(task):
    """Where the prox iterates, samples are within 0.05 dB of those of a tightly solved one."""
    x, model, psnr = _crops(64, 64, 96), UD2M.from_pretrained("photos"), dinv.metric.PSNR()
    truth = x.mean(1, keepdim=True) if "grey" in task else x
    for sigma_y in (0.01, 0.05):
        physics = make_physics(task, tuple(x.shape[1:]), sigma_y)
        physics.noise_model.rng = seeded()
        y, found = physics(x), []
        for tol in (0.01, 1e-5):
            model.unfolded.tol = tol
            sample = model(y, physics, generator=seeded())
            found.append(psnr(sample.mean(1, keepdim=True) if "grey" in task else sample, truth))
        assert bool(((found[0] - found[1]).abs() < 0.05).all()), (sigma_y, found)
