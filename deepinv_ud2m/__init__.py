"""UD2M posterior samplers (unfolded and distilled diffusion models) for deepinv."""

from deepinv_ud2m.__about__ import __version__
from deepinv_ud2m.initializers import (
    LinearInitializer,
    PseudoInverseInitializer,
    RAMInitializer,
)
from deepinv_ud2m.lora import add_lora, lora_disabled, merge_lora, remove_lora, unmerge_lora
from deepinv_ud2m.posterior_mean import PosteriorMeanInitializer
from deepinv_ud2m.priors import PriorInfo, load_prior, save_prior
from deepinv_ud2m.proximal import posterior_prox
from deepinv_ud2m.sampler import UD2M, Trajectory
from deepinv_ud2m.schedule import VPSchedule
from deepinv_ud2m.unfolded import UnfoldedDenoiser
from deepinv_ud2m.wiener import WienerInitializer

__all__ = [
    "UD2M",
    "LinearInitializer",
    "PosteriorMeanInitializer",
    "PriorInfo",
    "PseudoInverseInitializer",
    "RAMInitializer",
    "Trajectory",
    "UnfoldedDenoiser",
    "VPSchedule",
    "WienerInitializer",
    "__version__",
    "add_lora",
    "load_prior",
    "lora_disabled",
    "merge_lora",
    "posterior_prox",
    "remove_lora",
    "save_prior",
    "unmerge_lora",
]
