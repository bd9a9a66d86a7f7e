r"""
Settings of the untrained sampler and of DiffPIR
================================================

Untrained, UD2M is zero-shot LATINO, whose schedule has to be chosen; so have the two parameters of
DiffPIR, the baseline of ``demo_superresolution.py``. Both are searched with the same care: a list of
settings on the validation digits (none of which the demos or the benchmark use), ranked by energy
score, a proper score of a posterior sampler that is smallest for the true posterior,

.. math:: \mathbb{E}\|X - x\| - \tfrac12 \mathbb{E}\|X - X'\| ,

averaged over four problems, relative to the best setting of each. The defaults in ``unfolded.py`` are
the winners of this search.
"""

# %%
import argparse
import itertools
import json
import random
from pathlib import Path

import deepinv as dinv
import torch
from tqdm import tqdm

from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.data import mnist_digits

parser = argparse.ArgumentParser(description="Search the settings of zero-shot UD2M and DiffPIR.")
parser.add_argument("--prior", default="mnist", help="name or folder of the prior")
parser.add_argument("--digits", type=int, default=16, help="validation digits")
parser.add_argument("--samples", type=int, default=4, help="samples per digit")
parser.add_argument("--settings", type=int, default=40, help="random settings of UD2M to try")
parser.add_argument("--method", choices=["ud2m", "diffpir", "both"], default="both")
parser.add_argument("--out", type=Path, default=Path("runs/zero_shot_search.json"))
args = parser.parse_args()

# %%
# Four problems whose unknown part differs: detail, most pixels, and a hole.
names = ["sr4", "deblur-gaussian", "inpaint-random", "inpaint-box"]
problems = {name: make_physics(name, (1, 32, 32), sigma_y=0.05) for name in names}
torch.manual_seed(0)
x = mnist_digits("validation", num=args.digits)
measurements = {name: physics(x) for name, physics in problems.items()}
prior = load_prior(args.prior)


# %%
# The criterion, and the two samplers as functions of their settings.
def energy_score(samples):
    accuracy = (samples - x).flatten(2).norm(dim=2).mean(0)
    pairs = itertools.combinations(samples, 2)
    spread = torch.stack([(a - b).flatten(1).norm(dim=1) for a, b in pairs]).mean(0)
    return (accuracy - 0.5 * spread).mean().item()


def sample_ud2m(y, physics, delta_first, delta_last, rho, reference_level, eta):
    delta = torch.logspace(*torch.tensor([delta_first, delta_last]).log10(), 3)
    unfolded = UnfoldedDenoiser(prior, 3, delta=delta, rho=rho, reference_level=reference_level)
    generator = torch.Generator().manual_seed(0)
    return UD2M(unfolded, 3, eta).sample(y, physics, args.samples, generator=generator)


@torch.no_grad()
def sample_diffpir(y, physics, zeta, lambda_):
    sampler = dinv.sampling.DiffPIR(
        prior, dinv.optim.L2(), sigma=0.05, max_iter=100, zeta=zeta, lambda_=lambda_
    )
    draws = [sampler(y, physics, seed=1 + i).clamp(0, 1) for i in range(args.samples)]
    return torch.stack(draws)


rng = random.Random(0)
ud2m_settings = [
    {
        "delta_first": rng.choice([2.0, 3.0, 4.0, 6.0, 8.0]),
        "delta_last": rng.choice([0.5, 1.0, 1.5, 2.0]),
        "rho": rng.choice([0.5, 1.0, 2.0, 4.0]),
        "reference_level": rng.choice([0.0, 0.05, 0.1, 0.2]),
        "eta": rng.choice([0.0, 0.5, 0.8, 1.0]),
    }
    for _ in range(args.settings)
]
ud2m_settings = [dict(items) for items in dict.fromkeys(tuple(s.items()) for s in ud2m_settings)]
diffpir_settings = [
    {"zeta": zeta, "lambda_": lambda_}
    for zeta, lambda_ in itertools.product([0.1, 0.3, 0.6, 1.0], [1.0, 3.0, 7.0, 15.0])
]
searches = {"ud2m": (sample_ud2m, ud2m_settings), "diffpir": (sample_diffpir, diffpir_settings)}
if args.method != "both":
    searches = {args.method: searches[args.method]}

# %%
# The search; every score is written as soon as it is known.
psnr = dinv.metric.PSNR()
rows = []
args.out.parent.mkdir(parents=True, exist_ok=True)
for method, (sample, settings) in searches.items():
    for setting in tqdm(settings, desc=method):
        for name, physics in problems.items():
            samples = sample(measurements[name], physics, **setting)
            rows.append(
                {
                    "method": method,
                    "problem": name,
                    "setting": setting,
                    "energy_score": energy_score(samples),
                    "psnr_sample": psnr(samples[0], x).mean().item(),
                    "psnr_mean": psnr(samples.mean(0), x).mean().item(),
                }
            )
        args.out.write_text(json.dumps(rows, indent=1) + "\n")

# %%
# Winners, on each problem and over all of them.
for method in searches:
    scores = {}
    for name in problems:
        of_problem = [r for r in rows if (r["method"], r["problem"]) == (method, name)]
        best = min(of_problem, key=lambda row: row["energy_score"])
        print(f"{method}, {name}: {best['setting']}")
        print(
            f"    energy score {best['energy_score']:.3f}, PSNR of a sample {best['psnr_sample']:.2f}, "
            f"of the mean of {args.samples} {best['psnr_mean']:.2f}"
        )
        for row in of_problem:
            key = json.dumps(row["setting"])
            scores[key] = scores.get(key, 0) + row["energy_score"] / best["energy_score"] / len(problems)
    winner = min(scores, key=scores.get)
    print(f"{method}, all problems: {winner}, {scores[winner]:.3f} of the best of each")
