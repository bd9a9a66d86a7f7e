"""Training: distillation of posterior samplers, and the unconditional priors they start from."""

from deepinv_ud2m.training.adversarial import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    Adversary,
    ConditionalDiscriminator,
)
from deepinv_ud2m.training.controller import DiversityController
from deepinv_ud2m.training.distillation import distill, plan
from deepinv_ud2m.training.losses import EnergyScoreLoss, GaussianNLLLoss, L2Loss, PerceptualLoss
from deepinv_ud2m.training.prior import denoising_psnr, train_prior
from deepinv_ud2m.training.recipe import Recipe, Stage
from deepinv_ud2m.training.sigmas import StateSigmas
from deepinv_ud2m.training.trainer import DistillationTrainer
from deepinv_ud2m.training.updates import parameter_groups, warmup_cosine

__all__ = [
    "AdversarialDiscriminatorLoss",
    "AdversarialGeneratorLoss",
    "Adversary",
    "ConditionalDiscriminator",
    "DistillationTrainer",
    "DiversityController",
    "EnergyScoreLoss",
    "GaussianNLLLoss",
    "L2Loss",
    "PerceptualLoss",
    "Recipe",
    "Stage",
    "StateSigmas",
    "denoising_psnr",
    "distill",
    "parameter_groups",
    "plan",
    "train_prior",
    "warmup_cosine",
]
