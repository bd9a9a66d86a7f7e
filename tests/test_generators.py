"""Random operators: their ranges, their repeatability, and that each image of a batch gets its own."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora, posterior_prox
from deepinv_ud2m.benchmark.tasks import TASKS, make_generator, make_physics
from deepinv_ud2m.generators import BoxMaskGenerator, RandomMaskGenerator, UniformBlurGenerator
from deepinv_ud2m.training import DistillationTrainer, EnergyScoreLoss

SHAPE = (1, 32, 32)


def test_uniform_kernels():
    kernels = UniformBlurGenerator(9, 2, 7).step(500, seed=1)["filter"]
    assert kernels.shape == (500, 1, 9, 9)
    assert torch.allclose(kernels.sum((1, 2, 3)), torch.ones(500), atol=1e-5)
    width = kernels.amax((1, 2, 3)) ** -0.5
    assert width.min() >= 2 - 1e-5 and width.max() <= 7 + 1e-5 and width.std() > 1
    # Width 5 is the kernel of the task, width 4 has halves at its edges.
    five = UniformBlurGenerator(9, 5, 5).step()["filter"]
    assert torch.allclose(five[0, 0, 2:7, 2:7], torch.full((5, 5), 1 / 25))
    four = UniformBlurGenerator(9, 4, 4).step()["filter"]
    assert torch.allclose(four[0, 0, 4, 2:7] * 16, torch.tensor([0.5, 1, 1, 1, 0.5]))


def test_random_masks():
    masks = RandomMaskGenerator((3, 40, 50), 0.1, 0.7).step(200, seed=1)["mask"]
    assert masks.shape == (200, 3, 40, 50) and set(masks.unique().tolist()) == {0, 1}
    assert torch.equal(masks[:, 0], masks[:, 1])
    kept = masks.mean((1, 2, 3))
    # Five standard deviations of a share of 2000 pixels beyond the limits.
    assert kept.min() > 0.1 - 0.034 and kept.max() < 0.7 + 0.052
    assert kept.min() < 0.15 and kept.max() > 0.65


def test_boxes():
    masks = BoxMaskGenerator((1, 40, 60), 0.2, 0.6).step(1000, seed=1)["mask"]
    missing = 1 - masks[:, 0]
    height, width = missing.amax(2).sum(1), missing.amax(1).sum(1)
    assert torch.equal(missing.sum((1, 2)), height * width), "one box, without holes"
    assert (height.min(), height.max()) == (8, 24) and (width.min(), width.max()) == (12, 36)
    assert missing.amax((0, 2)).all() and missing.amax((0, 1)).all(), "up to all four sides"
    assert abs(missing.mean(0)[:20].mean() - missing.mean(0)[20:].mean()) < 0.03


@pytest.mark.parametrize("name", TASKS)
def test_each_image_has_its_own_operator(name):
    generator = make_generator(name, SHAPE, (0.02, 0.1), seed=3)
    parameters = generator.step(3)
    again = make_generator(name, SHAPE, (0.02, 0.1), seed=3).step(3)
    assert all(torch.equal(value, again[key]) for key, value in parameters.items())
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    physics = make_physics(name, SHAPE)
    physics.update(**parameters)
    y = physics.A(x)
    scalars = {"sigma": 0.3, "rho": 0.2, "sigma_y": 0.05}
    z = posterior_prox(0.5 + 0 * x, y, physics, x, **scalars)
    for i in range(3):
        alone = make_physics(name, SHAPE)
        alone.update(**{key: value[i : i + 1] for key, value in parameters.items()})
        assert torch.allclose(alone.A(x[i : i + 1]), y[i : i + 1], atol=1e-5)
        of_one = posterior_prox(0.5 + 0 * x[:1], y[i : i + 1], alone, x[i : i + 1], **scalars)
        assert torch.allclose(of_one, z[i : i + 1], atol=1e-4)
    if TASKS[name].generator is not None:
        varied = next(value for key, value in parameters.items() if key != "sigma")
        assert not torch.equal(varied[0], varied[1])
    if TASKS[name].noisy:
        levels = make_generator(name, SHAPE, (0.02, 0.1)).step(200)["sigma"]
        assert levels.min() >= 0.02 and levels.max() <= 0.1 and levels.std() > 0.01


def test_one_sampler_is_trained_on_all_of_them(tiny_prior):
    prior = copy.deepcopy(tiny_prior)
    unfolded = UnfoldedDenoiser(prior, 2)
    add_lora(prior, 2, targets="all-convs")
    images = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    trainer = DistillationTrainer(
        model=UD2M(unfolded),
        physics=[make_physics(name, SHAPE) for name in TASKS],
        physics_generator=[make_generator(name, SHAPE, seed=i) for i, name in enumerate(TASKS)],
        train_dataloader=DataLoader(images, 2),
        losses=EnergyScoreLoss(),
        steps=len(TASKS),
        log_interval=1,
        device="cpu",
        verbose=False,
    )
    trainer.train()
    assert trainer.skipped == 0 and len(trainer.history["loss"]) == len(TASKS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformBlurGenerator(8), "psf_size must be odd"),
        (lambda: UniformBlurGenerator(9, 2, 11), "width_min <= width_max <= 9"),
        (lambda: RandomMaskGenerator(SHAPE, 0.7, 0.1), "kept_min <= kept_max"),
        (lambda: BoxMaskGenerator(SHAPE, 0.2, 1.0), "side_min <= side_max"),
        (lambda: make_generator("sr3", SHAPE), "task must be one of"),
        (lambda: make_generator("sr4", SHAPE, (0, 0.1)), "sigma_y must be a range"),
        (lambda: make_generator("sr4", SHAPE, 0.05), "sigma_y must be a range.*got 0.05"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
