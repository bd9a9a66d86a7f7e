"""Priors that ship with the package, and priors trained with it: a folder of two files.

``config.json`` holds the settings of the network, what the prior was trained for, and the sha256 of
``model.safetensors``, which holds the weights in float16. A prior that ships also has an entry in ``PRIORS``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from deepinv.models import ADMUNet, Denoiser

from deepinv_ud2m.checks import check_count, check_device
from deepinv_ud2m.files import (
    check_digest,
    check_finite,
    load_weights,
    read_json,
    read_weights,
    write_files,
)
from deepinv_ud2m.priors.info import PriorInfo
from deepinv_ud2m.priors.networks import PixelShuffledDenoiser
from deepinv_ud2m.priors.published import PUBLISHED, load_published

#: Shipped priors: name, and folder in ``weights/``.
PRIORS = {"mnist": "prior-mnist", "photos": "prior-photos"}

_SHIPPED = Path(__file__).parents[1] / "weights"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def load_prior(
    name: str | Path,
    device: torch.device | str = "cpu",
    *,
    weights: str | Path | None = None,
    download: bool = False,
) -> Denoiser:
    """
    A pretrained prior, frozen and in evaluation mode.

    ===================== ======================================================== =================
    ``name``              images                                                   weights
    ===================== ======================================================== =================
    ``"mnist"``           grey 32x32 digits                                        ship
    ``"photos"``          colour photographs of any size                           ship
    ``"imagenet256"``     ADM, ImageNet, 256x256, without classes                  2.2 GB, deepinv's
    ``"ffhq256"``         ADM, faces, 256x256                                      374 MB, deepinv's
    ``"lsun-bedroom256"`` DDPM, bedrooms, 256x256; needs ``diffusers``             455 MB, Google's
    ===================== ======================================================== =================

    Nothing that the files hold is executed: weights are read without unpickling, and no class or module
    is chosen by a file.

    :param str, pathlib.Path name: a name of the table, or the path of a folder written by
        :func:`save_prior`.
    :param torch.device, str device: where to put the prior (default: cpu).
    :param str, pathlib.Path weights: for priors that do not ship: the file of the weights, ``.pt`` or
        ``.safetensors``. For ``"lsun-bedroom256"``, the folder of a copy of Google's repository or of a
        diffusers pipeline.
    :param bool download: download the weights if they are not in the cache (default: ``False``).
    :returns: a denoiser with the attribute ``prior_info``, a :class:`PriorInfo`.
    :raises ValueError: for an unknown name or device, settings that are not accepted, or weights that are
        damaged or of another network.
    :raises FileNotFoundError: if weights that do not ship are not here; it says where to put them.
    :raises ImportError, OSError: without diffusers, or if the download fails.
    :raises TypeError: if ``name`` is neither text nor a path.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"name must be the name of a prior, or a folder, got {name!r}")
    check_device(device)
    if name in PUBLISHED:
        network, card = load_published(name, weights, download)
        low, high = network.schedule.sigma([0, network.schedule.num_timesteps - 1]).tolist()
        info = PriorInfo(name, 3, low, high, card.size_multiple, card.image_size)
    elif weights is not None or download:
        raise ValueError(f"weights and download are for the priors {sorted(PUBLISHED)}, not {str(name)!r}")
    else:
        network, info = _load_folder(name)
    network.prior_info = info
    return network.requires_grad_(False).eval().to(device)


def save_prior(network: Denoiser, config: Mapping, folder: str | Path) -> None:
    """
    Write a prior to a folder that :func:`load_prior` reads.

    An earlier prior in the folder is replaced whole, or stays if anything fails.

    :param deepinv.models.Denoiser network: the network, as :func:`build_network` makes it.
    :param Mapping config: ``"network"``: arguments of the network, ``"prior"``: those of
        :class:`PriorInfo`, and any further entries (training data, budget, metrics).
    :param str, pathlib.Path folder: where to write; made if it does not exist.
    :raises ValueError: for weights that are not finite in float16, or settings that are not accepted.
    :raises OSError: if the folder cannot be written.
    """
    _check_entries(config)
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    check_finite(state, "of this network, in float16,")
    weights = safetensors.torch.save(state)
    config = {**config, "sha256": hashlib.sha256(weights).hexdigest()}
    text = json.dumps(config, indent=2) + "\n"
    write_files(Path(folder), {_WEIGHTS: weights, _CONFIG: text.encode()})


def _check_entries(config: Mapping) -> PriorInfo:
    """The info of a configuration whose network has settings that are accepted."""
    entries = [config.get(key) for key in ("prior", "network")] if isinstance(config, Mapping) else []
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"config must have the dictionaries 'prior' and 'network', got {config!r}")
    _check_settings(config["network"])
    return _prior_info(config)


def network_settings(name: str | Path) -> dict:
    """
    The settings of the network of a shipped prior, ``config["network"]`` of :func:`build_network`.

    :param str, pathlib.Path name: its name, or a folder written by :func:`save_prior`.
    :raises ValueError: for another name or folder, or a prior that is not of this package.
    """
    if name in PUBLISHED:
        raise ValueError(
            f"name must be one of the priors {[*PRIORS]} or a folder written by save_prior, got {name!r}"
        )
    return _read_config(name)[1]["network"]


def _load_folder(name: str | Path) -> tuple[Denoiser, PriorInfo]:
    folder, config = _read_config(name)
    try:
        info = _prior_info(config)
        with torch.device("meta"):  # no memory for a network that the weights may not fit
            network = build_network(config)
    # Settings that are accepted one by one may not make a network.
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG} cannot be used: {error or repr(error)}") from error
    weights = folder / _WEIGHTS
    check_digest(weights, config["sha256"])
    load_weights(network, read_weights(weights), weights)
    # A sampler is saved with the name by which its prior is found again.
    return network, replace(info, name=str(name))


def _read_config(name: str | Path) -> tuple[Path, dict]:
    folder = _SHIPPED / PRIORS[name] if name in PRIORS else Path(name)
    file = folder / _CONFIG
    if not os.path.isfile(file):  # pathlib's raises for some names
        raise ValueError(
            f"name must be one of the priors {[*PRIORS, *PUBLISHED]} or a folder with {_CONFIG} and "
            f"{_WEIGHTS}, got {str(name)!r}"
        )
    config = read_json(file)
    if "unfolded" in config:
        raise ValueError(f"{file} is the folder of a sampler: UD2M.from_pretrained loads it")
    for key, kind in {"prior": dict, "network": dict, "sha256": str}.items():
        if not isinstance(config.get(key), kind):
            raise ValueError(
                f"{file} cannot be used: {key!r} must be a {kind.__name__}, got {config.get(key)!r}"
            )
    return folder, config


def _prior_info(config: Mapping) -> PriorInfo:
    try:
        return PriorInfo(**config["prior"])
    except TypeError as error:  # an entry is missing, or is unknown
        raise ValueError(f"the entry 'prior' does not fit: {error}") from error


def build_network(config: Mapping) -> Denoiser:
    """
    The network of a shipped prior, with random weights.

    It is deepinv's ADMUNet, which brings the EDM preconditioning, on pixel-unshuffled images.

    :param Mapping config: ``config["network"]`` holds ``pixel_shuffle``, optionally ``pad_to_multiple``
        (1 by default) and ``checkerboard_filter`` (none by default), see
        :class:`deepinv_ud2m.priors.networks.PixelShuffledDenoiser`, and arguments of
        :class:`deepinv.models.ADMUNet`. ``config["prior"]`` holds the arguments of
        :class:`PriorInfo`.
    :raises ValueError: for settings that are not accepted; it names setting, value and what is accepted.
    """
    channels, settings = _check_entries(config).channels, config["network"]
    inner = build_unet(settings, channels, channels)
    return PixelShuffledDenoiser(
        inner,
        settings["pixel_shuffle"],
        settings.get("pad_to_multiple", 1),
        settings.get("checkerboard_filter"),
    )


def build_unet(settings: Mapping, in_channels: int, out_channels: int) -> ADMUNet:
    """
    The ADMUNet inside such a network, on pixel-unshuffled images.

    :param Mapping settings: ``config["network"]`` of :func:`build_network`.
    :param int in_channels: channels of its input images, before they are unshuffled.
    :param int out_channels: channels of its output images, after they are shuffled.
    :raises ValueError: for settings that are not accepted, as in :func:`build_network`.
    """
    _check_settings(settings)
    block = settings["pixel_shuffle"] ** 2
    return ADMUNet(
        in_channels=check_count("in_channels", in_channels) * block,
        out_channels=check_count("out_channels", out_channels) * block,
        pretrained=None,
        **{name: value for name, value in settings.items() if name not in _OF_PIXELS},
    )


def _check_settings(settings: Mapping) -> None:
    if "pixel_shuffle" not in settings:
        raise ValueError(f"the network needs pixel_shuffle, got {sorted(settings)}")
    unknown = sorted(settings.keys() - _SETTINGS.keys())
    if unknown:
        raise ValueError(f"the network has no setting {unknown}, accepted: {sorted(_SETTINGS)}")
    for name, value in settings.items():
        accepted, is_accepted = _SETTINGS[name]
        if not is_accepted(value):
            raise ValueError(f"network setting {name} must be {accepted}, got {value!r}")


def _is_count(value: float) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 1 <= value <= 1024


def _are_counts(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) <= 16 and all(map(_is_count, value))


def _is_positive(value: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < math.inf


_COUNT = ("an integer from 1 to 1024", _is_count)

# What the settings of a network may be. ADMUNet itself ignores arguments that it does not know, and
# takes hours to build where they are large.
_OF_PIXELS: dict[str, tuple[str, Callable]] = {
    "pixel_shuffle": _COUNT,
    "pad_to_multiple": _COUNT,
    "checkerboard_filter": ("a positive number or none", lambda v: v is None or _is_positive(v)),
}
_SETTINGS: dict[str, tuple[str, Callable]] = {
    **_OF_PIXELS,
    "img_resolution": _COUNT,
    "model_channels": _COUNT,
    "channel_mult": ("1 to 16 integers from 1 to 1024", lambda v: _are_counts(v) and len(v) > 0),
    "channel_mult_emb": _COUNT,
    "num_blocks": _COUNT,
    "attn_resolutions": ("up to 16 integers from 1 to 1024", _are_counts),
    "dropout": ("a number in [0, 1)", lambda v: isinstance(v, Real) and 0 <= float(v) < 1),
    "pixel_std": ("a positive number", _is_positive),
}
