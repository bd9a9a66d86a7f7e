r"""Metrics of posterior samplers.

- :mod:`~deepinv_ud2m.metrics.posterior`: is it a sample of *this* posterior? Coverage, CRPS and energy
  score compare several samples to the one true image, the measurement consistency compares them to
  the measurement. Functions on samples ``[S, B, C, H, W]``.
- :mod:`~deepinv_ud2m.metrics.frechet`: do all samples together look like the true images? A distance
  between two sets of images.
- :mod:`~deepinv_ud2m.metrics.perceptual`: does one image look like another? A deepinv ``Metric``.
- :mod:`~deepinv_ud2m.metrics.features`: the networks that look.

None of them replaces the others: a sampler that returns random true images has a good Fréchet
distance, the posterior mean a good PSNR, and samples of the prior are calibrated.
"""

from deepinv_ud2m.metrics.features import DigitClassifier, EfficientNetLite
from deepinv_ud2m.metrics.frechet import frechet_distance, frechet_influence, gaussian_frechet
from deepinv_ud2m.metrics.perceptual import PerceptualDistance
from deepinv_ud2m.metrics.posterior import (
    coverage,
    coverage_curve,
    coverage_error,
    coverage_error_quantile,
    credible_level,
    crps,
    energy_score,
    measurement_consistency,
)

__all__ = [
    "DigitClassifier",
    "EfficientNetLite",
    "PerceptualDistance",
    "coverage",
    "coverage_curve",
    "coverage_error",
    "coverage_error_quantile",
    "credible_level",
    "crps",
    "energy_score",
    "frechet_distance",
    "frechet_influence",
    "gaussian_frechet",
    "measurement_consistency",
]
