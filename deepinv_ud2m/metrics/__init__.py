r"""Metrics of posterior samplers.

- :mod:`~deepinv_ud2m.metrics.posterior`: are these samples of *this* posterior? Energy score, CRPS and
  spread-skill ratio compare several samples with the true image, the reduced chi-square compares them
  with the measurement. Functions on samples `[S, B, C, H, W]`.
- :mod:`~deepinv_ud2m.metrics.calibration`: is their spread right? Ranks and coverage.
- :mod:`~deepinv_ud2m.metrics.frechet`: do all samples together look like the true images? A distance
  between two sets of images.
- :mod:`~deepinv_ud2m.metrics.perceptual`: does one image look like another? A deepinv ``Metric``.
- :mod:`~deepinv_ud2m.metrics.features`: the networks whose features are compared.

None of them replaces the others. A sampler that returns random true images has a good Fréchet distance,
the posterior mean has a good PSNR, and samples of the prior are calibrated.
"""

from deepinv_ud2m.metrics.calibration import (
    coverage,
    coverage_curve,
    coverage_error,
    coverage_error_quantile,
    rank,
)
from deepinv_ud2m.metrics.features import DigitClassifier, EfficientNetLite
from deepinv_ud2m.metrics.frechet import frechet_distance, frechet_influence, gaussian_frechet
from deepinv_ud2m.metrics.perceptual import PerceptualDistance
from deepinv_ud2m.metrics.posterior import (
    crps,
    energy_score,
    reduced_chi_square,
    spread_skill_ratio,
)

__all__ = [
    "DigitClassifier",
    "EfficientNetLite",
    "PerceptualDistance",
    "coverage",
    "coverage_curve",
    "coverage_error",
    "coverage_error_quantile",
    "crps",
    "energy_score",
    "frechet_distance",
    "frechet_influence",
    "gaussian_frechet",
    "rank",
    "reduced_chi_square",
    "spread_skill_ratio",
]
