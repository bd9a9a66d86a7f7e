"""The unfolded denoiser against the closed-form law of K LATINO iterations."""

import json
from pathlib import Path

import deepinv as dinv
import pytest
import torch
from conftest import GaussianProblem
from deepinv.models import DRUNet
from deepinv.physics import (
    Blur,
    BlurFFT,
    Denoising,
    Downsampling,
    GaussianNoise,
    Inpainting,
    StackedLinearPhysics,
)
from deepinv.utils import TensorList
from test_sampler import SHAPE, assert_gaussian, blur, inpainting

import deepinv_ud2m
from deepinv_ud2m import (
    UD2M,
    LinearInitializer,
    PseudoInverseInitializer,
    UnfoldedDenoiser,
    WienerInitializer,
    posterior_prox,
)
from deepinv_ud2m.physics import JPEG
from deepinv_ud2m.proximal import joint_level


def latino_law(problem, unfolded, x_s, s):
    """
    Mean and covariance of the K-th iterate, for a Gaussian prior, by the affine recursion
    x <- mu + G (P x + q + delta n - mu), written with dense matrices only.
    """
    identity = torch.eye(problem.d, dtype=torch.float64)
    normal = problem.A.T @ problem.A / problem.sigma_y**2
    back_projection = problem.A.T @ problem.y.flatten() / problem.sigma_y**2
    tau, mu0 = unfolded.initializer.std, unfolded.initializer.mean
    mean = torch.linalg.solve(
        normal + identity * (s**-2 + tau**-2),
        back_projection + x_s.flatten() * s**-2 + mu0 * tau**-2,
    )
    covariance = torch.zeros_like(identity)
    level = joint_level(torch.tensor(s), problem.sigma_y, unfolded.reference_level)
    for k in range(unfolded.num_iterations):
        rho, delta, lambda_ = (value.item() for value in unfolded.scalars(k, level))
        hessian = normal / lambda_ + identity * (s**-2 + rho**-2)
        P = torch.linalg.inv(hessian) * rho**-2
        q = torch.linalg.solve(hessian, back_projection / lambda_ + x_s.flatten() * s**-2)
        G = problem.denoiser.gain(delta)
        mean = problem.mean + G @ (P @ mean + q - problem.mean)
        covariance = G @ (P @ covariance @ P.T + delta**2 * identity) @ G.T
    return mean, covariance


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
@pytest.mark.parametrize("s", [0.2, 3.0])
@pytest.mark.parametrize("make_physics", [inpainting, blur])
def test_iterations_have_the_law_of_the_recursion(make_physics, s, num_iterations):
    problem = GaussianProblem(make_physics(), SHAPE)
    unfolded = UnfoldedDenoiser(
        problem.denoiser, num_iterations, LinearInitializer(), lambda_=0.7, tol=1e-10
    )
    with torch.no_grad():  # as if trained
        for offset, name in enumerate(("rho", "delta", "lambda")):
            getattr(unfolded, f"log_{name}").copy_(
                torch.linspace(-0.3, 0.4, num_iterations) + offset / 9
            )
    generator = torch.Generator().manual_seed(0)
    x_s = 0.5 + s * torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
    n = 4_000
    with torch.no_grad():
        draws = unfolded(
            problem.y.expand(n, *problem.y.shape[1:]), problem.physics, x_s.expand(n, *SHAPE), s,
            generator=generator,
        )  # fmt: skip
    mean, covariance = latino_law(problem, unfolded, x_s, s)
    assert_gaussian(draws.flatten(1), mean, covariance)


def test_iterate_is_prox_noise_denoise(gaussian_problem):
    problem = gaussian_problem(inpainting(), SHAPE)
    unfolded = UnfoldedDenoiser(problem.denoiser, 3)
    x_s = torch.full((1, *SHAPE), 0.4, dtype=torch.float64)
    level = torch.tensor(0.2)
    rho, delta, lambda_ = unfolded.scalars(1, level)
    noise = torch.randn(x_s.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = unfolded.iterate(1, x_s, problem.y, problem.physics, x_s, 0.5, 0.1, level, noise)
    z = posterior_prox(x_s, problem.y, problem.physics, x_s, 0.5, rho, lambda_, 0.1)
    assert torch.allclose(got, problem.denoiser(z + delta * noise, delta))


def test_scalars_start_at_the_documented_values():
    unfolded = UnfoldedDenoiser(torch.nn.Identity(), 3, delta=[4, 2, 1], rho=0.5, reference_level=0.0)
    s, sigma_y = 2.0, 0.1
    level = sigma_y * s / (sigma_y**2 + s**2) ** 0.5  # the paper's starting value
    for k, multiplier in enumerate([4, 2, 1]):
        h = joint_level(torch.tensor(s), torch.tensor(sigma_y), unfolded.reference_level)
        rho, delta, lambda_ = unfolded.scalars(k, h)
        assert torch.allclose(rho, torch.tensor(0.5 * level))
        assert torch.allclose(delta, torch.tensor(multiplier * level))
        assert lambda_ == 1


def test_default_delta_decreases_for_any_number_of_iterations():
    for num_iterations in (1, 2, 3, 8):
        delta = UnfoldedDenoiser(torch.nn.Identity(), num_iterations).start_delta
        assert len(delta) == num_iterations and (delta.diff() < 0).all()


def test_defaults_are_the_winners_of_the_stored_search():
    """benchmark/results/zero_shot.json, ranked as examples/tune_zero_shot.py does; exact steps only."""
    results = Path(deepinv_ud2m.__file__).parent / "benchmark" / "results" / "zero_shot.json"
    rows = json.loads(results.read_text())["rows"]
    rows = [row for row in rows if row["setting"]["eta"] == 1]
    best = {task: min(row["energy_score"][task] for row in rows) for task in rows[0]["energy_score"]}
    winner = min(rows, key=lambda row: sum(row["energy_score"][task] / best[task] for task in best))
    unfolded = UnfoldedDenoiser(torch.nn.Identity(), 3)
    assert pytest.approx(winner["setting"]) == {
        "delta_first": unfolded.start_delta[0].item(),
        "delta_last": unfolded.start_delta[-1].item(),
        "rho": unfolded.start_rho[0].item(),
        "reference_level": unfolded.reference_level,
        "eta": UD2M(unfolded).eta,
    }


@pytest.mark.parametrize("shared", [False, True])
def test_learned_scalars_get_true_gradients(gaussian_problem, shared):
    """delta too: the noise is reparameterised and the level continuous. Against differences."""
    problem = gaussian_problem(blur(), SHAPE)
    unfolded = UnfoldedDenoiser(problem.denoiser, 2, shared=shared, tol=1e-12).double()
    x_s = torch.full((1, *SHAPE), 0.4, dtype=torch.float64)
    target = torch.linspace(0, 1, 16, dtype=torch.float64).reshape(1, *SHAPE)

    def loss():
        generator = torch.Generator().manual_seed(0)
        draw = unfolded(problem.y, problem.physics, x_s, 0.5, generator=generator)
        return (draw - target).square().sum()

    loss().backward()
    for name in ("rho", "delta", "lambda"):
        parameter = getattr(unfolded, f"log_{name}")
        assert len(parameter) == (1 if shared else 2)
        for k in range(len(parameter)):
            with torch.no_grad():
                parameter[k] += 1e-5
                up = loss()
                parameter[k] -= 2e-5
                down = loss()
                parameter[k] += 1e-5
            difference = ((up - down) / 2e-5).item()
            assert abs(difference) > 1e-4, name
            assert abs(parameter.grad[k].item() / difference - 1) < 0.01, name


def test_per_sample_operators_and_levels_equal_each_image_alone(gaussian_problem):
    generator = torch.Generator().manual_seed(0)
    kernels = torch.rand(3, 1, 3, 3, generator=generator).double()
    sigma_y = torch.tensor([0.05, 0.1, 0.2]).double()
    levels = torch.tensor([0.3, 1.0, 5.0]).double()
    problem = gaussian_problem(Denoising(GaussianNoise(0.1)), (1, 8, 8))
    unfolded = UnfoldedDenoiser(problem.denoiser, 2)
    x = torch.rand(3, 1, 8, 8, generator=generator).double()
    x_s = torch.rand(3, 1, 8, 8, generator=generator).double()
    physics = BlurFFT((1, 8, 8), filter=kernels, noise_model=GaussianNoise(sigma_y))
    y = physics.A(x)
    together = unfolded(y, physics, x_s, levels, generator=_Zeros())
    for i in range(3):
        alone = BlurFFT(
            (1, 8, 8), filter=kernels[i : i + 1], noise_model=GaussianNoise(sigma_y[i].item())
        )
        expected = unfolded(y[i : i + 1], alone, x_s[i : i + 1], levels[i], generator=_Zeros())
        assert torch.allclose(together[i : i + 1], expected, atol=1e-7)


def _Zeros():
    """A stream that draws nothing, so that batches can be compared."""
    from deepinv_ud2m.randomness import SampleStreams

    class Zeros(SampleStreams):
        def __init__(self):
            pass

        def randn(self, like):
            return torch.zeros_like(like)

    return Zeros()


def test_the_prior_is_frozen_and_stays_in_evaluation_mode():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.Dropout(0.5))
    unfolded = UnfoldedDenoiser(_IgnoresLevel(network)).train()
    x = torch.rand(1, 1, 8, 8)
    delta = torch.full((1, 1, 1, 1), 0.1)
    assert torch.equal(unfolded.denoise(x, delta), unfolded.denoise(x, delta))
    trained = {name for name, parameter in unfolded.named_parameters() if parameter.requires_grad}
    assert trained == {"log_rho", "log_delta", "log_lambda"}


class _IgnoresLevel(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, sigma):
        return self.network(x)


SMALL = (2, 8, 8)
KERNEL = torch.tensor([[1.0, 2, 0], [2, 4, 1], [0, 1, 1]]).double()[None, None] / 12


def _circular_blur():
    return BlurFFT(SMALL, filter=KERNEL).double()


def _valid_blur():
    return Blur(filter=KERNEL, padding="valid")


def _super_resolution():
    return Downsampling(img_size=SMALL, filter=KERNEL, factor=2, padding="circular")


def _channels_of_their_own():
    return BlurFFT(SMALL, filter=torch.cat([KERNEL, KERNEL.mT.flip(-1)], 1)).double()


def _stack():
    mask = (torch.rand(1, *SMALL, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    return StackedLinearPhysics([Inpainting(SMALL, mask=mask), _circular_blur()])


WIENER_PROBLEMS = [_circular_blur, _valid_blur, _super_resolution, _channels_of_their_own, _stack]


def test_the_linear_initialiser_is_the_gaussian_posterior_mode(gaussian_problem):
    problem = gaussian_problem(blur(), SHAPE)
    x_s = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    got = LinearInitializer(mean=0.3, std=0.4)(problem.y, problem.physics, x_s, 0.7, problem.sigma_y)
    hessian = problem.A.T @ problem.A / problem.sigma_y**2
    hessian = hessian + (0.7**-2 + 0.4**-2) * torch.eye(problem.d, dtype=torch.float64)
    right = problem.A.T @ problem.y.flatten() / problem.sigma_y**2
    right = right + x_s.flatten() / 0.7**2 + 0.3 / 0.4**2
    assert torch.allclose(got.flatten(), torch.linalg.solve(hessian, right), atol=1e-4)


@pytest.mark.parametrize("make_physics", WIENER_PROBLEMS)
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_the_wiener_initialiser_is_the_gaussian_posterior_mean(make_physics, sigma):
    """In closed form and by conjugate gradients, against dense matrices."""
    physics, initializer = make_physics(), WienerInitializer(0.4, 1e-2, 2.0, 0.1, 0.7, 1e-6, 500)
    generator = torch.Generator().manual_seed(0)
    x_s = torch.rand(1, *SMALL, generator=generator).double()
    y = physics.A(torch.rand(1, *SMALL, generator=generator).double())
    d = x_s.numel()
    basis = torch.eye(d, dtype=torch.float64).reshape(d, *SMALL)

    def flat(y):
        return (
            torch.cat([part.flatten(1) for part in y], 1) if isinstance(y, TensorList) else y.flatten(1)
        )

    A = flat(physics.A(basis)).T
    # A stationary covariance, of two channels that correlate: circular convolutions of impulses.
    of_mean, of_deviation = (
        torch.fft.irfft2(power * torch.fft.rfft2(basis), s=SMALL[1:]).flatten(1)
        for power in initializer.powers(x_s)
    )
    averages = basis.mean(1, keepdim=True).expand_as(basis).flatten(1)
    covariance = averages @ of_mean + (torch.eye(d) - averages) @ of_deviation
    precision = torch.linalg.inv(covariance)
    hessian = A.T @ A / 0.05**2 + torch.eye(d) / sigma**2 + precision
    right = (
        A.T @ flat(y)[0] / 0.05**2
        + x_s.flatten() / sigma**2
        + precision @ torch.full((d,), 0.4).double()
    )
    got = initializer(y, physics, x_s, sigma, 0.05)
    torch.testing.assert_close(got.flatten(), torch.linalg.solve(hessian, right), atol=1e-4, rtol=0)


def test_the_wiener_initialiser_fits_the_spectrum_of_images():
    """Of 2000 images of a known spectrum, each parameter comes back within 10 %."""
    true = WienerInitializer(0.4, 1e-3, 2.0, 0.03, 0.8)
    noise = torch.randn(2000, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    amplitudes = [power.sqrt() for power in true.powers(noise)]
    spectrum = torch.fft.rfft2(noise)
    mean = spectrum.mean(1, keepdim=True)
    images = torch.fft.irfft2(amplitudes[1] * (spectrum - mean) + amplitudes[0] * mean)
    found = WienerInitializer.fit(0.4 + images, max_iter=7)
    assert found.max_iter == 7
    for name in ("mean", "scale", "decay", "cutoff", "correlation"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.1)


def test_without_a_linear_operator_the_wiener_initialiser_is_the_linear_one():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    physics = JPEG((3, 16, 16), quality=10)
    arguments = (physics(x), physics, x, 0.5, 0.01)
    assert torch.equal(WienerInitializer()(*arguments), LinearInitializer()(*arguments))


def test_the_pseudo_inverse_initialiser_blends_by_precision():
    physics = Inpainting((1, 2, 2), mask=torch.tensor([[[[1.0, 0], [0, 1]]]]))
    x_s, y = torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[1.0, 0], [0, 1]]]])
    got = PseudoInverseInitializer()(y, physics, x_s, 2.0, 1.0)
    assert torch.allclose(got, (4 * y + x_s) / 5)


def test_a_denoiser_that_takes_maps_of_levels_works():
    """deepinv's DRUNet refuses levels of some shapes."""
    denoiser = DRUNet(1, 1, nc=(8, 8, 8, 8), nb=1, pretrained=None)
    physics = Inpainting((1, 32, 32), mask=0.5, noise_model=GaussianNoise(0.05))
    x = torch.rand(2, 1, 32, 32)
    assert UnfoldedDenoiser(denoiser)(physics(x), physics, x, 0.5).shape == x.shape


class Identity(torch.nn.Module):
    def forward(self, w, delta):
        return w


@pytest.mark.parametrize("operator", ["blur", "super-resolution"])
def test_operators_keep_their_precision_under_autocast(operator):
    """Convolutions in bfloat16 are some per cent off, which a large gamma makes most of the image."""
    kernel = dinv.physics.functional.gaussian_blur(sigma=(1.0, 1.0))
    physics = {
        "blur": dinv.physics.Blur(kernel, padding="replicate"),
        "super-resolution": dinv.physics.Downsampling(
            (1, 32, 32), filter="gaussian", factor=4, padding="circular"
        ),
    }[operator]
    physics.set_noise_model(dinv.physics.GaussianNoise(0.02))
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    y = physics.A(x)
    unfolded = UnfoldedDenoiser(Identity(), 2)
    draws = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            draws.append(unfolded(y, physics, x, 0.5, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(*draws)
