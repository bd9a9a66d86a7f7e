r"""
Intervals of a sampler, for each degradation
============================================

Fits a :class:`deepinv_ud2m.uncertainty.Conformal` for each degradation, to images whose truth is known, and
stores them with the sampler, as ``model.conformal[task]``::

    python examples/recipes/conformal.py --model photos --images photos/train --num 64 --size 128
        --sigma-y 0.025 --out runs/photos --check photos/test
        --tasks deblur-gaussian deblur-uniform deblur-motion deblur-gaussian-valid sr4 sr4-matlab
        inpaint-random inpaint-box jpeg-10
    python examples/recipes/conformal.py --model mnist --num 256 --sigma-y 0.05 --out runs/mnist
        --check test --tasks sr4 sr4-paper deblur-gaussian inpaint-random inpaint-box

With ``--check`` it prints the share of the pixels of other images that the intervals hold, without and with
the fit, and writes it into ``coverage.csv``. Without the fit, the interval is the one that holds 90 % of a
normal variable of which S draws are known, :math:`\bar x \pm t_{S-1}(0.95) \sqrt{1 + 1/S}\, s`: its rate
does not depend on S. ``--keep`` fits only the tasks that the sampler has no intervals of, and checks all.
"""

import argparse
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from scipy.stats import t

import deepinv_ud2m
from deepinv_ud2m import UD2M
from deepinv_ud2m.checkpoint import PRETRAINED
from deepinv_ud2m.data import load_images, mnist_digits
from deepinv_ud2m.physics import make_physics
from deepinv_ud2m.uncertainty import Conformal, inside

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="a shipped sampler, or the folder of one")
parser.add_argument("--images", default="validation", help="a folder, or shipped digits: test or validation")
parser.add_argument("--check", nargs="*", default=[], help="folders, or shipped digits")
parser.add_argument("--num", type=int, help="of the images (default: all)")
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--tasks", nargs="+", required=True)
parser.add_argument("--sigma-y", type=float, required=True)
parser.add_argument("--samples", type=int, default=8)
parser.add_argument("--keep", action="store_true", help="the intervals that the sampler comes with")
parser.add_argument("--out", type=Path, required=True)
args = parser.parse_args()


def read(source, num=None):
    if source in ("test", "validation"):
        return mnist_digits(source, num=num)
    return load_images(source, 3, args.size, num=num, skip_small=True)


def draw(task, x):
    """Samples of each image, of one noise and one operator for all images."""
    torch.manual_seed(0)
    physics = make_physics(task, tuple(x.shape[1:]), args.sigma_y)
    generator = torch.Generator().manual_seed(0)
    parts = [model.sample(physics(part), physics, args.samples, generator=generator) for part in x.split(8)]
    return torch.cat(parts, 1)


def share(low, high, x):
    """Share of the pixels in the intervals: mean over the images and its standard error."""
    held = inside(x, low, high)
    return [held.mean().item(), held.std().item() / math.sqrt(len(x))]


# %%
# The same sampler with the intervals: its weights do not change, so its files are copied. What is done is
# written, and not done again.
weights = Path(deepinv_ud2m.__file__).parent / "weights"
file, coverage = args.out / "config.json", args.out / "coverage.csv"
if not args.out.is_dir():
    shutil.copytree(weights / PRETRAINED[args.model] if args.model in PRETRAINED else args.model, args.out)
    config = json.loads(file.read_text())
    if not args.keep:
        config["sampler"].pop("conformal", None)
    file.write_text(json.dumps(config, indent=2) + "\n")
    coverage.unlink(missing_ok=True)  # of the run that made the sampler
if not coverage.is_file():
    coverage.write_text("task,factor,images,number,without,without_se,fitted,fitted_se\n")
model = UD2M.from_pretrained(args.out)
images, others = read(args.images, args.num), {source: read(source) for source in args.check}
for task in args.tasks:
    if task not in model.conformal:
        model.conformal[task] = Conformal.from_samples(draw(task, images), images)
        config = json.loads(file.read_text())
        config["sampler"]["conformal"] = {name: asdict(one) for name, one in model.conformal.items()}
        file.write_text(json.dumps(config, indent=2) + "\n")
        print(f"{task:22s} factor {model.conformal[task].factor:.2f}", flush=True)
    fitted, checked = model.conformal[task], coverage.read_text()
    for source, x in others.items():
        row = f"{task},{fitted.factor:.2f},{Path(source).name},{len(x)},"
        if row in checked:
            continue
        samples = draw(task, x)
        mean, std = samples.mean(0), samples.std(0)
        width = t.ppf(0.95, args.samples - 1) * math.sqrt(1 + 1 / args.samples)
        found = share(mean - width * std, mean + width * std, x) + share(*fitted.interval(samples), x)
        plain, error, held, held_error = shown = [f"{value:.3f}" for value in found]
        print(f"{task:22s} {source}: {plain} +- {error}, with the factor {held} +- {held_error}", flush=True)
        with coverage.open("a") as lines:
            print(row + ",".join(shown), file=lines)
assert UD2M.from_pretrained(args.out).conformal == model.conformal
