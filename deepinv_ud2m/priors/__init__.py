"""Pretrained priors, what they were trained for, and adapters on them.

Any :class:`deepinv.models.Denoiser` is a prior. One that :func:`load_prior` returns also states the
images and noise levels it was trained for, as a :class:`PriorInfo` in its attribute ``prior_info``.
"""

from deepinv_ud2m.priors.info import PriorInfo
from deepinv_ud2m.priors.lora import (
    add_lora,
    freeze_prior,
    has_lora,
    has_merged_lora,
    load_lora_state_dict,
    lora_config,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    prior_parameters,
    prior_state_dict,
    remove_lora,
    unmerge_lora,
)
from deepinv_ud2m.priors.published import PUBLISHED, load_published, random_prior
from deepinv_ud2m.priors.shipped import (
    PRIORS,
    build_network,
    build_unet,
    load_prior,
    network_settings,
    save_prior,
)
from deepinv_ud2m.priors.targets import find_lora_targets

__all__ = [
    "PRIORS",
    "PUBLISHED",
    "PriorInfo",
    "add_lora",
    "build_network",
    "build_unet",
    "find_lora_targets",
    "freeze_prior",
    "has_lora",
    "has_merged_lora",
    "load_lora_state_dict",
    "load_prior",
    "load_published",
    "lora_config",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "network_settings",
    "prior_parameters",
    "prior_state_dict",
    "random_prior",
    "remove_lora",
    "save_prior",
    "unmerge_lora",
]
