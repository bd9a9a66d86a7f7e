"""The outer sampler against exact posteriors.

With an exact draw from p(x | y, x_s) and eta = 1 the sampler is exact for every number of levels, up
to the start. The tests compare n samples with the closed form by chi-square statistics; each test
raises a false alarm with probability 1e-6 (seeds are fixed, so a pass stays a pass).
"""

import pytest
import torch
from conftest import ExactUnfolded, GaussianProblem
from deepinv.models import MMSE, MedianFilter
from deepinv.physics import Blur, Denoising, Downsampling, GaussianNoise, Inpainting
from scipy.stats import chi2

from deepinv_ud2m import UD2M, UnfoldedDenoiser
from deepinv_ud2m.randomness import SampleStreams, randn

FALSE_ALARM = 1e-6
SHAPE = (1, 4, 4)


def inpainting(sigma=0.1):
    mask = (torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    return Inpainting(SHAPE, mask=mask, noise_model=GaussianNoise(sigma))


def blur(sigma=0.1):
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).double()[None, None] / 16
    return Blur(filter=kernel, padding="valid", noise_model=GaussianNoise(sigma))


def assert_gaussian(samples, mean, covariance):
    """Mean and covariance of n samples, each by a chi-square test."""
    n, d = samples.shape
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (samples - mean).T, upper=False
    ).T
    mean_statistic = n * white.mean(0).square().sum().item()
    assert mean_statistic < chi2.isf(FALSE_ALARM / 2, d), "mean"
    # sqrt(n) (S - I) has independent entries, of variance 2 on the diagonal and 1 off it.
    deviation = white.T @ white / n - torch.eye(d, dtype=white.dtype)
    covariance_statistic = n / 2 * deviation.square().sum().item()
    assert covariance_statistic < chi2.isf(FALSE_ALARM / 2, d * (d + 1) / 2), "covariance"


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("make_physics", [inpainting, blur])
def test_exact_unfolded_gives_the_exact_posterior(make_physics, num_steps):
    problem = GaussianProblem(make_physics(), SHAPE)
    model = UD2M(ExactUnfolded(problem), num_steps=num_steps, eta=1.0, output_range=None)
    generator = torch.Generator().manual_seed(0)
    samples = model.sample(problem.y, problem.physics, 20_000, generator=generator)
    mean, covariance = problem.posterior()
    assert_gaussian(samples.flatten(1), mean.flatten(), covariance)


class StatesItsError(ExactUnfolded):
    """Exact draws from states of different levels, and an error of the first guess that varies."""

    states_error = True

    def first_guess(self, y, physics, x_s, sigma):
        return x_s, 0.1 + x_s[:, :1, :1, :1].abs() / sigma

    def forward(self, y, physics, x_s, sigma, *, generator=None, first_guess=None):
        mean, covariance = self.problem.posterior()
        precision, of_states = torch.linalg.inv(covariance), sigma.reshape(-1, 1, 1) ** -2
        covariance = torch.linalg.inv(precision + of_states * torch.eye(self.problem.d).to(x_s))
        right = (precision @ mean)[:, None] + of_states * x_s.reshape(len(x_s), -1, 1)
        noise = torch.linalg.cholesky(covariance) @ randn(x_s, generator).reshape(right.shape)
        return (covariance @ right + noise).reshape(x_s.shape)


def test_exact_draws_are_exact_at_levels_that_follow_the_stated_error():
    problem, levels = GaussianProblem(inpainting(), SHAPE), (50.0, 1.0, 0.3, 0.05)
    model = UD2M(StatesItsError(problem), levels=levels, reference_error=0.5, output_range=None)
    samples, trajectory = model.sample(
        problem.y, problem.physics, 20_000, generator=torch.Generator().manual_seed(0),
        return_trajectory=True,
    )  # fmt: skip
    assert trajectory.levels[1].min() < 0.3 and trajectory.levels[1].max() > 3
    mean, covariance = problem.posterior()
    assert_gaussian(samples.flatten(1), mean.flatten(), covariance)


def test_levels_follow_the_stated_error_between_the_first_and_the_last():
    problem, reference = GaussianProblem(inpainting(), SHAPE), 0.02
    options = {"generator": torch.Generator().manual_seed(0), "return_trajectory": True}
    for levels in ((50.0,), (50.0, 0.05), (50.0, 1.0, 0.3, 0.05)):
        model = UD2M(StatesItsError(problem), levels=levels, reference_error=reference)
        _, trajectory = model.sample(problem.y, problem.physics, 50, **options)
        _, error = model.unfolded.first_guess(None, None, trajectory.x_s[0, :, 0], levels[0])
        expected = torch.tensor(levels)[:, None, None] * error.reshape(1, 50, 1) / reference
        expected = expected.clamp(levels[-1], levels[0])
        expected[0], expected[-1] = levels[0], levels[-1]
        torch.testing.assert_close(trajectory.levels, expected)
        assert (expected == 50).float().mean() < 1 or len(levels) == 1
    assert (trajectory.levels[1] == 50).any(), "some error must be beyond the bound"
    same = trajectory.levels[1, :, 0] == trajectory.levels[0, :, 0]
    torch.testing.assert_close(trajectory.x_s[1, same], trajectory.x_s[0, same])  # no step


def test_the_statistics_notice_a_wrong_sampler():
    """eta = 0 in place of 1 loses randomness; an error of 5 % in the covariance must show."""
    problem = GaussianProblem(inpainting(), SHAPE)
    mean, covariance = problem.posterior()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, problem.d, generator=generator, dtype=torch.float64)
    samples = mean + noise @ torch.linalg.cholesky(covariance).T
    assert_gaussian(samples, mean.flatten(), covariance)
    with pytest.raises(AssertionError, match="covariance"):
        assert_gaussian(1.05**0.5 * (samples - mean) + mean, mean.flatten(), covariance)
    with pytest.raises(AssertionError, match="mean"):
        assert_gaussian(samples + 0.01, mean.flatten(), covariance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.8, 1.0])
def test_step_keeps_the_noise_level(eta):
    """Given the true x, the next state is x + s' n whatever eta; only the correlation differs."""
    model = UD2M(torch.nn.Identity(), eta=eta)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(200_000, 1, 1, 1, dtype=torch.float64)
    s, s_next = 1.3, 0.4
    x_s = s * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x_next = model.step(x0, x_s, s, s_next, generator).flatten()
    n = len(x_next)
    variance = x_next.square().sum().item() / s_next**2
    assert chi2.isf(1 - FALSE_ALARM / 2, n) < variance < chi2.isf(FALSE_ALARM / 2, n)
    ratio = s_next / s
    correlation = ratio * (1 - eta**2 * (1 - ratio**2)) ** 0.5 * s / s_next
    measured = (x_next * x_s.flatten()).mean().item() / (s * s_next)
    assert abs(measured - correlation) < 5 / n**0.5


class ExactDiscrete(torch.nn.Module):
    """Draws exactly from p(x | y, x_s) for a prior that is uniform on a finite set of images."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def log_weights(self, y, physics, sigma_y):
        misfit = (physics.A(self.images)[None] - y[:, None]).square().flatten(2).sum(2)
        return -misfit / (2 * sigma_y**2)

    def forward(self, y, physics, x_s, sigma, *, generator=None):
        log_weights = self.log_weights(y, physics, physics.noise_model.sigma)
        distance = (self.images[None] - x_s[:, None]).square().flatten(2).sum(2)
        log_weights = log_weights - distance / (2 * sigma**2)
        uniform = torch.special.ndtr(generator.randn(x_s).flatten(1)[:, :1])
        cumulated = log_weights.softmax(1).cumsum(1)
        index = torch.searchsorted(cumulated, uniform).clamp(max=len(self.images) - 1)
        return self.images[index.flatten()]


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_a_finite_set_of_images_is_picked_with_the_posterior_probabilities(num_steps):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, *SHAPE, generator=generator, dtype=torch.float64)
    physics = Denoising(GaussianNoise(0.8))
    noise = torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
    y = images[2:3] + 0.8 * noise
    exact = ExactDiscrete(images)
    probabilities = exact.log_weights(y, physics, 0.8).softmax(1).flatten()
    assert (probabilities > 0.01).sum() >= 4, "the problem must leave doubt"

    model = UD2M(exact, num_steps=num_steps, eta=1.0, output_range=None)
    samples = model.sample(y, physics, 20_000, generator=generator)[:, 0]
    counts = (samples[:, None] == images[None]).flatten(2).all(2).sum(0)
    assert counts.sum() == len(samples)
    expected = len(samples) * probabilities
    statistic = ((counts - expected).square() / expected).sum().item()
    assert statistic < chi2.isf(FALSE_ALARM, len(images) - 1)

    # deepinv's exact denoiser for this prior is the mean of the same posterior.
    mmse = MMSE(images, device=torch.device("cpu"), dtype=torch.float64)(y, 0.8)
    mean = (probabilities[:, None, None, None] * images).sum(0, keepdim=True)
    assert torch.allclose(mmse, mean, atol=1e-6)
    spread = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - mmse[0]).abs() <= 6 * spread + 1e-6).all()


def test_trajectory_replays_the_algorithm(gaussian_problem):
    """x_s at each level follows from x0 and x_s before it, by the formula of the paper."""
    problem = gaussian_problem(inpainting(), SHAPE)
    model = UD2M(ExactUnfolded(problem), num_steps=3, eta=0.0, output_range=None)
    samples, trajectory = model.sample(
        problem.y, problem.physics, 5, generator=torch.Generator().manual_seed(3),
        return_trajectory=True,
    )  # fmt: skip
    assert trajectory.x0.shape == trajectory.x_s.shape == (3, 5, 1, *SHAPE)
    assert torch.equal(trajectory.x0[-1], samples)
    assert torch.allclose(trajectory.levels, model.levels)
    for n in range(2):
        s, s_next = trajectory.levels[n].double(), trajectory.levels[n + 1].double()
        expected = trajectory.x0[n] + s_next * (trajectory.x_s[n] - trajectory.x0[n]) / s
        assert torch.allclose(trajectory.x_s[n + 1], expected)


def test_output_range_clamps_the_sample_only(gaussian_problem):
    problem = gaussian_problem(inpainting(), SHAPE)
    options = {"generator": torch.Generator().manual_seed(0), "return_trajectory": True}
    clamped, trajectory = UD2M(ExactUnfolded(problem), output_range=(0.4, 0.6)).sample(
        problem.y, problem.physics, 50, **options
    )
    assert clamped.min() == 0.4 and clamped.max() == 0.6
    assert torch.equal(trajectory.x0[-1].clamp(0.4, 0.6), clamped)
    assert trajectory.x0[-1].max() > 0.6


def test_the_start_is_centred_and_scaled(gaussian_problem):
    """x_{s_N} ~ N(1/2, s_N^2)."""
    problem = gaussian_problem(inpainting(), SHAPE)
    model = UD2M(ExactUnfolded(problem), num_steps=1)
    generator = torch.Generator().manual_seed(0)
    _, trajectory = model.sample(
        problem.y, problem.physics, 5000, generator=generator, return_trajectory=True
    )
    white = (trajectory.x_s[0].flatten() - 0.5) / model.levels[0].double()
    n = white.numel()
    assert abs(white.mean().item()) < 5 / n**0.5
    assert chi2.isf(1 - FALSE_ALARM / 2, n) < white.square().sum() < chi2.isf(FALSE_ALARM / 2, n)


def test_streams_are_standard_normal_and_independent():
    streams = SampleStreams(list(range(2000)), "cpu", block=3)
    like = torch.zeros(2000, 1, 4, 4, dtype=torch.float64)
    draws = torch.stack([streams.randn(like).flatten(1) for _ in range(4)], 1).flatten(1)
    assert_gaussian(draws, torch.zeros(64).double(), torch.eye(64).double())


@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_measurements_are_projected_back_once(num_samples):
    """A^T y depends on y alone: not at each level and iteration, but once, and once for a check."""
    physics = Downsampling((1, 16, 16), filter="bicubic", factor=4, padding="circular")
    y = physics(torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    adjoint, of_y = physics.A_adjoint, []

    def counted(measurements, **kwargs):
        of_y.extend([0] if torch.equal(measurements[:2], y) else [])
        return adjoint(measurements, **kwargs)

    physics.A_adjoint = counted
    model = UD2M(UnfoldedDenoiser(MedianFilter(), num_iterations=3), num_steps=3)
    model.sample(y, physics, num_samples, sigma_y=0.05)
    assert len(of_y) == 2
