"""Losses of distillation against closed forms, brute force, metrics and other implementations."""

import math
from itertools import permutations
from urllib.error import URLError

import deepinv as dinv
import lpips
import numpy as np
import pytest
import torch
import torchvision
from conftest import refused
from distillation import make_discriminator, rand, randn
from torch import nn

from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import DigitClassifier, PerceptualDistance, crps, energy_score
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    EnergyScoreLoss,
    GaussianNLLLoss,
    L2Loss,
    PerceptualLoss,
)

LPIPS_NETWORKS = {"lpips": ("AlexNet", "233 MB"), "lpips-alex": ("AlexNet", "233 MB")}
LPIPS_NETWORKS |= {"lpips-vgg": ("VGG16", "528 MB"), "lpips-squeeze": ("SqueezeNet1_1", "5 MB")}


LOSSES = [L2Loss, PerceptualLoss, EnergyScoreLoss, AdversarialGeneratorLoss, AdversarialDiscriminatorLoss]
LOSSES_OF_ONE_SAMPLE = [L2Loss(), PerceptualLoss("digits"), AdversarialGeneratorLoss()]
LOSSES_OF_ONE_SAMPLE += [AdversarialDiscriminatorLoss(penalty_weight=0.0)]


@pytest.mark.parametrize("loss", LOSSES_OF_ONE_SAMPLE, ids=str)
def test_losses_of_one_sample_are_averaged_over_samples(loss):
    x = mnist_digits("test", num=3)
    samples = (x + 0.2 * randn(2, 3, 1, 32, 32, dtype=torch.float32)).requires_grad_()
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    arguments = {"x": x, "y": x, "physics": physics, "sigma": torch.tensor([0.1, 1.0, 5.0])}
    arguments |= {"model": None, "x_s": x, "epoch": 0, "micro_step": 3, "D": make_discriminator().eval()}
    arguments["condition"] = 0.5 * x
    values = [loss(x_net=sample, **arguments) for sample in samples]
    average = loss(x_net=samples[0], samples=samples, **arguments)
    assert loss.num_samples == 1 and average.shape == (3,)
    torch.testing.assert_close(average, torch.stack(values).mean(0))
    # Images of a batch do not interact.
    first = {name: value[:1] if torch.is_tensor(value) else value for name, value in arguments.items()}
    torch.testing.assert_close(loss(x_net=samples[0, :1], **first), values[0][:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", LOSSES)
def test_weights(cls):
    x = mnist_digits("test", num=2)
    samples = (x + 0.2 * randn(2, 2, 1, 32, 32, dtype=torch.float32)).requires_grad_()
    arguments = {"x": x, "x_net": samples[0], "samples": samples, "condition": x}
    arguments["D"] = make_discriminator().eval()
    values = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)  # the penalty draws its interpolates
        values.append(cls(weight=weight)(**arguments))
    torch.testing.assert_close(values[1], 3 * values[0])
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight must be finite and >= 0"):
            cls(weight=weight)


@pytest.mark.parametrize("loss", [*LOSSES_OF_ONE_SAMPLE, EnergyScoreLoss()], ids=str)
def test_shapes_that_would_broadcast_are_refused(loss):
    x = torch.zeros(2, 1, 32, 32)
    arguments = {"sigma": 1.0, "condition": x, "D": make_discriminator()}
    one = torch.zeros(1, 1, 32, 32)
    with pytest.raises(ValueError, match=r"samples must be \['S', 2, 1, 32, 32\]"):
        loss(x=x, x_net=one, samples=torch.stack([one, one]), **arguments)
    if loss.num_samples == 1:
        with pytest.raises(ValueError, match=r"x_net must be \[2, 1, 32, 32\]"):
            loss(x=x, x_net=one, **arguments)
        with pytest.raises(ValueError, match="x, the clean images, is needed"):
            loss(x=None, x_net=x, **arguments)
    with pytest.raises(TypeError, match="positional"):  # deepinv's classes disagree which comes first
        loss(x, x)


@pytest.mark.parametrize("loss", [*LOSSES_OF_ONE_SAMPLE, EnergyScoreLoss()], ids=str)
def test_samples_in_half_precision_are_compared_in_single(loss):
    x = mnist_digits("test", num=2)
    samples = (x + 0.2 * randn(2, 2, 1, 32, 32, dtype=torch.float32)).half().requires_grad_()
    options = {"x": x, "sigma": 0.1, "condition": x, "D": make_discriminator().eval()}
    value = loss(x_net=samples[0], samples=samples, **options)
    assert value.dtype == torch.float32
    expected = loss(x_net=samples[0].float(), samples=samples.float(), **options)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_the_squared_error_over_the_variance_of_the_state_is_that_of_the_noise():
    """As in the paper's code, with images in [-1, 1] and a variance-preserving state."""
    x, x_hat, eps = rand(4, 3, 8, 8), rand(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8)
    expected = nn.functional.mse_loss(x_hat, x, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(L2Loss()(x=x, x_net=x_hat), expected)
    s = torch.tensor([0.01, 0.3, 2.0, 78.0], dtype=torch.float64)
    abar = 1 / (1 + 4 * s.reshape(-1, 1, 1, 1) ** 2)
    v = abar.sqrt() * (2 * x - 1) + (1 - abar).sqrt() * eps
    eps_hat = (v - abar.sqrt() * (2 * x_hat - 1)) / (1 - abar).sqrt()
    of_noise = L2Loss(of="noise")(x=x, x_net=x_hat, sigma=s)
    torch.testing.assert_close(of_noise, (eps_hat - eps).square().mean((1, 2, 3)), rtol=1e-9, atol=0)
    refused(
        (lambda: L2Loss(of="noise")(x=x, x_net=x_hat), "sigma, the level of the states, is needed"),
        (lambda: L2Loss(of="state"), "of must be 'image' or 'noise'"),
    )


def test_the_likelihood_is_gaussian_and_highest_at_the_rms_error():
    x, estimate = rand(3, 1, 8, 8), rand(3, 1, 8, 8, seed=1)
    rmse = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64).reshape(3, 1, 1, 1)
    loss = GaussianNLLLoss()(x=x, x_net=estimate, rmse=rmse)
    expected = nn.functional.gaussian_nll_loss(estimate, x, rmse.expand_as(x) ** 2, reduction="none")
    torch.testing.assert_close(loss, expected.flatten(1).mean(1))
    rms = (estimate - x).square().mean((1, 2, 3), keepdim=True).sqrt()
    assert (GaussianNLLLoss()(x=x, x_net=estimate, rmse=rms) < loss).all()
    with pytest.raises(ValueError, match=r"rmse, the predicted RMSE .* stage='initial'"):
        GaussianNLLLoss()(x=x, x_net=estimate)


def test_perceptual_loss_is_the_metric_with_gradients():
    x, loss = mnist_digits("test", num=3), PerceptualLoss("digits").train()
    for start in (x, torch.zeros_like(x), mnist_digits("validation", num=3)):  # finite where images are equal
        x_net = start.clone().requires_grad_()
        value = loss(x=x, x_net=x_net)
        torch.testing.assert_close(value, PerceptualDistance("digits")(x_net, x))
        value.sum().backward()
        assert x_net.grad.isfinite().all()
    assert x_net.grad.flatten(1).any(1).all()
    assert not any(p.requires_grad for p in loss.parameters())


def test_perceptual_loss_of_grey_images_on_a_network_of_colour():
    pytest.importorskip("efficientnet_lite_pytorch")
    x, x_net = mnist_digits("test", num=2), mnist_digits("validation", num=2).requires_grad_()
    value = PerceptualLoss("efficientnet")(x=x, x_net=x_net)
    expected = PerceptualDistance("efficientnet")(x_net.repeat(1, 3, 1, 1), x.repeat(1, 3, 1, 1))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    value.sum().backward()
    assert x_net.grad.isfinite().all() and x_net.grad.any()


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """An empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("network", LPIPS_NETWORKS)
def test_lpips_without_its_weights(network, no_weights, monkeypatch):
    name, size = LPIPS_NETWORKS[network]
    url = getattr(torchvision.models, f"{name}_Weights").IMAGENET1K_V1.url
    file = no_weights / url.rsplit("/", 1)[-1]
    with pytest.raises(RuntimeError, match="download=True") as error:
        PerceptualLoss(network)
    assert all(
        p in str(error.value) for p in (size, url, f"put the file at {file}", "efficientnet", "digits")
    )

    def offline(url, *args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(RuntimeError, match=f"(?s)no route to host.*put the file at {file}"):
        PerceptualLoss(network, download=True)


def _brute_force(samples, x):
    samples, x = (a.numpy().reshape(*a.shape[: a.ndim - 3], -1) for a in (samples, x))
    num, scores = len(samples), []
    for b in range(x.shape[0]):
        error = sum(np.linalg.norm(samples[j, b] - x[b]) for j in range(num)) / num
        pairs = sum(np.linalg.norm(samples[j, b] - samples[k, b]) for j, k in permutations(range(num), 2))
        scores.append(error - pairs / (2 * num * (num - 1)))
    return torch.from_numpy(np.array(scores))


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_as_a_loss(no_weights, monkeypatch):
    """With made-up weights of SqueezeNet: what is tested is how they are found and used."""
    squeezenet, place = torchvision.models.squeezenet1_1(), "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(place, lambda *_, **__: squeezenet.state_dict())
    loss = PerceptualLoss("lpips-squeeze", download=True)
    reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    for name, value in reference.net.state_dict().items():
        value.copy_(squeezenet.features.state_dict()[name.split(".", 1)[1]])
    x, x_net = (rand(2, 3, 40, 33, seed=seed, dtype=torch.float32) for seed in (0, 1))
    for truth, image in ((x, x_net), (x[:, :1], x_net[:, :1])):  # grey images are repeated
        expected = reference(2 * image.expand_as(x) - 1, 2 * truth.expand_as(x) - 1).flatten()
        torch.testing.assert_close(loss(x=truth, x_net=image), expected.detach())
    for start in (x.clone(), torch.zeros_like(x), x_net.clone()):
        loss(x=x, x_net=start.requires_grad_()).sum().backward()
        assert start.grad.isfinite().all()
    assert start.grad.any()


@pytest.mark.parametrize("num", [2, 3, 5])
def test_energy_score_against_double_loop(num):
    samples, x = rand(num, 3, 2, 4, 5), rand(3, 2, 4, 5, seed=1)
    loss = EnergyScoreLoss(num)
    assert loss.num_samples == num
    score = loss(x=x, x_net=samples[0], samples=samples)
    torch.testing.assert_close(score, _brute_force(samples, x))
    torch.testing.assert_close(score, energy_score(samples, x))


@pytest.mark.parametrize("c", [0.0, 0.5, 0.8, 1.0, 1.1])
def test_diversity_of_gaussian_samples(c):
    # Truth N(0, I) and samples N(0, r^2 I) in d dimensions: norms of Gaussian vectors are sqrt(d) times
    # the standard deviation to O(1 / d), and the score is lowest at r = c / sqrt(2 - c^2).
    torch.manual_seed(0)
    x, samples = torch.randn(64, 1, 64, 64), torch.randn(2, 64, 1, 64, 64)
    ratios = torch.linspace(0, 1.5, 151)
    loss = EnergyScoreLoss(diversity_weight=c)
    scores = torch.stack([loss(x=x, samples=ratio * samples).mean() for ratio in ratios])
    # The mean over 64 samples of 4096 pixels moves the minimum by less than 0.01 at five standard errors.
    assert ratios[scores.argmin()].item() == pytest.approx(c / (2 - c**2) ** 0.5, abs=0.02)


def test_a_diversity_weight_for_each_physics():
    samples, x = rand(3, 2, 1, 4, 4), rand(2, 1, 4, 4, seed=1)
    one, other, unknown = (dinv.physics.Denoising() for _ in range(3))
    given = {one: 1.1, other: 0.9}
    loss = EnergyScoreLoss(diversity_weight=given)
    given[other] = 0.8  # as a controller does, for all losses that it was given to
    for physics, c in ((one, 1.1), (other, 0.8)):
        expected = EnergyScoreLoss(diversity_weight=c)(x=x, samples=samples)
        assert torch.equal(loss(x=x, samples=samples, physics=physics), expected)
    # The weights change in training, and a trainer knows its checkpoints by this.
    assert "diversity_weight=of each physics" in repr(loss)
    for physics, name in ((unknown, "Denoising"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"physics must be one of those that .* got {name}"):
            loss(x=x, samples=samples, physics=physics)


def test_energy_score_of_patches():
    samples, x = rand(3, 2, 2, 7, 9), rand(2, 2, 7, 9, seed=1)
    whole = EnergyScoreLoss()(x=x, samples=samples)
    for size in (9, 20):
        patch = EnergyScoreLoss(patch_size=size)(x=x, samples=samples)
        torch.testing.assert_close(patch, whole)
    scores = []
    for i in range(0, 7, 4):
        for j in range(0, 9, 4):
            window = (..., slice(i, i + 4), slice(j, j + 4))
            scores.append(_brute_force(samples[window], x[window]))
    patches = EnergyScoreLoss(patch_size=4)(x=x, samples=samples)
    torch.testing.assert_close(patches, torch.stack(scores).mean(0))
    pixels = EnergyScoreLoss(patch_size=1)(x=x[:, :1], samples=samples[:, :, :1])
    torch.testing.assert_close(pixels, crps(samples[:, :, :1], x[:, :1]))


def test_energy_score_of_features():
    classifier = DigitClassifier.from_pretrained()
    x = mnist_digits("test", num=3)
    samples = torch.stack([x.roll(shift, -1) for shift in (0, 1, 3)]).requires_grad_()
    score = EnergyScoreLoss(features=classifier.features)(x=x, samples=samples)
    features = torch.stack([classifier.features(sample) for sample in samples])
    expected = energy_score(features[..., None, None], classifier.features(x)[..., None, None])
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    score.sum().backward()
    assert samples.grad.isfinite().all() and samples.grad.any()
    # Maps have patches too.
    maps = EnergyScoreLoss(features=lambda x: classifier.activations(x)[2], patch_size=4)
    score = maps(x=x, samples=samples.detach())
    activations = [classifier.activations(sample)[2] for sample in (x, *samples.detach())]
    expected = EnergyScoreLoss(patch_size=4)(x=activations[0], samples=torch.stack(activations[1:]))
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


def _standard_errors(values):
    return (values.mean() / (values.std() / len(values) ** 0.5)).item()


@pytest.mark.parametrize("patch_size", [None, 1])
def test_the_true_spread_scores_best(patch_size):
    # x ~ N(m(y), 0.3^2 I) in two dimensions, samples of the right mean with other spreads. The noise of
    # the samples is shared, so the differences are of paired scores. At other seeds the worst of them is
    # 9 to 12 standard errors: it would fall below 5 in fewer than one of 1e4 seeds.
    num = 40_000
    mean, noise = randn(num, 1, 1, 2), randn(num, 1, 1, 2, seed=1)
    inner = randn(2, num, 1, 1, 2, seed=2)
    x, loss = mean + 0.3 * noise, EnergyScoreLoss(patch_size=patch_size)

    def score(scale, shift=0.0):
        return loss(x=x, samples=mean + shift + 0.3 * scale * inner)

    exact = score(1.0)
    for scale in (0.0, 0.4, 0.7, 1.4, 2.0):
        assert _standard_errors(score(scale) - exact) > 5, scale
    assert _standard_errors(score(1.0, shift=0.2) - exact) > 5
    # The derivative in the scale is zero at the truth, up to noise (4.5 standard errors: 7e-6).
    step = 1e-4
    derivative = (score(1 + step) - score(1 - step)) / (2 * step)
    assert abs(_standard_errors(derivative)) < 4.5
    # The squared error is lowest without any spread.
    errors = [L2Loss()(x=x, x_net=mean + 0.3 * scale * inner[0]).mean() for scale in (0.0, 0.4, 1.0)]
    assert errors == sorted(errors)


def test_patches_do_not_see_how_they_go_together():
    # Pixels of correlation 0.9 in truth, independent in the samples, with the same marginals.
    num, factor = 40_000, torch.linalg.cholesky(torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double())
    x = randn(num, 1, 1, 2) @ factor.T
    exact, independent = randn(2, num, 1, 1, 2, seed=1) @ factor.T, randn(2, num, 1, 1, 2, seed=2)
    for patch_size, sees in ((None, True), (1, False)):
        loss = EnergyScoreLoss(patch_size=patch_size)
        difference = loss(x=x, samples=independent) - loss(x=x, samples=exact)
        # 4.5 standard errors: a false alarm in 7e-6.
        assert (_standard_errors(difference) > 4.5) == sees


@pytest.mark.parametrize("patch_size", [None, 2])
def test_energy_score_has_finite_gradients_where_samples_meet(patch_size):
    x = rand(2, 1, 4, 4, dtype=torch.float32)
    loss = EnergyScoreLoss(patch_size=patch_size)
    other = rand(2, 1, 4, 4, seed=1, dtype=torch.float32)
    nearly = torch.zeros_like(x) + 1e-20
    starts = {
        "all equal": (x, torch.stack([x, x, x])),
        "samples equal": (x, torch.stack([other, other])),
        "one is the truth": (x, torch.stack([x, other])),
        "nearly equal": (0 * x, torch.stack([nearly, 0 * x])),
    }
    for name, (truth, samples) in starts.items():
        samples = samples.clone().requires_grad_()
        score = loss(x=truth, samples=samples)
        score.sum().backward()
        assert score.isfinite().all() and samples.grad.isfinite().all(), name
        if name == "all equal":
            assert not score.any() and not samples.grad.any()


def test_gradient_of_the_energy_score():
    samples, x = rand(3, 2, 1, 2, 3).requires_grad_(), rand(2, 1, 2, 3, seed=1)
    for loss in (EnergyScoreLoss(), EnergyScoreLoss(patch_size=2)):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(x=x, samples=s), samples)


def test_energy_score_errors():
    x, physics = torch.zeros(2, 1, 4, 4), dinv.physics.Denoising()
    samples = torch.stack([x, x])
    weights = (-0.1, 1.3, math.nan, {}, [1.0], "1", {physics: None}, {physics: 2.0})
    for options, message in (
        *(({"num_samples": num}, "num_samples must be") for num in (1, 0, 2.5, True)),
        *(({"diversity_weight": c}, r"diversity_weight must be a number in \[0, 1.2\]") for c in weights),
        ({"patch_size": 0}, "patch_size must be an integer >= 1"),
        ({"features": "digits"}, "features must be callable"),
        ({"features": lambda z: z.sum((1, 2, 3))}, r"must map \[6, 1, 4, 4\] to \[6, ...\], got \[6\]"),
        ({"features": lambda z: z.flatten(1), "patch_size": 2}, r"to maps \[6, D, h, w\], got \[6, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            EnergyScoreLoss(**options)(x=x, samples=samples)
    for given, message in (({}, "none"), ({"samples": x[None]}, "1")):
        with pytest.raises(ValueError, match=rf"samples must be at least two samples .* got {message}"):
            EnergyScoreLoss()(x=x, x_net=x, **given)
