"""The trainer in two processes, through torchrun, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepinv_ud2m.training.checkpoint import read_checkpoint

WORKER = """
import datetime, json, os, signal, sys, time
import deepinv as dinv
import torch
from torch.utils.data import DataLoader
from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora
from deepinv_ud2m.benchmark.tasks import make_generator, make_physics
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.priors import PriorInfo, build_network
from deepinv_ud2m.training import (
    AdversarialDiscriminatorLoss, AdversarialGeneratorLoss, ConditionalDiscriminator,
    DistillationTrainer, EnergyScoreLoss, parameter_groups,
)

folder, config, steps, options = sys.argv[1], *map(json.loads, sys.argv[2:])
torch.set_num_threads(1)
if "LOCAL_RANK" in os.environ:
    seconds = float(os.environ.get("TIMEOUT", 60))
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
torch.manual_seed(0)
prior = build_network(config)
for parameter in prior.parameters():
    if not parameter.any():
        parameter.data.normal_(std=0.02)
prior.prior_info = PriorInfo(**config["prior"])
unfolded = UnfoldedDenoiser(prior, 2)
add_lora(prior, 2, targets="all-convs")
D = ConditionalDiscriminator(1, base_channels=8, num_layers=2)
tasks = ["inpaint-random", "deblur-gaussian", "jpeg-10"]
trainer = DistillationTrainer(
    model=UD2M(unfolded, 2),
    physics=[make_physics(task, (1, 32, 32)) for task in tasks],
    physics_generator=[make_generator(task, (1, 32, 32)) for task in tasks],
    train_dataloader=DataLoader(mnist_digits("test", num=20), batch_size=2, shuffle=True),
    eval_dataloader=DataLoader(mnist_digits("validation", num=6), batch_size=2),
    losses=[EnergyScoreLoss(2), AdversarialGeneratorLoss(weight=0.1)],
    losses_d=AdversarialDiscriminatorLoss(),
    D=D,
    optimizer=dinv.training.AdversarialOptimizer(
        torch.optim.SGD(parameter_groups(unfolded, lr=1e-2), momentum=0.9),
        torch.optim.SGD(D.parameters(), lr=1e-2),
    ),
    steps=steps, eval_interval=2, ckp_interval=2, log_interval=1, save_path=folder, verbose=False,
    device="cpu", **{"accumulate": 2, **options},
)
fault = os.environ.get("FAULT")
if fault and torch.distributed.get_rank() == 1:
    step_of_trainer = trainer.train_step

    def train_step(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL) if fault == "killed" else time.sleep(600)
        return step_of_trainer(step)

    trainer.train_step = train_step
trainer.train()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def train(folder: Path, config: dict, processes: int, steps: int = 4, env=None, **options):
    script = folder.parent / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(script), str(folder), json.dumps(config), str(steps), json.dumps(options)]
    return run(command, env or {})


def run(command: list[str], env: dict):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )


def trained(folder: Path) -> dict:
    state = read_checkpoint(folder / "checkpoint.pt")
    parts = {"trained": state["trained"], "average": state["average"], "D": state["D"]}
    flat = {f"{part}/{name}": value for part, of in parts.items() for name, value in of.items()}
    # Vectors of the power iteration of spectral normalisation move with every batch a process sees.
    return {name: value for name, value in flat.items() if not name.endswith(("._u", "._v"))}


def assert_equal_runs(a: Path, b: Path):
    a_trained, b_trained = trained(a), trained(b)
    assert a_trained.keys() == b_trained.keys() and len(a_trained) > 20
    for name, value in a_trained.items():
        torch.testing.assert_close(
            b_trained[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    a_history, b_history = (json.loads((f / "history.json").read_text()) for f in (a, b))
    assert a_history.keys() == b_history.keys() and any(name.startswith("eval") for name in a_history)
    for name, points in a_history.items():
        for (step, value), (step_b, value_b) in zip(points, b_history[name], strict=True):
            assert step == step_b and value_b == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, tiny_config):
    """Weights, averages, discriminator and all that is logged, where one goes on with the run of two."""
    for run, stages in {"one": [(1, 4)], "two": [(2, 3), (1, 4)]}.items():
        for processes, steps in stages:
            result = train(tmp_path / run, tiny_config, processes, steps)
            assert result.returncode == 0, result.stderr
    # The second factors of the adapter start at zero: they moved by a thousand times what is tolerated.
    moved = [v.abs().max() for name, v in trained(tmp_path / "one").items() if "lora_B" in name]
    assert max(moved) > 1e-2
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "silent"])
def test_a_process_that_is_lost_ends_the_others(tmp_path, tiny_config, fault):
    """Soon, or after the time-out of the group; the last checkpoint is whole, and the run goes on."""
    result = train(tmp_path / "run", tiny_config, 2, env={"FAULT": fault, "TIMEOUT": "15"})
    assert result.returncode != 0
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    result = train(tmp_path / "run", tiny_config, 1)
    assert result.returncode == 0, result.stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4


@pytest.mark.slow
def test_the_benchmark_in_two_processes(tmp_path):
    options = [
        *("run", "--tasks", "inpaint-random", "--methods", "pinv", "diffpir:num_steps=2"),
        *("ud2m:num_steps=1,num_iterations=1", "--images", "5", "--batch-size", "2"),
    ]
    rows = {}
    for processes in (1, 2):
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        folder = tmp_path / str(processes)
        command = [
            sys.executable,
            "-m",
            *launcher,
            "deepinv_ud2m.benchmark",
            *options,
            "--out",
            str(folder),
        ]
        result = run(command, {})
        assert result.returncode == 0, result.stderr
        lines = (folder / "rows.jsonl").read_text().splitlines()
        costs = ("seconds", "peak_memory_gb")
        rows[processes] = [
            {name: value for name, value in json.loads(line).items() if name not in costs}
            for line in lines
        ]
    assert len(rows[1]) == 15 and rows[1] == rows[2]
    assert (tmp_path / "2" / "report.md").read_text().count("diffpir") > 0
    refused = run([*command[:-2], "--out", str(tmp_path / "2"), "--seed", "1"], {})
    assert refused.returncode != 0 and "results of another setup" in refused.stderr


def test_a_number_of_processes_that_does_not_divide_the_batches(tmp_path, tiny_config):
    result = train(tmp_path / "run", tiny_config, 2, accumulate=3)
    assert result.returncode != 0
    message = "accumulate must be a multiple of the number of processes, 2"
    assert message in result.stderr and not (tmp_path / "run").exists()
