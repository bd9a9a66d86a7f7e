import deepinv as dinv
import pytest
import torch
from PIL import Image

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.benchmark.comparison import as_images, compare
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.data import mnist_digits


@pytest.fixture(scope="module")
def comparison():
    x = mnist_digits("test", num=2)
    physics = make_physics("sr4", (1, 32, 32), 0.05)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = physics(x)
    return compare(
        x, y, physics, UD2M.from_pretrained("mnist"), load_prior("mnist"), num_samples=3, seed=5
    )


def test_all_methods_are_there_with_their_evaluations(comparison):
    of = {estimate.name: estimate for estimate in comparison.estimates}
    assert list(of) == ["UD2M, one sample", "UD2M, mean of 3", "DiffPIR", "pseudo-inverse"]
    assert [estimate.nfe for estimate in of.values()] == [9, 27, 100, 0]
    assert all(estimate.images.shape == comparison.x.shape for estimate in of.values())
    assert all(estimate.seconds > 0 for estimate in of.values())
    assert torch.equal(of["UD2M, mean of 3"].images, comparison.samples.mean(0))
    psnr = dinv.metric.PSNR()
    assert psnr(of["UD2M, mean of 3"].images, comparison.x).mean() > 13
    assert psnr(of["DiffPIR"].images, comparison.x).mean() > 10


def test_table(comparison):
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["PSNR", "(dB)", "perceptual", "NFE", "seconds"]
    for line, estimate in zip(lines[1:], comparison.estimates, strict=False):
        assert line.startswith(estimate.name)
        psnr, distance, nfe, _ = line[len(estimate.name) :].split()
        expected = dinv.metric.PSNR()(estimate.images, comparison.x).mean().item()
        assert float(psnr) == pytest.approx(expected, abs=0.006) and float(distance) > 0
        assert int(nfe) == estimate.nfe
    assert "DigitClassifier" in lines[-1]


def test_figure(comparison, tmp_path):
    comparison.plot(tmp_path / "new" / "figure.png", image=1)
    with Image.open(tmp_path / "new" / "figure.png") as figure:
        assert figure.width > 1000 and len(figure.convert("L").getcolors()) > 50


def test_measurements_as_images():
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    small = make_physics("sr4", (1, 32, 32), 0.05)
    shown = as_images(small.A(x), small, x)
    assert torch.equal(shown[..., ::4, ::4], small.A(x)) and shown.shape == x.shape
    spectrum = dinv.physics.DecomposablePhysics(
        V_adjoint=lambda image: torch.fft.fft2(image, norm="ortho"),
        V=lambda image: torch.fft.ifft2(image, norm="ortho").real,
        mask=torch.ones(1, 1, 32, 32),
        img_size=(1, 32, 32),
    )
    torch.testing.assert_close(as_images(spectrum.A(x), spectrum, x), x)
