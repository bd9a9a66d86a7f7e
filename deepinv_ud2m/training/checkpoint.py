"""Checkpoints of a training: written whole or not at all, read without unpickling objects."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import torch

FORMAT = 1


def write_checkpoint(state: dict, file: Path) -> None:
    """
    Write tensors and plain values; a kill at any moment leaves the old file or the new one.

    :param dict state: nested dictionaries and lists of tensors, numbers, strings.
    :param pathlib.Path file: the file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    with open(temporary, "wb") as stream:
        torch.save({"format": FORMAT, **state}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def read_checkpoint(file: Path) -> dict:
    """
    Read what :func:`write_checkpoint` wrote, onto the CPU.

    :param pathlib.Path file: the file.
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
    except (
        OSError, EOFError, KeyError, TypeError, RuntimeError, ValueError,
        zipfile.BadZipFile, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"the checkpoint {file} cannot be resumed from: {error}. Delete it to start anew"
        ) from error
    return state
