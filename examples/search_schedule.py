r"""
Where the training of a sampler starts
======================================

An untrained sampler is zero-shot LATINO, and how good it is hangs on its schedule: the levels
:math:`s_1 > s_2 > \dots` of the sampler, and the multipliers :math:`\delta_k` and :math:`\rho_k` of the
K iterations. Training moves the multipliers little, so good ones are worth a search. This script looks
for them: from the best setting so far it takes a random step in the logarithms of all, keeps it if the
samples score better, and lengthens its steps after a success (an evolution strategy with one parent and
one child). The score is the mean over tasks of the logarithm of the energy score, of the pixels and, for
photographs, of what a network for images sees in them: the same that training minimises. Operators and
noise levels are those of training, and the same for every setting.

.. code-block:: bash

    python examples/search_schedule.py --prior photos --data photos/train --out runs/schedule_photos.json
"""

# %%
import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from deepinv_ud2m import UD2M, UnfoldedDenoiser, load_prior
from deepinv_ud2m.benchmark.tasks import make_generator, make_physics
from deepinv_ud2m.data import load_images, mnist_digits
from deepinv_ud2m.initializers import LinearInitializer
from deepinv_ud2m.metrics import PerceptualDistance, energy_score
from deepinv_ud2m.wiener import WienerInitializer

TASKS = ["sr4", "deblur-gaussian", "inpaint-random", "inpaint-box"]

parser = argparse.ArgumentParser(description="Search the schedule of an untrained sampler.")
parser.add_argument("--prior", default="mnist", help="name or folder of the prior")
parser.add_argument("--data", help="folder of training photographs; validation digits by default")
parser.add_argument("--size", type=int, default=64, help="side of the crops of photographs")
parser.add_argument("--images", type=int, default=8)
parser.add_argument("--tasks", nargs="+", default=TASKS)
parser.add_argument("--sigma-y", type=float, nargs=2, default=[0.01, 0.1], help="range of noise")
parser.add_argument("--perceptual", type=float, default=5.0, help="weight, for photographs")
parser.add_argument("--initializer", choices=["linear", "wiener"], default="wiener")
parser.add_argument("--delta", type=float, nargs="+", default=[4.0, 2.0, 1.0], help="to start from")
parser.add_argument("--rho", type=float, nargs="+", default=[2.0, 2.0, 2.0], help="to start from")
parser.add_argument("--levels", type=float, nargs="+", default=[78.7, 1.277, 0.19], help="to start from")
parser.add_argument("--reference-level", type=float, default=0.08, help="detail to work at")
parser.add_argument("--trials", type=int, default=80)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", type=Path, default=Path("runs/schedule.json"))
args = parser.parse_args()
if len(args.delta) != len(args.rho):
    parser.error(f"--delta and --rho must be as many, got {len(args.delta)} and {len(args.rho)}")

# %%
# The problems, and the features that are scored.
if args.data:
    x = load_images(args.data, 3, args.size, num=args.images, skip_small=True)
    features = PerceptualDistance("efficientnet", device=args.device).embedding
else:
    x, features = mnist_digits("validation", num=args.images), None
x, prior = x.to(args.device), load_prior(args.prior, args.device)
problems = {}
for task in args.tasks:
    physics = make_physics(task, tuple(x.shape[1:]), device=args.device)
    generator = make_generator(task, tuple(x.shape[1:]), args.sigma_y, device=args.device)
    torch.manual_seed(args.seed)
    problems[task] = physics(x, **generator.step(len(x), seed=args.seed)), physics


# %%
# A setting is one vector of logarithms; the first level is noise alone and stays.
def unpack(vector):
    values, K = [math.exp(v) for v in vector], len(args.delta)
    return {"delta": values[:K], "rho": values[K : 2 * K], "levels": [args.levels[0], *values[2 * K :]]}


def scores(setting):
    unfolded = UnfoldedDenoiser(
        prior,
        len(args.delta),
        WienerInitializer() if args.initializer == "wiener" else LinearInitializer(),
        delta=setting["delta"],
        rho=setting["rho"],
        reference_level=args.reference_level,
    )
    model, found = UD2M(unfolded, levels=setting["levels"]).to(args.device), {}
    for task, (y, physics) in problems.items():
        generator = torch.Generator(args.device).manual_seed(args.seed)
        samples = model.sample(y, physics, 2, generator=generator)
        found[task] = energy_score(samples, x).mean().item()
        if features is not None:
            seen, truth = (features(images)[..., None, None] for images in (samples.flatten(0, 1), x))
            seen = seen.unflatten(0, samples.shape[:2])
            found[task] += args.perceptual * energy_score(seen, truth).mean().item()
    return found


def mean_log(found):
    return sum(math.log(value) for value in found.values()) / len(found)


def write():
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"arguments": vars(args), "successes": successes}
    args.out.write_text(json.dumps(found, default=str, indent=1) + "\n")


# %%
# The search. What is known is written after each success.
random = torch.Generator().manual_seed(args.seed)
best = [math.log(v) for v in (*args.delta, *args.rho, *args.levels[1:])]
best_scores = scores(unpack(best))
length, successes = 0.25, [{"trial": 0, **unpack(best), "scores": best_scores}]
write()
bar = tqdm(range(1, args.trials + 1), desc="settings")
for trial in bar:
    step = torch.randn(len(best), generator=random).mul(length).tolist()
    candidate = [a + b for a, b in zip(best, step, strict=True)]
    levels = unpack(candidate)["levels"]
    if any(low >= high for high, low in itertools.pairwise(levels)):
        continue
    found = scores(unpack(candidate))
    if mean_log(found) < mean_log(best_scores):
        best, best_scores, length = candidate, found, 1.3 * length
        successes.append({"trial": trial, **unpack(best), "scores": found})
        write()
    else:
        length *= 0.93  # steady at one success in five
    bar.set_postfix(score=f"{mean_log(best_scores):.4f}", step=f"{length:.2f}")

# %%
# The result, as arguments of train_photos.py.
for name, values in unpack(best).items():
    print(f"--{name}", *(f"{value:.3g}" for value in values))
print(f"--reference-level {args.reference_level:g} --initializer {args.initializer}")
print(f"mean log score {mean_log(successes[0]['scores']):.4f} at the start, {mean_log(best_scores):.4f}")
