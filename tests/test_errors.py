"""What cannot work is refused by name before any network runs; what may not work well warns."""

import inspect
import warnings
from types import SimpleNamespace

import deepinv as dinv
import pytest
import torch
from deepinv.models import Denoiser
from deepinv.physics import GaussianNoise
from deepinv.utils import TensorList

import deepinv_ud2m
from deepinv_ud2m import (
    UD2M,
    LinearInitializer,
    PriorInfo,
    PseudoInverseInitializer,
    UnfoldedDenoiser,
    VPSchedule,
    WienerInitializer,
)
from deepinv_ud2m.networks import PixelShuffledDenoiser
from deepinv_ud2m.randomness import SampleStreams, draw_seeds, randn

NAN, INF = float("nan"), float("inf")


class Untouchable(Denoiser):
    """A prior on grey images whose sides are multiples of 4, which must not be called."""

    prior_info = PriorInfo("untouchable", channels=1, sigma_min=0.01, sigma_max=50.0, size_multiple=4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma):
        pytest.fail("the network was called")


class Echo(Untouchable):
    """The same, but it may be called."""

    def forward(self, x, sigma):
        return x.clamp(0, 1)


class Squared(dinv.physics.Physics):
    """Not linear, and without a prox."""

    def __init__(self):
        super().__init__(noise_model=GaussianNoise(0.1))

    def A(self, x, **kwargs):
        return x**2


@pytest.fixture
def model():
    return UD2M(UnfoldedDenoiser(Untouchable()))


def _denoising(sigma=0.1):
    return dinv.physics.Denoising(GaussianNoise(sigma))


def _inpainting(batch=1, size=16):
    mask = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0)) > 0.5
    return dinv.physics.Inpainting((1, size, size), mask=mask.float(), noise_model=GaussianNoise(0.1))


def _blur(size=16):
    kernel = torch.ones(1, 1, 3, 3) / 9
    return dinv.physics.BlurFFT((1, size, size), kernel, noise_model=GaussianNoise(0.1))


def _fourier():
    return dinv.physics.LinearPhysics(
        A=torch.fft.fft2, A_adjoint=torch.fft.ifft2, noise_model=GaussianNoise(0.1)
    )


def _poisson():
    return dinv.physics.Denoising(dinv.physics.PoissonNoise(0.1))


def _stack(*levels):
    return dinv.physics.StackedLinearPhysics([_denoising(sigma) for sigma in levels])


def _with(value, shape=(1, 1, 16, 16)):
    y = torch.full(shape, 0.5)
    y[(0,) * len(shape)] = value
    return y


GREY = torch.full((1, 1, 16, 16), 0.5)

# name: physics, y, exception, message
PROBLEMS = {
    "nan": (_denoising(), _with(NAN), ValueError, "y must be finite"),
    "inf": (_inpainting(), _with(INF), ValueError, "y must be finite"),
    "nan in a part": (_stack(0.1, 0.1), TensorList([GREY, _with(NAN)]), ValueError, "y must be finite"),
    "size, mask": (_inpainting(), torch.rand(1, 1, 8, 8), ValueError, r"y of shape \[1, 1, 8, 8\]"),
    "size, broadcast": (
        _inpainting(),
        torch.rand(1, 1, 1, 16),
        ValueError,
        r"y of shape \[1, 1, 1, 16\]",
    ),
    "size, blur": (_blur(), torch.rand(1, 1, 12, 12), ValueError, r"y of shape \[1, 1, 12, 12\]"),
    "batch, masks": (_inpainting(batch=2), torch.rand(3, 1, 16, 16), ValueError, "y of shape"),
    "batch of one, masks": (_inpainting(batch=2), GREY, ValueError, "y of shape"),
    "batch, noise": (
        _denoising(torch.tensor([0.1, 0.2])),
        torch.rand(3, 1, 16, 16),
        ValueError,
        "sigma_y",
    ),
    "channels, prior": (_denoising(), torch.rand(1, 3, 16, 16), ValueError, r"3 channel\(s\)"),
    "channels, mask": (
        _inpainting(),
        torch.rand(1, 3, 16, 16),
        ValueError,
        r"3 channel\(s\)|y of shape",
    ),
    "no batch": (_denoising(), torch.rand(1, 16, 16), ValueError, r"\[B, C, H, W\]"),
    "parts": (_stack(0.1, 0.1), TensorList([GREY]), ValueError, "y of shape"),
    "multiple": (_denoising(), torch.rand(1, 1, 18, 16), ValueError, "multiples of 4.*18x16"),
    "complex": (_fourier(), torch.fft.fft2(GREY), ValueError, "complex images.*two channels"),
    "non-linear": (Squared(), GREY, TypeError, "Squared"),
    "poisson": (_poisson(), GREY, ValueError, "noise model.*PoissonNoise.*sigma_y"),
    "stack of levels": (_stack(0.1, 0.2), TensorList([GREY, GREY]), ValueError, "stacked.*sigma_y"),
    "sigma zero": (_denoising(0.0), GREY, ValueError, "sigma_y must be positive"),
    "a sigma zero": (
        _denoising(torch.tensor([0.1, 0.0])),
        GREY.expand(2, -1, -1, -1),
        ValueError,
        "sigma_y",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_it_cannot_take(model, problem):
    physics, y, exception, message = PROBLEMS[problem]
    for call in (model, model.sample):
        with pytest.raises(exception, match=message):
            call(y, physics)
    assert model.nfe is None


@pytest.mark.parametrize(
    "sigma_y", [0, -0.1, NAN, torch.tensor([0.1, -0.1, 0.1]), torch.full((2,), 0.1), torch.ones(3, 16)]
)
def test_sigma_y_it_cannot_take(model, sigma_y):
    with pytest.raises(ValueError, match="sigma_y"):
        model(GREY.expand(3, -1, -1, -1), _denoising(), sigma_y=sigma_y)


def test_sigma_y_stands_in_for_a_noise_model():
    model = UD2M(UnfoldedDenoiser(Echo()))
    for physics, y in [(_poisson(), GREY), (_stack(0.1, 0.2), TensorList([GREY, GREY]))]:
        assert model(y, physics, sigma_y=0.1).shape == GREY.shape
        # Where the caller cannot give it, as in deepinv.test, the model has it.
        with pytest.raises(ValueError, match=r"sigma_y=|sigma_y"):
            model(y, physics)
        model.sigma_y = 0.1
        assert model(y, physics).shape == GREY.shape
        model.sigma_y = None
    assert UD2M(UnfoldedDenoiser(Echo()), sigma_y=0.1)(GREY, _poisson()).shape == GREY.shape


@pytest.mark.parametrize("scale, shift", [(255, 0), (2, -1)])
def test_measurements_in_another_range_warn(scale, shift):
    """No sample in [0, 1] explains them: it says so, of one range and of several measurements alike."""
    model = UD2M(UnfoldedDenoiser(Echo()))
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for physics in (_denoising(0.05), _stack(0.05, 0.05)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(physics(x), physics)
        y = physics(scale * x + shift)
        with pytest.warns(UserWarning, match=r"residuals of .* times the noise level: is y made of im"):
            model(y, physics)


def test_a_noise_level_of_8_bit_images_warns():
    with pytest.warns(UserWarning, match=r"sigma_y is 25: it is a standard deviation, in the units of"):
        UD2M(UnfoldedDenoiser(Echo()))(GREY, _denoising(), sigma_y=25.0)


@pytest.mark.parametrize("name", ["num_samples", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_counts(model, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
        model.sample(GREY, _denoising(), **{name: value})


def test_generator_of_another_device(model):
    # Stands for a generator on a GPU, which not every machine has.
    generator = SimpleNamespace(device=torch.device("cuda:0"))
    for call in (model, model.sample):
        with pytest.raises(ValueError, match="generator must be on the device of y, cpu"):
            call(GREY, _denoising(), generator=generator)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generator_of_another_device_on_a_gpu(model):
    with pytest.raises(ValueError, match="generator must be on the device of y, cpu"):
        model(GREY, _denoising(), generator=torch.Generator("cuda"))


def test_measurements_on_another_device(model):
    model.to("meta")  # stands for a GPU
    for call in (model, model.sample):
        with pytest.raises(ValueError, match="y must be on the device of the model, meta, got y on cpu"):
            call(GREY, _denoising())


# -- Construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, -1, 1.5, True])
def test_num_steps(num_steps):
    with pytest.raises(ValueError, match="num_steps must be an integer"):
        UD2M(UnfoldedDenoiser(Untouchable()), num_steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, NAN, INF])
def test_eta(eta):
    with pytest.raises(ValueError, match="eta must be in"):
        UD2M(UnfoldedDenoiser(Untouchable()), eta=eta)


@pytest.mark.parametrize("levels", [[], [0.1, 1.0], [1.0, 0.0], [NAN]])
def test_levels(levels):
    with pytest.raises(ValueError, match="levels must be"):
        UD2M(UnfoldedDenoiser(Untouchable()), levels=levels)


@pytest.mark.parametrize("num_iterations", [0, -1, 1.5, True])
def test_num_iterations(num_iterations):
    with pytest.raises(ValueError, match="num_iterations must be an integer >= 1"):
        UnfoldedDenoiser(Untouchable(), num_iterations)


@pytest.mark.parametrize("name", ["rho", "delta", "lambda_"])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, float("inf"), [1.0, 2.0], [1.0, -1.0, 1.0], []])
def test_multipliers(name, value):
    with pytest.raises(ValueError, match=rf"{name.rstrip('_')}.* must be one positive number or 3"):
        UnfoldedDenoiser(Untouchable(), 3, **{name: value})


def test_multipliers_that_are_no_numbers():
    with pytest.raises(TypeError, match="rho must be a number or a sequence of numbers, got 'a'"):
        UnfoldedDenoiser(Untouchable(), rho="a")


def test_other_arguments():
    with pytest.raises(ValueError, match="reference_level must be"):
        UnfoldedDenoiser(Untouchable(), reference_level=-0.1)
    with pytest.raises(TypeError, match="denoiser must be a deepinv Denoiser, got str"):
        UnfoldedDenoiser("drunet")
    with pytest.raises(TypeError, match="unfolded must be an unfolded denoiser, got function"):
        UD2M(lambda y, physics, x_s, sigma: x_s)
    for std in (0, -1.0, NAN):
        with pytest.raises(ValueError, match="std must be positive"):
            LinearInitializer(std=std)
    with pytest.raises(ValueError, match="mode must be"):
        PseudoInverseInitializer("dagger")
    for name, value in (
        ("scale", 0),
        ("cutoff", -1.0),
        ("tol", NAN),
        ("decay", -0.1),
        ("correlation", 1),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            WienerInitializer(**{name: value})
    for images in (torch.rand(3, 32, 32), torch.rand(4, 3, 8, 32), torch.full((4, 3, 32, 32), 0.5)):
        with pytest.raises(ValueError, match="images must be"):
            WienerInitializer.fit(images)


def _public_callables():
    for name in deepinv_ud2m.__all__:
        value = getattr(deepinv_ud2m, name)
        if callable(value):
            yield pytest.param(value, id=name)
    unfolded = UnfoldedDenoiser(Untouchable())
    modules = [UD2M(unfolded), unfolded, unfolded.initializer, PseudoInverseInitializer()]
    modules += [PixelShuffledDenoiser(Untouchable())]
    for module in modules:
        yield pytest.param(module, id=f"{type(module).__name__}.forward")
    methods = [modules[0].sample, modules[0].step, unfolded.scalars, unfolded.check]
    methods += [VPSchedule().sampling_levels, VPSchedule().training_levels, VPSchedule().sigma]
    methods += [PixelShuffledDenoiser, SampleStreams, draw_seeds, randn]
    for method in methods:
        yield pytest.param(method, id=method.__qualname__)


PUBLIC_CALLABLES = list(_public_callables())


@pytest.mark.parametrize("function", PUBLIC_CALLABLES)
def test_misspelt_keywords(function):
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_sampels'"):
        function(num_sampels=3)


@pytest.mark.parametrize("function", [UD2M.forward, UD2M.sample, UnfoldedDenoiser.forward])
def test_no_argument_is_swallowed(function):
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


# -- Warnings -------------------------------------------------------------------------------------


def _messages(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def test_sizes_outside_of_training_warn():
    prior = Echo()
    prior.prior_info = PriorInfo("small", channels=1, sigma_min=0.01, sigma_max=50.0, image_size=16)
    model = UD2M(UnfoldedDenoiser(prior))
    assert _messages(lambda: model(GREY, _denoising())) == []
    (message,) = _messages(lambda: model(torch.rand(1, 1, 20, 16), _denoising()))
    assert "trained on 16x16" in message and "20x16" in message


def test_levels_outside_of_training_warn():
    model = UD2M(UnfoldedDenoiser(Echo()))
    assert _messages(lambda: model(GREY, _denoising(0.5))) == []
    _, message = _messages(lambda: model(GREY, _denoising(1e3)))  # the first is of sigma_y > 1
    assert "noise levels from 0.01 to 50.0" in message
    model = UD2M(UnfoldedDenoiser(Echo(), reference_level=0.0))
    assert _messages(lambda: model(GREY, _denoising(0.02))) == []
    (message,) = _messages(lambda: model(GREY, _denoising(1e-3)))
    assert "noise levels from 0.01 to 50.0" in message


def test_levels_outside_of_training_are_clamped():
    unfolded = UnfoldedDenoiser(Echo(), reference_level=0.0)
    for level, delta in [(1e-5, 0.01), (70.0, 50.0)]:
        assert unfolded.scalars(0, torch.tensor(level))[1].item() == pytest.approx(delta)


def test_a_prior_that_says_nothing_is_trusted():
    prior = Echo()
    prior.prior_info = None
    model = UD2M(UnfoldedDenoiser(prior))
    y = torch.rand(1, 3, 17, 15)
    assert _messages(lambda: model(y, _denoising(1e-4))) == []
    assert model(y, _denoising()).shape == y.shape


def test_levels_exclude_num_steps_and_schedule():
    for other in ({"num_steps": 2}, {"schedule": VPSchedule()}):
        with pytest.raises(ValueError, match="levels stand in place"):
            UD2M(torch.nn.Identity(), levels=[1.0, 0.1], **other)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"initializer": "ram"}, TypeError, "initializer"),
        ({"reference_level": float("nan")}, ValueError, "reference_level"),
        ({"reference_level": -0.1}, ValueError, "reference_level"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"lambda_": -1.0}, ValueError, "lambda_"),
    ],
)
def test_arguments_of_the_unfolded_denoiser(arguments, error, message):
    with pytest.raises(error, match=message):
        UnfoldedDenoiser(torch.nn.Identity(), **arguments)


def test_output_range_must_be_ordered():
    with pytest.raises(ValueError, match="output_range"):
        UD2M(torch.nn.Identity(), output_range=(1.0, 0.0))


@pytest.mark.parametrize("y", [None, [1.0], 3.0])
def test_y_must_be_a_tensor(y):
    with pytest.raises(TypeError, match="y must be a tensor"):
        UD2M(torch.nn.Identity())(y, dinv.physics.Denoising(GaussianNoise(0.1)))


def test_y_must_not_be_empty():
    with pytest.raises(ValueError, match="y is empty"):
        UD2M(torch.nn.Identity())(torch.zeros(0, 1, 8, 8), dinv.physics.Denoising(GaussianNoise(0.1)))


def test_a_prior_in_place_of_an_unfolded_denoiser_is_told():
    with pytest.raises(TypeError, match=r"UD2M\(UnfoldedDenoiser\(D\)\)"):
        UD2M(Untouchable())


def test_types_of_schedule_generator_and_measurements():
    with pytest.raises(TypeError, match="schedule"):
        UD2M(torch.nn.Identity(), schedule="cosine")
    model, physics = UD2M(torch.nn.Identity()), dinv.physics.Denoising(GaussianNoise(0.1))
    with pytest.raises(TypeError, match="generator"):
        model(torch.zeros(1, 1, 8, 8), physics, generator=0)
    with pytest.raises(TypeError, match="floating type"):
        model(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), physics)


def test_a_filter_of_too_few_dimensions_is_told():
    """deepinv's gaussian_blur(sigma=2.0) is one-dimensional; BlurFFT takes it and broadcasts."""
    kernel = dinv.physics.functional.gaussian_blur(sigma=2.0)
    physics = dinv.physics.BlurFFT((1, 32, 32), kernel, noise_model=GaussianNoise(0.1))
    y = physics(torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"filters must be \[b, c, h, w\]"):
        UD2M(UnfoldedDenoiser(Untouchable()))(y, physics)


def test_a_class_in_place_of_a_physics_is_told():
    with pytest.raises(TypeError, match="physics must be an instance, got the class Denoising"):
        UD2M(torch.nn.Identity())(torch.zeros(1, 1, 8, 8), dinv.physics.Denoising)
