"""Checkpoints of a training run: written whole or not at all, and read without unpickling objects."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import textwrap
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm

from deepinv_ud2m.checkpoint import describe
from deepinv_ud2m.files import write_file
from deepinv_ud2m.training.randomness import parts_of_sum

if TYPE_CHECKING:
    from deepinv_ud2m.training.trainer import DistillationTrainer

FORMAT = 2

# Attributes of modules that say where and in which state they are, not what they are.
_PASSING = ("_", "training", "device", "factory_kwargs", "initial_random_state")


def write_checkpoint(state: dict, file: Path) -> None:
    """Write nested dictionaries and lists of tensors, numbers and strings."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_file(file, buffer.getvalue())


def read_checkpoint(file: Path) -> dict:
    """
    What :func:`write_checkpoint` wrote, on the CPU.

    :raises ValueError: for a damaged file, another kind of file, or another format.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
    except Exception as error:  # a damaged file raises errors of any kind
        raise ValueError(
            f"the checkpoint {file} cannot be resumed from: {error}. Delete it to start anew"
        ) from error
    return state


def save_run(trainer: DistillationTrainer, file: Path) -> None:
    """Write the last complete step of a :class:`deepinv_ud2m.training.DistillationTrainer`."""
    state = {
        "run": trainer.run,
        "step": trainer.completed,
        "trained": trainer.unfolded.state(),
        "average": dict(zip(trainer.trained, trainer.averaged.values, strict=True)),
        "optimizer": trainer.update.optimizer.state_dict(),
        "adversary": trainer.adversary.state_dict() if trainer.adversary else {},
        "data": trainer.places,
        "history": [dict(trainer.history), trainer.history.sums],
        "evaluated": trainer.evaluated,
        "skipped": [trainer.skipped, trainer.skipped_in_a_row],
        "best": trainer.best,
        "controller": trainer.controller.state() if trainer.controller else None,
    }
    write_checkpoint(state, file)


def load_run(trainer: DistillationTrainer, file: Path) -> None:
    """
    Load what :func:`save_run` wrote, if there is any. Only the first process needs to see the file.

    :raises ValueError: for a checkpoint of another run, or of more steps; nothing is loaded then.
    """
    state = read_checkpoint(file) if trainer.accelerator.is_main_process and file.is_file() else None
    (state,) = broadcast_object_list([state])
    if state is None:
        return
    check_same_run(file, state["run"], trainer.run)
    if state["step"] > trainer.steps:
        raise ValueError(
            f"steps is {trainer.steps}, but the checkpoint {file} is at step {state['step']} already"
        )
    trainer.unfolded.load_state(state["trained"])
    trainer.averaged.load(state["average"].values())
    trainer.update.optimizer.load_state_dict(state["optimizer"])
    if trainer.adversary is not None:
        trainer.adversary.load_state_dict(state["adversary"])
    if trainer.controller is not None:
        trainer.controller.load(state["controller"])
    if state["step"] < trainer.steps:  # a run that is done needs no data
        trainer.turns.seek(state["data"])
    trainer.history.load(*state["history"])
    trainer.completed, trainer.places = state["step"], state["data"]
    trainer.evaluated, trainer.best = state["evaluated"], state["best"]
    trainer.skipped, trainer.skipped_in_a_row = state["skipped"]
    if trainer.verbose:
        tqdm.write(f"going on from step {trainer.completed} of {file}")


def describe_run(trainer: DistillationTrainer) -> dict:
    """What must be equal for a checkpoint to be of the same run, as JSON holds it."""
    parts = describe(trainer.unfolded) | {"sampler": trainer.model.config()}
    prior = parts.pop("prior")["fingerprint"]
    of_parts = {f"{part}: {key}": v for part, of in parts.items() for key, v in (of or {}).items()}
    run = {
        "prior": prior,
        **of_parts,
        "settings": trainer.settings or {},
        "trained parameters": {name: list(p.shape) for name, p in trainer.trained.items()},
        "stage": trainer.stage,
        "adversary": repr(trainer.adversary),
        "physics": [type(physics).__name__ for physics in trainer.physics],
        "losses": [repr(loss) for loss in trainer.losses],
        "optimizer": [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in trainer.update.optimizer.param_groups
        ],
        "batches": [[getattr(of, "batch_size", None), len(of)] for of in trainer.train_dataloader],
        "accumulate": trainer.accumulate,
        "seed": trainer.seed,
    }
    return json.loads(json.dumps(run))


def identity(thing: object, seen: tuple[int, ...] = ()) -> Any:
    """
    What tells physics, their noise models and generators from others, as JSON holds it: their classes,
    numbers and strings, and hashes of their tensors; of what functions do, nothing.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Tensor):
        values = thing if thing.layout == torch.strided else thing.to_sparse_coo().coalesce().values()
        data = values.detach().resolve_conj().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return [list(thing.shape), hashlib.sha256(data.tobytes()).hexdigest()[:16]]
    if id(thing) in seen or not isinstance(thing, list | tuple | dict | nn.Module):
        return type(thing).__name__
    seen = (*seen, id(thing))
    if isinstance(thing, list | tuple):
        return [identity(part, seen) for part in thing]
    if isinstance(thing, dict):
        named = {str(name): part for name, part in thing.items()}
        return {name: identity(named[name], seen) for name in named if not name.startswith(_PASSING)}
    parts = {**vars(thing), **thing._parameters, **thing._buffers, **thing._modules}
    return [type(thing).__name__, identity(parts, seen), identity(parts_of_sum(thing), seen)]


def check_same_run(file: Path, stored: dict, here: dict) -> None:
    """Refuse a checkpoint of another run, by their descriptions."""
    for name, value in here.items():
        if stored.get(name) != value:
            found, wanted = (textwrap.shorten(str(v), 200) for v in (stored.get(name), value))
            raise ValueError(
                f"the checkpoint {file} is of another run: its {name} is {found}, here it is {wanted}. "
                "Choose another folder, or resume=False to overwrite it"
            )


@contextmanager
def lock(folder: Path, file: str = "checkpoint.pt") -> Iterator[None]:
    """
    Keep a folder for one run. The lock ends with the process, also when it is killed.

    :param pathlib.Path folder: the folder.
    :param str file: its checkpoint, of which nothing that was half written stays (default:
        ``"checkpoint.pt"``).
    :raises RuntimeError: if another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise RuntimeError(
            f"another training run is using the folder {folder} (it holds {folder / '.lock'}): wait until "
            "it ends, or choose another folder"
        ) from error
    with held:
        for part in folder.glob(f".{file}.*"):  # of a run that was killed while it wrote
            part.unlink()
        yield


class _Later:
    """A handler of Ctrl-C that notes it."""

    pressed = False

    def __call__(self, *arguments: Any) -> None:
        self.pressed = True


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that Ctrl-C does not leave half done: it takes effect after the block, and those around it."""
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()  # others get no signals
    if not in_main_thread or not callable(handler) or isinstance(handler, _Later):
        yield
        return
    later = _Later()
    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if later.pressed:
        handler(signal.SIGINT, None)
