"""A first guess that is trained: what it states, what the iterations make of it, how it is stored."""

import copy
import json
from functools import partial

import pytest
import torch
from deepinv.models import Denoiser
from deepinv.physics import Blur, BlurFFT, Denoising, GaussianNoise, Inpainting
from deepinv.physics.functional import gaussian_blur
from torch.utils.data import DataLoader

from deepinv_ud2m import (
    UD2M,
    LinearInitializer,
    PosteriorMeanInitializer,
    UnfoldedDenoiser,
    WienerInitializer,
    load_prior,
    save_prior,
)
from deepinv_ud2m.lora import add_lora, lora_parameters, merge_lora
from deepinv_ud2m.physics import JPEG
from deepinv_ud2m.priors import build_network
from deepinv_ud2m.proximal import joint_level
from deepinv_ud2m.training import (
    DistillationTrainer,
    EnergyScoreLoss,
    FirstGuessLoss,
    FirstGuessTrainer,
    SamplerLevels,
    parameter_groups,
    sampler_to_train,
)

SHAPE = (1, 16, 16)
B = 3


@pytest.fixture
def prior_folder(tiny_config, tiny_prior, tmp_path):
    save_prior(tiny_prior, tiny_config, tmp_path / "prior")
    return tmp_path / "prior"


@pytest.fixture
def initializer(tiny_config):
    """Random weights, none left at zero."""
    torch.manual_seed(1)
    initializer = PosteriorMeanInitializer(tiny_config["network"], 1)
    with torch.no_grad():
        for parameter in initializer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return initializer


def mask(sigma_y=0.05):
    return Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(sigma_y))


def blur(sigma_y=0.05):
    return BlurFFT(SHAPE, filter=gaussian_blur(sigma=(1.0, 1.0)), noise_model=GaussianNoise(sigma_y))


def images(num=B, seed=0):
    return torch.rand(num, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_it_starts_as_the_prior_after_a_wiener_filter(prior_folder):
    prior = load_prior(prior_folder)
    wiener = WienerInitializer(mean=0.3)
    initializer = PosteriorMeanInitializer.from_prior(prior_folder, wiener, reference_level=0.1)
    with torch.no_grad():  # the further images
        initializer.network.unet.enc["16x16_conv"].weight[:, 4:] = 0
    x_s, physics = images(), mask()
    y = physics(x_s)
    sigma, sigma_y = torch.tensor([0.02, 0.5, 70.0]), torch.tensor([0.02, 0.1, 0.05])
    m, h = initializer.estimate(y, physics, x_s, sigma, sigma_y)
    level = (1 / (sigma_y**2 + 0.1**2) + sigma**-2).rsqrt()
    torch.testing.assert_close(h.flatten(), level)
    expected = prior(wiener(y, physics, x_s, sigma, sigma_y), level)
    torch.testing.assert_close(m, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("what", ["y", "physics", "x_s", "sigma", "sigma_y"])
def test_it_sees_all_there_is(initializer, what):
    torch.manual_seed(0)
    first = {"y": images(1), "physics": Inpainting(SHAPE, torch.ones(SHAPE)), "x_s": images(1, 1)}
    first |= {"sigma": 0.5, "sigma_y": 0.05}
    holes = torch.ones(SHAPE)
    holes[:, 3:9, 3:9] = 0
    second = {"y": images(1, 2), "physics": Inpainting(SHAPE, holes), "x_s": images(1, 3)}
    second |= {"sigma": 0.7, "sigma_y": 0.1}
    m, h = initializer.estimate(**first)
    other_m, other_h = initializer.estimate(**first | {what: second[what]})
    assert (m - other_m).abs().max() > 1e-4
    assert (h - other_h).abs() > 1e-6


def test_images_do_not_see_each_other(initializer):
    physics, y, x_s = blur(), images(), images(seed=1)  # not iterative, so without a common end
    levels = torch.tensor([0.1, 0.5, 20.0]), torch.tensor([0.02, 0.1, 0.05])
    m, h = initializer.estimate(y, physics, x_s, *levels)
    for i in range(B):
        one = slice(i, i + 1)
        of_one = initializer.estimate(y[one], physics, x_s[one], *(level[one] for level in levels))
        torch.testing.assert_close(of_one, (m[one], h[one]), atol=1e-5, rtol=1e-4)


def test_the_stated_error_does_not_move_the_estimate(initializer):
    y, physics = images(), mask()
    _, h = initializer.estimate(y, physics, y, 0.5, 0.05)
    h.sum().backward()
    assert all(p.grad is None for p in initializer.network.parameters())
    assert all(p.grad is not None for p in initializer.error.parameters())


def test_the_stated_error_stays_in_its_range(initializer):
    y, physics = images(), mask()
    for bias, bound in ((50.0, 1.0), (-50.0, 1e-3)):
        torch.nn.init.constant_(initializer.error[-1].bias, bias)
        assert (initializer.estimate(y, physics, y, 0.5, 0.05)[1] == bound).all()


def test_it_takes_all_linear_physics(initializer):
    for physics in (blur(), mask(), Blur(torch.ones(1, 1, 3, 3) / 9, padding="valid")):
        x = images()
        m, h = initializer.estimate(physics(x), physics, x, 0.5, 0.1)
        assert m.shape == x.shape and h.shape == (B, 1, 1, 1)


def test_images_of_any_size_are_padded_by_reflection(tiny_config):
    # Two resolutions on blocks of 2: multiples of 4.
    network = tiny_config["network"] | {"channel_mult": [1, 1]}
    initializer = PosteriorMeanInitializer(network, 1).eval()
    with torch.no_grad():
        for parameter in initializer.network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    x, images, level = torch.rand(B, 1, 9, 14), torch.randn(B, 5, 9, 14), torch.full((B, 1, 1, 1), 0.3)
    padded = [torch.nn.functional.pad(image, (0, 2, 0, 3), mode="reflect") for image in (x, images)]
    with torch.no_grad():
        small, large = initializer.network(x, images, level), initializer.network(*padded, level)
    torch.testing.assert_close(small, large[..., :9, :14])
    with pytest.raises(ValueError, match="at least 4, got 3x14"):
        initializer(x[..., :3, :], Denoising(), x[..., :3, :], 0.5, 0.05)


def test_physics_that_are_not_linear_get_what_an_untrained_start_gives(initializer):
    x = images()
    physics = JPEG(SHAPE, quality=20)
    m, h = initializer.estimate(physics(x), physics, x, 0.5, 0.05)
    assert torch.equal(m, initializer.wiener(physics(x), physics, x, 0.5, 0.05))
    torch.testing.assert_close(h, joint_level(torch.tensor(0.5), torch.tensor(0.05), 0.2).expand_as(h))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_computes_in_its_own_precision(initializer, dtype):
    x = images().to(dtype)
    m, h = initializer.estimate(x, Denoising(), x, 0.5, 0.05)
    assert m.dtype == h.dtype == dtype


def test_autocast_reaches_the_network_and_not_the_operator(initializer):
    physics, x = mask(), images()
    y = physics(x)
    m, h = initializer.estimate(y, physics, x, 0.5, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = initializer.estimate(y, physics, x, 0.5, 0.05)
    assert in_bfloat16[0].dtype == torch.float32
    assert 0 < (in_bfloat16[0] - m).abs().max() < 0.05
    torch.testing.assert_close(in_bfloat16[1], h, rtol=0.05, atol=0)


class Recorder(Denoiser):
    def __init__(self):
        super().__init__()
        self.levels = []

    def forward(self, w, sigma):
        self.levels.append(sigma)
        return w


def test_couplings_are_relative_to_the_stated_error(initializer):
    denoiser, physics, x_s = Recorder(), mask(), images()
    unfolded = UnfoldedDenoiser(denoiser, 2, initializer, delta=[3.0, 0.5])
    y = physics(x_s)
    unfolded(y, physics, x_s, 0.5)
    _, h = initializer.estimate(y, physics, x_s, 0.5, 0.05)
    torch.testing.assert_close(denoiser.levels[0], 3 * h.flatten())
    torch.testing.assert_close(denoiser.levels[1], 0.5 * h.flatten())


def test_it_counts_as_one_evaluation_per_level(initializer, tiny_prior):
    model = UD2M(UnfoldedDenoiser(tiny_prior, 2, initializer), num_steps=3)
    physics = mask()
    model.sample(physics(images()), physics, num_samples=2)
    assert model.nfe == 9


def relative(initializer, prior, levels=(9.0, 0.7, 0.3, 0.1), **options):
    unfolded = UnfoldedDenoiser(prior, 2, initializer)
    return UD2M(unfolded, levels=levels, **{"reference_error": 0.15} | options)


def test_levels_relative_to_the_stated_error_cost_nothing(initializer, tiny_prior):
    physics = blur(torch.tensor([0.02, 0.1, 0.05]))
    y = physics(images())
    model = relative(initializer, tiny_prior)
    _, trajectory = model.sample(y, physics, 2, return_trajectory=True)
    assert model.nfe == 12
    for sample in range(2):
        start = trajectory.x_s[0, sample]
        error = initializer.estimate(y, physics, start, 9.0, physics.noise_model.sigma)[1].flatten()
        torch.testing.assert_close(trajectory.levels[1, sample], 0.7 * error / 0.15)
        torch.testing.assert_close(trajectory.levels[2, sample], 0.3 * error / 0.15)
    assert (trajectory.levels[0] == 9).all() and (trajectory.levels[3] == 0.1).all()


def test_levels_are_those_given_where_the_reference_error_is_stated(initializer, tiny_prior):
    torch.nn.init.zeros_(initializer.error[-1].weight)  # it states h of the noise levels alone
    torch.nn.init.zeros_(initializer.error[-1].bias)
    physics = mask()
    y = physics(images())
    error = joint_level(torch.tensor(9.0), torch.tensor(0.05), 0.2).item()
    first, second = (
        relative(initializer, tiny_prior, reference_error=of).sample(
            y, physics, 2, generator=torch.Generator().manual_seed(0)
        )
        for of in (error, None)
    )
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_levels_of_each_measurement_are_of_its_precision(initializer, tiny_prior, dtype):
    physics = mask().to(dtype=dtype)
    y = physics(images().to(dtype))
    model = relative(initializer, tiny_prior)
    samples, trajectory = model.sample(y, physics, return_trajectory=True)
    assert samples.dtype == trajectory.levels.dtype == dtype


def test_a_reference_error_comes_back(initializer, prior_folder, tmp_path):
    model = relative(initializer, load_prior(prior_folder))
    model.save_pretrained(tmp_path / "sampler")
    again = UD2M.from_pretrained(tmp_path / "sampler")
    assert again.reference_error == 0.15 and repr(again) == repr(model)
    started = sampler_to_train(tmp_path / "sampler", levels=[3.0, 0.5])
    assert started.reference_error == 0.15 and started.levels.tolist() == [3.0, 0.5]
    started = sampler_to_train(tmp_path / "sampler", reference_error=0.3)
    assert started.reference_error == 0.3 and torch.equal(started.levels, model.levels)
    relative(initializer, load_prior(prior_folder), reference_error=None).save_pretrained(tmp_path / "n")
    assert UD2M.from_pretrained(tmp_path / "n").reference_error is None


def test_training_goes_through_levels_relative_to_the_stated_error(initializer, tiny_prior, tmp_path):
    model = relative(initializer, tiny_prior, levels=(9.0, 0.7, 0.1)).requires_grad_(True)
    other = copy.deepcopy(model)
    other.reference_error = 0.2
    options = {"physics": mask(), "eval_dataloader": DataLoader(images(4), 4), "save_path": tmp_path}
    options |= {"losses": EnergyScoreLoss(2), "end_to_end": True, "verbose": False, "device": "cpu"}
    options |= {"train_dataloader": DataLoader(images(4), 2, drop_last=True)}
    make = partial(DistillationTrainer, physics_levels=[(9.0, 0.5, 0.1)], **options)
    trainer = make(model=model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), steps=2)
    visited = []
    model.unfolded.register_forward_pre_hook(lambda _, arguments: visited.append(arguments[3]))
    trainer.train()
    assert visited[1].shape == (4, 1, 1, 1), "a level for each draw"
    assert not visited[1].requires_grad
    assert initializer.error[-1].weight.grad.any(), "the noise of the iterations is relative to it"
    with pytest.raises(ValueError, match="reference_error"):  # another run
        make(model=other, optimizer=torch.optim.Adam(other.parameters(), lr=1e-3), steps=3).train()


def test_what_states_no_error_has_no_reference_error(initializer, tiny_prior):
    with pytest.raises(ValueError, match=r"reference_error=0.2 needs a first guess that states its err"):
        UD2M(UnfoldedDenoiser(tiny_prior), reference_error=0.2)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="reference_error must be positive and finite, got"):
            relative(initializer, tiny_prior, reference_error=bad)
    with pytest.raises(TypeError, match=r"reference_error must be a number or None, got '0\.2'"):
        relative(initializer, tiny_prior, reference_error="0.2")


def test_samples_do_not_depend_on_how_they_are_batched(initializer, tiny_prior):
    model = UD2M(UnfoldedDenoiser(tiny_prior, 2, initializer), num_steps=2)
    physics = blur(torch.tensor([0.02, 0.1, 0.05]))
    y = physics(images())
    drawn = [
        model.sample(
            y, physics, num_samples=3, batch_size=size, generator=torch.Generator().manual_seed(0)
        )
        for size in (3, 9)
    ]
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_stored_with_the_sampler(prior_folder, tmp_path, dtype):
    initializer = PosteriorMeanInitializer.from_prior(
        prior_folder, WienerInitializer(mean=0.1, decay=3.0), reference_level=0.3
    )
    torch.nn.init.normal_(initializer.error[-1].weight)
    model = UD2M(UnfoldedDenoiser(load_prior(prior_folder), 2, initializer), num_steps=2)
    model.save_pretrained(tmp_path / "sampler", dtype=dtype)
    again = UD2M.from_pretrained(tmp_path / "sampler")
    assert again.unfolded.initializer.settings == initializer.settings
    physics = mask()
    y = physics(images())
    first, second = (m(y, physics, generator=torch.Generator().manual_seed(0)) for m in (model, again))
    torch.testing.assert_close(first, second, atol=0 if dtype == torch.float32 else 0.02, rtol=0)
    again.save_pretrained(tmp_path / "again", dtype=dtype)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("sampler", "again")]
    assert files[0] == files[1]


def test_what_would_not_be_stored_is_not_saved(initializer, tiny_prior, tmp_path):
    initializer.network.requires_grad_(False)
    model = UD2M(UnfoldedDenoiser(tiny_prior, 2, initializer))
    with pytest.raises(ValueError, match=r"PosteriorMeanInitializer are frozen.*network.unet"):
        model.save_pretrained(tmp_path / "sampler")
    assert not (tmp_path / "sampler").exists()


def test_a_damaged_configuration_is_named(prior_folder, tmp_path):
    initializer = PosteriorMeanInitializer.from_prior(prior_folder)
    model = UD2M(UnfoldedDenoiser(load_prior(prior_folder), 2, initializer))
    model.save_pretrained(tmp_path / "sampler")
    file = tmp_path / "sampler" / "config.json"
    config = json.loads(file.read_text())
    config["initializer"]["network"]["num_channels"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json cannot be used.*num_channels"):
        UD2M.from_pretrained(tmp_path / "sampler")


def test_what_it_cannot_take_is_refused_by_name(initializer, tiny_config):
    x = images()
    colour = x.expand(B, 3, 16, 16)
    with pytest.raises(ValueError, match=r"x_s has 3 channels.*of images of 1"):
        initializer(colour, Denoising(), colour, 0.5, 0.05)
    for level in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="reference_level must be positive"):
            PosteriorMeanInitializer(tiny_config["network"], 1, reference_level=level)
    with pytest.raises(ValueError, match=r"no argument.*depth"):
        PosteriorMeanInitializer(tiny_config["network"] | {"depth": 3}, 1)
    with pytest.raises(ValueError, match="pixel_shuffle"):
        PosteriorMeanInitializer({"img_resolution": 16}, 1)
    with pytest.raises(ValueError, match="name must be one of the priors"):
        PosteriorMeanInitializer.from_prior("digits")
    with pytest.raises(ValueError, match="save_prior, got 'imagenet256'"):
        PosteriorMeanInitializer.from_prior("imagenet256")
    with pytest.raises(TypeError, match="network must be a dictionary of settings, got NoneType"):
        PosteriorMeanInitializer(None, 1)
    with pytest.raises(TypeError, match=r"wiener must be a WienerInitializer.*got LinearInitializer"):
        PosteriorMeanInitializer(tiny_config["network"], 1, LinearInitializer())
    with pytest.raises(ValueError, match="channels must be an integer >= 1, got 0"):
        PosteriorMeanInitializer(tiny_config["network"], 0)


def test_the_loss_is_the_gaussian_likelihood():
    x, guess = images(), images(seed=1)
    error = torch.tensor([0.1, 0.2, 0.5]).reshape(B, 1, 1, 1)
    loss = FirstGuessLoss()(x=x, x_net=guess, error=error)
    variance = error.expand_as(x) ** 2
    expected = torch.nn.functional.gaussian_nll_loss(guess, x, variance, reduction="none")
    torch.testing.assert_close(loss, expected.flatten(1).mean(1))
    rms = (guess - x).square().mean((1, 2, 3), keepdim=True).sqrt()
    assert (FirstGuessLoss()(x=x, x_net=guess, error=rms) < loss).all()


def make_trainer(initializer, prior, freeze=False, **options):
    model = UD2M(UnfoldedDenoiser(prior, 1, initializer), num_steps=2)
    if freeze:
        prior.requires_grad_(False)
    defaults = {
        "physics": mask(),
        "train_dataloader": DataLoader(images(8), batch_size=4, shuffle=True),
        "losses": FirstGuessLoss(),
        "optimizer": torch.optim.Adam(parameter_groups(model.unfolded, lr_initializer=3e-3)),
        "levels": SamplerLevels(model, 1.0),
        "steps": 30,
        "log_interval": 10,
        "grad_clip": 1.0,
        "verbose": False,
        "device": "cpu",
    }
    return FirstGuessTrainer(model=model, **defaults | options)


def test_training_lowers_the_loss_and_leaves_the_rest(tiny_config, tiny_prior):
    torch.manual_seed(0)
    initializer = PosteriorMeanInitializer(tiny_config["network"], 1)
    trainer = make_trainer(initializer, tiny_prior)
    calls = []
    tiny_prior.register_forward_hook(lambda *_: calls.append(1))
    before = {name: p.clone() for name, p in tiny_prior.named_parameters()}
    unfolded = trainer.train().unfolded
    losses = [value for _, value in trainer.history["loss"]]
    assert losses[-1] < losses[0] - 0.05
    assert not calls, "the denoiser is not needed"
    assert all(torch.equal(p, before[name]) for name, p in tiny_prior.named_parameters())
    assert not any(getattr(unfolded, f"log_{name}").any() for name in ("rho", "delta", "lambda"))


def test_a_stopped_training_goes_on_to_the_bit(tiny_config, tiny_prior, tmp_path):
    def trained(folder, steps):
        torch.manual_seed(0)
        initializer = PosteriorMeanInitializer(tiny_config["network"], 1)
        trainer = make_trainer(initializer, tiny_prior, save_path=folder, ckp_interval=2, steps=6)
        for step in range(steps):  # as if killed
            if step == 0:
                trainer.setup_train()
            trainer.train_step(step)
            if (step + 1) % 2 == 0:
                trainer._save(step + 1)
        return trainer

    trained(tmp_path / "stopped", 3)
    ends = [trained(tmp_path / name, 0).train() for name in ("stopped", "whole")]
    for first, second in zip(*(end.unfolded.parameters() for end in ends), strict=True):
        assert torch.equal(first, second)


def test_a_merged_adapter_that_is_frozen_is_no_obstacle(initializer, tiny_prior):
    add_lora(tiny_prior, 2, targets="all-convs")
    merge_lora(tiny_prior)
    with pytest.raises(ValueError, match="merged adapter"):
        make_trainer(initializer, tiny_prior)
    make_trainer(initializer, tiny_prior, freeze=True, steps=1).train()


def test_what_it_exports_has_the_denoiser_of_the_sampler_it_came_from(
    tiny_config, tiny_prior, prior_folder, tmp_path
):
    """Its weights are not those of the prior any more, and they are frozen."""
    torch.manual_seed(0)
    add_lora(tiny_prior, 2, targets="all-convs")
    with torch.no_grad():
        for parameter in lora_parameters(tiny_prior):
            parameter.normal_(std=0.3)
    merge_lora(tiny_prior, unload=True)
    tiny_prior.requires_grad_(False)
    initializer = PosteriorMeanInitializer(tiny_config["network"], 1)
    options = {"eval_dataloader": DataLoader(images(4), batch_size=4), "eval_interval": 2, "steps": 2}
    trainer = make_trainer(initializer, tiny_prior, save_path=tmp_path / "run", **options)
    model = trainer.train()
    assert not any(p.requires_grad for p in tiny_prior.parameters())
    y, physics = images(), mask()
    generators = (torch.Generator().manual_seed(0) for _ in range(3))
    expected = model(y, physics, generator=next(generators))
    for name in ("final", "best"):
        loaded = UD2M.from_pretrained(tmp_path / "run" / name, prior=prior_folder)
        samples = loaded(y, physics, generator=next(generators))
        if name == "final":
            torch.testing.assert_close(samples, expected)


def test_the_trainer_refuses_what_it_is_not_for(initializer, tiny_prior):
    with pytest.raises(TypeError, match=r"must have a PosteriorMeanInitializer.*LinearInitializer"):
        make_trainer(LinearInitializer(), tiny_prior)
    with pytest.raises(ValueError, match="end_to_end is of samples"):
        make_trainer(initializer, tiny_prior, end_to_end=True)
    with pytest.raises(ValueError, match="EnergyScoreLoss needs 2 draws"):
        make_trainer(initializer, tiny_prior, losses=EnergyScoreLoss())


def test_the_network_is_the_size_it_is_told(tiny_config):
    initializer = PosteriorMeanInitializer(tiny_config["network"], 1)
    of_prior = sum(p.numel() for p in build_network(tiny_config).parameters())
    of_network = sum(p.numel() for p in initializer.network.parameters())
    assert of_prior < of_network < 1.3 * of_prior
