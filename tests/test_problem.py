"""A problem: what it refuses, and several samples of each measurement against the loop over them."""

import warnings

import pytest
import torch
from conftest import PER_IMAGE, per_image_physics, pick, rand, refused
from deepinv import physics as dp
from deepinv.physics.functional import gaussian_blur
from deepinv.utils import TensorList

from deepinv_ud2m import Problem, posterior_prox
from deepinv_ud2m.physics import JPEG

N, B, COPIES = 16, 3, 4
CLOSED_FORM = {name: name not in ("Blur", "stack") for name in [*PER_IMAGE, "JPEG"]}
LEVELS = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)


def make(name, batch=B, dtype=torch.float64):
    """A physics with an operator of its own for each image."""
    if name == "JPEG":
        return JPEG((1, N, N), torch.tensor([10.0, 50, 90])[:batch])
    return per_image_physics(name, (1, N, N), slice(batch), dtype)


def copy_of(batch, k, size=B):
    return pick(batch, slice(k * size, (k + 1) * size))


def assert_equal_copies(result, copies):
    for k, expected in enumerate(copies):
        part = copy_of(result, k)
        assert isinstance(part, TensorList) == isinstance(expected, TensorList)
        pairs = zip(part, expected, strict=True) if isinstance(part, TensorList) else [(part, expected)]
        for a, b in pairs:
            torch.testing.assert_close(a, b)


@pytest.fixture(params=list(CLOSED_FORM))
def case(request):
    """A problem of B images, the same repeated, and that many images."""
    physics = make(request.param)
    problem = Problem(physics.A(rand(B, 1, N, N)), physics, LEVELS)
    assert problem.has_closed_form() == problem.repeat(2).has_closed_form() == CLOSED_FORM[request.param]
    return problem, problem.repeat(2).repeat(2), rand(COPIES * B, 1, N, N, seed=2)


def test_shapes_and_levels_follow_their_images(case):
    problem, repeated, x = case
    assert problem.repeat(1) is problem
    assert problem.shape == (B, 1, N, N) and repeated.shape == x.shape
    assert problem.sigma_y.flatten().tolist() == LEVELS.tolist()
    assert repeated.sigma_y.flatten().tolist() == LEVELS.tolist() * COPIES
    assert_equal_copies(repeated.y, [problem.y] * COPIES)
    assert_equal_copies(repeated.adjoint, [problem.physics.A_adjoint(problem.y)] * COPIES)


def test_prox_equals_the_loop(case):
    problem, repeated, x = case
    x_s, rho = rand(*x.shape, seed=3), 0.1 + rand(COPIES * B, seed=5)
    loop = [
        posterior_prox(problem, copy_of(x, k), copy_of(x_s, k), 0.2, copy_of(rho, k), 2.0)
        for k in range(COPIES)
    ]
    assert_equal_copies(posterior_prox(repeated, x, x_s, 0.2, rho, 2.0), loop)


def test_other_measurements_of_the_same_operator(case):
    problem, repeated, x = case
    if not problem.is_linear:
        return
    y, sigma_y = repeated.A(x), 0.01 + 0.9 * rand(COPIES * B, 1, 1, 1, seed=4)
    mean, gamma = rand(*x.shape, seed=3), 10 * rand(COPIES * B, 1, 1, 1, seed=5)
    other = repeated.of(y, sigma_y)
    loop = [Problem(copy_of(y, k), problem.physics, copy_of(sigma_y, k)) for k in range(COPIES)]
    assert_equal_copies(other.adjoint, [one.adjoint for one in loop])
    assert torch.equal(other.sigma_y, sigma_y)
    proxes = [one.prox(copy_of(mean, k), copy_of(gamma, k)) for k, one in enumerate(loop)]
    assert_equal_copies(other.prox(mean, gamma), proxes)


def test_update_of_a_repeated_stack_is_refused_in_backward():
    physics, x = make("stack"), rand(COPIES * B, 1, N, N).requires_grad_()
    problem = Problem(physics.A(x[:B].detach()), physics, LEVELS).repeat(COPIES)
    z = posterior_prox(problem, x, x, 0.2, 0.1)
    physics[0].update(filter=rand(B, 1, 5, 5, seed=9))
    with pytest.raises(RuntimeError, match="updated between"):
        z.sum().backward()


@pytest.mark.parametrize("copies", [1, COPIES])
@pytest.mark.parametrize("name", CLOSED_FORM)
@pytest.mark.parametrize("batch", [1, B])
def test_the_adjoint_is_computed_once(name, batch, copies, monkeypatch):
    physics = make(name, batch)
    x, y = rand(copies * batch, 1, N, N), physics.A(rand(batch, 1, N, N))
    calls, adjoint = [], physics.A_adjoint
    monkeypatch.setattr(physics, "A_adjoint", lambda y, **_: calls.append(y) or adjoint(y))
    problem = Problem(y, physics, 0.05).repeat(copies)
    assert sum(given is y for given in calls) == 1
    first = len(calls)
    posterior_prox(problem, x, x, 0.2, 0.1)
    assert not [given for given in calls[first:] if given is y]
    if CLOSED_FORM[name]:
        assert len(calls) == 1
        if batch == 1:
            posterior_prox(problem.of(problem.y + 0.01, problem.sigma_y), x, x, 0.2, 0.1)
            assert len(calls) == 2


def test_the_pseudo_inverse_changes_nothing_of_the_physics():
    """deepinv's stores its solver."""
    physics = dp.Tomography(5, img_width=16, solver="lsqr")
    problem = Problem(physics.A(torch.rand(1, 1, 16, 16)), physics, 0.1)
    problem.A_dagger()
    assert physics.solver == "lsqr"


def test_inference_mode():
    """A physics that was made under it does not hinder a backward pass outside."""
    with torch.inference_mode():
        physics = make("Blur", 1)
        y = physics.A(rand(1, 1, N, N))
        inside = posterior_prox(Problem(y, physics, 0.05), rand(1, 1, N, N), rand(1, 1, N, N), 0.2, 0.1)
    x = rand(1, 1, N, N).requires_grad_()
    outside = posterior_prox(Problem(y.clone(), physics, 0.05), x, x, 0.2, 0.1)
    outside.sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(inside, outside)


def test_autocast_reaches_no_operator():
    physics = dp.Blur(gaussian_blur(sigma=(1.0, 1.0)), padding="valid")
    x = torch.rand(2, 1, N, N)
    y = physics.A(x)
    expected = Problem(y, physics, 0.05)
    batches = {"A": x, "A_adjoint": y, "A_adjoint_A": x}
    results = [getattr(expected, name)(batch) for name, batch in batches.items()]
    with torch.autocast("cpu", torch.bfloat16):
        problem = Problem(y, physics, 0.05)
        for (name, batch), result in zip(batches.items(), results, strict=True):
            assert torch.equal(getattr(problem, name)(batch), result)
    assert torch.equal(problem.adjoint, expected.adjoint)
    assert problem.sigma_y.dtype == problem.adjoint.dtype == torch.float32


class Squared(dp.Physics):
    """Neither linear nor with a prox."""

    def A(self, x, **kwargs):
        return x**2


class Fourier(dp.LinearPhysics):
    """Complex images."""

    def A(self, x, **kwargs):
        return torch.fft.fft2(x)

    def A_adjoint(self, y, **kwargs):
        return torch.fft.ifft2(y)


GREY = torch.full((2, 1, N, N), 0.5)


def _with(value):
    y = GREY.clone()
    y[1, 0, 3, 3] = value
    return y


def _stack(*levels):
    return dp.StackedLinearPhysics([dp.Denoising(dp.GaussianNoise(level)) for level in levels])


def _float(name, batch=B):
    return make(name, batch, torch.float32)


NAN = float("nan")
MEASUREMENTS = {  # y, physics, message
    "none": (None, dp.Denoising(), TypeError, "y must be a tensor or a TensorList, got NoneType"),
    "list": ([GREY], dp.Denoising(), TypeError, "y must be a tensor or a TensorList, got list"),
    "array": (GREY.numpy(), dp.Denoising(), TypeError, "y must be a tensor or a TensorList, got ndarray"),
    "integers": (GREY.byte(), dp.Denoising(), TypeError, r"floating type.*\[0, 1\]; got torch.uint8"),
    "empty": (GREY[:0], dp.Denoising(), ValueError, r"y is empty: its shape is \[0, 1, 16, 16\]"),
    "empty list": (TensorList([]), _stack(0.1, 0.1), ValueError, "y of shape"),
    "NaN": (_with(NAN), dp.Denoising(), ValueError, "y must be finite"),
    "infinite": (_with(-float("inf")), dp.Denoising(), ValueError, "y must be finite"),
    "NaN in a part": (TensorList([GREY, _with(NAN)]), _stack(0.1, 0.1), ValueError, "y must be finite"),
    "size of masks": (GREY[..., :8], _float("Inpainting", 1), ValueError, r"y of shape \[2, 1, 16, 8\]"),
    "broadcast": (GREY[..., :1, :], _float("Inpainting", 1), ValueError, r"y of shape \[2, 1, 1, 16\]"),
    "size of a blur": (GREY[..., :12], _float("BlurFFT", 1), ValueError, r"y of shape \[2, 1, 16, 12\]"),
    "more masks": (GREY, _float("Inpainting"), ValueError, "y of shape"),
    "one image, more masks": (GREY[:1], _float("Inpainting"), ValueError, "y of shape"),
    "too few parts": (TensorList([GREY]), _stack(0.1, 0.1), ValueError, "y of shape"),
    "no stack": (TensorList([GREY]), dp.Denoising(), ValueError, "y of shape"),
    "not of a stack": (GREY, _stack(0.1, 0.1), ValueError, "y of shape"),
    "complex images": (torch.fft.fft2(GREY), Fourier(), ValueError, "complex images.*two channels"),
    "qualities": (GREY, _float("JPEG"), ValueError, "quality|y of shape"),
    "size of JPEG": (GREY[..., :8], _float("JPEG", 1), ValueError, "y of shape"),
    "thin filter": (
        GREY,
        dp.BlurFFT((1, N, N), gaussian_blur(sigma=2.0)),
        ValueError,
        r"y of shape|filters must be \[b, c, h, w\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_that_are_refused(name):
    y, physics, error, message = MEASUREMENTS[name]
    with pytest.raises(error, match=message):
        Problem(y, physics, 0.1).prox(GREY, torch.ones(2, 1, 1, 1))


NO_LEVELS = [0, 0.0, -0.1, NAN, float("inf"), torch.tensor([0.1, -0.1]), torch.ones(3), torch.ones(2, 16)]
NO_LEVELS += [torch.tensor([0.1, 1e7]), torch.ones(0), [], "0.1", "x", ["0.1", "0.2"], {"sigma": 1}, 1j]


@pytest.mark.parametrize("sigma_y", NO_LEVELS)
def test_levels_that_are_refused(sigma_y):
    with pytest.raises((ValueError, TypeError), match="sigma_y must be"):
        Problem(GREY, dp.Denoising(), sigma_y)


def test_physics_that_are_refused():
    two, of_two = TensorList([GREY, GREY]), _stack(0.1, 0.2)
    others = [(p, f"must have a prox_l2.*{type(p).__name__} has none") for p in (None, "x", print, Squared())]
    refused(
        *((lambda physics=physics: Problem(GREY, physics, 0.1), TypeError, m) for physics, m in others),
        (lambda: Problem(GREY, dp.Denoising, 0.1), TypeError, "be an instance, got the class Denoising"),
        (lambda: Problem(GREY, dp.Denoising(dp.GaussianNoise(0.0))), "positive.*got 0.0.*ZeroNoise"),
        (lambda: Problem(GREY, dp.Denoising(dp.PoissonNoise(0.1))), "noise model.*PoissonNoise.*sigma_y"),
        (lambda: Problem(two, of_two), "stacked.*sigma_y"),
    )
    assert Problem(two, of_two, 0.1).sigma_y.shape == (2, 1, 1, 1)
    assert Problem(GREY, dp.Denoising(dp.ZeroNoise())).sigma_y.tolist() == [[[[pytest.approx(0.005)]]]] * 2


def test_what_warns():
    with pytest.warns(UserWarning, match="sigma_y is 25: it is a standard deviation, in"):
        Problem(GREY, dp.Denoising(), torch.tensor([0.1, 25.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Problem(GREY, dp.Denoising(), 1.0)
