"""``python -m deepinv_ud2m.training recipe.yaml --images FOLDER`` distils a sampler."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from deepinv_ud2m.data import load_mnist
from deepinv_ud2m.training.distillation import distill, plan
from deepinv_ud2m.training.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deepinv_ud2m.training", description="Distil a sampler by a recipe."
    )
    add = parser.add_argument
    add("recipe", help="YAML file, see examples/recipes")
    add("--images", required=True, help="folder of photographs, or digits of MNIST, npz")
    add("--prior", help="name or folder of the prior (default: that of the recipe)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="values in the place of the recipe's")
    add("--out", type=Path, default=Path("runs/distilled"), help="folder of the run")
    add("--fast", action="store_true", help="compiled, in bfloat16; needs a C++ compiler")
    add("--checkpointing", action="store_true", help="less memory, a third more time")
    add("--accumulate", type=int, help="batches per step, a multiple of the number of processes")
    add("--weights", help="file or folder of the weights of a published prior")
    add("--download", action="store_true", help="download weights that are not here")
    trial = parser.add_mutually_exclusive_group().add_argument
    trial("--smoke", action="store_true", help="try all of the recipe in miniature, with random weights")
    trial("--dry-run", action="store_true", help="two steps of each stage: what is missing, time and memory")
    add("--device", help="where to train (default: a GPU, if there is one)")
    args = parser.parse_args()
    try:
        recipe = Recipe.read(args.recipe, **dict(_change(text) for text in args.set))
        if args.accumulate is not None:
            recipe.stages = [replace(stage, accumulate=args.accumulate) for stage in recipe.stages]
        images = load_mnist("", True, npz=args.images)[0] if args.images.endswith(".npz") else args.images
        names = ("fast", "checkpointing", "weights", "download", "device")
        options = {name: getattr(args, name) for name in names}
        if args.dry_run:
            print(plan(args.prior, None, images, recipe, **options))
            return
        distill(args.prior, None, images, recipe, args.out, smoke=args.smoke, **options)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {args.out / 'model'}: UD2M.from_pretrained({str(args.out / 'model')!r})")


def _change(text: str) -> tuple:
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--set must be of the form key=value, got {text!r}")
    return name, yaml.safe_load(value)


if __name__ == "__main__":
    main()
