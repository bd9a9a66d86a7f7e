"""``python -m deepinv_ud2m.training recipe.yaml --prior NAME --images FOLDER`` distils a sampler."""

import argparse
import sys
from pathlib import Path

from deepinv_ud2m.data import load_mnist
from deepinv_ud2m.training.recipe import Recipe, distill


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deepinv_ud2m.training", description="Distil a sampler by a recipe."
    )
    parser.add_argument("recipe", help="YAML file, or the name of one that ships")
    parser.add_argument("--prior", required=True, help="name or folder of the prior")
    parser.add_argument("--images", required=True, help="folder of photographs, or digits of MNIST, npz")
    parser.add_argument("--out", type=Path, default=Path("runs/distilled"), help="folder of the run")
    parser.add_argument("--fast", action="store_true", help="compiled, in bfloat16; needs a C++ compiler")
    parser.add_argument("--device", help="where to train (default: a GPU, if there is one)")
    args = parser.parse_args()
    try:
        recipe = Recipe.read(args.recipe)
        images = load_mnist("", True, npz=args.images)[0] if args.images.endswith(".npz") else args.images
        distill(args.prior, None, images, recipe, args.out, fast=args.fast, device=args.device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {args.out / 'model'}: UD2M.from_pretrained({str(args.out / 'model')!r})")


if __name__ == "__main__":
    main()
