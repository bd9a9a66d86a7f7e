"""Initial estimates without a network: what holds of all, and each against dense matrices."""

import warnings
from functools import partial

import pytest
import torch
from conftest import PER_IMAGE, dense_matrix, flat, per_image_physics, rand, refused, seeded
from deepinv.physics import Blur, BlurFFT, Denoising, Downsampling, Inpainting, StackedLinearPhysics
from test_sampler import SHAPE, blur

from deepinv_ud2m import Initializer, LinearInitializer, Problem, PseudoInverseInitializer, WienerInitializer
from deepinv_ud2m.physics import JPEG

B, N = 3, 16
SIGMA, SIGMA_Y = torch.tensor([0.1, 0.5, 20.0]).double(), torch.tensor([0.02, 0.1, 0.05]).double()
INITIALIZERS = {
    "linear": LinearInitializer(0.4, 0.3, 0.1),
    "pinv": PseudoInverseInitializer("pinv", 0.1),
    "adjoint": PseudoInverseInitializer("adjoint", 0.1),
    "Wiener": WienerInitializer(0.4, 1e-3, 2.0, 0.02, 0.5, 1e-8, 500, 0.1),
}


def make(name, images=slice(0, B), dtype=torch.float64):
    return per_image_physics(name, (2, N, N), images, dtype)


@pytest.mark.filterwarnings("ignore:Warning. least_squares_implicit_backward")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", PER_IMAGE)
@pytest.mark.parametrize("initializer", INITIALIZERS.values(), ids=INITIALIZERS)
def test_copies_of_a_batch_equal_each_image_alone(initializer, name, shared):
    """Operators, levels of states and noise levels differ from image to image; operators may not."""
    physics = make(name, slice(0, 1 if shared else B))
    truth, x_s = rand(B, 2, N, N, seed=2), rand(2 * B, 2, N, N, seed=3)
    y, sigma = physics.A(truth), torch.cat([SIGMA, SIGMA.flip(0)])
    x, h = initializer(Problem(y, physics, SIGMA_Y).repeat(2), x_s, sigma)
    assert x.shape == x_s.shape and h.shape == (2 * B, 1, 1, 1)
    for i, image in enumerate(x_s.split(1)):
        one = slice(i % B, i % B + 1)
        alone = physics if shared else make(name, one)
        problem = Problem(alone.A(truth[one]), alone, SIGMA_Y[one])
        # deepinv's pseudo-inverse is iterative, and loose.
        tolerance = 1e-2 if initializer is INITIALIZERS["pinv"] else 1e-6
        x_i, h_i = initializer(problem, image, sigma[i])
        torch.testing.assert_close(x[i : i + 1], x_i, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(h[i : i + 1], h_i)
        expected = (1 / (SIGMA_Y[one] ** 2 + 0.1**2) + 1 / sigma[i] ** 2) ** -0.5
        torch.testing.assert_close(h_i.flatten(), expected)


@pytest.mark.filterwarnings("ignore:Warning. least_squares_implicit_backward")
@pytest.mark.parametrize("images", [1, B])
@pytest.mark.parametrize("name", PER_IMAGE)
@pytest.mark.parametrize("initializer", INITIALIZERS.values(), ids=INITIALIZERS)
def test_autocast_changes_nothing(initializer, name, images):
    physics, x_s = make(name, slice(0, images), torch.float32), rand(B, 2, N, N, seed=3, dtype=torch.float32)
    y = physics.A(rand(B, 2, N, N, seed=2, dtype=torch.float32))
    expected = initializer(Problem(y, physics, 0.05), x_s, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = initializer(Problem(y, physics, 0.05), x_s, 0.5)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_the_wiener_initializer_stops_early_and_in_silence():
    physics, x_s = make("Blur"), rand(B, 2, N, N, seed=3)
    problem = Problem(physics.A(rand(B, 2, N, N, seed=2)), physics, 0.01)
    settings = [{"tol": 1e-8, "max_iter": 500}, {"tol": 1e-8, "max_iter": 3}, {"tol": 0.3, "max_iter": 500}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact, *early = (WienerInitializer(**setting)(problem, x_s, 0.5)[0] for setting in settings)
    assert all(1e-3 < (estimate - exact).abs().max() < 0.5 for estimate in early)


def test_one_level_for_all_images_is_that_of_each():
    """One float makes the filters once; the result is the same."""
    for name in ("BlurFFT", "Blur"):
        physics, x_s = make(name), rand(B, 2, N, N, seed=3)
        problem = Problem(physics.A(x_s), physics, 0.05)
        estimates = [INITIALIZERS["Wiener"](problem, x_s, sigma)[0] for sigma in (0.5, torch.full((B,), 0.5))]
        torch.testing.assert_close(*estimates)


def test_a_new_initializer_is_an_estimate():
    class Constant(Initializer):
        def estimate(self, problem, x_s, sigma):
            return torch.full_like(x_s, 0.25)

    y = rand(B, 1, N, N)
    x, h = Constant(reference_level=0.0)(Problem(y, Denoising(), 0.1), y, 0.2)
    assert (x == 0.25).all() and Initializer.registry["Constant"] is Constant
    torch.testing.assert_close(h, torch.full((B, 1, 1, 1), (0.1**-2 + 0.2**-2) ** -0.5).double())
    with pytest.raises(NotImplementedError):
        Initializer()(Problem(y, Denoising(), 0.1), y, 0.2)


NAN, INF = float("nan"), float("inf")
REFUSED = [
    *[(kind, "reference_level", value) for kind in INITIALIZERS for value in (-0.1, NAN, INF)],
    *[("linear", "std", value) for value in (0, -1.0, NAN, INF)],
    *[(kind, "mean", value) for kind in ("linear", "Wiener") for value in (NAN, INF)],
    *[("pinv", "mode", value) for value in ("dagger", None)],
    *[("Wiener", name, value) for name in ("scale", "cutoff", "tol") for value in (0, -1.0, NAN, INF)],
    *[("Wiener", "decay", value) for value in (-0.1, NAN, INF)],
    *[("Wiener", "correlation", value) for value in (-0.1, 1, NAN)],
    *[("Wiener", "max_iter", value) for value in (0, 1.5)],
]


def test_settings_and_images_that_are_refused():
    for kind, name, value in REFUSED:
        refused((partial(type(INITIALIZERS[kind]), **{name: value}), f"{name} must be"))
    for images in (torch.rand(3, 32, 32), torch.rand(4, 3, 8, 32), torch.full((4, 3, 32, 32), 0.5)):
        refused((partial(WienerInitializer.fit, images), "images must be"))


SMALL = (2, 8, 8)
KERNEL = torch.tensor([[1.0, 2, 0], [2, 4, 1], [0, 1, 1]]).double()[None, None] / 12


CIRCULAR = BlurFFT(SMALL, filter=KERNEL).double()
WIENER_PROBLEMS = {
    "circular blur": CIRCULAR,
    "valid blur": Blur(filter=KERNEL, padding="valid"),
    "super-resolution": Downsampling(img_size=SMALL, filter=KERNEL, factor=2, padding="circular"),
    "channels of their own": BlurFFT(SMALL, filter=torch.cat([KERNEL, KERNEL.mT.flip(-1)], 1)).double(),
    "stack": StackedLinearPhysics([Inpainting(SMALL, mask=(rand(1, *SMALL) < 0.5).double()), CIRCULAR]),
}


def test_the_linear_initializer_is_the_gaussian_posterior_mode(gaussian_problem):
    problem = gaussian_problem(blur(), SHAPE)
    x_s = torch.rand(1, *SHAPE, generator=seeded(0)).double()
    given = Problem(problem.y, problem.physics)
    got, h = LinearInitializer(mean=0.3, std=0.4, reference_level=0.15)(given, x_s, 0.7)
    hessian = problem.A.T @ problem.A / problem.sigma_y**2
    hessian = hessian + (0.7**-2 + 0.4**-2) * torch.eye(problem.d, dtype=torch.float64)
    right = problem.A.T @ problem.y.flatten() / problem.sigma_y**2
    right = right + x_s.flatten() / 0.7**2 + 0.3 / 0.4**2
    assert torch.allclose(got.flatten(), torch.linalg.solve(hessian, right), atol=1e-4)
    assert h.item() == pytest.approx((1 / (0.1**2 + 0.15**2) + 1 / 0.7**2) ** -0.5)


@pytest.mark.parametrize("name", WIENER_PROBLEMS)
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_the_wiener_initializer_is_the_gaussian_posterior_mean(name, sigma):
    """In closed form and by conjugate gradients, against dense matrices."""
    physics, initializer = WIENER_PROBLEMS[name], WienerInitializer(0.4, 1e-2, 2.0, 0.1, 0.7, 1e-6, 500)
    generator = seeded(0)
    x_s = torch.rand(1, *SMALL, generator=generator).double()
    y = physics.A(torch.rand(1, *SMALL, generator=generator).double())
    d = x_s.numel()
    basis = torch.eye(d, dtype=torch.float64).reshape(d, *SMALL)
    A = dense_matrix(physics, SMALL)
    # A stationary covariance, of two channels that correlate: circular convolutions of impulses.
    of_mean, of_deviation = (
        torch.fft.irfft2(power * torch.fft.rfft2(basis), s=SMALL[1:]).flatten(1)
        for power in initializer.powers(x_s)
    )
    averages = basis.mean(1, keepdim=True).expand_as(basis).flatten(1)
    covariance = averages @ of_mean + (torch.eye(d) - averages) @ of_deviation
    precision = torch.linalg.inv(covariance)
    hessian = A.T @ A / 0.05**2 + torch.eye(d) / sigma**2 + precision
    right = A.T @ flat(y) / 0.05**2 + x_s.flatten() / sigma**2 + precision @ torch.full((d,), 0.4).double()
    got, _ = initializer(Problem(y, physics, 0.05), x_s, sigma)
    torch.testing.assert_close(got.flatten(), torch.linalg.solve(hessian, right), atol=1e-4, rtol=0)


def test_the_wiener_initializer_fits_the_spectrum_of_images():
    """Of 2000 images of a known spectrum, each parameter comes back within 10 %."""
    true = WienerInitializer(0.4, 1e-3, 2.0, 0.03, 0.8)
    noise = torch.randn(2000, 3, 32, 32, generator=seeded(0))
    amplitudes = [power.sqrt() for power in true.powers(noise)]
    spectrum = torch.fft.rfft2(noise)
    mean = spectrum.mean(1, keepdim=True)
    images = torch.fft.irfft2(amplitudes[1] * (spectrum - mean) + amplitudes[0] * mean)
    found = WienerInitializer.fit(0.4 + images, max_iter=7)
    assert found.max_iter == 7
    for name in ("mean", "scale", "decay", "cutoff", "correlation"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.1)


def test_without_a_linear_operator_the_wiener_initializer_is_the_linear_one():
    x = torch.rand(1, 3, 16, 16, generator=seeded(0))
    physics = JPEG((3, 16, 16), quality=10)
    problem = Problem(physics(x), physics, 0.01)
    assert torch.equal(WienerInitializer(0.4)(problem, x, 0.5)[0], LinearInitializer(0.4)(problem, x, 0.5)[0])


def test_the_pseudo_inverse_initializer_blends_by_precision():
    physics = Inpainting((1, 2, 2), mask=torch.tensor([[[[2.0, 0], [0, 2]]]]))
    x_s, y = torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[1.0, 0], [0, 1]]]])
    for mode, back_projection in (("pinv", y / 2), ("adjoint", 2 * y)):
        got, _ = PseudoInverseInitializer(mode)(Problem(y, physics, 1.0), x_s, 2.0)
        torch.testing.assert_close(got, (4 * back_projection + x_s) / 5)
