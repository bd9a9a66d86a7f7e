"""Degradations by name, and random operators: their ranges, and that each image of a batch gets its own."""

import copy

import pytest
import torch
from conftest import seeded

from deepinv_ud2m import Problem, posterior_prox
from deepinv_ud2m.physics import (
    TASKS,
    BoxMaskGenerator,
    JPEGQualityGenerator,
    UniformBlurGenerator,
    make_generator,
    make_physics,
)

SHAPE = (1, 32, 32)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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
    masks = make_generator("inpaint-random", (3, 40, 52)).step(200)["mask"]
    assert masks.shape == (200, 3, 40, 52) and set(masks.unique().tolist()) == {0, 1}
    assert torch.equal(masks[:, 0], masks[:, 1])
    kept = masks.mean((1, 2, 3))
    # Five standard deviations of a share of 2080 pixels beyond the limits.
    assert kept.min() > 0.1 - 0.033 and kept.max() < 0.7 + 0.051
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
    shape = (3, 32, 32) if name == "demosaicing" else SHAPE
    parameters = make_generator(name, shape, (0.02, 0.1), seed=3).step(3)
    assert equal(parameters, make_generator(name, shape, (0.02, 0.1), seed=3).step(3))
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    physics = make_physics(name, shape)
    physics.update(**parameters)
    y = physics.A(x)
    z = posterior_prox(Problem(y, physics, 0.05), 0.5 + 0 * x, x, sigma=0.3, rho=0.2)
    for i in range(3):
        one = slice(i, i + 1)
        alone = make_physics(name, shape)
        alone.update(**{key: value[one] for key, value in parameters.items()})
        assert torch.allclose(alone.A(x[one]), y[one], atol=1e-5)
        of_one = posterior_prox(Problem(y[one], alone, 0.05), 0.5 + 0 * x[one], x[one], sigma=0.3, rho=0.2)
        assert torch.allclose(of_one, z[one], atol=1e-4)
    if TASKS[name].generator is not None:
        varied = next(value for key, value in parameters.items() if key != "sigma")
        assert not torch.equal(varied[0], varied[1])
    if TASKS[name].noisy:
        levels = make_generator(name, SHAPE, (0.02, 0.1)).step(200)["sigma"]
        assert levels.min() >= 0.02 and levels.max() <= 0.1 and levels.std() > 0.01


def test_the_operator_of_a_task_is_the_same_each_time():
    for name, task in TASKS.items():
        shape = (3, 48, 48 if "ct" in name else 64)
        x = torch.rand(2, *shape, generator=seeded(0))
        physics = make_physics(name, shape, 0.1)
        assert torch.equal(physics.A(x), make_physics(name, shape).A(x)), name
        assert torch.equal(physics(x), physics.A(x)) != task.noisy, name


def test_generators_repeat_and_their_parts_are_seeded_apart():
    generator = make_generator("deblur-uniform", SHAPE)
    first = generator.step(4)
    assert not equal(first, generator.step(4))
    generator.reset_rng()
    assert equal(first, generator.step(4))
    seeded = generator.step(4, seed=1)
    assert equal(seeded, generator.step(4, seed=1)) and not equal(seeded, generator.step(4, seed=2))
    assert equal(copy.deepcopy(generator).step(4), generator.step(4))
    qualities = JPEGQualityGenerator(5, 40)
    assert equal(qualities.step(3, seed=1), qualities.step(3, seed=1))
    assert set(qualities.step(2000)["quality"].tolist()) == set(range(5, 41))
    # One seed for both, as in deepinv's sums, would give width and level the same random number.
    parameters = generator.step(500, seed=0)
    width = parameters["filter"].amax((1, 2, 3)) ** -0.5
    assert torch.corrcoef(torch.stack([width, parameters["sigma"]]))[0, 1].abs() < 0.2


def test_bad_arguments():
    for make, message in (
        (lambda: UniformBlurGenerator(8), "psf_size must be odd"),
        (lambda: UniformBlurGenerator(9, 2, 11), "width_min <= width_max <= 9"),
        (lambda: BoxMaskGenerator(SHAPE, 0.2, 1.0), "side_min <= side_max"),
        (lambda: JPEGQualityGenerator(10, 5), "quality_min and quality_max"),
        (lambda: make_generator("sr3", SHAPE), "task must be one of"),
        (lambda: make_generator("sr4", SHAPE, (0, 0.1)), "sigma_y must be a range"),
        (lambda: make_generator("sr4", SHAPE, 0.05), "sigma_y must be a range.*got 0.05"),
        (lambda: make_physics("sr4", SHAPE, 0), "sigma_y must be positive and finite, got 0"),
        (lambda: make_physics("sr4", (32, 32)), r"shape must be \(C, H, W\)"),
        (lambda: make_physics("sr4", (1, 32, 34)), "multiples of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
