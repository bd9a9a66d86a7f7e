"""Structures of operators: each equals the operator it was found for, and no other operator gets one."""

import pytest
import torch
from conftest import rand
from deepinv import physics as dp
from deepinv.physics.functional import gaussian_blur

from deepinv_ud2m import Problem
from deepinv_ud2m.structure import Convolution, NearlyCircular, Separable, find_structure

SHAPE = torch.Size([2, 3, 40, 48])


def kernels(*shape):
    kernel = rand(*shape, seed=1)
    return kernel / kernel.sum((-2, -1), keepdim=True)


def gaussian():
    return gaussian_blur(sigma=(1.5, 1.5)).double()


BORDERS = ("valid", "reflect", "replicate", "constant", "circular")
SEPARABLE = {f"gaussian, {padding}": dp.Blur(gaussian(), padding=padding) for padding in BORDERS[:-1]} | {
    "matlab x2": dp.DownsamplingMatlab(factor=2).double(),
    "matlab x4": dp.DownsamplingMatlab(factor=4).double(),
    "bicubic x4": dp.Downsampling(SHAPE[1:], filter="bicubic", factor=4, padding="replicate").double(),
}
CONVOLUTIONS = {f"kernel, {p}": dp.Blur(kernels(1, 1, 5, 7), padding=p) for p in BORDERS} | {
    "kernel per image": dp.Blur(kernels(2, 1, 5, 7), padding="reflect"),
    "kernel per channel": dp.Blur(kernels(1, 3, 5, 5), padding="valid"),
    "even kernel": dp.Blur(kernels(1, 1, 4, 6), padding="valid"),
}


def found(physics, shape=SHAPE, per_image=False):
    x = rand(*shape)
    return find_structure(physics, shape, physics.A(x), x, per_image)


@pytest.mark.parametrize("name", [*SEPARABLE, *CONVOLUTIONS])
def test_structures_equal_their_operators(name):
    physics, x = (SEPARABLE | CONVOLUTIONS)[name], rand(*SHAPE, seed=3)
    structure = found(physics, per_image=name == "kernel per image")
    assert isinstance(structure, Separable if name in SEPARABLE else Convolution)
    torch.testing.assert_close(structure.A(x), physics.A(x), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(structure.normal(x), physics.A_adjoint_A(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [*SEPARABLE, *CONVOLUTIONS])
@pytest.mark.parametrize("gamma", [0.1, 30.0])
def test_the_prox_has_no_gradient_left(name, gamma):
    """At the minimiser, z - m + gamma A^T (A z - y) = 0, by deepinv's own operator."""
    physics = (SEPARABLE | CONVOLUTIONS)[name]
    y, mean = physics.A(rand(*SHAPE)), rand(*SHAPE, seed=4)
    gamma = torch.tensor([gamma, 2 * gamma], dtype=torch.float64).reshape(2, 1, 1, 1)
    problem = Problem(y, physics, 0.1)
    assert problem._structure is not None
    z = problem.prox(mean, gamma, tol=1e-9)
    gradient = z - mean + gamma * physics.A_adjoint(physics.A(z) - y)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("name", SEPARABLE)
def test_gradients_of_separable_operators(name):
    physics = SEPARABLE[name]
    problem = Problem(physics.A(rand(1, *SHAPE[1:])), physics, 0.1)
    direction = rand(1, *SHAPE[1:], seed=7)
    gamma = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((direction * problem.prox(direction, gamma)).sum(), gamma)
    step = 1e-4
    higher, lower = ((direction * problem.prox(direction, gamma + s)).sum() for s in (step, -step))
    assert gradient.item() == pytest.approx((higher - lower).item() / (2 * step), rel=1e-5)


class Shear(dp.LinearPhysics):
    """No convolution: rows move by their number."""

    def A(self, x, **kwargs):
        return torch.stack([row.roll(i, -1) for i, row in enumerate(x.unbind(-2))], -2)

    def A_adjoint(self, y, **kwargs):
        return torch.stack([row.roll(-i, -1) for i, row in enumerate(y.unbind(-2))], -2)


@pytest.mark.parametrize(
    "physics",
    [
        dp.Inpainting(SHAPE[1:], mask=(rand(1, 1, *SHAPE[2:]) < 0.5).double().expand(1, *SHAPE[1:])),
        dp.CompressedSensing(m=100, img_size=SHAPE[1:], channelwise=True).double(),
    ],
    ids=["mask", "compressed sensing"],
)
def test_other_operators_get_none(physics):
    assert found(physics) is None


NEARLY_CIRCULAR = {
    "tomography": dp.Tomography(20, img_width=40, normalize=True),
    "stack": dp.StackedLinearPhysics([dp.Blur(gaussian().float(), padding="valid")] * 2),
    "shear": Shear(),  # whose normal operator is the identity
}


@pytest.mark.parametrize("name", NEARLY_CIRCULAR)
def test_operators_that_are_nearly_circular(name):
    """Preconditioned, the iterations are fewer and end at the same image."""
    physics = NEARLY_CIRCULAR[name]
    shape = (2, 1, 40, 40 if name == "tomography" else 48)
    x, mean = rand(*shape).float(), rand(*shape, seed=4).float()
    problem, gamma = Problem(physics.A(x), physics, 0.1), torch.tensor([30.0, 100.0]).reshape(2, 1, 1, 1)
    assert isinstance(problem._structure, NearlyCircular)
    results, calls = [], []
    for structure in (problem._structure, None):
        problem._structure, count = structure, []
        problem.A_adjoint_A = lambda x, count=count: count.append(1) or physics.A_adjoint_A(x)
        results.append(problem.prox(mean, gamma, tol=1e-4))
        calls.append(len(count))
    assert calls[0] < calls[1] or calls == [2, 2]
    assert (results[0] - results[1]).abs().max() < 3e-3


def test_large_images_get_the_convolution():
    shape = torch.Size([1, 1, 40, 1100])
    physics = SEPARABLE["gaussian, valid"]
    assert isinstance(found(physics, shape), Convolution)
    physics = SEPARABLE["matlab x4"]  # which is no convolution
    assert isinstance(found(physics, shape), Separable)


class Picky(dp.LinearPhysics):
    """Takes images of one shape only, and refuses others by an error of its own."""

    class Refused(Exception):
        pass

    def A(self, x, **kwargs):
        if x.shape[1:] != SHAPE[1:]:
            raise self.Refused
        return 2 * x

    A_adjoint = A


def test_an_operator_that_refuses_probes_is_left_as_it_is():
    x = rand(*SHAPE)
    problem = Problem(2 * x, Picky(), 0.1)
    gamma = torch.ones(2, 1, 1, 1).double()
    torch.testing.assert_close(problem.prox(0 * x, gamma, tol=1e-9), 0.8 * x)
