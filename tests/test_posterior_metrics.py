"""Metrics of several posterior samples, against closed forms and plain double loops.

Statistical tests have fixed seeds. Their bounds leave an honest implementation with another seed a
chance of failure of at most 1e-3 each, and the wrong ones that are tried none to speak of.
"""

import itertools
import math

import deepinv as dinv
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from deepinv_ud2m.metrics import (
    coverage,
    coverage_curve,
    coverage_error,
    coverage_error_quantile,
    credible_level,
    crps,
    energy_score,
    measurement_consistency,
)

FALSE_ALARM = 1e-3


def _randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _within_noise(values, expected):
    """Is the mean of independent values what is expected, up to a false alarm in 1000?"""
    values = values.flatten().double()
    bound = scipy.stats.norm.isf(FALSE_ALARM / 2) * values.std() / len(values) ** 0.5
    return (values.mean() - expected).abs() < bound


def _inpainting(shape, kept, sigma=0.1):
    mask = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) < kept
    return dinv.physics.Inpainting(
        shape, mask=mask.float(), noise_model=dinv.physics.GaussianNoise(sigma)
    )


def _rotation(dim, seed=5):
    return torch.linalg.qr(_randn(dim, dim, seed=seed))[0]


@pytest.fixture(scope="module")
def images():
    return _randn(5, 3, 2, 3, 4, seed=1), _randn(3, 2, 3, 4, seed=2)


# -- Proper scores --------------------------------------------------------------------------------


def _brute_force(samples, x, norm):
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
        assert energy_score(samples, x)[i].item() == pytest.approx(_brute_force(s, t, np.linalg.norm))
        assert crps(samples, x)[i].item() == pytest.approx(_brute_force(s, t, np.abs).mean())


def test_scores_agree_on_one_pixel(images):
    samples, x = images[0][..., :1, :1, :1], images[1][..., :1, :1, :1]
    torch.testing.assert_close(energy_score(samples, x), crps(samples, x))


@pytest.mark.parametrize("num", [2, 3, 16])
def test_crps_of_gaussian(num):
    # CRPS(N(0, s^2), x) = s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)) with z = x / s.
    std, shifts = 0.3, torch.tensor([-0.5, 0.0, 0.2], dtype=torch.float64)
    x = shifts[:, None, None, None].expand(3, 1, 1, 1).repeat(2000, 1, 1, 1)
    scores = crps(std * _randn(num, *x.shape, seed=num), x).reshape(2000, 3)
    z = (shifts / std).numpy()
    phi, cdf = scipy.stats.norm.pdf(z), scipy.stats.norm.cdf(z)
    expected = std * (z * (2 * cdf - 1) + 2 * phi - math.pi**-0.5)
    for i in range(3):
        assert _within_noise(scores[:, i], expected[i])


@pytest.mark.parametrize("num", [2, 16])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_energy_score_of_gaussian(num, shift):
    # |X - x| has a noncentral chi distribution, |X - X'| / sqrt(2) a chi distribution.
    shape, std = (1, 2, 3), 0.5
    dim = math.prod(shape)
    x = torch.full((2000, *shape), shift, dtype=torch.float64)
    scores = energy_score(std * _randn(num, *x.shape, seed=num), x)
    chi = math.sqrt(2) * math.gamma((dim + 1) / 2) / math.gamma(dim / 2)
    noncentral = chi * scipy.special.hyp1f1(-0.5, dim / 2, -dim * (shift / std) ** 2 / 2)
    assert _within_noise(scores, std * (noncentral - chi / math.sqrt(2)))


def test_exact_sampler_scores_best():
    x, samples = _randn(400, 1, 3, 3, seed=3), _randn(8, 400, 1, 3, 3, seed=4)
    worse = [0.5 * samples, 1.5 * samples, samples + 0.5, 0 * samples]
    for score in (energy_score, crps):
        exact = score(samples, x)
        for other in worse:
            difference = score(other, x) - exact
            assert difference.mean() > 5 * difference.std() / len(x) ** 0.5
    # Of samples whose pixels are right one by one but not together, only the energy score knows.
    x, samples = x[:, :, :1, :1].expand(-1, 1, 3, 3), samples[..., :1, :1].expand(-1, -1, 1, 3, 3)
    shifts = range(9)  # each pixel from another sample
    shuffled = torch.stack([samples[..., 0, 0].roll(shift, 0) for shift in shifts], -1)
    shuffled = shuffled.reshape(samples.shape)
    torch.testing.assert_close(crps(shuffled, x).mean(), crps(samples, x).mean())
    assert energy_score(shuffled, x).mean() > energy_score(samples, x).mean() + 0.2


def test_scores_under_transformations(images):
    samples, x = images
    rotation = _rotation(24)
    rotated = (samples.flatten(2) @ rotation).reshape(samples.shape)
    for score in (energy_score, crps):
        torch.testing.assert_close(score(samples.flip(0), x), score(samples, x))
        torch.testing.assert_close(score(samples.flip(1), x.flip(0)), score(samples, x).flip(0))
        torch.testing.assert_close(score(3 - 2 * samples, 3 - 2 * x), 2 * score(samples, x))
        assert (score(x.expand(4, *x.shape), x) == 0).all()
    rotated_x = (x.flatten(1) @ rotation).reshape(x.shape)
    torch.testing.assert_close(energy_score(rotated, rotated_x), energy_score(samples, x))


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
        assert torch.autograd.gradcheck(
            lambda s, score=score: score(s, x), samples.clone().requires_grad_()
        )
        # Where samples coincide with each other and with the truth, too.
        equal = x.expand(3, *x.shape).clone().requires_grad_()
        score(equal, x).sum().backward()
        assert equal.grad.isfinite().all()


# -- Coverage -------------------------------------------------------------------------------------


def _problem(num_images, num_samples, seed=0, shape=(1, 2, 3)):
    """Gaussian posteriors of differing means and scales, correlated pixels: truth and exact samples."""
    dim = math.prod(shape)
    factor = _randn(dim, dim, seed=seed + 100)
    scale = _randn(num_images, 1, seed=seed + 200).exp()
    mean = 5 * _randn(num_images, dim, seed=seed + 300)
    draws = mean + scale * (_randn(num_samples + 1, num_images, dim, seed=seed + 400) @ factor)
    draws = draws.reshape(-1, num_images, *shape)
    return draws[1:], draws[0], mean.reshape(num_images, *shape)


def test_rank_against_leave_one_out_loop():
    samples, x, _ = _problem(20, 7)
    intervals = credible_level(samples, x)
    for i in range(20):
        points = [x[i], *samples[:, i]]
        distances = [
            torch.stack(points[:k] + points[k + 1 :]).mean(0).sub(points[k]).norm() for k in range(8)
        ]
        rank = int(sum(d < distances[0] for d in distances))
        assert intervals[i].tolist() == pytest.approx([rank / 8, (rank + 1) / 8])


@pytest.mark.parametrize("num", [2, 3, 16])
def test_ranks_of_exact_sampler_are_uniform(num):
    # Few samples, where a mean that the samples have drawn to themselves would show most.
    samples, x, _ = _problem(4000, num, seed=num)
    ranks = (credible_level(samples, x)[:, 0] * (num + 1)).round().long()
    counts = torch.bincount(ranks, minlength=num + 1)
    assert len(counts) == num + 1
    assert scipy.stats.chisquare(counts.numpy()).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("num_images", "num_samples"), [(64, 16), (256, 64)])
def test_exact_sampler_is_calibrated_and_others_are_not(num_images, num_samples):
    samples, x, mean = _problem(num_images, num_samples, seed=7)
    noise = coverage_error_quantile(num_images, num_samples, 1 - FALSE_ALARM)
    levels, shares = coverage(samples, x)
    assert levels.tolist() == pytest.approx([k / (num_samples + 1) for k in range(1, num_samples + 1)])
    assert coverage_error(levels, shares) < noise

    wide, narrow = mean + 2 * (samples - mean), mean + (samples - mean) / 2
    levels, shares = coverage(wide, x)
    assert coverage_error(levels, shares) > noise and (shares > levels).double().mean() > 0.9
    levels, shares = coverage(narrow, x)
    assert coverage_error(levels, shares) > noise and (shares < levels).double().mean() > 0.9
    std = samples.std(0)
    assert coverage_error(*coverage(samples + 1.5 * std, x)) > noise


def test_exact_posterior_of_a_physics_is_calibrated(gaussian_problem):
    # Truth and noise anew for each image, samples from the closed-form posterior of its measurement.
    physics = _inpainting((1, 4, 4), 0.5)
    problem = gaussian_problem(physics, (1, 4, 4))
    num_images, num_samples = 128, 16
    root = torch.linalg.cholesky(problem.covariance)
    x = problem.mean + _randn(num_images, 16, seed=1) @ root.T
    y = x @ problem.A.T + 0.1 * _randn(num_images, 16, seed=2)
    covariance = problem.posterior()[1]
    prior = torch.linalg.inv(problem.covariance) @ problem.mean
    mean = (prior + y @ problem.A / 0.01) @ covariance
    samples = mean + _randn(num_samples, num_images, 16, seed=3) @ torch.linalg.cholesky(covariance).T
    x, samples = x.reshape(-1, 1, 4, 4), samples.reshape(num_samples, -1, 1, 4, 4)
    noise = coverage_error_quantile(num_images, num_samples, 1 - FALSE_ALARM)
    assert coverage_error(*coverage(samples, x)) < noise
    # On half of the pixels, and in a space that is not linear, an exact sampler is exact as well.
    assert coverage_error(*coverage(samples, x, features=lambda z: z[..., :2].flatten(1))) < noise
    assert coverage_error(*coverage(samples, x, features=lambda z: z.flatten(1).square())) < noise
    # And its samples fit the measurement as well as the truth does: all of them are independent of
    # one another only across images.
    ratio = measurement_consistency(samples, (y * (problem.A.sum(1) > 0)).reshape(-1, 1, 4, 4), physics)
    assert _within_noise(ratio.mean(0), 1)


def test_coverage_under_transformations():
    samples, x, _ = _problem(30, 9)
    expected = coverage(samples, x)[1]
    rotation = _rotation(6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for s, t in [
        (samples[order], x),
        (samples.flip(1), x.flip(0)),
        (3 * samples + 1, 3 * x + 1),
        (
            (samples.flatten(2) @ rotation).reshape(samples.shape),
            (x.flatten(1) @ rotation).reshape(x.shape),
        ),
    ]:
        torch.testing.assert_close(coverage(s, t)[1], expected)


def test_coverage_in_a_feature_space():
    samples, x, _ = _problem(30, 9)
    sizes = []

    def features(z):
        sizes.append(len(z))
        return z[:, :, 0].flatten(1)

    row = coverage(samples[:, :, :, :1], x[:, :, :1])[1]
    assert not torch.equal(row, coverage(samples, x)[1])
    torch.testing.assert_close(coverage(samples, x, features=features)[1], row)
    torch.testing.assert_close(coverage(samples, x, features=features, batch_size=4)[1], row)
    assert set(sizes) == {10, 4, 2}


def test_coverage_of_equal_distances():
    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    # The exact posterior of a problem without uncertainty: calibrated, at any level.
    certain = x.expand(4, *x.shape)
    assert (credible_level(certain, x) == torch.tensor([0.0, 1.0])).all()
    levels, shares = coverage(certain, x, levels=torch.linspace(0, 1, 7))
    torch.testing.assert_close(shares, levels)
    # A point estimate that is wrong: the truth is always outside.
    intervals = credible_level(certain + 0.1, x)
    torch.testing.assert_close(intervals, torch.tensor([[0.8, 1.0]], dtype=torch.float64).expand(6, 2))
    assert (coverage(certain + 0.1, x)[1] == 0).all()


def test_coverage_between_the_levels_of_the_samples():
    samples, x, _ = _problem(40, 3)
    knots = coverage(samples, x, levels=torch.tensor([0, 0.25, 0.5, 0.75, 1]))[1]
    assert knots[0] == 0 and knots[-1] == 1
    between = coverage(samples, x, levels=torch.linspace(0, 1, 9))[1]
    torch.testing.assert_close(between[1::2], (knots[1:] + knots[:-1]) / 2)
    # So the error at the default levels is that at all levels.
    fine = coverage_error(*coverage(samples, x, levels=torch.linspace(0, 1, 1001)))
    assert fine.item() == pytest.approx(coverage_error(*coverage(samples, x)).item())


def test_coverage_from_stored_intervals():
    samples, x, _ = _problem(12, 4)
    parts = [credible_level(samples[:, i : i + 5], x[i : i + 5]) for i in (0, 5, 10)]
    levels, shares = coverage(samples, x)
    torch.testing.assert_close(coverage_curve(torch.cat(parts), levels), shares)
    by_hand = coverage_curve(torch.tensor([[0, 0.5], [0.5, 1], [0, 1]]), torch.tensor([0.25, 0.5]))
    assert by_hand.tolist() == pytest.approx([(0.5 + 0 + 0.25) / 3, (1 + 0 + 0.5) / 3])


def test_coverage_error_by_hand():
    assert coverage_error([0.2, 0.5, 0.8], [0.3, 0.2, 0.9]).item() == pytest.approx(0.3)
    assert coverage_error([0.5], [0.5]) == 0


# -- Sampling noise -------------------------------------------------------------------------------


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
    k = np.arange(1, num_samples + 1)
    counts = np.stack([np.bincount(row, minlength=num_samples + 1) for row in ranks])
    errors = np.abs(counts.cumsum(1)[:, :-1] / num_images - k / (num_samples + 1)).max(1)
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


# -- The measurement ------------------------------------------------------------------------------


def _physics(sigma=0.1):
    noise = {"noise_model": dinv.physics.GaussianNoise(sigma)}
    return {
        "denoising": dinv.physics.Denoising(**noise),
        "inpainting": _inpainting((1, 8, 8), 0.3, sigma),
        "blur": dinv.physics.Blur(torch.ones(1, 1, 3, 3) / 9, padding="valid", **noise),
        "downsampling": dinv.physics.Downsampling((1, 8, 8), filter="bicubic", factor=2, **noise),
    }


@pytest.mark.parametrize("name", ["denoising", "inpainting", "blur", "downsampling"])
def test_consistency_of_the_truth_is_that_of_the_noise(name):
    physics = _physics()[name]
    x = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = physics(x)
    ratio = measurement_consistency(x[None], y, physics)
    assert ratio.shape == (1, 300)
    assert _within_noise(ratio, 1)
    num_measured = (physics.A(torch.ones_like(x[:1])) != 0).sum().item()
    assert ratio.std().item() == pytest.approx((2 / num_measured) ** 0.5, rel=0.2)


def test_consistency_against_dense_matrix(gaussian_problem):
    physics = dinv.physics.Blur(
        torch.ones(1, 1, 3, 3, dtype=torch.float64) / 9,
        padding="valid",
        noise_model=dinv.physics.GaussianNoise(0.2),
    )
    problem = gaussian_problem(physics, (1, 6, 6))
    samples = _randn(3, 2, 1, 6, 6)
    ratio = measurement_consistency(samples, problem.y.repeat(2, 1, 1, 1), physics)
    residual = samples.flatten(2) @ problem.A.T - problem.y.flatten()
    torch.testing.assert_close(ratio, residual.square().sum(2) / (len(problem.A) * 0.2**2))


def test_consistency_of_per_image_levels_and_operators():
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, ..., :1], mask[1, ..., :3] = 1, 1
    sigma = torch.tensor([0.1, 0.4])
    physics = dinv.physics.Inpainting(
        (1, 4, 4), mask=mask, noise_model=dinv.physics.GaussianNoise(sigma)
    )
    samples = torch.stack([x + 0.2, x - 0.4])
    expected = torch.tensor([[4.0, 0.25], [16.0, 1.0]])
    torch.testing.assert_close(measurement_consistency(samples, physics.A(x), physics), expected)
    given = measurement_consistency(samples, physics.A(x), physics, sigma_y=0.2)
    torch.testing.assert_close(given, torch.tensor([[1.0, 1.0], [4.0, 4.0]]))


def test_consistency_of_stacks_floors_and_other_physics():
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    denoising, inpainting, *_ = _physics(0.1).values()
    stack = dinv.physics.StackedLinearPhysics([denoising, inpainting])
    ratio = measurement_consistency((x + 0.1)[None], stack.A(x), stack)
    torch.testing.assert_close(ratio, torch.ones(1, 2))
    # Without noise the floor counts; entries that happen to be zero count for nonlinear physics.
    relu = dinv.physics.Physics(
        A=lambda z, **kwargs: (z - 0.5).relu(), noise_model=dinv.physics.ZeroNoise()
    )
    ratio = measurement_consistency(x[None] * 0, relu.A(x * 0) + 0.005, relu)
    torch.testing.assert_close(ratio, torch.ones(1, 2))


def test_consistency_errors():
    physics = _physics()["downsampling"]
    samples = torch.rand(3, 2, 1, 8, 8)
    y = physics.A(samples[0])
    for bad_y, message in [
        (y[:1], "16 values for each of 2 images, the measurements have 16 for 1"),
        (y[..., :3], "the measurements have 12"),
        (y / 0, "real and finite"),
        (y + 1j, "real and finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            measurement_consistency(samples, bad_y, physics)
    with pytest.raises(ValueError, match="sigma_y must be positive"):
        measurement_consistency(samples, y, physics, sigma_y=0.0)
    with pytest.raises(ValueError, match="sigma_y must be a scalar or one value per image"):
        measurement_consistency(samples, y, physics, sigma_y=torch.ones(3))
    with pytest.raises(ValueError, match=r"\[S, B, C, H, W\]"):
        measurement_consistency(samples[0], y, physics)
    nothing = dinv.physics.Inpainting(
        (1, 8, 8), mask=torch.zeros(1, 1, 8, 8), noise_model=dinv.physics.GaussianNoise(0.1)
    )
    with pytest.raises(ValueError, match="measures nothing"):
        measurement_consistency(samples, nothing.A(samples[0]), nothing)


# -- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [energy_score, crps, coverage, credible_level])
def test_errors(metric):
    samples, x = torch.rand(4, 3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    for bad_samples, bad_x, message in [
        (samples[:1], x, "At least 2 samples of each image are needed, got 1"),
        (samples[:, 0], x[0], r"\[S, B, C, H, W\]"),
        (samples[:, :0], x[:0], r"\[S, B, C, H, W\]"),
        (samples, x[:1], r"must be \[3, 1, 2, 2\]"),
        (samples.transpose(0, 1), x, r"must be \[4, 1, 2, 2\]"),
        (samples / 0, x, "Samples are not finite"),
        (samples, x * torch.nan, "True images are not finite"),
        (samples.long(), x, "Samples must be real floating-point"),
        (samples, x + 0j, "True images must be real floating-point"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(bad_samples, bad_x)


def test_coverage_errors():
    samples, x = torch.rand(4, 3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    for levels in ([-0.1, 0.5], [0.5, 1.1], [], 0.5, [math.nan]):
        with pytest.raises(ValueError, match="Levels must be"):
            coverage(samples, x, levels=torch.tensor(levels))
    with pytest.raises(ValueError, match="features must map"):
        coverage(samples, x, features=lambda z: z)
    with pytest.raises(ValueError, match="Features of samples are not finite"):
        coverage(samples, x, features=lambda z: z.flatten(1) / 0)
    with pytest.raises(ValueError, match="batch_size"):
        coverage(samples, x, batch_size=0)
    for intervals in (torch.zeros(0, 2), torch.zeros(3), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="B, 2"):
            coverage_curve(intervals, torch.tensor([0.5]))
    for interval in ([0.5, 0.5], [0.5, 1.5], [-0.5, 1], [math.nan, 1]):
        with pytest.raises(ValueError, match="low < high"):
            coverage_curve(torch.tensor([interval]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="Levels and shares"):
        coverage_error(torch.zeros(3), torch.zeros(4))
    for counts in ((0, 4), (4, 0), (2.5, 4)):
        with pytest.raises(ValueError, match="num_"):
            coverage_error_quantile(*counts)
    for probability in (0, 1, math.nan):
        with pytest.raises(ValueError, match="probability"):
            coverage_error_quantile(4, 4, probability)
