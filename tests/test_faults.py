"""
Kills at random moments, and disks of every fill level, for all that writes: nothing saved is lost.

A work writes into a folder in a child process. Half of it is done in peace; what comes then is disturbed. The
first half must be there afterwards, and the work done again must end as if nothing had happened.
"""

import contextlib
import copy
import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import sample, trained_sampler
from distillation import full_options, make_trainer
from PIL import Image
from test_benchmark import entry, study_of
from torchvision.transforms.functional import to_pil_image

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.benchmark.rows import read_rows
from deepinv_ud2m.benchmark.run import run
from deepinv_ud2m.benchmark.tune import tune
from deepinv_ud2m.cli import main
from deepinv_ud2m.data import photograph
from deepinv_ud2m.training.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow
KILLS, LEVELS, FULL = 20, 10, 3


def flat(thing, prefix=""):
    """Nested dictionaries and lists as one list of name and value; tensors as their bytes."""
    if isinstance(thing, dict | list | tuple):
        items = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return [one for key, value in items for one in flat(value, f"{prefix}/{key}")]
    return [(prefix, thing.numpy().tobytes() if isinstance(thing, torch.Tensor) else thing)]


class Work(NamedTuple):
    """
    ``do(prior, folder, whole)`` does a half or all of it; ``outcome(prior, folder)`` is what it left, in
    parts that only become more.
    """

    do: object
    outcome: object


def _train(prior, folder, whole):
    make_trainer(prior, **full_options(folder / "run", steps=6 if whole else 3, ckp_interval=1)).train()


def _trained(prior, folder):
    file = folder / "run" / "checkpoint.pt"
    if not file.exists():
        return []
    state = read_checkpoint(file)
    steps = [("step", step) for step in range(state["step"])]
    if state["step"] < 6:
        return steps
    model = UD2M.from_pretrained(folder / "run" / "final", prior=copy.deepcopy(prior), merge=False)
    return [*steps, *flat(state), *flat(model.unfolded.state())]


def _sampler(folder, seed):
    return trained_sampler(load_prior(folder / "prior"), seed=seed)


def _save(prior, folder, whole):
    if not (folder / "prior").exists():
        shutil.copytree(prior.folder, folder / "prior")
    _sampler(folder, int(whole)).save_pretrained(folder / "sampler", prior=folder / "prior")


def _saved(prior, folder):
    if not (folder / "sampler" / "config.json").exists():
        return []
    found = sample(UD2M.from_pretrained(folder / "sampler", merge=False))
    known = [sample(_sampler(folder, seed)) for seed in range(2)]
    which = [torch.equal(found, one) for one in known].index(True)
    return [("saved", i) for i in range(which + 1)]


def _compare(prior, folder, whole):
    run(folder / "rows", study_of(prior, ["ud2m", "pinv"] if whole else ["ud2m"], images=6 if whole else 4))


def _compared(prior, folder):
    rows = read_rows(folder / "rows") if (folder / "rows").exists() else []
    rows = rows.drop(columns="seconds").to_dict("records") if len(rows) else []
    return sorted((row["method"], str(row)) for row in rows)


def _search(prior, folder, whole):
    methods = [entry("ud2m"), entry("dps")] if whole else [entry("ud2m")]
    tune(folder / "search.json", study_of(prior, methods, images=2))


def _searched(prior, folder):
    file = folder / "search.json"
    scores = json.loads(file.read_text())["scores"]["sr4"] if file.exists() else {}
    return [(method, str(one)) for method in scores for one in scores[method]]


def _restore(prior, folder, whole):
    pictures = prior.folder.parent / f"pictures {whole}"
    pictures.mkdir(exist_ok=True)
    for i in range(1 + whole):
        x = photograph("astronaut")[0, :, 100 + 8 * i :, 100:][:, :32, :32]
        to_pil_image(x).save(pictures / f"{i}.png")
    options = ["--task", "denoise", "--noise", "0.05", "--samples", "2", "--out", str(folder / "out")]
    if main(["restore", str(pictures), *options]):
        raise OSError(errno.ENOSPC, "restore ended with an error that it has told")


def _restored(prior, folder):
    out = folder / "out"
    done = sorted(file.stem for file in out.glob("*.json"))
    files = [file for name in done for file in sorted(out.glob(f"{name}*.png"))]
    for file in files:
        Image.open(file).verify()
    return [(file.name, file.read_bytes()) for file in files]


WORKS = {
    "training": Work(_train, _trained),
    "saving": Work(_save, _saved),
    "benchmark": Work(_compare, _compared),
    "search": Work(_search, _searched),
    "restoring": Work(_restore, _restored),
}


def in_a_child(work, prior, folder, whole, log):
    def target():
        torch.set_num_threads(1)
        with open(log, "w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            try:
                work.do(prior, folder, whole)
            except Exception as error:
                traceback.print_exc(file=stream)
                stream.flush()
                os._exit(FULL if getattr(error, "errno", None) == errno.ENOSPC else 1)

    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    return child


def finish(work, prior, folder, whole, log):
    child = in_a_child(work, prior, folder, whole, log)
    child.join(240)
    assert child.exitcode == 0, Path(log).read_text()[-3000:]
    return work.outcome(prior, folder)


def remains(folder):
    """Files that only exist while another one is written."""
    return [file for file in folder.rglob(".*.*") if file.is_file() and not file.name.endswith(".lock")]


@pytest.fixture
def prior(tiny_prior, tiny_folder):
    tiny_prior.folder = tiny_folder
    return tiny_prior


@pytest.mark.parametrize("name", WORKS)
def test_kills(name, prior, tmp_path):
    work, moments, log = WORKS[name], random.Random(name), tmp_path / "log"
    (tmp_path / "whole").mkdir()
    finish(work, prior, tmp_path / "whole", False, log)
    start = time.monotonic()
    whole = finish(work, prior, tmp_path / "whole", True, log)
    duration, kills, rounds = time.monotonic() - start, 0, 0
    while kills < KILLS:
        folder, rounds = tmp_path / f"killed {rounds}", rounds + 1
        folder.mkdir()
        before = finish(work, prior, folder, False, log)
        assert before
        while kills < KILLS:
            child = in_a_child(work, prior, folder, True, log)
            child.join(moments.uniform(0, duration))
            if child.exitcode is not None:
                assert child.exitcode == 0, log.read_text()[-3000:]
                break
            child.kill()
            child.join()
            kills += 1
            after = work.outcome(prior, folder)
            assert set(before) <= set(after), f"lost by kill {kills}"
            before = after
        assert finish(work, prior, folder, True, log) == whole
        if name == "training":
            assert not remains(folder / "run")
    print(f"{name}: {kills} kills in {rounds} runs")


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", WORKS)
def test_full_disks(name, prior, tmp_path, disk):
    work, log = WORKS[name], tmp_path / "log"
    used = []
    for whole in (False, True):
        (disk / "whole").mkdir(exist_ok=True)
        outcome = finish(work, prior, disk / "whole", whole, log)
        used.append(shutil.disk_usage(disk).used)
    shutil.rmtree(disk / "whole")
    needed, refused = used[1] - used[0] + 65536, 0  # what is written anew, and temporary files
    for level in range(LEVELS):
        folder = disk / f"level {level}"
        folder.mkdir()
        before = finish(work, prior, folder, False, log)
        free = shutil.disk_usage(disk).free - needed * level // LEVELS
        with open(disk / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, free)
        child = in_a_child(work, prior, folder, True, log)
        child.join(240)
        assert child.exitcode in (0, FULL), log.read_text()[-3000:]
        refused += child.exitcode == FULL
        if child.exitcode == FULL:
            assert "No space left on device" in log.read_text()
            assert str(folder) in log.read_text(), "the message names the file"
        assert not remains(folder), log.read_text()
        assert set(before) <= set(work.outcome(prior, folder)), f"lost at level {level}"
        (disk / "filler").unlink()
        assert finish(work, prior, folder, True, log) == outcome, f"level {level}"
        shutil.rmtree(folder)
    assert refused >= 1
    print(f"{name}: {refused} of {LEVELS} levels were too full")
