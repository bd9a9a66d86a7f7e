"""A folder of results: rows in ``rows.csv``, their setup, and arrays of each batch beside them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepinv as dinv
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from deepinv_ud2m import __version__
from deepinv_ud2m.files import write_file

_WORDS = ("task", "method", "name", "settings", "criterion", "weights", "digest")
#: Columns of the rows. Ranks are intervals, see :func:`deepinv_ud2m.metrics.rank`.
COLUMNS = (
    *(*_WORDS, "searched_on", "image", "num_samples"),
    *("energy_score", "crps", "psnr_mean", "perceptual", "swd", "psnr", "ssim"),
    *("rank", "rank_end", "rank_features", "rank_features_end", "variance", "squared_error"),
    *("reduced_chi_square", "mean_error", "std_ratio", "nfe", "nfe_backward", "seconds"),
)


class Results:
    """
    A folder of results that is locked while it is open; a context manager.

    :param dict setup: what makes rows comparable. A folder belongs to one setup.
    :raises ValueError: if another run has the folder open, it cannot be read or written, or its rows are
        of another setup. Nothing in it is touched then.
    """

    def __init__(self, folder: str | Path, setup: Mapping):
        self.folder, self.setup = Path(folder), dict(setup)
        self.file, self._lock = self.folder / "rows.csv", FileLock(self.folder / ".lock")

    def __enter__(self) -> Results:
        error, self.rows = None, []
        if PartialState().is_main_process:  # it alone reads and writes, and tells the others what it found
            try:
                self.rows = self._open()
            except Timeout:
                error = f"{self.folder} is in use by another run: wait for it, or choose another folder"
            except (OSError, ValueError) as problem:
                self._lock.release()
                error = str(problem)
        error, self.rows = broadcast_object_list([error, self.rows])
        if error:
            raise ValueError(error)
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def _open(self) -> list[dict]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(timeout=0)
        frame = read_rows(self.folder)
        rows = frame.to_dict("records")
        if rows:
            check_setup(self.folder, self.setup, read_setup(self.folder))
        else:  # a run that came to nothing does not bind the folder
            about = {"setup": self.setup, "machine": machine()}
            write_file(self.folder / "setup.json", json.dumps(about, indent=1) + "\n")
        packed = self.file.with_suffix(".csv.gz")
        if self.file.is_file():  # a line that a kill cut short
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
        elif packed.is_file():  # new rows go after those of before
            write_file(self.file, gzip.decompress(packed.read_bytes()))
        if rows and self.file.read_text().partition("\n")[0].split(",") != [*COLUMNS]:  # of an older version
            write_file(self.file, frame.to_csv(index=False))
        return rows

    def done(self, head: Mapping, digests: Sequence[str]) -> dict[int, int]:
        """Number of samples of a task and method by image; an error if they are of other settings."""
        done: dict[int, int] = {}
        of = f"rows of {head['method']!r} on {head['task']}"
        for row in self.rows:
            i, is_same = row["image"], all(row[name] == head[name] for name in ("task", "method"))
            if i < len(digests) and row["digest"] != digests[i]:
                raise ValueError(f"{self.folder} has rows of other images: image {i} is not what it was")
            for name in ("settings", "weights") if is_same else ():
                if row[name] != head[name]:
                    text = (
                        f"{self.folder} has {of} with other {name}, {row[name]}, this run's are {head[name]}"
                    )
                    raise ValueError(f"{text}: choose another folder, or another label for the method")
            if is_same:
                done[i] = max(row["num_samples"], done.get(i, 0))
        return done

    def add(self, rows: list[dict], arrays: Mapping[str, Any]) -> None:
        """Append the rows of a batch, after its arrays. Where that fails, the rows before are kept."""
        first, text, packed = rows[0], io.StringIO(), io.BytesIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        size = self.file.stat().st_size if self.file.is_file() else 0
        if not size:
            writer.writeheader()
        writer.writerows(rows)
        np.savez_compressed(packed, **arrays)
        folder = batch_folder(self.folder, first["task"], first["method"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / f"{first['num_samples']}-{first['image']}.npz", packed.getvalue())
            with open(self.file, "a") as file:
                file.write(text.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.file.is_file():
                os.truncate(self.file, size)
            cause = f"{self.folder} cannot be written: {error.strerror or error}. The rows before are kept"
            raise OSError(error.errno, cause) from error
        self.rows += rows

    def keep_reference(self, features: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        """Store features of the images, for Fréchet distances, unless there are those of as many."""
        file, packed = self.folder / "reference.npz", io.BytesIO()
        if file.is_file():
            with np.load(file) as arrays:
                if len(arrays["features"]) >= len(x):
                    return
        z = torch.cat([features(part) for part in x.split(64)]).half().cpu().numpy()
        np.savez_compressed(packed, features=z)
        write_file(file, packed.getvalue())


def read_rows(folder: str | Path) -> pd.DataFrame:
    """
    The rows of a folder, from ``rows.csv`` or ``rows.csv.gz``: per task, method and image the one with
    the most samples. A last line that a kill cut short is left out.
    """
    file = Path(folder) / "rows.csv"
    source: Path | io.BytesIO = file.with_suffix(".csv.gz")
    if file.is_file():
        text = file.read_bytes()
        source = io.BytesIO(text[: text.rfind(b"\n") + 1] or ",".join(COLUMNS).encode())
    elif not file.with_suffix(".csv.gz").is_file():
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.read_csv(source, dtype=dict.fromkeys(_WORDS, str)).reindex(columns=COLUMNS)
    rows = rows.fillna(dict.fromkeys(_WORDS, "")).sort_values("num_samples", kind="stable")
    return rows.drop_duplicates(["task", "method", "image"], keep="last").sort_index()


def read_setup(folder: str | Path) -> dict:
    """The setup of a folder of results."""
    return json.loads((Path(folder) / "setup.json").read_text())["setup"]


def check_setup(where: str | Path, setup: Mapping, there: Mapping) -> None:
    """Refuse to add to what is ``there``, if it has another setup."""
    for name, value in setup.items():
        if there.get(name) != value:
            raise ValueError(
                f"{where} is of another setup: its {name} is {there.get(name)!r}, here it is {value!r}. "
                "Choose another place"
            )


def batch_folder(folder: Path, task: str, label: str) -> Path:
    return folder / "batches" / task / re.sub(r"[^\w.-]", lambda match: f"%{ord(match[0]):x}", label)


def machine() -> dict:
    """Processor and versions, for the record."""
    names = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    with contextlib.suppress(OSError):
        names += re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {"torch": torch.__version__, "deepinv": dinv.__version__, "deepinv_ud2m": __version__}
    return {"device": [*names, platform.processor()][0], "threads": torch.get_num_threads(), **versions}
