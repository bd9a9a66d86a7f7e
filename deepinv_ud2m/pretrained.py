"""Trained samplers as files: saving, loading, the Hugging Face Hub.

A folder holds ``model.safetensors``, what was trained and nothing else, and ``config.json``, how to
build the rest. The prior is not in it. It is found by name or given by the caller, and recognised by
its :func:`fingerprint`, because an adapter on another prior would give images that look like results.

A new shipped sampler is one entry in ``PRETRAINED``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from deepinv.models import Denoiser
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from deepinv_ud2m.__about__ import __version__
from deepinv_ud2m.checks import differences, shapes, shorten
from deepinv_ud2m.initializers import LinearInitializer, PseudoInverseInitializer
from deepinv_ud2m.lora import (
    add_lora,
    has_lora,
    load_lora_state_dict,
    lora_config,
    lora_state_dict,
    merge_lora,
    prior_parameters,
    prior_state_dict,
    remove_lora,
)
from deepinv_ud2m.posterior_mean import PosteriorMeanInitializer
from deepinv_ud2m.priors import PRIORS, load_prior
from deepinv_ud2m.published import PUBLISHED
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.unfolded import UnfoldedDenoiser
from deepinv_ud2m.wiener import WienerInitializer

_SHIPPED = Path(__file__).parent / "weights"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

#: Version of the files; a greater one is refused.
FORMAT = 1

_SCALARS = ("log_rho", "log_delta", "log_lambda")

# Sections of config.json, and what must be in them.
_SECTIONS = {
    "sampler": ("levels", "eta", "output_range"),
    "unfolded": (
        *("num_iterations", "shared", "reference_level", "rho", "delta", "lambda_"),
        *("tol", "max_iter"),
    ),
    "initializer": ("kind",),
    "prior": ("name", "fingerprint", "channels"),
    "weights": ("sha256", "tensors"),
}

# Initialisers that config.json describes completely.
_INITIALIZERS = {
    kind.__name__: kind
    for kind in (
        *(LinearInitializer, PseudoInverseInitializer, WienerInitializer),
        PosteriorMeanInitializer,  # with its weights in the other file
    )
}


# -------------------------------------------------------------------------------------------------
# What was trained


def trained_state_dict(unfolded: UnfoldedDenoiser) -> dict[str, Tensor]:
    """
    What was trained, and nothing else.

    - ``scalars.log_rho``, ``scalars.log_delta``, ``scalars.log_lambda``, of shape `[K]` or `[1]`;
    - ``lora.<key>``: the adapter of the denoiser, see :func:`deepinv_ud2m.lora.lora_state_dict`;
    - ``denoiser.<name>``: other parameters of the denoiser that require a gradient, under the names
      they have without adapter (none, unless someone fine-tunes the prior itself);
    - ``initializer.lora.<key>`` and ``initializer.<name>``: the same of the initialiser, such as a
      fine-tuned RAM.

    A merged adapter makes no difference.

    :param deepinv_ud2m.UnfoldedDenoiser unfolded: the unfolded denoiser.
    :returns: detached tensors which, as in :meth:`torch.nn.Module.state_dict`, share the memory of the
        parameters: clone them to keep their present values.
    """
    state = {f"scalars.{name}": getattr(unfolded, name).detach() for name in _SCALARS}
    for module, prefix, lora_prefix in _networks(unfolded):
        weights = prior_state_dict(module)
        state |= {prefix + name: weights[name].detach() for name in _trained_names(module)}
        state |= {lora_prefix + key: factor for key, factor in lora_state_dict(module).items()}
    return state


def load_trained_state_dict(unfolded: UnfoldedDenoiser, state: Mapping[str, Tensor]) -> None:
    """
    Load what :func:`trained_state_dict` returned, bit for bit where the types are the same.

    The unfolded denoiser must have been built alike: K, adapter, and which parameters require a
    gradient. A merged adapter is merged anew.

    :param deepinv_ud2m.UnfoldedDenoiser unfolded: the unfolded denoiser.
    :param Mapping[str, torch.Tensor] state: on any device and in any floating point type.
    :raises ValueError: if tensors are missing, not expected, or of another shape; it names them.
        Nothing is changed then.
    """
    expected = trained_state_dict(unfolded)
    complaints = differences(shapes(expected), shapes(state))
    if complaints:
        raise ValueError(
            "state does not fit this unfolded denoiser (same K, same adapter, same parameters to "
            f"train?). Tensors {complaints}"
        )
    with torch.no_grad():
        for name in _SCALARS:
            getattr(unfolded, name).copy_(state[f"scalars.{name}"])
        for module, prefix, lora_prefix in _networks(unfolded):
            weights = prior_state_dict(module)
            for name in _trained_names(module):
                weights[name].copy_(state[prefix + name])
            # The factors last: where they are merged, this merges them into the weights just loaded.
            factors = lora_state_dict(module)
            load_lora_state_dict(module, {key: state[lora_prefix + key] for key in factors})


def fingerprint(network: nn.Module, trained: Collection[str] = ()) -> str:
    """
    A hash of the weights of a network, without its adapter, merged or not.

    It covers the names, shapes and values of all parameters and persistent buffers. Floating point
    values are rounded to float16 first: it is the same on every device, and the same for a network
    in float32, as float64, as float16, and stored as float16 and loaded again (as the shipped priors
    are). It is another for bfloat16, which keeps fewer digits. Settings that are not weights, such
    as the scale of a preconditioning, are not covered.

    :param torch.nn.Module network: the network.
    :param Collection[str] trained: parameters whose values do not count, since they are stored with
        the sampler; under the names they have without adapter.
    :returns: SHA-256, as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(prior_state_dict(network).items()):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        if name not in trained:
            digest.update(_bytes(weight))
    return digest.hexdigest()


def trained_fingerprint(unfolded: UnfoldedDenoiser) -> str:
    """
    A hash of what was trained, to tell samplers apart; rounded as by :func:`fingerprint`.

    :param deepinv_ud2m.UnfoldedDenoiser unfolded: the unfolded denoiser.
    :returns: the first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(trained_state_dict(unfolded).items()):
        digest.update(name.encode() + _bytes(weight))
    return digest.hexdigest()[:16]


def _networks(unfolded: UnfoldedDenoiser) -> list[tuple[nn.Module, str, str]]:
    """The networks that may have been trained, the prefixes of their weights and of their adapters."""
    return [
        (unfolded.denoiser, "denoiser.", "lora."),
        (unfolded.initializer, "initializer.", "initializer.lora."),
    ]


def _trained_names(network: nn.Module) -> list[str]:
    return [name for name, parameter in prior_parameters(network) if parameter.requires_grad]


def _bytes(weight: Tensor) -> bytes:
    weight = weight.detach().cpu()
    if weight.is_complex():
        weight = torch.view_as_real(weight.resolve_conj())
    return (weight.half() if weight.is_floating_point() else weight).contiguous().numpy().tobytes()


# -------------------------------------------------------------------------------------------------
# Saving


def save_pretrained(
    model: UD2M,
    folder: str | Path,
    *,
    prior: str | None = None,
    metadata: Mapping | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """
    Write a sampler as ``model.safetensors``, what was trained, and ``config.json``.

    Each file is written beside its place and then moved there, the configuration last, and the
    configuration holds the hash of the weights. So a save that is interrupted leaves the old sampler,
    or, between the two moves, files that :func:`from_pretrained` refuses as not belonging together.

    :param deepinv_ud2m.UD2M model: the sampler, of an :class:`deepinv_ud2m.UnfoldedDenoiser`.
    :param str, pathlib.Path folder: where to write; made if it does not exist.
    :param str, None prior: how :func:`deepinv_ud2m.load_prior` finds the prior, a shipped name or a
        folder (default: the ``name`` in its ``prior_info``, if it has one).
    :param Mapping, None metadata: anything worth knowing that JSON can hold: training data, budget,
        seed, metrics (default: nothing).
    :param torch.dtype dtype: type of the stored weights, ``torch.float32`` or ``torch.float16``; the
        scalars are in float32 always (default: ``torch.float32``).
    :raises TypeError: if ``model`` is not such a sampler, ``prior`` not a name, or ``metadata``
        cannot be written as JSON. Nothing is written then.
    :raises ValueError: for another ``dtype``, weights that float16 cannot hold, or an adapter that was
        merged for good into weights that are not trained. Likewise.
    """
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
    if not isinstance(model, UD2M) or not isinstance(model.unfolded, UnfoldedDenoiser):
        got = type(model.unfolded if isinstance(model, UD2M) else model).__name__
        raise TypeError(f"model must be a UD2M of an UnfoldedDenoiser, got {got}")
    if prior is not None and not isinstance(prior, str | Path):
        raise TypeError(f"prior must be a name or a folder that load_prior takes, got {prior!r}")
    metadata = _check_metadata(metadata)
    for network, _, _ in _networks(model.unfolded):
        _check_merged(network)
    _check_stored(model.unfolded.initializer)
    state = trained_state_dict(model.unfolded)
    types = {k: torch.float32 if k.startswith("scalars.") else dtype for k in state}
    # Copies: safetensors does not take tensors that share memory.
    stored = {k: v.to("cpu", types[k], copy=True).contiguous() for k, v in state.items()}
    beyond = [k for k, v in stored.items() if (v.isinf().cpu() & state[k].isfinite().cpu()).any()]
    if beyond:
        raise ValueError(f"dtype {dtype} cannot hold the values of {shorten(beyond)}: use torch.float32")
    state = stored
    weights = save(state, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "package_version": __version__,
        **describe(model, prior),
        "metadata": metadata,
        "weights": {"sha256": hashlib.sha256(weights).hexdigest(), "tensors": shapes(state)},
    }
    text = json.dumps(config, indent=2) + "\n"
    _replace_files(Path(folder), {_WEIGHTS: weights, _CONFIG: text.encode()})


def _check_merged(network: nn.Module) -> None:
    left_out = set(getattr(network, "merged_for_good", ())) - set(_trained_names(network))
    if left_out:
        raise ValueError(
            "model: merge_lora(..., unload=True) made an adapter part of weights that are not trained, "
            f"{shorten(sorted(left_out))}, and what is not trained is not stored: call "
            "requires_grad_(True) on them, or merge without unload"
        )


def _check_stored(initializer: nn.Module) -> None:
    if isinstance(initializer, PosteriorMeanInitializer):
        trained = _trained_names(initializer)
        frozen = [name for name, _ in prior_parameters(initializer) if name not in trained]
        if frozen:
            raise ValueError(
                "model: parameters of its PosteriorMeanInitializer are frozen, and what is not trained "
                f"is not stored: call requires_grad_(True) on it. They are {shorten(frozen)}"
            )


def _check_metadata(metadata: Mapping | None) -> dict:
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dictionary, got {type(metadata).__name__}")
    try:
        return json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"metadata must hold numbers, strings, lists and dictionaries only, as JSON does: {error}"
        ) from error


def describe(model: UD2M, prior: str | Path | None = None) -> dict:
    """All that :func:`from_pretrained` needs besides the weights, as JSON holds it."""
    unfolded = model.unfolded
    info = unfolded.prior_info
    if prior is None and info is not None:
        prior = info.name
    return {
        "sampler": {
            "levels": model.levels.tolist(),
            "eta": float(model.eta),
            "output_range": None if model.output_range is None else list(map(float, model.output_range)),
            "reference_error": None if model.reference_error is None else float(model.reference_error),
        },
        "unfolded": {
            "num_iterations": unfolded.num_iterations,
            "shared": len(unfolded.log_rho) < unfolded.num_iterations,
            "reference_level": float(unfolded.reference_level),
            "rho": unfolded.start_rho.tolist(),
            "delta": unfolded.start_delta.tolist(),
            "lambda_": unfolded.start_lambda.tolist(),
            "tol": float(unfolded.tol),
            "max_iter": int(unfolded.max_iter),
        },
        "initializer": _describe_initializer(unfolded.initializer, _trained_names(unfolded.initializer)),
        "lora": lora_config(unfolded.denoiser),
        "prior": {
            "name": None if prior is None else str(prior),
            "fingerprint": fingerprint(unfolded.denoiser, _trained_names(unfolded.denoiser)),
            "channels": None if info is None else info.channels,
        },
    }


def _describe_initializer(initializer: nn.Module, trained: Collection[str]) -> dict:
    kind = type(initializer)
    if kind is LinearInitializer:
        arguments = {"mean": float(initializer.mean), "std": float(initializer.std)}
    elif kind is PseudoInverseInitializer:
        arguments = {"mode": initializer.mode}
    elif kind is WienerInitializer:
        arguments = {name: getattr(initializer, name) for name in WienerInitializer.SETTINGS}
    elif kind is PosteriorMeanInitializer:
        arguments = initializer.settings
    else:
        # A network, whose own weights are not stored: enough to recognise it when it is given again.
        arguments = {"lora": lora_config(initializer), "fingerprint": fingerprint(initializer, trained)}
    return {"kind": kind.__name__, **arguments}


def _replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files whole or not at all; all are written before the first one takes its place."""
    folder.mkdir(parents=True, exist_ok=True)
    # Named here and not by tempfile, whose files nobody else may read, also after they are moved.
    temporary = {name: folder / f".{name}.{secrets.token_hex(4)}" for name in contents}
    try:
        for name, content in contents.items():
            with open(temporary[name], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# Loading


def from_pretrained(
    name_or_path: str | Path,
    *,
    prior: Denoiser | str | Path | None = None,
    initializer: nn.Module | None = None,
    device: torch.device | str | None = None,
    merge: bool = True,
    revision: str | None = None,
) -> UD2M:
    r"""
    A trained sampler, ready to sample.

    Nothing is unpickled, whoever the files come from. A ``prior`` or ``initializer`` that is given is
    not copied: it gets the adapter, or the weights that were trained, in place.

    :param str, pathlib.Path name_or_path: name of a shipped sampler (a key of ``PRETRAINED``), a
        folder written by :func:`save_pretrained`, or the id ``"user/repo"`` of a repository on the
        Hugging Face Hub, which is **downloaded** from there unless it is in the cache (needs
        ``pip install huggingface_hub``).
    :param deepinv.models.Denoiser, str, pathlib.Path prior: the prior that the sampler was trained
        with, without adapter, or what :func:`deepinv_ud2m.load_prior` finds it by (default: the
        name stored with the sampler).
    :param torch.nn.Module initializer: the initialiser that the sampler was trained with. Needed for
        those that are networks, such as RAM, before their fine-tuning.
    :param torch.device, str device: where to put it (default: where the ``prior`` given is, else cpu).
    :param bool merge: merge the adapter into the prior, for speed; the samples change by rounding.
        :func:`deepinv_ud2m.unmerge_lora` makes it trainable again (default: ``True``).
    :param str, None revision: branch, tag or commit on the Hub (default: the main branch).
    :returns: the sampler, in evaluation mode. Its parameters require gradients where they did in
        training.
    :raises ValueError: for an unknown name; files that are missing, damaged, of a newer format, or
        that do not belong together; a prior or initialiser that cannot be found, is another than in
        training, takes other channels, or has an adapter, or the weights of a sampler, already. A
        prior that was given has no adapter then, but may have been frozen.
    :raises TypeError: if ``prior`` or ``initializer`` is of a wrong type.
    :raises ImportError: for an id on the Hub, without ``huggingface_hub``.
    :raises OSError: if the download fails.

    |sep|

    :Examples:

        >>> from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora, load_prior
        >>> prior = load_prior("mnist")
        >>> names = add_lora(prior)
        >>> model = UD2M(UnfoldedDenoiser(prior))  # and train it
        >>> model.save_pretrained("trained", metadata={"data": "MNIST"})  # doctest: +SKIP
        >>> model = UD2M.from_pretrained("trained")  # doctest: +SKIP
    """
    _check_given(prior, initializer)
    folder = _find_folder(name_or_path, revision)
    config = _read_config(folder / _CONFIG)
    state = _read_weights(folder / _WEIGHTS, config["weights"])
    # Networks are built with random weights first; the caller's random numbers are not spent on that.
    with torch.random.fork_rng(devices=[]):
        initializer = _find_initializer(initializer, config["initializer"], state, folder)
        prior = _find_prior(prior, config["prior"], state)
        with _edited(folder):
            model = _build(prior, initializer, config)
            _adapt(model.unfolded, config["lora"], state)
    if config["lora"] is None and _names_in(state, "denoiser."):
        setattr(prior, _HOLDS, str(name_or_path))
    if merge:
        merge_lora(prior)
    if device is None:
        device = next((p.device for p in prior.parameters()), "cpu")
    return model.eval().to(device)


#: Attribute of a prior whose own weights were replaced by those of a sampler: the name of that.
_HOLDS = "holds_the_weights_of"


def _check_given(prior, initializer) -> None:
    if prior is not None and not isinstance(prior, nn.Module | str | Path):
        raise TypeError(
            f"prior must be a deepinv Denoiser, or a name or folder for load_prior, got {prior!r}"
        )
    if isinstance(prior, nn.Module) and has_lora(prior):
        raise ValueError(
            "prior already carries an adapter, and the trained one would come on top of it: give the "
            "prior without (deepinv_ud2m.remove_lora takes an adapter off)"
        )
    holds = getattr(prior, _HOLDS, None)
    if holds is not None:
        raise ValueError(
            f"prior already holds the weights that the sampler {holds!r} was trained to, which another "
            "would overwrite: give it a prior of its own, load_prior(...) or a copy of the untrained one"
        )
    if initializer is not None and not isinstance(initializer, nn.Module):
        raise TypeError(f"initializer must be a module, got {type(initializer).__name__}")


def _find_folder(name_or_path: str | Path, revision: str | None) -> Path:
    name = str(name_or_path)
    local = _SHIPPED / PRETRAINED[name] if name in PRETRAINED else Path(name)
    if not local.is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _download(name, revision)
    if not name or not local.is_dir():
        raise ValueError(
            f"name_or_path must be one of the shipped samplers {sorted(PRETRAINED)}, a folder written "
            f"by save_pretrained, or the id 'user/repo' of one on the Hugging Face Hub; got {name!r}"
        )
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for the Hugging Face Hub, but {name!r} is here")
    return local


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing: no sampler was saved there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    version = config.get("format") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{file} is not that of a sampler written by save_pretrained: it has no format")
    if version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, written by deepinv_ud2m {config.get('package_version')}; "
            f"this version, {__version__}, reads up to format {FORMAT}: upgrade deepinv_ud2m"
        )
    for section, keys in _SECTIONS.items():
        _check_section(file, section, config.get(section), keys)
    if config.get("lora") is not None:
        _check_section(file, "lora", config["lora"], ("rank", "alpha", "targets"))
    return config


def _check_section(file: Path, section: str, content, keys: tuple[str, ...]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be used: it has no section {section!r}")
    lacking = [key for key in keys if key not in content]
    if lacking:
        raise ValueError(f"{file} cannot be used: its section {section!r} has no {', '.join(lacking)}")


def _read_weights(file: Path, expected: Mapping) -> dict[str, Tensor]:
    try:
        content = file.read_bytes()
        state = load(content)
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing") from error
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} is truncated, or not a safetensors file: {error}") from error
    with _edited(file.parent):
        complaints = differences(expected["tensors"], shapes(state))
    if complaints:
        raise ValueError(f"{file} does not belong to the {_CONFIG} beside it. Tensors {complaints}")
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise ValueError(
            f"{file} has other values than those that the {_CONFIG} beside it was written for: it was "
            "damaged, or replaced, or saving was interrupted. Save again, or download again"
        )
    return state


def _find_prior(
    prior: Denoiser | str | Path | None, expected: Mapping, state: Mapping[str, Tensor]
) -> Denoiser:
    name = expected["name"]
    if prior is None:
        try:
            prior = load_prior(str(name))
        except (ValueError, OSError, ImportError) as error:
            how = (
                f"prior=load_prior({name!r}, download=True), or weights="
                if name in PUBLISHED
                else "prior="
            )
            raise ValueError(
                f"this sampler was trained with the prior {name!r} (fingerprint "
                f"{expected['fingerprint']}), which is not at hand by that name. Give it as {how}. "
                f"({error})"
            ) from error
    elif not isinstance(prior, nn.Module):
        prior = load_prior(prior)
    info = getattr(prior, "prior_info", None)
    given = type(prior).__name__ if info is None else info.name
    if info is not None and expected["channels"] not in (None, info.channels):
        raise ValueError(
            f"prior: this sampler was trained with {name!r}, for images of {expected['channels']} "
            f"channel(s), got {given!r}, for images of {info.channels}"
        )
    found = fingerprint(prior, _names_in(state, "denoiser."))
    if found != expected["fingerprint"]:
        raise ValueError(
            f"prior: this sampler was trained with {name!r} of fingerprint {expected['fingerprint']}, "
            f"got {given!r} of fingerprint {found}: other weights, or another network"
        )
    return prior


def _find_initializer(
    initializer: nn.Module | None, expected: Mapping, state: Mapping[str, Tensor], folder: Path
) -> nn.Module:
    kind = str(expected["kind"])
    if initializer is not None:
        found = _describe_initializer(initializer, _names_in(state, "initializer."))
        if found != expected:
            raise ValueError(f"initializer: this sampler was trained with {expected}, got {found}")
        return initializer
    if kind not in _INITIALIZERS:
        raise ValueError(
            f"this sampler was trained with a {kind}, which is not stored with it: give it as "
            "initializer=, as it was before training"
        )
    with _edited(folder):
        return _INITIALIZERS[kind](**{key: value for key, value in expected.items() if key != "kind"})


def _build(denoiser: Denoiser, initializer: nn.Module, config: Mapping) -> UD2M:
    unfolded = UnfoldedDenoiser(denoiser, initializer=initializer, **config["unfolded"])
    settings = dict(config["sampler"])
    if settings["output_range"] is not None:
        settings["output_range"] = tuple(settings["output_range"])
    return UD2M(unfolded, **settings)


def _adapt(unfolded: UnfoldedDenoiser, lora: Mapping | None, state: Mapping[str, Tensor]) -> None:
    """Put adapter and trained values in place; after an error there is no adapter."""
    denoiser = unfolded.denoiser
    try:
        if lora is not None:
            _add_adapter(denoiser, lora)
        for network, prefix, _ in _networks(unfolded):
            for name, parameter in prior_parameters(network):
                parameter.requires_grad_(prefix + name in state)
        load_trained_state_dict(unfolded, state)
    except BaseException:
        remove_lora(denoiser)
        raise


def _add_adapter(denoiser: Denoiser, lora: Mapping) -> None:
    layers = {name for name, _ in denoiser.named_modules()}
    absent = [str(name) for name in lora["targets"] if name not in layers]
    if absent:
        raise ValueError(f"lora.targets names layers that the prior does not have: {shorten(absent)}")
    # One exact pattern: a name in a list would also mean all longer names that end with it.
    add_lora(denoiser, lora["rank"], lora["alpha"], "|".join(re.escape(n) for n in lora["targets"]))


def _names_in(state: Mapping[str, Tensor], prefix: str) -> set[str]:
    return {key.removeprefix(prefix) for key in state if key.startswith(prefix)}


@contextmanager
def _edited(folder: Path) -> Iterator[None]:
    """What goes wrong inside comes from the values in config.json, and the message says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / _CONFIG} cannot be used: {error}") from error


# -------------------------------------------------------------------------------------------------
# The Hugging Face Hub


def push_to_hub(
    model: UD2M,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    prior: str | None = None,
    metadata: Mapping | None = None,
    dtype: torch.dtype = torch.float32,
    commit_message: str = "Upload UD2M sampler",
) -> str:
    """
    Upload a sampler to the Hugging Face Hub, in a repository that is made if it does not exist.

    A model card, ``README.md``, is written from the configuration, unless the repository has one.

    :param deepinv_ud2m.UD2M model: the sampler.
    :param str repo_id: ``"user/repo"``, or ``"repo"`` in one's own name.
    :param bool private: whether a repository that is made is private (default: ``False``).
    :param str, None token: access token (default: that of ``hf auth login``).
    :param str, None prior: see :func:`save_pretrained`.
    :param Mapping, None metadata: likewise; it is shown on the model card.
    :param torch.dtype dtype: likewise.
    :param str commit_message: message of the commit.
    :returns: address of the repository.
    :raises ImportError: without ``huggingface_hub``.
    :raises TypeError, ValueError: see :func:`save_pretrained`; nothing is uploaded then.
    """
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, prior=prior, metadata=metadata, dtype=dtype)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = getattr(repository, "repo_id", repo_id)
        if not api.file_exists(repo_id, "README.md"):
            card = model_card(repo_id, _read_config(Path(folder, _CONFIG)))
            Path(folder, "README.md").write_text(card, encoding="utf-8")
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(repository)


def model_card(repo_id: str, config: Mapping) -> str:
    """
    A model card: what the sampler is, how to load it, what it was trained on.

    :param str repo_id: ``"user/repo"``.
    :param Mapping config: the content of ``config.json``.
    :returns: Markdown with a YAML head.
    """
    prior, initializer, lora = config["prior"], config["initializer"]["kind"], config["lora"]
    given = [f'"{repo_id}"']
    if prior["name"] not in PRIORS:  # those of others have to be fetched
        given.append("prior=prior")
    if initializer not in _INITIALIZERS:
        given.append("initializer=initializer")
    channels = "" if prior["channels"] is None else f", {prior['channels']} channel(s)"
    adapter = "none" if lora is None else f"rank {lora['rank']} on {len(lora['targets'])} layers"
    return f"""---
library_name: deepinv
tags: [inverse-problems, posterior-sampling, diffusion, ud2m]
---

# {repo_id}

A UD2M posterior sampler (an unfolded and distilled diffusion model,
[arXiv:2507.02686](https://arxiv.org/abs/2507.02686)) for [deepinv](https://deepinv.github.io), saved
with deepinv_ud2m {config["package_version"]}. The prior is not part of the files.

```python
from deepinv_ud2m import UD2M

model = UD2M.from_pretrained({", ".join(given)})
x_hat = model(y, physics)
```

| | |
|---|---|
| prior | {prior["name"] or "not named"}{channels} |
| fingerprint of the prior | `{prior["fingerprint"]}` |
| iterations K | {config["unfolded"]["num_iterations"]} |
| levels | {", ".join(f"{level:.4g}" for level in config["sampler"]["levels"])} |
| reference error | {config["sampler"].get("reference_error") or "none"} |
| eta | {config["sampler"]["eta"]:g} |
| initialiser | {initializer} |
| LoRA | {adapter} |

```json
{json.dumps(config["metadata"], indent=2)}
```
"""


def _download(repo_id: str, revision: str | None) -> Path:
    hub = _hub()
    print(
        f"Downloading {_CONFIG} and {_WEIGHTS} of {repo_id!r} (revision {revision or 'main'}) from the "
        "Hugging Face Hub, unless they are in its cache. A folder with these files can be given instead."
    )
    try:
        folder = hub.snapshot_download(repo_id, revision=revision, allow_patterns=[_CONFIG, _WEIGHTS])
    except Exception as error:  # of many kinds, by version of the library and of what it uses
        raise OSError(
            f"name_or_path={repo_id!r} is neither a folder nor one of the shipped samplers "
            f"{sorted(PRETRAINED)}, and cannot be downloaded from the Hugging Face Hub: {error}"
        ) from error
    return Path(folder)


def _hub():
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face Hub needs: pip install huggingface_hub (or deepinv_ud2m[hub]). Without "
            "it, copy the files by hand and give their folder"
        ) from error
    return huggingface_hub


#: Shipped samplers: name, and folder in ``weights/``.
PRETRAINED: dict[str, str] = {
    "mnist": "ud2m-mnist",
    "mnist-sr4": "ud2m-mnist-sr4",
    "mnist-accurate": "ud2m-mnist-accurate",
    "photos": "ud2m-photos",
    "photos-posterior": "ud2m-photos-posterior",
}
