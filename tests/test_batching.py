"""Several copies of a batch go through a physics as each copy does by itself."""

import pytest
import torch
from deepinv.physics import Blur, BlurFFT, GaussianNoise, Inpainting, LinearPhysics, StackedLinearPhysics
from deepinv.utils import TensorList

from deepinv_ud2m.batching import RepeatedPhysics, is_shared, repeat_batch
from deepinv_ud2m.proximal import has_closed_form, noise_level, posterior_prox

N, B, REPEATS = 16, 3, 4
CLOSED_FORM = {"BlurFFT": True, "Inpainting": True, "Blur": False, "stack": False}
LEVELS = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)
LIKE = torch.zeros(B, 1, N, N, dtype=torch.float64)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name, batch=B):
    kernels = rand(batch, 1, 5, 5)
    kernels = kernels / kernels.sum((-2, -1), keepdim=True)
    masks = (rand(batch, 1, N, N, seed=1) < 0.5).double()
    return {
        "BlurFFT": lambda: BlurFFT((1, N, N), kernels),
        "Blur": lambda: Blur(kernels, padding="valid"),
        "Inpainting": lambda: Inpainting((1, N, N), masks),
        "stack": lambda: StackedLinearPhysics(
            [Blur(kernels, padding="valid"), Inpainting((1, N, N), masks)]
        ),
    }[name]()


def copy_of(batch, k):
    if isinstance(batch, TensorList):
        return TensorList([copy_of(part, k) for part in batch])
    return batch[k * B : (k + 1) * B]


def assert_equal_copies(result, copies):
    for k, expected in enumerate(copies):
        part = copy_of(result, k)
        assert isinstance(part, TensorList) == isinstance(expected, TensorList)
        pairs = zip(part, expected, strict=True) if isinstance(part, TensorList) else [(part, expected)]
        for a, b in pairs:
            torch.testing.assert_close(a, b)


@pytest.fixture(params=list(CLOSED_FORM))
def case(request):
    physics = make(request.param)
    repeated = RepeatedPhysics(physics, LIKE, REPEATS, LEVELS)
    x = rand(REPEATS * B, 1, N, N, seed=2)
    return request.param, physics, repeated, x, repeated.A(x)


@pytest.mark.filterwarnings("ignore:Warning. least_squares_implicit_backward")
def test_operators_equal_the_loop(case):
    _, physics, repeated, x, y = case
    copies = range(REPEATS)
    assert_equal_copies(y, [physics.A(copy_of(x, k)) for k in copies])
    assert_equal_copies(repeated.A_adjoint(y), [physics.A_adjoint(copy_of(y, k)) for k in copies])
    assert_equal_copies(repeated.A_adjoint_A(x), [physics.A_adjoint_A(copy_of(x, k)) for k in copies])
    assert_equal_copies(repeated.A_dagger(y), [physics.A_dagger(copy_of(y, k)) for k in copies])


@pytest.mark.filterwarnings("ignore:Warning. least_squares_implicit_backward")
def test_prox_equals_the_loop(case):
    _, physics, repeated, x, y = case
    gammas = 10 * rand(REPEATS * B, 1, 1, 1, seed=4)
    proxes = [physics.prox_l2(copy_of(x, k), copy_of(y, k), copy_of(gammas, k)) for k in range(REPEATS)]
    assert_equal_copies(repeated.prox_l2(x, y, gammas), proxes)
    proxes = [physics.prox_l2(copy_of(x, k), copy_of(y, k), 3.0) for k in range(REPEATS)]
    for gamma in (3.0, torch.tensor(3.0)):
        assert_equal_copies(repeated.prox_l2(x, y, gamma), proxes)


def test_posterior_prox_equals_the_loop(case):
    name, physics, repeated, x, y = case
    assert has_closed_form(repeated, x.shape) == has_closed_form(physics, x.shape) == CLOSED_FORM[name]
    x_s = rand(*x.shape, seed=3)
    rho = 0.1 + rand(REPEATS * B, seed=5)
    expected = [
        posterior_prox(
            copy_of(x, k), copy_of(y, k), physics, copy_of(x_s, k), 0.2, copy_of(rho, k), 2.0, LEVELS
        )
        for k in range(REPEATS)
    ]
    assert_equal_copies(posterior_prox(x, y, repeated, x_s, 0.2, rho, 2.0), expected)


def test_update_of_a_repeated_stack_is_refused_in_backward():
    physics = make("stack")
    repeated = RepeatedPhysics(physics, LIKE, REPEATS, LEVELS)
    x = rand(REPEATS * B, 1, N, N).requires_grad_()
    z = posterior_prox(x, repeated.A(x.detach()), repeated, x, 0.2, 0.1)
    physics[0].update(filter=rand(B, 1, 5, 5, seed=9))
    with pytest.raises(RuntimeError, match="updated between"):
        z.sum().backward()


def test_noise_levels_follow_their_images():
    physics = make("Blur")
    assert noise_level(RepeatedPhysics(physics, LIKE, 2, LEVELS)).tolist() == LEVELS.tolist() * 2
    for level in (torch.tensor(0.1), torch.tensor([0.1]), torch.full((1, 1, 1, 1), 0.1)):
        assert noise_level(RepeatedPhysics(physics, LIKE, 2, level)).shape == (1,)
    column = LEVELS.reshape(-1, 1, 1, 1)
    assert noise_level(RepeatedPhysics(physics, LIKE, 2, column)).tolist() == LEVELS.tolist() * 2
    assert isinstance(RepeatedPhysics(physics, LIKE, 2, LEVELS).noise_model, GaussianNoise)


def test_batch_of_one_goes_through_in_one_call():
    class Counted(LinearPhysics):
        calls = 0

        def A(self, x):
            self.calls += 1
            return 2 * x

        A_adjoint = A

    x = rand(REPEATS, 1, N, N)
    physics = Counted()
    assert torch.equal(RepeatedPhysics(physics, LIKE[:1], REPEATS, LEVELS[:1]).A(x), 2 * x)
    assert physics.calls == 1
    for name in CLOSED_FORM:
        one = make(name, batch=1)
        repeated = RepeatedPhysics(one, LIKE[:1], REPEATS, LEVELS[:1])
        z = posterior_prox(x, repeated.A(x), repeated, x.flip(-1), 0.2, 0.1)
        for k in range(REPEATS):
            image = x[k : k + 1]
            alone = posterior_prox(image, one.A(image), one, image.flip(-1), 0.2, 0.1, 1.0, LEVELS[:1])
            torch.testing.assert_close(z[k : k + 1], alone)


def test_repeat_batch():
    x = rand(B, 1, 2, 2)
    assert torch.equal(repeat_batch(x, 2), torch.cat([x, x]))
    stacked = repeat_batch(TensorList([x, x[:, :, :1]]), 2)
    assert isinstance(stacked, TensorList)
    assert [part.shape for part in stacked] == [(2 * B, 1, 2, 2), (2 * B, 1, 1, 2)]


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_a_shared_operator_is_told_from_one_per_image(name):
    assert is_shared(make(name, batch=1), LIKE)
    assert not is_shared(make(name), LIKE)
    assert RepeatedPhysics(make(name, batch=1), LIKE, REPEATS, LEVELS).calls == 1
    assert RepeatedPhysics(make(name), LIKE, REPEATS, LEVELS).calls == REPEATS


EQUAL = {
    "mask": lambda of: Inpainting((1, N, N), of((rand(1, 1, N, N, seed=1) < 0.5).double())),
    "FFT": lambda of: BlurFFT((1, N, N), of(rand(1, 1, 5, 5) / 12)),
    "valid": lambda of: Blur(of(rand(1, 1, 5, 5) / 12), padding="valid"),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_operators_one_per_image_are_those_of_one(name):
    """They commute with permuting the images, as a shared one does, and cannot take more of them."""
    several = EQUAL[name](lambda parameter: parameter.repeat(B, 1, 1, 1))
    assert not is_shared(several, LIKE)
    x = rand(REPEATS * B, 1, N, N, seed=2)
    repeated = RepeatedPhysics(several, LIKE, REPEATS, 0.05)
    torch.testing.assert_close(repeated.A(x), EQUAL[name](lambda parameter: parameter).A(x))
