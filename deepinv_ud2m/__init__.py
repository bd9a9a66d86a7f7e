"""UD2M posterior samplers (unfolded and distilled diffusion models) for deepinv."""

from deepinv_ud2m.__about__ import __version__
from deepinv_ud2m.initializers import (
    Initializer,
    LinearInitializer,
    PosteriorMeanInitializer,
    PseudoInverseInitializer,
    RAMInitializer,
    WienerInitializer,
)
from deepinv_ud2m.priors import (
    PriorInfo,
    add_lora,
    load_prior,
    merge_lora,
    remove_lora,
    save_prior,
    unmerge_lora,
)
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.proximal import posterior_prox
from deepinv_ud2m.sampler import UD2M, Trajectory
from deepinv_ud2m.schedule import VPSchedule
from deepinv_ud2m.unfolded import UnfoldedDenoiser

__all__ = [
    "UD2M",
    "Initializer",
    "LinearInitializer",
    "PosteriorMeanInitializer",
    "PriorInfo",
    "Problem",
    "PseudoInverseInitializer",
    "RAMInitializer",
    "Trajectory",
    "UnfoldedDenoiser",
    "VPSchedule",
    "WienerInitializer",
    "__version__",
    "add_lora",
    "load_prior",
    "merge_lora",
    "posterior_prox",
    "remove_lora",
    "save_prior",
    "unmerge_lora",
]
