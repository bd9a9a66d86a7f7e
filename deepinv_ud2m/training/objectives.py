"""Losses by name, as recipes list them: ``{loss: energy, patch_size: 8}``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from deepinv.loss import Loss
from torch import Tensor, nn

from deepinv_ud2m.metrics import DigitClassifier, EfficientNetLite, PerceptualDistance
from deepinv_ud2m.metrics.perceptual import EFFICIENTNETS
from deepinv_ud2m.training.adversarial import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    Adversary,
    ConditionalDiscriminator,
)
from deepinv_ud2m.training.controller import DiversityController
from deepinv_ud2m.training.losses import EnergyScoreLoss, L2Loss, PerceptualLoss


@dataclass
class Setting:
    """
    What losses are made for.

    :param int channels: channels of the images.
    :param torch.device device: where to train.
    :param DiversityController, None controller: sets the weight of diversity.
    :param bool download: allow LPIPS to fetch weights that are missing.
    :param bool smoke: take a backbone with random weights for LPIPS, to try a recipe.
    """

    channels: int
    device: torch.device
    controller: DiversityController | None = None
    download: bool = False
    smoke: bool = False


def _energy(
    setting: Setting,
    weight: float = 1.0,
    num_samples: int = 2,
    patch_size: int | None = None,
    features: str | None = None,
    features_size: int | None = None,
) -> Loss:
    """
    The features are of a network of PerceptualDistance, or of the folder of a DigitClassifier. EfficientNet
    may see images of another size than its own, and sees grey images in three channels.
    """
    diversity = setting.controller.weights if setting.controller else 1.0
    embedding = _embedding(features, features_size, setting)
    return EnergyScoreLoss(num_samples, patch_size, embedding, diversity, weight)


def _embedding(features: str | None, size: int | None, setting: Setting) -> Callable[[Tensor], Tensor] | None:
    if features is None:
        return None
    network: str | nn.Module = (
        DigitClassifier.from_pretrained(features) if Path(features).is_dir() else features
    )
    if size is not None:
        if features not in EFFICIENTNETS:
            raise ValueError(f"features_size is for {[*EFFICIENTNETS]}, got it with features {features!r}")
        network = EfficientNetLite(EFFICIENTNETS[features], size)
    embedding = PerceptualDistance(network, device=setting.device).embedding
    if features in EFFICIENTNETS and setting.channels == 1:
        return lambda images: embedding(images.expand(-1, 3, -1, -1))
    return embedding


def _l2(setting: Setting, weight: float = 1.0, of: str = "image") -> Loss:
    return L2Loss(weight, of=of)


def _perceptual(setting: Setting, network: str, weight: float = 1.0) -> Loss:
    return PerceptualLoss(network, download=setting.download, random=setting.smoke, weight=weight)


def _adversarial(
    setting: Setting,
    weight: float = 1.0,
    penalty_weight: float = 0.01,
    base_channels: int = 32,
    num_layers: int = 3,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    ratio: int = 1,
) -> tuple[Loss, Adversary]:
    D = ConditionalDiscriminator(setting.channels, base_channels, num_layers).to(setting.device)
    optimizer = torch.optim.AdamW(D.parameters(), lr=lr, weight_decay=weight_decay)
    adversary = Adversary(D, AdversarialDiscriminatorLoss(penalty_weight=penalty_weight), optimizer, ratio)
    return AdversarialGeneratorLoss(weight), adversary


#: The losses of a recipe. Their arguments, but the first, are the keys they may have.
LOSSES: dict[str, Callable] = {
    "energy": _energy,
    "l2": _l2,
    "perceptual": _perceptual,
    "adversarial": _adversarial,
}


def check_losses(losses: Sequence[Mapping]) -> None:
    """
    :param Sequence[Mapping] losses: of a recipe.
    :raises ValueError: for none, an unknown loss or key, one that is missing, or a value out of range.
    """
    if not losses:
        raise ValueError("losses must be one or more, got none")
    if sum(isinstance(entry, Mapping) and entry.get("loss") == "adversarial" for entry in losses) > 1:
        raise ValueError("losses must have one adversarial loss at most")
    for entry in losses:
        if not isinstance(entry, Mapping) or entry.get("loss") not in LOSSES:
            raise ValueError(f"losses must be {{loss: name, ...}} with a name of {[*LOSSES]}, got {entry!r}")
        try:
            signature(LOSSES[entry["loss"]]).bind(None, **_options(entry))
        except TypeError as error:
            raise ValueError(f"losses: {entry!r}: {error}") from error
        if "features" in entry and "patch_size" in entry:
            raise ValueError(f"losses: {entry!r}: patch_size is for pixels, features have no patches")
        if "features_size" in entry and "features" not in entry:
            raise ValueError(f"losses: {entry!r}: features_size is for features, of which there are none")
        if str(entry.get("features")).startswith("lpips"):
            raise ValueError(f"losses: {entry!r}: LPIPS has no features to compare, take another network")
        if entry["loss"] != "perceptual":  # its network may have to be downloaded
            values = {k: v for k, v in _options(entry).items() if not k.startswith("features")}
            LOSSES[entry["loss"]](Setting(1, torch.device("cpu")), **values)


def make_losses(losses: Sequence[Mapping], setting: Setting) -> tuple[list[Loss], Adversary | None]:
    """
    :param Sequence[Mapping] losses: of a recipe.
    :param Setting setting: what they are made for.
    :returns: the losses of samples, and the adversary, if there is one.
    """
    made = [LOSSES[entry["loss"]](setting, **_options(entry)) for entry in losses]
    adversaries = [one[1] for one in made if isinstance(one, tuple)]
    return [one[0] if isinstance(one, tuple) else one for one in made], next(iter(adversaries), None)


def _options(entry: Mapping) -> dict:
    return {name: value for name, value in entry.items() if name != "loss"}
