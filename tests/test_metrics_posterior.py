"""Metrics of several posterior samples, against closed forms and double loops; with another seed, an honest
implementation fails each test with a probability of at most 1e-3."""

import itertools
import math

import deepinv as dinv
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from conftest import refused, seeded

from deepinv_ud2m.metrics import (
    coverage,
    coverage_curve,
    coverage_error,
    coverage_error_quantile,
    crps,
    energy_score,
    rank,
    reduced_chi_square,
    spread_skill_ratio,
)

FALSE_ALARM = 1e-3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def within_noise(values, expected):
    """Is the mean of independent values what is expected, up to a false alarm in 1000?"""
    values = values.flatten().double()
    bound = scipy.stats.norm.isf(FALSE_ALARM / 2) * values.std() / len(values) ** 0.5
    return (values.mean() - expected).abs() < bound


def inpainting(shape, kept, sigma=0.1):
    mask = torch.rand(1, *shape, generator=seeded(0)) < kept
    noise_model = dinv.physics.GaussianNoise(sigma)
    return dinv.physics.Inpainting(shape, mask=mask.float(), noise_model=noise_model)


@pytest.fixture(scope="module")
def images():
    return randn(5, 3, 2, 3, 4, seed=1), randn(3, 2, 3, 4, seed=2)


def posteriors(num_images, num_samples, seed=0, shape=(1, 2, 3)):
    """Gaussian posteriors of differing means and scales, correlated pixels: samples, truth and means."""
    dim = math.prod(shape)
    factor = randn(dim, dim, seed=seed + 100)
    scale = randn(num_images, 1, seed=seed + 200).exp()
    mean = 5 * randn(num_images, dim, seed=seed + 300)
    draws = mean + scale * (randn(num_samples + 1, num_images, dim, seed=seed + 400) @ factor)
    draws = draws.reshape(-1, num_images, *shape)
    return draws[1:], draws[0], mean.reshape(num_images, *shape)


def brute_force(samples, x, norm):
    """The scores as they are defined, on arrays [S, ...] and [...]."""
    num = len(samples)
    near = sum(norm(sample - x) for sample in samples) / num
    pairs = itertools.permutations(range(num), 2)
    apart = sum(norm(samples[s] - samples[t]) for s, t in pairs) / (num * (num - 1))
    return near - apart / 2


@pytest.mark.parametrize("num", [2, 5])
def test_scores_against_double_loops(images, num):
    samples, x = images[0][:num], images[1]
    for i in range(3):
        s, t = samples[:, i].numpy(), x[i].numpy()
        assert energy_score(samples, x)[i].item() == pytest.approx(brute_force(s, t, np.linalg.norm))
        assert crps(samples, x)[i].item() == pytest.approx(brute_force(s, t, np.abs).mean())
    pixel, truth = samples[..., :1, :1, :1], x[..., :1, :1, :1]
    torch.testing.assert_close(energy_score(pixel, truth), crps(pixel, truth))


@pytest.mark.parametrize("num", [2, 3, 16])
def test_crps_of_gaussian(num):
    # CRPS(N(0, s^2), x) = s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)) with z = x / s.
    std, shifts = 0.3, torch.tensor([-0.5, 0.0, 0.2], dtype=torch.float64)
    x = shifts[:, None, None, None].expand(3, 1, 1, 1).repeat(2000, 1, 1, 1)
    scores = crps(std * randn(num, *x.shape, seed=num), x).reshape(2000, 3)
    z = (shifts / std).numpy()
    phi, cdf = scipy.stats.norm.pdf(z), scipy.stats.norm.cdf(z)
    expected = std * (z * (2 * cdf - 1) + 2 * phi - math.pi**-0.5)
    assert all(within_noise(scores[:, i], expected[i]) for i in range(3))


@pytest.mark.parametrize("num", [2, 16])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_energy_score_of_gaussian(num, shift):
    # |X - x| has a noncentral chi distribution, |X - X'| / sqrt(2) a chi distribution.
    shape, std = (1, 2, 3), 0.5
    dim = math.prod(shape)
    x = torch.full((2000, *shape), shift, dtype=torch.float64)
    scores = energy_score(std * randn(num, *x.shape, seed=num), x)
    chi = math.sqrt(2) * math.gamma((dim + 1) / 2) / math.gamma(dim / 2)
    noncentral = chi * scipy.special.hyp1f1(-0.5, dim / 2, -dim * (shift / std) ** 2 / 2)
    assert within_noise(scores, std * (noncentral - chi / math.sqrt(2)))


def test_exact_sampler_scores_best():
    x, samples = randn(400, 1, 3, 3, seed=3), randn(8, 400, 1, 3, 3, seed=4)
    for score in (energy_score, crps):
        exact = score(samples, x)
        for other in (0.5 * samples, 1.5 * samples, samples + 0.5, 0 * samples):
            difference = score(other, x) - exact
            assert difference.mean() > 5 * difference.std() / len(x) ** 0.5
    # Of samples whose pixels are right one by one but not together, only the energy score knows.
    x, samples = x[:, :, :1, :1].expand(-1, 1, 3, 3), samples[..., :1, :1].expand(-1, -1, 1, 3, 3)
    shuffled = torch.stack([samples[..., 0, 0].roll(shift, 0) for shift in range(9)], -1)
    shuffled = shuffled.reshape(samples.shape)  # each pixel from another sample
    torch.testing.assert_close(crps(shuffled, x).mean(), crps(samples, x).mean())
    assert energy_score(shuffled, x).mean() > energy_score(samples, x).mean() + 0.2


def test_scores_in_low_precision_and_far_from_zero(images):
    samples, x = images
    for score in (energy_score, crps):
        assert score(samples, x).dtype == torch.float64
        assert score(samples.half(), x.half()).dtype == torch.float32
        far = score((1e3 + samples).float(), (1e3 + x).float())
        torch.testing.assert_close(far.double(), score(samples, x), rtol=1e-3, atol=1e-3)


def test_scores_have_gradients(images):
    samples, x = images
    for score in (energy_score, crps):
        free = samples.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s, score=score: score(s, x), free)
        # Where samples coincide with each other and with the truth, too.
        equal = x.expand(3, *x.shape).clone().requires_grad_()
        score(equal, x).sum().backward()
        assert equal.grad.isfinite().all()


@pytest.mark.parametrize("num", [2, 4, 32])
def test_spread_skill_ratio(num):
    """1 for an exact sampler of any number of samples; its bound is five standard errors."""
    scale = 0.5 + torch.rand(4000, 1, 1, 1, generator=seeded(0))
    x, samples = scale * randn(4000, 1, 2, 2, seed=1), scale * randn(num, 4000, 1, 2, 2, seed=2)
    assert spread_skill_ratio(samples, x).item() == pytest.approx(1, abs=0.05)
    # Of one scale, errors and variances are known: b^2 + (1 + 1/S) over (1 + 1/S) c^2.
    x, samples = randn(4000, 1, 2, 2, seed=1), randn(num, 4000, 1, 2, 2, seed=2)
    biased = spread_skill_ratio(samples + 2, x).item()
    assert biased == pytest.approx((1 + 4 / (1 + 1 / num)) ** 0.5, abs=0.05)
    assert spread_skill_ratio(2 * samples, 2 * x).item() == pytest.approx(1, abs=0.05)
    wide = spread_skill_ratio(2 * samples, x).item()
    assert wide == pytest.approx(((1 + 4 / num) / (4 + 4 / num)) ** 0.5, abs=0.05)
    assert spread_skill_ratio(0 * samples, x) == math.inf
    # By hand: squared errors 4 and 0 of the means, variances 1 and 1, over 1 + 1/3.
    samples = torch.tensor([[0.0, 3.0], [2.0, 5.0], [1.0, 4.0]])[..., None, None, None]
    x = torch.tensor([3.0, 4.0])[:, None, None, None]
    assert spread_skill_ratio(samples, x).item() == pytest.approx((2 / (4 / 3)) ** 0.5)


def test_rank_against_leave_one_out_loop():
    samples, x, _ = posteriors(20, 7)
    intervals = rank(samples, x)
    for i in range(20):
        points = [x[i], *samples[:, i]]
        means = [torch.stack(points[:k] + points[k + 1 :]).mean(0) for k in range(8)]
        distances = [(mean - point).norm() for mean, point in zip(means, points, strict=True)]
        smaller = int(sum(d < distances[0] for d in distances))
        assert intervals[i].tolist() == pytest.approx([smaller / 8, (smaller + 1) / 8])


@pytest.mark.parametrize("num", [2, 3, 16])
def test_ranks_of_exact_sampler_are_uniform(num):
    # Few samples, where a mean that the samples have drawn to themselves would show most.
    samples, x, _ = posteriors(4000, num, seed=num)
    ranks = (rank(samples, x)[:, 0] * (num + 1)).round().long()
    counts = torch.bincount(ranks, minlength=num + 1)
    assert len(counts) == num + 1
    assert scipy.stats.chisquare(counts.numpy()).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("num_images", "num_samples"), [(64, 16), (256, 64)])
def test_exact_sampler_is_calibrated_and_others_are_not(num_images, num_samples):
    samples, x, mean = posteriors(num_images, num_samples, seed=7)
    noise = coverage_error_quantile(num_images, num_samples, 1 - FALSE_ALARM)
    levels, shares = coverage(samples, x)
    assert levels.tolist() == pytest.approx([k / (num_samples + 1) for k in range(1, num_samples + 1)])
    assert coverage_error(levels, shares) < noise
    for scale, sign in ((2, 1), (0.5, -1)):
        levels, shares = coverage(mean + scale * (samples - mean), x)
        assert coverage_error(levels, shares) > noise
        assert (sign * (shares - levels) > 0).double().mean() > 0.9
    assert coverage_error(*coverage(samples + 1.5 * samples.std(0), x)) > noise


def test_exact_posterior_of_a_physics_is_calibrated(gaussian_problem):
    # Truth and noise anew for each image, samples from the closed-form posterior of its measurement.
    physics = inpainting((1, 4, 4), 0.5)
    problem = gaussian_problem(physics, (1, 4, 4))
    num_images, num_samples = 128, 16
    x = problem.mean + randn(num_images, 16, seed=1) @ torch.linalg.cholesky(problem.covariance).T
    y = x @ problem.A.T + 0.1 * randn(num_images, 16, seed=2)
    covariance = problem.posterior()[1]
    mean = (torch.linalg.inv(problem.covariance) @ problem.mean + y @ problem.A / 0.01) @ covariance
    samples = mean + randn(num_samples, num_images, 16, seed=3) @ torch.linalg.cholesky(covariance).T
    x, samples = x.reshape(-1, 1, 4, 4), samples.reshape(num_samples, -1, 1, 4, 4)
    noise = coverage_error_quantile(num_images, num_samples, 1 - FALSE_ALARM)
    assert coverage_error(*coverage(samples, x)) < noise
    # On half of the pixels, and in a space that is not linear, an exact sampler is exact as well.
    assert coverage_error(*coverage(samples, x, features=lambda z: z[..., :2].flatten(1))) < noise
    assert coverage_error(*coverage(samples, x, features=lambda z: z.flatten(1).square())) < noise
    # And its samples fit the measurement as well as the truth does: all of them are independent of
    # one another only across images.
    ratio = reduced_chi_square(samples, (y * (problem.A.sum(1) > 0)).reshape(-1, 1, 4, 4), physics)
    assert within_noise(ratio.mean(0), 1)


def test_coverage_in_a_feature_space():
    samples, x, _ = posteriors(30, 9)
    row = coverage(samples[:, :, :, :1], x[:, :, :1])[1]
    assert not torch.equal(row, coverage(samples, x)[1])
    torch.testing.assert_close(coverage(samples, x, features=lambda z: z[:, :, 0].flatten(1))[1], row)


def test_coverage_of_equal_distances():
    x = torch.rand(6, 1, 2, 2, generator=seeded(0))
    # The exact posterior of a problem without uncertainty: calibrated, at any level.
    certain = x.expand(4, *x.shape)
    assert (rank(certain, x) == torch.tensor([0.0, 1.0])).all()
    levels = torch.linspace(0, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(coverage_curve(rank(certain, x), levels), levels)
    # A point estimate that is wrong: the truth is always outside.
    intervals = rank(certain + 0.1, x)
    torch.testing.assert_close(intervals, torch.tensor([[0.8, 1.0]], dtype=torch.float64).expand(6, 2))
    assert (coverage(certain + 0.1, x)[1] == 0).all()


def test_coverage_between_the_levels_of_the_samples():
    samples, x, _ = posteriors(40, 3)
    intervals = rank(samples, x)
    knots = coverage_curve(intervals, torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert knots[0] == 0 and knots[-1] == 1
    between = coverage_curve(intervals, torch.linspace(0, 1, 9))
    torch.testing.assert_close(between[1::2], (knots[1:] + knots[:-1]) / 2)
    # So the error at the levels of the samples is that at all levels.
    levels = torch.linspace(0, 1, 1001)
    fine = coverage_error(levels, coverage_curve(intervals, levels))
    assert fine.item() == pytest.approx(coverage_error(*coverage(samples, x)).item())


def test_coverage_from_stored_intervals_and_by_hand():
    samples, x, _ = posteriors(12, 4)
    parts = [rank(samples[:, i : i + 5], x[i : i + 5]) for i in (0, 5, 10)]
    levels, shares = coverage(samples, x)
    torch.testing.assert_close(coverage_curve(torch.cat(parts), levels), shares)
    by_hand = coverage_curve(torch.tensor([[0, 0.5], [0.5, 1], [0, 1]]), torch.tensor([0.25, 0.5]))
    assert by_hand.tolist() == pytest.approx([(0.5 + 0 + 0.25) / 3, (1 + 0 + 0.5) / 3])
    assert coverage_error([0.2, 0.5, 0.8], [0.3, 0.2, 0.9]).item() == pytest.approx(0.3)
    assert coverage_error([0.5], [0.5]) == 0


def test_noise_by_enumeration():
    # All 4^3 rank vectors of 3 images with 3 samples.
    errors = []
    for ranks in itertools.product(range(4), repeat=3):
        shares = [sum(r < k for r in ranks) / 3 for k in (1, 2, 3)]
        errors.append(max(abs(share - k / 4) for share, k in zip(shares, (1, 2, 3), strict=True)))
    errors = np.array(errors)
    for probability in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        quantile = coverage_error_quantile(3, 3, probability)
        assert (errors < quantile).mean() >= probability
        # The next smaller error is too small.
        assert (errors < quantile - 1 / 12).mean() < probability


@pytest.mark.parametrize(("num_images", "num_samples"), [(16, 2), (64, 16), (256, 64)])
def test_noise_by_simulation(num_images, num_samples):
    rng = np.random.default_rng(0)
    ranks = rng.integers(num_samples + 1, size=(4000, num_images))
    counts = np.stack([np.bincount(row, minlength=num_samples + 1) for row in ranks])
    levels = np.arange(1, num_samples + 1) / (num_samples + 1)
    errors = np.abs(counts.cumsum(1)[:, :-1] / num_images - levels).max(1)
    step = 1 / (num_images * (num_samples + 1))
    slack = scipy.stats.norm.isf(FALSE_ALARM / 2) * 0.5 / 4000**0.5
    for probability in (0.5, 0.95):
        quantile = coverage_error_quantile(num_images, num_samples, probability)
        assert (errors < quantile).mean() > probability - slack
        assert (errors < quantile - step).mean() < probability + slack


def test_noise_for_many_samples_is_that_of_kolmogorov():
    for num_images in (20, 200):
        expected = scipy.stats.kstwo.ppf(0.95, num_images)
        assert coverage_error_quantile(num_images, 5000) == pytest.approx(expected, rel=5e-3)
        assert coverage_error_quantile(num_images, 8) < expected
    assert coverage_error_quantile(5000, 100) == pytest.approx(1.358 / 5000**0.5, rel=0.05)


def some_physics(sigma=0.1):
    noise = {"noise_model": dinv.physics.GaussianNoise(sigma)}
    return {
        "denoising": dinv.physics.Denoising(**noise),
        "inpainting": inpainting((1, 8, 8), 0.3, sigma),
        "blur": dinv.physics.Blur(torch.ones(1, 1, 3, 3) / 9, padding="valid", **noise),
        "downsampling": dinv.physics.Downsampling((1, 8, 8), filter="bicubic", factor=2, **noise),
    }


@pytest.mark.parametrize("name", some_physics())
def test_chi_square_of_the_truth_is_that_of_the_noise(name):
    physics = some_physics()[name]
    x = torch.rand(300, 1, 8, 8, generator=seeded(0))
    ratio = reduced_chi_square(x[None], physics(x), physics)
    assert ratio.shape == (1, 300)
    assert within_noise(ratio, 1)
    num_measured = (physics.A(torch.ones_like(x[:1])) != 0).sum().item()
    assert ratio.std().item() == pytest.approx((2 / num_measured) ** 0.5, rel=0.2)


def test_chi_square_against_dense_matrix(gaussian_problem):
    kernel, noise_model = torch.ones(1, 1, 3, 3, dtype=torch.float64) / 9, dinv.physics.GaussianNoise(0.2)
    physics = dinv.physics.Blur(kernel, padding="valid", noise_model=noise_model)
    problem = gaussian_problem(physics, (1, 6, 6))
    samples = randn(3, 2, 1, 6, 6)
    ratio = reduced_chi_square(samples, problem.y.repeat(2, 1, 1, 1), physics)
    residual = samples.flatten(2) @ problem.A.T - problem.y.flatten()
    torch.testing.assert_close(ratio, residual.square().sum(2) / (len(problem.A) * 0.2**2))


def test_chi_square_of_per_image_levels_and_operators():
    x = torch.rand(2, 1, 4, 4, generator=seeded(0))
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, ..., :1], mask[1, ..., :3] = 1, 1
    noise_model = dinv.physics.GaussianNoise(torch.tensor([0.1, 0.4]))
    physics = dinv.physics.Inpainting((1, 4, 4), mask=mask, noise_model=noise_model)
    samples = torch.stack([x + 0.2, x - 0.4])
    expected = torch.tensor([[4.0, 0.25], [16.0, 1.0]])
    torch.testing.assert_close(reduced_chi_square(samples, physics.A(x), physics), expected)
    given = reduced_chi_square(samples, physics.A(x), physics, sigma_y=0.2)
    torch.testing.assert_close(given, torch.tensor([[1.0, 1.0], [4.0, 4.0]]))


def test_chi_square_of_stacks_floors_and_other_physics():
    x = torch.rand(2, 1, 8, 8, generator=seeded(0))
    denoising, inpainting, *_ = some_physics(0.1).values()
    stack = dinv.physics.StackedLinearPhysics([denoising, inpainting])
    ratio = reduced_chi_square((x + 0.1)[None], stack.A(x), stack)
    torch.testing.assert_close(ratio, torch.ones(1, 2))
    # Without noise the floor counts; entries that happen to be zero count for nonlinear physics.
    noise_model = dinv.physics.ZeroNoise()
    relu = dinv.physics.Physics(A=lambda z, **kwargs: (z - 0.5).relu(), noise_model=noise_model)
    ratio = reduced_chi_square(x[None] * 0, relu.A(x * 0) + 0.005, relu)
    torch.testing.assert_close(ratio, torch.ones(1, 2))


@pytest.mark.parametrize("metric", [energy_score, crps, spread_skill_ratio, coverage, rank])
def test_errors(metric):
    samples, x = torch.rand(4, 3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    for bad_samples, bad_x, message in [
        (samples[:1], x, "samples must be at least 2 of each image, got 1"),
        (samples[:, 0], x[0], r"samples must be \[S, B, C, H, W\]"),
        (samples[:, :0], x[:0], r"samples must be \[S, B, C, H, W\]"),
        (samples, x[:1], r"x must be \[3, 1, 2, 2\]"),
        (samples.transpose(0, 1), x, r"x must be \[4, 1, 2, 2\]"),
        (samples / 0, x, "samples must be finite"),
        (samples, x * torch.nan, "x must be finite"),
        (samples.long(), x, "samples must be .* real floating type, got torch.int64"),
        (samples, x + 0j, "x must be .* real floating type, got torch.complex64"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(bad_samples, bad_x)


def test_what_is_refused_of_coverage_and_chi_square():
    samples, x, half = torch.rand(4, 3, 1, 2, 2), torch.rand(3, 1, 2, 2), torch.tensor([0.5])
    physics, images = some_physics()["downsampling"], torch.rand(3, 2, 1, 8, 8)
    y, nothing = physics.A(images[0]), dinv.physics.Inpainting((1, 8, 8), mask=torch.zeros(1, 1, 8, 8))

    def call(function, *arguments, **options):
        return lambda: function(*arguments, **options)

    def chi(samples=images, y=y, physics=physics, **options):
        return lambda: reduced_chi_square(samples, y, physics, **options)

    intervals = [(torch.zeros(shape), "B, 2") for shape in ((0, 2), 3, (3, 3))]
    bad = ([0.5, 0.5], [0.5, 1.5], [-0.5, 1], [math.nan, 1])
    intervals += [(torch.tensor([interval]), "low < high") for interval in bad]
    levels = map(torch.tensor, ([-0.1, 0.5], [0.5, 1.1], [], 0.5, [math.nan]))
    refused(
        (call(coverage, samples, x, features=lambda z: z), "features must map"),
        (call(coverage, samples, x, features=lambda z: z.flatten(1) / 0), "features of samples .* finite"),
        (call(coverage_error, torch.zeros(3), torch.zeros(4)), "levels and shares"),
        *((call(coverage_curve, rank(samples, x), level), "levels must be") for level in levels),
        *((call(coverage_curve, interval, half), message) for interval, message in intervals),
        *((call(coverage_error_quantile, *counts), "num_") for counts in ((0, 4), (4, 0), (2.5, 4))),
        *((call(coverage_error_quantile, 4, 4, p), "probability") for p in (0, 1, math.nan)),
        (chi(y=y[:1]), "16 values for each of 2 images, but y has 16 for 1"),
        (chi(y=y[..., :3]), "but y has 12"),
        *((chi(y=wrong), "y must be real and finite") for wrong in (y / 0, y + 1j)),
        *((chi(sigma_y=level), "sigma_y must be positive") for level in (0.0, torch.tensor([0.1, 0.0]))),
        (chi(sigma_y=torch.ones(3)), "sigma_y must be a scalar or one value per image"),
        (chi(images[0]), r"\[S, B, C, H, W\]"),
        (chi(y=images[0], physics=nothing), "measures nothing"),
    )
