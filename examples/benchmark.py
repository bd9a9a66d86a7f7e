r"""
UD2M beside deepinv's DPS and DiffPIR: a benchmark that ends in a table
=======================================================================

Seven pixels of ten are missing in each of eight digits, and the others are noisy:

.. math:: y = m \odot (x + \sigma_y n), \qquad \sigma_y = 0.05 .

All methods share the prior. DPS and DiffPIR have the settings whose energy score was best on 16 other digits.
The command line does the same on your images: ``python -m deepinv_ud2m.benchmark``, whose ``tune`` searches
such settings. It needs ``pip install -e ".[benchmark]"``.
"""

# %%
# Images and methods.
import tempfile

from deepinv_ud2m import load_prior
from deepinv_ud2m.benchmark.methods import Entry
from deepinv_ud2m.benchmark.report import summarise
from deepinv_ud2m.benchmark.rows import read_rows
from deepinv_ud2m.benchmark.run import Study, run
from deepinv_ud2m.data import mnist_digits

x = mnist_digits("test", num=8)
methods = [
    Entry("ud2m-distilled", "UD2M", {"checkpoint": "mnist"}),
    Entry("diffpir", "DiffPIR", {"zeta": 0.6, "lambda_": 1.0}),
    Entry("dps", "DPS", {"num_steps": 100, "guidance": "norm", "weight": 170.0}),
]

# %%
# Four samples of each digit by each method. A run that was stopped goes on from its folder.
study = Study(load_prior("mnist"), x, ["inpaint-random"], methods, sigma_y=0.05, num_samples=4)
with tempfile.TemporaryDirectory() as folder:
    run(folder, study)
    lines = summarise(read_rows(folder)).set_index("method")

# %%
# The table. Energy score and CRPS are proper scores of several samples: lower is better, ± one standard
# error. The spread-skill ratio is 1 for a sampler that is calibrated. DPS takes a gradient of the network in
# each step besides (backward). Eight digits tell a large difference only; the results have 64 to 256.
lines["energy score"] = [f"{row.energy_score:.2f} ± {row.energy_score_se:.2f}" for row in lines.itertuples()]
lines["CRPS"] = [f"{row.crps:.4f} ± {row.crps_se:.4f}" for row in lines.itertuples()]
names = {
    "spread_skill": "spread-skill",
    "psnr_mean": "PSNR of the mean",
    "nfe": "NFE",
    "nfe_backward": "backward",
}
lines = lines.rename(columns=names).round({"spread-skill": 2, "PSNR of the mean": 1})
print(lines[["energy score", "CRPS", *names.values()]].to_string(index_names=False))
