"""What the sampler refuses before any network runs, and what it warns of."""

import warnings
from functools import partial
from types import SimpleNamespace

import deepinv as dinv
import pytest
import torch
from conftest import seeded
from deepinv.models import Denoiser
from deepinv.physics import GaussianNoise
from deepinv.utils import TensorList

import deepinv_ud2m
from deepinv_ud2m import UD2M, LinearInitializer, PriorInfo, UnfoldedDenoiser, VPSchedule, WienerInitializer
from deepinv_ud2m.priors.networks import PixelShuffledDenoiser
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


@pytest.fixture
def model():
    return UD2M(UnfoldedDenoiser(Untouchable()))


def _denoising(sigma=0.1):
    return dinv.physics.Denoising(GaussianNoise(sigma))


def _poisson():
    return dinv.physics.Denoising(dinv.physics.PoissonNoise(0.1))


def _stack(*levels):
    return dinv.physics.StackedLinearPhysics([_denoising(sigma) for sigma in levels])


def _masks(batch):
    return dinv.physics.Inpainting((1, 16, 16), mask=torch.ones(batch, 1, 16, 16))


GREY = torch.full((1, 1, 16, 16), 0.5)
# name: y, physics, exception, message; see test_problem.py for all that a problem refuses
PROBLEMS = {
    "nan": (GREY * NAN, _denoising(), ValueError, "y must be finite"),
    "channels of a mask": (GREY.expand(1, 3, 16, 16), _masks(1), ValueError, r"3 channel\(s\)|y of shape"),
    "channels of the prior": (GREY.expand(1, 3, 16, 16), _denoising(), ValueError, r"3 channel\(s\)"),
    "no batch": (GREY[0], _denoising(), ValueError, r"\[B, C, H, W\]"),
    "multiple": (torch.rand(1, 1, 18, 16), _denoising(), ValueError, "multiples of 4.*18x16"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_it_cannot_take(model, problem):
    y, physics, exception, message = PROBLEMS[problem]
    for call in (model, model.sample):
        with pytest.raises(exception, match=message):
            call(y, physics)
    assert model.nfe is None


@pytest.mark.parametrize("sigma_y", [0, NAN, 1e7, torch.full((2,), 0.1), "x"])
def test_sigma_y_it_cannot_take(model, sigma_y):
    y = GREY.expand(3, -1, -1, -1)
    for call in (lambda: model(y, _denoising(), sigma_y=sigma_y), lambda: model(y, _denoising())):
        with pytest.raises((ValueError, TypeError), match="sigma_y must be"):
            call()
        model.sigma_y = sigma_y


def test_sigma_y_stands_in_for_a_noise_model():
    model = UD2M(UnfoldedDenoiser(Echo()))
    for physics, y in [(_poisson(), GREY), (_stack(0.1, 0.2), TensorList([GREY, GREY]))]:
        assert model(y, physics, sigma_y=0.1).shape == GREY.shape
        # Where the caller cannot give it, as in deepinv.test, the model has it.
        with pytest.raises(ValueError, match="sigma_y"):
            model(y, physics)
        assert UD2M(UnfoldedDenoiser(Echo()), sigma_y=0.1)(y, physics).shape == GREY.shape
    samples = []
    for model.sigma_y, of_physics, given in ((None, 0.1, 0.5), (0.1, 0.1, 0.5), (0.1, 0.5, None)):
        generator = seeded(0)
        samples.append(model(GREY, _denoising(of_physics), sigma_y=given, generator=generator))
    assert torch.equal(samples[0], samples[1]), "the call's comes before the model's"
    assert not torch.equal(samples[0], samples[2]), "and the model's before the physics'"


ELSEWHERE = SimpleNamespace(device=torch.device("cuda:0"))  # stands for a generator on a GPU


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        *((name, value, ValueError, f"{name} must be an integer >= 1, got {value!r}")
          for name in ("num_samples", "batch_size") for value in (0, 1.5, "2")),
        ("generator", 0, TypeError, "generator must be a torch.Generator, got int"),
        ("generator", ELSEWHERE, ValueError, "generator must be on the device of y, cpu"),
    ],
)  # fmt: skip
def test_calls_it_cannot_take(model, name, value, error, message):
    for call in (model.sample, model) if name == "generator" else (model.sample,):
        with pytest.raises(error, match=message):
            call(GREY, _denoising(), **{name: value})


def test_measurements_on_another_device(model):
    model.to("meta")  # stands for a GPU
    with pytest.raises(ValueError, match="y must be on the device of the model, meta, got y on cpu"):
        model(GREY, _denoising())


def _unfolded(**arguments):
    return UnfoldedDenoiser(**{"denoiser": Untouchable(), **arguments})


def _sampler(**arguments):
    return UD2M(**{"unfolded": _unfolded(), **arguments})


def _predicting(**arguments):
    unfolded = _unfolded()
    unfolded.initializer.predicts_rmse = True
    return _sampler(unfolded=unfolded, **arguments)


NUMBERS = "must be a number or a sequence of numbers"
COUNT, NO_COUNTS = "must be an integer", [0, -1, 1.5, True, "3"]
NO_SIGMAS = [[], [0.1, 1.0], [1.0, 1e-30], "x"]  # see test_schedule.py
NO_MULTIPLIERS = [0.0, NAN, 1e-40, 1e9, [1.0, 2.0], [1.0, -1.0, 1.0], []]
NO_RANGES = [(1.0, 0.0), (0.5, 0.5), (NAN, 1.0), (0.0, NAN), (0.0, INF)]

# what makes it, argument, values, exception, message
ARGUMENTS = [
    (_sampler, "num_steps", [*NO_COUNTS, 501], ValueError, COUNT),
    (_sampler, "eta", [-0.1, 1.1, NAN, INF], ValueError, r"must be in \[0, 1\]"),
    (_sampler, "eta", ["1", None, True], TypeError, "must be a number"),
    (_sampler, "sigmas", NO_SIGMAS, ValueError, r"must be a sequence of positive.*\[1e-06, 1e\+06\]"),
    (partial(_sampler, num_steps=2), "sigmas", [[1.0, 0.1]], ValueError, "stand in place"),
    (partial(_sampler, schedule=VPSchedule()), "sigmas", [[1.0, 0.1]], ValueError, "stand in place"),
    (_sampler, "output_range", NO_RANGES, ValueError, "must be"),
    (_sampler, "output_range", [1.0, (0, 1, 2), "0", ("0", "1"), (0, None)], TypeError, "must be"),
    (_sampler, "schedule", ["cosine", VPSchedule], TypeError, "must be a VPSchedule"),
    (_sampler, "nominal_rmse", [0.1, NAN, "x"], ValueError, "needs an initializer that predicts"),
    (_predicting, "nominal_rmse", [0, -0.1, NAN, INF], ValueError, "must be positive and finite, got"),
    (_predicting, "nominal_rmse", ["x", True, [0.1]], TypeError, "must be a number"),
    (_sampler, "unfolded", [print, None, torch.nn.Identity()], TypeError, "must be an unfolded denoiser"),
    (_sampler, "unfolded", [Untouchable()], TypeError, r"write UD2M\(UnfoldedDenoiser\(D\)\)"),
    (_unfolded, "denoiser", ["drunet", None], TypeError, "must be a deepinv Denoiser"),
    (_unfolded, "initializer", ["ram", torch.nn.Identity()], TypeError, "must be an Initializer"),
    (_unfolded, "num_iterations", NO_COUNTS, ValueError, COUNT),
    (_unfolded, "max_iter", NO_COUNTS, ValueError, COUNT),
    (_unfolded, "tol", [0.0, -1.0, NAN, INF], ValueError, "must be positive and finite"),
    (_unfolded, "tol", ["x", None], TypeError, "must be a number"),
    *(
        (_unfolded, name, values, error, message)
        for name in ("rho", "delta", "lambda_")
        for values, error, message in [
            (NO_MULTIPLIERS, ValueError, r"must be one positive number or 3 .*\[1e-06, 1e\+06\]; got"),
            (["a", ["a"], {}], TypeError, NUMBERS),
        ]
    ),
    (LinearInitializer, "mean", ["x", None], TypeError, "must be a number"),
    (WienerInitializer, "scale", ["x", None], TypeError, "must be a number"),
]


@pytest.mark.parametrize(
    "make, name, value, error, message",
    [(make, name, value, *rest) for make, name, values, *rest in ARGUMENTS for value in values],
)
def test_arguments_that_are_refused(make, name, value, error, message):
    with pytest.raises(error, match=f"{name}.*{message}"):
        make(**{name: value})


def _public_callables():
    sampler, unfolded = _sampler(), _unfolded()
    callables = [value for name in deepinv_ud2m.__all__ if callable(value := getattr(deepinv_ud2m, name))]
    callables += [sampler, unfolded, unfolded.initializer, PixelShuffledDenoiser(Untouchable())]
    callables += [sampler.sample, sampler.step, sampler.chain, sampler.first_state, sampler.save_pretrained]
    return [*callables, unfolded.draw, PixelShuffledDenoiser, SampleStreams, draw_seeds, randn]


@pytest.mark.parametrize(
    "function", _public_callables(), ids=lambda f: getattr(f, "__qualname__", type(f).__name__)
)
def test_misspelt_keywords(function):
    given = ["folder"] if "save_pretrained" in getattr(function, "__qualname__", "") else []
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_sampels'"):
        function(*given, num_sampels=3)


def _messages(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    # Echo is no denoiser: its samples do not explain y (test_residual.py).
    return [text for text in found if not text.startswith("the samples ")]


def test_sizes_and_levels_outside_of_training_warn():
    prior = Echo()
    prior.prior_info = PriorInfo("small", channels=1, sigma_min=0.01, sigma_max=50.0, image_size=16)
    model = UD2M(_unfolded(denoiser=prior))
    assert _messages(lambda: model(GREY, _denoising(0.5))) == []
    (message,) = _messages(lambda: model(torch.rand(1, 1, 20, 16), _denoising()))
    assert "trained on 16x16" in message and "20x16" in message
    _, message = _messages(lambda: model(GREY, _denoising(1e3)))  # the first is of sigma_y > 1
    assert "noise levels from 0.01 to 50.0" in message
    model = UD2M(_unfolded(denoiser=prior, initializer=LinearInitializer(reference_level=0.0)))
    for level, delta in [(1e-5, 0.01), (70.0, 50.0)]:  # and levels are clamped
        assert model.unfolded.scalars(0, torch.tensor(level))[1].item() == pytest.approx(delta)
    assert _messages(lambda: model(GREY, _denoising(0.02))) == []
    (message,) = _messages(lambda: model(GREY, _denoising(1e-3)))
    assert "noise levels from 0.01 to 50.0" in message


def test_a_prior_that_says_nothing_is_trusted():
    prior = Echo()
    prior.prior_info = None
    model = UD2M(UnfoldedDenoiser(prior))
    y = torch.rand(1, 3, 17, 15)
    assert _messages(lambda: model(y, _denoising(1e-4))) == []
    assert model(y, _denoising()).shape == y.shape


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_loaded():
    with pytest.raises(ValueError, match="device is 'cuda:0', and PyTorch sees no CUDA GPU here: use 'cpu'"):
        UD2M.from_pretrained("nothing of this name", device="cuda:0")
