r"""
Settings of the untrained sampler
=================================

Untrained, UD2M is zero-shot LATINO, whose schedule has to be chosen: the first and the last
:math:`\delta_k`, the coupling :math:`\rho`, the level :math:`\sigma_0` of detail beyond the noise, and
the randomness :math:`\eta` of the steps. This script tries random settings on validation digits (which
neither the demos nor the benchmark use) and ranks them by energy score, a proper score that
only the true posterior minimises,

.. math:: \mathbb{E}\|X - x\| - \tfrac12 \mathbb{E}\|X - X'\| ,

relative to the best on each of four tasks and averaged over them. The defaults of
:class:`deepinv_ud2m.UnfoldedDenoiser` are the best of its result, ``benchmark/results/zero_shot.json``,
with :math:`\eta = 1`, the step that is exact where the draws are. The settings of the baselines are
searched likewise by ``python -m deepinv_ud2m.benchmark tune``.
"""

# %%
import argparse
import json
import random
from pathlib import Path

import torch
from tqdm import tqdm

from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
from deepinv_ud2m.benchmark.tasks import make_generator, make_physics
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import energy_score

parser = argparse.ArgumentParser(description="Search the settings of untrained UD2M.")
parser.add_argument("--prior", default="mnist", help="name or folder of the prior")
parser.add_argument("--digits", type=int, default=24, help="validation digits")
parser.add_argument("--samples", type=int, default=4, help="samples per digit, at least 2")
parser.add_argument("--settings", type=int, default=40, help="random settings to try")
parser.add_argument("--out", type=Path, default=Path("runs/zero_shot.json"))
args = parser.parse_args()

# %%
# Four tasks whose unknown part differs: detail, most of the pixels, a hole. Operators and noise levels
# are different for each digit, since the settings serve all.
tasks = ["sr4", "deblur-gaussian", "inpaint-random", "inpaint-box"]
x = mnist_digits("validation", num=args.digits)
problems, measurements = {}, {}
for task in tasks:
    problems[task] = physics = make_physics(task, (1, 32, 32))
    generator = make_generator(task, (1, 32, 32), (0.01, 0.1))
    torch.manual_seed(0)
    measurements[task] = physics(x, **generator.step(len(x), seed=0))
prior = load_prior(args.prior)

# %%
# The settings, without repetition.
rng = random.Random(0)
choices = {
    "delta_first": [2.0, 3.0, 4.0, 6.0, 8.0],
    "delta_last": [0.5, 1.0, 1.5, 2.0],
    "rho": [0.5, 1.0, 2.0, 4.0],
    "reference_level": [0.0, 0.05, 0.1, 0.2],
    "eta": [0.0, 0.5, 0.8, 1.0],
}
drawn = (tuple(rng.choice(values) for values in choices.values()) for _ in range(args.settings))
settings = [dict(zip(choices, values, strict=True)) for values in dict.fromkeys(drawn)]

# %%
# The search. What is known is written after each setting.
rows = []
args.out.parent.mkdir(parents=True, exist_ok=True)
for setting in tqdm(settings, desc="settings"):
    delta = torch.tensor([setting["delta_first"], setting["delta_last"]]).log10()
    unfolded = UnfoldedDenoiser(
        prior,
        delta=torch.logspace(*delta, 3),
        rho=setting["rho"],
        reference_level=setting["reference_level"],
    )
    model = UD2M(unfolded, eta=setting["eta"])
    scores = {}
    for task, physics in problems.items():
        generator = torch.Generator().manual_seed(0)
        samples = model.sample(measurements[task], physics, args.samples, generator=generator)
        scores[task] = energy_score(samples, x).mean().item()
    rows.append({"setting": setting, "energy_score": scores})
    args.out.write_text(
        json.dumps({"digits": args.digits, "samples": args.samples, "rows": rows}, indent=1)
    )

# %%
# The ranking.
best = {task: min(row["energy_score"][task] for row in rows) for task in tasks}


def relative_score(row):
    return sum(row["energy_score"][task] / best[task] for task in tasks) / len(tasks)


print(f"best of each task: { {task: round(score, 3) for task, score in best.items()} }")
for row in sorted(rows, key=relative_score)[:5]:
    scores = {task: round(score, 3) for task, score in row["energy_score"].items()}
    print(f"{relative_score(row):.3f} {row['setting']} {scores}")
