"""Losses of distillation against closed forms, brute force, metrics and other implementations."""

import math
from itertools import combinations
from urllib.error import URLError

import deepinv as dinv
import lpips
import numpy as np
import pytest
import torch
import torchvision
from deepinv.loss.adversarial import DiscriminatorLoss, GeneratorLoss
from deepinv.training import AdversarialOptimizer, AdversarialTrainer
from torch import nn

from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import DigitClassifier, PerceptualDistance, crps, energy_score
from deepinv_ud2m.training.discriminator import ConditionalDiscriminator
from deepinv_ud2m.training.losses import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    EnergyScoreLoss,
    L2Loss,
    PerceptualLoss,
    condition,
    gradient_penalty,
)

LPIPS_NETWORKS = {
    "lpips": (torchvision.models.AlexNet_Weights, "233 MB"),
    "lpips-alex": (torchvision.models.AlexNet_Weights, "233 MB"),
    "lpips-vgg": (torchvision.models.VGG16_Weights, "528 MB"),
    "lpips-squeeze": (torchvision.models.SqueezeNet1_1_Weights, "5 MB"),
}


def _randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _denoising(sigma=0.1):
    return dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma))


def _discriminator(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConditionalDiscriminator(
            **({"channels": 1, "base_channels": 4, "num_layers": 2} | options)
        )


class Judge(nn.Module):
    """A discriminator of one function of the image, which remembers how it was called."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x, condition, sigma=None):
        self.calls.append({"x": x, "condition": condition, "sigma": sigma})
        return self.function(x)


class Filter(nn.Module):
    """A reconstruction network."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, y, physics):
        return self.filter(physics.A_adjoint(y))


class Linear(nn.Module):
    """D(x | c) = <w, x - c>."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x, condition, sigma=None):
        return ((x - condition) * self.weight).sum((1, 2, 3))


# -- The convention -------------------------------------------------------------------------------


LOSSES_OF_ONE_DRAW = [
    L2Loss("eps"),
    L2Loss("clipped", clip=3.0),
    PerceptualLoss("digits"),
    AdversarialGeneratorLoss(),
    AdversarialDiscriminatorLoss(penalty="r1"),
    AdversarialDiscriminatorLoss(penalty_weight=0.0),
]


@pytest.mark.parametrize("loss", LOSSES_OF_ONE_DRAW, ids=str)
def test_losses_of_one_draw_are_averaged_over_draws(loss):
    x = mnist_digits("test", num=3)
    samples = (x + 0.2 * _randn(2, 3, 1, 32, 32, dtype=torch.float32)).requires_grad_()
    physics = _denoising()
    arguments = {"x": x, "y": x, "physics": physics, "sigma": torch.tensor([0.1, 1.0, 5.0])}
    # What trainers pass beyond.
    arguments |= {"model": None, "x_s": x, "epoch": 0, "step": 3, "D": _discriminator().eval()}
    values = [loss(x_net=draw, **arguments) for draw in samples]
    average = loss(x_net=samples[0], samples=samples, **arguments)
    assert loss.num_samples == 1 and average.shape == (3,)
    torch.testing.assert_close(average, torch.stack(values).mean(0))
    # Images of a batch do not interact.
    first = {name: value[:1] if torch.is_tensor(value) else value for name, value in arguments.items()}
    torch.testing.assert_close(loss(x_net=samples[0, :1], **first), values[0][:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "cls",
    [L2Loss, PerceptualLoss, EnergyScoreLoss, AdversarialGeneratorLoss, AdversarialDiscriminatorLoss],
)
def test_weights(cls):
    x = mnist_digits("test", num=2)
    samples = (x + 0.2 * _randn(2, 2, 1, 32, 32, dtype=torch.float32)).requires_grad_()
    arguments = {"x": x, "x_net": samples[0], "samples": samples, "condition": x}
    arguments["D"] = _discriminator().eval()
    values = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)  # the penalty draws its interpolates
        values.append(cls(weight=weight)(**arguments))
    torch.testing.assert_close(values[1], 3 * values[0])
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight must be finite and >= 0"):
            cls(weight=weight)


def test_positional_arguments_are_refused():
    # deepinv's own classes disagree whether x or x_net comes first.
    x = torch.zeros(1, 1, 32, 32)
    for loss in (L2Loss(), PerceptualLoss(), EnergyScoreLoss(), AdversarialDiscriminatorLoss()):
        with pytest.raises(TypeError, match="positional"):
            loss(x, x)


@pytest.mark.parametrize("loss", [*LOSSES_OF_ONE_DRAW, EnergyScoreLoss()], ids=str)
def test_shapes_that_would_broadcast_are_refused(loss):
    x = torch.zeros(2, 1, 32, 32)
    arguments = {"sigma": 1.0, "condition": x, "D": _discriminator()}
    one = torch.zeros(1, 1, 32, 32)
    with pytest.raises(ValueError, match=r"samples must be \['S', 2, 1, 32, 32\]"):
        loss(x=x, x_net=one, samples=torch.stack([one, one]), **arguments)
    if loss.num_samples == 1:
        with pytest.raises(ValueError, match=r"x_net must be \[2, 1, 32, 32\]"):
            loss(x=x, x_net=one, **arguments)
        with pytest.raises(ValueError, match="x, the clean images, is needed"):
            loss(x=None, x_net=x, **arguments)


@pytest.mark.parametrize("loss", [*LOSSES_OF_ONE_DRAW, EnergyScoreLoss()], ids=str)
def test_draws_in_half_precision_are_compared_in_single(loss):
    x = mnist_digits("test", num=2)
    samples = (x + 0.2 * _randn(2, 2, 1, 32, 32, dtype=torch.float32)).half().requires_grad_()
    options = {"x": x, "sigma": 0.1, "condition": x, "D": _discriminator().eval()}
    value = loss(x_net=samples[0], samples=samples, **options)
    assert value.dtype == torch.float32
    expected = loss(x_net=samples[0].float(), samples=samples.float(), **options)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


# -- Squared error --------------------------------------------------------------------------------


def test_eps_is_the_error_of_the_noise():
    x, x_hat, eps = _images(4, 3, 8, 8), _images(4, 3, 8, 8, seed=1), _randn(4, 3, 8, 8)
    s = torch.tensor([0.01, 0.3, 2.0, 78.0], dtype=torch.float64)
    level = s.reshape(-1, 1, 1, 1)
    loss = L2Loss("eps")(x=x, x_net=x_hat, sigma=s)
    x_s = x + level * eps
    expected = ((x_s - x_hat) / level - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    # The same as the paper writes it, with images in [-1, 1] and a variance-preserving state.
    abar = 1 / (1 + 4 * level**2)
    v = abar.sqrt() * (2 * x - 1) + (1 - abar).sqrt() * eps
    eps_hat = (v - abar.sqrt() * (2 * x_hat - 1)) / (1 - abar).sqrt()
    torch.testing.assert_close(loss, (eps_hat - eps).square().mean((1, 2, 3)), rtol=1e-9, atol=0)
    snr = (abar / (1 - abar)).flatten()
    torch.testing.assert_close(loss, snr * (2 * x_hat - 2 * x).square().mean((1, 2, 3)))


def test_clipped_is_min_snr():
    x, x_hat = _images(5, 1, 4, 4), _images(5, 1, 4, 4, seed=1)
    s = torch.tensor([0.001, 0.1, 0.2236, 1.0, 50.0], dtype=torch.float64)
    error = (2 * x - 2 * x_hat).square().mean((1, 2, 3))
    snr = 1 / (4 * s**2)
    loss = L2Loss("clipped")(x=x, x_net=x_hat, sigma=s)
    torch.testing.assert_close(loss, snr.clamp(max=5) * error)
    torch.testing.assert_close(
        L2Loss("clipped", clip=1e9)(x=x, x_net=x_hat, sigma=s), L2Loss("eps")(x=x, x_net=x_hat, sigma=s)
    )


def test_x0_is_the_mean_squared_error():
    x, x_hat = _images(3, 2, 5, 4), _images(3, 2, 5, 4, seed=1)
    expected = nn.functional.mse_loss(x_hat, x, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(L2Loss()(x=x, x_net=x_hat), expected)
    torch.testing.assert_close(L2Loss()(x=x, x_net=x_hat, sigma=torch.zeros(3)), expected)


def test_levels_of_every_shape():
    x, x_hat = _images(2, 1, 4, 4), _images(2, 1, 4, 4, seed=1)
    loss = L2Loss("eps")
    expected = loss(x=x, x_net=x_hat, sigma=torch.tensor([0.5, 0.5]))
    for sigma in (0.5, torch.tensor(0.5), torch.full((2, 1, 1, 1), 0.5)):
        torch.testing.assert_close(loss(x=x, x_net=x_hat, sigma=sigma), expected)


def test_l2_errors():
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="weighting must be one of 'x0', 'eps', 'clipped', got 'snr'"):
        L2Loss("snr")
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clip must be positive"):
            L2Loss("clipped", clip=clip)
    for weighting in ("eps", "clipped"):
        with pytest.raises(ValueError, match="sigma, the levels of the states, is needed"):
            L2Loss(weighting)(x=x, x_net=x)
        with pytest.raises(ValueError, match="sigma must be positive"):
            L2Loss(weighting)(x=x, x_net=x, sigma=torch.tensor([1.0, 0.0]))
        with pytest.raises(ValueError, match="sigma must be a scalar or one value per image"):
            L2Loss(weighting)(x=x, x_net=x, sigma=torch.ones(3))


# -- Perceptual distance --------------------------------------------------------------------------


def test_perceptual_loss_is_the_metric_with_gradients():
    x, x_net = mnist_digits("test", num=3), mnist_digits("validation", num=3).requires_grad_()
    loss = PerceptualLoss("digits").train()
    value = loss(x=x, x_net=x_net)
    torch.testing.assert_close(value, PerceptualDistance("digits")(x_net, x))
    value.sum().backward()
    assert x_net.grad.isfinite().all() and x_net.grad.flatten(1).any(1).all()
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
    weights, size = LPIPS_NETWORKS[network]
    file = no_weights / weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    with pytest.raises(RuntimeError, match="download=True") as error:
        PerceptualLoss(network)
    for part in (size, weights.IMAGENET1K_V1.url, f"put the file at {file}", "efficientnet", "digits"):
        assert part in str(error.value)

    def offline(url, *args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(RuntimeError, match="no route to host") as error:
        PerceptualLoss(network, download=True)
    assert f"put the file at {file}" in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_as_a_loss(no_weights, monkeypatch):
    # The weights of SqueezeNet are made up: what is tested is how they are found and used.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        squeezenet = torchvision.models.squeezenet1_1()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: squeezenet.state_dict()
    )
    loss = PerceptualLoss("lpips-squeeze", download=True)
    assert "SqueezeNet" in loss.distance.network
    reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    trunk = squeezenet.features.state_dict()
    for name, value in reference.net.state_dict().items():
        value.copy_(trunk[name.split(".", 1)[1]])

    x, x_net = (_images(2, 3, 40, 33, seed=seed, dtype=torch.float32) for seed in (0, 1))
    expected = reference(2 * x_net - 1, 2 * x - 1).flatten()
    torch.testing.assert_close(loss(x=x, x_net=x_net), expected.detach())
    grey, grey_net = x[:, :1], x_net[:, :1]
    expected = reference(2 * grey_net.repeat(1, 3, 1, 1) - 1, 2 * grey.repeat(1, 3, 1, 1) - 1)
    torch.testing.assert_close(loss(x=grey, x_net=grey_net), expected.detach().flatten())
    for start in (x.clone(), torch.zeros_like(x), x_net.clone()):
        start.requires_grad_()
        loss(x=x, x_net=start).sum().backward()
        assert start.grad.isfinite().all()
    assert start.grad.any()


def test_perceptual_errors():
    with pytest.raises(ValueError, match=r"network must be one of .*lpips-vgg"):
        PerceptualLoss("inception")
    with pytest.raises(ValueError, match=r"\[B, 1, 32, 32\]"):
        PerceptualLoss("digits")(x=torch.zeros(1, 1, 28, 28), x_net=torch.zeros(1, 1, 28, 28))


# -- Energy score ---------------------------------------------------------------------------------


def _brute_force(samples, x, beta):
    samples, x = (a.numpy().reshape(*a.shape[: a.ndim - 3], -1) for a in (samples, x))
    num, scores = len(samples), []
    for b in range(x.shape[0]):
        error = sum(np.linalg.norm(samples[j, b] - x[b]) ** beta for j in range(num)) / num
        pairs = [
            np.linalg.norm(samples[j, b] - samples[k, b]) ** beta
            for j in range(num)
            for k in range(num)
            if j != k
        ]
        scores.append(error - sum(pairs) / (2 * num * (num - 1)))
    return torch.from_numpy(np.array(scores))


@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.7])
def test_energy_score_against_double_loop(num, beta):
    samples, x = _images(num, 3, 2, 4, 5), _images(3, 2, 4, 5, seed=1)
    loss = EnergyScoreLoss(num, beta)
    assert loss.num_samples == num
    score = loss(x=x, x_net=samples[0], samples=samples)
    torch.testing.assert_close(score, _brute_force(samples, x, beta))
    if beta == 1:
        torch.testing.assert_close(score, energy_score(samples, x))


@pytest.mark.parametrize("spread", [0.0, 0.5, 0.8, 1.0, 1.1])
def test_spread_of_gaussian_draws(spread):
    # Truth N(0, I) and draws N(0, r^2 I) in d dimensions: norms of Gaussian vectors are sqrt(d) times
    # the standard deviation to O(1 / d), and the score is lowest at r = c / sqrt(2 - c^2).
    torch.manual_seed(0)
    x, draws = torch.randn(64, 1, 64, 64), torch.randn(2, 64, 1, 64, 64)
    ratios = torch.linspace(0, 1.5, 151)
    loss = EnergyScoreLoss(spread=spread)
    scores = torch.stack([loss(x=x, samples=ratio * draws).mean() for ratio in ratios])
    expected = spread / (2 - spread**2) ** 0.5
    # The mean over 64 draws of 4096 pixels moves the minimum by less than 0.01 at five standard errors.
    assert ratios[scores.argmin()].item() == pytest.approx(expected, abs=0.02)


def test_a_spread_for_each_operator():
    samples, x = _images(3, 2, 1, 4, 4), _images(2, 1, 4, 4, seed=1)
    one, other, unknown = (dinv.physics.Denoising() for _ in range(3))
    loss = EnergyScoreLoss(spread={one: 1.1, other: 0.8})
    for physics, spread in ((one, 1.1), (other, 0.8)):
        expected = EnergyScoreLoss(spread=spread)(x=x, samples=samples)
        assert torch.equal(loss(x=x, samples=samples, physics=physics), expected)
    assert "spread=1.1, 0.8" in repr(loss)  # by which a trainer knows its checkpoints
    for physics, name in ((unknown, "Denoising"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"physics must be one of the operators .* got {name}"):
            loss(x=x, samples=samples, physics=physics)
    with pytest.raises(ValueError, match=r"spread must be in \[0, 1.2\], got 2"):
        EnergyScoreLoss(spread={one: 1.0, other: 2.0})
    for spread in ({}, [1.0, 0.8], "1", {one: None}):
        with pytest.raises(ValueError, match=r"spread must be a number, or \{physics: number\}, got"):
            EnergyScoreLoss(spread=spread)


def test_energy_score_of_many_draws_is_that_of_all_pairs():
    # Exactly, so its expectation and its minimum do not depend on the number of draws.
    samples, x = _images(4, 2, 1, 3, 3), _images(2, 1, 3, 3, seed=1)
    loss = EnergyScoreLoss()
    pairs = [loss(x=x, samples=samples[list(pair)]) for pair in combinations(range(4), 2)]
    torch.testing.assert_close(loss(x=x, samples=samples), torch.stack(pairs).mean(0))


def test_energy_score_of_patches():
    samples, x = _images(3, 2, 2, 7, 9), _images(2, 2, 7, 9, seed=1)
    whole = EnergyScoreLoss()(x=x, samples=samples)
    for size in (9, 20):
        patch = EnergyScoreLoss(patch_size=size)(x=x, samples=samples)
        torch.testing.assert_close(patch, whole)
    scores = []
    for i in range(0, 7, 4):
        for j in range(0, 9, 4):
            window = (..., slice(i, i + 4), slice(j, j + 4))
            scores.append(_brute_force(samples[window], x[window], 1.3))
    patches = EnergyScoreLoss(beta=1.3, patch_size=4)(x=x, samples=samples)
    torch.testing.assert_close(patches, torch.stack(scores).mean(0))


def test_energy_score_of_pixels_is_the_crps():
    samples, x = _images(4, 3, 1, 5, 6), _images(3, 1, 5, 6, seed=1)
    torch.testing.assert_close(EnergyScoreLoss(patch_size=1)(x=x, samples=samples), crps(samples, x))


def test_energy_score_of_features():
    classifier = DigitClassifier.from_pretrained()
    x = mnist_digits("test", num=3)
    samples = torch.stack([x.roll(shift, -1) for shift in (0, 1, 3)]).requires_grad_()
    score = EnergyScoreLoss(features=classifier.features)(x=x, samples=samples)
    features = torch.stack([classifier.features(draw) for draw in samples])
    expected = energy_score(features[..., None, None], classifier.features(x)[..., None, None])
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    score.sum().backward()
    assert samples.grad.isfinite().all() and samples.grad.any()
    # Maps have patches too.
    maps = EnergyScoreLoss(features=lambda x: classifier.activations(x)[2], patch_size=4)
    score = maps(x=x, samples=samples.detach())
    activations = [classifier.activations(draw)[2] for draw in (x, *samples.detach())]
    expected = EnergyScoreLoss(patch_size=4)(x=activations[0], samples=torch.stack(activations[1:]))
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


def _standard_errors(values):
    return (values.mean() / (values.std() / len(values) ** 0.5)).item()


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("patch_size", [None, 1])
def test_the_true_spread_scores_best(beta, patch_size):
    # x ~ N(m(y), 0.3^2 I) in two dimensions, draws of the right mean with other spreads. The noise of
    # the draws is shared, so the differences are of paired scores. At other seeds the worst of them is
    # 9 to 12 standard errors: it would fall below 5 in fewer than one of 1e4 seeds.
    num = 40_000
    mean, noise, inner = (
        _randn(num, 1, 1, 2),
        _randn(num, 1, 1, 2, seed=1),
        _randn(2, num, 1, 1, 2, seed=2),
    )
    x, loss = mean + 0.3 * noise, EnergyScoreLoss(beta=beta, patch_size=patch_size)

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
    # Pixels of correlation 0.9 in truth, independent in the draws, with the same marginals.
    num, factor = 40_000, torch.linalg.cholesky(torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double())
    x = _randn(num, 1, 1, 2) @ factor.T
    exact, independent = _randn(2, num, 1, 1, 2, seed=1) @ factor.T, _randn(2, num, 1, 1, 2, seed=2)
    for patch_size, sees in ((None, True), (1, False)):
        loss = EnergyScoreLoss(patch_size=patch_size)
        difference = loss(x=x, samples=independent) - loss(x=x, samples=exact)
        # 4.5 standard errors: a false alarm in 7e-6.
        assert (_standard_errors(difference) > 4.5) == sees


@pytest.mark.parametrize("beta", [0.2, 1.0, 1.5])
@pytest.mark.parametrize("patch_size", [None, 2])
def test_energy_score_has_finite_gradients_where_draws_meet(beta, patch_size):
    x = _images(2, 1, 4, 4, dtype=torch.float32)
    loss = EnergyScoreLoss(beta=beta, patch_size=patch_size)
    other = _images(2, 1, 4, 4, seed=1, dtype=torch.float32)
    nearly = torch.zeros_like(x) + 1e-20
    starts = {
        "all equal": (x, torch.stack([x, x, x])),
        "draws equal": (x, torch.stack([other, other])),
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
    samples, x = _images(3, 2, 1, 2, 3).requires_grad_(), _images(2, 1, 2, 3, seed=1)
    for loss in (EnergyScoreLoss(beta=0.7), EnergyScoreLoss(patch_size=2)):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(x=x, samples=s), samples)


def test_energy_score_errors():
    x = torch.zeros(2, 1, 4, 4)
    for num in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="num_samples must be"):
            EnergyScoreLoss(num)
    for beta in (0.0, 2.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"beta must be in \(0, 2\)"):
            EnergyScoreLoss(beta=beta)
    with pytest.raises(ValueError, match="patch_size must be an integer >= 1"):
        EnergyScoreLoss(patch_size=0)
    for spread in (-0.1, 1.3, math.nan):
        with pytest.raises(ValueError, match=r"spread must be in \[0, 1.2\]"):
            EnergyScoreLoss(spread=spread)
    with pytest.raises(ValueError, match="features must be callable"):
        EnergyScoreLoss(features="digits")
    with pytest.raises(ValueError, match=r"samples must be at least two draws .* got none"):
        EnergyScoreLoss()(x=x, x_net=x)
    with pytest.raises(ValueError, match=r"samples must be at least two draws .* got 1"):
        EnergyScoreLoss()(x=x, x_net=x, samples=x[None])
    samples = torch.stack([x, x])
    with pytest.raises(ValueError, match=r"features must map \[6, 1, 4, 4\] to \[6, ...\], got \[6\]"):
        EnergyScoreLoss(features=lambda z: z.sum((1, 2, 3)))(x=x, samples=samples)
    with pytest.raises(ValueError, match=r"to maps \[6, D, h, w\], got \[6, 16\]"):
        EnergyScoreLoss(features=lambda z: z.flatten(1), patch_size=2)(x=x, samples=samples)


# -- Adversarial ----------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", ["one", "map"])
def test_adversarial_losses_against_cross_entropy(logits):
    x, x_net, c = (_images(3, 2, 5, 5, seed=seed) for seed in range(3))
    scalar = lambda x: 10 * x.mean((1, 2, 3)) - 5  # noqa: E731
    D = Judge(scalar if logits == "one" else lambda x: 10 * x[:, :1] - 5)
    entropy = nn.BCEWithLogitsLoss(reduction="none")
    ones = torch.ones_like(D(x, c))
    real, fake = (
        entropy(D(image, c), label).reshape(3, -1).mean(1)
        for image, label in ((x, ones), (x_net, 0 * ones))
    )
    arguments = {"x": x, "x_net": x_net, "D": D, "condition": c}
    loss = AdversarialDiscriminatorLoss(penalty_weight=0)(**arguments)
    torch.testing.assert_close(loss, real + fake)
    fooled = entropy(D(x_net, c), ones).reshape(3, -1).mean(1)
    torch.testing.assert_close(AdversarialGeneratorLoss()(**arguments), fooled)


def test_adversarial_losses_of_large_logits_are_finite():
    x = torch.zeros(2, 1, 4, 4, requires_grad=True)
    for value in (-1e4, 1e4):
        D = Judge(lambda x, value=value: x.sum((1, 2, 3)) + value)
        loss = AdversarialGeneratorLoss()(x=x.detach(), x_net=x, D=D, condition=x)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert loss.isfinite().all() and gradient.isfinite().all()
        # A certain discriminator still tells the generator where to go.
        assert bool(gradient.any()) == (value < 0)


@pytest.mark.parametrize("penalty", ["interpolates", "r1"])
def test_penalty_of_a_linear_discriminator(penalty):
    x, x_net, c = (_images(4, 1, 3, 3, seed=seed) for seed in range(3))
    D = Linear(_randn(1, 3, 3, seed=3))
    options = {"x": x, "x_net": x_net, "D": D, "condition": c}
    without = AdversarialDiscriminatorLoss(penalty_weight=0)(**options)
    loss = AdversarialDiscriminatorLoss(penalty_weight=0.3, penalty=penalty)(**options)
    # Everywhere || grad D ||^2 = || w ||^2, whose derivative is 2 w.
    torch.testing.assert_close(loss - without, (0.3 * D.weight.square().sum()).expand(4))
    (gradient,) = torch.autograd.grad((loss - without).mean(), D.weight)
    torch.testing.assert_close(gradient, 0.6 * D.weight.detach())


def test_penalty_of_maps_does_not_depend_on_their_size():
    w = _randn(1, 2, 4, 4)
    for num in (1, 3, 5):
        x = _images(2, 2, 4 * num, 4 * num)
        penalty = gradient_penalty(lambda x: nn.functional.conv2d(x, w, stride=4).flatten(1), x)
        torch.testing.assert_close(penalty, w.square().sum().expand(2))


def test_where_the_penalty_is_taken():
    # D = || x ||^2 / 2 has the gradient x.
    x, x_net = _images(3, 1, 2, 2), _images(3, 1, 2, 2, seed=1)
    samples = torch.stack([x_net, 2 * x_net])
    D = Judge(lambda x: x.square().sum((1, 2, 3)) / 2)
    options = {"x": x, "x_net": x_net, "samples": samples, "D": D, "condition": x}
    without = AdversarialDiscriminatorLoss(penalty_weight=0)(**options)
    r1 = AdversarialDiscriminatorLoss(penalty_weight=1, penalty="r1")(**options) - without
    torch.testing.assert_close(r1, x.square().sum((1, 2, 3)))
    generator = torch.Generator().manual_seed(7)
    loss = AdversarialDiscriminatorLoss(penalty_weight=1, generator=generator)
    t = torch.rand(2, 3, 1, 1, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = ((1 - t) * x + t * samples).square().sum((2, 3, 4)).mean(0)
    torch.testing.assert_close(loss(**options) - without, expected)


def test_gradient_of_the_penalty_against_finite_differences():
    D = _discriminator(noise_level=True).double().eval()
    x, x_net, c = (_images(2, 1, 16, 16, seed=seed) for seed in range(3))
    loss = AdversarialDiscriminatorLoss(penalty_weight=10.0, penalty="r1")
    options = {"x": x, "x_net": x_net, "D": D, "condition": c, "sigma": 0.5}
    parameters = list(D.parameters())
    gradients = torch.autograd.grad(loss(**options).mean(), parameters)
    direction = [_randn(*p.shape, seed=i) for i, p in enumerate(parameters)]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
            values.append(loss(**options).mean().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_gradients_stay_on_their_side():
    x, c = mnist_digits("test", num=2), mnist_digits("validation", num=2)
    x_net = (x + 0.1 * _randn(*x.shape, dtype=torch.float32)).requires_grad_()
    D = _discriminator()
    options = {"x": x, "x_net": x_net, "D": D, "condition": c}
    AdversarialGeneratorLoss()(**options).sum().backward()
    assert x_net.grad.any() and all(p.grad is None and p.requires_grad for p in D.parameters())
    x_net.grad = None
    AdversarialDiscriminatorLoss()(**options).sum().backward()
    assert x_net.grad is None
    # The bias of the last layer cancels for equal logits only; all parameters take part.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in D.parameters())


def test_generator_gradient_is_that_through_the_discriminator():
    x, c = mnist_digits("test", num=2), mnist_digits("validation", num=2)
    x_net, D = mnist_digits("test", num=2).requires_grad_(), _discriminator().eval()
    (gradient,) = torch.autograd.grad(
        AdversarialGeneratorLoss()(x=x, x_net=x_net, D=D, condition=c).sum(), x_net
    )
    expected = nn.functional.softplus(-D(x_net, c)).mean((1, 2, 3)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x_net)[0])


def test_draws_meet_the_condition_and_the_level_of_their_image():
    x, samples, c = _images(2, 1, 4, 4), _images(3, 2, 1, 4, 4, seed=1), _images(2, 1, 4, 4, seed=2)
    sigma = torch.tensor([0.1, 5.0], dtype=torch.float64)
    D = Judge(lambda x: x.sum((1, 2, 3)))
    options = {"x": x, "x_net": samples[0], "samples": samples, "D": D, "condition": c, "sigma": sigma}
    AdversarialGeneratorLoss()(**options)
    AdversarialDiscriminatorLoss()(**options)
    generator, both, penalty = D.calls
    for call, images in ((generator, samples), (both, torch.cat([x[None], samples])), (penalty, None)):
        num = 3 if images is None else len(images)
        assert torch.equal(call["condition"], c.repeat(num, 1, 1, 1))
        assert torch.equal(call["sigma"], sigma.repeat(num))
        assert images is None or torch.equal(call["x"], images.flatten(0, 1))


def test_condition_is_computed_where_it_is_not_given():
    physics, x = _denoising(0.2), mnist_digits("test", num=2)
    y, x_net, D = physics(x), mnist_digits("validation", num=2), _discriminator().eval()
    for mode in ("tikhonov", "pinv", "adjoint"):
        for cls in (AdversarialGeneratorLoss, AdversarialDiscriminatorLoss):
            loss = cls(mode=mode, **({} if cls is AdversarialGeneratorLoss else {"penalty": "r1"}))
            options = {"x": x, "x_net": x_net, "D": D}
            given = loss(condition=condition(y, physics, mode), **options)
            torch.testing.assert_close(loss(y=y, physics=physics, **options), given)


def test_adversarial_losses_can_be_evaluated_without_gradients():
    x, x_net = mnist_digits("test", num=2), mnist_digits("validation", num=2)
    options = {"x": x, "x_net": x_net, "condition": x, "D": _discriminator().eval()}
    for loss in (AdversarialGeneratorLoss(), AdversarialDiscriminatorLoss(penalty="r1")):
        with torch.no_grad():
            value = loss(**options)
        assert not value.requires_grad
        torch.testing.assert_close(value, loss(**options).detach())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.filterwarnings("ignore:Grad strides")
def test_wrapped_discriminator():
    x, x_net = mnist_digits("test", num=2), mnist_digits("validation", num=2).requires_grad_()
    D = _discriminator().eval()
    losses = [AdversarialGeneratorLoss(), AdversarialDiscriminatorLoss(penalty="r1")]
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        results, calls = [], []
        wrapper = nn.parallel.DistributedDataParallel(D)
        wrapper.register_forward_pre_hook(lambda module, arguments: calls.append(module))
        for module in (D, wrapper):
            for _ in range(2):
                D.zero_grad()
                values = [loss(x=x, x_net=x_net, condition=x, D=module) for loss in losses]
                for value in values:
                    value.sum().backward()
            results.append([*values, *(p.grad.clone() for p in D.parameters())])
        for plain, wrapped in zip(*results, strict=True):
            torch.testing.assert_close(wrapped, plain)
        # Only where a backward pass into the parameters follows, as it has to.
        assert len(calls) == 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:non_blocking_transfers")
def test_adversarial_losses_in_deepinvs_trainer():
    # Its trainer knows neither levels nor several draws, and passes y_hat.
    physics = dinv.physics.Inpainting((1, 32, 32), 0.5, noise_model=dinv.physics.GaussianNoise(0.05))
    model = Filter()
    D = _discriminator()
    before = {
        name: value.clone() for name, value in (*model.state_dict().items(), *D.state_dict().items())
    }
    losses, losses_d = [L2Loss(), AdversarialGeneratorLoss(0.01)], AdversarialDiscriminatorLoss()
    assert isinstance(losses[1], GeneratorLoss) and isinstance(losses_d, DiscriminatorLoss)
    AdversarialTrainer(
        model=model,
        D=D,
        physics=physics,
        optimizer=AdversarialOptimizer(
            torch.optim.Adam(model.parameters()), torch.optim.Adam(D.parameters())
        ),
        train_dataloader=torch.utils.data.DataLoader(list(mnist_digits("test", num=8)), batch_size=4),
        online_measurements=True,
        losses=losses,
        losses_d=losses_d,
        metrics=[],
        epochs=1,
        save_path=None,
        optimizer_step_multi_dataset=False,
        device="cpu",
        verbose=False,
        show_progress_bar=False,
    ).train()
    after = {**dict(model.named_parameters()), **dict(D.named_parameters())}
    assert not any(torch.equal(value, before[name]) for name, value in after.items())


def test_adversarial_errors():
    x = torch.zeros(2, 1, 32, 32)
    D = _discriminator()
    for loss in (AdversarialGeneratorLoss(), AdversarialDiscriminatorLoss()):
        with pytest.raises(
            ValueError, match=f"D, the discriminator, must be given to {type(loss).__name__}"
        ):
            loss(x=x, x_net=x, condition=x)
        with pytest.raises(ValueError, match="condition, or y and physics"):
            loss(x=x, x_net=x, D=D, y=x)
        with pytest.raises(ValueError, match="condition must be of 2 images, one for each of x, got 1"):
            loss(x=x, x_net=x, D=D, condition=x[:1])
        with pytest.raises(ValueError, match="mode must be one of 'tikhonov', 'pinv', 'adjoint'"):
            type(loss)(mode="dagger")
    loss = AdversarialGeneratorLoss(D=D)
    assert loss(x=x, x_net=x, condition=x).shape == (2,)
    with pytest.raises(ValueError, match="penalty must be one of 'interpolates', 'r1', got 'r2'"):
        AdversarialDiscriminatorLoss(penalty="r2")
    with pytest.raises(ValueError, match="penalty_weight must be finite and >= 0, got -1"):
        AdversarialDiscriminatorLoss(penalty_weight=-1)


# -- The condition --------------------------------------------------------------------------------


def test_tikhonov_condition_against_dense_matrices(gaussian_problem):
    shape = (1, 8, 8)
    physics = dinv.physics.Downsampling(
        shape,
        filter="gaussian",
        factor=2,
        noise_model=dinv.physics.GaussianNoise(0.1),
        padding="circular",
    )
    problem = gaussian_problem(physics.double(), shape)
    precision = problem.A.T @ problem.A / 0.1**2 + 4 * torch.eye(64, dtype=torch.float64)
    right = problem.A.T @ problem.y.flatten() / 0.1**2 + 4 * 0.5
    expected = torch.linalg.solve(precision, right).reshape(1, *shape)
    result = condition(problem.y, physics, limits=(-math.inf, math.inf))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    low, high = expected.quantile(0.2).item(), expected.quantile(0.8).item()
    result = condition(problem.y, physics, limits=(low, high))
    torch.testing.assert_close(result, expected.clamp(low, high), rtol=1e-5, atol=1e-5)


def test_condition_of_a_blur():
    x = mnist_digits("test", num=8)
    blur = dinv.physics.functional.gaussian_blur(sigma=(1.5, 1.5))
    physics = dinv.physics.BlurFFT(
        (1, 32, 32), filter=blur, noise_model=dinv.physics.GaussianNoise(0.05)
    )
    y = (physics.A(x) + 0.05 * _randn(*x.shape, dtype=torch.float32)).requires_grad_()

    def correlation(image):
        return torch.corrcoef(torch.stack([image.flatten(), x.flatten()]))[0, 1]

    conditions = {mode: condition(y, physics, mode) for mode in ("tikhonov", "pinv", "adjoint")}
    for image in conditions.values():
        assert image.shape == x.shape and not image.requires_grad
        assert image.min() >= -1 and image.max() <= 2
    torch.testing.assert_close(conditions["pinv"], physics.A_dagger(y).detach().clamp(-1, 2))
    torch.testing.assert_close(conditions["adjoint"], physics.A_adjoint(y).detach().clamp(-1, 2))
    # What the documentation says of them.
    assert correlation(conditions["tikhonov"]) > 0.8
    assert correlation(conditions["pinv"]) < 0.1


def test_condition_of_stacks_and_of_other_noise():
    x = mnist_digits("test", num=2)
    children = [
        dinv.physics.Inpainting((1, 32, 32), mask=mask, noise_model=dinv.physics.GaussianNoise(0.1))
        for mask in (0.3, 0.4)
    ]
    physics = dinv.physics.StackedLinearPhysics(children)
    image = condition(physics(x), physics)
    assert image.shape == x.shape and image.isfinite().all()
    poisson = dinv.physics.Denoising(dinv.physics.PoissonNoise(0.1))
    with pytest.raises(ValueError, match="PoissonNoise"):
        condition(x, poisson)
    assert condition(x, poisson, sigma_y=0.1).shape == x.shape


def test_condition_errors():
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="mode must be one of"):
        condition(x, _denoising(), "dagger")
    for limits in ((1.0, 0.0), (0.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="limits must be two increasing numbers"):
            condition(x, _denoising(), limits=limits)


# -- The discriminator ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (28, 28), (32, 32), (33, 47), (256, 128)])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_discriminator_takes_any_size(size, num_layers):
    D = _discriminator(channels=3, num_layers=num_layers)
    x, c = (_images(2, 3, *size, seed=seed, dtype=torch.float32) for seed in range(2))
    logits = D(x, c)
    assert logits.shape[:2] == (2, 1) and logits.isfinite().all()
    for pixels, num in zip(size, logits.shape[2:], strict=True):
        if pixels % 2**num_layers == 0:
            assert num == pixels // 2**num_layers + 3


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("spectral_norm", [True, False])
def test_a_logit_judges_a_window(num_layers, spectral_norm):
    D = _discriminator(num_layers=num_layers, spectral_norm=spectral_norm).double().eval()
    x, c = (_images(1, 1, 160, 160, seed=seed).requires_grad_() for seed in range(2))
    logits = D(x, c)
    centre = logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2]
    for gradient in torch.autograd.grad(centre, (x, c)):
        rows, columns = gradient[0, 0].any(1), gradient[0, 0].any(0)
        assert rows.sum() == columns.sum() == 9 * 2**num_layers - 2


def test_discriminator_moves_with_the_image():
    D = _discriminator(num_layers=2).double().eval()
    x, c = (_images(1, 1, 96, 96, seed=seed) for seed in range(2))
    logits, moved = D(x, c), D(x.roll(8, -1), c.roll(8, -1))
    # Away from the edges: 8 pixels are two logits.
    torch.testing.assert_close(moved[..., 12:-12], logits[..., 10:-14])


def test_discriminator_judges_images_separately_and_by_their_condition():
    D = _discriminator().eval()
    x, c = mnist_digits("test", num=4), mnist_digits("validation", num=4)
    one_by_one = torch.cat([D(x[i : i + 1], c[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(D(x, c), one_by_one)
    assert ((D(x, c) - D(x, c.roll(1, 0))).abs().amax((1, 2, 3)) > 1e-3).all()
    kinds = (nn.modules.batchnorm._BatchNorm, nn.Sigmoid)
    assert not any(isinstance(module, kinds) for module in D.modules())


def test_discriminator_is_normalised():
    D = _discriminator(channels=2, condition_channels=5)
    assert D(torch.zeros(1, 2, 8, 8), torch.zeros(1, 5, 8, 8)).shape[1] == 1
    for module in D.eval().modules():
        if isinstance(module, nn.Conv2d):
            norm = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
            assert norm.item() == pytest.approx(1, abs=0.1)


def test_discriminator_sees_the_level():
    D = _discriminator(noise_level=True).eval()
    x, c = mnist_digits("test", num=2), mnist_digits("validation", num=2)
    logits = D(x, c, sigma=torch.tensor([0.5, 0.5]))
    for sigma in (0.5, torch.full((2, 1, 1, 1), 0.5)):
        torch.testing.assert_close(D(x, c, sigma=sigma), logits)
    mixed = D(x, c, sigma=torch.tensor([0.5, 20.0]))
    torch.testing.assert_close(mixed[0], logits[0])
    assert (mixed[1] - logits[1]).abs().max() > 1e-3
    for sigma in (1e-3, 100.0):
        assert D(x, c, sigma=sigma).isfinite().all()
    with pytest.raises(ValueError, match="sigma is needed"):
        D(x, c)
    blind = _discriminator().eval()
    torch.testing.assert_close(blind(x, c, sigma=0.5), blind(x, c))


def test_discriminator_can_be_saved():
    D, other = _discriminator(seed=0).eval(), _discriminator(seed=1).eval()
    x = mnist_digits("test", num=2)
    assert not torch.allclose(D(x, x), other(x, x))
    other.load_state_dict(D.state_dict())
    torch.testing.assert_close(other(x, x), D(x, x))


def test_discriminator_errors():
    for options in ({"channels": 0}, {"num_layers": 0}, {"base_channels": 0}, {"condition_channels": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be an integer >= 1"):
            ConditionalDiscriminator(**({"channels": 1} | options))
    D = _discriminator(channels=3)
    x = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"x must be images \[B, 3, H, W\], got \[2, 1, 16, 16\]"):
        D(x[:, :1], x)
    for c in (x[:1], x[:, :1], x[..., :8]):
        with pytest.raises(ValueError, match=r"condition must be \[2, 3, 16, 16\]"):
            D(x, c)
