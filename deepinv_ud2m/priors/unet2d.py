"""diffusers' ``UNet2DModel`` from a folder: settings and weights, and no code that a file names.

diffusers' own loaders choose classes, and in some versions modules, by what the files of a folder say.
Here the class is fixed, settings are JSON, and weights are read without unpickling.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import nn

from deepinv_ud2m.files import load_weights, read_json, read_weights

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# The schedule of deepinv_ud2m.VPSchedule in diffusers' words: what must be stated, and what need not.
_BETAS = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
}
_DEFAULTS = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}

# Attention layers in the files of early versions of diffusers, and their names today.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def unet2d_class() -> type:
    """``UNet2DModel``; ImportError says how to install diffusers."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "this prior needs diffusers: pip install diffusers, or deepinv_ud2m[diffusers]"
        ) from error
    return UNet2DModel


def build_unet2d(full_size: bool) -> nn.Module:
    """The network of Ho et al. (2020) for 256x256 images, or a small one, with random weights."""
    channels = (128, 128, 256, 256, 512, 512) if full_size else (32, 32)
    down = ["DownBlock2D"] * len(channels)
    down[-2 if full_size else -1] = "AttnDownBlock2D"
    network = unet2d_class()(
        sample_size=256 if full_size else 32,
        layers_per_block=2 if full_size else 1,
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=[block.replace("Down", "Up") for block in reversed(down)],
    )
    return network.eval()


def load_unet2d(folder: Path) -> nn.Module:
    """
    Load a network that predicts the noise of colour images under the linear schedule, onto the CPU.

    :param pathlib.Path folder: a diffusers pipeline (``unet/`` and ``scheduler/``), or a folder that
        holds ``config.json``, ``scheduler_config.json`` and the weights itself.
    :raises ValueError: if a file is missing or damaged, or of another network or schedule.
    """
    unet, scheduler = folder / "unet", folder / "scheduler"
    if not unet.is_dir():
        unet = scheduler = folder
    _check_schedule(scheduler / "scheduler_config.json")
    network = _build(unet / "config.json")
    file = next((unet / name for name in _WEIGHTS if (unet / name).is_file()), None)
    if file is None:
        raise ValueError(f"weights: {unet} holds neither {' nor '.join(_WEIGHTS)}")
    state = {}
    for name, value in read_weights(file).items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        state[name] = value
    load_weights(network, state, file)
    return network.eval()


def _build(file: Path) -> nn.Module:
    config, kind = read_json(file), unet2d_class()
    for name, value in {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3}.items():
        if config.get(name) != value:
            raise ValueError(f"weights: {file}: {name} must be {value!r}, got {config.get(name)!r}")
    known = inspect.signature(kind).parameters
    try:
        with torch.device("meta"):
            return kind(**{name: value for name, value in config.items() if name in known})
    except Exception as error:  # diffusers checks few of its arguments
        raise ValueError(f"weights: {file} does not describe a network: {error!r}") from error


def _check_schedule(file: Path) -> None:
    config, expected = _DEFAULTS | read_json(file), _BETAS | _DEFAULTS
    stated = {name: config.get(name) for name in expected}
    if stated != expected:
        raise ValueError(f"weights: the schedule of {file} is another: {stated}, expected {expected}")
