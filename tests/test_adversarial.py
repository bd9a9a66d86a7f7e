"""Adversarial training: its losses, the condition, and the discriminator."""

from functools import partial

import deepinv as dinv
import pytest
import torch
from conftest import refused
from distillation import make_discriminator, rand, randn
from torch import nn

from deepinv_ud2m import Problem
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    ConditionalDiscriminator,
)
from deepinv_ud2m.training.adversarial import condition, gradient_penalty


class Judge(nn.Module):
    """A discriminator of one function of the image, which remembers how it was called."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x, condition):
        self.calls.append({"x": x, "condition": condition})
        return self.function(x)


class Linear(nn.Module):
    """D(x | c) = <w, x - c>."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x, condition):
        return ((x - condition) * self.weight).sum((1, 2, 3))


@pytest.mark.parametrize("logits", ["one", "map"])
def test_adversarial_losses_against_cross_entropy(logits):
    x, x_net, c = (rand(3, 2, 5, 5, seed=seed) for seed in range(3))
    scalar = lambda x: 10 * x.mean((1, 2, 3)) - 5  # noqa: E731
    D = Judge(scalar if logits == "one" else lambda x: 10 * x[:, :1] - 5)
    entropy = nn.BCEWithLogitsLoss(reduction="none")
    ones = torch.ones_like(D(x, c))
    pairs = ((x, ones), (x_net, 0 * ones))
    real, fake = (entropy(D(image, c), label).reshape(3, -1).mean(1) for image, label in pairs)
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
        assert bool(gradient.any()) == (value < 0), "a certain discriminator tells where to go"


def test_penalty_of_a_linearmake_discriminator():
    x, x_net, c = (rand(4, 1, 3, 3, seed=seed) for seed in range(3))
    D = Linear(randn(1, 3, 3, seed=3))
    options = {"x": x, "x_net": x_net, "D": D, "condition": c}
    without = AdversarialDiscriminatorLoss(penalty_weight=0)(**options)
    loss = AdversarialDiscriminatorLoss(penalty_weight=0.3)(**options)
    # Everywhere || grad D ||^2 = || w ||^2, whose derivative is 2 w.
    torch.testing.assert_close(loss - without, (0.3 * D.weight.square().sum()).expand(4))
    (gradient,) = torch.autograd.grad((loss - without).mean(), D.weight)
    torch.testing.assert_close(gradient, 0.6 * D.weight.detach())


def test_penalty_of_maps_does_not_depend_on_their_size():
    w = randn(1, 2, 4, 4)
    for num in (1, 3, 5):
        x = rand(2, 2, 4 * num, 4 * num)
        penalty = gradient_penalty(lambda x: nn.functional.conv2d(x, w, stride=4).flatten(1), x)
        torch.testing.assert_close(penalty, w.square().sum().expand(2))


def test_where_the_penalty_is_taken():
    # D = || x ||^2 / 2 has the gradient x.
    x, x_net = rand(3, 1, 2, 2), rand(3, 1, 2, 2, seed=1)
    samples = torch.stack([x_net, 2 * x_net])
    D = Judge(lambda x: x.square().sum((1, 2, 3)) / 2)
    options = {"x": x, "x_net": x_net, "samples": samples, "D": D, "condition": x}
    without = AdversarialDiscriminatorLoss(penalty_weight=0)(**options)
    torch.manual_seed(7)
    loss = AdversarialDiscriminatorLoss(penalty_weight=1)(**options)
    torch.manual_seed(7)
    t = torch.rand(2, 3, 1, 1, 1, dtype=torch.float64)
    expected = ((1 - t) * x + t * samples).square().sum((2, 3, 4)).mean(0)
    torch.testing.assert_close(loss - without, expected)


def test_gradient_of_the_penalty_against_finite_differences():
    D = make_discriminator().double().eval()
    x, x_net, c = (rand(2, 1, 16, 16, seed=seed) for seed in range(3))
    parameters = list(D.parameters())

    def loss():
        torch.manual_seed(0)  # the interpolates
        discriminator_loss = AdversarialDiscriminatorLoss(penalty_weight=10.0)
        return discriminator_loss(x=x, x_net=x_net, D=D, condition=c).mean()

    gradients = torch.autograd.grad(loss(), parameters)
    direction = [randn(*p.shape, seed=i) for i, p in enumerate(parameters)]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
            values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_gradients_stay_on_their_side():
    x, c = mnist_digits("test", num=2), mnist_digits("validation", num=2)
    x_net = (x + 0.1 * randn(*x.shape, dtype=torch.float32)).requires_grad_()
    D = make_discriminator()
    before = {name: value.clone() for name, value in D.train().state_dict().items()}
    options = {"x": x, "x_net": x_net, "D": D, "condition": c}
    AdversarialGeneratorLoss()(**options).sum().backward()
    assert x_net.grad.any() and all(p.grad is None and p.requires_grad for p in D.parameters())
    assert all(torch.equal(value, before[name]) for name, value in D.state_dict().items())
    x_net.grad = None
    AdversarialDiscriminatorLoss()(**options).sum().backward()
    assert x_net.grad is None
    # The bias of the last layer cancels for equal logits only; all parameters take part.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in D.parameters())


def test_samples_meet_the_condition_of_their_image():
    x, samples, c = rand(2, 1, 4, 4), rand(3, 2, 1, 4, 4, seed=1), rand(2, 1, 4, 4, seed=2)
    D = Judge(lambda x: x.sum((1, 2, 3)))
    options = {"x": x, "x_net": samples[0], "samples": samples, "D": D, "condition": c}
    AdversarialGeneratorLoss()(**options)
    AdversarialDiscriminatorLoss()(**options)
    generator, both, penalty = D.calls
    for call, images in ((generator, samples), (both, torch.cat([x[None], samples])), (penalty, None)):
        num = 3 if images is None else len(images)
        assert torch.equal(call["condition"], c.repeat(num, 1, 1, 1))
        assert images is None or torch.equal(call["x"], images.flatten(0, 1))


def test_adversarial_losses_can_be_evaluated_without_gradients():
    x, x_net = mnist_digits("test", num=2), mnist_digits("validation", num=2)
    options = {"x": x, "x_net": x_net, "condition": x, "D": make_discriminator().eval()}
    for loss in (AdversarialGeneratorLoss(), AdversarialDiscriminatorLoss()):
        values = []
        for enabled in (False, True):
            torch.manual_seed(0)
            with torch.set_grad_enabled(enabled):
                values.append(loss(**options))
        assert not values[0].requires_grad
        torch.testing.assert_close(values[0], values[1].detach())


def test_what_is_refused():
    x, D, wide = torch.zeros(2, 1, 32, 32), make_discriminator(), make_discriminator(channels=3)
    for loss in (AdversarialGeneratorLoss(), AdversarialDiscriminatorLoss()):
        of_x = partial(loss, x=x, x_net=x)
        refused(
            (partial(of_x, condition=x), TypeError, "'D'"),
            (partial(of_x, D=D, y=x), TypeError, "'condition'"),
            (partial(of_x, D=D, condition=x[:1]), r"condition must be \["),
        )
    colour = torch.zeros(2, 3, 16, 16)
    refused(
        (lambda: AdversarialDiscriminatorLoss(penalty_weight=-1), "penalty_weight must be finite .*, got -1"),
        (lambda: ConditionalDiscriminator(channels=0), "channels must be an integer >= 1"),
        (lambda: ConditionalDiscriminator(1, num_layers=0), "num_layers must be an integer >= 1"),
        (lambda: ConditionalDiscriminator(1, base_channels=0), "base_channels must be an integer >= 1"),
        (lambda: wide(colour[:, :1], colour), r"x must be images \[B, 3, H, W\], got \[2, 1, 16, 16\]"),
        (lambda: wide(colour, colour[:1]), r"condition must be \[2, 3, 16, 16\]"),
        (lambda: wide(colour, colour[..., :8]), r"condition must be \[2, 3, 16, 16\]"),
    )


# -- The condition --------------------------------------------------------------------------------


def test_condition_against_dense_matrices(gaussian_problem):
    shape = (1, 8, 8)
    options = {"filter": "gaussian", "factor": 2, "padding": "circular"}
    physics = dinv.physics.Downsampling(shape, noise_model=dinv.physics.GaussianNoise(0.1), **options)
    problem = gaussian_problem(physics.double(), shape)
    precision = problem.A.T @ problem.A / 0.1**2 + 4 * torch.eye(64, dtype=torch.float64)
    right = problem.A.T @ problem.y.flatten() / 0.1**2 + 4 * 0.5
    expected = torch.linalg.solve(precision, right).reshape(1, *shape)
    result = condition(Problem(problem.y, physics))
    torch.testing.assert_close(result, expected.clamp(-1, 2), rtol=1e-5, atol=1e-5)
    assert condition(Problem(20 * problem.y, physics)).max() == 2


def test_condition_of_stacks_and_of_other_noise():
    x, noise = mnist_digits("test", num=2), dinv.physics.GaussianNoise(0.1)
    masks = [dinv.physics.Inpainting((1, 32, 32), mask=mask, noise_model=noise) for mask in (0.3, 0.4)]
    physics = dinv.physics.StackedLinearPhysics(masks)
    image = condition(Problem(physics(x), physics))
    assert image.shape == x.shape and image.isfinite().all()
    poisson = dinv.physics.Denoising(dinv.physics.PoissonNoise(0.1))
    assert condition(Problem(x, poisson, sigma_y=0.1)).shape == x.shape


# -- The discriminator ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (32, 32), (33, 47)])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_discriminator_takes_any_size(size, num_layers):
    D = make_discriminator(channels=3, num_layers=num_layers)
    x, c = (rand(2, 3, *size, seed=seed, dtype=torch.float32) for seed in range(2))
    logits = D(x, c)
    assert logits.shape[:2] == (2, 1) and logits.isfinite().all()
    for pixels, num in zip(size, logits.shape[2:], strict=True):
        if pixels % 2**num_layers == 0:
            assert num == pixels // 2**num_layers + 3


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_logit_judges_a_window(num_layers):
    D = make_discriminator(num_layers=num_layers).double().eval()
    shape = (1, 1, 20 * 2**num_layers, 20 * 2**num_layers)
    x, c = (rand(*shape, seed=seed).requires_grad_() for seed in range(2))
    logits = D(x, c)
    centre = logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2]
    for gradient in torch.autograd.grad(centre, (x, c)):
        rows, columns = gradient[0, 0].any(1), gradient[0, 0].any(0)
        assert rows.sum() == columns.sum() == 9 * 2**num_layers - 2


def test_discriminator_judges_images_separately_and_by_their_condition():
    D = make_discriminator().eval()
    x, c = mnist_digits("test", num=4), mnist_digits("validation", num=4)
    one_by_one = torch.cat([D(x[i : i + 1], c[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(D(x, c), one_by_one)
    assert ((D(x, c) - D(x, c.roll(1, 0))).abs().amax((1, 2, 3)) > 1e-3).all()
    for module in make_discriminator(channels=2).eval().modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Sigmoid)
        if isinstance(module, nn.Conv2d):
            norm = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
            assert norm.item() == pytest.approx(1, abs=0.1)
