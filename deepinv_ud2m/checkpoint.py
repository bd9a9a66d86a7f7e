"""Trained unfolded denoisers as files: saving, loading, the Hugging Face Hub.

A folder holds two files. ``model.safetensors`` holds the trained weights and nothing else.
``config.json`` holds how to build the rest, and the settings of the sampler. The prior is in neither: it is
found by its name or given by the caller, and recognised by its :func:`fingerprint`. An adapter on another
prior would give images that look like results. Nothing is unpickled.

A new shipped sampler is one entry in ``PRETRAINED``.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepinv.models import Denoiser
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from deepinv_ud2m import hub
from deepinv_ud2m.__about__ import __version__
from deepinv_ud2m.checks import check_path, shapes, shorten
from deepinv_ud2m.config_file import CONFIG, FORMAT, blame_config, own_weights, read_config
from deepinv_ud2m.files import check_digest, check_finite, read_weights, write_files
from deepinv_ud2m.fingerprints import fingerprint, trained_fingerprint
from deepinv_ud2m.initializers import Initializer
from deepinv_ud2m.priors import (
    PUBLISHED,
    add_lora,
    has_lora,
    load_prior,
    lora_config,
    merge_lora,
    remove_lora,
)
from deepinv_ud2m.unfolded import UnfoldedDenoiser

__all__ = ["PRETRAINED", "describe", "fingerprint", "load", "push_to_hub", "save", "trained_fingerprint"]

_SHIPPED = Path(__file__).parent / "weights"
_WEIGHTS = "model.safetensors"


# -------------------------------------------------------------------------------------------------
# Saving


def save(
    unfolded: UnfoldedDenoiser,
    folder: str | Path,
    *,
    sampler: Mapping,
    prior: str | None = None,
    metadata: Mapping | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """
    Write ``model.safetensors`` and ``config.json``, which holds the hash of the weights.

    A save that is interrupted leaves the old sampler, or files that :func:`load` refuses because they do not
    belong together. It warns of parameters that require a gradient but are not stored.

    :param deepinv_ud2m.UnfoldedDenoiser unfolded: the unfolded denoiser.
    :param str, pathlib.Path folder: where to write; made if it does not exist.
    :param Mapping sampler: settings of the sampler, ``config()`` of :class:`deepinv_ud2m.UD2M`.
    :param str, None prior: how :func:`deepinv_ud2m.load_prior` finds the prior: a shipped name or a folder
        (default: the ``name`` in its ``prior_info``, if it has one).
    :param Mapping, None metadata: anything that JSON can hold: training data, seed, metrics
        (default: nothing).
    :param torch.dtype dtype: type of the stored weights, ``torch.float32`` (default) or ``torch.float16``.
        The scalars are always in float32.
    :raises TypeError: if there is no unfolded denoiser, ``prior`` is not a name, or ``metadata`` does not fit
        into JSON. Nothing is written then.
    :raises ValueError: for another ``dtype``, or weights that it cannot hold. Nothing is written then.
    :raises OSError: if the disk is full or must not be written to. The folder is as it was then.
    """
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
    if not isinstance(unfolded, UnfoldedDenoiser):
        raise TypeError(f"model must be a UD2M of an UnfoldedDenoiser, got {type(unfolded).__name__}")
    if prior is not None and not isinstance(prior, str | Path):
        raise TypeError(f"prior must be a name or a folder for load_prior, got {prior!r}")
    folder, metadata = check_path("folder", folder), _check_metadata(metadata)
    declared = {id(parameter) for parameter in unfolded.trained_parameters().values()}
    others = [n for n, p in unfolded.named_parameters() if p.requires_grad and id(p) not in declared]
    if others:
        warnings.warn(
            f"{shorten(others)} require a gradient but are not stored: neither train_prior nor the "
            "initializer declares them",
            stacklevel=3,
        )
    state = unfolded.state()
    types = {k: torch.float32 if k.startswith("scalars.") else dtype for k in state}
    # Copies: safetensors does not take tensors that share memory.
    stored = {k: v.to("cpu", types[k], copy=True).contiguous() for k, v in state.items()}
    beyond = [k for k, v in stored.items() if (v.isinf() & state[k].cpu().isfinite()).any()]
    if beyond:
        raise ValueError(f"dtype {dtype} cannot hold the values of {shorten(beyond)}: use torch.float32")
    weights = save_safetensors(stored, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "package_version": __version__,
        "sampler": dict(sampler),
        **describe(unfolded, prior),
        "metadata": metadata,
        # The tensors are listed for those who read the file.
        "weights": {"sha256": hashlib.sha256(weights).hexdigest(), "tensors": shapes(stored)},
    }
    text = json.dumps(config, indent=2) + "\n"
    write_files(folder, {_WEIGHTS: weights, CONFIG: text.encode()})


def describe(unfolded: UnfoldedDenoiser, prior: str | Path | None = None) -> dict:
    """What :func:`load` needs besides the weights and the settings of the sampler, as values of JSON."""
    info = unfolded.prior_info
    if prior is None and info is not None:
        prior = info.name
    trained = own_weights(unfolded.state())
    return {
        "unfolded": unfolded.config(),
        "initializer": _describe_initializer(unfolded.initializer),
        "lora": lora_config(unfolded.denoiser),
        "prior": {
            "name": None if prior is None else str(prior),
            "fingerprint": fingerprint(unfolded.denoiser, trained),
            "channels": None if info is None else info.channels,
        },
    }


def _describe_initializer(initializer: Initializer) -> dict:
    description = {"kind": type(initializer).__name__, **initializer.config()}
    if not initializer.is_rebuilt:  # enough to recognise it when it is given again
        description["lora"] = lora_config(initializer)
        description["fingerprint"] = fingerprint(initializer, initializer.trained_parameters())
    return description


def _check_metadata(metadata: Mapping | None) -> dict:
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"metadata must be a dictionary, got {type(metadata).__name__}")
    try:
        return json.loads(json.dumps(dict(metadata or {})))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"metadata must hold numbers, strings, lists and dictionaries only, as JSON does: {error}"
        ) from error


# -------------------------------------------------------------------------------------------------
# Loading


def load(
    name_or_path: str | Path,
    make: Callable[..., Any] = lambda unfolded, **settings: (unfolded, settings),
    *,
    prior: Denoiser | str | Path | None = None,
    initializer: Initializer | None = None,
    merge: bool = True,
    revision: str | None = None,
) -> Any:
    r"""
    A trained unfolded denoiser, and the settings of its sampler.

    A ``prior`` or ``initializer`` that is given is not copied: it gets the adapter or the trained weights.

    :param str, pathlib.Path name_or_path: the name of a shipped sampler (``PRETRAINED``), a folder written by
        :func:`save`, or the id ``"user/repo"`` of a repository on the Hugging Face Hub, which is downloaded
        into the cache of the Hub. Where a folder ``user`` is here, an id needs a ``revision``.
    :param Callable make: makes the result, ``make(unfolded, **settings)``, such as the class of a sampler
        (default: a tuple of both).
    :param deepinv.models.Denoiser, str, pathlib.Path, None prior: the untrained prior, without adapter, or
        its name or folder for :func:`deepinv_ud2m.load_prior` (default: the stored name).
    :param deepinv_ud2m.initializers.Initializer, None initializer: the untrained initializer. It is needed if
        the files do not hold it, as for RAM.
    :param bool merge: merge the adapter into the prior (default: ``True``). Sampling then costs as much as
        without adapter. Use ``False`` to train on.
    :param str, None revision: branch, tag or commit on the Hub (default: its main branch).
    :returns: the result of ``make``.
    :raises ValueError: for an unknown name or folder, for files that are missing, damaged or of a newer
        format, or for another prior or initializer than the sampler was trained with.
    :raises TypeError: if ``prior`` or ``initializer`` is of a wrong type.
    :raises ImportError: for an id on the Hub, without ``huggingface_hub``.
    :raises OSError: if the download fails.
    """
    _check_given(prior, initializer)
    folder = _find_folder(name_or_path, revision)
    config = read_config(folder / CONFIG)
    check_digest(folder / _WEIGHTS, config["weights"]["sha256"])
    state = read_weights(folder / _WEIGHTS)
    check_finite(state, str(folder / _WEIGHTS))
    # Networks are built with random weights first, which must not change the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        initializer = _find_initializer(initializer, config["initializer"], folder)
        network = _find_prior(prior, config["prior"], state)
        with blame_config(folder):
            result = _build(network, initializer, config, state, make)
    if config["unfolded"]["train_prior"] != "adapter":
        setattr(network, _HOLDS, str(name_or_path))
    if merge:
        merge_lora(network)
    return result


# Attribute of a prior whose own weights were overwritten: the name of the sampler they are from.
_HOLDS = "holds_the_weights_of"


def _check_given(prior: Any, initializer: Any) -> None:
    if prior is not None and not isinstance(prior, nn.Module | str | Path):
        raise TypeError(
            f"prior must be a deepinv Denoiser, or a name or folder for load_prior, got {prior!r}"
        )
    if isinstance(prior, nn.Module) and has_lora(prior):
        raise ValueError(
            "prior already carries an adapter, and the trained one would come on top of it: take it off "
            "with deepinv_ud2m.remove_lora"
        )
    holds = getattr(prior, _HOLDS, None)
    if holds is not None:
        raise ValueError(
            f"prior already holds the trained weights of the sampler {holds!r}, which this sampler would "
            "overwrite: give each a prior of its own, load_prior(...) or a copy of the untrained one"
        )
    if initializer is not None and not isinstance(initializer, Initializer):
        raise TypeError(f"initializer must be an Initializer, got {type(initializer).__name__}")


def _find_folder(name_or_path: str | Path, revision: str | None) -> Path:
    name = str(name_or_path)
    local = _SHIPPED / PRETRAINED[name] if name in PRETRAINED else Path(name)
    if not local.is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        if revision is None and local.parent.is_dir():
            raise ValueError(
                f"there is no folder {name!r} in the folder {str(local.parent)!r}. If the repository of that "
                "name on the Hugging Face Hub is meant, give its revision, such as revision='main'"
            )
        return hub.download(name, revision, (CONFIG, _WEIGHTS))
    if not name or not local.is_dir():
        raise ValueError(
            f"name_or_path must be one of the shipped samplers {sorted(PRETRAINED)}, a folder written "
            f"by save_pretrained, or the id 'user/repo' of one on the Hugging Face Hub; got {name!r}"
        )
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for the Hugging Face Hub, but {name!r} is here")
    return local


def _find_prior(prior: Any, expected: Mapping, state: Mapping[str, Tensor]) -> Denoiser:
    name = expected["name"]
    if prior is None:
        try:
            prior = load_prior(str(name))
        except (ValueError, OSError, ImportError) as error:
            how = f"load_prior({name!r}, download=True), or weights=" if name in PUBLISHED else ""
            raise ValueError(
                f"this sampler was trained with the prior {name!r} (fingerprint {expected['fingerprint']}), "
                f"which cannot be loaded by that name. Give it as prior={how}. ({error})"
            ) from error
    elif not isinstance(prior, nn.Module):
        prior = load_prior(prior)
    info = getattr(prior, "prior_info", None)
    given = type(prior).__name__ if info is None else info.name
    found = fingerprint(prior, own_weights(state))
    if found != expected["fingerprint"]:
        raise ValueError(
            f"prior: this sampler was trained with {name!r} of fingerprint {expected['fingerprint']}, "
            f"got {given!r} of fingerprint {found}: other weights, or another network"
        )
    return prior


def _find_initializer(initializer: Initializer | None, expected: Mapping, folder: Path) -> Initializer:
    kind = expected["kind"]
    if initializer is not None:
        found = _describe_initializer(initializer)
        if found != {**found, **expected}:
            raise ValueError(f"initializer: this sampler was trained with {expected}, got {found}")
        return initializer
    known = Initializer.registry.get(kind)
    if known is None or not known.is_rebuilt:
        raise ValueError(
            f"this sampler was trained with a {kind}, which is not stored with it: give it as "
            "initializer=, as it was before training"
        )
    with blame_config(folder):
        return known(**{key: value for key, value in expected.items() if key != "kind"})


def _build(
    denoiser: Denoiser, initializer: Initializer, config: Mapping, state: Mapping[str, Tensor], make: Callable
) -> Any:
    """Put the adapter and the trained weights in place. An error leaves the prior frozen, without adapter."""
    try:
        if config["lora"] is not None:
            add_lora(denoiser, **config["lora"])
        unfolded = UnfoldedDenoiser(denoiser, initializer=initializer, **config["unfolded"])
        result = make(unfolded, **config["sampler"])
        unfolded.load_state(state)  # last: an error before it leaves the weights of the prior as they were
    except BaseException:
        remove_lora(denoiser)
        denoiser.requires_grad_(False)
        raise
    return result


# -------------------------------------------------------------------------------------------------
# The Hugging Face Hub


def push_to_hub(
    unfolded: UnfoldedDenoiser,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload UD2M sampler",
    **options: Any,
) -> str:
    """
    Upload to the Hugging Face Hub. The repository, and its model card ``README.md``, are made if they do not
    exist.

    :param deepinv_ud2m.UnfoldedDenoiser unfolded: the unfolded denoiser.
    :param str repo_id: ``"user/repo"``, or ``"repo"`` in one's own name.
    :param bool private: whether a repository that is made is private (default: ``False``).
    :param str, None token: access token (default: that of ``hf auth login``).
    :param str commit_message: message of the commit.
    :param options: those of :func:`save`; ``metadata`` is shown on the model card, see
        :func:`deepinv_ud2m.hub.model_card`.
    :returns: address of the repository.
    :raises ImportError: without ``huggingface_hub``.
    :raises TypeError, ValueError: see :func:`save`; nothing is uploaded then.
    """
    if not isinstance(repo_id, str) or not repo_id:
        raise ValueError(f"repo_id must be 'user/repo' or 'repo', got {repo_id!r}")
    hub.find()  # before anything is written
    with tempfile.TemporaryDirectory() as folder:
        save(unfolded, folder, **options)
        config = read_config(Path(folder, CONFIG))
        return hub.upload(folder, repo_id, config, private, token, commit_message)


#: Shipped samplers: name, and folder in ``weights/``.
PRETRAINED: dict[str, str] = {
    "mnist": "ud2m-mnist",
    "mnist-paper": "ud2m-mnist-paper",
    "photos": "ud2m-photos",
}
