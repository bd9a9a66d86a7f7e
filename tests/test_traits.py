"""What is asked of a physics: its noise level, its closed form, whether it has an operator per image."""

import warnings

import pytest
import torch
from conftest import flat, rand, seeded
from deepinv import physics as dp
from deepinv.physics import noise as noises
from test_problem import copy_of

from deepinv_ud2m import Problem
from deepinv_ud2m.physics.traits import (
    NOISE_FLOOR,
    has_closed_form,
    is_circular,
    is_per_image,
    noise_level,
    operator_tensors,
)

N = 8
SHAPE = (1, N, N)
KERNEL = torch.ones(1, 1, 3, 3) / 9


class Scaling(dp.LinearPhysics):
    """A is 2, and the prox, of which it may say that it is exact, is no prox."""

    def __init__(self, **said):
        super().__init__(noise_model=dp.GaussianNoise(0.1))
        self.asked, self.calls = [], 0
        for name, answer in said.items():
            setattr(self, name, lambda argument, answer=answer: self.asked.append(argument) or answer)

    def A(self, x, **kwargs):
        self.calls += 1
        return 2 * x

    def A_adjoint(self, y, **kwargs):
        return 2 * y

    def prox_l2(self, z, y, gamma, **kwargs):
        return 0 * z + 7


@pytest.mark.parametrize("said", [True, False, None])
def test_a_physics_says_whether_its_prox_is_exact(said):
    physics = Scaling() if said is None else Scaling(has_closed_form_prox=said)
    x, gamma = rand(2, *SHAPE), torch.full((2, 1, 1, 1), 3.0).double()
    problem = Problem(2 * x, physics)
    # One that is defined outside of deepinv is trusted.
    expected = (x + 12 * x) / 13 if said is False else torch.full_like(x, 7)
    torch.testing.assert_close(problem.prox(x, gamma, tol=1e-9), expected)
    assert problem.has_closed_form() == (said is not False)
    assert set(physics.asked) == (set() if said is None else {x.shape})


@pytest.mark.parametrize("said", [True, False, None])
def test_a_physics_says_whether_it_is_of_each_image(said):
    physics = Scaling() if said is None else Scaling(is_per_image=said)
    x = rand(6, *SHAPE)
    problem = Problem(2 * x[:2], physics).repeat(3)
    physics.calls = 0
    assert torch.equal(problem.A(x), 2 * x)
    assert physics.calls == (1 if said is False else 3)
    assert physics.asked == ([] if said is None else [2])
    assert not is_per_image(physics, 1)


def test_a_physics_complains_of_measurements():
    y = rand(2, *SHAPE)
    with pytest.warns(UserWarning, match="these are no such images") as caught:
        Problem(y, physics := Scaling(complaint="these are no such images"))
    assert len(caught) == 1 and physics.asked[0] is y
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Problem(y, Scaling(complaint=None))


def test_closed_forms_of_subclasses():
    """An own operator without an own prox has no closed form any more."""

    class OwnOperator(dp.BlurFFT):
        def A(self, x, **kwargs):
            return 2 * super().A(x, **kwargs)

        def A_adjoint(self, y, **kwargs):
            return 2 * super().A_adjoint(y, **kwargs)

    class OwnName(dp.BlurFFT):
        pass

    class OwnDownsampling(dp.Downsampling):
        def A(self, x, **kwargs):
            return 2 * super().A(x, **kwargs)

    shape = torch.Size((1, *SHAPE))
    assert has_closed_form(OwnName(SHAPE, KERNEL), shape)
    assert not has_closed_form(OwnOperator(SHAPE, KERNEL), shape)
    assert not has_closed_form(OwnDownsampling(SHAPE, KERNEL, 2, padding="circular"), shape)


def mask(*shape):
    return (rand(*shape, dtype=torch.float32) < 0.6).float()


def camera():
    return dp.SinglePixelCamera(12, SHAPE, rng=seeded(0))


def cassi(b):
    return dp.CompressiveSpectralImaging((3, N, N), mask=mask(b, 1, N, N))


def coils(b):
    return dp.MultiCoilMRI(mask(1, 1, N, N), torch.ones(b, 5, N, N) * (1 + 1j), (2, N, N))


def varying(b):
    return dp.SpaceVaryingBlur(torch.ones(b, 1, 4, 3, 3) / 9, torch.ones(b, 1, 4, N, N) / 4, padding="valid")


# Images, and operators that are the same for all images: their tensors have leading dimensions of all sizes.
SHARED = {
    "Inpainting": (SHAPE, lambda: dp.Inpainting(SHAPE, mask(*SHAPE))),
    "Inpainting, colour": ((3, N, N), lambda: dp.Inpainting((3, N, N), mask(3, N, N))),
    "Demosaicing": ((3, N, N), lambda: dp.Demosaicing((3, N, N))),
    "Denoising": (SHAPE, lambda: dp.Denoising()),
    "Decolorize": ((3, N, N), lambda: dp.Decolorize()),
    "BlurFFT": (SHAPE, lambda: dp.BlurFFT(SHAPE, KERNEL)),
    "Blur": (SHAPE, lambda: dp.Blur(KERNEL, padding="reflect")),
    "SpaceVaryingBlur": (SHAPE, lambda: varying(1)),
    "Downsampling": (SHAPE, lambda: dp.Downsampling(SHAPE, "bicubic", 2)),
    "MRI": ((2, N, N), lambda: dp.MRI(mask(2, N, N), (2, N, N))),
    "MultiCoilMRI": ((2, N, N), lambda: coils(1)),
    "CompressedSensing": (SHAPE, lambda: dp.CompressedSensing(5, SHAPE)),
    "SinglePixelCamera": (SHAPE, camera),
    "StructuredRandom": (SHAPE, lambda: dp.StructuredRandom(SHAPE, SHAPE)),
    "Tomography": (SHAPE, lambda: dp.Tomography(6, N, normalize=True)),
    "CompressiveSpectralImaging": ((3, N, N), lambda: cassi(1)),
    "HyperSpectralUnmixing": ((4, N, N), lambda: dp.HyperSpectralUnmixing(torch.ones(4, 6) / 6)),
    "Pansharpen": ((3, N, N), lambda: dp.Pansharpen((3, N, N), factor=2)),
    "stack": (SHAPE, lambda: dp.StackedLinearPhysics([camera(), dp.Tomography(6, N, normalize=True)])),
    "composition": (SHAPE, lambda: dp.ComposedLinearPhysics(dp.BlurFFT(SHAPE, KERNEL), camera())),
}


def assert_copies_are_right(physics, shape, batch):
    x = torch.rand(2 * batch, *shape)
    one = Problem(physics.A(x[:batch]), physics, 0.1)
    problem = one.repeat(2)
    y = problem.A(x)
    for k in (0, 1):
        torch.testing.assert_close(flat(copy_of(y, k, batch)), flat(physics.A(copy_of(x, k, batch))))
        adjoint, expected = problem.A_adjoint(y), physics.A_adjoint(copy_of(y, k, batch))
        torch.testing.assert_close(copy_of(adjoint, k, batch), expected)
    gamma = torch.ones(2 * batch, 1, 1, 1)
    z = problem.prox(x, gamma)
    torch.testing.assert_close(z[batch:], one.prox(x[batch:], gamma[batch:]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SHARED)
def test_the_same_operator_for_any_number_of_images(name):
    """Right for every number of images, also where it equals a dimension of the operator by coincidence."""
    shape, make = SHARED[name]
    physics = make()
    sizes = {len(t) for t, _ in operator_tensors(physics) if t.ndim and 1 < len(t) < 20} | {2, 7}
    assert not is_per_image(physics, 7)
    for batch in sizes:
        assert_copies_are_right(physics, shape, batch)


def masks(b):
    return dp.Inpainting(SHAPE, mask(b, *SHAPE))


def stack(physics):
    return dp.StackedLinearPhysics([dp.Denoising(), physics])


OF_EACH = {
    "Inpainting": (SHAPE, lambda b: masks(b)),
    "BlurFFT": (SHAPE, lambda b: dp.BlurFFT(SHAPE, rand(b, 1, 3, 3, dtype=torch.float32))),
    "Blur": (SHAPE, lambda b: dp.Blur(rand(b, 1, 3, 3, dtype=torch.float32), padding="valid")),
    "SpaceVaryingBlur": (SHAPE, varying),
    "Downsampling": (SHAPE, lambda b: dp.Downsampling(SHAPE, rand(b, 1, 3, 3, dtype=torch.float32), 2)),
    "MRI": ((2, N, N), lambda b: dp.MRI(mask(b, 2, N, N), (2, N, N))),
    "MultiCoilMRI": ((2, N, N), coils),
    "CompressiveSpectralImaging": ((3, N, N), cassi),
    "stack": (SHAPE, lambda b: stack(masks(b))),
    "stack of stacks": (SHAPE, lambda b: stack(stack(masks(b)))),
    "composition": (SHAPE, lambda b: dp.ComposedLinearPhysics(dp.BlurFFT(SHAPE, KERNEL), masks(b))),
    "function": (SHAPE, lambda b: weighted(dp.LinearPhysics, "A", "A_adjoint", b)),
    "functions of a decomposition": (SHAPE, lambda b: weighted(dp.DecomposablePhysics, "U", "U_adjoint", b)),
}


def weighted(kind, forward, adjoint, batch):
    signs = torch.where(rand(batch, *SHAPE, dtype=torch.float32) < 0.5, -1.0, 1.0)
    return kind(**{forward: lambda x: signs * x, adjoint: lambda y: signs * y})


@pytest.mark.parametrize("name", OF_EACH)
def test_an_operator_of_each_image(name):
    shape, make = OF_EACH[name]
    for batch in (2, 3):
        physics = make(batch)
        assert is_per_image(physics, batch)
        assert_copies_are_right(physics, shape, batch)


def test_the_noise_level_does_not_count():
    noisy = dp.Inpainting(SHAPE, mask(*SHAPE), noise_model=dp.GaussianNoise(torch.tensor([0.1, 0.2])))
    assert not is_per_image(noisy, 2)
    assert not any(t.shape == (2,) for t, _ in operator_tensors(noisy))


def test_circular_convolutions():
    shape = torch.Size((1, 2, N, N))
    assert is_circular(dp.BlurFFT((2, N, N), KERNEL), shape)
    assert is_circular(dp.Downsampling((2, N, N), KERNEL, 2, padding="circular"), shape)
    for physics in (
        dp.BlurFFT((2, N, N), torch.cat([KERNEL, 2 * KERNEL], 1)),
        dp.Downsampling((2, N, N), KERNEL, 2, padding="reflect"),
        dp.Downsampling((2, N, N), None, 2, padding="circular"),
        dp.Blur(KERNEL, padding="circular"),
        dp.Denoising(),
    ):
        assert not is_circular(physics, shape)


def blur(noise_model):
    return dp.Blur(KERNEL, padding="valid", noise_model=noise_model)


def test_noise_level():
    assert noise_level(blur(dp.GaussianNoise(0.03))).item() == pytest.approx(0.03)
    levels = torch.tensor([0.1, 0.2])
    assert torch.equal(noise_level(blur(dp.GaussianNoise(levels))), levels)
    assert noise_level(blur(dp.ZeroNoise())) == NOISE_FLOOR
    assert noise_level(blur(dp.GaussianNoise(0.03)), sigma_y=0.5) == 0.5
    assert noise_level(blur(noises.PoissonNoise()), sigma_y=0.5) == 0.5
    blurs = [blur(dp.GaussianNoise(level)) for level in (0.1, torch.tensor([0.1]))]
    assert noise_level(dp.StackedLinearPhysics(blurs)).item() == pytest.approx(0.1)
    for other in (dp.GaussianNoise(0.2), dp.ZeroNoise(), noises.PoissonNoise()):
        different = dp.StackedLinearPhysics([blurs[0], blur(other)])
        with pytest.raises(ValueError, match="sigma_y"):
            noise_level(different)
        assert noise_level(different, 0.3) == 0.3


NOISES = [noises.PoissonNoise(), noises.PoissonGaussianNoise(), noises.RicianNoise(), noises.UniformNoise()]
NOISES += [noises.UniformGaussianNoise(), dp.GaussianNoise(0.2) * dp.GaussianNoise(0.1)]
NOISES += [noises.PoissonNoise() * dp.GaussianNoise(0.1)]


@pytest.mark.parametrize("noise_model", NOISES, ids=lambda model: type(model).__name__)
def test_other_noise_is_refused(noise_model):
    with pytest.raises(ValueError, match="sigma_y"):
        noise_level(blur(noise_model))
