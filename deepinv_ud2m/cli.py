"""
The command ``deepinv-ud2m``: photographs in, samples of what they were before out.

.. code-block:: bash

    deepinv-ud2m restore photo.jpg --task jpeg
    deepinv-ud2m restore photo.png --task blur --gaussian 2 --samples 16 --out restored
    deepinv-ud2m restore folder --task sr --factor 4
    torchrun --nproc_per_node 4 --no-python deepinv-ud2m restore folder --task denoise

Of each photograph it writes the samples, their mean and standard deviation as PNG of 16 bits, a contact
sheet, and a summary. Several processes share the photographs, one device each. A photograph that was done
with the same options is skipped, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
import zlib
from glob import escape
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from deepinv_ud2m import UD2M
from deepinv_ud2m.checkpoint import PRETRAINED
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.data import load_image
from deepinv_ud2m.data.images import EXTENSIONS
from deepinv_ud2m.files import read_json, write_file
from deepinv_ud2m.fingerprints import trained_fingerprint
from deepinv_ud2m.photographs import BORDERS, DEGRADATIONS, physics_of, read_kernel, read_photograph
from deepinv_ud2m.physics import JPEG
from deepinv_ud2m.pictures import sheet, write_png

# Other commands, which have their own options.
_MODULES = {
    "train": ("deepinv_ud2m.training.__main__", "distil a sampler by a recipe"),
    "benchmark": ("deepinv_ud2m.benchmark.__main__", "compare samplers on your images"),
    "app": ("deepinv_ud2m.app.__main__", "a page in the browser"),
}

# Options that make another result. The files are part of it as well, by what they hold.
_OPTIONS = ("task", "gaussian", "borders", "factor", "filter", "noise", "samples", "seed")

# What the package raises for bad input, and torch where memory is short.
_BAD_INPUT = (ValueError, TypeError, RuntimeError)

# Memory of a sample of the shipped samplers on a CPU, measured: bytes for each pixel, and of the process.
_BYTES_PER_PIXEL, _BYTES = 3700, 0.9e9


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in _MODULES:
            sys.argv = [f"deepinv-ud2m {argv[0]}", *argv[1:]]
            return import_module(_MODULES[argv[0]][0]).main() or 0
        return _restore(_parser().parse_args(argv))
    except (*_BAD_INPUT, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepinv-ud2m", description="Posterior samples of photographs.")
    commands = parser.add_subparsers(required=True, metavar="command")
    text = "restore photographs: files, or folders of them"
    restore = commands.add_parser("restore", help=text, description=text)
    add = restore.add_argument
    add("images", nargs="+", type=Path, help="image files, or folders")
    add("--task", required=True, choices=["jpeg", *DEGRADATIONS], help="what happened to them")
    add("--kernel", type=Path, help="blur: the kernel, a grey picture or .npy")
    add("--gaussian", type=float, help="blur: standard deviation of a Gaussian kernel, in pixels")
    add("--borders", choices=BORDERS, default="valid", help="blur: what is beyond the borders")
    add("--factor", type=int, default=4, help="sr: by how much the sides were reduced")
    add("--filter", choices=["bicubic", "gaussian"], default="bicubic", help="sr: how they were reduced")
    add("--mask", type=Path, help="inpaint: a picture that is white where pixels are missing")
    add("--noise", default="estimate", help="standard deviation in units of [0, 1], or estimate (default)")
    add("--samples", type=int, default=8, help="of each photograph, at least 2")
    add("--model", default="photos", help=f"of {', '.join(PRETRAINED)}, a folder, or of the Hub (photos)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=int, help="samples at once (default: as many as fit)")
    add("--out", type=Path, default=Path("restored"), help="folder of the results")
    for name, (_, text) in _MODULES.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _restore(args: argparse.Namespace) -> int:
    files = [file for path in args.images for file in _files(path)]
    if len({file.name for file in files}) < len(files):
        raise ValueError("images must have different names, as their results do")
    if args.out.resolve() in [path.resolve() for path in args.images]:
        raise ValueError(f"--out must be another folder than the images, got {args.out}")
    if args.noise != "estimate":
        args.noise = _number(args.noise)
    if check_count("--samples", args.samples) < 2:
        raise ValueError("--samples must be at least 2, for a standard deviation, got 1")
    kernel = None if args.kernel is None else read_kernel(args.kernel)
    mask = None if args.mask is None else load_image(args.mask, 1)
    # torchrun states the number of a process in the environment.
    rank, count = (int(os.environ.get(key, one)) for key, one in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" and count > 1 else args.device
    model = UD2M.from_pretrained(args.model, device=device)
    common = {name: getattr(args, name) for name in _OPTIONS}
    common["weights"] = trained_fingerprint(model.unfolded)  # a name may come to mean another sampler
    common |= {n: _digest(v) for n, v in (("kernel", kernel), ("mask", mask)) if v is not None}
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    title = f"process {rank}" if count > 1 else "restore"
    for file in tqdm(files[rank::count], desc=title, position=rank, disable=len(files) == 1):
        summary = args.out / f"{file.name}.json"
        # One that is not there, or cannot be read, fails below.
        is_readable = file.is_file() and os.access(file, os.R_OK)
        options = common | {"file": f"{zlib.crc32(file.read_bytes()):08x}" if is_readable else None}
        if summary.is_file() and read_json(summary).get("options") == options:
            continue
        # Whatever happens now, no summary or sample of before stands beside new results.
        for old in [summary, *args.out.glob(f"{escape(file.name)}_sample*.png")]:
            old.unlink(missing_ok=True)
        try:
            found = _restore_file(model, file, args, kernel, mask, device)
        # The others of a folder are still worth it, also where the memory is too small for one.
        except (*_BAD_INPUT, FileNotFoundError, PermissionError, MemoryError) as error:
            if len(files) == 1:
                raise
            tqdm.write(f"error: {file}: {error}", file=sys.stderr)
            failed += 1
            continue
        write_file(summary, json.dumps({"options": options, **found}, indent=1) + "\n")
    if rank == 0:
        print(f"written to {args.out}")
    return 1 if failed else 0


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"images: the folder {path} has no images ({', '.join(EXTENSIONS)})")
    return files


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--noise must be a number or estimate, got {text!r}") from None


def _digest(values: torch.Tensor) -> str:
    return f"{zlib.crc32(values.numpy().tobytes()):08x}"


def _restore_file(
    model: UD2M,
    file: Path,
    args: argparse.Namespace,
    kernel: Tensor | None,
    mask: Tensor | None,
    device: torch.device | str,
) -> dict:
    """Write the results of one photograph; returns what its summary says."""
    if args.task == "jpeg":
        y, physics = JPEG.read(file)
        noise = None
    else:
        y, noise = read_photograph(file), args.noise
        options = {name: getattr(args, name) for name in ("gaussian", "borders", "factor", "filter")}
        physics = physics_of(y, args.task, kernel=kernel, mask=mask, **options)
        y = physics.A(y) if args.task == "inpaint" else y  # whatever was painted into the hole
    y, physics = y.to(device), physics.to(device)
    seed = zlib.crc32(f"{args.seed} {file.name}".encode())
    generator = torch.Generator(device).manual_seed(seed)
    pixels = physics.A_adjoint(y).shape[-2:].numel()
    needed = (_BYTES + _BYTES_PER_PIXEL * pixels * (args.batch_size or 1)) / 2**30
    tqdm.write(f"{file}: {pixels / 1e6:.2f} megapixels, about {needed:.1f} GiB")
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if noise == "estimate":
            noise = model.estimate_sigma_y(y, physics, generator=generator)
        how = {"batch_size": args.batch_size, "generator": generator, "verbose": True}
        samples = model.sample(y, physics, args.samples, sigma_y=noise, **how)
    told = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
    for message in told:
        tqdm.write(f"warning: {file}: {message}", file=sys.stderr)
    for i, sample in enumerate(samples):
        write_png(args.out / f"{file.name}_sample{i + 1}.png", sample[0])
    write_png(args.out / f"{file.name}_mean.png", samples.mean(0)[0])
    write_png(args.out / f"{file.name}_std.png", samples.std(0)[0])
    sheet(args.out / f"{file.name}_sheet.png", samples, y)
    return {
        "noise": None if noise is None else float(torch.as_tensor(noise).flatten()[0]),
        "residual": None if model.residual is None else model.residual[0].item(),
        "network evaluations per sample": model.nfe,
        "seconds": round(time.perf_counter() - start, 1),
        "warnings": told,
    }


if __name__ == "__main__":
    sys.exit(main())
