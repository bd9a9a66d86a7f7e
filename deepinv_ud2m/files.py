"""Files: digests, reading without unpickling, writing whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deepinv_ud2m.checks import differences, shapes, shorten


def sha256(file: Path) -> str:
    """The sha256 of a file, in 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_digest(file: Path, expected: str) -> None:
    """Raise ValueError if a file of weights cannot be read, or has another sha256 than expected."""
    try:
        found = sha256(file)
    except OSError as error:
        raise ValueError(f"the weights {file} cannot be read: {error}") from error
    if found != expected:
        raise ValueError(
            f"the weights {file} are damaged, or of another network, or saving them was interrupted: their "
            f"sha256 is {found}, expected {expected}"
        )


def cached_download(url: str, what: str, size: str, allow: str, download: bool, digest: str = "") -> Path:
    """
    A file of weights in the cache of torch.hub, downloaded if it is not there and ``download`` is set.

    :param str url: where it comes from; the last part is its name in the cache.
    :param str what: what needs it, and what it is, for the message.
    :param str size: how large it is, with the unit.
    :param str allow: how a user allows the download.
    :param bool download: allow it.
    :param str digest: how its sha256 begins; another file does not get into the cache (default: unchecked).
    :raises FileNotFoundError: if it is not there and may not be downloaded; it says where to put a copy.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        if not download:
            begins = f", whose sha256 begins with {digest}" if digest else ""
            raise FileNotFoundError(f"{what}, {size} from {url}{begins}: put the file at {file}, or {allow}")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=digest or None)
    return file


def read_json(file: Path) -> dict:
    """Read a dictionary; ValueError if the file is missing or damaged, or holds anything else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be used: it must hold a dictionary, got {type(content).__name__}")
    return content


def read_weights(file: Path) -> dict[str, Tensor]:
    """
    Read tensors by name from ``.safetensors``, or from a state dictionary of ``torch.save``, onto the CPU.

    :raises ValueError: if the file is damaged, or holds anything else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Only files of the present format, which are zip files, can be mapped into memory.
        mmap = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file raises errors of any kind
        raise ValueError(f"the weights {file} are damaged, or no weights: {error}") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"the weights {file} must be tensors by name, got {type(state).__name__}")
    return dict(state)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """
    Load tensors of a file into a network, which may be on the meta device; afterwards it is on the CPU.

    :raises ValueError: for tensors that are missing, unexpected, of another shape, not of floating
        point, or not finite in the type of the network, which is as it was then.
    """
    expected = network.state_dict()
    complaints = differences(shapes(expected), shapes(state))
    if complaints:
        raise ValueError(f"the weights {file} are of another network. Tensors {complaints}")
    kinds = [f"{k} ({v.dtype})" for k, v in state.items() if not v.is_floating_point()]
    if kinds:
        raise ValueError(f"the weights {file} must be floating point, got {shorten(kinds)}")
    # Copies: what was read may be a part of the file, mapped into memory.
    state = {name: value.to(expected[name].dtype, copy=True) for name, value in state.items()}
    check_finite(state, str(file))
    network.load_state_dict(state, assign=True)


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if any tensor holds NaN or infinity; it names them and ``where`` they are."""
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"the weights {where} hold NaN or infinite values in {shorten(broken)}")


def make_folder(folder: Path) -> None:
    """
    Make a folder, and those above it, unless they exist.

    :raises ValueError: if there is a file of this name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} must be a folder, but it is a file, or in one") from error


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """
    Write files into a folder, which is made if it does not exist. All contents are on the disk before the
    first file takes its place. The files take their places in the given order, each at once.

    :raises ValueError: if the folder is a file.
    :raises OSError: if a file cannot be written; it names the file and the cause. What was not replaced yet
        is as it was, and no temporary file is left.
    """
    make_folder(folder)
    # Not by tempfile, whose files nobody else may read, also after they are moved.
    temporary = {name: folder / f".{name}.{secrets.token_hex(4)}" for name in contents}
    name = ""
    try:
        for name, content in contents.items():
            with open(temporary[name], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(temporary[name], folder / name)
    except OSError as error:
        cause = error.strerror or str(error)
        message = f"{folder / name} cannot be written, and is as it was before: {cause}"
        raise OSError(error.errno, message) from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def write_file(file: Path, content: str | bytes) -> None:
    """Write one file, whole or not at all, see :func:`write_files`; text in UTF-8."""
    write_files(file.parent, {file.name: content.encode() if isinstance(content, str) else content})
