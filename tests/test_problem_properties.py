"""
Random problems: the prox against a dense solve, copies against the loop, batches against images, and samples.
"""

import warnings
from typing import NamedTuple

import pytest
import torch
from conftest import dense_matrix, flat, pick, rand
from deepinv import physics as dp
from deepinv.models import Denoiser
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinv_ud2m import UD2M, Problem, UnfoldedDenoiser, posterior_prox

pytestmark = pytest.mark.filterwarnings("ignore:posterior_prox stopped after")
examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Users(dp.LinearPhysics):
    """A weight per image, in a place that nobody knows of."""

    def __init__(self, weights):
        super().__init__()
        self.hidden = {"weights": weights}

    def A(self, x, **kwargs):
        return (self.hidden["weights"] * x).cumsum(-1)

    def A_adjoint(self, y, **kwargs):
        return self.hidden["weights"] * y.flip(-1).cumsum(-1).flip(-1)


class Case(NamedTuple):
    name: str
    channels: int
    size: tuple[int, int]
    batch: int
    per_image: bool
    dtype: torch.dtype
    copies: int
    gamma: float
    seed: int

    @property
    def shape(self):
        return (self.channels, *self.size)

    def rand(self, *shape, seed=0):
        return rand(*shape, seed=10 * self.seed + seed, dtype=self.dtype)

    def images(self, batch, seed=0):
        return self.rand(batch, *self.shape, seed=seed)

    def physics(self, images=slice(None)):
        """The physics of all images, or of some."""
        several = self.batch if self.per_image else 1
        images = images if self.per_image else slice(None)
        kernels = self.rand(several, 1, 3, 3)[images]
        kernels = kernels / kernels.sum((-2, -1), keepdim=True)
        masks = (self.rand(several, 1, *self.size, seed=1) < 0.6).to(self.dtype)[images]
        masks = masks.expand(-1, self.channels, -1, -1)
        inpainting, blur = dp.Inpainting(self.shape, masks), dp.Blur(kernels, padding="valid")
        return {
            "Denoising": lambda: dp.Denoising(),
            "Decolorize": lambda: dp.Decolorize().to(self.dtype),
            "Inpainting": lambda: inpainting,
            "BlurFFT": lambda: dp.BlurFFT(self.shape, kernels),
            "Blur valid": lambda: blur,
            "Blur circular": lambda: dp.Blur(kernels, padding="circular"),
            "Blur reflect": lambda: dp.Blur(kernels, padding="reflect"),
            "Downsampling circular": lambda: dp.Downsampling(self.shape, kernels, 2, padding="circular"),
            "Downsampling replicate": lambda: dp.Downsampling(self.shape, kernels, 2, padding="replicate"),
            "MRI": lambda: dp.MRI(masks, self.shape),
            "stack": lambda: dp.StackedLinearPhysics([blur, inpainting]),
            "user's": lambda: Users(0.1 + self.rand(several, 1, 1, 1, seed=2)[images]),
        }[self.name]()


CHANNELS = {"Decolorize": [3], "MRI": [2]}
NAMES = ["Denoising", "Decolorize", "Inpainting", "BlurFFT", "Blur valid", "Blur circular", "Blur reflect"]
NAMES += ["Downsampling circular", "Downsampling replicate", "MRI", "stack", "user's"]


@st.composite
def cases(draw):
    name = draw(st.sampled_from(NAMES))
    sides = st.sampled_from([4, 6, 8]) if name.startswith("Down") else st.integers(4, 8)
    return Case(
        name,
        draw(st.sampled_from(CHANNELS.get(name, [1, 2, 3]))),
        (draw(sides), draw(sides)),
        draw(st.integers(1, 4)),
        draw(st.booleans()),
        draw(st.sampled_from([torch.float32, torch.float64])),
        draw(st.integers(1, 3)),
        10 ** draw(st.floats(-2, 3)),
        draw(st.integers(0, 1000)),
    )


def close(case, a, b):
    tolerance = 1e-4 if case.dtype == torch.float64 else 5e-3
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def problem_of(case, images=slice(None)):
    physics = case.physics(images)
    y = case.physics().A(case.images(case.batch))
    return Problem(pick(y, images), physics, 0.05)


@given(cases())
@examples
def test_the_prox_equals_a_dense_solve(case):
    problem, mean = problem_of(case), case.images(case.batch, 3)
    gamma = case.gamma * (0.5 + case.rand(case.batch, 1, 1, 1, seed=4))
    z = problem.prox(mean, gamma, tol=1e-7)
    assert z.dtype == case.dtype and problem.shape == mean.shape
    for i in range(case.batch):
        one = slice(i, i + 1)
        A = dense_matrix(case.physics(one), case.shape, case.dtype).double()
        H = torch.eye(A.shape[1]).double() + gamma[i].item() * A.T @ A
        right = mean[i].flatten().double() + gamma[i].item() * A.T @ flat(pick(problem.y, one)).double()
        close(case, z[i].flatten(), torch.linalg.solve(H, right))


@given(cases())
@examples
def test_copies_equal_the_loop(case):
    problem = problem_of(case)
    repeated, size = problem.repeat(case.copies), case.copies * case.batch
    x, x_s = case.images(size, 3), case.images(size, 4)
    rho = 0.05 + case.rand(size, seed=5)
    y, normal = repeated.A(x), repeated.A_adjoint_A(x)
    z = posterior_prox(repeated, x, x_s, 0.3, rho)
    for k in range(case.copies):
        one = slice(k * case.batch, (k + 1) * case.batch)
        expected = problem.physics.A(x[one])
        close(case, flat(pick(y, one)), flat(expected))
        close(case, repeated.A_adjoint(y)[one], problem.physics.A_adjoint(expected))
        close(case, normal[one], problem.physics.A_adjoint_A(x[one]))
        close(case, z[one], posterior_prox(problem, x[one], x_s[one], 0.3, rho[one]))


@given(cases(), st.data())
@examples
def test_an_image_does_not_depend_on_its_batch(case, data):
    """Batches of any part of the images, and of copies, give what all together give."""
    start = data.draw(st.integers(0, case.batch - 1))
    images = slice(start, data.draw(st.integers(start + 1, case.batch)))
    x, x_s = case.images(case.batch, 3), case.images(case.batch, 4)
    rho, sigma = (0.05 + case.rand(case.batch, seed=seed) for seed in (5, 6))
    together = posterior_prox(problem_of(case), x, x_s, sigma, rho)
    part = [value[images] for value in (x, x_s, sigma, rho)]
    close(case, posterior_prox(problem_of(case, images), *part), together[images])
    copies = [value.repeat(case.copies, *[1] * (value.ndim - 1)) for value in part]
    repeated = posterior_prox(problem_of(case, images).repeat(case.copies), *copies)
    close(case, repeated[: len(part[0])], together[images])


def sampler_of(case, num_iterations, num_steps):
    """An untrained sampler whose prior is the denoiser of white noise of variance 0.1 around 1/2."""
    return UD2M(UnfoldedDenoiser(ShrinkingDenoiser(), num_iterations).to(case.dtype), num_steps)


class ShrinkingDenoiser(Denoiser):
    def forward(self, x, sigma, **kwargs):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return 0.5 + (x - 0.5) * 0.1 / (0.1 + sigma**2)


def check_samples(case, num_iterations, num_steps, log_sigma_y, batch_size):
    """Finite, the same for the same seed, and the same for any split into batches to 1e-3."""
    model = sampler_of(case, num_iterations, num_steps)
    y = case.physics().A(case.images(case.batch))

    def sample(**options):
        generator = torch.Generator().manual_seed(case.seed)
        sigma_y = 10**log_sigma_y
        return model.sample(y, case.physics(), case.copies, sigma_y=sigma_y, generator=generator, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is no trained sampler, and some operators are hard
        samples = sample()
        assert samples.isfinite().all() and samples.shape == (case.copies, case.batch, *case.shape)
        assert torch.equal(samples, sample())
        split = sample(batch_size=batch_size)
    assert (samples - split).abs().max() < 1e-3


options = given(cases(), st.integers(1, 3), st.integers(1, 3), st.floats(-2.5, -0.5), st.integers(1, 5))


@options
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_samples_of_random_problems(case, num_iterations, num_steps, log_sigma_y, batch_size):
    check_samples(case, num_iterations, num_steps, log_sigma_y, batch_size)


@pytest.mark.slow
@options
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_samples_of_500_random_problems(case, num_iterations, num_steps, log_sigma_y, batch_size):
    check_samples(case, num_iterations, num_steps, log_sigma_y, batch_size)
