"""Losses of a recipe, the controller of diversity, and what tells one run from another."""

import json
from functools import partial

import deepinv as dinv
import torch
from conftest import seeded

from deepinv_ud2m.training import (
    DiversityController,
    EnergyScoreLoss,
    L2Loss,
)
from deepinv_ud2m.training.checkpoints import identity
from deepinv_ud2m.training.objectives import Setting, make_losses


def test_losses_of_a_recipe_follow_the_controller():
    controller = DiversityController([dinv.physics.Denoising()], kappa=0.5)
    (energy, l2), adversary = make_losses(
        [{"loss": "energy", "weight": 2.0}, {"loss": "l2"}], Setting(1, torch.device("cpu"), controller)
    )
    assert energy.diversity_weight is controller.weights and energy.weight == 2 and adversary is None
    assert isinstance(l2, L2Loss)
    features = [{"loss": "energy", "features": "efficientnet", "features_size": 32}]
    (energy,), _ = make_losses(features, Setting(1, torch.device("cpu")))
    samples, x = (
        torch.rand(2, 1, 1, 32, 32, generator=seeded()),
        torch.rand(1, 1, 32, 32, generator=seeded(1)),
    )
    assert energy(x=x, samples=samples).isfinite().all(), "of grey images"


def test_the_controller_of_diversity_finds_the_weight_that_calibrates():
    """For Gaussian laws the weight c gives c / sqrt(2 - c^2) times the standard deviation of c = 1."""
    physics = dinv.physics.Denoising(), dinv.physics.Denoising()
    controller, too_similar = DiversityController(physics, kappa=0.5), torch.tensor([1.1, 0.95])
    for _ in range(60):
        c = torch.tensor(controller.state())
        ratios = too_similar * (2 - c**2).sqrt() / c
        controller({f"spread-skill ratio/{i}": ratio.item() for i, ratio in enumerate(ratios)})
    expected = too_similar * (2 / (1 + too_similar**2)) ** 0.5  # sqrt(2) m / sqrt(1 + m^2)
    assert torch.allclose(torch.tensor(controller.state()), expected, atol=1e-3)
    # The loss has the weights of the controller, not those at the start.
    samples, x = torch.rand(2, 1, 1, 4, 4, generator=seeded()), torch.zeros(1, 1, 4, 4)
    loss = EnergyScoreLoss(diversity_weight=controller.weights)
    first = loss(x=x, samples=samples, physics=physics[0])
    controller({"spread-skill ratio/0": 1.1, "spread-skill ratio/1": 1.0})
    assert loss(x=x, samples=samples, physics=physics[0]) < first, "more weight on diversity"
    again = DiversityController(physics, kappa=0.5)
    again.load(controller.state())
    assert again.weights == controller.weights
    controller({"spread-skill ratio/0": 1e9, "spread-skill ratio/1": 1e-9})
    assert controller.state() == [1.2, 0.8], "within limits, whatever is measured"


def test_physics_and_generators_are_told_apart():
    shape, noise = (1, 8, 8), dinv.physics.GaussianNoise
    kernel = dinv.physics.functional.gaussian_blur(sigma=(1.0, 1.0))

    def blur(padding="valid", scale=1.0, sigma=0.1):
        return dinv.physics.Blur(kernel * scale, padding=padding, noise_model=noise(sigma))

    def kernels(side=5):
        return dinv.physics.generator.GaussianBlurGenerator((side, side))

    def levels(high=0.1):
        return dinv.physics.generator.SigmaGenerator(0.02, high)

    matrix = torch.rand(3, 64, generator=seeded()) * torch.tensor([0.0, 1.0]).repeat(32)
    makers = [
        *(partial(blur, *options) for options in ((), ("circular",), ("valid", 2.0), ("valid", 1.0, 0.2))),
        *(partial(dinv.physics.Downsampling, shape, factor=factor) for factor in (2, 4)),
        *(
            lambda high=high, side=side: kernels(side) + levels(high)
            for high in (0.1, 0.2)
            for side in (5, 7)
        ),
        *(lambda a=a: [a.to_sparse_csr()] for a in (matrix, 2 * matrix)),
        *(lambda a=a: [a] for a in (matrix, matrix.to(torch.complex64), True, "word", 0.5)),
    ]
    found = [json.dumps(identity(make())) for make in makers]
    assert len({*found}) == len(found)
    assert found == [json.dumps(identity(make())) for make in makers], "others that are equal"
    physics = blur()
    before = identity(physics)
    physics(torch.rand(1, 1, 16, 16)), physics.eval()
    assert identity(physics) == before, "used or not"
    physics.itself = [physics]
    assert json.dumps(identity(physics))
