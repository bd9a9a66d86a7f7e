"""The solver for deepinv's public benchmark, run by benchopt on the four tasks of that benchmark."""

import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from scripts import EXAMPLES

OBJECTIVE = """
import deepinv as dinv
from benchopt import BaseObjective
from torch.utils.data import DataLoader


class Objective(BaseObjective):
    name = "PSNR"
    min_benchopt_version = "1.8"
    sampling_strategy = "run_once"

    def set_data(self, dataset, physics):
        self.dataset, self.physics = dataset, physics

    def get_objective(self):
        return {"train_dataset": self.dataset, "physics": self.physics}

    def get_one_result(self):
        return {"model": dinv.models.ArtifactRemoval(dinv.models.MedianFilter())}

    def evaluate_result(self, model):
        found = dinv.test(
            model, DataLoader(self.dataset), self.physics, online_measurements=True, device=model.device,
            metrics=[dinv.metric.PSNR(center_crop=-16)], compare_no_learning=True,
        )
        return {"value": found["PSNR"], "before": found["PSNR no learning"]}
"""

DATASET = """
import deepinv as dinv
from benchopt import BaseDataset

from deepinv_ud2m.data import photograph


class Dataset(BaseDataset):
    name = "photographs"
    parameters = {"task": ["denoising", "deblurring", "inpainting", "super-resolution"]}

    def get_data(self):
        x = photograph("astronaut")[0, :, 160:224, 90:154]
        noise, kernel = dinv.physics.GaussianNoise, dinv.physics.functional.gaussian_blur(sigma=(2.0, 2.0))
        physics = {
            "denoising": lambda: dinv.physics.Denoising(noise(0.1)),
            "deblurring": lambda: dinv.physics.Blur(kernel, padding="valid", noise_model=noise(0.05)),
            "inpainting": lambda: dinv.physics.Inpainting((3, 64, 64), mask=0.5),
            "super-resolution": lambda: dinv.physics.Downsampling(factor=2, filter="bicubic"),
        }
        return {"dataset": [x], "physics": physics[self.task]()}
"""


@pytest.mark.slow
def test_the_solver_runs_in_a_benchmark(tmp_path):
    pytest.importorskip("benchopt")
    (tmp_path / "objective.py").write_text(OBJECTIVE)
    for folder in ("datasets", "solvers"):
        (tmp_path / folder).mkdir()
    (tmp_path / "datasets" / "photographs.py").write_text(DATASET)
    shutil.copy(EXAMPLES / "benchopt" / "ud2m.py", tmp_path / "solvers")
    (tmp_path / "none.yml").touch()
    command = [sys.executable, "-m", "benchopt", "run", str(tmp_path), "--no-plot", "--output", "found"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BENCHOPT_CONFIG": str(tmp_path / "none.yml")}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    files = list(tmp_path.rglob("found*.parquet"))
    assert len(files) == 1, result.stdout + result.stderr
    table = pd.read_parquet(files[0])
    assert len(table) == 8, "one sample and the mean of eight, of four tasks"
    gain = table["objective_value"] - table["objective_before"]
    of_mean = table["p_solver_num_samples"] == 8
    assert (gain[of_mean] > 1).all(), table
    assert table.groupby("p_dataset_task")["objective_value"].apply(lambda v: v.iloc[-1] != v.iloc[0]).all()
