"""Comparison of posterior samplers: ``python -m deepinv_ud2m.benchmark --help``."""

try:
    import pandas  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error}: the benchmark needs pip install deepinv_ud2m[benchmark]") from error
