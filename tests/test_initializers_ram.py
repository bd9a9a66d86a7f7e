"""RAM as the initializer, with exact solvers of the joint problem in its place, and itself untrained."""

import copy
import warnings

import pytest
import torch
from conftest import PER_IMAGE, GaussianProblem, dense_matrix, per_image_physics, rand, seeded
from conftest import flat as flat_image
from deepinv.models import RAM
from deepinv.physics import Denoising, GaussianNoise, Inpainting, LinearPhysics, ZeroNoise
from deepinv.utils import TensorList
from test_sampler import SHAPE, blur, inpainting

from deepinv_ud2m import UD2M, LinearInitializer, Problem, RAMInitializer, UnfoldedDenoiser
from deepinv_ud2m.initializers.ram import WhitenedPhysics
from deepinv_ud2m.physics import JPEG

B, N = 3, 8
LEVELS = torch.tensor([0.01, 0.5, 78.0])
NOISE_LEVELS = torch.tensor([0.3, 0.1, 0.02])


def make(name, n=N, dtype=torch.float64, images=slice(0, B)):
    return Fourier() if name == "Fourier" else per_image_physics(name, (1, n, n), images, dtype)


def problem_of(name, n=N, dtype=torch.float64, images=slice(0, B), sigma_y=NOISE_LEVELS):
    physics = make(name, n, dtype, images)
    return Problem(physics.A(rand(B, 1, n, n, seed=3, dtype=dtype)[images]), physics, sigma_y)


class Fourier(LinearPhysics):
    """Complex measurements."""

    def A(self, x, **kwargs):
        return torch.fft.rfft2(x, norm="ortho")[..., 1:-1]

    def A_adjoint(self, y, **kwargs):  # half of the spectrum stands for all of it
        return torch.fft.irfft2(torch.nn.functional.pad(y / 2, (1, 1)), norm="ortho")


class ExactRAM(torch.nn.Module):
    """E[x | y] for x ~ N(mean, covariance), from nothing but the problem that it is given."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean, self.precision = mean, torch.linalg.inv(covariance)

    def forward(self, y, physics, sigma):
        images = torch.eye(len(self.mean), dtype=y[-1].dtype).reshape(-1, 1, *y[-1].shape[1:])
        columns = [flat(physics.A(image.repeat(len(y[-1]), 1, 1, 1))) for image in images]
        A, y = torch.stack(columns, -1), flat(y)  # [B, m, d], [B, m]
        variance = sigma.reshape(-1, 1, 1) ** 2
        hessian = self.precision + A.mT @ A / variance
        right = self.precision @ self.mean + (A.mT @ y[..., None] / variance)[..., 0]
        return torch.linalg.solve(hessian, right).reshape(len(y), *images.shape[2:])


def flat(y):
    return torch.cat([part.flatten(1) for part in y], 1)


class SmallRAM(torch.nn.Module):
    """A network of RAM's call and manners: one channel, rescales y in place, has a dropout."""

    in_channels = (1,)

    def __init__(self):
        super().__init__()
        self.conv, self.dropout = torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Dropout(0.5)
        self.autocast = None

    def forward(self, y, physics, sigma):
        self.autocast = torch.is_autocast_enabled("cpu")
        for part in y:
            part /= 2
        x = 2 * physics.A_adjoint(y)
        return x + sigma.reshape(-1, 1, 1, 1) * self.dropout(self.conv(x))


@pytest.fixture
def small_ram():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallRAM()


@pytest.fixture(scope="module")
def ram():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RAM(in_channels=(1,), pretrained=False)


@pytest.mark.parametrize("s", [0.01, 0.1, 3.0, 78.0])
@pytest.mark.parametrize("make_physics", [inpainting, blur])
def test_an_exact_network_gives_the_exact_posterior_mean(make_physics, s):
    gaussian = GaussianProblem(make_physics(), SHAPE)
    x_s = 0.5 + s * (rand(2, *SHAPE) - 0.5)
    problem = Problem(gaussian.y.expand(2, *gaussian.y.shape[1:]), gaussian.physics)
    exact = ExactRAM(gaussian.mean, gaussian.covariance)
    got, h = RAMInitializer(exact, reference_level=0.3)(problem, x_s, s)
    torch.testing.assert_close(got.flatten(1), gaussian.posterior(x_s, s)[0], rtol=1e-8, atol=1e-8)
    assert h.flatten().tolist() == pytest.approx([(1 / (0.1**2 + 0.3**2) + s**-2) ** -0.5] * 2)


@pytest.mark.parametrize("name", PER_IMAGE)
def test_per_sample_operators_and_levels_give_the_exact_posterior_means(name):
    d = N * N
    factor = torch.randn(d, d, generator=seeded(0), dtype=torch.float64)
    covariance = 0.1 * factor @ factor.T / d + 0.02 * torch.eye(d, dtype=torch.float64)
    problem, mean, x_s = problem_of(name), rand(d), rand(B, 1, N, N, seed=2)
    got, _ = RAMInitializer(ExactRAM(mean, covariance))(problem, x_s, LEVELS)
    for i, (s, sigma_y) in enumerate(zip(LEVELS.double(), NOISE_LEVELS.double(), strict=True)):
        one = problem_of(name, images=slice(i, i + 1), sigma_y=1.0)
        A = dense_matrix(one.physics, (1, N, N))
        hessian = torch.linalg.inv(covariance) + A.T @ A / sigma_y**2 + torch.eye(d) / s**2
        right = torch.linalg.solve(covariance, mean) + x_s[i].flatten() / s**2
        right = right + A.T @ flat_image(one.y) / sigma_y**2
        expected = torch.linalg.solve(hessian, right)
        torch.testing.assert_close(got[i].flatten(), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PER_IMAGE)
def test_the_prox_of_the_joint_problem_under_a_broad_prior_is_the_linear_initializer(name):
    class Prox(torch.nn.Module):
        def forward(self, y, physics, sigma):
            gamma = (0.4 / sigma.reshape(-1, 1, 1, 1)) ** 2
            return physics.prox_l2(torch.full_like(y[-1], 0.3), y, gamma, solver="CG", max_iter=1)

    arguments = problem_of(name), rand(B, 1, N, N, seed=2), LEVELS
    got, expected = (i(*arguments)[0] for i in (RAMInitializer(Prox()), LinearInitializer(0.3, 0.4)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Warning. least_squares_implicit_backward")
@pytest.mark.parametrize("name", PER_IMAGE)
@pytest.mark.parametrize("copies", [1, 2])
def test_the_prox_is_that_of_the_measurements_it_is_given(name, copies):
    """RAM may have rescaled them: compared with the general solver of deepinv on the same."""
    x = rand(copies * B, 1, N, N)
    joint = WhitenedPhysics(problem_of(name).repeat(copies), x, LEVELS.repeat(copies))
    y = TensorList([7 * rand(*part.shape, seed=5) for part in joint.A(x)])
    gamma = torch.tensor([0.1, 2.0, 30.0]).double().reshape(-1, 1, 1, 1).repeat(copies, 1, 1, 1)
    general = LinearPhysics.prox_l2(joint, x, y, gamma, max_iter=500, tol=1e-10)
    torch.testing.assert_close(joint.prox_l2(x, y, gamma), general, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*PER_IMAGE, "Fourier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_joint_operator_has_its_adjoint_and_norm_at_most_one(name, dtype):
    joint = WhitenedPhysics(problem_of(name), rand(B, 1, N, N), LEVELS)
    u = rand(B, 1, N, N, seed=1).to(dtype)
    A_u = joint.A(u)
    v = TensorList([part + torch.rand_like(part) for part in A_u])
    adjoint = joint.A_adjoint(v)
    assert A_u[0].is_complex() == (name == "Fourier")
    assert adjoint.dtype == A_u[-1].dtype == dtype
    left = sum((a.conj() * b).real.flatten(1).sum(1) for a, b in zip(v, A_u, strict=True))
    torch.testing.assert_close(left, (adjoint * u).flatten(1).sum(1))
    for _ in range(30):
        u = joint.A_adjoint_A(u / u.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))
    norm_of_A = 2 if name == "stack" else 1
    assert (u.flatten(1).norm(dim=1) < norm_of_A + 1e-6).all()


def test_what_the_caller_owns_is_left_as_it_is(small_ram):
    problem = problem_of("stack", dtype=torch.float32)
    physics, x, levels = problem.physics, rand(B, 1, N, N, dtype=torch.float32), LEVELS.clone()
    before, x_before = physics.A(rand(B, 1, N, N, seed=3, dtype=torch.float32)), x.clone()
    attributes = [dict(vars(child)) for child in (physics, *physics.physics_list)]
    buffers = [copy.deepcopy(child.state_dict()) for child in physics.physics_list]
    RAMInitializer(small_ram)(problem, x, levels)
    assert torch.equal(x, x_before) and torch.equal(levels, LEVELS)
    assert all(torch.equal(a, b) for a, b in zip(problem.y, before, strict=True))
    children = (physics, *physics.physics_list)
    assert [dict(vars(child)).keys() for child in children] == [a.keys() for a in attributes]
    for child, state in zip(physics.physics_list, buffers, strict=True):
        assert all(torch.equal(child.state_dict()[key], state[key]) for key in state)


def test_autocast_is_off_inside(small_ram):
    problem, x = problem_of("Blur", dtype=torch.float32), rand(B, 1, N, N, dtype=torch.float32)
    initializer = RAMInitializer(small_ram)
    expected, h = initializer(problem, x, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = initializer(problem, x, 0.5)
        rounded, _ = initializer(problem, x.bfloat16(), 0.5)
    assert small_ram.autocast is False
    assert torch.equal(got[0], expected) and torch.equal(got[1], h)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [*PER_IMAGE, "Fourier"])
def test_it_runs_in_the_precision_of_its_weights(small_ram, name):
    problem, x = problem_of(name), rand(B, 1, N, N)
    got, _ = RAMInitializer(small_ram)(problem, x, LEVELS)
    assert got.dtype == torch.float64 and small_ram.conv.weight.dtype == torch.float32
    double, _ = RAMInitializer(small_ram.double())(problem, x, LEVELS)
    torch.testing.assert_close(got, double, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", [False, True])
def test_it_is_frozen_unless_asked_and_always_in_evaluation_mode(small_ram, tiny_prior, trainable):
    initializer = RAMInitializer(small_ram, trainable=trainable)
    unfolded = UnfoldedDenoiser(tiny_prior, 2, initializer).train()
    physics = Inpainting((1, 16, 16), mask=0.5, noise_model=GaussianNoise(0.1))
    x = rand(2, 1, 16, 16, dtype=torch.float32).requires_grad_()
    y = physics(x.detach())
    first, second = (initializer(Problem(y, physics), x, 0.5)[0] for _ in range(2))
    assert torch.equal(first, second)
    names = [name for name, _ in initializer.named_parameters()]
    assert list(initializer.trained_parameters()) == names * trainable
    unfolded(y, physics, x, LEVELS[:2]).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for parameter in small_ram.parameters():
        assert parameter.requires_grad == trainable
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trainable
    assert not any(parameter.requires_grad for parameter in tiny_prior.parameters())


def test_it_is_called_once_a_level_with_the_current_level(small_ram, tiny_prior):
    levels = []
    small_ram.register_forward_pre_hook(lambda *given: levels.append(given[-1]["sigma"]), with_kwargs=True)
    model = UD2M(UnfoldedDenoiser(tiny_prior, 1, RAMInitializer(small_ram)), sigmas=[78.0, 0.3, 0.01])
    physics = Inpainting((1, 16, 16), mask=0.5, noise_model=GaussianNoise(0.1))
    model(physics(torch.rand(2, 1, 16, 16)), physics)
    assert model.nfe == 6, "it counts as one evaluation a level"
    expected = [[(s**-2 + 0.1**-2) ** -0.5] * 2 for s in (78.0, 0.3, 0.01)]
    torch.testing.assert_close(torch.stack(levels), torch.tensor(expected))


def test_errors_come_before_the_network_and_name_the_argument(small_ram):
    def refuse(*_):
        raise AssertionError("the network was called")

    with pytest.raises(TypeError, match=r"ram must be a deepinv\.models\.RAM, got function"):
        RAMInitializer(refuse)
    initializer, x, denoising = RAMInitializer(small_ram), torch.zeros(2, 1, 8, 8), Denoising()
    small_ram.register_forward_pre_hook(refuse)
    colour, jpeg = x.expand(2, 4, 8, 8), JPEG((1, 8, 8), 50)
    for y, physics, x_s, sigma, error, message in (
        (colour, denoising, colour, 0.5, ValueError, "x_s has 4 channels.* takes images of 1 channels"),
        (jpeg.A(x), jpeg, x, 0.5, TypeError, "physics must be a deepinv LinearPhysics for RAM, got JPEG"),
        (x, denoising, x, torch.ones(3), ValueError, "sigma must be a scalar or one value per image"),
    ):
        with pytest.raises(error, match=message):
            initializer(Problem(y, physics, 0.1), x_s, sigma)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_ram_meets_the_reconstructor_and_the_denoiser_that_it_is(ram):
    x = torch.nn.functional.avg_pool2d(rand(1, 1, 256, 256, dtype=torch.float32), 4)
    noise = torch.randn(x.shape, generator=seeded(0))
    initializer, sigma_y = RAMInitializer(ram), 0.05
    physics = make("BlurFFT", 64, torch.float32, slice(0, 1))
    y = physics.A(x) + sigma_y * noise.roll(1, -1)

    high, _ = initializer(Problem(y, physics, sigma_y), x + 78 * noise, 78.0)
    assert relative(high, ram(y, physics, sigma=sigma_y)) < 5e-3

    # For A = I: RAM as a denoiser of the precision-weighted mean, at its level.
    s, denoising = 0.1, Denoising(ZeroNoise())
    x_s, level = x + s * noise, (s**-2 + sigma_y**-2) ** -0.5
    mean = level**2 * (y / sigma_y**2 + x_s / s**2)
    got, _ = initializer(Problem(y, denoising, sigma_y), x_s, s)
    assert relative(got, ram(mean, denoising, sigma=level)) < 1e-5


@torch.no_grad()
def test_the_rescaling_of_dark_measurements_does_no_harm(ram):
    """At s far below sigma_y RAM divides the whole problem by the weighted y, which is small. What is
    left of the problem is the denoising of x_s."""
    x = torch.nn.functional.avg_pool2d(rand(2, 1, 256, 256, dtype=torch.float32), 4)
    physics = make("BlurFFT", 64, torch.float32, slice(0, 2))
    y = physics.A(x)
    before, problem = y.clone(), Problem(y, physics, 0.3)
    assert WhitenedPhysics(problem, x, 0.005).whiten(y, x)[0].abs().max() < 0.025  # where ram.py rescales
    got, _ = RAMInitializer(ram)(problem, x, 0.005)
    assert torch.equal(y, before)
    assert relative(got, ram(x, Denoising(ZeroNoise()), sigma=0.005)) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [*((name, 64) for name in PER_IMAGE), ("BlurFFT", 40), ("stack", 40)])
def test_ram_treats_each_image_as_alone_and_passes_gradients(ram, name, n):
    """With n = 40 RAM pads the images."""
    both, image = slice(1, 3), slice(2, 3)
    x = rand(2, 1, n, n, dtype=torch.float32).requires_grad_()
    problems = [problem_of(name, n, torch.float32, part, NOISE_LEVELS[part]) for part in (both, image)]
    initializer = RAMInitializer(ram, trainable=True)
    # RAM has parameters that it does not use.
    named = {key: p for key, p in ram.named_parameters() if "zero_conv_skip" not in key}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together, _ = initializer(problems[0], x, LEVELS[both])
        grads = torch.autograd.grad(together.square().sum(), [x, *named.values()], allow_unused=True)
    for key, grad in zip(["x_s", *named], grads, strict=True):
        assert grad is not None and grad.isfinite().all() and grad.any(), key
    assert grads[0].flatten(1).any(1).all()
    with torch.no_grad():
        alone, _ = initializer(problems[1], x[1:], LEVELS[image])
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-4)
