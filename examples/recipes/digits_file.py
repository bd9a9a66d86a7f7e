r"""
Make the digits that ship with the package
==========================================

Cuts the first 1000 and the last 256 digits out of the MNIST test set, and writes them to the file that
:func:`deepinv_ud2m.data.mnist_digits` reads::

    python examples/recipes/digits_file.py --test mnist_test.npz --out deepinv_ud2m/data/mnist_digits.npz
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from deepinv_ud2m.data import mnist_arrays

NUM_TEST, NUM_VALIDATION = 1000, 256


def main():
    parser = argparse.ArgumentParser(description="Make the digits that ship with the package.")
    parser.add_argument("--test", type=Path, required=True, help="npz of the 10 000 test digits")
    parser.add_argument("--out", type=Path, required=True, help="npz file to write")
    args = parser.parse_args()

    mnist_arrays(args.test)  # says clearly what is wrong with the file, if anything is
    with np.load(args.test, allow_pickle=False) as arrays:
        x, y = arrays["x"], arrays["y"].astype(np.uint8)
    if len(x) != 10_000:
        sys.exit(f"--test: {args.test} holds {len(x)} digits, not the 10 000 of the test set")
    test = {"test_x": x[:NUM_TEST], "test_y": y[:NUM_TEST]}
    validation = {"validation_x": x[-NUM_VALIDATION:], "validation_y": y[-NUM_VALIDATION:]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **test, **validation)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
