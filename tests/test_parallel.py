"""Training and the benchmark in several processes, through torchrun on a CPU, against one."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepinv_ud2m import UD2M
from deepinv_ud2m.training.checkpoints import read_checkpoint

WORKER = """
import json, math, os, signal, sys, time
from datetime import timedelta
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from deepinv_ud2m import UD2M, PriorInfo, UnfoldedDenoiser, add_lora
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.physics import make_generator, make_physics
from deepinv_ud2m.priors import build_network
from deepinv_ud2m.training import *

folder, config, steps, options = sys.argv[1], *map(json.loads, sys.argv[2:])
torch.set_num_threads(1)
PartialState(cpu=True, timeout=timedelta(seconds=float(os.environ.get("TIMEOUT", 60))))
fault, rank = os.environ.get("FAULT"), int(os.environ.get("RANK", 0))


class Loss(EnergyScoreLoss):
    def forward(self, epoch, micro_step, **batch):
        bad = fault == "not finite" and micro_step in (5, 10)  # of the second process, and of the first
        return super().forward(**batch) * (math.nan if bad else 1.0)


torch.manual_seed(0)
prior = build_network(config)
for parameter in prior.parameters():
    if not parameter.any():
        parameter.data.normal_(std=0.02)
prior.prior_info = PriorInfo(**config["prior"])
unfolded = UnfoldedDenoiser(prior, 2)
torch.manual_seed(rank)  # all start from the adapter and the discriminator of the first
add_lora(prior, 2, targets="all-convs")
D = ConditionalDiscriminator(1, base_channels=8, num_layers=2)
tasks = ["inpaint-random", "deblur-gaussian", "jpeg-10"]
trainer = DistillationTrainer(
    model=UD2M(unfolded, 2),
    physics=[make_physics(task, (1, 32, 32)) for task in tasks],
    physics_generator=[make_generator(task, (1, 32, 32)) for task in tasks],
    train_dataloader=DataLoader(mnist_digits("test", num=20), batch_size=2, shuffle=True),
    eval_dataloader=DataLoader(mnist_digits("validation", num=6), batch_size=2),
    losses=[Loss(2), AdversarialGeneratorLoss(weight=0.1)],
    adversary=Adversary(D, optimizer=torch.optim.SGD(D.parameters(), lr=1e-2)),
    optimizer=torch.optim.SGD(parameter_groups(unfolded, lr=1e-2), momentum=0.9),
    steps=steps, eval_interval=2, ckp_interval=2, log_interval=1, verbose=False, device="cpu",
    save_path=folder if rank == 0 else folder + "-of-another-node", **{"accumulate": 2, **options},
)
step_of_trainer = trainer.train_step


def train_step(step):
    if step == 3 and rank == 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "silent":
            time.sleep(600)
    return step_of_trainer(step)


trainer.train_step = train_step
trainer.train()
PartialState().destroy_process_group()
"""


RECIPE = """
import sys
import deepinv as dinv
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.training import Recipe, Stage, distill

small = {"sigmas": [78.7, 0.2], "delta": [2.0], "rho": [2.0], "initial": "wiener", "factors": [0.9, 1.0]}
small |= {"evaluations": 1, "validation_images": 4, "validation_samples": 2}
recipe = Recipe([Stage("single", 2, 2, accumulate=2)], **small)
physics = dinv.physics.Inpainting((1, 32, 32), mask=0.3, noise_model=dinv.physics.GaussianNoise(0.05))
model = distill("mnist", [physics], mnist_digits(num=16), recipe, sys.argv[1], device="cpu")
print(model.unfolded.log_delta.tolist(), flush=True)
"""


def launch(arguments: list, processes: int, nodes: int = 1, **env) -> list[subprocess.CompletedProcess]:
    """The nodes are all this machine."""
    env = {"OMP_NUM_THREADS": "1", **env}
    launchers = [[]]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes // nodes}"]
        launchers = [[*torchrun, "--standalone"]]
    if nodes > 1:
        with socket.socket() as server:
            server.bind(("", 0))
            where = ["--master_addr=localhost", f"--master_port={server.getsockname()[1]}"]
        launchers = [[*torchrun, f"--nnodes={nodes}", f"--node_rank={i}", *where] for i in range(nodes)]
    started = [
        subprocess.Popen(
            [sys.executable, *launcher, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env,
        )
        for launcher in launchers
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def train(folder: Path, config: dict, processes: int, steps: int = 4, nodes: int = 1, env=None, **options):
    script = folder.parent / "worker.py"
    script.write_text(WORKER)
    arguments = [script, folder, json.dumps(config), steps, json.dumps(options)]
    return launch(arguments, processes, nodes, **(env or {}))


def trained(folder: Path) -> dict:
    state = read_checkpoint(folder / "checkpoint.pt")
    parts = {"trained": state["trained"], "average": state["average"], "D": state["adversary"]["D"]}
    flat = {f"{part}/{name}": value for part, of in parts.items() for name, value in of.items()}
    # Vectors of the power iteration of spectral normalisation move with every batch a process sees.
    return {name: value for name, value in flat.items() if not name.endswith(("._u", "._v"))}


def assert_equal_runs(a: Path, b: Path):
    a_trained, b_trained = trained(a), trained(b)
    assert a_trained.keys() == b_trained.keys() and len(a_trained) > 20
    for name, value in a_trained.items():
        assert torch.allclose(b_trained[name], value, rtol=0, atol=1e-5), name
    a_history, b_history = (json.loads((f / "history.json").read_text()) for f in (a, b))
    assert a_history.keys() == b_history.keys() and any(name.startswith("eval") for name in a_history)
    for name, points in a_history.items():
        for (step, value), (step_b, value_b) in zip(points, b_history[name], strict=True):
            assert step == step_b and value_b == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("fault", ["", "not finite"])
def test_two_processes_equal_one(tmp_path, tiny_config, nodes, fault):
    """
    Weights, averages, discriminator and all that is logged, where one goes on with the run of two; and
    where a loss is not finite in one process alone, which all skip.
    """
    env = {"FAULT": fault}
    for run, stages in {"one": [(1, 1, 6)], "two": [(2, nodes, 3), (1, 1, 4), (2, nodes, 6)]}.items():
        for processes, on, steps in stages:
            for result in train(tmp_path / run, tiny_config, processes, steps, on, env):
                assert result.returncode == 0, result.stderr
    # The second factors of the adapter start at zero: they moved by a thousand times what is tolerated.
    moved = [v.abs().max() for name, v in trained(tmp_path / "one").items() if "lora.1" in name]
    assert max(moved) > 1e-2
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    skipped = [read_checkpoint(tmp_path / run / "checkpoint.pt")["skipped"] for run in ("one", "two")]
    assert skipped == [[2 if fault else 0, 1 if fault else 0]] * 2
    assert not (tmp_path / "two-of-another-node").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "silent"])
def test_a_process_that_is_lost_ends_the_others(tmp_path, tiny_config, fault):
    """Soon, or after the time-out of the group; the last checkpoint is whole, and the run goes on."""
    (result,) = train(tmp_path / "run", tiny_config, 2, env={"FAULT": fault, "TIMEOUT": "15"})
    assert result.returncode != 0
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    (result,) = train(tmp_path / "run", tiny_config, 1)
    assert result.returncode == 0, result.stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_divide_the_batches(tmp_path, tiny_config):
    (result,) = train(tmp_path / "run", tiny_config, 2, accumulate=3)
    assert result.returncode != 0
    message = "accumulate must be a multiple of the number of processes, 2"
    assert message in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_recipe_in_two_processes(tmp_path):
    """The first one alone writes; all return the same sampler, that of one process up to rounding."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    found = {}
    for processes in (1, 2):
        (run,) = launch([tmp_path / "recipe.py", tmp_path / str(processes)], processes)
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("factor of delta:   0%") == 1, "one process shows the progress"
        lines = {line for line in run.stdout.splitlines() if line.startswith("[")}
        assert len(lines) == 1, "the same in all processes"
        found[processes] = UD2M.from_pretrained(tmp_path / str(processes) / "model").unfolded.state()
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, rtol=0, atol=2e-3, msg=name)


@pytest.mark.slow
def test_the_benchmark_in_two_processes(tmp_path):
    options = [
        "run",
        "--tasks",
        "inpaint-random",
        "--methods",
        "pinv",
        "ud2m",
        "--images",
        "5",
        "--batch-size",
        "2",
    ]
    rows = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        module = ["-m", "deepinv_ud2m.benchmark", *options, "--out", folder]
        (result,) = launch(module, processes)
        assert result.returncode == 0, result.stderr
        with open(folder / "rows.csv") as file:
            rows[processes] = [row | {"seconds": None} for row in csv.DictReader(file)]
    assert len(rows[1]) == 10 and rows[1] == rows[2]
    assert (tmp_path / "2" / "report.md").read_text().count("ud2m") > 0
