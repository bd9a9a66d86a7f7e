"""Pretrained diffusion priors by name, and what a prior can be used for.

Any :class:`deepinv.models.Denoiser` is a prior. One that is loaded here also states the images and
noise levels it was trained for, as a :class:`PriorInfo` in its attribute ``prior_info``, so that
leaving them is noticed before it shows in the images. Set the attribute on a denoiser of your own
to get the same checks.

A new prior that ships is one entry in ``PRIORS``, one with weights from elsewhere in ``PUBLISHED``.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from deepinv.models import ADMUNet, Denoiser
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deepinv_ud2m.networks import PixelShuffledDenoiser
from deepinv_ud2m.published import PUBLISHED, load_published

_WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class PriorInfo:
    """
    What a prior was trained for.

    :param str name: name, for messages.
    :param int channels: number of image channels.
    :param float sigma_min: smallest noise level, in units of the image.
    :param float sigma_max: largest noise level.
    :param int size_multiple: height and width must be multiples of it.
    :param int, None image_size: height and width of the training images; ``None`` if the prior
        suits any size.
    """

    name: str
    channels: int
    sigma_min: float
    sigma_max: float
    size_multiple: int = 1
    image_size: int | None = None

    def check_images(self, shape: torch.Size) -> None:
        """
        :param torch.Size shape: shape of the images, `[B, C, H, W]`.
        :raises ValueError: if the prior cannot take them; it warns if it was not trained on their size.
        """
        if len(shape) != 4:
            raise ValueError(
                f"the prior {self.name!r} takes images of shape [B, C, H, W], but the images of this "
                f"problem have shape {list(shape)}"
            )
        channels, *size = shape[1:]
        if channels != self.channels:
            raise ValueError(
                f"the prior {self.name!r} takes images with {self.channels} channel(s), but the "
                f"images of this problem have shape {list(shape)}: {channels} channel(s)"
            )
        if any(n < self.size_multiple or n % self.size_multiple for n in size):
            raise ValueError(
                f"the prior {self.name!r} takes images whose sides are multiples of "
                f"{self.size_multiple}, but the images of this problem are {size[0]}x{size[1]}: "
                "crop or pad them"
            )
        if self.image_size is not None and any(n != self.image_size for n in size):
            warnings.warn(
                f"the prior {self.name!r} was trained on {self.image_size}x{self.image_size} "
                f"images; those of this problem are {size[0]}x{size[1]}",
                stacklevel=3,
            )

    def check_levels(self, levels: torch.Tensor) -> None:
        """
        Warn if any level is outside the range of the prior.

        :param torch.Tensor levels: noise levels that the prior is to denoise.
        """
        low, high = levels.min().item(), levels.max().item()
        if low < 0.99 * self.sigma_min or high > 1.01 * self.sigma_max:
            warnings.warn(
                f"the prior {self.name!r} knows noise levels from {self.sigma_min} to "
                f"{self.sigma_max}, but is asked for {low:.3g} to {high:.3g}; they are clamped",
                stacklevel=4,
            )


def load_prior(
    name: str,
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

    :param str name: one of the table, or the path of a folder written by :func:`save_prior`.
    :param torch.device, str device: where to put it (default: cpu).
    :param str, pathlib.Path weights: file of the weights, ``.pt`` or ``.safetensors`` (of a diffusers
        prior, folder), for those that do not ship.
    :param bool download: download them, if they are not in the cache (default: ``False``).
    :returns: a denoiser with the attribute ``prior_info``.
    :raises ValueError: for an unknown name, a folder whose ``config.json`` is damaged, or weights that
        are damaged or do not fit.
    :raises FileNotFoundError: if weights that do not ship are not here; it says where to put them.
    :raises ImportError, OSError: without diffusers, or if the download fails.
    :raises TypeError: if ``name`` is neither text nor a path.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"name must be the name of a prior, or a folder, got {name!r}")
    if name in PUBLISHED:
        network, entry = load_published(name, weights, download)
        low, high = network.schedule.sigma([0, network.schedule.num_timesteps - 1]).tolist()
        info = PriorInfo(name, 3, low, high, entry.size_multiple, entry.image_size)
    elif weights is not None or download:
        raise ValueError(
            f"weights and download are for the priors {sorted(PUBLISHED)}, not {str(name)!r}"
        )
    else:
        network, info = _load_shipped(name)
    network.prior_info = info
    return network.requires_grad_(False).eval().to(device)


def _read_config(name: str | Path) -> tuple[dict, Path]:
    """The configuration of a prior that :func:`save_prior` wrote, and its file."""
    folder = _WEIGHTS / PRIORS[name] if name in PRIORS else Path(name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"name must be one of the priors {[*PRIORS, *PUBLISHED]} or a folder with config.json and "
            f"model.safetensors, got {str(name)!r}"
        )
    try:
        config = json.loads(config_file.read_text())
        if "unfolded" in config:
            raise ValueError("this is the folder of a sampler: UD2M.from_pretrained loads it")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config_file} cannot be used: {error!r}") from error
    return config, config_file


def _load_shipped(name: str) -> tuple[Denoiser, PriorInfo]:
    config, config_file = _read_config(name)
    try:
        network, info = build_network(config), PriorInfo(**config["prior"])
        info = replace(info, name=str(name))  # by which it is found again, for samplers of it
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file} cannot be used: {error!r}") from error
    folder = config_file.parent
    weights = folder / "model.safetensors"
    try:
        network.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights of the prior in {folder} cannot be used: {error}") from error
    return network, info


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
    config, config_file = _read_config(name)
    if "network" not in config:
        raise ValueError(f"{config_file} cannot be used: it has no entry 'network'")
    return config["network"]


def save_prior(network: Denoiser, config: Mapping, folder: str | Path) -> None:
    """
    Write a prior as ``model.safetensors`` (float16) and ``config.json``.

    :param deepinv.models.Denoiser network: the network, as :func:`build_network` makes it.
    :param Mapping config: ``"network"``: arguments of the network, ``"prior"``: those of
        :class:`PriorInfo`, and any further entries (training data, budget, metrics).
    :param str, pathlib.Path folder: where to write; made if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_network(config: Mapping) -> Denoiser:
    """
    The network of a shipped prior, with random weights: deepinv's ADMUNet, which brings the EDM
    preconditioning, on pixel-unshuffled images.

    :param Mapping config: ``config["network"]`` holds ``pixel_shuffle``, optionally ``pad_to_multiple``
        (1 by default) and ``checkerboard_filter`` (none by default), see
        :class:`deepinv_ud2m.networks.PixelShuffledDenoiser`, and the arguments of
        :class:`deepinv.models.ADMUNet`;
        ``config["prior"]["channels"]`` the channels of the images.
    :raises ValueError: for arguments that ADMUNet does not have (itself, it would ignore them).
    """
    settings, channels = config["network"], config["prior"]["channels"]
    inner = build_unet(settings, channels, channels)
    of_pixels = (settings.get(name, default) for name, default in _OF_PIXELS.items())
    return PixelShuffledDenoiser(inner, *of_pixels)


def build_unet(settings: Mapping, in_channels: int, out_channels: int) -> ADMUNet:
    """
    The ADMUNet inside such a network, on pixel-unshuffled images.

    :param Mapping settings: ``config["network"]`` of :func:`build_network`.
    :param int in_channels: channels of the images it takes, before they are unshuffled.
    :param int out_channels: those of the images it gives.
    :raises ValueError: as there, or without ``pixel_shuffle``.
    """
    if "pixel_shuffle" not in settings:
        raise ValueError(f"the network needs pixel_shuffle, got {sorted(settings)}")
    options = {name: value for name, value in settings.items() if name not in _OF_PIXELS}
    unknown = options.keys() - inspect.signature(ADMUNet).parameters.keys()
    if unknown:
        raise ValueError(f"the network has no argument {sorted(unknown)}")
    block = settings["pixel_shuffle"] ** 2
    channels = {"in_channels": in_channels * block, "out_channels": out_channels * block}
    return ADMUNet(**channels, pretrained=None, **options)


# Settings of the network that are not ADMUNet's, and their defaults.
_OF_PIXELS = {"pixel_shuffle": None, "pad_to_multiple": 1, "checkerboard_filter": None}


#: Shipped priors: name, and folder in ``weights/``.
PRIORS = {"mnist": "prior-mnist", "photos": "prior-photos"}
