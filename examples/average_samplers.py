r"""
The mean of trained samplers
============================

The weights of several samplers, trained on one from the other, are averaged, and the mean is written as
a sampler of its own. Between one that was trained at single levels and one that was trained on from it
by samples of the whole sampler, it has the accuracy of the second and more of the first's spread. With
one sampler and ``--levels``, it is that sampler with other levels.

.. code-block:: bash

    python examples/average_samplers.py runs/second/model runs/third/model --out runs/mean
"""

# %%
import argparse
import shlex
import sys
from pathlib import Path

import torch

from deepinv_ud2m.pretrained import describe
from deepinv_ud2m.training import sampler_to_train

parser = argparse.ArgumentParser(description="The mean of the weights of trained samplers.")
parser.add_argument("samplers", nargs="+", help="names or folders")
parser.add_argument("--levels", type=float, nargs="+", help="of the mean; those of the first")
parser.add_argument("--reference-error", type=float, help="of the mean; that of the first, if any")
parser.add_argument("--prior", help="name or folder of the prior, if it is not where it was")
parser.add_argument("--out", type=Path, required=True)
args = parser.parse_args()
if args.out.resolve() in [Path(name).resolve() for name in args.samplers]:
    parser.error(f"--out must be another folder than those of the samplers, got {args.out}")

# %%
# All in the place of the first. Samplers that differ in more than what was trained have no mean, nor
# have adapters, whose factors are multiplied.
other = {"prior": args.prior, "levels": args.levels, "reference_error": args.reference_error}
model, *others = (sampler_to_train(name, **other) for name in args.samplers)
parameters = dict(model.unfolded.named_parameters())
if describe(model)["lora"] is not None and others:
    parser.error(
        f"{args.samplers[0]} has an adapter: only samplers with all weights trained have a mean"
    )
with torch.no_grad():
    for number, (name, other) in enumerate(zip(args.samplers[1:], others, strict=True), 2):
        of_other = dict(other.unfolded.named_parameters())
        for part in ("unfolded", "initializer", "lora", "prior"):
            if describe(other)[part] != describe(model)[part]:
                parser.error(f"{name} and {args.samplers[0]} differ in {part}: no mean")
        if {n: p.shape for n, p in of_other.items()} != {n: p.shape for n, p in parameters.items()}:
            parser.error(f"{name} and {args.samplers[0]} differ in the shape of weights: no mean")
        for key, parameter in parameters.items():
            parameter.lerp_(of_other[key], 1 / number)

# %%
metadata = {"command": shlex.join(["python", "examples/average_samplers.py", *sys.argv[1:]])}
model.save_pretrained(args.out, prior=args.prior, metadata=metadata, dtype=torch.float16)
print(f"written to {args.out}: UD2M.from_pretrained({str(args.out)!r})")
