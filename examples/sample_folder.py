r"""
A folder of photographs, on all devices
=======================================

Each image of a folder is degraded by one task of ``deepinv_ud2m.physics.TASKS`` and restored. The script
writes the measurement, one sample, and the mean and standard deviation of all samples. Several processes
share the images, one device each:

.. code-block:: bash

    python examples/sample_folder.py --images photos --task sr4
    torchrun --nproc_per_node 4 examples/sample_folder.py --images photos --task sr4

Noise and samples of an image depend on ``--seed`` and its file name, not on the number of processes. Images
that were done with the same options are skipped, so a run that was stopped goes on.
"""

# %%
import argparse
import json
import math
import os
import zlib
from pathlib import Path

import deepinv as dinv
import torch
from torchvision.utils import save_image
from tqdm import tqdm

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import load_image
from deepinv_ud2m.data.images import EXTENSIONS
from deepinv_ud2m.fingerprints import trained_fingerprint
from deepinv_ud2m.physics import TASKS, make_physics

parser = argparse.ArgumentParser(description="Posterior samples for a folder of images.")
parser.add_argument("--images", type=Path, required=True, help="folder of images")
parser.add_argument("--model", default="photos", help="name or folder of a sampler")
parser.add_argument("--task", choices=sorted(TASKS), default="sr4")
parser.add_argument("--sigma-y", type=float, default=0.025, help="noise level")
parser.add_argument("--samples", type=int, default=8, help="of each image, at least 2")
parser.add_argument("--batch-size", type=int, default=1, help="samples in one pass")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("runs/restored"))
args = parser.parse_args()
files = sorted(file for file in args.images.glob("[!.]*") if file.suffix.lower() in EXTENSIONS)
if not files:
    parser.error(f"--images: {args.images} has no images ({', '.join(EXTENSIONS)})")
if args.out.resolve() == args.images.resolve():
    parser.error(f"--out must be another folder than --images, got {args.out} for both")
if args.samples < 2:
    parser.error(f"--samples must be at least 2, for a standard deviation, got {args.samples}")

# %%
# The share of this process: torchrun states its number in the environment.
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
model = UD2M.from_pretrained(args.model, device=device)
channels = getattr(model.unfolded.prior_info, "channels", 3)
block = math.lcm(4, getattr(model.unfolded.prior_info, "size_multiple", 1))
options = {name: getattr(args, name) for name in ("task", "sigma_y", "samples", "seed")}
options["weights"] = trained_fingerprint(model.unfolded)  # a name may come to mean another sampler
args.out.mkdir(parents=True, exist_ok=True)

# %%
# Restoration. The summary is written last, so its presence means that the image is done.
psnr = dinv.metric.PSNR()
for file in tqdm(files[rank::world_size], desc=f"process {rank}", position=rank):
    summary = args.out / f"{file.name}.json"
    if summary.is_file() and json.loads(summary.read_text())["options"] == options:
        continue
    x = load_image(file, channels).to(device)
    # Super-resolution and some priors need sides that are multiples of a block.
    x = x[..., : x.shape[-2] // block * block, : x.shape[-1] // block * block]
    physics = make_physics(args.task, tuple(x.shape[1:]), args.sigma_y, device)
    seed = zlib.crc32(f"{args.seed} {file.name}".encode())
    torch.manual_seed(seed)  # for the noise of the measurement
    y = physics(x)
    generator = torch.Generator(device).manual_seed(seed)
    samples = model.sample(y, physics, args.samples, batch_size=args.batch_size, generator=generator)
    mean, std = samples.mean(0), samples.std(0)
    images = {"measurement": y.clamp(0, 1), "sample": samples[0], "mean": mean, "std": std / std.max()}
    for name, image in images.items():
        save_image(image, args.out / f"{file.name}_{name}.png")
    scores = {name: psnr(images[name], x).item() for name in ("sample", "mean")}
    done = {"options": options, "psnr": scores, "std_max": std.max().item(), "nfe": model.nfe}
    unfinished = summary.with_name(summary.name + ".part")
    unfinished.write_text(json.dumps(done, indent=1) + "\n")
    unfinished.replace(summary)  # whole or not at all
if rank == 0:
    print(f"written to {args.out}")
