"""Measurements: what the sampler costs."""
