"""Runs of a distillation: they repeat, resume to the bit, and lose nothing that was saved."""

import copy
import errno
import multiprocessing
import os
import pickle
import random
import signal
import struct
import time
import zipfile

import deepinv as dinv
import numpy as np
import pytest
import torch
from conftest import Bomb, seeded
from deepinv.physics import GaussianNoise, Inpainting
from deepinv.physics.generator import GaussianBlurGenerator, GeneratorMixture, SigmaGenerator
from distillation import (
    SHAPE,
    Recorder,
    equal,
    eval_images,
    full_options,
    images,
    make_adversary,
    make_trainer,
    mask,
    two_physics,
    values_of,
)
from torch.utils.data import DataLoader, DistributedSampler

from deepinv_ud2m import UD2M
from deepinv_ud2m.metrics import energy_score, spread_skill_ratio
from deepinv_ud2m.physics import JointGenerator
from deepinv_ud2m.training import DiversityController, EnergyScoreLoss, L2Loss
from deepinv_ud2m.training.checkpoints import lock, read_checkpoint
from deepinv_ud2m.training.randomness import BatchStream, find_generators, seed_all


def checkpoint(folder):
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
    a, b = checkpoint(a), checkpoint(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


@pytest.mark.parametrize("together", [lambda a, b: a + b, JointGenerator], ids=["sum", "joint"])
def test_nested_generators_are_found_and_seeded_apart(together):
    blur, level = GaussianBlurGenerator((5, 5)), SigmaGenerator()
    parts = together(blur, level)
    mixture = GeneratorMixture([parts, parts], [0.5, 0.5])
    of_physics, of_loss = torch.Generator(), dinv.loss.RandomLossScheduler(L2Loss())
    physics = Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(0.1, rng=of_physics))
    stack = dinv.physics.StackedLinearPhysics([physics, mask()])
    found = find_generators([mixture, None], stack, [of_loss], [registered := torch.Generator()])
    expected = [blur.rng, level.rng, mixture.rng, of_physics, of_loss.rng, registered]
    assert {*map(id, expected)} <= {*map(id, found)} and len(found) == len({*map(id, found)})
    states = {}
    for key in ([1, 2], [1, 3], [1, 2]):
        seed_all(key, found)
        now = [generator.get_state() for generator in found]
        before = states.setdefault(tuple(key), now)
        assert equal(before, now)
    assert not any(map(torch.equal, *states.values()))
    assert not torch.equal(blur.rng.get_state(), level.rng.get_state())


def test_what_a_function_holds_can_be_registered(tiny_prior):
    def sigmas(batch_size):
        return 0.1 + torch.rand(batch_size, generator=generator)

    def trained(generators):
        generator.seed()
        trainer = make_trainer(tiny_prior, sigmas=sigmas, generators=generators)
        trainer.train()
        return values_of(trainer)

    generator = torch.Generator()
    assert equal(trained([generator]), trained([generator]))
    assert not equal(trained([]), trained([]))


def test_numpy_and_python_are_seeded_in_each_step(tiny_prior):
    draws = []
    for _ in range(2):
        trainer = make_trainer(tiny_prior, losses=Recorder())
        trainer.train()
        draws.append(trainer.losses[0].draws)
        np.random.seed(None), random.seed()  # noqa: NPY002
    assert draws[0] == draws[1] and len({x for pair in draws[0] for x in pair}) == 8


@pytest.mark.parametrize("kind", ["shuffle", "workers", "epochs"])
def test_a_stream_of_batches_goes_on_from_any_place(kind):
    data = torch.arange(7)
    options = {"shuffle": True, "num_workers": int(kind == "workers")}
    if kind == "epochs":  # a sampler whose order follows from its set_epoch
        options = {"sampler": DistributedSampler(data, num_replicas=1, rank=0)}
    loader = DataLoader(data, batch_size=2, **options)
    stream = BatchStream(loader, [3])
    whole = [next(stream).tolist() for _ in range(10)]
    assert sorted(i for batch in whole[:4] for i in batch) == list(range(7)), "an epoch is all data, once"
    assert whole[:4] != whole[4:8], "and its order changes"
    for start in (0, 3, 4, 6):
        other = BatchStream(loader, [3])
        other.seek(start // 4, start % 4)
        assert [next(other).tolist() for _ in range(10 - start)] == whole[start:]


def test_every_physics_is_used_once_in_a_round(tiny_prior):
    trainer = make_trainer(tiny_prior, **two_physics(), steps=40)
    order = []
    trainer.draw = lambda x, y, physics, draw=trainer.draw: (order.append(physics), draw(x, y, physics))[1]
    trainer.train()
    rounds = list(zip(order[::2], order[1::2], strict=True))
    assert all({*physics} == {*trainer.physics} for physics in rounds)
    assert {first for first, _ in rounds} == {*trainer.physics}, "in random order"


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_prior, tmp_path):
    make_trainer(tiny_prior, **full_options(tmp_path / "whole", steps=6)).train()
    for steps in (1, 3):
        make_trainer(tiny_prior, **full_options(tmp_path / "parts", steps=steps)).train()
    trainer = make_trainer(tiny_prior, **full_options(tmp_path / "parts", steps=6))
    trainer.setup_train()
    assert trainer.completed == 3
    model = trainer.train()
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    prior = copy.deepcopy(tiny_prior)
    again = UD2M.from_pretrained(tmp_path / "whole" / "final", prior=prior, merge=False)
    y, physics = mask()(images(2)), mask()
    samples = [m(y, physics, generator=seeded(0)) for m in (again, model)]
    assert torch.equal(*samples)


def test_one_loader_per_physics_resumes_before_the_second_is_used(tiny_prior, tmp_path):
    for folder, steps in (("whole", 4), ("parts", 1), ("parts", 4)):
        loaders = [DataLoader(images(6), batch_size=2, shuffle=True) for _ in range(2)]
        options = {"train_dataloader": loaders, "save_path": tmp_path / folder, "ckp_interval": 1}
        make_trainer(tiny_prior, **two_physics(), **options, steps=steps).train()
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_weights_of_losses_may_change_between_steps(tiny_prior, tmp_path):
    """As a controller changes them; the run is still the same."""
    physics = mask()
    for steps in (1, 2):
        losses = EnergyScoreLoss(diversity_weight={physics: 1.0})
        trainer = make_trainer(tiny_prior, physics=physics, losses=losses, steps=steps, save_path=tmp_path)
        trainer.log_metrics_mlops = lambda *a, w=losses.diversity_weight, **k: w.update({physics: 1.1})
        trainer.train()
    assert trainer.completed == 2 and losses.diversity_weight[physics] == 1.1


def test_a_trainer_goes_on_after_its_controller_acted(tiny_prior, tmp_path):
    """Also if it evaluates before it trains, or trains again with more steps."""

    def trainer(steps):
        physics = mask()
        controller = DiversityController([physics], kappa=0.5)
        return make_trainer(
            tiny_prior,
            physics=physics,
            controller=controller,
            losses=EnergyScoreLoss(diversity_weight=controller.weights),
            eval_dataloader=DataLoader(images(2), 2),
            sample_metrics={"energy score": energy_score, "spread-skill ratio": spread_skill_ratio},
            eval_interval=1,
            steps=steps,
            save_path=tmp_path,
        )

    first = trainer(2)
    first.train()
    assert first.controller.state() != [1.0]
    first.steps = 3
    first.train()
    again = trainer(4)
    again.evaluate()
    again.train()
    assert again.completed == 4


def in_a_child(function, *arguments):
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    return child


def _train_in_a_child(prior, folder, killed_in_write=None):
    torch.set_num_threads(1)
    if killed_in_write:
        calls, replace = [], os.replace

        def kill(*arguments):
            calls.append(arguments)
            if len(calls) == killed_in_write:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(*arguments)

        os.replace = kill
    make_trainer(prior, **full_options(folder, steps=6, ckp_interval=1)).train()


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tiny_prior, tmp_path):
    """At random moments, and where a file that was written is about to take its place."""
    make_trainer(tiny_prior, **full_options(tmp_path / "whole", steps=6, ckp_interval=1)).train()
    moments, kills, deadline = random.Random(0), 0, time.time() + 90
    while time.time() < deadline:
        in_write = moments.randint(1, 5) if kills % 2 and kills < 5 else None
        child = in_a_child(_train_in_a_child, tiny_prior, tmp_path / "killed", in_write)
        child.join(moments.uniform(0.2, 1.2) if kills < 5 and not in_write else None)
        if child.exitcode == 0:
            break
        child.kill()
        child.join()
        kills += 1
    assert child.exitcode == 0 and kills > 1
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".checkpoint.pt.*"))


def test_a_disk_that_is_full_leaves_what_was_there(tiny_prior, tmp_path, monkeypatch):
    make_trainer(tiny_prior, save_path=tmp_path, steps=1).train()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def fsync(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as error:
        patch.setattr(os, "fsync", fsync)
        make_trainer(tiny_prior, save_path=tmp_path, steps=2).train()
    assert error.value.errno == errno.ENOSPC and "checkpoint.pt cannot be written" in str(error.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "checkpoint.pt", "final", "history.json"}
    make_trainer(tiny_prior, save_path=tmp_path, steps=2).train()


def test_one_run_per_folder(tiny_prior, tmp_path):
    trainer = make_trainer(tiny_prior, save_path=tmp_path)
    with lock(tmp_path), pytest.raises(RuntimeError, match=f"training run is using the folder {tmp_path}"):
        trainer.train()
    assert {file.name for file in tmp_path.iterdir()} == {".lock"}
    trainer.train()


@pytest.fixture
def ctrl_c():
    """It interrupts, also where the tests run in the background, which ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_writes_the_last_complete_step(tiny_prior, tmp_path, capsys):
    def make(folder):
        options = {"eval_dataloader": eval_images(), "eval_interval": 2}
        options |= {"save_path": tmp_path / folder, "log_interval": 2, "ckp_interval": 100}
        return make_trainer(tiny_prior, adversarial=True, **options)

    def interrupting(function, nth):
        calls = []

        def call(*arguments, **keywords):
            calls.append(1)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGINT)
            return function(*arguments, **keywords)

        return call

    make("whole").train()
    for moment, expected in {"loss": 2, "update": 3, "evaluation": 2, "export": 2}.items():
        trainer = make(moment)
        if moment == "loss":
            trainer.losses[0].forward = interrupting(trainer.losses[0].forward, nth=3)
        elif moment == "update":
            trainer.optimizer.step = interrupting(trainer.optimizer.step, nth=3)
        elif moment == "evaluation":
            trainer.sample_metrics = {"energy score": interrupting(energy_score, nth=1)}
        else:
            trainer.model.save_pretrained = interrupting(trainer.model.save_pretrained, nth=1)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert f"interrupted; step {expected} is in {tmp_path / moment}" in capsys.readouterr().out
        assert read_checkpoint(tmp_path / moment / "checkpoint.pt")["step"] == expected
        make(moment).train()
        assert_same_bits(tmp_path / "whole", tmp_path / moment)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_of_the_first_step_promises_nothing(tiny_prior, tmp_path, capsys):
    trainer = make_trainer(tiny_prior, save_path=tmp_path)
    trainer.draw = lambda *_: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "checkpoint.pt").exists() and "interrupted" not in capsys.readouterr().out


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


def test_nothing_is_unpickled(tiny_prior, tmp_path):
    file, bomb = tmp_path / "checkpoint.pt", Bomb(tmp_path / "executed")
    torch.save({"format": 2, "run": bomb}, file)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be resumed from"):
            make_trainer(tiny_prior, save_path=tmp_path).train()
        file.write_bytes(pickle.dumps(bomb))
    assert not bomb.trace.exists()


def test_a_checkpoint_of_another_run_is_refused(tiny_prior, tmp_path):
    def refused(message, prior=tiny_prior, **options):
        with pytest.raises(ValueError, match=message):
            make_trainer(prior, save_path=tmp_path, **options).train()

    make_trainer(tiny_prior, save_path=tmp_path, steps=1).train()
    refused("of another run: its seed is 0, here it is 1", seed=1)
    refused("another run: its losses", losses=EnergyScoreLoss())
    refused("another run: its stage is single, here it is end_to_end", stage="end_to_end")
    refused("another run: its adversary is None", adversary=make_adversary())
    refused(r"another run: its settings is \{\}, here it is \{'tasks'", settings={"tasks": ["sr4"]})
    other = copy.deepcopy(tiny_prior)
    next(other.parameters()).data += 0.1
    refused("another run: its prior", prior=other)
    with pytest.raises(ValueError, match="another run: its sampler: sigmas"):
        trainer = make_trainer(tiny_prior, save_path=tmp_path)
        trainer.model = UD2M(trainer.unfolded, sigmas=[70.0, 0.5])
        trainer.train()
    make_trainer(tiny_prior, save_path=tmp_path, seed=1, resume=False, steps=3).train()
    refused(r"steps is 2, but the checkpoint .* is at step 3 already", seed=1, steps=2)
