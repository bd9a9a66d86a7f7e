r"""Metrics of posterior samplers.

- :mod:`~deepinv_ud2m.metrics.posterior`: are these samples of *this* posterior?
- :mod:`~deepinv_ud2m.metrics.calibration`: is their spread right?
- :mod:`~deepinv_ud2m.metrics.frechet`: do all samples together look like the true images?
- :mod:`~deepinv_ud2m.metrics.perceptual`: does one image look like another?
- :mod:`~deepinv_ud2m.metrics.patches`: has one image the texture of another, wherever it lies?
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
from deepinv_ud2m.metrics.patches import sliced_wasserstein
from deepinv_ud2m.metrics.perceptual import PerceptualDistance
from deepinv_ud2m.metrics.posterior import crps, energy_score, reduced_chi_square, spread_skill_ratio

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
    "sliced_wasserstein",
    "spread_skill_ratio",
]
