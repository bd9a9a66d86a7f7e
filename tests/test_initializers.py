"""Initial estimates without a network, against dense matrices."""

import pytest
import torch
from conftest import dense_matrix, flat
from deepinv.physics import Blur, BlurFFT, Downsampling, Inpainting, StackedLinearPhysics
from test_sampler import SHAPE, blur

from deepinv_ud2m import LinearInitializer, Problem, PseudoInverseInitializer, WienerInitializer
from deepinv_ud2m.physics import JPEG

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


def test_the_linear_initializer_is_the_gaussian_posterior_mode(gaussian_problem):
    problem = gaussian_problem(blur(), SHAPE)
    x_s = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    given = Problem(problem.y, problem.physics)
    got, h = LinearInitializer(mean=0.3, std=0.4, reference_level=0.15)(given, x_s, 0.7)
    hessian = problem.A.T @ problem.A / problem.sigma_y**2
    hessian = hessian + (0.7**-2 + 0.4**-2) * torch.eye(problem.d, dtype=torch.float64)
    right = problem.A.T @ problem.y.flatten() / problem.sigma_y**2
    right = right + x_s.flatten() / 0.7**2 + 0.3 / 0.4**2
    assert torch.allclose(got.flatten(), torch.linalg.solve(hessian, right), atol=1e-4)
    assert h.item() == pytest.approx((1 / (0.1**2 + 0.15**2) + 1 / 0.7**2) ** -0.5)


@pytest.mark.parametrize("make_physics", WIENER_PROBLEMS)
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_the_wiener_initializer_is_the_gaussian_posterior_mean(make_physics, sigma):
    """In closed form and by conjugate gradients, against dense matrices."""
    physics, initializer = make_physics(), WienerInitializer(0.4, 1e-2, 2.0, 0.1, 0.7, 1e-6, 500)
    generator = torch.Generator().manual_seed(0)
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
    noise = torch.randn(2000, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    amplitudes = [power.sqrt() for power in true.powers(noise)]
    spectrum = torch.fft.rfft2(noise)
    mean = spectrum.mean(1, keepdim=True)
    images = torch.fft.irfft2(amplitudes[1] * (spectrum - mean) + amplitudes[0] * mean)
    found = WienerInitializer.fit(0.4 + images, max_iter=7)
    assert found.max_iter == 7
    for name in ("mean", "scale", "decay", "cutoff", "correlation"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.1)


def test_without_a_linear_operator_the_wiener_initializer_is_the_linear_one():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    physics = JPEG((3, 16, 16), quality=10)
    problem = Problem(physics(x), physics, 0.01)
    assert torch.equal(WienerInitializer(0.4)(problem, x, 0.5)[0], LinearInitializer(0.4)(problem, x, 0.5)[0])


def test_the_pseudo_inverse_initializer_blends_by_precision():
    physics = Inpainting((1, 2, 2), mask=torch.tensor([[[[2.0, 0], [0, 2]]]]))
    x_s, y = torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[1.0, 0], [0, 1]]]])
    for mode, back_projection in (("pinv", y / 2), ("adjoint", 2 * y)):
        got, _ = PseudoInverseInitializer(mode)(Problem(y, physics, 1.0), x_s, 2.0)
        torch.testing.assert_close(got, (4 * back_projection + x_s) / 5)
