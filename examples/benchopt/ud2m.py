"""
UD2M in deepinv's public benchmark (https://github.com/deepinv/benchmarks): copy this file into the folder
``solvers`` of a benchmark there, and run ``benchopt run BENCHMARK -s UD2M``.

A sample of the posterior has texture, and the mean of several the higher PSNR; both are run.
"""

import torch
from benchopt import BaseSolver
from deepinv.models import Reconstructor

from deepinv_ud2m import UD2M


class MeanOfSamples(Reconstructor):
    """The mean of samples of the posterior, as one image."""

    def __init__(self, sampler, num_samples):
        super().__init__()
        self.sampler, self.num_samples = sampler, num_samples

    def forward(self, y, physics):
        return self.sampler.sample(y, physics, self.num_samples).mean(0)


class Solver(BaseSolver):
    name = "UD2M"
    sampling_strategy = "run_once"
    requirements = ["pip::deepinv_ud2m"]  # noqa: RUF012
    parameters = {"checkpoint": ["photos"], "num_samples": [1, 8]}  # noqa: RUF012
    test_config = {"num_samples": 2}  # noqa: RUF012

    def set_objective(self, train_dataset=None, physics=None):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = UD2M.from_pretrained(self.checkpoint, device=device)
        if self.num_samples > 1:
            self.model = MeanOfSamples(self.model, self.num_samples)
        self.model.device = device

    def run(self, _):
        pass

    def get_result(self):
        return {"model": self.model}
