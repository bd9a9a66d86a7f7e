"""Distillation: what is trained, that it repeats and resumes to the bit, and what is refused."""

import copy
import functools
import math
import multiprocessing
import os
import pickle
import random
import signal
import struct
import time
import zipfile

import deepinv as dinv
import pytest
import torch
from deepinv.loss import Loss
from deepinv.loss.metric import PSNR
from deepinv.physics import BlurFFT, GaussianNoise, Inpainting, PoissonNoise
from deepinv.physics.functional import gaussian_blur
from deepinv.physics.generator import (
    BernoulliSplittingMaskGenerator,
    GaussianBlurGenerator,
    SigmaGenerator,
)
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M, PriorInfo, UnfoldedDenoiser, VPSchedule, add_lora
from deepinv_ud2m.lora import lora_disabled, lora_parameters, merge_lora
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    ConditionalDiscriminator,
    DistillationTrainer,
    EnergyScoreLoss,
    L2Loss,
    parameter_groups,
    warmup_cosine,
)
from deepinv_ud2m.training.checkpoint import read_checkpoint
from deepinv_ud2m.training.randomness import BatchStream, find_generators, seed_all

SHAPE = (1, 16, 16)


def images(num=10):
    return torch.rand(num, *SHAPE, generator=torch.Generator().manual_seed(0))


def two_physics():
    """Inpainting with a mask and a level per image, and a blur with a kernel per image."""
    noise = [GaussianNoise(0.05), GaussianNoise(0.05)]
    physics = [
        Inpainting(SHAPE, mask=0.5, noise_model=noise[0]),
        BlurFFT(SHAPE, filter=gaussian_blur(sigma=(1.0, 1.0)), noise_model=noise[1]),
    ]
    masks = BernoulliSplittingMaskGenerator(SHAPE, split_ratio=0.5)
    generators = [
        masks + SigmaGenerator(0.02, 0.1),
        GaussianBlurGenerator((5, 5)) + SigmaGenerator(0.02, 0.1),
    ]
    return {"physics": physics, "physics_generator": generators}


def make_trainer(prior, adversarial=False, seed=0, **options):
    """A trainer of a fresh adapter on a copy of the prior; equal arguments give equal trainers."""
    prior = copy.deepcopy(prior)
    unfolded = UnfoldedDenoiser(prior, num_iterations=2)
    torch.manual_seed(0)
    add_lora(prior, 2, targets="all-convs")
    optimizer = torch.optim.AdamW(parameter_groups(unfolded, lr=1e-2))
    defaults = {"losses": L2Loss(), "steps": 4, "verbose": False, "device": "cpu", "log_interval": 1}
    defaults["train_dataloader"] = DataLoader(images(), batch_size=3, shuffle=True)
    if adversarial:
        torch.manual_seed(1)
        defaults["D"] = ConditionalDiscriminator(1, base_channels=8, num_layers=2)
        defaults["losses"] = [EnergyScoreLoss(), AdversarialGeneratorLoss(weight=0.1)]
        defaults["losses_d"] = AdversarialDiscriminatorLoss()
        of_d = torch.optim.AdamW(defaults["D"].parameters(), lr=1e-3)
        optimizer = dinv.training.AdversarialOptimizer(optimizer, of_d)
    if "physics" not in options:
        options |= {"physics": Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(0.05))}
    options = {"optimizer": optimizer, **defaults, **options}
    return DistillationTrainer(model=UD2M(unfolded, num_steps=2), seed=seed, **options)


def everything(trainer, folder):
    """All a checkpoint holds, as one flat dictionary."""
    flat = {}

    def walk(prefix, thing):
        items = thing.items() if isinstance(thing, dict) else enumerate(thing)
        for key, value in items:
            if isinstance(value, dict | list | tuple):
                walk(f"{prefix}/{key}", value)
            else:
                flat[f"{prefix}/{key}"] = value

    walk("", read_checkpoint(folder / "checkpoint.pt"))
    return flat


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def full_options(folder, **options):
    return {
        "adversarial": True,
        "accumulate": 2,
        "grad_clip": 1.0,
        "lr_schedule": warmup_cosine(6, warmup_steps=2),
        "eval_dataloader": DataLoader(images(4), batch_size=2),
        "eval_interval": 2,
        "eval_samples": 2,
        "save_path": folder,
        "log_interval": 4,
        **two_physics(),
        **options,
    }


def test_a_compiled_prior_is_used_in_training_steps_only(tiny_prior, monkeypatch):
    """With the backend "eager", which needs no compiler and changes no bit."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_with(module, backend=backend))
    plain = make_trainer(tiny_prior).train().unfolded
    compiled = make_trainer(tiny_prior, compile=True)
    compiled.train()
    assert calls
    for a, b in zip(plain.parameters(), compiled.unfolded.parameters(), strict=True):
        assert torch.equal(a, b)
    number = len(calls)
    compiled.eval_dataloader = [DataLoader(images(2), batch_size=2)]
    compiled.evaluate()
    assert len(calls) == number
    torch.compiler.reset()


# -- What is trained ------------------------------------------------------------------------------


def test_training_moves_what_is_trainable_and_nothing_else(tiny_prior):
    trainer = make_trainer(tiny_prior)
    adapter = [p.detach().clone() for p in lora_parameters(trainer.unfolded.denoiser)]
    model = trainer.train()
    assert not any(map(torch.equal, adapter, lora_parameters(model.unfolded.denoiser)))
    assert model.unfolded.log_delta.abs().min() > 0 and model.unfolded.log_rho.abs().min() > 0
    x = images(2)
    with lora_disabled(model.unfolded.denoiser) as prior, torch.no_grad():
        assert torch.equal(prior(x, 0.1), tiny_prior(x, 0.1)), "the prior must stay as it was"
    assert not model.unfolded.denoiser.training


def test_groups_of_parameters_have_their_own_rates(tiny_prior):
    unfolded = UnfoldedDenoiser(tiny_prior, 2, initializer=torch.nn.Linear(3, 3))
    add_lora(tiny_prior, 2, targets="all-convs")
    groups = {
        g["name"]: g for g in parameter_groups(unfolded, lr=1.0, lr_scalars=2.0, lr_initializer=3.0)
    }
    assert {name: group["lr"] for name, group in groups.items()} == {
        "prior": 1.0, "scalars": 2.0, "initializer": 3.0,
    }  # fmt: skip
    assert groups["scalars"]["weight_decay"] == 0
    grouped = sum(p.numel() for group in groups.values() for p in group["params"])
    assert grouped == sum(p.numel() for p in unfolded.parameters() if p.requires_grad)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_gradients_of_the_scalars_match_differences(tiny_prior, end_to_end):
    trainer = make_trainer(tiny_prior, end_to_end=end_to_end)
    trainer.setup_train()
    trainer.unfolded.double()
    trainer.model.double()
    x = images(2).double()

    def loss():
        seed_all([5])
        physics = Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(0.05)).double()
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


def test_one_forward_of_the_generator_serves_both_updates(tiny_prior):
    trainer = make_trainer(tiny_prior, adversarial=True, step_ratio_D=2)
    trainer.setup_train()
    calls = []
    trainer.unfolded.denoiser.register_forward_hook(lambda *_: calls.append(1))
    before = [p.detach().clone() for p in trainer.D.parameters()]
    trainer.train_step(0)
    assert len(calls) == 2, "K calls for the step, both draws in each"
    assert not all(map(torch.equal, before, trainer.D.parameters()))


def test_end_to_end_draws_are_the_samples_of_the_sampler(tiny_prior, monkeypatch):
    """With all noise at zero but the operators', both are one and the same deterministic map."""
    trainer = make_trainer(tiny_prior, end_to_end=True, losses=EnergyScoreLoss(2))
    trainer.setup_train()
    trainer.model.output_range = None
    calls = []
    trainer.unfolded.denoiser.register_forward_hook(lambda *_: calls.append(1))
    physics, x = trainer.physics[0], images(3)
    y = physics(x)
    for module in ("sampler", "unfolded"):
        monkeypatch.setattr(f"deepinv_ud2m.{module}.randn", lambda like, generator=None: 0 * like)
    batch = trainer.draw(x, y, physics)
    assert len(calls) == 4, "N x K evaluations, both draws in each"
    assert batch["samples"].requires_grad
    torch.testing.assert_close(batch["samples"].detach(), trainer.model.sample(y, physics, 2))
    assert torch.equal(batch["x_net"], batch["samples"][0])


def test_a_physics_may_have_levels_of_its_own(tiny_prior, tmp_path):
    loader = DataLoader(images(3), batch_size=3)
    options = {**two_physics(), "end_to_end": True, "losses": EnergyScoreLoss(2), "save_path": tmp_path}
    options |= {"eval_dataloader": loader, "eval_interval": 1}
    levels, calls = [None, (10.0, 1.0, 0.5, 0.1)], []
    trainer = make_trainer(tiny_prior, physics_levels=levels, steps=2, **options)
    trainer.unfolded.denoiser.register_forward_hook(lambda *_: calls.append(1))

    def evaluations(of, *arguments):
        del calls[:]
        of(*arguments)
        return len(calls)

    trainer.train()
    for place, (physics, expected) in enumerate(zip(trainer.physics, (4, 8), strict=True)):  # N x K
        x = images(3)
        (step,) = (step for step in range(2) if trainer._operator(step) == place)
        assert evaluations(trainer._backward, step, 0) == expected
        assert evaluations(trainer.draw, x, physics(x), physics, place) == expected
        assert evaluations(trainer._evaluate_on, place, loader) == expected
    trainer.model.output_range = None
    assert trainer._sampler_with([1.0]).output_range is None
    for other in ([None, (10.0, 1.0)], None):
        with pytest.raises(ValueError, match="its physics_levels is"):  # another run
            make_trainer(tiny_prior, physics_levels=other, steps=3, **options).train()


def test_accumulated_gradients_are_their_mean(tiny_prior):
    gradients = []
    for micro_steps, accumulate in (([0], 1), ([1], 1), ([0, 1], 2)):
        trainer = make_trainer(tiny_prior, accumulate=accumulate)
        trainer.setup_train()
        for _ in range(micro_steps[0]):
            next(trainer._streams[0])
        for micro_step in micro_steps:
            trainer._backward(micro_step, 0)
        gradients.append([p.grad.clone() for p in trainer.trained])
    for first, second, both in zip(*gradients, strict=True):
        torch.testing.assert_close(both, (first + second) / 2)


def test_checkpointing_changes_no_gradient(tiny_prior):
    gradients = []
    for checkpointing in (False, True):
        trainer = make_trainer(tiny_prior, checkpointing=checkpointing)
        trainer.setup_train()
        trainer._backward(0, 0)
        gradients.append([p.grad for p in trainer.trained])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_the_average_follows_its_recursion(tiny_prior):
    trainer = make_trainer(tiny_prior, ema_decay=0.5)
    trainer.setup_train()
    average = trainer.trained[0].detach().clone()
    for step in range(8):
        trainer.train_step(step)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * trainer.trained[0].detach()
    torch.testing.assert_close(trainer._ema[0], average)
    last = trainer.trained[0].detach().clone()
    with trainer.averaged():
        torch.testing.assert_close(trainer.trained[0].detach(), average)
    assert torch.equal(trainer.trained[0], last)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_training_improves_the_samples_of_a_gaussian_problem(gaussian_problem, end_to_end):
    """
    Only the scalars can move: an exact denoiser has no adapter. Deterministic for its seed; the
    untrained sampler is 15 % away and a run that learns nothing cannot pass.
    """
    shape = (1, 4, 4)
    physics = Inpainting(
        shape, mask=torch.tensor([1.0, 0.0]).repeat(8).reshape(shape), noise_model=GaussianNoise(0.1)
    )
    problem = gaussian_problem(physics, shape)
    factor = torch.linalg.cholesky(problem.covariance)
    draws = torch.randn(512, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (problem.mean + draws @ factor.T).reshape(-1, *shape)
    unfolded = UnfoldedDenoiser(problem.denoiser, num_iterations=2).double()
    optimizer = torch.optim.Adam(parameter_groups(unfolded, lr_scalars=3e-2))
    trainer = DistillationTrainer(
        model=UD2M(unfolded, num_steps=2, output_range=None), physics=physics, optimizer=optimizer,
        train_dataloader=DataLoader(x, batch_size=64, shuffle=True), losses=EnergyScoreLoss(2),
        eval_dataloader=DataLoader(x[:256], batch_size=256), eval_samples=16, steps=150, device="cpu",
        verbose=False, end_to_end=end_to_end,
    )  # fmt: skip
    trainer.setup_train()
    before = trainer.evaluate()["energy score"]
    trainer.train()
    after = trainer.evaluate()["energy score"]
    assert after < 0.97 * before


# -- Randomness -----------------------------------------------------------------------------------


def test_nested_generators_are_found_and_seeded_apart():
    blur, level = GaussianBlurGenerator((5, 5)), SigmaGenerator()
    mixture = dinv.physics.generator.GeneratorMixture([blur + level, blur + level], [0.5, 0.5])
    found = find_generators([mixture, None], Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(0.1)))
    assert {id(blur.rng), id(level.rng), id(mixture.rng)} <= set(map(id, found))
    seed_all([1, 2], found)
    states = [generator.get_state() for generator in found]
    assert not torch.equal(blur.rng.get_state(), level.rng.get_state())
    seed_all([1, 3], found)
    assert not any(map(torch.equal, states, [generator.get_state() for generator in found]))
    seed_all([1, 2], found)
    assert all(map(torch.equal, states, [generator.get_state() for generator in found]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_batches_goes_on_from_any_place(workers):
    loader = DataLoader(torch.arange(7), batch_size=2, shuffle=True, num_workers=workers)
    stream = BatchStream(loader, [3])
    whole = [next(stream).tolist() for _ in range(10)]
    assert sorted(i for batch in whole[:4] for i in batch) == list(range(7)), (
        "an epoch is all of the data, once"
    )
    assert whole[:4] != whole[4:8], "and its order changes"
    for start in (0, 3, 4, 6):
        other = BatchStream(loader, [3])
        other.seek(start // 4, start % 4)
        assert [next(other).tolist() for _ in range(10 - start)] == whole[start:]


def test_every_physics_is_used_once_in_a_round(tiny_prior):
    trainer = make_trainer(tiny_prior, **two_physics())
    rounds = [{trainer._operator(2 * i), trainer._operator(2 * i + 1)} for i in range(20)]
    assert all(operators == {0, 1} for operators in rounds)
    assert {trainer._operator(2 * i) for i in range(20)} == {0, 1}, "in random order"


def test_evaluation_repeats_and_leaves_training_alone(tiny_prior, tmp_path):
    options = {"eval_dataloader": DataLoader(images(4), batch_size=2), "eval_samples": 2}
    trainer = make_trainer(tiny_prior, **two_physics(), **options)
    trainer.setup_train()
    assert trainer.evaluate() == trainer.evaluate()
    with_evaluation = make_trainer(tiny_prior, **two_physics(), **options, eval_interval=1).train()
    without = make_trainer(tiny_prior, **two_physics()).train()
    for a, b in zip(with_evaluation.unfolded.parameters(), without.unfolded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_generators_of_losses_and_levels_are_seeded_too():
    generator, other = torch.Generator(), torch.Generator()
    loss = AdversarialDiscriminatorLoss(generator=generator)
    levels = functools.partial(VPSchedule().training_levels, generator=other)
    assert set(map(id, find_generators([loss], levels))) == {id(generator), id(other)}


def test_one_loader_per_physics_resumes_before_the_second_is_used(tiny_prior, tmp_path):
    def run(folder, steps):
        loaders = [DataLoader(images(6), batch_size=2, shuffle=True) for _ in range(2)]
        options = {"train_dataloader": loaders, "save_path": folder, "steps": steps, "ckp_interval": 1}
        return make_trainer(tiny_prior, **two_physics(), **options).train()

    run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 1)
    run(tmp_path / "parts", 4)
    assert_same_bits(everything(None, tmp_path / "whole"), everything(None, tmp_path / "parts"))


def test_the_seed_decides(tiny_prior):
    def trained(seed):
        return make_trainer(tiny_prior, seed=seed).train().unfolded.log_delta

    assert torch.equal(trained(0), trained(0)) and not torch.equal(trained(0), trained(1))


# -- Checkpoints ----------------------------------------------------------------------------------


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_prior, tmp_path):
    make_trainer(tiny_prior, **full_options(tmp_path / "whole", steps=6)).train()
    make_trainer(tiny_prior, **full_options(tmp_path / "parts", steps=1)).train()
    make_trainer(tiny_prior, **full_options(tmp_path / "parts", steps=3)).train()
    trainer = make_trainer(tiny_prior, **full_options(tmp_path / "parts", steps=6))
    model = trainer.train()
    assert trainer.step_start == 3
    assert_same_bits(everything(trainer, tmp_path / "whole"), everything(trainer, tmp_path / "parts"))
    again = UD2M.from_pretrained(
        tmp_path / "whole" / "final", prior=copy.deepcopy(tiny_prior), merge=False
    )
    y = trainer.physics[0](images(2))
    trainer.physics[0].noise_model.update_parameters(sigma=torch.tensor(0.05))
    samples = [
        m(y, trainer.physics[0], generator=torch.Generator().manual_seed(0)) for m in (again, model)
    ]
    assert torch.equal(*samples)


def _train_in_a_child(prior, folder):
    torch.set_num_threads(1)
    make_trainer(prior, **full_options(folder, steps=8, ckp_interval=1)).train()


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tiny_prior, tmp_path):
    make_trainer(tiny_prior, **full_options(tmp_path / "whole", steps=8, ckp_interval=1)).train()
    context, moments, kills = multiprocessing.get_context("fork"), random.Random(0), 0
    deadline = time.time() + 60
    while time.time() < deadline:
        child = context.Process(target=_train_in_a_child, args=(tiny_prior, tmp_path / "killed"))
        child.start()
        child.join(moments.uniform(0.2, 1.2) if kills < 6 else None)
        if child.exitcode is not None:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert child.exitcode == 0 and kills > 0
    whole, killed = (everything(None, tmp_path / name) for name in ("whole", "killed"))
    assert_same_bits(whole, killed)


@pytest.mark.parametrize("damage", ["truncate", "flip", "other"])
def test_damaged_checkpoints_are_refused_and_left_alone(tiny_prior, tmp_path, damage):
    make_trainer(tiny_prior, save_path=tmp_path, steps=1).train()
    file = tmp_path / "checkpoint.pt"
    whole, moments = file.read_bytes(), random.Random(1)
    with zipfile.ZipFile(file) as archive:  # between its parts there is room that nobody reads
        part = max(archive.infolist(), key=lambda part: part.file_size)
    lengths = struct.unpack("<HH", whole[part.header_offset + 26 : part.header_offset + 30])
    start = part.header_offset + 30 + sum(lengths)
    inside = range(start, start + part.file_size)
    for _ in range(5):
        if damage == "truncate":
            file.write_bytes(whole[: moments.randrange(len(whole))])
        elif damage == "flip":
            place = moments.choice(inside)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        else:
            torch.save({"weights": torch.zeros(3)}, file)
        before = file.read_bytes()
        with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be resumed from"):
            make_trainer(tiny_prior, save_path=tmp_path, steps=2).train()
        assert file.read_bytes() == before


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_nothing_is_unpickled(tiny_prior, tmp_path):
    torch.save({"format": 1, "run": Malicious(str(tmp_path / "executed"))}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="cannot be resumed from"):
        make_trainer(tiny_prior, save_path=tmp_path).train()
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Malicious(str(tmp_path / "executed"))))
    with pytest.raises(ValueError, match="cannot be resumed from"):
        make_trainer(tiny_prior, save_path=tmp_path).train()
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_run_is_refused(tiny_prior, tmp_path):
    make_trainer(tiny_prior, save_path=tmp_path, steps=1).train()
    with pytest.raises(ValueError, match="of another run: its seed is 0, here it is 1"):
        make_trainer(tiny_prior, save_path=tmp_path, seed=1).train()
    with pytest.raises(ValueError, match="another run: its losses"):
        make_trainer(tiny_prior, save_path=tmp_path, losses=EnergyScoreLoss()).train()
    with pytest.raises(ValueError, match="another run: its prior"):
        other = copy.deepcopy(tiny_prior)
        next(other.parameters()).data += 0.1
        make_trainer(other, save_path=tmp_path).train()
    with pytest.raises(ValueError, match=r"another run: its settings is \{\}, here it is \{'tasks'"):
        make_trainer(tiny_prior, save_path=tmp_path, settings={"tasks": ["sr4"]}).train()
    for changed in ({"levels": [70.0, 0.5]}, {"levels": None}):
        with pytest.raises(ValueError, match="another run: its sampler: levels"):
            trainer = make_trainer(tiny_prior, save_path=tmp_path)
            trainer.model = UD2M(trainer.unfolded, **changed)
            trainer.train()
    make_trainer(tiny_prior, save_path=tmp_path, seed=1, resume=False, steps=3).train()
    with pytest.raises(ValueError, match=r"steps is 2, but the checkpoint .* is at step 3 already"):
        make_trainer(tiny_prior, save_path=tmp_path, seed=1, steps=2).train()


# -- Losses that are not finite -------------------------------------------------------------------


class SometimesNaN(Loss):
    """Not finite in the given steps."""

    def __init__(self, steps):
        super().__init__()
        self.bad = steps

    def forward(self, x, x_net, step, **kwargs):
        loss = (x_net - x).square().flatten(1).mean(1)
        return loss * math.nan if step in self.bad else loss


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny_prior):
    trainer = make_trainer(tiny_prior, losses=SometimesNaN({1, 3}), steps=5, max_skipped=2)
    trainer.train()
    assert trainer.skipped == 2
    assert all(parameter.isfinite().all() for parameter in trainer.trained)


def test_too_many_in_a_row_stop_training_with_the_last_good_state_saved(tiny_prior, tmp_path):
    trainer = make_trainer(
        tiny_prior, losses=SometimesNaN(range(2, 9)), steps=9, max_skipped=3, save_path=tmp_path
    )
    with pytest.raises(
        RuntimeError, match=r"not finite in 3 steps in a row, from step 2 on.*checkpoint"
    ):
        trainer.train()
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 2 and state["skipped"] == 3
    assert [scheduler["last_epoch"] for scheduler in state["schedulers"]] == [2]
    assert all(value.isfinite().all() for value in state["trained"].values())


class NaNFrom(AdversarialDiscriminatorLoss):
    """A discriminator's loss that is not finite from a step on."""

    def forward(self, step, **kwargs):
        return super().forward(**kwargs) * (math.nan if step >= 2 else 1.0)


def test_a_discriminator_that_is_not_finite_stops_training_too(tiny_prior):
    trainer = make_trainer(tiny_prior, adversarial=True, losses_d=NaNFrom(), steps=9, max_skipped=3)
    with pytest.raises(RuntimeError, match="not finite in 3 steps in a row, from step 2 on"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.D.parameters())


def test_skipped_steps_leave_no_trace_in_the_history(tiny_prior):
    trainer = make_trainer(tiny_prior, losses=SometimesNaN({1}), steps=4, log_interval=2)
    trainer.train()
    assert [step for step, _ in trainer.history["loss"]] == [2, 4]
    assert all(math.isfinite(value) for _, value in trainer.history["loss"])


# -- Evaluation, figures, deepinv -----------------------------------------------------------------


def test_evaluation_writes_history_figures_and_the_best_model(tiny_prior, tmp_path):
    trainer = make_trainer(
        tiny_prior, **full_options(tmp_path, metrics=[PSNR(), PSNR()], plot_images=True)
    )
    trainer.train()
    names = set(trainer.history)
    assert {"loss", "EnergyScoreLoss", "AdversarialGeneratorLoss", "gradient norm"} <= names
    assert {
        "D AdversarialDiscriminatorLoss",
        "eval: PSNR 1",
        "eval: PSNR 2",
        "eval: energy score",
    } <= names
    assert [step for step, _ in trainer.history["eval: energy score"]] == [2, 4]
    for name in ("curves.png", "samples_0.png", "samples_1.png", "history.json"):
        assert (tmp_path / name).stat().st_size > 100
    best = UD2M.from_pretrained(tmp_path / "best", prior=copy.deepcopy(tiny_prior))
    assert best.unfolded.num_iterations == 2


@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_noise_level_of_the_model_stands_in_in_training_too(tiny_prior, tmp_path, end_to_end):
    """As it does for samples: equal steps for a physics that states it and one that states none."""

    def history(noise_model, sigma_y, folder):
        trainer = make_trainer(
            tiny_prior,
            end_to_end=end_to_end,
            losses=EnergyScoreLoss(),
            train_dataloader=DataLoader(pairs, batch_size=3),
            online_measurements=False,
            physics=Inpainting(SHAPE, mask=0.5, noise_model=noise_model),
            eval_dataloader=DataLoader(pairs, batch_size=3),
            eval_interval=2,
            steps=2,
            plot_images=True,
            save_path=folder,
        )
        trainer.model.sigma_y = sigma_y
        trainer.train()
        return trainer.history

    x = images(6)
    torch.manual_seed(0)
    physics = Inpainting(SHAPE, mask=0.5)
    pairs = torch.utils.data.TensorDataset(x, physics.A(x) + 0.1 * torch.randn_like(x))
    torch.manual_seed(0)  # the mask
    stated = history(GaussianNoise(0.1), None, tmp_path / "stated")
    torch.manual_seed(0)
    of_model = history(PoissonNoise(0.1), 0.1, tmp_path / "of_model")
    assert stated.keys() == of_model.keys()
    for name, points in stated.items():
        assert of_model[name] == [(step, pytest.approx(value, rel=1e-4)) for step, value in points]
    assert (tmp_path / "of_model" / "samples_0.png").is_file()


def test_deepinv_test_runs_the_full_sampler(tiny_prior):
    trainer = make_trainer(tiny_prior, metrics=PSNR())
    calls = []
    trainer.unfolded.denoiser.register_forward_hook(lambda *_: calls.append(1))
    results = trainer.test(DataLoader(images(2), batch_size=2), compare_no_learning=False)
    assert math.isfinite(results["PSNR"])
    assert len(calls) == 4, "N x K evaluations"


# -- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"losses": []}, ValueError, "losses is empty"),
        ({"physics": None}, ValueError, "physics must be given"),
        ({"train_dataloader": None}, ValueError, "train_dataloader must be given"),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1"),
        ({"accumulate": 1.5}, ValueError, "accumulate must be an integer"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay must be in"),
        ({"D": torch.nn.Identity()}, ValueError, "D and losses_d belong together"),
        ({"adversarial": True, "end_to_end": True}, ValueError, "end_to_end has no level"),
        ({"physics_levels": [(1.0, 0.1)]}, ValueError, "physics_levels .* need end_to_end=True"),
        (
            {"physics_levels": [None, None], "end_to_end": True},
            ValueError,
            "physics_levels must be one per physics, 1, got 2",
        ),
        (
            {"physics_levels": [(0.1, 1.0)], "end_to_end": True},
            ValueError,
            "physics_levels: levels must be .* strictly decreasing",
        ),
        ({"mixed_precision": "fp16"}, ValueError, "bfloat16"),
        ({"compute_eval_losses": True}, ValueError, "compute_eval_losses"),
        ({"scheduler": 1}, ValueError, "scheduler is not available: use lr_schedule"),
        ({"ckpt_pretrained": "x.pt"}, ValueError, "ckpt_pretrained is not available: use save_path"),
        ({"physics_generator": [None, None]}, ValueError, "physics_generator must be one per physics"),
        ({"train_dataloader": [None, None]}, ValueError, "data loaders must be one"),
        ({"physics": dinv.physics.SinglePhotonLidar()}, TypeError, "prox_l2"),
        ({"steps": True}, ValueError, "steps must be an integer >= 1, got True"),
        ({"losses": torch.nn.MSELoss()}, TypeError, "losses must be of deepinv's Loss.*got MSELoss"),
        ({"lr_schedule": 1e-3}, TypeError, "lr_schedule must be a function"),
        ({"levels": [1.0]}, TypeError, "levels must be a function"),
        (
            {"eval_dataloader": DataLoader(images()), "eval_samples": 1, "metrics": []},
            ValueError,
            "no energy score",
        ),
    ],
)
def test_bad_arguments_are_refused(tiny_prior, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tiny_prior, **options)


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


def test_a_merged_adapter_is_refused_for_it_would_stay_as_it_is(tiny_prior):
    trainer = make_trainer(tiny_prior)
    merge_lora(trainer.unfolded.denoiser)
    options = {"physics": trainer.physics, "train_dataloader": trainer.train_dataloader[0]}
    with pytest.raises(ValueError, match=r"merged adapter.*merge=False.*unmerge_lora"):
        DistillationTrainer(model=trainer.model, losses=L2Loss(), **options)


def test_evaluation_before_training_and_without_images(tiny_prior):
    with pytest.raises(ValueError, match="give the trainer an eval_dataloader"):
        make_trainer(tiny_prior).evaluate()
    options = {"eval_dataloader": DataLoader(images(4), batch_size=2), "eval_samples": 2}
    before = make_trainer(tiny_prior, **options).evaluate()
    trainer = make_trainer(tiny_prior, **options)
    trainer.setup_train()
    assert before == trainer.evaluate()


def test_a_model_without_anything_to_train_is_refused(tiny_prior):
    unfolded = UnfoldedDenoiser(tiny_prior).requires_grad_(False)
    options = {"train_dataloader": DataLoader(images()), "losses": L2Loss(), "device": "cpu"}
    physics = Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(0.05))
    with pytest.raises(ValueError, match="nothing to train"):
        DistillationTrainer(model=UD2M(unfolded), physics=physics, **options)
    with pytest.raises(TypeError, match="model must be UD2M"):
        DistillationTrainer(model=unfolded, physics=physics, **options)


@pytest.mark.parametrize(
    "x, error, message",
    [
        ((255 * images()).byte(), TypeError, "images of a floating type, got torch.uint8"),
        (images().repeat(1, 3, 1, 1), ValueError, r"takes images with 1 channel\(s\)"),
        (images()[..., :14], ValueError, "sides are multiples of 8"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused(tiny_prior, tiny_config, x, error, message):
    tiny_prior.prior_info = PriorInfo("tiny", 1, 0.01, 80.0, size_multiple=8)
    trainer = make_trainer(tiny_prior, train_dataloader=DataLoader(x, batch_size=2))
    with pytest.raises(error, match=message):
        trainer.train()


@pytest.mark.parametrize("scale, shift, found", [(255, 0, r"0\.\d+ to 2"), (2, -1, r"-0\.9\d+ to 0\.9")])
def test_images_of_another_range_warn(tiny_prior, scale, shift, found):
    loader = DataLoader(scale * images() + shift, batch_size=5)
    with pytest.warns(UserWarning, match=rf"images in \[0, 1\].* got values from {found}"):
        make_trainer(tiny_prior, train_dataloader=loader, steps=1).train()


def test_a_noise_level_of_zero_is_refused(tiny_prior):
    physics = Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(0.0))
    with pytest.raises(ValueError, match=r"physics must have noise of a positive level, got"):
        make_trainer(tiny_prior, physics=physics).train()


def test_an_empty_dataset_is_refused(tiny_prior):
    loader = DataLoader(images(2), batch_size=3, drop_last=True)
    with pytest.raises(ValueError, match="data loader has no batch"):
        make_trainer(tiny_prior, train_dataloader=loader)
    with pytest.raises(ValueError, match="data loader has no batch"):
        make_trainer(tiny_prior, eval_dataloader=loader)


def test_an_optimizer_without_the_adapter_is_refused(tiny_prior):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"optimizer does not hold .* of the model"):
        make_trainer(tiny_prior, optimizer=optimizer)


def test_workers_that_stay_are_refused(tiny_prior):
    loader = DataLoader(images(), batch_size=2, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers=False"):
        make_trainer(tiny_prior, train_dataloader=loader).train()
