"""The unfolded denoiser against the closed-form law of K LATINO iterations."""

import copy
import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import GaussianProblem, refused
from deepinv.models import DRUNet
from deepinv.physics import Blur, Denoising, GaussianNoise, Inpainting
from deepinv.physics.functional import gaussian_blur
from test_sampler import SHAPE, assert_gaussian, blur, inpainting, seeded

from deepinv_ud2m import (
    UD2M,
    LinearInitializer,
    Problem,
    UnfoldedDenoiser,
    add_lora,
    merge_lora,
    unmerge_lora,
)
from deepinv_ud2m.priors import prior_parameters
from deepinv_ud2m.proximal import joint_level


def latino_law(problem, unfolded, x_s, s):
    """
    Mean and covariance of the K-th iterate, for a Gaussian prior, by the affine recursion
    x <- mu + G (P x + q + delta n - mu), written with dense matrices only.
    """
    identity = torch.eye(problem.d, dtype=torch.float64)
    normal = problem.A.T @ problem.A / problem.sigma_y**2
    back_projection = problem.A.T @ problem.y.flatten() / problem.sigma_y**2
    tau, mu0 = unfolded.initializer.std, unfolded.initializer.mean
    mean = torch.linalg.solve(
        normal + identity * (s**-2 + tau**-2), back_projection + x_s.flatten() * s**-2 + mu0 * tau**-2
    )
    covariance = torch.zeros_like(identity)
    level = joint_level(torch.tensor(s), problem.sigma_y, unfolded.initializer.reference_level)
    for k in range(unfolded.num_iterations):
        rho, delta, lambda_ = (value.item() for value in unfolded.scalars(k, level))
        hessian = normal / lambda_ + identity * (s**-2 + rho**-2)
        P = torch.linalg.inv(hessian) * rho**-2
        q = torch.linalg.solve(hessian, back_projection / lambda_ + x_s.flatten() * s**-2)
        G = problem.denoiser.gain(delta)
        mean = problem.mean + G @ (P @ mean + q - problem.mean)
        covariance = G @ (P @ covariance @ P.T + delta**2 * identity) @ G.T
    return mean, covariance


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
@pytest.mark.parametrize("s", [0.2, 3.0])
@pytest.mark.parametrize("make_physics", [inpainting, blur])
def test_iterations_have_the_law_of_the_recursion(make_physics, s, num_iterations):
    problem = GaussianProblem(make_physics(), SHAPE)
    unfolded = UnfoldedDenoiser(problem.denoiser, num_iterations, LinearInitializer(), lambda_=0.7, tol=1e-10)
    with torch.no_grad():  # as if trained
        for offset, name in enumerate(("rho", "delta", "lambda")):
            getattr(unfolded, f"log_{name}").copy_(torch.linspace(-0.3, 0.4, num_iterations) + offset / 9)
    generator, n = seeded(), 4_000
    x_s = 0.5 + s * torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
    y = problem.y.expand(n, *problem.y.shape[1:])
    with torch.no_grad():
        draws = unfolded(y, problem.physics, x_s.expand(n, *SHAPE), s, generator=generator)
    mean, covariance = latino_law(problem, unfolded, x_s, s)
    assert_gaussian(draws.flatten(1), mean, covariance)


def test_a_known_initial_estimate_is_not_computed_again(gaussian_problem):
    problem = gaussian_problem(blur(), SHAPE)
    unfolded, x_s = UnfoldedDenoiser(problem.denoiser, 2), torch.rand(3, *SHAPE).double()
    given = Problem(problem.y.expand(3, -1, -1, -1), problem.physics)
    initial = unfolded.initial_estimate(given, x_s, 0.5)
    expected = unfolded.draw(given, x_s, 0.5, generator=seeded())
    assert torch.equal(expected, unfolded(given.y, problem.physics, x_s, 0.5, generator=seeded()))
    unfolded.initializer.forward = None
    assert torch.equal(expected, unfolded.draw(given, x_s, 0.5, generator=seeded(), initial=initial))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_are_taken_in_the_precision_of_the_measurements(tiny_prior, dtype):
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[dtype]
    kernel = gaussian_blur(sigma=(1.0, 1.0)).to(dtype)  # separable
    physics, x_s = Blur(kernel, padding="valid"), torch.rand(1, 1, 16, 16, dtype=other)
    y = physics.A(x_s.to(dtype))
    unfolded = UnfoldedDenoiser(tiny_prior, 1)
    assert unfolded(y, physics, x_s, 0.5, sigma_y=0.1).dtype == dtype


def test_scalars_start_at_the_documented_values():
    initializer = LinearInitializer(reference_level=0.0)
    unfolded = UnfoldedDenoiser(torch.nn.Identity(), 3, initializer, delta=[4, 2, 1], rho=0.5)
    s, sigma_y = 2.0, 0.1
    level = sigma_y * s / (sigma_y**2 + s**2) ** 0.5  # the paper's starting value
    h = initializer.rmse_scale(torch.tensor(sigma_y), torch.tensor(s))
    for k, multiplier in enumerate([4, 2, 1]):
        rho, delta, lambda_ = unfolded.scalars(k, h)
        assert torch.allclose(rho, torch.tensor(0.5 * level))
        assert torch.allclose(delta, torch.tensor(multiplier * level))
        assert lambda_ == 1
    for num_iterations in (1, 2, 3, 8):
        delta = UnfoldedDenoiser(torch.nn.Identity(), num_iterations).start_delta
        assert len(delta) == num_iterations and (delta.diff() < 0).all()


def test_defaults_are_the_winners_of_the_stored_search():
    """By the sum over tasks of the energy score relative to the best of the task, among the exact steps."""
    results = Path(__file__).parents[1] / "docs" / "results" / "zero_shot.json"
    rows = json.loads(results.read_text())["rows"]
    rows = [row for row in rows if row["setting"]["eta"] == 1]
    best = {task: min(row["energy_score"][task] for row in rows) for task in rows[0]["energy_score"]}
    winner = min(rows, key=lambda row: sum(row["energy_score"][task] / best[task] for task in best))
    unfolded = UnfoldedDenoiser(torch.nn.Identity(), 3)
    assert pytest.approx(winner["setting"]) == {
        "delta_first": unfolded.start_delta[0].item(),
        "delta_last": unfolded.start_delta[-1].item(),
        "rho": unfolded.start_rho[0].item(),
        "reference_level": unfolded.initializer.reference_level,
        "eta": UD2M(unfolded).eta,
    }


@pytest.mark.parametrize("shared", [False, True])
def test_learned_scalars_get_true_gradients(gaussian_problem, shared):
    """delta too: the noise is reparameterised and the level continuous. Against differences."""
    problem = gaussian_problem(blur(), SHAPE)
    unfolded = UnfoldedDenoiser(problem.denoiser, 2, shared=shared, tol=1e-12).double()
    x_s = torch.full((1, *SHAPE), 0.4, dtype=torch.float64)
    target = torch.linspace(0, 1, 16, dtype=torch.float64).reshape(1, *SHAPE)

    def loss():
        draw = unfolded(problem.y, problem.physics, x_s, 0.5, generator=seeded())
        return (draw - target).square().sum()

    loss().backward()
    for name in ("rho", "delta", "lambda"):
        parameter = getattr(unfolded, f"log_{name}")
        assert len(parameter) == (1 if shared else 2)
        for k in range(len(parameter)):
            with torch.no_grad():
                parameter[k] += 1e-5
                up = loss()
                parameter[k] -= 2e-5
                down = loss()
                parameter[k] += 1e-5
            difference = ((up - down) / 2e-5).item()
            assert abs(difference) > 1e-4, name
            assert abs(parameter.grad[k].item() / difference - 1) < 0.01, name


def _requiring_grad(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


OUT = "denoiser.out_conv"
SCALARS = {"scalars.log_rho", "scalars.log_delta", "scalars.log_lambda"}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("train_prior", ["adapter", "all", [OUT], f"{OUT}.weight"])
def test_what_is_declared_is_trained_and_stored(tiny_prior, train_prior, adapter):
    """Whatever happens to the flags of the parameters later."""
    if adapter:
        add_lora(tiny_prior, rank=2)
    every = {name for name, _ in prior_parameters(tiny_prior)}
    declared = {"adapter": set(), "all": every, f"{OUT}.weight": {f"{OUT}.weight"}}
    declared = declared.get(str(train_prior), {f"{OUT}.weight", f"{OUT}.bias"})
    unfolded = UnfoldedDenoiser(tiny_prior, train_prior=train_prior)
    stored, trained = unfolded.state(), unfolded.trained_parameters()
    own = {name for name in stored if name.startswith("denoiser.")}
    factors = {name for name in stored if name.startswith("lora.")}
    assert own == {f"denoiser.{name}" for name in declared} and bool(factors) == adapter
    assert stored.keys() == SCALARS | own | factors
    assert not any(tensor.requires_grad for tensor in stored.values())
    assert {id(p) for p in trained.values()} == {id(p) for p in unfolded.parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(t.numel() for t in stored.values())
    for flag in (True, False):
        unfolded.requires_grad_(flag)
        assert list(unfolded.state()) == list(stored)
        assert list(unfolded.trained_parameters()) == list(trained)


def test_a_layer_that_was_freed_is_not_frozen_in_silence(tiny_prior):
    add_lora(tiny_prior, rank=2)
    tiny_prior.get_submodule(OUT).requires_grad_(True)
    with pytest.warns(UserWarning, match=r"weight.* are frozen again.* name them in train_prior"):
        UnfoldedDenoiser(tiny_prior)
    tiny_prior.get_submodule(OUT).requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UnfoldedDenoiser(tiny_prior, train_prior=[OUT])


def test_an_output_layer_that_is_named_is_trained(tiny_prior):
    """Besides the adapter, and it stays so through all that may happen to a model before it is trained."""
    add_lora(tiny_prior, rank=2)
    unfolded = UnfoldedDenoiser(tiny_prior, 1, train_prior=[OUT])
    flags = _requiring_grad(unfolded)
    merge_lora(tiny_prior)
    unmerge_lora(tiny_prior)
    unfolded.load_state({name: tensor.clone() for name, tensor in unfolded.state().items()})
    unfolded = copy.deepcopy(unfolded.train().double()).float()
    assert _requiring_grad(unfolded) == flags
    before = {name: p.detach().clone() for name, p in unfolded.named_parameters()}
    physics, x = Denoising(GaussianNoise(0.1)), torch.rand(1, 1, 16, 16)
    for _ in range(2):  # in the first step B = 0, and A gets no gradient
        unfolded(x, physics, x, 0.5).square().sum().backward()
        torch.optim.SGD([p for p in unfolded.parameters() if p.requires_grad], 0.1).step()
    changed = {name for name, p in unfolded.named_parameters() if not torch.equal(p, before[name])}
    assert changed == flags and {f"denoiser.{OUT}.base_layer.{kind}" for kind in ("weight", "bias")} <= flags


def test_names_that_the_prior_does_not_have_are_refused(tiny_prior):
    given = [(name, ValueError) for name in ("nowhere", OUT[:-1], [OUT, "nowhere"], "")]
    given += [(name, TypeError) for name in (None, True, [["all"]], {OUT})]
    message = "train_prior must be 'adapter', 'all'"
    refused(*((partial(UnfoldedDenoiser, tiny_prior, train_prior=n), error, message) for n, error in given))


def test_a_denoiser_that_takes_maps_of_levels_works():
    """deepinv's DRUNet refuses levels of some shapes."""
    denoiser = DRUNet(1, 1, nc=(8, 8, 8, 8), nb=1, pretrained=None)
    physics = Inpainting((1, 32, 32), mask=0.5, noise_model=GaussianNoise(0.05))
    x = torch.rand(2, 1, 32, 32)
    assert UnfoldedDenoiser(denoiser)(physics(x), physics, x, 0.5).shape == x.shape
