"""The file ``config.json`` of a stored sampler: its sections, and its older format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deepinv_ud2m.__about__ import __version__
from deepinv_ud2m.files import read_json

CONFIG = "config.json"

#: Version of the files. A greater one is refused, a smaller one is read.
FORMAT = 2

# Sections of config.json, and the types of their entries.
_NUMBER, _NONE = int | float, type(None)
_SECTIONS: dict[str, dict[str, Any]] = {
    "sampler": {
        "sigmas": list,
        "eta": _NUMBER,
        "output_range": list | _NONE,
        "nominal_rmse": _NUMBER | _NONE,
    },
    "unfolded": {
        "num_iterations": int,
        "shared": bool,
        "rho": list,
        "delta": list,
        "lambda_": list,
        "tol": _NUMBER,
        "max_iter": int,
        "train_prior": str | list,
    },
    "initializer": {"kind": str},
    "lora": {"rank": int, "alpha": _NUMBER, "targets": list},
    "prior": {"name": str | _NONE, "fingerprint": str, "channels": int | _NONE},
    "weights": {"sha256": str},
}


def read_config(file: Path) -> dict:
    """The content of a ``config.json``, in the present format; ValueError if it is missing or damaged."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: no sampler was saved there")
    config = read_json(file)
    version = config.get("format")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{file} was not written by save_pretrained: its format is {version!r}")
    if version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, written by deepinv_ud2m {config.get('package_version')}; "
            f"this version, {__version__}, reads up to format {FORMAT}: upgrade deepinv_ud2m"
        )
    with blame_config(file.parent):
        if version == 1:
            config = _from_format_1(config)
        for section, entries in _SECTIONS.items():
            if section != "lora" or config.get("lora") is not None:
                _check_section(section, config.get(section), entries)
    return config


def _from_format_1(config: Mapping) -> dict:
    """
    Format 1 had other names, and a tolerance of another meaning. What is trained followed from the names of
    the tensors.
    """
    sampler, unfolded = dict(config["sampler"]), dict(config["unfolded"])
    sampler |= {"sigmas": sampler.pop("levels"), "nominal_rmse": sampler.pop("reference_error", None)}
    initializer = {"reference_level": unfolded.pop("reference_level"), **config["initializer"]}
    unfolded["tol"] = 0.01
    unfolded["train_prior"] = own_weights(config["weights"]["tensors"]) or "adapter"
    return {**config, "sampler": sampler, "unfolded": unfolded, "initializer": initializer}


def _check_section(section: str, content: Any, entries: Mapping) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"it has no section {section!r}")
    lacking = [key for key in entries if key not in content]
    if lacking:
        raise ValueError(f"its section {section!r} has no {', '.join(lacking)}")
    for key, kind in entries.items():
        if not isinstance(content[key], kind):
            name = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{section}.{key} must be of type {name}, got {content[key]!r}")


def own_weights(names: Iterable[str]) -> list[str]:
    """Names of the prior's own weights among those of stored tensors."""
    return [name.removeprefix("denoiser.") for name in names if name.startswith("denoiser.")]


@contextmanager
def blame_config(folder: Path) -> Iterator[None]:
    """Errors inside come from values in ``config.json``: raise them as a ValueError that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder / CONFIG} cannot be used: {cause}") from error
