"""The prox against dense solves, its gradients against finite differences, its interface."""

import contextlib
import warnings

import deepinv as dinv
import pytest
import torch
from conftest import dense_matrix, flat
from deepinv.physics import (
    MRI,
    Blur,
    BlurFFT,
    CompressedSensing,
    Decolorize,
    Denoising,
    Downsampling,
    GaussianNoise,
    Inpainting,
    LinearPhysics,
    Physics,
    SinglePixelCamera,
    StackedLinearPhysics,
    Tomography,
    Upsampling,
    ZeroNoise,
)
from deepinv.physics import noise as noises
from deepinv.utils import TensorList

from deepinv_ud2m.batching import RepeatedPhysics
from deepinv_ud2m.proximal import (
    NOISE_FLOOR,
    expand_scalar,
    has_closed_form,
    noise_level,
    posterior_prox,
    remember_backprojection,
)

N = 16
RHO, S, LAMBDA = 0.1, 0.2, 2.0


@contextlib.contextmanager
def default_dtype(dtype):
    """deepinv's constructors build filters, and complex spectra, in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def rand(*shape, seed=0, dtype=torch.float64):
    """The same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


def kernel(batch=1, size=5, seed=0):
    values = rand(batch, 1, size, size, seed=seed, dtype=torch.get_default_dtype())
    return values / values.sum((-2, -1), keepdim=True)


def gaussian(sigma=1.0):
    return dinv.physics.functional.gaussian_blur(sigma=(sigma, sigma)).to(torch.get_default_dtype())


def mask(*shape, seed=0):
    return (rand(*shape, seed=seed) < 0.5).to(torch.get_default_dtype())


def compressed_sensing():
    physics = CompressedSensing(N * N // 4, (1, N, N), dtype=torch.float64)
    physics.dtype = torch.get_default_dtype()
    return physics.to(physics.dtype)


def single_pixel_camera():
    return SinglePixelCamera(60, (1, N, N), rng=torch.Generator().manual_seed(0))


def downsampling(filter, padding="circular", size=N):
    return Downsampling((1, size, size), filter=filter, factor=4, padding=padding)


def stack():
    return StackedLinearPhysics(
        [Blur(gaussian(), padding="valid"), Inpainting((1, N, N), mask(1, N, N))]
    )


CASES = {  # image shape, constructor, closed form
    "BlurFFT": ((1, N, N), lambda: BlurFFT((1, N, N), gaussian()), True),
    "BlurFFT colour, odd width": ((3, N, N - 1), lambda: BlurFFT((3, N, N - 1), kernel()), True),
    "Blur circular": ((1, N, N), lambda: Blur(gaussian(), padding="circular"), False),
    "Blur valid": ((1, N, N), lambda: Blur(gaussian(), padding="valid"), False),
    "Blur replicate": ((1, N, N), lambda: Blur(kernel(), padding="replicate"), False),
    "Downsampling bicubic": ((1, N, N), lambda: downsampling("bicubic"), True),
    "Downsampling gaussian": ((1, 32, 32), lambda: downsampling(gaussian(4), size=32), True),
    "Downsampling bicubic replicate": ((1, N, N), lambda: downsampling("bicubic", "replicate"), False),
    "Downsampling gaussian reflect": (
        (1, 32, 32),
        lambda: downsampling(gaussian(4), "reflect", 32),
        False,
    ),
    "Downsampling, filter larger than image": ((1, N, N), lambda: downsampling(gaussian(4)), False),
    "Downsampling without filter": ((1, N, N), lambda: downsampling(None), False),
    "Downsampling, indivisible size": ((1, 18, 18), lambda: downsampling("bicubic", size=18), False),
    "Upsampling": ((1, N // 2, N // 2), lambda: Upsampling((1, N, N), "bicubic", factor=2), False),
    "Inpainting": ((3, N, N), lambda: Inpainting((3, N, N), mask(1, N, N)), True),
    "Denoising": ((1, N, N), lambda: Denoising(), True),
    "MRI": ((2, N, N), lambda: MRI(mask(1, 2, N, N), (2, N, N)), True),
    "CompressedSensing": ((1, N, N), compressed_sensing, False),
    "Decolorize": ((3, N, N), lambda: Decolorize(), False),
    "SinglePixelCamera": (
        (1, N, N),
        lambda: SinglePixelCamera(60, (1, N, N), rng=torch.Generator().manual_seed(0)),
        False,
    ),
    "Tomography": (
        (1, N, N),
        lambda: Tomography(10, N, normalize=True, dtype=torch.get_default_dtype()),
        False,
    ),
    "stack": ((1, N, N), stack, False),
}
DENSE = {}


def make(name, dtype=torch.float64):
    shape, constructor, closed_form = CASES[name]
    with default_dtype(dtype):
        physics = constructor()
    assert has_closed_form(physics, torch.Size((1, *shape))) == closed_form
    return shape, physics


def dense(name):
    if name not in DENSE:
        shape, physics = make(name)
        DENSE[name] = dense_matrix(physics, shape)
    return DENSE[name]


def sigma_y_for(gamma):
    return ((RHO**-2 + S**-2) * LAMBDA * gamma) ** -0.5


def problem(name, batch=2):
    """Images near a smooth truth and its noisy measurement, in float64."""
    shape, physics = make(name)
    truth = rand(batch, *shape)
    truth = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(truth, (2, 2, 2, 2), "circular"), 5, 1
    )
    x = truth + 0.1 * (rand(batch, *shape, seed=1) - 0.5)
    x_s = truth + 0.2 * (rand(batch, *shape, seed=2) - 0.5)
    return physics, x, x_s, cast(physics.A(truth), torch.float64, noise=0.01)


def cast(y, dtype, noise=0.0):
    if isinstance(y, TensorList):
        return TensorList([cast(part, dtype, noise) for part in y])
    return (y + noise * (rand(*y.shape, seed=3) - 0.5)).to(dtype)


def pick(y, i):
    return TensorList([part[i : i + 1] for part in y]) if isinstance(y, TensorList) else y[i : i + 1]


def exact(A, x, x_s, y, gamma):
    mean = (x / RHO**2 + x_s / S**2) / (RHO**-2 + S**-2)
    H = torch.eye(A.shape[1], dtype=torch.float64) + gamma * A.T @ A
    data = torch.stack([flat(pick(y, i)) for i in range(len(x))])
    return torch.linalg.solve(H, (mean.flatten(1) + gamma * data @ A).T).T.reshape(x.shape)


def relative_error(z, truth):
    return ((z.double() - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).max().item()


# ---------------------------------------------------------------------------------- the solution


@pytest.mark.parametrize("gamma", [1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_solve(name, gamma):
    physics, x, x_s, y = problem(name)
    truth = exact(dense(name), x, x_s, y, gamma)
    args = (S, RHO, LAMBDA, sigma_y_for(gamma))
    assert relative_error(posterior_prox(x, y, physics, x_s, *args, tol=1e-6), truth) < 1e-5
    assert relative_error(posterior_prox(x, y, physics, x_s, *args), truth) < 1.1e-5  # the default tol

    _, physics = make(name, torch.float32)
    z = posterior_prox(x.float(), cast(y, torch.float32), physics, x_s.float(), *args)
    # Rounding limits float32 to about 1e-7 gamma |A|^2: |A|^2 is 9 in compressed sensing.
    limit = 1e-2 if name == "CompressedSensing" and gamma == 1e4 else 1e-3
    assert z.dtype == torch.float32
    assert relative_error(z, truth) < limit


def test_inaccurate_solution_warns():
    physics, x, x_s, y = problem("Blur valid")
    with pytest.warns(UserWarning, match="stopped after 3 iterations"):
        posterior_prox(x, y, physics, x_s, S, RHO, 1.0, 0.001, max_iter=3)


def test_nan_measurement_gives_nan():
    physics, x, x_s, y = problem("Blur valid")
    y[1] = torch.nan
    z = posterior_prox(x, y, physics, x_s, S, RHO, 1.0, 0.05)
    assert z[0].isfinite().all() and z[1].isnan().all()


def test_zero_image_and_measurement():
    physics, x, x_s, y = problem("Blur valid")
    x[0], x_s[0], y[0] = 0, 0, 0
    x[1], x_s[1] = 0, 0  # a mean of zero, but a measurement
    z = posterior_prox(x, y, physics, x_s, S, RHO, LAMBDA, sigma_y_for(100.0), tol=1e-6)
    assert z[0].abs().max() == 0
    assert relative_error(z[1:], exact(dense("Blur valid"), x, x_s, y, 100.0)[1:]) < 1e-5


def per_sample_physics(name, index=slice(None)):
    with default_dtype(torch.float64):
        filters, masks = kernel(batch=3)[index], mask(3, 1, N, N)[index]
        return {
            "BlurFFT": lambda: BlurFFT((1, N, N), filters),
            "Blur": lambda: Blur(filters, padding="valid"),
            "Downsampling": lambda: downsampling(filters, "replicate"),
            "Inpainting": lambda: Inpainting((1, N, N), masks),
            "stack": lambda: StackedLinearPhysics(
                [Blur(filters, padding="circular"), Inpainting((1, N, N), masks)]
            ),
        }[name]()


@pytest.mark.parametrize("name", ["BlurFFT", "Blur", "Downsampling", "Inpainting", "stack"])
def test_batch_equals_each_image_alone(name):
    x, x_s = rand(3, 1, N, N), rand(3, 1, N, N, seed=1)
    rho, sigma_y = torch.tensor([0.05, 0.1, 0.3]), torch.tensor([0.1, 0.003, 0.02])
    physics = per_sample_physics(name)
    y = physics.A(rand(3, 1, N, N, seed=2))
    batch = posterior_prox(x, y, physics, x_s, S, rho, LAMBDA, sigma_y)
    for i in range(3):
        one = per_sample_physics(name, slice(i, i + 1))
        alone = posterior_prox(
            x[i : i + 1], pick(y, i), one, x_s[i : i + 1], S, rho[i], LAMBDA, sigma_y[i]
        )
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("gamma", [1.0, 50.0, 5000.0])
@pytest.mark.parametrize(
    "name", ["BlurFFT", "Downsampling bicubic", "Blur valid", "Blur replicate", "stack"]
)
def test_gradients_equal_finite_differences(name, gamma):
    physics, x, x_s, y = problem(name)
    weights = rand(*x.shape, seed=5) - 0.5
    parts = list(y) if isinstance(y, TensorList) else [y]
    scalars = torch.tensor(
        [[S, 1.1 * S], [RHO, RHO], [LAMBDA, LAMBDA], [sigma_y_for(gamma), 1.5 * sigma_y_for(gamma)]],
        dtype=torch.float64,
    )
    inputs = [x, x_s, *parts, *scalars]

    def loss(tol, x, x_s, *rest):
        data = TensorList(list(rest[:-4])) if isinstance(y, TensorList) else rest[0]
        return (weights * posterior_prox(x, data, physics, x_s, *rest[-4:], tol=tol)).sum()

    leaves = [value.clone().requires_grad_() for value in inputs]
    loss(1e-5, *leaves).backward()
    for i, (value, leaf) in enumerate(zip(inputs, leaves, strict=True)):
        # Each scalar of a batch by itself; images along random directions.
        directions = (
            torch.eye(2, dtype=torch.float64) if value.ndim == 1 else [rand(*value.shape, seed=6)]
        )
        for direction in directions:
            step = 1e-4 * value.abs().max() * direction
            moved = [[*inputs[:i], value + sign * step, *inputs[i + 1 :]] for sign in (1, -1)]
            difference = (loss(1e-11, *moved[0]) - loss(1e-11, *moved[1])) / 2
            torch.testing.assert_close((leaf.grad * step).sum(), difference, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("name", ["BlurFFT", "Blur valid", "stack"])
def test_gradcheck(name):
    physics, x, x_s, y = problem(name, batch=1)
    value = torch.tensor([0.05], dtype=torch.float64)

    def function(x, x_s, sigma, rho, lambda_, sigma_y):
        return posterior_prox(x, y, physics, x_s, sigma, rho, lambda_, sigma_y, tol=1e-11)

    inputs = [v.clone().requires_grad_() for v in (x, x_s, 4 * value, 2 * value, 40 * value, value)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, eps=1e-6, atol=1e-5, rtol=1e-3)


def test_gradient_of_one_image_of_a_batch():
    physics, x, x_s, y = problem("Blur valid")
    x.requires_grad_()
    posterior_prox(x, y, physics, x_s, S, RHO, 1.0, 0.01)[0].sum().backward()
    assert x.grad[0].abs().max() > 0 and x.grad[1].abs().max() == 0


def test_second_derivative_is_refused():
    physics, x, x_s, y = problem("Blur valid")
    x.requires_grad_()
    z = posterior_prox(x, y, physics, x_s, S, RHO, 1.0, 0.01)
    (grad,) = torch.autograd.grad((z**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("stacked", [False, True])
def test_updated_physics_is_refused_in_backward(stacked):
    physics, x, x_s, y = problem("stack" if stacked else "Blur valid")
    x.requires_grad_()
    z = posterior_prox(x, y, physics, x_s, S, RHO, 1.0, 0.05)
    (physics[0] if stacked else physics).update(filter=gaussian(1.0).double().roll(1, -1))
    with pytest.raises(RuntimeError, match="updated between"):
        z.sum().backward()


@pytest.mark.parametrize("name", ["Downsampling bicubic replicate", "Blur valid", "stack", "Tomography"])
def test_several_calls_in_one_graph(name):
    physics, x, x_s, y = problem(name)
    x.requires_grad_()
    z = x
    for _ in (1, 2, 3):
        z = posterior_prox(z, y, physics, x_s, S, RHO, 1.0, 0.05)
    z.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


# ---------------------------------------------------------------------------------- the interface


@pytest.mark.parametrize("batch", [3, N])  # N: the batch size equals the width
@pytest.mark.parametrize("name", ["BlurFFT", "Blur valid", "Downsampling bicubic", "MRI"])
def test_shapes_of_scalars(name, batch):
    physics, x, x_s, y = problem(name, batch)
    values = {"sigma": S, "rho": RHO, "lambda_": LAMBDA, "sigma_y": 0.03}
    reference = posterior_prox(x, y, physics, x_s, **values)
    for shape in [(), (1,), (1, 1, 1, 1), (batch,), (batch, 1, 1, 1)]:
        tensors = {k: torch.full(shape, v, dtype=torch.float64) for k, v in values.items()}
        torch.testing.assert_close(posterior_prox(x, y, physics, x_s, **tensors), reference)
        parameters = {k: torch.nn.Parameter(v) for k, v in tensors.items()}
        z = posterior_prox(x, y, physics, x_s, **parameters)
        torch.testing.assert_close(z, reference)
        z.square().sum().backward()
        assert all(p.grad is not None and p.grad.shape == shape for p in parameters.values())
    for argument in values:
        for shape in [(batch + 1,), (1, batch), (1, 1, 1, batch), (batch, 1, 1, N), (2, 1, 1, 1)]:
            wrong = values | {argument: torch.full(shape, 0.1)}
            with pytest.raises(ValueError, match=rf"^{argument} must be"):
                posterior_prox(x, y, physics, x_s, **wrong)


def test_values_per_image_stay_with_their_image():
    assert expand_scalar([1.0, 2.0], torch.zeros(2, 1, 2, 2), "rho").tolist() == [[[[1.0]]], [[[2.0]]]]


@pytest.mark.parametrize("name", ["Blur valid", "BlurFFT", "stack"])
def test_settings_of_the_physics_are_unchanged(name):
    physics, x, x_s, y = problem(name)
    physics.max_iter, physics.tol = 7, 0.1
    settings = physics.solver, physics.max_iter, physics.tol
    x.requires_grad_()
    posterior_prox(x, y, physics, x_s, S, RHO, 1.0, 0.05).square().sum().backward()
    assert (physics.solver, physics.max_iter, physics.tol) == settings


@pytest.mark.parametrize("name", ["BlurFFT", "Blur valid"])
def test_computes_in_float32_under_autocast(name):
    _, x, x_s, y = problem(name)
    _, physics = make(name, torch.float32)
    x, x_s, y = x.float(), x_s.float(), y.float()
    reference = posterior_prox(x, y, physics, x_s, S, RHO, 1.0, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        z = posterior_prox(x, y, physics, x_s, S, RHO, 1.0, 0.02)
        half = posterior_prox(x.bfloat16(), y, physics, x_s.bfloat16(), S, RHO, 1.0, 0.02)
    assert z.dtype == half.dtype == torch.float32
    assert torch.equal(z, reference)
    torch.testing.assert_close(half, reference, atol=0.02, rtol=0.02)


# ---------------------------------------------------------------------------------- noise levels


def blur(noise_model):
    return Blur(gaussian(), padding="valid", noise_model=noise_model)


def test_noise_level():
    assert noise_level(blur(GaussianNoise(0.03))).item() == pytest.approx(0.03)
    assert noise_level(blur(GaussianNoise(torch.tensor([0.1, 0.2])))).tolist() == pytest.approx(
        [0.1, 0.2]
    )
    assert noise_level(blur(ZeroNoise())) == NOISE_FLOOR
    assert noise_level(blur(GaussianNoise(0.03)), sigma_y=0.5) == 0.5
    assert noise_level(blur(noises.PoissonNoise()), sigma_y=0.5) == 0.5


def test_noise_level_is_that_of_the_prox():
    _, x, x_s, y = problem("Blur valid")
    levels = torch.tensor([0.1, 0.03], dtype=torch.float64)
    physics = Blur(gaussian().double(), padding="valid", noise_model=GaussianNoise(levels))
    z = posterior_prox(x, y, physics, x_s, S, RHO)
    assert torch.equal(z, posterior_prox(x, y, physics, x_s, S, RHO, 1.0, levels))


def test_noise_level_of_stacks():
    equal = StackedLinearPhysics([blur(GaussianNoise(0.1)), blur(GaussianNoise(torch.tensor([0.1])))])
    assert noise_level(equal).item() == pytest.approx(0.1)
    for other in (GaussianNoise(0.2), ZeroNoise(), noises.PoissonNoise()):
        different = StackedLinearPhysics([blur(GaussianNoise(0.1)), blur(other)])
        with pytest.raises(ValueError, match="sigma_y"):
            noise_level(different)
        assert noise_level(different, 0.3) == 0.3


@pytest.mark.parametrize(
    "noise_model",
    [
        noises.PoissonNoise(),
        noises.PoissonGaussianNoise(),
        noises.RicianNoise(),
        noises.UniformNoise(),
        noises.UniformGaussianNoise(),
        noises.PoissonNoise() * GaussianNoise(0.1),
        GaussianNoise(0.2) * GaussianNoise(0.1),
    ],
    ids=[
        "poisson",
        "poisson-gaussian",
        "rician",
        "uniform",
        "uniform-gaussian",
        "product",
        "product-gaussian",
    ],
)
def test_other_noise_is_refused(noise_model):
    with pytest.raises(ValueError, match="sigma_y"):
        noise_level(blur(noise_model))


def test_physics_without_prox_is_refused():
    x = rand(1, 1, 4, 4)
    with pytest.raises(TypeError, match="prox_l2"):
        posterior_prox(x, x, Physics(noise_model=GaussianNoise(0.1)), x, S, RHO)


@pytest.mark.parametrize("base", [Physics, LinearPhysics])
def test_own_prox_is_used_as_it_is(base):
    class Own(base):
        def prox_l2(self, z, y, gamma):
            self.given = z, y, gamma
            return 2 * z

    x, x_s, y = rand(2, 1, 4, 4), rand(2, 1, 4, 4, seed=1), rand(2, 1, 4, 4, seed=2)
    physics = Own()
    z = posterior_prox(x, y, physics, x_s, S, RHO, LAMBDA, sigma_y_for(30.0))
    mean, data, gamma = physics.given
    assert data is y and torch.equal(z, 2 * mean)
    torch.testing.assert_close(mean, (x / RHO**2 + x_s / S**2) / (RHO**-2 + S**-2))
    torch.testing.assert_close(gamma, torch.full((2, 1, 1, 1), 30.0, dtype=torch.float64))


def test_no_warnings():
    physics, x, x_s, y = problem("stack")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior_prox(x.requires_grad_(), y, physics, x_s, S, RHO, 1.0, 0.05).sum().backward()


# ------------------------------------------------------------------------- the back-projection of y


@pytest.mark.parametrize("name", CASES)
def test_remembered_backprojection_changes_nothing(name):
    physics, x, x_s, y = problem(name)
    args = (S, RHO, LAMBDA, 0.05)
    expected = posterior_prox(x, y, physics, x_s, *args)
    view = remember_backprojection(physics, y)
    assert torch.equal(posterior_prox(x, y, view, x_s, *args), expected)
    other = physics.A(x)
    assert not torch.equal(flat(other), flat(y))
    assert torch.equal(view.A_adjoint(other), physics.A_adjoint(other))
    assert "A_adjoint" not in vars(physics)


def test_backprojection_is_computed_once():
    physics, x, x_s, y = problem("Downsampling bicubic")
    calls = []
    adjoint = physics.A_adjoint
    physics.A_adjoint = lambda *args, **kwargs: calls.append(0) or adjoint(*args, **kwargs)
    view = remember_backprojection(physics, y)
    for _ in range(3):
        posterior_prox(x, y, view, x_s, S, RHO, LAMBDA, 0.05)
    assert len(calls) == 1


def test_backprojection_of_several_samples_is_computed_once():
    physics, x, x_s, y = problem("Downsampling bicubic")
    calls = []
    adjoint = physics.A_adjoint
    physics.A_adjoint = lambda *args, **kwargs: calls.append(0) or adjoint(*args, **kwargs)
    repeated = RepeatedPhysics(physics, x[:1], len(x), 0.05)
    expected = posterior_prox(x, y, repeated, x_s, S, RHO, LAMBDA, 0.05)
    view = remember_backprojection(repeated, y)
    calls.clear()
    assert torch.equal(posterior_prox(x, y, view, x_s, S, RHO, LAMBDA, 0.05), expected)
    assert not calls
    assert repeated.physics is physics


@pytest.mark.parametrize("name", ["sigma", "rho", "lambda_", "sigma_y"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "0.1"])
def test_scalars_that_are_not_positive_are_refused(name, value):
    physics, x, x_s, y = problem("Denoising")
    scalars = {"sigma": S, "rho": RHO, "lambda_": LAMBDA, "sigma_y": 0.05} | {name: value}
    with pytest.raises(TypeError if value == "0.1" else ValueError, match=f"{name} must be"):
        posterior_prox(x, y, physics, x_s, **scalars)
