"""Training: distillation of posterior samplers, and the unconditional priors they start from."""

from deepinv_ud2m.training.discriminator import ConditionalDiscriminator
from deepinv_ud2m.training.first_guess import FirstGuessTrainer
from deepinv_ud2m.training.levels import SamplerLevels
from deepinv_ud2m.training.losses import (
    AdversarialDiscriminatorLoss,
    AdversarialGeneratorLoss,
    EnergyScoreLoss,
    FirstGuessLoss,
    L2Loss,
    PerceptualLoss,
)
from deepinv_ud2m.training.prior import (
    EDMLoss,
    LogNormalSigmaGenerator,
    PriorTrainer,
    denoising_psnr,
    train_prior,
    warmup_cosine,
)
from deepinv_ud2m.training.start import sampler_to_train
from deepinv_ud2m.training.trainer import DistillationTrainer, parameter_groups

__all__ = [
    "AdversarialDiscriminatorLoss",
    "AdversarialGeneratorLoss",
    "ConditionalDiscriminator",
    "DistillationTrainer",
    "EDMLoss",
    "EnergyScoreLoss",
    "FirstGuessLoss",
    "FirstGuessTrainer",
    "L2Loss",
    "LogNormalSigmaGenerator",
    "PerceptualLoss",
    "PriorTrainer",
    "SamplerLevels",
    "denoising_psnr",
    "parameter_groups",
    "sampler_to_train",
    "train_prior",
    "warmup_cosine",
]
