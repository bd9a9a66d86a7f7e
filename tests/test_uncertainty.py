"""Intervals, conformal calibration and the line to the mean, against laws that are known; with another seed,
an honest implementation fails each test with a probability of at most 1e-3."""

import pytest
import scipy.stats
import torch
from conftest import refused, seeded

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.physics import make_generator, make_physics
from deepinv_ud2m.uncertainty import Conformal, inside, plot, summary, toward_mean


def posteriors(num_images, num_samples, scale=1.0, seed=0, shape=(1, 4, 4)):
    """Truth and samples around the same means; the spread of samples is ``scale`` times that of the truth."""
    generator = seeded(seed)
    mean = torch.randn(num_images, *shape, generator=generator)
    spread = torch.randn(num_images, 1, 1, 1, generator=generator).exp()
    draws = torch.randn(num_samples + 1, num_images, *shape, generator=generator)
    return mean + scale * spread * draws[1:], mean + spread * draws[0]


@pytest.mark.parametrize("count, level", [(19, 0.9), (39, 0.9), (3, 0.5), (9, 0.6), (12, 0.5)])
def test_intervals_of_an_exact_sampler_cover_as_they_say(count, level):
    samples, x = posteriors(4000, count, seed=count)
    found = summary(samples, x, level)
    bound = scipy.stats.norm.isf(5e-4) * found.coverage.std() / 4000**0.5
    if (count, level) == (12, 0.5):  # between ranks, by interpolation, which is not exact
        bound = 0.02
    assert abs(found.coverage.mean() - level) < bound
    assert torch.equal(found.mean, samples.mean(0)) and torch.equal(found.std, samples.std(0))
    assert found.spread_skill_ratio.square().mean().sqrt() == pytest.approx(1, abs=0.05)


def test_summary_by_hand():
    samples = torch.arange(1.0, 20).reshape(-1, 1, 1, 1, 1)[torch.randperm(19, generator=seeded(0))]
    found = summary(samples)
    assert (found.low.item(), found.high.item()) == pytest.approx((1, 19))  # ranks 0.05 * 20 and 0.95 * 20
    found = summary(samples, level=0.75)
    assert (found.low.item(), found.high.item()) == pytest.approx((2.5, 17.5))
    assert found.coverage is None and found.spread_skill_ratio is None


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("pool", [1, 2])
def test_conformal_intervals_cover_whatever_the_sampler(scale, pool):
    covered, trials, count = [], 300, 20
    for seed in range(trials):
        samples, x = posteriors(count + 10, 6, scale, seed)
        conformal = Conformal.from_samples(samples[:, :count], x[:count], pool=pool)
        truth = torch.nn.functional.avg_pool2d(x, pool)
        covered.append(inside(truth[count:], *conformal.interval(samples[:, count:])).mean())
    covered = torch.stack(covered)
    noise = scipy.stats.norm.isf(5e-4) * covered.std() / trials**0.5
    # At least the level, and no more than conformal risk control costs: 1 / (n + 1) for losses in [0, 1]
    assert 0.9 - noise < covered.mean() < 0.9 + 1 / (count + 1) + noise


def test_conformal_factor_is_the_smallest_that_keeps_the_risk():
    samples, x = posteriors(20, 5, seed=3)
    conformal = Conformal.from_samples(samples, x, level=0.8)

    def risk(factor):
        low, high = Conformal(factor, 0.8, 1, 5).interval(samples)
        return (1 + (1 - inside(x, low, high)).sum()) / 21

    assert risk(conformal.factor * (1 + 1e-5)) <= 0.2 < risk(conformal.factor * (1 - 1e-4))


def test_conformal_of_a_sampler_on_digits():
    """Samples that are moved towards their mean are over-confident; the factor makes up for it."""
    model, shape = UD2M.from_pretrained("mnist"), (1, 32, 32)
    physics = make_physics("sr4", shape)
    generator = make_generator("sr4", shape, sigma_y=(0.05, 0.05), seed=0)
    torch.manual_seed(0)  # of the noise
    options = {"num_samples": 4, "physics_generator": generator, "generator": seeded(0)}
    conformal = Conformal.fit(model, mnist_digits("validation", num=16), physics, **options)
    assert (conformal.num_samples, conformal.level, conformal.pool) == (4, 0.9, 1)
    x = mnist_digits("test", num=16)
    physics.update(**generator.step(16))
    samples = model.sample(physics(x), physics, 4, generator=seeded(1))
    # Shares of images spread by 0.05, and the expected one is 0.9 to 0.96
    assert inside(x, *conformal.interval(samples)).mean() == pytest.approx(0.93, abs=0.06)


def test_a_black_background_without_spread_has_intervals_of_the_rounding():
    samples, x = torch.zeros(4, 20, 1, 4, 4), torch.zeros(20, 1, 4, 4)
    x[0, 0, 0, 0] = 1.0  # one pixel of 320
    conformal = Conformal.from_samples(samples, x)
    low, high = conformal.interval(samples)
    assert high.max() < 1e-2 and low.min() > -1e-2


def test_toward_mean_scales_the_spread():
    samples, x = posteriors(3, 5)
    moved = toward_mean(samples, 0.25)
    assert torch.allclose(moved.mean(0), samples.mean(0), atol=1e-5)
    assert torch.allclose(moved.std(0), 0.25 * samples.std(0), atol=1e-5)
    assert torch.allclose(toward_mean(samples, 1), samples, atol=1e-5)
    assert torch.equal(toward_mean(samples, 0), samples.mean(0).expand_as(samples))
    # D(a) = D(0) + a^2 (D(1) - D(0)), where errors and deviations are those of all samples
    errors = [(toward_mean(samples, a) - x).square().mean() for a in (0, 0.25, 1)]
    assert errors[1] == pytest.approx((errors[0] + 0.0625 * (errors[2] - errors[0])).item(), rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_plot_shows_error_and_deviation_on_one_scale(channels):
    import matplotlib.pyplot as plt

    samples, x = posteriors(2, 4, shape=(channels, 4, 6))
    figure = plot(samples, x, x[..., ::2, ::2], shown=2)
    axes = [axis for axis in figure.axes if axis.images and axis.get_label() != "<colorbar>"]
    titles = [axis.get_title() for axis in axes if axis.get_title()]
    assert titles == [
        *("truth", "measurement", "sample 1", "sample 2"),
        *("mean of 4", "standard deviation", "|error| of the mean"),
    ]
    maps = [axis.images[0] for row in (axes[:7], axes[7:]) for axis in row[-2:]]
    assert len({image.get_clim() for image in maps}) == 1
    deviation = samples[:, 1].var(0).mean(0).sqrt()
    assert torch.allclose(torch.as_tensor(axes[12].images[0].get_array().data), deviation)
    plt.close(figure)
    figure = plot(samples, std_max=0.2)
    assert [axis.get_title() for axis in figure.axes if axis.get_title()][-1] == "standard deviation"
    plt.close(figure)


SAMPLES, TRUTH = posteriors(9, 4)


def test_bad_arguments_are_refused():
    refused(
        (lambda: summary(SAMPLES), "samples must be at least 19 for intervals of level 0.9"),
        (lambda: summary(SAMPLES, level=1.0), "level must be in"),
        (lambda: summary(SAMPLES, TRUTH[1:], 0.5), "x must be"),
        (lambda: Conformal.from_samples(SAMPLES[:, :8], TRUTH[:8]), "images must be at least 9"),
        (lambda: Conformal.from_samples(SAMPLES[:1], TRUTH), "samples must be at least 2"),
        (lambda: Conformal.from_samples(SAMPLES, TRUTH, pool=5), "pool must be at most"),
        (lambda: Conformal(1.0).interval(SAMPLES), "samples must be 16 of each image"),
        (lambda: Conformal(0.0), "factor must be positive"),
        (lambda: toward_mean(SAMPLES, 1.5), "a must be in"),
        (lambda: plot(SAMPLES.expand(-1, -1, 2, -1, -1)), "one or three channels"),
        (lambda: plot(SAMPLES, y=TRUTH.flatten(1)), "y must be 9 images"),
        (lambda: Conformal.fit(None, TRUTH[:3], None), "images must be at least 9"),
        (lambda: Conformal.fit(None, TRUTH, None, num_samples=1), "num_samples must be at least 2"),
    )


def test_nine_images_are_enough_for_nine_of_ten():
    conformal = Conformal.from_samples(SAMPLES, TRUTH)
    assert inside(TRUTH, *conformal.interval(SAMPLES)).min() == 1  # the factor is the largest score


def test_intervals_are_stored_with_a_sampler(sampler_folder, tiny_folder, tmp_path):
    model = UD2M.from_pretrained(sampler_folder)
    assert model.conformal == {}
    model.conformal["sr4"] = Conformal(1.25, 0.8, 2, 8)
    model.save_pretrained(tmp_path / "with", prior=str(tiny_folder))
    assert UD2M.from_pretrained(tmp_path / "with").conformal == {"sr4": Conformal(1.25, 0.8, 2, 8)}
    refused(
        (lambda: UD2M(model.unfolded, conformal={"sr4": 1.25}), TypeError, "conformal must be"),
        (lambda: UD2M(model.unfolded, conformal={"sr4": {"factr": 1}}), TypeError, "factr"),
        (lambda: UD2M(model.unfolded, conformal={"sr4": {"factor": -1}}), "factor must be positive"),
    )
