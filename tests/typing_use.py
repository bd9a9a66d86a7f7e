"""Code as users write it. It is not run: mypy checks it, and so the types of the package from outside."""

from pathlib import Path

import deepinv as dinv
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import assert_type

from deepinv_ud2m import (
    UD2M,
    PosteriorMeanInitializer,
    PriorInfo,
    Problem,
    Trajectory,
    UnfoldedDenoiser,
    VPSchedule,
    WienerInitializer,
    add_lora,
    load_prior,
    merge_lora,
    posterior_prox,
    save_prior,
)
from deepinv_ud2m.data import RandomCrops, load_image, mnist_digits, photograph
from deepinv_ud2m.metrics import PerceptualDistance, coverage_curve, energy_score, frechet_distance, rank
from deepinv_ud2m.physics import JPEG, JointGenerator, make_generator, make_physics, tabulate
from deepinv_ud2m.priors import lora_state_dict, prior_parameters
from deepinv_ud2m.training import (
    Adversary,
    ConditionalDiscriminator,
    DistillationTrainer,
    DiversityController,
    EnergyScoreLoss,
    L2Loss,
    Recipe,
    Stage,
    StateSigmas,
    distill,
    parameter_groups,
    warmup_cosine,
)
from deepinv_ud2m.uncertainty import Conformal, Summary, plot, summary, toward_mean


def sample(y: Tensor) -> None:
    model = UD2M.from_pretrained("mnist", device="cpu", merge=False)
    assert_type(model, UD2M)
    physics = dinv.physics.Inpainting((1, 32, 32), mask=0.3, noise_model=dinv.physics.GaussianNoise(0.05))
    generator = torch.Generator().manual_seed(0)
    assert_type(model.sample(y, physics, 4, sigma_y="estimate", generator=generator), Tensor)
    assert_type(model.sample(y, physics, return_trajectory=False), Tensor)
    assert_type(model.sample(y, physics, return_trajectory=True), tuple[Tensor, Trajectory])
    samples, trajectory = model.sample(y, physics, num_samples=2, return_trajectory=True)
    assert_type(trajectory.x0, Tensor)
    assert_type(model.forward(y, physics, sigma_y=torch.tensor([0.1])), Tensor)
    assert_type(model.estimate_sigma_y(y, physics), Tensor)
    assert_type(model.num_steps, int)
    assert_type(model.sigmas, Tensor)
    assert_type(model.nfe, float | None)
    assert_type(model.residual, Tensor | None)
    model.conformal["inpainting"] = Conformal(1.5)
    model.save_pretrained("folder", metadata={"seed": 0}, dtype=torch.float16)
    assert_type(model.push_to_hub("user/repo", private=True), str)
    for sigma, x_s, _ in model.chain(Problem(y, physics), model.first_state(samples[0], generator)):
        assert_type(sigma, Tensor)
        assert_type(model.step(x_s, x_s, 0.5, sigma, generator), Tensor)


def compose(y: Tensor) -> None:
    prior = load_prior("mnist", "cpu")
    assert_type(add_lora(prior, rank=4, targets=["conv"]), list[str])
    unfolded = UnfoldedDenoiser(prior, 2, WienerInitializer(), rho=1.0, delta=[2.0, 1.0], train_prior="all")
    assert_type(unfolded.log_delta, nn.Parameter)
    assert_type(unfolded.start_rho, Tensor)
    assert_type(unfolded.prior_info, PriorInfo | None)
    assert_type(unfolded.trained_parameters(), dict[str, nn.Parameter])
    unfolded.load_state(unfolded.state())
    schedule = VPSchedule("cosine", 500)
    assert_type(schedule.sampling_sigmas(3), Tensor)
    UD2M(unfolded, 3, eta=0.5, schedule=schedule, output_range=None, sigma_y="estimate")
    UD2M(unfolded, sigmas=(10.0, 1.0, 0.1), conformal={"sr4": {"factor": 1.2}})
    learned = PosteriorMeanInitializer.from_prior("mnist", reference_level=0.1)
    UD2M.from_pretrained(Path("folder"), prior=prior, initializer=learned)
    merge_lora(prior)
    save_prior(prior, {"network": {}}, Path("folder"))
    assert_type(lora_state_dict(prior), dict[str, Tensor])
    names = [name for name, _ in prior_parameters(prior)]
    assert_type(names, list[str])


def solve(y: Tensor) -> None:
    problem = Problem(y, make_physics("sr4", (3, 64, 64), 0.05), sigma_y=0.05, channels=3)
    assert_type(problem.shape, torch.Size)
    assert_type(problem.repeat(4).sigma_y, Tensor)
    assert_type(problem.prox(problem.adjoint, torch.ones(1, 1, 1, 1)), Tensor)
    assert_type(posterior_prox(problem, problem.adjoint, problem.adjoint, 0.5, 0.1, atol=1e-3), Tensor)
    measured, physics = JPEG.read("photo.jpg")
    assert_type(measured, Tensor)
    assert_type(physics, JPEG)
    assert_type(make_generator("sr4", (3, 64, 64), (0.01, 0.1)), JointGenerator)
    assert_type(tabulate(physics, (3, 64, 64)).megabytes, float)


def judge(samples: Tensor, x: Tensor) -> None:
    found = summary(samples, x, level=0.95)
    assert_type(found, Summary)
    assert_type(found.std, Tensor)
    assert_type(found.coverage, Tensor | None)
    physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
    conformal = Conformal.fit(UD2M.from_pretrained("mnist"), x, physics, 0.9, pool=2)
    assert_type(conformal, Conformal)
    assert_type(Conformal.from_samples(samples, x).factor, float)
    assert_type(conformal.interval(samples), tuple[Tensor, Tensor])
    assert_type(plot(samples, x, shown=2), Figure)
    assert_type(toward_mean(samples, 0.5), Tensor)
    assert_type(energy_score(samples, x), Tensor)
    metric = PerceptualDistance("digits", device="cpu")
    frechet_distance(x, samples[0], metric.embedding)
    coverage_curve(rank(samples, x), torch.linspace(0.1, 0.9, 9))


def data() -> None:
    assert_type(mnist_digits("validation", num=4), Tensor)
    assert_type(mnist_digits(labels=True), tuple[Tensor, Tensor])
    assert_type(photograph("chelsea"), Tensor)
    assert_type(load_image("photo.png", 3), Tensor)
    assert_type(RandomCrops("photos", 64, 100)[0], Tensor)


def train(images: Tensor) -> None:
    physics = dinv.physics.Inpainting((1, 32, 32), mask=0.3, noise_model=dinv.physics.GaussianNoise(0.05))
    recipe = Recipe([Stage("single", 1, 2)], sigmas=[78.7, 0.2], delta=[2.0], rho=[2.0], initial="wiener")
    assert_type(distill("mnist", [physics], images, recipe, "folder", device="cpu"), UD2M)
    distill(None, None, "photos", Recipe.read("default", seed=1), Path("folder"), download=True)
    assert_type(recipe.miniature(), Recipe)
    model = UD2M.from_pretrained("mnist", merge=False)
    controller = DiversityController([physics], 0.5)
    trainer = DistillationTrainer(
        model=model,
        physics=physics,
        train_dataloader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images)),
        losses=[L2Loss(), EnergyScoreLoss(2, diversity_weight=controller.weights)],
        adversary=Adversary(ConditionalDiscriminator(1), ratio=2),
        optimizer=torch.optim.AdamW(parameter_groups(model.unfolded)),
        lr_schedule=warmup_cosine(100, 10),
        sigmas=StateSigmas(model, 0.5),
        sample_metrics={"energy score": energy_score},
        controller=controller,
        save_path="folder",
    )
    assert_type(trainer.train(), UD2M)
    assert_type(trainer.evaluate(), dict[str, float])
