"""
The outer sampler against exact posteriors: with exact draws from p(x | y, x_s) and eta = 1 it is exact, apart
from its start. Each chi-square test has a false alarm rate of 1e-6.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from conftest import ExactUnfolded, GaussianProblem, seeded
from deepinv.models import MMSE
from deepinv.physics import Blur, Denoising, GaussianNoise, Inpainting
from scipy.stats import chi2

from deepinv_ud2m import UD2M, UnfoldedDenoiser
from deepinv_ud2m.randomness import randn

FALSE_ALARM = 1e-6
SHAPE = (1, 4, 4)


def inpainting(sigma=0.1):
    mask = (torch.rand(1, *SHAPE, generator=seeded(1)) < 0.5).double()
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
    samples = model.sample(problem.y, problem.physics, 20_000, generator=seeded())
    mean, covariance = problem.posterior()
    assert_gaussian(samples.flatten(1), mean.flatten(), covariance)


class PredictsItsError(ExactUnfolded):
    """Exact draws from states of different levels, and an error of the initial estimate that varies."""

    predicts_rmse = True

    def initial_estimate(self, problem, x_s, sigma):
        return x_s, 0.1 + x_s[:, :1, :1, :1].abs() / sigma

    def draw(self, problem, x_s, sigma, *, generator=None, initial=None):
        mean, covariance = self.problem.posterior()
        precision, of_states = torch.linalg.inv(covariance), sigma.reshape(-1, 1, 1) ** -2
        covariance = torch.linalg.inv(precision + of_states * torch.eye(self.problem.d).to(x_s))
        right = (precision @ mean)[:, None] + of_states * x_s.reshape(len(x_s), -1, 1)
        noise = torch.linalg.cholesky(covariance) @ randn(x_s, generator).reshape(right.shape)
        return (covariance @ right + noise).reshape(x_s.shape)


def test_exact_draws_are_exact_at_levels_that_follow_the_predicted_error():
    problem, sigmas = GaussianProblem(inpainting(), SHAPE), (50.0, 1.0, 0.3, 0.05)
    model = UD2M(PredictsItsError(problem), sigmas=sigmas, nominal_rmse=0.5, output_range=None)
    options = {"generator": seeded(), "return_trajectory": True}
    samples, trajectory = model.sample(problem.y, problem.physics, 20_000, **options)
    assert trajectory.sigmas[1].min() < 0.3 and trajectory.sigmas[1].max() > 3
    mean, covariance = problem.posterior()
    assert_gaussian(samples.flatten(1), mean.flatten(), covariance)


@pytest.mark.parametrize("nominal, bound", [(0.02, 50.0), (5.0, 0.05)])
def test_levels_follow_the_predicted_error_between_the_first_and_the_last(nominal, bound):
    """Some samples reach the upper bound, the first level, or the lower one, the last level."""
    problem, options = GaussianProblem(inpainting(), SHAPE), {"return_trajectory": True}
    for sigmas in ((50.0,), (50.0, 0.05), (50.0, 1.0, 0.3, 0.05)):
        model = UD2M(PredictsItsError(problem), sigmas=sigmas, nominal_rmse=nominal)
        _, trajectory = model.sample(problem.y, problem.physics, 50, generator=seeded(), **options)
        _, error = model.unfolded.initial_estimate(None, trajectory.x_s[0, :, 0], sigmas[0])
        expected = torch.tensor(sigmas)[:, None, None] * error.reshape(1, 50, 1) / nominal
        expected = expected.clamp(sigmas[-1], sigmas[0])
        expected[0], expected[-1] = sigmas[0], sigmas[-1]
        torch.testing.assert_close(trajectory.sigmas, expected)
    assert (trajectory.sigmas[1:-1] == torch.tensor(bound)).any(), "some error must be beyond the bound"
    assert len(trajectory.sigmas[2].unique()) > 5
    same = trajectory.sigmas[1, :, 0] == trajectory.sigmas[0, :, 0]
    torch.testing.assert_close(trajectory.x_s[1, same], trajectory.x_s[0, same])  # no step


def test_the_statistics_notice_a_wrong_sampler():
    """An error of 5 % in the covariance must show, and one of 0.01 in the mean."""
    problem = GaussianProblem(inpainting(), SHAPE)
    mean, covariance = problem.posterior()
    noise = torch.randn(20_000, problem.d, generator=seeded(), dtype=torch.float64)
    samples = mean + noise @ torch.linalg.cholesky(covariance).T
    assert_gaussian(samples, mean.flatten(), covariance)
    for wrong, name in ((1.05**0.5 * (samples - mean) + mean, "covariance"), (samples + 0.01, "mean")):
        with pytest.raises(AssertionError, match=name):
            assert_gaussian(wrong, mean.flatten(), covariance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.8, 1.0])
def test_step_keeps_the_noise_level(eta):
    """Given the true x, the next state is x + s' n whatever eta; only the correlation differs."""
    model, generator = UD2M(ExactUnfolded(None), eta=eta), seeded()
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

    def draw(self, problem, x_s, sigma, *, generator=None):
        log_weights = self.log_weights(problem.y, problem.physics, problem.sigma_y[0, 0, 0, 0])
        distance = (self.images[None] - x_s[:, None]).square().flatten(2).sum(2)
        log_weights = log_weights - distance / (2 * sigma**2)
        uniform = torch.special.ndtr(generator.randn(x_s).flatten(1)[:, :1])
        cumulated = log_weights.softmax(1).cumsum(1)
        index = torch.searchsorted(cumulated, uniform).clamp(max=len(self.images) - 1)
        return self.images[index.flatten()]


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_a_finite_set_of_images_is_picked_with_the_posterior_probabilities(num_steps):
    generator = seeded()
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


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_trajectory_replays_the_algorithm(gaussian_problem, eta):
    """Each state follows from the draw and state before it: DDIM (eta = 0), or with the noise of DDPM."""
    problem = gaussian_problem(inpainting(), SHAPE)
    model = UD2M(ExactUnfolded(problem), num_steps=3, eta=eta, output_range=None)
    options = {"generator": seeded(3), "return_trajectory": True}
    samples, trajectory = model.sample(problem.y, problem.physics, 2000, **options)
    assert trajectory.x0.shape == trajectory.x_s.shape == (3, 2000, 1, *SHAPE)
    assert torch.equal(trajectory.x0[-1], samples)
    assert torch.equal(trajectory.sigmas, model.sigmas) and trajectory.sigmas is not model.sigmas
    for n in range(2):
        s, s_next = trajectory.sigmas[n].double(), trajectory.sigmas[n + 1].double()
        direction = (trajectory.x_s[n] - trajectory.x0[n]) / s
        if eta == 0:
            assert torch.allclose(trajectory.x_s[n + 1], trajectory.x0[n] + s_next * direction)
        else:
            rest = trajectory.x_s[n + 1] - trajectory.x0[n] - s_next**2 / s * direction
            white = (rest / (s_next * (1 - s_next**2 / s**2).sqrt())).flatten()
            low, high = (chi2.isf(p, len(white)) for p in (1 - FALSE_ALARM / 2, FALSE_ALARM / 2))
            assert low < white.square().sum() < high


def test_output_range_clamps_the_sample_only(gaussian_problem):
    problem = gaussian_problem(inpainting(), SHAPE)
    problem.y = problem.y + 0.5  # so that samples leave [0, 1]
    for kwargs, low, high in [({"output_range": (0.4, 0.6)}, 0.4, 0.6), ({}, 0.0, 1.0)]:
        options = {"generator": seeded(), "return_trajectory": True}
        model = UD2M(ExactUnfolded(problem), **kwargs)
        clamped, trajectory = model.sample(problem.y, problem.physics, 200, **options)
        assert clamped.min() == low and clamped.max() == high
        assert torch.equal(trajectory.x0[-1].clamp(low, high), clamped)
        assert trajectory.x0.min() < low and trajectory.x0.max() > high


@pytest.mark.parametrize("sigma", [0.01, 78.7])
def test_the_start_is_centred_and_scaled(gaussian_problem, sigma):
    """x_{s_N} ~ N(1/2, s_N^2). Only a small level tells its mean from another one."""
    problem = gaussian_problem(inpainting(), SHAPE)
    model = UD2M(ExactUnfolded(problem), sigmas=[sigma])
    options = {"generator": seeded(), "return_trajectory": True}
    _, trajectory = model.sample(problem.y, problem.physics, 5000, **options)
    white = (trajectory.x_s[0].flatten() - 0.5) / sigma
    n = white.numel()
    assert abs(white.mean().item()) < 5 / n**0.5
    assert chi2.isf(1 - FALSE_ALARM / 2, n) < white.square().sum() < chi2.isf(FALSE_ALARM / 2, n)


def test_threads_that_share_a_model_count_and_sample_by_themselves(tiny_prior):
    model, physics = UD2M(UnfoldedDenoiser(tiny_prior, 3), num_steps=3), Denoising(GaussianNoise(0.1))
    y, barrier = torch.rand(2, 1, 16, 16, generator=seeded()), Barrier(4)
    expected = [model.sample(y, physics, 2, generator=seeded(i)) for i in range(4)]
    assert model.nfe == 9

    def run(i):
        barrier.wait()
        for _ in range(3):
            samples = model.sample(y, physics, 2, batch_size=2, generator=seeded(i))
            assert model.nfe == 9
        return samples

    with ThreadPoolExecutor(4) as threads:
        for samples, alone in zip(threads.map(run, range(4)), expected, strict=True):
            torch.testing.assert_close(samples, alone, rtol=0, atol=1e-5)
    assert not tiny_prior._forward_hooks, "no counter stays"
