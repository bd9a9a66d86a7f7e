"""What tests of training share: a small trainer, and its parts."""

import copy
import random

import numpy as np
import torch
from conftest import seeded
from deepinv.physics import BlurFFT, GaussianNoise, Inpainting
from deepinv.physics.functional import gaussian_blur
from deepinv.physics.generator import BernoulliSplittingMaskGenerator, GaussianBlurGenerator, SigmaGenerator
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M, UnfoldedDenoiser, add_lora
from deepinv_ud2m.physics import JointGenerator
from deepinv_ud2m.training import (
    AdversarialGeneratorLoss,
    Adversary,
    ConditionalDiscriminator,
    DistillationTrainer,
    EnergyScoreLoss,
    L2Loss,
    parameter_groups,
    warmup_cosine,
)

SHAPE = (1, 16, 16)


def images(num=10):
    return torch.rand(num, *SHAPE, generator=seeded(0))


def eval_images(num=2):
    return DataLoader(images(num), batch_size=2)


def mask(noise=0.05):
    return Inpainting(SHAPE, mask=0.5, noise_model=GaussianNoise(noise))


def two_physics():
    """Inpainting with a mask and a level per image, and a blur with a kernel per image."""
    blur = BlurFFT(SHAPE, filter=gaussian_blur(sigma=(1.0, 1.0)), noise_model=GaussianNoise(0.05))
    masks, kernels = BernoulliSplittingMaskGenerator(SHAPE, 0.5), GaussianBlurGenerator((5, 5))
    levels = [SigmaGenerator(0.02, 0.1), SigmaGenerator(0.02, 0.1)]
    return {
        "physics": [mask(), blur],
        "physics_generator": [masks + levels[0], JointGenerator(kernels, levels[1])],
    }


def make_adversary(ratio=1, lr=1e-3, **losses):
    D = make_discriminator(1, base_channels=8)
    return Adversary(D, optimizer=torch.optim.AdamW(D.parameters(), lr=lr), ratio=ratio, **losses)


def make_trainer(prior, adversarial=False, seed=0, **options):
    """A trainer of a fresh adapter on a copy of the prior; equal arguments give equal trainers."""
    prior = copy.deepcopy(prior)
    unfolded = UnfoldedDenoiser(prior, num_iterations=2)
    torch.manual_seed(0)
    add_lora(prior, 2, targets="all-convs")
    defaults = {"losses": L2Loss(), "steps": 4, "verbose": False, "device": "cpu", "log_interval": 1}
    defaults["train_dataloader"] = DataLoader(images(), batch_size=3, shuffle=True)
    defaults["optimizer"] = torch.optim.AdamW(parameter_groups(unfolded, lr=1e-2))
    if adversarial:
        defaults["adversary"] = make_adversary()
        defaults["losses"] = [EnergyScoreLoss(), AdversarialGeneratorLoss(weight=0.1)]
    if "physics" not in options:
        options |= {"physics": mask()}
    return DistillationTrainer(model=UD2M(unfolded, num_steps=2), seed=seed, **defaults | options)


def full_options(folder, **options):
    full = {"adversarial": True, "accumulate": 2, "grad_clip": 1.0, "log_interval": 4, "save_path": folder}
    full |= {"lr_schedule": warmup_cosine(6, warmup_steps=2), "eval_dataloader": eval_images(4)}
    return full | {"eval_interval": 2, "eval_samples": 2, **two_physics(), **options}


class Recorder(L2Loss):
    """The squared error, which notes how it was called."""

    def __init__(self):
        super().__init__()
        self.autocast, self.draws = [], []

    def forward(self, **batch):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        self.draws.append((np.random.rand(), random.random()))  # noqa: NPY002
        return super().forward(**batch)


def values_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.trained.values()]


def equal(a, b):
    return all(map(torch.equal, a, b))


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def make_discriminator(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConditionalDiscriminator(**{"channels": 1, "base_channels": 4, "num_layers": 2} | options)
