r"""
Train a sampler of your own
===========================

Your denoiser, your physics, 200 images, ten minutes: a small network is trained to denoise digits, and then
:func:`deepinv_ud2m.training.distill` makes it a sampler for a single-pixel camera, which measures 15 % of the
Hadamard coefficients of an image.
"""

# %%
# A denoiser of yours. Here deepinv's DRUNet, made small, learns from 200 digits for two minutes. It has seen
# noise between 0.005 and 1.5, which its ``prior_info`` says.
import argparse
import math

import deepinv as dinv
import torch
from helpers import as_images, save

from deepinv_ud2m import UD2M, PriorInfo, UnfoldedDenoiser, WienerInitializer
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import energy_score, spread_skill_ratio
from deepinv_ud2m.training import Recipe, distill

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--out", default="runs/your_training", help="folder of the run")
parser.add_argument("--steps", type=int, default=400, help="steps of both trainings")
args = parser.parse_args()

torch.manual_seed(0)
x = mnist_digits("validation", num=200)
denoiser = dinv.models.DRUNet(1, 1, nc=(16, 32, 64, 64), nb=1, pretrained=None)
optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
low, high = math.log(0.005), math.log(1.5)
for _ in range(args.steps):
    clean = x[torch.randint(len(x), (32,))]
    sigma = (low + (high - low) * torch.rand(32, 1, 1, 1)).exp()
    error = denoiser(clean + sigma * torch.randn_like(clean), sigma) - clean
    loss = (error.square().mean((1, 2, 3), keepdim=True) / sigma).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
denoiser.eval().prior_info = PriorInfo("small", channels=1, sigma_min=0.005, sigma_max=1.5)

# %%
# The physics, and the sampler before training.
noise = dinv.physics.GaussianNoise(0.05)
physics = dinv.physics.SinglePixelCamera(m=154, img_size=(1, 32, 32), noise_model=noise)
recipe = Recipe.read("default")
recipe.reference_level = 0.2  # the error of an estimate where nothing is known: 0.2 for digits
initial = WienerInitializer.fit(x, reference_level=recipe.reference_level)
untrained = UD2M(
    UnfoldedDenoiser(denoiser, len(recipe.rho), initial, rho=recipe.rho, delta=recipe.delta),
    sigmas=recipe.sigmas,
)
test = mnist_digits("test", num=32)
y = physics(test)
before = untrained.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# Training. A run that was stopped goes on when it is started again.
recipe.stages[0].steps = args.steps
model = distill(denoiser, [physics], x, recipe, args.out, initial=initial)
after = model.sample(y, physics, num_samples=8, generator=torch.Generator().manual_seed(0))

# %%
# The energy score is lowest for the posterior itself. The spread-skill ratio is 1 for a calibrated sampler.
for name, samples in {"untrained": before, "trained": after}.items():
    scores, ratio = energy_score(samples, test), spread_skill_ratio(samples, test)
    error = scores.std() / len(scores) ** 0.5
    print(f"{name:10s} energy score {scores.mean():.2f} +- {error:.2f}, spread-skill ratio {ratio:.2f}")
columns = {"truth": test, "pseudo-inverse": as_images(y, physics, test)}
columns |= {f"untrained {i + 1}": before[i] for i in range(2)}
columns |= {f"trained {i + 1}": after[i] for i in range(3)}
columns |= {"mean of 8": after.mean(0), "std, 0 to 0.5": 2 * after.std(0)}
save("your_training", {title: images[:4] for title, images in columns.items()})
