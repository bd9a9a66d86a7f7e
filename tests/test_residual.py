"""What residuals give away: mistakes warn, right problems do not, and the noise level is found."""

import warnings

import deepinv as dinv
import pytest
import torch
from conftest import seeded
from deepinv.physics import Blur, BlurFFT, GaussianNoise, Inpainting
from torch.nn.functional import interpolate

from deepinv_ud2m import UD2M, Problem
from deepinv_ud2m.checkpoint import PRETRAINED
from deepinv_ud2m.data import mnist_digits, photograph
from deepinv_ud2m.physics import TASKS, make_physics
from deepinv_ud2m.physics.traits import is_linear
from deepinv_ud2m.residual import check_residual, relative_residual

QUICK = {"mnist", "photos"}
SEVERAL = [n for n in PRETRAINED if n != "mnist-paper"]  # trained with several degradations
SAMPLERS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SEVERAL]
KERNEL = torch.ones(1, 1, 9, 9) / 81


def images_of(name):
    """Two images, with more than black at their borders, that a blur makes smaller by 8 pixels."""
    if name.startswith("mnist"):
        return interpolate(mnist_digits("test", num=2)[..., 8:24, 8:24], size=(40, 40), mode="bilinear")
    return torch.cat([photograph(n)[..., 32:104, 64:136] for n in ("astronaut", "chelsea")])


def noisy(physics, sigma_y=0.025):
    physics.set_noise_model(GaussianNoise(sigma_y, rng=seeded()))
    return physics


def camera(x, kernel=KERNEL, **options):
    return noisy(Blur(kernel, padding="valid"), **options)


def masks(x):
    mask = (torch.rand(1, 1, *x.shape[2:], generator=seeded(1)) < 0.4).float().expand(1, *x.shape[1:])
    return (noisy(Inpainting(x.shape[1:], mask=m)) for m in (mask, 1 - mask))


def messages(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    of_others = ("self.device attribute is deprecated", "those of this problem are 40x40")
    return [text for text in found if not any(other in text for other in of_others)]


class NoAdjoint(Blur):
    """Its adjoint is its operator, which is not so for kernels that are not symmetric."""

    def A_adjoint(self, y, **kwargs):
        return Blur.A(self, y)


#: The physics that measured, what is done to y, the physics that is given, and what the warning says.
MISTAKES = {
    "8 bits": lambda x: (camera(x), lambda y: 255 * y, camera(x), "divide images of 8 bits by 255"),
    "[-1, 1]": lambda x: (camera(x), lambda y: 2 * y - 1, camera(x), r"images in \[-1, 1\] must be moved"),
    "too little noise": lambda x: (
        *(camera(x, sigma_y=0.04), lambda y: y, camera(x, sigma_y=0.01)),
        r"sigma_y is too small: 0\.0(3[89]|4\d?|5\d?) would fit",
    ),
    "too much noise": lambda x: (
        *(camera(x, sigma_y=0.01), lambda y: y, camera(x, sigma_y=0.15)),
        "nearer to y than its noise.*sigma_y is too large",
    ),
    "no level": lambda x: (
        *(camera(x, sigma_y=0.04), lambda y: y, Blur(KERNEL, padding="valid")),
        "no noise level is given, and 0.005 is assumed",
    ),
    "borders": lambda x: (
        *(camera(x), lambda y: y, noisy(BlurFFT((x.shape[1], *(n - 8 for n in x.shape[2:])), KERNEL))),
        "do not explain y.*(borders|border)",
    ),
    "weights of the kernel": lambda x: (
        *(camera(x), lambda y: y, camera(x, 1.5 * KERNEL)),
        "filter of Blur sum to 1.5, not to 1",
    ),
    "inverted mask": lambda x: (
        *(next(masks(x)), lambda y: y, list(masks(x))[1]),
        "not zero in 100 % of the places where Inpainting measures nothing: is its mask inverted",
    ),
    "no adjoint": lambda x: (
        *(noisy(Blur(RAMP, padding="circular")), lambda y: y, noisy(NoAdjoint(RAMP, padding="circular"))),
        "A_adjoint of NoAdjoint is not the adjoint of its A",
    ),
}
RAMP = torch.linspace(0, 1, 9)[None, None, None].expand(1, 1, 9, 9) / 40.5


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_warn(mistake, name):
    x = images_of(name)
    measures, change, given, expected = MISTAKES[mistake](x)
    if mistake in ("inverted mask", "no adjoint"):  # nothing is lost at the borders
        x = x[..., :-8, :-8]
        measures, change, given, expected = MISTAKES[mistake](x)
    y = change(measures(x))
    with pytest.warns(UserWarning, match=expected):
        UD2M.from_pretrained(name)(y, given, generator=seeded())


def right_problems(name):
    """Tasks and noise levels like those of training. No sampler was trained with a Bayer filter."""
    is_digit = name.startswith("mnist")
    for task in TASKS:
        shape = (1, 32, 32) if is_digit else (3, 64, 64)
        if task != "demosaicing" and is_linear(make_physics(task, shape)):
            for sigma_y in (0.025, 0.05, 0.1) if is_digit else (0.01, 0.025, 0.1):
                yield make_physics(task, shape, sigma_y)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_right_problems_do_not_warn(name):
    """More than 500 images over all samplers."""
    if name.startswith("mnist"):
        x = mnist_digits("test", num=3)
    else:
        x = torch.cat([photograph(n)[..., 32:96, 64:128] for n in ("astronaut", "chelsea")])
    model = UD2M.from_pretrained(name)
    for physics in right_problems(name):
        physics.noise_model.rng = seeded()
        y = physics(x)
        found = messages(lambda y=y, physics=physics: model(y, physics, generator=seeded()))
        assert found == [], (physics, model.residual)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_right_problem_does_not_warn(name):
    x, model = images_of(name), UD2M.from_pretrained(name)
    physics = camera(x)
    y = physics(x)
    assert messages(lambda: model(y, physics, generator=seeded())) == []
    assert model.residual.shape == (2,) and 0.8 < model.residual.min() < model.residual.max() < 1.5
    clean = Blur(KERNEL, padding="valid")
    y = clean(x)
    assert messages(lambda: model(y, clean, generator=seeded())) == []


@pytest.mark.parametrize("level", [0.02, 0.08])
@pytest.mark.parametrize("name", ["mnist", pytest.param("photos", marks=pytest.mark.slow)])
def test_the_noise_level_is_found(name, level):
    x, model = images_of(name), UD2M.from_pretrained(name)
    x = mnist_digits("test", num=2) if name.startswith("mnist") else x
    physics = make_physics("deblur-gaussian-valid", x.shape[1:], level)
    y = physics(x)
    found = model.estimate_sigma_y(y, physics, generator=seeded())
    assert bool(((found / level - 1).abs() < 0.2).all()), found
    levels = torch.tensor([0.02, 0.08])
    y = physics.A(x) + levels.view(2, 1, 1, 1) * torch.randn(y.shape, generator=seeded(2))
    physics.set_noise_model(dinv.physics.PoissonNoise())
    found = model.estimate_sigma_y(y, physics, generator=seeded())
    assert bool((found / levels > 0.7).all() and (found / levels < 1.5).all()), "a level for each image"
    sample = model(y, physics, sigma_y="estimate", generator=seeded())
    assert sample.shape == x.shape and 0.7 < model.residual.min() < model.residual.max() < 1.5
    assert model.nfe > 9 and messages(lambda: model(y, physics, sigma_y="estimate", generator=seeded())) == []


def test_the_residual_of_the_truth_is_one():
    """To four standard deviations: false alarms in one of 16 000 runs for each of four problems."""
    x = torch.rand(1, 2, 64, 64, generator=seeded(3))
    for physics in (
        Inpainting((2, 64, 64), mask=(torch.rand(1, 1, 64, 64, generator=seeded()) < 0.3).float()),
        dinv.physics.MRI(torch.ones(1, 2, 64, 64), img_size=(2, 64, 64)),
        dinv.physics.StackedLinearPhysics([Blur(KERNEL, padding="valid"), dinv.physics.Denoising()]),
        Blur(KERNEL, padding="circular"),
    ):
        children = getattr(physics, "physics_list", [physics])
        for i, child in enumerate(children):
            child.set_noise_model(GaussianNoise(0.1, rng=seeded(5 + i)))
        problem = Problem(physics(x), physics)
        counts = sum(int((part != 0).sum()) for part in (problem.y if len(children) > 1 else [problem.y]))
        assert abs(relative_residual(problem, x).item() - 1) < 4 / (2 * counts) ** 0.5


def test_nothing_is_said_of_operators_that_are_not_linear():
    model, x = UD2M.from_pretrained("photos"), images_of("photos")[..., :64, :64]
    physics = make_physics("jpeg-10", (3, 64, 64))
    assert messages(lambda: model(physics(x), physics)) == [] and model.residual is None
    with pytest.raises(TypeError, match="sigma_y='estimate' needs a linear physics, got JPEG"):
        model(physics(x), physics, sigma_y="estimate")
    with pytest.raises(
        TypeError, match=r"sigma_y must be a number.*got '0\.1'; samplers also take 'estimate'"
    ):
        model(physics(x), physics, sigma_y="0.1")


def test_large_stacked_and_half_precision_measurements():
    """A warning must not lose the samples of a large image; noise-free stacks and rounding must not warn."""
    denoising = dinv.physics.Denoising(GaussianNoise(0.05))
    x = torch.rand(1, 1, 4200, 4200, generator=seeded())  # beyond 2^24 pixels torch.quantile refuses
    with pytest.warns(UserWarning, match=r"images in \[-1, 1\] must be moved"):
        check_residual(Problem(2 * x - 1, denoising), x)
    stack = dinv.physics.StackedLinearPhysics([Blur(KERNEL, padding="valid"), Blur(KERNEL, padding="valid")])
    x = torch.rand(1, 1, 32, 32, generator=seeded())
    problem = Problem(stack(x), stack)
    assert problem.level_is_assumed and messages(lambda: check_residual(problem, x)) == []
    for dtype in (torch.float16, torch.bfloat16):
        assert messages(lambda dtype=dtype: Problem(x.to(dtype), denoising)) == []


def test_a_count_of_samples_is_checked_before_the_noise_level_is_sought():
    x, model = images_of("photos")[..., :64, :64], UD2M.from_pretrained("photos")
    model.unfolded.draw = None  # nothing is drawn
    with pytest.raises(ValueError, match="num_samples must be"):
        model.sample(x, dinv.physics.Denoising(), 0, sigma_y="estimate")
