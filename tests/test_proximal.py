"""The prox against dense solves, its gradients against finite differences, its interface."""

import deepinv as dinv
import pytest
import torch
from conftest import dense_matrix, flat, pick, rand, seeded
from deepinv import physics as dp
from deepinv.utils import TensorList

from deepinv_ud2m import Problem, UnfoldedDenoiser, posterior_prox
from deepinv_ud2m.conjugate_gradients import regularised_least_squares
from deepinv_ud2m.physics.traits import has_closed_form

N = 16
RHO, S, LAMBDA = 0.1, 0.2, 2.0


def kernel(batch=1, size=5, seed=0):
    values = rand(batch, 1, size, size, seed=seed, dtype=torch.get_default_dtype())
    return values / values.sum((-2, -1), keepdim=True)


def gaussian(sigma=1.0):
    return dinv.physics.functional.gaussian_blur(sigma=(sigma, sigma)).to(torch.get_default_dtype())


def mask(*shape, seed=0):
    return (rand(*shape, seed=seed) < 0.5).to(torch.get_default_dtype())


def compressed_sensing():
    physics = dp.CompressedSensing(N * N // 4, (1, N, N), dtype=torch.float64)
    physics.dtype = torch.get_default_dtype()
    return physics.to(physics.dtype)


def downsampling(filter, padding="circular", size=N):
    return dp.Downsampling((1, size, size), filter=filter, factor=4, padding=padding)


def stack():
    inpainting = dp.Inpainting((1, N, N), mask(1, N, N))
    return dp.StackedLinearPhysics([dp.Blur(gaussian(), padding="valid"), inpainting])


CASES = {  # image shape, constructor, closed form
    "BlurFFT": ((1, N, N), lambda: dp.BlurFFT((1, N, N), gaussian()), True),
    "BlurFFT colour, odd width": ((3, N, N - 1), lambda: dp.BlurFFT((3, N, N - 1), kernel()), True),
    "Blur circular": ((1, N, N), lambda: dp.Blur(gaussian(), padding="circular"), False),
    "Blur valid": ((1, N, N), lambda: dp.Blur(gaussian(), padding="valid"), False),
    "Blur replicate": ((1, 8, 8), lambda: dp.Blur(kernel(), padding="replicate"), False),
    "Downsampling bicubic": ((1, N, N), lambda: downsampling("bicubic"), True),
    "Downsampling gaussian": ((1, 32, 32), lambda: downsampling(gaussian(4), size=32), True),
    "Downsampling bicubic replicate": ((1, N, N), lambda: downsampling("bicubic", "replicate"), False),
    "Downsampling gaussian reflect": ((1, 32, 32), lambda: downsampling(gaussian(4), "reflect", 32), False),
    "Downsampling, filter larger than image": ((1, N, N), lambda: downsampling(gaussian(4)), False),
    "Downsampling without filter": ((1, N, N), lambda: downsampling(None), False),
    "Downsampling, indivisible size": ((1, 18, 18), lambda: downsampling("bicubic", size=18), False),
    "Upsampling": ((1, N // 2, N // 2), lambda: dp.Upsampling((1, N, N), "bicubic", factor=2), False),
    "Inpainting": ((3, N, N), lambda: dp.Inpainting((3, N, N), mask(1, N, N)), True),
    "Denoising": ((1, N, N), lambda: dp.Denoising(), True),
    "MRI": ((2, N, N), lambda: dp.MRI(mask(1, 2, N, N), (2, N, N)), True),
    "CompressedSensing": ((1, N, N), compressed_sensing, False),
    "Decolorize": ((3, N, N), lambda: dp.Decolorize(), False),
    "SinglePixelCamera": ((1, N, N), lambda: dp.SinglePixelCamera(60, (1, N, N), rng=seeded(0)), False),
    "Tomography": (
        (1, N, N),
        lambda: dp.Tomography(10, N, normalize=True, dtype=torch.get_default_dtype()),
        False,
    ),
    "stack": ((1, N, N), stack, False),
}
DENSE = {}


def make(name, dtype=torch.float64):
    shape, constructor, closed_form = CASES[name]
    try:  # deepinv's constructors build filters, and complex spectra, in the default dtype
        torch.set_default_dtype(dtype)
        physics = constructor()
    finally:
        torch.set_default_dtype(torch.float32)
    assert has_closed_form(physics, torch.Size((1, *shape))) == closed_form
    return shape, physics


def dense(name):
    if name not in DENSE:
        shape, physics = make(name)
        DENSE[name] = dense_matrix(physics, shape)
    return DENSE[name]


def sigma_y_for(gamma):
    return ((RHO**-2 + S**-2) * LAMBDA * gamma) ** -0.5


def case(name, batch=2):
    """Images near a smooth truth and its noisy measurement, in float64."""
    shape, physics = make(name)
    truth = torch.nn.functional.pad(rand(batch, *shape), (2, 2, 2, 2), "circular")
    truth = torch.nn.functional.avg_pool2d(truth, 5, 1)
    x = truth + 0.1 * (rand(batch, *shape, seed=1) - 0.5)
    x_s = truth + 0.2 * (rand(batch, *shape, seed=2) - 0.5)
    return physics, x, x_s, cast(physics.A(truth), torch.float64, noise=0.01)


def cast(y, dtype, noise=0.0):
    if isinstance(y, TensorList):
        return TensorList([cast(part, dtype, noise) for part in y])
    return (y + noise * (rand(*y.shape, seed=3) - 0.5)).to(dtype)


def exact(A, x, x_s, y, gamma):
    mean = (x / RHO**2 + x_s / S**2) / (RHO**-2 + S**-2)
    H = torch.eye(A.shape[1], dtype=torch.float64) + gamma * A.T @ A
    data = torch.stack([flat(pick(y, slice(i, i + 1))) for i in range(len(x))])
    return torch.linalg.solve(H, (mean.flatten(1) + gamma * data @ A).T).T.reshape(x.shape)


def relative_error(z, truth):
    return ((z.double() - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).max().item()


@pytest.mark.parametrize("gamma", [1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_solve(name, gamma):
    physics, x, x_s, y = case(name)
    truth = exact(dense(name), x, x_s, y, gamma)
    problem = Problem(y, physics, sigma_y_for(gamma))
    assert relative_error(posterior_prox(problem, x, x_s, S, RHO, LAMBDA, tol=1e-6), truth) < 1e-5
    assert relative_error(posterior_prox(problem, x, x_s, S, RHO, LAMBDA), truth) < 1.1e-5  # the default tol

    problem = Problem(cast(y, torch.float32), make(name, torch.float32)[1], sigma_y_for(gamma))
    z = posterior_prox(problem, x.float(), x_s.float(), S, RHO, LAMBDA)
    # Rounding limits float32 to about 1e-7 gamma |A|^2: |A|^2 is 9 in compressed sensing.
    limit = 1e-2 if name == "CompressedSensing" and gamma == 1e4 else 1e-3
    assert z.dtype == torch.float32
    assert relative_error(z, truth) < limit


def test_the_tolerance_bounds_the_error():
    """Of the prox and of its gradient."""
    physics, x, x_s, y = case("stack")
    problem, truth = Problem(y, physics, sigma_y_for(1e3)), exact(dense("stack"), x, x_s, y, 1e3)
    errors, gradients = [], []
    for tol in (1e-1, 1e-3, 1e-8):
        z = posterior_prox(problem, x.requires_grad_(), x_s, S, RHO, LAMBDA, tol=tol)
        errors.append(relative_error(z, truth))
        gradients.append(torch.autograd.grad(z.sum(), x)[0])
    assert 1e-7 < errors[1] < 1e-3 < errors[0] < 1e-1 and errors[2] < 1e-7
    assert [relative_error(gradient, gradients[2]) > 1e-6 for gradient in gradients] == [True, True, False]


def test_an_iteration_asks_for_an_error_in_units_of_its_noise():
    physics, x, x_s, y = case("stack")
    problem, one = Problem(y, physics, sigma_y_for(1e3)), torch.ones(2, 1, 1, 1).double()
    unfolded = UnfoldedDenoiser(torch.nn.Identity(), 1, rho=RHO, lambda_=LAMBDA, tol=0.03)
    unfolded.denoise = lambda w, delta: w
    rho, delta, lambda_ = unfolded.scalars(0, one)
    z = posterior_prox(problem, x, x_s, S, rho, lambda_, atol=0.03 * delta)
    assert torch.equal(unfolded.iterate(0, x, problem, x_s, S, one, 0.0), z)
    truth = posterior_prox(problem, x, x_s, S, rho, lambda_, tol=1e-10)
    error = (z - truth).square().mean((1, 2, 3)).sqrt()
    assert bool((error < 0.03 * delta.flatten()).all()) and bool((error > 1e-6).all())
    unfolded.max_iter = 1
    with pytest.warns(UserWarning, match="stopped after 1 iterations"):
        unfolded.iterate(0, 100 * x, problem, x_s, S, 0.01 * one, 0.0)


def test_nan_measurement_gives_nan():
    physics, x, x_s, y = case("Blur valid")
    problem = Problem(y, physics, 0.05)
    for nan in ([1], [0, 1]):
        y[nan] = torch.nan
        z = posterior_prox(problem.of(y, problem.sigma_y), x, x_s, S, RHO)
        assert [image.isfinite().all().item() for image in z] == [i not in nan for i in (0, 1)]
        assert z[nan].isnan().all()


def test_zero_image_and_measurement():
    physics, x, x_s, y = case("Blur valid")
    x[0], x_s[0], y[0] = 0, 0, 0
    x[1], x_s[1] = 0, 0  # a mean of zero, but a measurement
    z = posterior_prox(Problem(y, physics, sigma_y_for(100.0)), x, x_s, S, RHO, LAMBDA, tol=1e-6)
    assert z[0].abs().max() == 0
    assert relative_error(z[1:], exact(dense("Blur valid"), x, x_s, y, 100.0)[1:]) < 1e-5


@pytest.mark.parametrize("gamma", [1.0, 50.0, 5000.0])
@pytest.mark.parametrize("name", ["BlurFFT", "Downsampling bicubic", "Blur valid", "Blur replicate", "stack"])
def test_gradients_equal_finite_differences(name, gamma):
    physics, x, x_s, y = case(name)
    weights = rand(*x.shape, seed=5) - 0.5
    parts = list(y) if isinstance(y, TensorList) else [y]
    sigma_y = sigma_y_for(gamma)
    scalars = [[S, 1.1 * S], [RHO, RHO], [LAMBDA, LAMBDA], [sigma_y, 1.5 * sigma_y]]
    inputs = [x, x_s, *parts, *torch.tensor(scalars, dtype=torch.float64)]

    def losses(tol, x, x_s, *rest):
        """One per image, which depends on nothing of the other."""
        *parts, sigma, rho, lambda_, sigma_y = rest
        problem = Problem(TensorList(parts) if isinstance(y, TensorList) else parts[0], physics, sigma_y)
        z = posterior_prox(problem, x, x_s, sigma, rho, lambda_, tol=tol)
        return (weights * z).flatten(1).sum(1)

    leaves = [value.clone().requires_grad_() for value in inputs]
    losses(1e-5, *leaves).sum().backward()
    for i, (value, leaf) in enumerate(zip(inputs, leaves, strict=True)):
        step = 1e-4 * value.abs().max() * (rand(*value.shape, seed=6) if value.ndim > 1 else 1)
        up, down = ([*inputs[:i], value + sign * step, *inputs[i + 1 :]] for sign in (1, -1))
        difference = (losses(1e-10, *up) - losses(1e-10, *down)) / 2
        slope = (leaf.grad * step).reshape(2, -1).sum(1)
        torch.testing.assert_close(slope, difference, rtol=1e-2, atol=1e-11)


@pytest.mark.parametrize("name", ["BlurFFT", "Blur valid", "stack"])
def test_gradcheck(name):
    physics, x, x_s, y = case(name, batch=1)
    value = torch.tensor([0.05], dtype=torch.float64)

    def function(x, x_s, sigma, rho, lambda_, sigma_y):
        return posterior_prox(Problem(y, physics, sigma_y), x, x_s, sigma, rho, lambda_, tol=1e-11)

    inputs = [v.clone().requires_grad_() for v in (x, x_s, 4 * value, 2 * value, 40 * value, value)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("how", ["update", "in place"])
def test_updated_physics_and_second_derivatives_are_refused(how):
    physics, x, x_s, y = case("stack")
    z = posterior_prox(Problem(y, physics, 0.05), x.requires_grad_(), x_s, S, RHO)
    (grad,) = torch.autograd.grad((z**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    blur = physics[0]
    blur.update(filter=blur.filter.roll(1, -1)) if how == "update" else blur.filter.mul_(2)
    with pytest.raises(RuntimeError, match="updated between"):
        z.sum().backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["Downsampling bicubic replicate", "Blur valid", "stack", "Tomography"])
def test_several_calls_in_one_graph(name):
    physics, x, x_s, y = case(name)
    problem, z = Problem(y, physics, 0.05), x.requires_grad_()
    for _ in (1, 2, 3):
        z = posterior_prox(problem, z, x_s, S, RHO)
    z.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def solve(physics, x, x_s, y, sigma_y, **scalars):
    return posterior_prox(Problem(y, physics, sigma_y), x, x_s, **scalars)


@pytest.mark.parametrize("batch", [3, N])  # N: the batch size equals the width
@pytest.mark.parametrize("name", ["BlurFFT", "Blur valid", "Downsampling bicubic", "MRI"])
def test_shapes_of_scalars(name, batch):
    arguments = case(name, batch)
    values = {"sigma": S, "rho": RHO, "lambda_": LAMBDA, "sigma_y": 0.03}
    reference = solve(*arguments, **values)
    for shape in [(), (1,), (1, 1, 1, 1), (batch,), (batch, 1, 1, 1)]:
        tensors = {k: torch.full(shape, v, dtype=torch.float64) for k, v in values.items()}
        torch.testing.assert_close(solve(*arguments, **tensors), reference)
        parameters = {k: torch.nn.Parameter(v) for k, v in tensors.items()}
        z = solve(*arguments, **parameters)
        torch.testing.assert_close(z, reference)
        z.square().sum().backward()
        assert all(p.grad is not None and p.grad.shape == shape for p in parameters.values())
    for argument in values:
        for shape in [(batch + 1,), (1, batch), (1, 1, 1, batch), (batch, 1, 1, N), (2, 1, 1, 1)]:
            with pytest.raises(ValueError, match=rf"^{argument} must be"):
                solve(*arguments, **values | {argument: torch.full(shape, 0.1)})


@pytest.mark.parametrize("name", ["sigma", "rho", "lambda_", "sigma_y"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "0.1"])
def test_scalars_that_are_not_positive_are_refused(name, value):
    scalars = {"sigma": S, "rho": RHO, "lambda_": LAMBDA, "sigma_y": 0.05} | {name: value}
    with pytest.raises(TypeError if value == "0.1" else ValueError, match=f"{name} must be"):
        solve(*case("Denoising"), **scalars)


@pytest.mark.parametrize("base", [dp.Physics, dp.LinearPhysics])
def test_own_prox_is_used_as_it_is(base):
    given = []

    class Own(base):
        def A(self, x):
            return x

        def A_adjoint(self, y):
            return y

        def prox_l2(self, z, y, gamma):
            given.extend((z, y, gamma))
            return 2 * z

    x, x_s, y = (rand(2, 1, 4, 4, seed=seed) for seed in range(3))
    physics = Own(noise_model=dp.GaussianNoise(0.1))
    z = posterior_prox(Problem(y, physics, sigma_y_for(30.0)), x, x_s, S, RHO, LAMBDA)
    mean, data, gamma = given
    assert data is y and torch.equal(z, 2 * mean)
    torch.testing.assert_close(mean, (x / RHO**2 + x_s / S**2) / (RHO**-2 + S**-2))
    torch.testing.assert_close(gamma, torch.full((2, 1, 1, 1), 30.0, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name, (*_, closed_form) in CASES.items() if closed_form])
def test_closed_forms_are_those_of_the_physics(name):
    """The cached adjoint of the measurements changes nothing, and the physics is left as it is."""
    physics, x, x_s, y = case(name)
    gamma = torch.tensor([3.0, 50.0]).double().reshape(2, 1, 1, 1)
    problem = Problem(y, physics, 0.05)
    assert torch.equal(problem.prox(x, gamma), physics.prox_l2(x, y, gamma))
    other = physics.A(x_s)
    assert torch.equal(problem.of(other, problem.sigma_y).prox(x, gamma), physics.prox_l2(x, other, gamma))
    assert "A_adjoint" not in vars(physics)


def test_regularised_least_squares():
    """The solver alone, of a matrix, with the gradients of the dense solve."""
    A, mean, y = rand(12, 16) - 0.5, rand(2, 1, 4, 4, seed=1), rand(2, 12, seed=2)
    gamma = torch.tensor([0.3, 20.0]).double().reshape(2, 1, 1, 1)
    adjoint = (y @ A).reshape(mean.shape)
    inputs = [value.requires_grad_() for value in (mean, adjoint, gamma)]
    z = regularised_least_squares(*inputs, lambda x: (x.flatten(1) @ A.T @ A).reshape(x.shape), tol=1e-12)
    H = torch.eye(16).double() + gamma.reshape(2, 1, 1) * (A.T @ A)
    expected = torch.linalg.solve(H, (mean + gamma * adjoint).flatten(1)).reshape(z.shape)
    torch.testing.assert_close(z, expected)
    weights = rand(*z.shape, seed=3)
    grads = (torch.autograd.grad((weights * result).sum(), inputs) for result in (z, expected))
    torch.testing.assert_close(*grads)
