"""An initial estimate that is trained: what it predicts, what the iterations make of it, how it is stored."""

import json

import pytest
import torch
from conftest import rand, seeded
from deepinv.physics import Blur, BlurFFT, Denoising, GaussianNoise, Inpainting
from deepinv.physics.functional import gaussian_blur

from deepinv_ud2m import (
    UD2M,
    LinearInitializer,
    PosteriorMeanInitializer,
    Problem,
    UnfoldedDenoiser,
    WienerInitializer,
    load_prior,
)
from deepinv_ud2m.physics import JPEG
from deepinv_ud2m.proximal import joint_level

SHAPE = (1, 16, 16)
B = 3
LEVELS = torch.tensor([0.02, 0.1, 0.05])


@pytest.fixture
def initializer(tiny_config):
    """Random weights, none left at zero."""
    torch.manual_seed(1)
    return randomised(PosteriorMeanInitializer(tiny_config["network"], 1))


def randomised(initializer):
    with torch.no_grad():
        for parameter in initializer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return initializer


def mask(sigma_y=0.05):
    return Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(sigma_y))


def blur(sigma_y=0.05, dtype=torch.float32):
    kernel = gaussian_blur(sigma=(1.0, 1.0)).to(dtype)
    return BlurFFT(SHAPE, filter=kernel, noise_model=GaussianNoise(sigma_y))


def images(num=B, seed=0, channels=1):
    return rand(num, channels, *SHAPE[1:], seed=seed, dtype=torch.float32)


def measured(physics, x=None, **options):
    return Problem(physics(images() if x is None else x), physics, **options)


def test_it_starts_as_the_prior_after_a_wiener_filter(tiny_folder):
    prior = load_prior(tiny_folder)
    wiener = WienerInitializer(mean=0.3)
    initializer = PosteriorMeanInitializer.from_prior(tiny_folder, wiener, reference_level=0.1)
    both = initializer, PosteriorMeanInitializer(initializer.network_settings, 1)
    first, fresh = (of.network.unet.enc["16x16_conv"].weight for of in both)
    assert (first[:, 4:].std() / fresh[:, 4:].std()).item() == pytest.approx(0.3, rel=0.1)
    with torch.no_grad():  # the further images
        first[:, 4:] = 0
    x_s, problem = images(), measured(mask(), sigma_y=LEVELS)
    sigma = torch.tensor([0.02, 0.5, 70.0])
    m, h = initializer(problem, x_s, sigma)
    level = (1 / (LEVELS**2 + 0.1**2) + sigma**-2).rsqrt()
    torch.testing.assert_close(h.flatten(), level)
    expected = prior(wiener(problem, x_s, sigma)[0], level)
    torch.testing.assert_close(m, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_images_that_the_networks_see(tiny_config, channels):
    """Each by its formula; each changes the estimate and its error."""
    torch.manual_seed(1)
    wiener = WienerInitializer(mean=0.3)
    initializer = randomised(PosteriorMeanInitializer(tiny_config["network"], channels, wiener))
    x_s, sigma = images(seed=1, channels=channels), torch.tensor([0.1, 0.5, 20.0])
    kernels = rand(B, 1, 3, 3, dtype=torch.float32)
    physics = BlurFFT((channels, 16, 16), kernels)
    problem = Problem(physics.A(images(channels=channels)), physics, LEVELS)
    network, error, seen = initializer.network, initializer.error, {}
    network.register_forward_pre_hook(lambda _, arguments: seen.update(network=arguments))
    error.register_forward_pre_hook(lambda _, arguments: seen.update(error=arguments))
    m, _ = initializer(problem, x_s, sigma)
    s, s_y = sigma.reshape(B, 1, 1, 1), LEVELS.reshape(B, 1, 1, 1)
    expected = [
        physics.A_adjoint(problem.y),
        kernels.sum((-2, -1), keepdim=True).square().expand_as(x_s),  # A^T A of ones, of a circular blur
        (x_s - 0.3) / (1 + s**2) ** 0.5,
        (5 * s_y).expand(B, 1, 16, 16),
        (s.log() / 4).expand(B, 1, 16, 16),
    ]
    x, further, level = seen["network"]
    torch.testing.assert_close(x, wiener(problem, x_s, sigma)[0])
    torch.testing.assert_close(level, joint_level(s, s_y, 0.2))
    torch.testing.assert_close(further, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    (of_error,), stated = seen["error"], error(*seen["error"])
    torch.testing.assert_close(of_error, torch.cat([m, x, further], 1))
    for i in range(further.shape[1]):
        other = further.clone()
        other[:, i] += 0.5
        assert ((network(x, other, level) - m).abs().flatten(1).amax(1) > 1e-4).all(), i
    for i in range(of_error.shape[1]):
        other = of_error.clone()
        other[:, i] += 0.5
        assert ((error(other) - stated).abs() > 1e-6).all(), i


def test_images_do_not_see_each_other(initializer):
    x_s, physics = images(seed=1).double(), blur(dtype=torch.float64)
    y, sigma, sigma_y = images().double(), torch.tensor([0.1, 0.5, 20.0]), LEVELS.double()
    m, h = initializer.double()(Problem(y, physics, sigma_y), x_s, sigma)
    for i in range(B):
        one = slice(i, i + 1)
        of_one = initializer(Problem(y[one], physics, sigma_y[one]), x_s[one], sigma[one])
        torch.testing.assert_close(of_one, (m[one], h[one]), atol=1e-9, rtol=0)


def test_the_predicted_error_does_not_move_the_estimate(initializer):
    _, h = initializer(measured(mask()), images(), 0.5)
    h.sum().backward()
    assert all(p.grad is None for p in initializer.network.parameters())
    assert all(p.grad is not None for p in initializer.error.parameters())


def test_the_predicted_error_stays_in_its_range(initializer):
    for bias, bound in ((50.0, 1.0), (-50.0, 1e-3)):
        torch.nn.init.constant_(initializer.error[-1].bias, bias)
        assert (initializer(measured(mask()), images(), 0.5)[1] == bound).all()
    torch.nn.init.zeros_(initializer.error[-1].weight)
    for ratio in (0.01, 1.0, 4.0):  # and is not touched inside of it
        torch.nn.init.constant_(initializer.error[-1].bias, torch.tensor(ratio).log())
        h = initializer(measured(mask()), images(), 0.5)[1]
        expected = ratio * joint_level(torch.tensor(0.5), torch.tensor(0.05), 0.2)
        torch.testing.assert_close(h, expected.expand_as(h))


def test_images_of_any_size_are_padded_by_reflection(tiny_config):
    # Two resolutions on blocks of 2: multiples of 4.
    network = tiny_config["network"] | {"channel_mult": [1, 1]}
    initializer = randomised(PosteriorMeanInitializer(network, 1)).eval()
    x, images, level = torch.rand(B, 1, 9, 14), torch.randn(B, 5, 9, 14), torch.full((B, 1, 1, 1), 0.3)
    padded = [torch.nn.functional.pad(image, (0, 2, 0, 3), mode="reflect") for image in (x, images)]
    with torch.no_grad():
        small, large = initializer.network(x, images, level), initializer.network(*padded, level)
    torch.testing.assert_close(small, large[..., :9, :14])
    with pytest.raises(ValueError, match="at least 4, got 3x14"):
        initializer(Problem(x[..., :3, :], Denoising(), 0.05), x[..., :3, :], 0.5)


def test_physics_that_are_not_linear_get_what_an_untrained_start_gives(initializer):
    problem = measured(JPEG(SHAPE, quality=20), sigma_y=0.05)
    m, h = initializer(problem, images(), 0.5)
    assert torch.equal(m, initializer.wiener(problem, images(), 0.5)[0])
    torch.testing.assert_close(h, joint_level(torch.tensor(0.5), torch.tensor(0.05), 0.2).expand_as(h))


def test_autocast_reaches_the_network_and_not_the_operator(initializer):
    x, seen = images(), []
    problem = measured(Blur(gaussian_blur(sigma=(1.0, 1.0)), padding="valid"), sigma_y=0.05)
    initializer.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    m, h = initializer(problem, x, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = initializer(problem, x, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert in_bfloat16[0].dtype == torch.float32
    assert 0 < (in_bfloat16[0] - m).abs().max() < 0.05
    torch.testing.assert_close(in_bfloat16[1], h, rtol=0.05, atol=0)


def test_couplings_are_relative_to_the_predicted_error(initializer):
    physics, x_s, levels = mask(), images(), []
    denoiser = torch.nn.Identity()
    denoiser.forward = lambda w, sigma: (levels.append(sigma), w)[1]
    unfolded = UnfoldedDenoiser(denoiser, 2, initializer, delta=[3.0, 0.5])
    y = physics(x_s)
    unfolded(y, physics, x_s, 0.5)
    _, h = initializer(Problem(y, physics), x_s, 0.5)
    torch.testing.assert_close(levels, [3 * h.flatten(), 0.5 * h.flatten()])


def relative(initializer, prior, sigmas=(9.0, 0.7, 0.3, 0.1), **options):
    unfolded = UnfoldedDenoiser(prior, 2, initializer)
    return UD2M(unfolded, sigmas=sigmas, **{"nominal_rmse": 0.15} | options)


def test_levels_relative_to_the_predicted_error_cost_nothing(initializer, tiny_prior):
    physics = blur(LEVELS)
    y = physics(images())
    model = relative(initializer, tiny_prior)
    _, trajectory = model.sample(y, physics, 2, return_trajectory=True)
    assert model.nfe == 12
    for sample in range(2):
        error = initializer(Problem(y, physics), trajectory.x_s[0, sample], 9.0)[1].flatten()
        torch.testing.assert_close(trajectory.sigmas[1, sample], 0.7 * error / 0.15)
        torch.testing.assert_close(trajectory.sigmas[2, sample], 0.3 * error / 0.15)
    assert (trajectory.sigmas[0] == 9).all() and (trajectory.sigmas[3] == 0.1).all()
    drawn = [model.sample(y, physics, 3, batch_size=size, generator=seeded()) for size in (3, 9)]
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)  # however they are batched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_stored_with_the_sampler(tiny_folder, tmp_path, dtype):
    wiener = WienerInitializer(mean=0.1, decay=3.0)
    initializer = PosteriorMeanInitializer.from_prior(tiny_folder, wiener, reference_level=0.3)
    torch.nn.init.normal_(initializer.error[-1].weight)
    initializer.requires_grad_(False)  # what is frozen is stored all the same
    model = UD2M(UnfoldedDenoiser(load_prior(tiny_folder), 2, initializer), num_steps=2)
    model.save_pretrained(tmp_path / "sampler", dtype=dtype)
    again = UD2M.from_pretrained(tmp_path / "sampler")
    assert again.unfolded.initializer.config() == initializer.config()
    physics = mask()
    y = physics(images())
    first, second = (m(y, physics, generator=seeded()) for m in (model, again))
    torch.testing.assert_close(first, second, atol=0 if dtype == torch.float32 else 0.02, rtol=0)
    again.save_pretrained(tmp_path / "again", dtype=dtype)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("sampler", "again")]
    assert files[0] == files[1]


def test_a_damaged_configuration_is_named(tiny_folder, tmp_path):
    initializer = PosteriorMeanInitializer.from_prior(tiny_folder)
    model = UD2M(UnfoldedDenoiser(load_prior(tiny_folder), 2, initializer))
    model.save_pretrained(tmp_path / "sampler")
    file = tmp_path / "sampler" / "config.json"
    config = json.loads(file.read_text())
    config["initializer"]["network"]["num_channels"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json cannot be used.*num_channels"):
        UD2M.from_pretrained(tmp_path / "sampler")


def test_what_it_cannot_take_is_refused_by_name(initializer, tiny_config):
    colour, network, make = images().expand(B, 3, 16, 16), tiny_config["network"], PosteriorMeanInitializer
    levels = [lambda level=level: make(network, 1, reference_level=level) for level in (-1.0, float("nan"))]
    for call, error, message in (
        *((of_level, ValueError, "reference_level must be") for of_level in levels),
        (lambda: initializer(Problem(colour, Denoising(), 0.05), colour, 0.5), ValueError, "x_s has 3 chan"),
        (lambda: make(network | {"depth": 3}, 1), ValueError, "no setting.*depth"),
        (lambda: make({"img_resolution": 16}, 1), ValueError, "pixel_shuffle"),
        (lambda: make.from_prior("digits"), ValueError, "name must be one of the priors"),
        (lambda: make.from_prior("imagenet256"), ValueError, "save_prior, got 'imagenet256'"),
        (lambda: make(None, 1), TypeError, "network must be a dictionary of settings, got NoneType"),
        (lambda: make(network, 1, LinearInitializer()), TypeError, "wiener must be a Wiener.*got Linear"),
        (lambda: make(network, 0), ValueError, "channels must be an integer >= 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            call()
