"""Fréchet distances against closed forms and other implementations, and the digit classifier."""

import json

import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from deepinv_ud2m import metrics
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import DigitClassifier, frechet_distance, gaussian_frechet


def _random_gaussian(dim: int, seed: int, rank: int | None = None):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    factor = torch.randn(dim, rank or 2 * dim, generator=generator, dtype=torch.float64)
    return mean, factor @ factor.T / dim


def _pixels(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return DigitClassifier.from_pretrained()


# -- Gaussians ------------------------------------------------------------------------------------


def test_gaussians_that_commute():
    # With diagonal covariances the distance is that of the means and of the standard deviations.
    mean1, mean2 = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    std1, std2 = torch.tensor([1.0, 0.3, 2.0]), torch.tensor([0.5, 0.0, 2.5])
    expected = (mean1 - mean2).square().sum() + (std1 - std2).square().sum()
    rotation = torch.linalg.qr(_random_gaussian(3, 0)[1].float())[0]
    for basis in (torch.eye(3), rotation):
        distance = gaussian_frechet(
            basis @ mean1,
            basis @ std1.square().diag() @ basis.T,
            basis @ mean2,
            basis @ std2.square().diag() @ basis.T,
        )
        assert distance.dtype == torch.float64 and distance.ndim == 0
        assert distance.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gaussians_in_two_dimensions():
    # For 2x2 matrices, tr(M^{1/2}) = sqrt(tr(M) + 2 sqrt(det(M))).
    mean1, cov1 = _random_gaussian(2, 1)
    mean2, cov2 = _random_gaussian(2, 2)
    product = cov1 @ cov2
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root
    distance = gaussian_frechet(mean1, cov1, mean2, cov2)
    assert distance.item() == pytest.approx(expected.item(), rel=1e-10)


def test_gaussians_against_scipy():
    mean1, cov1 = _random_gaussian(32, 3)
    mean2, cov2 = _random_gaussian(32, 4)
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root.trace()
    distance = gaussian_frechet(mean1, cov1, mean2, cov2)
    assert distance.item() == pytest.approx(expected.item(), rel=1e-9)
    assert distance.item() == pytest.approx(gaussian_frechet(mean2, cov2, mean1, cov1).item(), rel=1e-12)


def test_singular_gaussians():
    # Two lines at an angle: covariances u u^T and v v^T are at distance 2 - 2 |<u, v>|.
    u, v = torch.zeros(50), torch.zeros(50)
    u[0], v[0], v[1] = 1, 0.6, 0.8
    zero = torch.zeros(50)
    distance = gaussian_frechet(zero, u.outer(u), zero, v.outer(v))
    assert distance.item() == pytest.approx(0.8, abs=1e-6)
    mean, cov = _random_gaussian(50, 5, rank=10)
    assert gaussian_frechet(mean, cov, mean, cov).item() == pytest.approx(0, abs=1e-10)
    assert gaussian_frechet(zero, 0 * cov, zero, 0 * cov).item() == 0


def test_gaussian_errors():
    mean, cov = _random_gaussian(4, 6)
    with pytest.raises(ValueError, match="Means"):
        gaussian_frechet(mean, cov, mean[:3], cov)
    with pytest.raises(ValueError, match="Covariances"):
        gaussian_frechet(mean, cov, mean, cov[:3])
    with pytest.raises(ValueError, match="finite"):
        gaussian_frechet(mean, cov, mean, cov * torch.nan)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        gaussian_frechet(mean, cov, mean, -cov)


# -- Sets of images -------------------------------------------------------------------------------


def test_distance_of_shifted_set_is_known():
    # Adding a constant to all images moves the mean and leaves the covariance.
    x = torch.rand(40, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    shift = torch.full_like(x[:1], 0.25)
    distance = frechet_distance(x + shift, x, _pixels)
    assert distance.item() == pytest.approx(shift.square().sum().item(), rel=1e-5)


def test_distance_of_identical_sets_is_zero(classifier):
    x = mnist_digits("test", num=300)
    shuffled = x[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert frechet_distance(x, shuffled, classifier.features).item() == pytest.approx(0, abs=1e-6)
    # Fewer images than features: the covariances are singular.
    assert frechet_distance(x[:20], x[:20], classifier.features).item() == pytest.approx(0, abs=1e-6)


def test_distance_is_the_same_for_any_batch_size(classifier):
    x, x_ref = mnist_digits("test", num=150), mnist_digits("validation", num=100)
    whole = frechet_distance(x, x_ref, classifier.features, batch_size=1000)
    parts = frechet_distance(x, x_ref, classifier.features, batch_size=7)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-4)


def test_distance_against_torchmetrics(classifier):
    class Features(nn.Module):
        num_features = classifier.num_features

        def forward(self, x):
            return classifier.features(x)

    x, x_ref = mnist_digits("test", num=500), mnist_digits("validation")
    reference = FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    reference.update(x_ref, real=True)
    reference.update(x, real=False)
    distance = frechet_distance(x, x_ref, classifier.features)
    assert distance.item() == pytest.approx(reference.compute().item(), rel=1e-4)


def test_distance_sees_quality_and_missing_digits(classifier):
    x, y = mnist_digits("test", labels=True)
    x_ref = mnist_digits("validation")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    floor = frechet_distance(x, x_ref, classifier.features)
    assert frechet_distance((x + 0.3 * noise).clamp(0, 1), x_ref, classifier.features) > 2 * floor
    assert frechet_distance(x[y < 5], x_ref, classifier.features) > 2 * floor


def test_distance_leaves_no_graph():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(8, 1, 4, 4, requires_grad=True)
    assert not frechet_distance(x, x.detach(), network).requires_grad


def test_distance_errors(classifier):
    x = torch.rand(8, 1, 4, 4)
    with pytest.raises(ValueError, match=r"at least 2 images, x has 1"):
        frechet_distance(x[:1], x, _pixels)
    with pytest.raises(ValueError, match=r"at least 2 images, x_ref has 0"):
        frechet_distance(x, x[:0], _pixels)
    with pytest.raises(ValueError, match="x_ref must be images"):
        frechet_distance(x, x[:, 0], _pixels)
    with pytest.raises(ValueError, match="differ in size: 16 and 9"):
        frechet_distance(x, x[..., :3, :3], _pixels)
    with pytest.raises(ValueError, match="x are not finite"):
        frechet_distance(x / 0, x, _pixels)
    with pytest.raises(ValueError, match="features must map"):
        frechet_distance(x, x, lambda images: images)
    with pytest.raises(ValueError, match="batch_size"):
        frechet_distance(x, x, _pixels, batch_size=0)
    with pytest.raises(ValueError, match=r"\[B, 1, 32, 32\]"):
        frechet_distance(x, x, classifier.features)


# -- The classifier -------------------------------------------------------------------------------


def test_classifier_recognises_the_shipped_digits(classifier):
    x, y = mnist_digits("test", labels=True)
    assert (classifier(x).argmax(1) == y).double().mean() > 0.98


def test_classifier_features_have_the_scale_of_the_docstring(classifier):
    x = mnist_digits("test")
    z = classifier.features(x)
    assert z.shape == (1000, 64)
    # Standardised over the 60 000 training digits, so nearly so over these.
    assert z.mean(0).abs().max() < 0.3
    assert z.var(0).min() > 0.7 and z.var(0).max() < 1.4
    # No feature is so small before standardisation that rounding errors show behind it.
    z_double = DigitClassifier.from_pretrained().double().features(x.double())
    assert (z - z_double).abs().max() < 1e-4


def test_classifier_is_frozen_and_small(classifier):
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    num_parameters = sum(p.numel() for p in classifier.parameters())
    assert num_parameters <= 300_000
    folder = metrics._CLASSIFIER
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["parameters"] == num_parameters
    assert config["test_accuracy"] >= 0.99
    assert (folder / "model.safetensors").stat().st_size <= 1e6


def test_classifier_treats_digits_of_a_batch_separately(classifier):
    x = mnist_digits("test", num=5)
    one_by_one = torch.cat([classifier(digit) for digit in x.split(1)])
    torch.testing.assert_close(classifier(x), one_by_one, rtol=1e-4, atol=1e-4)
    # An image has a gradient through the frozen classifier.
    x.requires_grad_()
    classifier(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_classifier_errors(classifier, tmp_path):
    for shape in ((2, 1, 28, 28), (2, 3, 32, 32), (1, 32, 32)):
        with pytest.raises(ValueError, match=r"\[B, 1, 32, 32\]"):
            classifier(torch.zeros(shape))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DigitClassifier.from_pretrained(tmp_path)
