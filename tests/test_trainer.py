"""Distillation: what is trained, evaluated and exported, and what is refused."""

import copy
import re
from dataclasses import fields

import deepinv as dinv
import pytest
import torch
from conftest import seeded
from deepinv.physics import GaussianNoise, Inpainting
from distillation import Recorder, equal, eval_images, images, make_adversary, make_trainer, mask, values_of
from torch.utils.data import DataLoader

from deepinv_ud2m import (
    UD2M,
    LinearInitializer,
    PosteriorMeanInitializer,
    PriorInfo,
    UnfoldedDenoiser,
    add_lora,
    merge_lora,
    remove_lora,
)
from deepinv_ud2m.priors import lora_parameters
from deepinv_ud2m.training import (
    DistillationTrainer,
    EnergyScoreLoss,
    GaussianNLLLoss,
    L2Loss,
    StateSigmas,
    parameter_groups,
)
from deepinv_ud2m.training.arguments import UNUSED
from deepinv_ud2m.training.randomness import seed_all


def test_training_moves_what_is_trainable_and_nothing_else(tiny_prior):
    trainer = make_trainer(tiny_prior)
    adapter = [p.detach().clone() for p in lora_parameters(trainer.unfolded.denoiser)]
    model = trainer.train()
    assert not any(map(torch.equal, adapter, lora_parameters(model.unfolded.denoiser)))
    assert model.unfolded.log_delta.abs().min() > 0 and model.unfolded.log_rho.abs().min() > 0
    assert not model.unfolded.denoiser.training
    x, prior = images(2), copy.deepcopy(model.unfolded.denoiser)
    remove_lora(prior)
    with torch.no_grad():
        assert torch.equal(prior(x, 0.1), tiny_prior(x, 0.1)), "the prior must stay as it was"


def test_groups_of_parameters_have_their_own_rates(tiny_prior, tiny_config):
    initializer = PosteriorMeanInitializer(tiny_config["network"], 1)
    unfolded = UnfoldedDenoiser(tiny_prior, 2, initializer)
    add_lora(tiny_prior, 2, targets="all-convs")
    groups = parameter_groups(unfolded, lr=1.0, lr_scalars=2.0, lr_initializer=3.0)
    groups = {group["name"]: group for group in groups}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == {"prior": 1.0, "scalars": 2.0, "initializer": 3.0}
    assert groups["scalars"]["weight_decay"] == 0
    grouped = sum(p.numel() for group in groups.values() for p in group["params"])
    assert grouped == sum(p.numel() for p in unfolded.parameters() if p.requires_grad)


@pytest.mark.parametrize("stage", ["single", "end_to_end"])
def test_gradients_of_the_scalars_match_differences(tiny_prior, stage):
    trainer = make_trainer(tiny_prior, stage=stage)
    trainer.setup_train()
    trainer.model.double()
    x = images(2).double()

    def loss():
        seed_all([5])
        physics = mask().double()
        torch.manual_seed(3)
        batch = trainer.draw(x, physics(x), physics)
        return (batch["x_net"] - x).square().sum()

    for name in ("log_delta", "log_rho", "log_lambda"):
        parameter = getattr(trainer.unfolded, name)
        (gradient,) = torch.autograd.grad(loss(), parameter)
        for k in range(2):
            with torch.no_grad():
                parameter[k] += 1e-4
                above = loss()
                parameter[k] -= 2e-4
                below = loss()
                parameter[k] += 1e-4
            assert gradient[k].item() == pytest.approx((above - below).item() / 2e-4, rel=1e-2, abs=1e-6)


def test_one_forward_of_the_generator_serves_all_updates(tiny_prior):
    adversary = make_adversary(ratio=3)
    trainer = make_trainer(tiny_prior, adversarial=True, adversary=adversary)
    trainer.setup_train()
    calls, moved, step = [], [], adversary.optimizer.step
    trainer.unfolded.denoiser.register_forward_hook(lambda *_: calls.append(1))
    adversary.optimizer.step = lambda: moved.append(step())
    buffers = [buffer.clone() for buffer in adversary.D.buffers()]
    trainer.draw = lambda *arguments, draw=trainer.draw: draw(*arguments) | {"D": adversary.D}
    trainer._compute(trainer.losses, trainer.draw(images(2), mask()(images(2)), trainer.physics[0]))
    assert equal(buffers, adversary.D.buffers()), "the losses of samples leave it as it is"
    del calls[:]
    trainer.train_step(0)
    assert len(calls) == 2, "K calls for the step, both samples in each"
    assert len(moved) == 3, "ratio updates of the discriminator"


def test_end_to_end_samples_are_those_of_the_sampler(tiny_prior, monkeypatch):
    """Without any noise but the operators', both are one and the same deterministic map."""
    trainer = make_trainer(tiny_prior, stage="end_to_end", losses=EnergyScoreLoss(2))
    trainer.model.output_range = None
    calls = []
    trainer.unfolded.denoiser.register_forward_hook(lambda *_: calls.append(1))
    physics, x = trainer.physics[0], images(3)
    y = physics(x)
    for module in ("sampler", "unfolded"):
        monkeypatch.setattr(f"deepinv_ud2m.{module}.randn", lambda like, generator=None: 0 * like)
    batch = trainer.draw(x, y, physics)
    assert len(calls) == 4, "N x K evaluations, both samples in each"
    assert batch["samples"].requires_grad and "sigma" not in batch
    torch.testing.assert_close(batch["samples"].detach(), trainer.model.sample(y, physics, 2))
    assert torch.equal(batch["x_net"], batch["samples"][0])


def test_accumulated_gradients_are_their_mean(tiny_prior):
    gradients = []
    for first, accumulate in ((0, 1), (1, 1), (0, 2)):
        trainer = make_trainer(tiny_prior, accumulate=accumulate)
        trainer.setup_train()
        for _ in range(first):
            next(trainer.turns.streams[0])
        trainer.train_step(first)
        gradients.append([p.grad.clone() for p in trainer.trained.values()])
    means = [(first + second) / 2 for first, second in zip(*gradients[:2], strict=True)]
    torch.testing.assert_close(gradients[2], means)


def test_checkpointing_computes_twice_and_changes_no_gradient(tiny_prior):
    gradients, calls = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(tiny_prior, checkpointing=checkpointing)
        trainer.unfolded.denoiser.register_forward_pre_hook(lambda *_, c=checkpointing: calls.append(c))
        trainer.setup_train()
        trainer.train_step(0)
        gradients.append([p.grad for p in trainer.trained.values()])
    assert calls == [False] * 2 + [True] * 4
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [1e-3, None])
def test_gradients_are_clipped_together(tiny_prior, clip):
    """Of the model, and of the discriminator: a step of SGD is as long as its gradient."""
    adversary = make_adversary()
    parts = {"D": [*adversary.D.parameters()]}
    adversary.optimizer = torch.optim.SGD(parts["D"], lr=1.0)
    trainer = make_trainer(tiny_prior, adversarial=True, adversary=adversary, grad_clip=clip)
    parts["model"] = list(trainer.trained.values())
    trainer.update.optimizer = torch.optim.SGD([{"params": parts["model"], "initial_lr": 1.0}], lr=1.0)
    trainer.update.start = lambda step, start=trainer.update.optimizer.zero_grad: start()
    trainer.setup_train()
    before = {name: [p.detach().clone() for p in of] for name, of in parts.items()}
    logs = trainer.train_step(0)
    for name, of in parts.items():
        moved = torch.cat([(a - b).flatten() for a, b in zip(of, before[name], strict=True)]).norm().item()
        assert moved > 2e-3 if clip is None else moved == pytest.approx(clip, rel=1e-2)
    assert logs["gradient norm"] > 2e-3, "the norm before"


@pytest.mark.parametrize("precision", ["bfloat16", False])
def test_mixed_precision_is_of_training_steps(tiny_prior, precision):
    trainer = make_trainer(tiny_prior, mixed_precision=precision, losses=Recorder())
    trainer.eval_dataloader, found = [eval_images()], []
    trainer.unfolded.denoiser.register_forward_hook(lambda *_: found.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    assert all(of == bool(precision) for of in [*found, *trainer.losses[0].autocast])
    del found[:]
    trainer.evaluate()
    assert found and not any(found)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.trained.values())


def test_a_compiled_prior_is_used_in_training_steps_only(tiny_prior, monkeypatch):
    """With the backend "eager", which needs no compiler and changes no bit."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_with(module, backend=backend))
    plain = make_trainer(tiny_prior)
    plain.train()
    compiled = make_trainer(tiny_prior, compile=True)
    compiled.train()
    assert calls and equal(values_of(plain), values_of(compiled))
    assert all(network._compiled_call_impl is None for network in compiled.unfolded.networks), "as before"
    number = len(calls)
    compiled.eval_dataloader = [eval_images()]
    compiled.evaluate()
    assert len(calls) == number
    torch.compiler.reset()


@pytest.mark.parametrize("stage", ["single", "end_to_end"])
def test_training_improves_the_samples_of_a_gaussian_problem(gaussian_problem, stage):
    """
    Only the scalars can move: an exact denoiser has no adapter. Deterministic for its seed; the
    untrained sampler is 15 % away and a run that learns nothing cannot pass.
    """
    shape = (1, 4, 4)
    pixels = torch.tensor([1.0, 0.0]).repeat(8).reshape(shape)
    physics = Inpainting(shape, mask=pixels, noise_model=GaussianNoise(0.1))
    problem = gaussian_problem(physics, shape)
    factor = torch.linalg.cholesky(problem.covariance)
    draws = torch.randn(512, 16, dtype=torch.float64, generator=seeded(0))
    x = (problem.mean + draws @ factor.T).reshape(-1, *shape)
    unfolded = UnfoldedDenoiser(problem.denoiser, num_iterations=2).double()
    trainer = DistillationTrainer(
        model=UD2M(unfolded, num_steps=2, output_range=None), physics=physics,
        optimizer=torch.optim.Adam(parameter_groups(unfolded, lr_scalars=3e-2)),
        train_dataloader=DataLoader(x, batch_size=64, shuffle=True), losses=EnergyScoreLoss(2),
        eval_dataloader=DataLoader(x[:256], batch_size=256), eval_samples=16, steps=150, device="cpu",
        verbose=False, stage=stage,
    )  # fmt: skip
    before = trainer.evaluate()["energy score"]
    trainer.train()
    assert trainer.evaluate()["energy score"] < 0.97 * before


def make_initial(prior, config, initializer=None, sampler=None, **options):
    torch.manual_seed(0)
    initializer = initializer or PosteriorMeanInitializer(config["network"], 1)
    model = UD2M(UnfoldedDenoiser(prior, 1, initializer), **sampler or {"num_steps": 2})
    groups = parameter_groups(model.unfolded, lr_initializer=3e-3, weight_decay=0.1)
    defaults = {"stage": "initial", "physics": mask(), "losses": GaussianNLLLoss(), "steps": 30}
    defaults |= {"train_dataloader": DataLoader(images(8), 4, True), "optimizer": torch.optim.AdamW(groups)}
    defaults |= {"sigmas": StateSigmas(model, 0.5), "log_interval": 10, "grad_clip": 1.0}
    return DistillationTrainer(model=model, verbose=False, device="cpu", **defaults | options)


def test_training_of_the_initial_estimate_lowers_the_loss_and_leaves_the_rest(tiny_config, tiny_prior):
    add_lora(tiny_prior, 2, targets="all-convs")
    trainer = make_initial(tiny_prior, tiny_config)
    calls = []
    tiny_prior.register_forward_hook(lambda *_: calls.append(1))
    before = {name: p.clone() for name, p in tiny_prior.named_parameters()}
    unfolded = trainer.train().unfolded
    losses = [value for _, value in trainer.history["loss"]]
    assert losses[-1] < losses[0] - 0.05
    assert not calls, "the denoiser is not needed"
    assert all(torch.equal(p, before[name]) for name, p in tiny_prior.named_parameters())
    assert not any(getattr(unfolded, f"log_{name}").any() for name in ("rho", "delta", "lambda"))


def test_training_goes_through_sigmas_relative_to_the_predicted_rmse(tiny_config, tiny_prior, tmp_path):
    def make(nominal_rmse, **options):
        sampler = {"sigmas": [9.0, 0.7, 0.1], "nominal_rmse": nominal_rmse}
        options |= {"stage": "end_to_end", "losses": EnergyScoreLoss(), "save_path": tmp_path}
        return make_initial(tiny_prior, tiny_config, sampler=sampler, **options)

    trainer, visited = make(0.3, steps=1), []
    trainer.unfolded.draw = lambda problem, x_s, sigma, draw=trainer.unfolded.draw, **options: (
        visited.append(sigma) or draw(problem, x_s, sigma, **options)
    )
    trainer.train()
    assert visited[1].shape == (8, 1, 1, 1), "a level for each sample"
    assert not visited[1].requires_grad
    gradient = trainer.unfolded.initializer.error[-1].weight.grad
    assert gradient.any(), "the noise of the iterations is relative to it"
    with pytest.raises(ValueError, match=r"another run: its sampler: nominal_rmse is 0.3, here it is 0.2"):
        make(0.2, steps=2).train()


def test_the_initial_stage_refuses_what_it_is_not_for(tiny_config, tiny_prior):
    frozen = PosteriorMeanInitializer(tiny_config["network"], 1).requires_grad_(False)
    for options, message in (
        ({"initializer": LinearInitializer()}, "needs an initializer that predicts its RMSE.*LinearInit"),
        ({"initializer": frozen}, "needs an initializer that predicts its RMSE and is trained"),
        ({"losses": EnergyScoreLoss()}, "losses need 2 samples, and stage='initial' has one estimate"),
        ({"stage": "single"}, "rmse, .* is needed: train with stage='initial'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_initial(tiny_prior, tiny_config, **options).train()


def test_a_merged_adapter_is_refused_where_it_would_be_trained(tiny_config, tiny_prior):
    unfolded = make_trainer(tiny_prior).unfolded
    merge_lora(unfolded.denoiser)
    options = {"physics": mask(), "train_dataloader": eval_images(), "losses": L2Loss()}
    with pytest.raises(ValueError, match=r"merged adapter.*merge=False.*unmerge_lora"):
        DistillationTrainer(model=UD2M(unfolded), **options)
    add_lora(tiny_prior, 2, targets="all-convs")
    merge_lora(tiny_prior)
    make_initial(tiny_prior, tiny_config, steps=1).train()


BAD = [
    (ValueError, {"losses": []}, "losses must be given"),
    (ValueError, {"physics": None}, "physics must be given"),
    (ValueError, {"train_dataloader": None}, "train_dataloader must be given"),
    (ValueError, {"steps": 0}, "steps must be an integer >= 1"),
    (ValueError, {"steps": True}, "steps must be an integer >= 1, got True"),
    (ValueError, {"accumulate": 1.5}, "accumulate must be an integer"),
    (ValueError, {"ema_decay": 1.0}, "ema_decay must be in"),
    (ValueError, {"stage": "whole"}, r"stage must be one of \['initial', 'single', 'end_to_end'\]"),
    (ValueError, {"mixed_precision": "fp16"}, "bfloat16"),
    (ValueError, {"physics_generator": [None, None]}, "physics_generator must be one per physics"),
    (ValueError, {"train_dataloader": [None, None]}, "data loaders must be one"),
    (TypeError, {"physics": dinv.physics.SinglePhotonLidar()}, "prox_l2"),
    (TypeError, {"losses": torch.nn.MSELoss()}, "losses must be of deepinv's Loss.*got MSELoss"),
    (TypeError, {"lr_schedule": 1e-3}, "lr_schedule must be a function"),
    (TypeError, {"sigmas": [1.0]}, "sigmas must be a function"),
    (ValueError, {"eval_dataloader": [0], "eval_samples": 1, "metrics": []}, "no energy score"),
    (ValueError, {"optimizer": torch.optim.SGD([torch.ones(1)])}, "optimizer does not hold .* of the param"),
]


@pytest.mark.parametrize("error, options, message", BAD)
def test_bad_arguments_are_refused(tiny_prior, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tiny_prior, **options)


USED = {
    "model", "physics", "optimizer", "train_dataloader", "losses", "eval_dataloader", "metrics", "device",
    "online_measurements", "physics_generator", "save_path", "no_learning_method", "grad_clip", "check_grad",
    "wandb_vis", "mlflow_vis", "wandb_setup", "mlflow_setup", "ckp_interval", "eval_interval", "plot_images",
    "rescale_mode", "verbose", "show_progress_bar", "freq_update_progress_bar", "mixed_precision",
    "non_blocking_transfers",
}  # fmt: skip


def test_every_argument_of_deepinv_works_or_is_refused(tiny_prior):
    assert {field.name for field in fields(dinv.Trainer)} == USED | UNUSED.keys()
    for name, instead in UNUSED.items():
        message = re.escape(f"{name}='other' of deepinv's trainer has no use here: use {instead}")
        with pytest.raises(ValueError, match=message):
            make_trainer(tiny_prior, **{name: "other"})


def test_models_and_data_that_cannot_be_trained_are_refused(tiny_prior):
    unfolded = UnfoldedDenoiser(tiny_prior).requires_grad_(False)
    options = {"train_dataloader": DataLoader(images()), "losses": L2Loss(), "physics": mask()}
    empty = DataLoader(images(2), batch_size=3, drop_last=True)
    persistent = DataLoader(images(), batch_size=2, num_workers=1, persistent_workers=True)
    for make, error, message in (
        (lambda: DistillationTrainer(model=UD2M(unfolded), **options), ValueError, "nothing to train"),
        (lambda: DistillationTrainer(model=unfolded, **options), TypeError, "model must be UD2M"),
        (lambda: make_trainer(tiny_prior, physics=mask(0.0)).train(), ValueError, "sigma_y must be positive"),
        (lambda: make_trainer(tiny_prior, train_dataloader=empty), ValueError, "loader has no batch"),
        (lambda: make_trainer(tiny_prior, eval_dataloader=empty), ValueError, "loader has no batch"),
        (lambda: make_trainer(tiny_prior, train_dataloader=persistent).train(), ValueError, "workers=False"),
    ):
        with pytest.raises(error, match=message):
            make()


@pytest.mark.parametrize(
    "x, error, message",
    [
        ((255 * images()).byte(), TypeError, "images of a floating type, got torch.uint8"),
        (images().repeat(1, 3, 1, 1), ValueError, r"takes images with 1 channel\(s\)"),
        (images()[..., :14], ValueError, "sides that are multiples of 8"),
        (255 * images(), None, r"images in \[0, 1\].* got values from 0\.\d+ to 2"),
        (2 * images() - 1, None, r"images in \[0, 1\].* got values from -0\.9\d+ to 0\.9"),
    ],
)
def test_images_that_are_refused_or_warned_of(tiny_prior, x, error, message):
    tiny_prior.prior_info = PriorInfo("tiny", 1, 0.01, 80.0, size_multiple=8)
    trainer = make_trainer(tiny_prior, train_dataloader=DataLoader(x, batch_size=5), steps=1)
    with pytest.raises(error, match=message) if error else pytest.warns(UserWarning, match=message):
        trainer.train()


def test_a_file_in_the_place_of_the_folder_is_refused_before_the_training(tiny_prior, tmp_path):
    file = tmp_path / "results"
    file.write_text("mine")
    with pytest.raises(ValueError, match="save_path must be a folder, got the file"):
        make_trainer(tiny_prior, save_path=file)
    trainer = make_trainer(tiny_prior, save_path=file / "below")
    trainer.train_step = lambda step: pytest.fail("a step was taken")
    with pytest.raises(OSError, match="results"):
        trainer.train()
    assert file.read_text() == "mine"
