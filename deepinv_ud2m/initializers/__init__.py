"""Where an unfolded denoiser starts: one file for each initializer."""

from deepinv_ud2m.initializers.base import Initializer
from deepinv_ud2m.initializers.learned import PosteriorMeanInitializer
from deepinv_ud2m.initializers.linear import LinearInitializer, PseudoInverseInitializer
from deepinv_ud2m.initializers.ram import RAMInitializer
from deepinv_ud2m.initializers.wiener import WienerInitializer

__all__ = [
    "Initializer",
    "LinearInitializer",
    "PosteriorMeanInitializer",
    "PseudoInverseInitializer",
    "RAMInitializer",
    "WienerInitializer",
]
