"""Grey and complex measurements of images with more channels: dense solves, and samples."""

import deepinv as dinv
import pytest
import torch
from conftest import dense_matrix, seeded
from torchvision.transforms.functional import to_pil_image

from deepinv_ud2m import UD2M, Problem
from deepinv_ud2m.data import photograph
from deepinv_ud2m.physics import JPEG, ChannelMap
from deepinv_ud2m.physics.traits import noise_level

MASK = torch.rand(1, 1, 16, 16, generator=seeded(0)).lt(0.4).float()
KERNEL = torch.rand(1, 1, 5, 3, generator=seeded(1))
KERNEL = KERNEL / KERNEL.sum()
ORTHOGONAL = torch.tensor([[0.6, 0.8, 0.0], [0.8, -0.6, 0.0]])
PHYSICS = {
    "closed form": ChannelMap.grey(dinv.physics.Inpainting((1, 16, 16), mask=MASK)),
    "separable": ChannelMap.grey(dinv.physics.DownsamplingMatlab(factor=2)),
    "convolution": ChannelMap.grey(dinv.physics.Blur(KERNEL, padding="valid"), 2),
    "iterative": ChannelMap.grey(dinv.physics.Tomography(6, img_width=16)),
    "MRI": ChannelMap.real(dinv.physics.MRI(MASK.expand(1, 2, -1, -1).clone(), img_size=(2, 16, 16))),
    "two rows": ChannelMap(dinv.physics.Inpainting((2, 16, 16), mask=MASK.expand(1, 2, -1, -1)), ORTHOGONAL),
    "rows that are not orthogonal": ChannelMap(
        dinv.physics.Inpainting((2, 16, 16), mask=MASK.expand(1, 2, -1, -1)),
        torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]),
    ),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_operator_adjoint_and_prox_against_dense_algebra(name):
    physics = PHYSICS[name]
    shape = torch.Size([1, physics.weights.shape[1], 16, 16])
    generator = seeded(2)
    x, mean = (torch.rand(shape, generator=generator) for _ in range(2))
    A, y = dense_matrix(physics, shape[1:], torch.float32).double(), physics.A(x)
    channels = torch.kron(physics.weights.double(), torch.eye(256, dtype=torch.float64))
    inner = dense_matrix(physics.physics, physics.inner_shape(shape)[1:], torch.float32).double()
    assert torch.allclose(A, inner @ channels, atol=1e-5)
    assert torch.allclose(physics.A_adjoint(y).flatten().double(), A.T @ y.flatten().double(), atol=1e-4)
    gamma = 30.0
    expected = torch.linalg.solve(
        torch.eye(len(A.T)) + gamma * A.T @ A, mean.flatten().double() + gamma * A.T @ y.flatten().double()
    )
    found = Problem(y, physics, 0.1).prox(mean, torch.full((1, 1, 1, 1), gamma))
    assert torch.allclose(found.flatten().double(), expected, atol=3e-4)


def test_operators_of_each_image():
    physics = ChannelMap.grey(dinv.physics.BlurFFT((1, 16, 16), filter=KERNEL))
    kernels = torch.rand(2, 1, 5, 3, generator=seeded(3)) / 8
    x = torch.rand(2, 3, 16, 16, generator=seeded(4))
    y = physics(x, filter=kernels)
    problem = Problem(y, physics, 0.1)
    assert problem.is_per_image and problem.has_closed_form()
    z = problem.repeat(2).prox(x.repeat(2, 1, 1, 1), torch.ones(4, 1, 1, 1))
    for i in range(2):
        alone = dinv.physics.BlurFFT((1, 16, 16), filter=kernels[i : i + 1])
        assert torch.allclose(y[i : i + 1], alone.A(x[i : i + 1].mean(1, keepdim=True)), atol=1e-5)
        expected = alone.prox_l2(x[i : i + 1].mean(1, keepdim=True), y[i : i + 1], 1 / 3)
        assert torch.allclose(z[[i, 2 + i]].mean(1, keepdim=True), expected.expand(2, -1, -1, -1), atol=1e-5)


def test_a_sampler_of_colour_images_restores_grey_ones():
    photos = UD2M.from_pretrained("photos")
    x = torch.rand(2, 1, 16, 16, generator=seeded(5))
    physics = dinv.physics.Inpainting((1, 16, 16), mask=MASK)
    physics.set_noise_model(dinv.physics.GaussianNoise(0.05))
    y = physics(x)
    samples = photos.sample(y, physics, 2, generator=seeded(6))
    assert samples.shape == (2, 2, 1, 16, 16)
    photos.output_range, mapped = None, ChannelMap.grey(physics)
    colour = photos.sample(y, mapped, 2, generator=seeded(6))
    assert colour.shape == (2, 2, 3, 16, 16)
    assert torch.allclose(
        colour.mean(2, keepdim=True).clamp(0, 1), samples, atol=3e-3
    )  # the initial estimate iterates


def test_the_prox_of_a_grey_jpeg_is_the_minimiser():
    x, mean = torch.rand(2, 1, 3, 16, 16, generator=seeded(7), dtype=torch.float64)
    jpeg = JPEG((1, 16, 16), quality=30)
    physics = ChannelMap.grey(jpeg)
    y, gamma, z = physics.A(x), 30.0, mean
    for _ in range(300):  # gradient descent on the squared distance to the box, and that to the mean
        grey = z.mean(1, keepdim=True)
        z = z - 0.09 * (gamma * (grey - jpeg.project(grey, y)) / 3 + z - mean)
    problem = Problem(y, jpeg, channels=3)
    assert problem.is_grey and not problem.is_linear and problem.has_closed_form()
    found = problem.prox(mean, torch.full((1, 1, 1, 1), gamma, dtype=torch.float64))
    assert (found - z).abs().max() < 1e-6 < (found - mean).abs().max()


def test_a_sampler_of_colour_images_restores_a_grey_jpeg_file(tmp_path):
    """As well as the same file in colour."""
    photo, photos = photograph("chelsea")[..., 80:144, 80:144], UD2M.from_pretrained("photos")
    error = {}
    for kind, x in (("colour", photo), ("grey", photo.mean(1, keepdim=True))):
        to_pil_image(x[0]).save(tmp_path / f"{kind}.jpg", quality=10)
        y, physics = JPEG.read(tmp_path / f"{kind}.jpg")
        samples = photos.sample(y, physics, 4, generator=seeded(8))
        assert samples.shape == (4, *x.shape)
        assert max(physics.violation(sample, y).item() for sample in samples) < 0.5
        error[kind] = (samples.mean(0) - x).mean(1).square().mean().sqrt().item()
    assert error["grey"] < 1.1 * error["colour"]


def test_noise_and_complaints_are_those_of_the_physics_inside():
    """Of a stack, whose children have the noise, and of noise that is set later."""
    kernels = [KERNEL, 1.5 * KERNEL]
    stack = dinv.physics.StackedLinearPhysics([dinv.physics.BlurFFT((1, 16, 16), filter=k) for k in kernels])
    for child in stack.physics_list:
        child.set_noise_model(dinv.physics.GaussianNoise(0.1))
    mapped, x = ChannelMap.grey(stack), torch.rand(4, 3, 16, 16, generator=seeded(9))
    y = mapped(x)
    noise = torch.cat([(a - b).flatten() for a, b in zip(y, mapped.A(x), strict=True)])
    assert noise.std().item() == pytest.approx(0.1, rel=0.1)  # 2048 values: 6 standard deviations
    with pytest.warns(UserWarning, match="sum to 1.5, not to 1"):
        problem = Problem(y, mapped)
    assert problem.sigma_y.flatten().tolist() == pytest.approx([0.1] * 4)
    blur = dinv.physics.BlurFFT((1, 16, 16), filter=KERNEL)
    mapped = ChannelMap.grey(blur)
    mapped.set_noise_model(dinv.physics.GaussianNoise(0.2))
    assert noise_level(blur) == noise_level(mapped) == mapped.noise_model.sigma == 0.2
    blur.set_noise_model(dinv.physics.GaussianNoise(0.3))
    assert noise_level(mapped) == 0.3


def test_what_it_refuses():
    inpainting = dinv.physics.Inpainting((1, 16, 16), mask=MASK)
    with pytest.raises(ValueError, match=r"weights must be a finite matrix \[c, C\]"):
        ChannelMap(inpainting, torch.ones(3))
    with pytest.raises(TypeError, match=r"physics must have a prox_l2, .* SinglePixel has none"):
        ChannelMap(type("SinglePixel", (dinv.physics.Physics,), {})(), torch.ones(1, 3))
    with pytest.raises(TypeError, match="physics must be a deepinv Physics, got str"):
        ChannelMap("blur", torch.ones(1, 3))
    with pytest.raises(ValueError, match="weights must have orthogonal rows of one norm for JPEG"):
        ChannelMap(JPEG((3, 16, 16)), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


def test_other_channels_come_with_a_remedy():
    photos, digits = UD2M.from_pretrained("photos"), UD2M.from_pretrained("mnist")
    mri = dinv.physics.MRI(torch.ones(1, 2, 16, 16), img_size=(2, 16, 16))
    with pytest.raises(ValueError, match=r"not 2 channel.*ChannelMap\.real\(physics\)"):
        photos(torch.rand(1, 2, 16, 16), mri)
    colour = dinv.physics.Inpainting((3, 32, 32), mask=0.5)
    with pytest.raises(ValueError, match=r"not 3 channel.*make each channel an image of its own"):
        digits(torch.rand(1, 3, 32, 32), colour)
