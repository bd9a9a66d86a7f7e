"""Noise levels against the textbook, and the border to networks that think in VP times."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import rand, refused, seeded

from deepinv_ud2m import UD2M
from deepinv_ud2m.schedule import VPSchedule, check_sigmas, to_vp_state
from deepinv_ud2m.training import StateSigmas

T = 1000


def alphas_bar_of(kind: str) -> np.ndarray:
    """The recurrences, in numpy and one time after the other."""
    if kind == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)]
    else:

        def f(t):
            return np.cos((t / T + 0.008) / 1.008 * np.pi / 2) ** 2

        betas = [min(1 - f(t + 1) / f(t), 0.999) for t in range(T)]
    alphas_bar, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        alphas_bar.append(product)
    return np.array(alphas_bar)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_levels_against_the_recurrence(kind):
    alphas_bar = alphas_bar_of(kind)
    # In [0, 1] a VP state is x + s n with s half the noise-to-signal ratio of [-1, 1].
    expected = 0.5 * np.sqrt((1 - alphas_bar) / alphas_bar)
    np.testing.assert_allclose(VPSchedule(kind).sigma(torch.arange(T)), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_sigma_and_timestep_are_inverse(kind):
    schedule = VPSchedule(kind)
    times = torch.linspace(0, T - 1, 4321)
    assert times.frac().count_nonzero() > 4000
    # A level in float32 has relative error 6e-8, and log s moves by 3e-3 or more per time.
    torch.testing.assert_close(schedule.timestep(schedule.sigma(times)), times, rtol=1e-6, atol=1e-4)
    low, high = schedule.sigma(0), schedule.sigma(T - 1)
    levels = torch.logspace(low.log10().item(), high.log10().item(), 777).clamp(low, high)
    # A time in float32 has an error of up to 3e-5, and log s moves by up to 3.5 per time (cosine).
    torch.testing.assert_close(schedule.sigma(schedule.timestep(levels)), levels, rtol=2e-4, atol=0)


def test_levels_between_the_times_and_outside_of_the_table():
    """They are geometric means, and its ends."""
    schedule, levels = VPSchedule(), torch.tensor([[0.0, 1e-6], [1e3, float("inf")]])
    expected = (schedule.sigma(500) ** 0.75) * (schedule.sigma(501) ** 0.25)
    assert schedule.sigma(500.25) == pytest.approx(expected.item(), rel=1e-6)
    assert schedule.timestep(levels).tolist() == [[0, 0], [999, 999]]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [2, 5, 20, 50, 4000])
def test_other_numbers_of_times(kind, num_timesteps):
    levels = VPSchedule(kind, num_timesteps).sigma(torch.arange(num_timesteps))
    assert levels.isfinite().all()
    assert (levels.diff() > 0).all()
    # In 50 steps or in 4000 it is the same diffusion: (beta in 50 steps is up to 0.4, hence 30%).
    if num_timesteps >= 50 and kind == "linear":
        assert levels[-1].log() == pytest.approx(np.log(78.7), rel=0.3)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 8, 16])
def test_sampling_levels_are_the_published_grid(num_steps):
    schedule = VPSchedule()
    # floor((n sqrt(1000) / N)^2), in integers: no rounding.
    times = [n * n * T // num_steps**2 for n in range(1, num_steps + 1)]
    times[-1] -= 1
    assert torch.equal(schedule.sampling_sigmas(num_steps), schedule.sigma(torch.tensor(times)).flip(0))
    # The formula as it is published, in float64. Where the square is a whole number it may round
    # to just below: at N = 5 it gives 39, 159, 639 for 40, 160, 640.
    published = np.floor(np.linspace(0, np.sqrt(T), num_steps + 1)[1:] ** 2).astype(int)
    published[-1] -= 1
    whole = [n * n * T % num_steps**2 == 0 for n in range(1, num_steps + 1)]
    assert all(p == t or (w and p == t - 1) for p, t, w in zip(published, times, whole, strict=True))
    assert num_steps == 5 or published.tolist() == times


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_sampling_levels_decrease_strictly(kind):
    schedule = VPSchedule(kind)
    for num_steps in range(1, T // 2 + 1):
        levels = schedule.sampling_sigmas(num_steps)
        assert levels.shape == (num_steps,)
        assert (levels.diff() < 0).all(), num_steps
        assert levels[0] == schedule.sigma(T - 1) and levels[-1] >= schedule.sigma(0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_training_times_are_uniform(kind):
    schedule = VPSchedule(kind)
    levels = schedule.training_sigmas(20_000, seeded(0))
    assert levels.shape == (20_000,) and levels.dtype == torch.float32
    times = schedule.timestep(levels).double().numpy()
    # Over seeds, a right law fails this with probability 1e-6.
    assert scipy.stats.kstest(times, "uniform", (1, T - 2)).pvalue > 1e-6
    # Nor does it miss the first or the last unit of time, (1 - 1/998)^20000 = 2e-9.
    assert 1 - 1e-3 < times.min() < 2 and T - 2 < times.max() < T - 1 + 1e-3
    again = schedule.training_sigmas(20_000, seeded(0))
    assert torch.equal(levels, again)


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(2.0), torch.tensor([0.01, 1.0, 70.0])])
def test_the_state_map_takes_a_level_for_all_images_or_for_each(sigma):
    x_s = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    v = to_vp_state(x_s, sigma)
    for i, level in enumerate(torch.as_tensor(sigma).expand(3).tolist()):
        torch.testing.assert_close(v[i], (2 * x_s[i] - 1) / (1 + 4 * level**2) ** 0.5)
    if torch.is_tensor(sigma) and sigma.ndim:
        torch.testing.assert_close(to_vp_state(x_s, sigma.reshape(-1, 1, 1, 1)), v)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_state_map_is_the_forward_diffusion(kind):
    schedule, times = VPSchedule(kind), torch.arange(0, T, 37)
    x, noise = rand(len(times), 1, 4, 4), torch.randn(len(times), 1, 4, 4).double()
    alphas_bar = torch.from_numpy(alphas_bar_of(kind))[times].reshape(-1, 1, 1, 1)
    v = alphas_bar.sqrt() * (2 * x - 1) + (1 - alphas_bar).sqrt() * noise
    sigma = schedule.sigma(times)
    x_s = x + sigma.reshape(-1, 1, 1, 1) * noise
    # Levels are float32.
    torch.testing.assert_close(to_vp_state(x_s, sigma), v, rtol=1e-5, atol=1e-6)


def test_bad_arguments(sampler):
    schedule = VPSchedule()
    levels = [[], [1.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, -1.0], [float("inf"), 1.0], [float("nan")]]
    levels += [[1.0, 1e-30], [1e7, 1.0], [[1.0]], [[1.0], 0.5], ["a"], 3.0, None, torch.tensor([0.1, 1.0])]
    counts, shares = (0, -1, 501, 3.0, "3", None), (-0.1, 1.5, float("nan"))
    refused(
        (partial(VPSchedule, "quadratic"), "kind must be one of"),
        *((partial(VPSchedule, num_timesteps=times), "num_timesteps") for times in (0, 1, -3, 10.0)),
        *((partial(schedule.sampling_sigmas, n), "num_steps must be an integer") for n in counts),
        *((partial(check_sigmas, sigmas), "sigmas must be a sequence of") for sigmas in levels),
        *((partial(StateSigmas, sampler, share), "0 <= first <= 1") for share in shares),
        (partial(StateSigmas, sampler, 0.5, 1.0, 0.5), "0 < low <= high"),
    )


def test_levels_by_hand():
    assert check_sigmas([2, 1, 0.5]).tolist() == [2, 1, 0.5]
    assert check_sigmas(torch.tensor([0.3], dtype=torch.float64)).dtype == torch.float32
    given = torch.tensor([2.0, 1.0])
    check_sigmas(given).zero_()
    assert given.tolist() == [2, 1]


@pytest.fixture
def sampler() -> UD2M:
    unfolded = torch.nn.Identity()
    unfolded.draw = lambda *arguments: None
    return UD2M(unfolded, sigmas=[50.0, 2.0, 0.3])


@pytest.mark.parametrize("first", [0.0, 0.25, 1.0])
def test_levels_of_states(sampler, first):
    torch.manual_seed(0)
    sigmas = StateSigmas(sampler, first, 0.02, 2.0)(4000)
    assert sigmas.shape == (4000,)
    is_first = sigmas == sampler.sigmas[0]  # five standard deviations: false alarm of 6e-7
    assert abs(is_first.sum().item() - 4000 * first) <= 5 * (4000 * first * (1 - first)) ** 0.5
    ranks = (sigmas[~is_first] / 0.02).log() / math.log(100)
    assert bool(((ranks >= 0) & (ranks <= 1)).all())
    if len(ranks):  # Kolmogorov-Smirnov at a false alarm of 1e-4
        grid = torch.linspace(0, 1, 200)
        gap = (ranks[:, None] <= grid).double().mean(0) - grid
        assert gap.abs().max() < 2.226 / len(ranks) ** 0.5
