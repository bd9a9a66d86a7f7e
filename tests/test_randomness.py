"""One stream per sample: what a sample depends on, and what it must not depend on."""

import pytest
import torch
from conftest import seeded
from deepinv.physics import GaussianNoise, Inpainting
from torch import nn

from deepinv_ud2m import UD2M, UnfoldedDenoiser
from deepinv_ud2m.randomness import SampleStreams, draw_seeds, randn

# Convolutions sum in another order for another batch size, and the conjugate gradients of the initial
# estimate, which stop early, amplify that; nothing else may differ.
CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture
def physics():
    return Inpainting((1, 32, 32), mask=0.5, noise_model=GaussianNoise(0.1), rng=seeded(0))


@pytest.fixture
def y(physics):
    return physics(torch.rand(3, 1, 32, 32, generator=seeded(1)))


@pytest.fixture
def model(tiny_prior):
    return UD2M(UnfoldedDenoiser(tiny_prior, num_iterations=2), num_steps=3)


@pytest.mark.parametrize("seed", [0, 2**40])
@pytest.mark.parametrize(("images", "sizes"), [(3, (1, 6, 14, 100)), (1, (1, 2, 3))])
def test_samples_do_not_depend_on_the_split(model, y, physics, images, sizes, seed):
    y = y[:images]
    whole = model.sample(y, physics, 5, generator=seeded(seed))
    for batch_size in sizes:
        split = model.sample(y, physics, 5, batch_size=batch_size, generator=seeded(seed))
        torch.testing.assert_close(split, whole, **CLOSE)


def test_batch_size_bounds_the_batches(model, y, physics, tiny_prior):
    seen = []
    tiny_prior.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for batch_size, largest in [(None, 15), (15, 15), (14, 12), (6, 6), (3, 3), (1, 3)]:
        seen.clear()
        model.sample(y, physics, 5, batch_size=batch_size)
        assert max(seen) == largest
        assert sum(seen) == 5 * 3 * 3 * 2


def test_samples_of_one_call_differ(model, y, physics):
    # The three measurements are the same here: images of a batch must differ too.
    samples = model.sample(y[:1].expand(3, -1, -1, -1), physics, 4, generator=seeded(0)).flatten(0, 1)
    distances = torch.cdist(samples.flatten(1), samples.flatten(1), p=1) / samples[0].numel()
    assert distances[~torch.eye(12, dtype=torch.bool)].min() > 1e-3


def test_a_generator_moves_on_and_is_the_only_source(model, y, physics):
    generator, draws = seeded(0), []
    samples = [model(y, physics, generator=given) for given in (generator, generator, seeded(1))]
    for i in range(3):
        assert (samples[i] - samples[i - 1]).abs().mean() > 1e-3
    assert torch.equal(model.sample(y, physics, 1, generator=seeded(0))[0], samples[0]), "one sample"
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.sample(y, physics, 2))
    assert torch.equal(draws[0], draws[1])
    assert (draws[0] - draws[2]).abs().mean() > 1e-3
    before = torch.get_rng_state()
    model.sample(y, physics, 2, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_does_not_depend_on_the_others(model, y, physics):
    batch = model(y, physics, generator=seeded(0))
    others = torch.cat([y[:1], physics(torch.rand(2, 1, 32, 32, generator=seeded(9)))])
    torch.testing.assert_close(model(others, physics, generator=seeded(0))[0], batch[0], **CLOSE)
    # Image i of a batch and sample i of a single image have the same stream.
    for i in range(3):
        alone = model.sample(y[i : i + 1], physics, i + 1, generator=seeded(0))
        torch.testing.assert_close(alone[i, 0], batch[i], **CLOSE)


@pytest.mark.parametrize("num_steps", [1, 3, 4])
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_nfe_is_steps_times_iterations(tiny_prior, y, physics, num_steps, num_iterations):
    model = UD2M(Wasteful(tiny_prior, calls=5), num_steps)  # which says nothing about its calls
    model.sample(y, physics, 3, batch_size=3)
    assert model.nfe == 5 * num_steps and not tiny_prior._forward_hooks
    model = UD2M(UnfoldedDenoiser(tiny_prior, num_iterations), num_steps)
    assert model.nfe is None
    for num_samples, batch_size in [(1, None), (3, None), (3, 3), (3, 6)]:
        model.sample(y, physics, num_samples, batch_size=batch_size)
        assert model.nfe == num_steps * num_iterations


class Wasteful(nn.Module):
    """Calls its denoiser ``calls`` times per level and says nothing about it."""

    def __init__(self, denoiser, calls):
        super().__init__()
        self.denoiser, self.calls = denoiser, calls
        self.networks = [denoiser]

    def draw(self, problem, x_s, sigma, *, generator=None):
        for _ in range(self.calls):
            x = self.denoiser(x_s, sigma)
        return x + 0.1 * randn(x, generator)


@pytest.mark.parametrize("block", [1, 2, 4, 7])
def test_streams_do_not_depend_on_the_split(block):
    like = torch.zeros(5, 1, 4, 4)
    whole = SampleStreams(range(5), "cpu", block)
    parts = [SampleStreams([0], "cpu", block), SampleStreams([1, 2, 3, 4], "cpu", block)]
    for _ in range(9):
        together = randn(like, whole)
        apart = torch.cat([randn(like[:1], parts[0]), randn(like[1:], parts[1])])
        assert torch.equal(together, apart)


@pytest.mark.filterwarnings("ignore:.*times the noise level")
@pytest.mark.parametrize("draws", [1, 2, 3, 5])
def test_blocks_of_any_size_serve_any_number_of_draws(tiny_prior, y, physics, draws):
    class Draws(Wasteful):
        num_iterations = 2  # so blocks of 3, whatever is drawn

        def draw(self, problem, x_s, sigma, *, generator=None):
            for _ in range(draws):
                x_s = x_s + 0.1 * randn(x_s, generator)
            return self.denoiser(x_s, sigma)

    model = UD2M(Draws(tiny_prior, 1))
    whole = model.sample(y, physics, 4, generator=seeded(0))
    split = model.sample(y, physics, 4, batch_size=6, generator=seeded(0))
    torch.testing.assert_close(split, whole, **CLOSE)


@pytest.mark.parametrize("block", [1, 3])
def test_streams_are_independent_standard_normal(block):
    streams = SampleStreams(draw_seeds(4, seeded(0)), "cpu", block)
    like = torch.zeros(4, 1, 50, 50)
    noise = torch.stack([randn(like, streams) for _ in range(6)], 1).reshape(24, -1)
    # 24 x 2500 draws: 5 standard errors. Two streams, or two draws of one, do not correlate.
    n = noise.shape[1]
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 5 * (2 / noise.numel()) ** 0.5
    correlation = torch.corrcoef(noise) - torch.eye(24)
    assert correlation.abs().max() < 6 / n**0.5


def test_streams_give_what_is_asked_for_or_refuse():
    streams = SampleStreams([0, 1], "cpu", block=3)
    assert randn(torch.zeros(2, 1, 4, 4), streams).dtype == torch.float32
    assert randn(torch.zeros(2, 1, 4, 4, dtype=torch.float64), streams).dtype == torch.float64
    with pytest.raises(ValueError, match="2 random streams but 3 images"):
        randn(torch.zeros(3, 1, 4, 4), streams)
    with pytest.raises(ValueError, match=r"images of shape \[2, 1, 4, 4\], got \[2, 1, 8, 8\]"):
        randn(torch.zeros(2, 1, 8, 8), streams)


def test_seeds_and_noise_without_streams():
    like = torch.zeros(2, 3, dtype=torch.float64)
    expected = torch.randn(2, 3, generator=seeded(0), dtype=like.dtype)
    torch.manual_seed(0)
    assert torch.equal(randn(like, seeded(0)), expected) and torch.equal(randn(like), expected)
    assert draw_seeds(5, seeded(0)) == draw_seeds(5, seeded(0))
    assert draw_seeds(5, seeded(0))[:2] == draw_seeds(2, seeded(0))
    assert len(set(draw_seeds(1000, seeded(0)))) == 1000
