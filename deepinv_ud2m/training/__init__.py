"""Training: the unconditional priors."""

from deepinv_ud2m.training.prior import (
    EDMLoss,
    LogNormalSigmaGenerator,
    PriorTrainer,
    denoising_psnr,
    warmup_cosine,
)

__all__ = [
    "EDMLoss",
    "LogNormalSigmaGenerator",
    "PriorTrainer",
    "denoising_psnr",
    "warmup_cosine",
]
