"""Operators as sparse matrices: equal to the operator, its adjoint and their gradients."""

import deepinv as dinv
import pytest
import torch
from conftest import seeded

from deepinv_ud2m import Problem
from deepinv_ud2m.physics import TabulatedPhysics, tabulate

SIZE = 17
TOMOGRAPHY = {
    "parallel": {},
    "circle": {"circle": True},
    "one by one": {"parallel_computation": False},
    "fan": {"fan_beam": True},
    "not normalised": {"normalize": False},
}


def physics_of(name):
    if name in TOMOGRAPHY:
        options = {"angles": 7, "img_width": SIZE, "normalize": True} | TOMOGRAPHY[name]
        return dinv.physics.Tomography(**options)
    kernel = torch.rand(1, 1, 5, 3, generator=seeded(0))
    return dinv.physics.Blur(kernel / kernel.sum(), padding="reflect")


@pytest.mark.parametrize("name", [*TOMOGRAPHY, "blur"])
def test_the_matrix_is_the_operator(name):
    physics, shape = physics_of(name), (2 if name == "blur" else 1, SIZE, SIZE)
    physics.set_noise_model(dinv.physics.GaussianNoise(0.1))
    table = tabulate(physics, shape)
    assert table.noise_model is physics.noise_model
    generator = seeded(1)
    x = torch.rand(3, *shape, generator=generator, requires_grad=True)
    y = physics.A(x)
    torch.testing.assert_close(table.A(x), y, atol=1e-5, rtol=1e-5)
    weights = torch.rand(y.shape, generator=generator)
    torch.testing.assert_close(table.A_adjoint(weights), physics.A_adjoint(weights), atol=1e-4, rtol=1e-4)
    (found,) = torch.autograd.grad((table.A(x) * weights).sum(), x)
    torch.testing.assert_close(found, physics.A_adjoint(weights), atol=1e-4, rtol=1e-4)
    assert not Problem(y.detach(), table, 0.1).is_per_image


def test_memory_is_stated_and_bounded():
    table = tabulate(physics_of("parallel"), (1, SIZE, SIZE))
    assert isinstance(table, TabulatedPhysics)
    values = table.matrix.values().numel()
    assert 0.024e-3 * values < table.megabytes < 0.024e-3 * values + 0.01
    assert f"{values} values, {table.megabytes:.3g} MB" in repr(table)
    for name in ("parallel", "blur"):
        with pytest.raises(ValueError, match=r"takes 0\.\d+ MB or more, and max_megabytes is 0\.01"):
            tabulate(physics_of(name), (1, SIZE, SIZE), max_megabytes=0.01)


@pytest.mark.parametrize(
    "physics, error, message",
    [
        (dinv.physics.Physics(A=torch.sin), TypeError, "must be a deepinv LinearPhysics, got Physics"),
        (dinv.physics.Decolorize(), ValueError, "tensor with the channels of the images"),
        (dinv.physics.MRI(torch.ones(1, 2, 16, 16), img_size=(2, 16, 16)), ValueError, "channels are mixed"),
    ],
    ids=["not linear", "fewer channels", "mixed channels"],
)
def test_what_it_refuses(physics, error, message):
    shape = (2 if isinstance(physics, dinv.physics.MRI) else 3, 16, 16)
    with pytest.raises(error, match=message):
        tabulate(physics, shape)
    with pytest.raises(ValueError, match=r"img_size must be \(C, H, W\)"):
        tabulate(physics_of("blur"), (SIZE, SIZE))
