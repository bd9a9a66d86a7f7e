"""Samplers by name: UD2M, deepinv's posterior samplers on the same prior, and two references.

A method turns a prior, the settings and the noise level into a sampler, a function
``(y, physics, seed) -> images`` that draws one sample per measurement. Evaluations are counted on
the prior, or on the ``networks`` of a sampler that names them. A new method is one entry in
``METHODS``, with the grid of settings that tuning searches.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from deepinv.models import RAM, Denoiser
from deepinv.optim import DPIR, L2
from deepinv.physics import DecomposablePhysics, LinearPhysics, Physics
from deepinv.sampling import (
    DDRM,
    DPS,
    DDPMSolver,
    DiffPIR,
    PiGDMDataFidelity,
    PosteriorDiffusion,
    VariancePreservingDiffusion,
)
from torch import Tensor

from deepinv_ud2m.initializers import RAMInitializer
from deepinv_ud2m.pretrained import trained_fingerprint
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.schedule import VPSchedule
from deepinv_ud2m.unfolded import REFERENCE_LEVEL, UnfoldedDenoiser

Sampler = Callable[[Tensor, Physics, int], Tensor]


@dataclass(frozen=True)
class Method:
    """
    A sampler that the benchmark can run.

    :param str title: what a reader calls it.
    :param Callable build: ``build(prior, sigma_y, **settings)`` gives the sampler.
    :param Mapping grid: values that tuning tries, per setting.
    :param Mapping defaults: settings used where nothing was tuned: the author's own.
    :param Callable applies: whether it can run on a physics.
    :param bool random: whether different seeds give different images.
    """

    title: str
    build: Callable[..., Sampler]
    grid: Mapping[str, Sequence] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    applies: Callable[[Physics], bool] = lambda physics: True
    random: bool = True

    def settings(
        self, fixed: Collection[str] = (), values: Mapping[str, Sequence] | None = None
    ) -> list[dict]:
        """All settings of the grid, without those that are ``fixed``; ``values`` replace the grid's."""
        grid = {name: tried for name, tried in self.grid.items() if name not in fixed}
        grid |= {name: tried for name, tried in (values or {}).items() if name in grid}
        return [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]


def _ud2m(
    prior: Denoiser,
    sigma_y: float,
    num_steps=3,
    num_iterations=3,
    eta=1.0,
    reference_level=REFERENCE_LEVEL,
) -> Sampler:
    unfolded = UnfoldedDenoiser(prior, num_iterations, reference_level=reference_level)
    return _ud2m_sampler(UD2M(unfolded, num_steps, eta))


def _ud2m_distilled(
    prior: Denoiser,
    sigma_y: float,
    checkpoint=None,
    num_steps: int | None = None,
    eta: float | None = None,
    second_level: float | None = None,
    extra_level: float | None = None,
    ram=None,
) -> Sampler:
    if checkpoint is None:  # the shipped sampler of the prior has its name
        checkpoint = prior.prior_info.name
    # The adapter goes on a copy, for the other methods share the prior.
    initializer = RAMInitializer(RAM(pretrained=ram, device=_device(prior))) if ram else None
    trained = UD2M.from_pretrained(checkpoint, prior=copy.deepcopy(prior), initializer=initializer)
    eta = trained.eta if eta is None else eta
    levels = trained.levels if num_steps is None else VPSchedule().sampling_levels(num_steps)
    if second_level is not None:
        if len(levels) < 2:
            raise ValueError("second_level is of samplers with two levels or more, this one has one")
        levels = [second_level if n == 1 else level for n, level in enumerate(levels.tolist())]
    if extra_level is not None:
        levels = sorted([*torch.as_tensor(levels).tolist(), extra_level], reverse=True)
    # What it was trained with is for its own levels, not for those of the schedule.
    reference_error = trained.reference_error if num_steps is None else None
    sampler = _ud2m_sampler(
        UD2M(trained.unfolded, levels=levels, eta=eta, reference_error=reference_error)
    )
    sampler.weights = trained_fingerprint(trained.unfolded)
    if reference_error is not None:  # with levels of another kind it is another sampler
        sampler.weights += f", reference error {reference_error:g}"
    return sampler


def _ud2m_sampler(model: UD2M) -> Sampler:
    def sample(y, physics, seed):
        return model(y, physics, generator=torch.Generator(y.device).manual_seed(seed))

    sample.networks = model.unfolded.networks
    return sample


def _diffpir(prior: Denoiser, sigma_y: float, num_steps=100, zeta=0.1, lambda_=7.0) -> Sampler:
    options = {"max_iter": num_steps, "zeta": zeta, "lambda_": lambda_, "device": _device(prior)}
    model = DiffPIR(prior, L2(), sigma=sigma_y, **options)
    return _seeded_globally(lambda y, physics: model(y, physics))


def _ddrm(
    prior: Denoiser,
    sigma_y: float,
    num_steps=20,
    eta=0.85,
    etab=1.0,
    sigma_max=1.0,
    spacing="linear",
) -> Sampler:
    # Even levels, deepinv's own, leave large gaps near zero when they start high.
    spaced = {"linear": np.linspace, "geometric": np.geomspace}
    if spacing not in spaced:
        raise ValueError(f"spacing of DDRM's levels must be one of {list(spaced)}, got {spacing!r}")
    # deepinv ends at level 0, where an EDM-preconditioned network is not defined.
    sigmas = spaced[spacing](sigma_max, _LAST_LEVEL, num_steps)
    model = DDRM(prior, sigmas=sigmas, eta=eta, etab=etab)
    # deepinv's DDRM writes into y where the left singular vectors are the identity.
    return _seeded_globally(lambda y, physics: model(y.clone(), physics))


def _dps(prior: Denoiser, sigma_y: float, num_steps=1000, weight=1.0, guidance="norm") -> Sampler:
    def make(rng):
        return DPS(
            prior,
            num_steps=num_steps + 1,  # time points, one more than evaluations
            weight=weight,
            guidance=guidance,
            device=rng.device,
            dtype=torch.float32,
            rng=rng,
        )

    return _seeded_by_generator(prior, make)


def _pigdm(prior: Denoiser, sigma_y: float, num_steps=100, weight=1.0) -> Sampler:
    def make(rng):
        times = torch.linspace(1, 0, num_steps + 1, device=rng.device)
        return PosteriorDiffusion(
            data_fidelity=PiGDMDataFidelity(prior, weight=weight),
            denoiser=prior,
            sde=VariancePreservingDiffusion(alpha=1.0, device=rng.device, dtype=torch.float32),
            solver=DDPMSolver(timesteps=times, rng=rng),
            device=rng.device,
            dtype=torch.float32,
        )

    return _seeded_by_generator(prior, make)


def _dpir(prior: Denoiser, sigma_y: float) -> Sampler:
    model = DPIR(sigma=sigma_y, denoiser=prior, device=_device(prior))
    return lambda y, physics, seed: model(y, physics)


def _pseudo_inverse(prior: Denoiser, sigma_y: float) -> Sampler:
    return lambda y, physics, seed: physics.A_dagger(y)


def _device(prior: Denoiser) -> torch.device:
    return next(prior.parameters()).device


def _seeded_globally(restore: Callable[[Tensor, Physics], Tensor]) -> Sampler:
    """For samplers that draw from PyTorch's own generator (and ignore ``seed=0``)."""

    def sample(y, physics, seed):
        with torch.random.fork_rng(devices=[y.device] if y.is_cuda else []):
            torch.manual_seed(seed)
            return restore(y, physics)

    return sample


def _seeded_by_generator(
    prior: Denoiser, make: Callable[[torch.Generator], PosteriorDiffusion]
) -> Sampler:
    """For samplers that take their generator when they are made."""

    def sample(y, physics, seed):
        return make(torch.Generator(_device(prior)).manual_seed(seed))(y, physics)

    return sample


_LAST_LEVEL = 0.002

METHODS = {
    "ud2m": Method(
        "UD2M, untrained",
        _ud2m,
        grid={"eta": [0.0, 0.5, 0.8, 1.0], "reference_level": [0.1, 0.2, 0.4]},
        defaults={"eta": 1.0, "reference_level": REFERENCE_LEVEL},
    ),
    "ud2m-distilled": Method("UD2M", _ud2m_distilled, grid={"eta": [0.0, 0.5, 0.8, 1.0]}),
    "diffpir": Method(
        "DiffPIR",
        _diffpir,
        grid={"zeta": [0.03, 0.1, 0.3, 0.6, 1.0], "lambda_": [0.1, 0.3, 1.0, 3.0, 7.0, 15.0]},
        defaults={"zeta": 0.1, "lambda_": 7.0},
    ),
    "dps": Method(
        "DPS",
        _dps,
        grid={
            "guidance": ["norm", "annealed"],
            "weight": [0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0],
        },
        defaults={"guidance": "norm", "weight": 1.0},
    ),
    "pigdm": Method(
        "PiGDM",
        _pigdm,
        grid={"weight": [0.1, 0.3, 0.6, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0]},
        defaults={"weight": 1.0},
        applies=lambda physics: isinstance(physics, LinearPhysics),
    ),
    "ddrm": Method(
        "DDRM",
        _ddrm,
        grid={
            "eta": [0.3, 0.6, 0.85, 1.0],
            "sigma_max": [0.25, 0.5, 1.0, 3.0, 10.0, 80.0],
            "spacing": ["linear", "geometric"],
        },
        defaults={"eta": 0.85, "sigma_max": 1.0, "spacing": "linear"},
        applies=lambda physics: isinstance(physics, DecomposablePhysics),
    ),
    "dpir": Method("DPIR (not a sampler)", _dpir, random=False),
    "pinv": Method("pseudo-inverse", _pseudo_inverse, random=False),
}
