"""Samplers by name: UD2M, deepinv's posterior samplers on the same prior, and two reference points.

A sampler is a function ``(y, physics, seed) -> images`` that draws one sample per measurement. Network
evaluations are counted on the prior, or on the ``networks`` of a sampler that names them. A new method is one
entry in ``METHODS``, or a Python file of one's own, given as ``--method-file``::

    from deepinv_ud2m.benchmark.methods import Method

    def build(prior, sigma_y, scale=1.0):
        return lambda y, physics, seed: scale * physics.A_dagger(y)

    METHODS = {"mine": Method(build, grid={"scale": [0.9, 1.0]}, random=False)}
"""

from __future__ import annotations

import copy
import inspect
import itertools
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepinv as dinv
import numpy as np
import torch
import yaml
from deepinv.models import Denoiser
from deepinv.physics import Physics
from torch import Tensor, nn

from deepinv_ud2m.benchmark.rows import check_setup
from deepinv_ud2m.files import read_json
from deepinv_ud2m.fingerprints import trained_fingerprint
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.unfolded import UnfoldedDenoiser

Sampler = Callable[[Tensor, Physics, int], Tensor]

#: What settings are searched for: column of a row by criterion, and the sign of what is to be small.
CRITERIA = {"energy": ("energy_score", 1), "crps": ("crps", 1), "psnr": ("psnr_mean", -1)}
CRITERIA |= {"perceptual": ("perceptual", 1), "swd": ("swd", 1)}


@dataclass(frozen=True)
class Method:
    """
    A sampler that the benchmark can run.

    ``build(prior, sigma_y, **settings)`` returns it; each setting has a default, and the type of that.

    |sep|

    :Examples:

        >>> from deepinv_ud2m.benchmark.methods import Method
        >>> def build(prior, sigma_y, scale=1.0):
        ...     return lambda y, physics, seed: scale * physics.A_dagger(y)
        >>> Method(build, grid={"scale": [0.9, 1.0]}, random=False).defaults
        {'scale': 1.0}
    """

    build: Callable[..., Sampler]
    grid: Mapping[str, Sequence] = field(default_factory=dict)  #: values that a search tries, per setting
    physics: type[Physics] = Physics  #: what it can run on
    random: bool = True  #: whether different seeds give different images

    @property
    def defaults(self) -> dict:
        _, _, *settings = inspect.signature(self.build).parameters.values()
        return {parameter.name: parameter.default for parameter in settings}


@dataclass(frozen=True)
class Entry:
    """
    A method in a run: an item of a YAML file of methods. Names, settings and types are checked.

    |sep|

    :Examples:

        >>> from deepinv_ud2m.benchmark.methods import Entry
        >>> Entry("diffpir", "DiffPIR", {"zeta": 0.3}).resolve({"zeta": 1.0, "lambda_": 3.0})
        {'num_steps': 100, 'zeta': 0.3, 'lambda_': 3.0}
    """

    name: str  #: one of ``METHODS``
    label: str = ""  #: what its rows are called; the name by default
    settings: dict = field(default_factory=dict)  #: they win over searched settings and defaults
    grid: dict = field(default_factory=dict)  #: values that a search tries in place of the method's own
    criterion: str = ""  #: it takes the settings that were searched for it, and its label says so
    searched_as: str = field(init=False)  #: label in the files of searches

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, got {self.name!r}")
        if self.criterion not in ("", *CRITERIA):
            raise ValueError(f"criterion of {self.name!r} must be of {[*CRITERIA]}, got {self.criterion!r}")
        label = str(self.label or self.name)
        object.__setattr__(self, "searched_as", label)
        object.__setattr__(self, "label", f"{label}, for {self.criterion}" if self.criterion else label)
        known = self.method.defaults
        for name, value in [*self.settings.items(), *((n, v) for n, vs in self.grid.items() for v in vs)]:
            if name not in known:
                raise ValueError(f"settings of {self.name!r} must be of {list(known)}, got {name!r}")
            kind = type(known[name])
            if kind in (int, float, str) and type(value) not in {kind, int if kind is float else kind}:
                raise ValueError(f"{name} of {self.name!r} must be of type {kind.__name__}, got {value!r}")

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    def resolve(self, searched: Mapping) -> dict:
        """All settings: its own win over the ``searched`` ones, those over the defaults."""
        return {**self.method.defaults, **searched, **self.settings}

    def candidates(self) -> list[dict]:
        """Settings that a search tries: all combinations of the grid, with what is set already."""
        grid = {n: vs for n, vs in {**self.method.grid, **self.grid}.items() if n not in self.settings}
        found = [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
        return [self.settings | one for one in found if one]


def read_methods(given: Sequence[str]) -> list[Entry]:
    """Methods by name, or from YAML files (``*.yaml``) that list entries ``{name: ..., settings: {...}}``."""
    entries = []
    for item in given:
        is_file = item.endswith(".yaml")
        listed = yaml.safe_load(Path(item).read_text()) if is_file else [{"name": item}]
        for one in listed if isinstance(listed, list) else [listed]:
            try:
                entries.append(Entry(**one))
            except (TypeError, AttributeError) as error:
                wanted = "a name, and of label, settings (value by name) and grid (list of values by name)"
                raise ValueError(f"entries of {item} must have {wanted}, got {one}") from error
    check_labels(entries)
    return entries


def check_labels(entries: Sequence[Entry]) -> None:
    """Refuse two methods of one label, whose rows could not be told apart."""
    labels = [entry.label for entry in entries]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"labels of methods must differ, but {twice} come twice: set label")
    searched = {entry.searched_as for entry in entries if entry.criterion}
    if both := sorted(searched & {*labels}):
        raise ValueError(
            f"labels of methods must differ, but {both} are with and without a criterion: set label"
        )


def load_file(file: str | Path, name: str, registry: dict, kind: type) -> None:
    """
    Run a Python file of the user and add its dictionary ``name`` to a registry, whose entries it replaces.

    :raises ValueError: if the file does not define such a dictionary, with values of a ``kind``.
    """
    found = runpy.run_path(str(file)).get(name)
    if not isinstance(found, dict) or not all(isinstance(value, kind) for value in found.values()):
        raise ValueError(f"{file} must define {name}, a dictionary with values of type {kind.__name__}")
    registry.update(found)


class Search:
    """
    Settings that were searched for a criterion, from files of ``tune``. Earlier files win.

    |sep|

    :Examples:

        >>> from deepinv_ud2m.benchmark.methods import Entry, Search
        >>> Search().best("sr4", Entry("diffpir"))  # no file: nothing was searched
        ({}, '', 0)
    """

    def __init__(self, files: Sequence[str | Path] = (), criterion: str = "energy"):
        self.criterion, self.results = criterion, []
        for file in files:
            result = read_json(Path(file))
            if criterion not in result.get("winners", {}):
                raise ValueError(f"--settings: {file} has no settings that were searched for {criterion!r}")
            self.results.append(result)

    def best(self, task: str, entry: Entry) -> tuple[dict, str, int]:
        """
        Winner for a task and label, the criteria that it wins, joined by ``" and "``, and the number of
        validation images; or ``({}, "", 0)``.
        """
        criterion = entry.criterion or self.criterion
        for result in self.results:
            found = {name: of.get(task, {}).get(entry.searched_as) for name, of in result["winners"].items()}
            if winner := found.get(criterion):
                check_setup(f"the search of {entry.searched_as!r}", entry.settings, winner)
                wins = [name for name in CRITERIA if found.get(name) == winner]
                return winner, " and ".join(wins), result["setup"]["images"]
        if entry.criterion:
            raise ValueError(f"no settings of {entry.label!r} were searched for {task!r}: give --settings")
        return {}, "", 0


def _ud2m(
    prior: Denoiser,
    sigma_y: float,
    num_steps: int = 3,
    num_iterations: int = 3,
    eta: float = 1.0,
    reference_level: float = 0.2,
) -> Sampler:
    unfolded = UnfoldedDenoiser(prior, num_iterations)
    unfolded.initializer.reference_level = reference_level
    return _ud2m_sampler(UD2M(unfolded, num_steps, eta))


def _ud2m_distilled(
    prior: Denoiser,
    sigma_y: float,
    checkpoint: str | None = None,
    num_steps: int | None = None,
    eta: float | None = None,
) -> Sampler:
    checkpoint = checkpoint or prior.prior_info.name  # the shipped sampler of a shipped prior has its name
    # A copy, for the adapter goes on it, and the other methods share the prior.
    trained = UD2M.from_pretrained(checkpoint, prior=copy.deepcopy(prior), device=_device(prior))
    eta = trained.eta if eta is None else eta
    levels: dict[str, Any] = {"sigmas": trained.sigmas, "nominal_rmse": trained.nominal_rmse}
    model = UD2M(trained.unfolded, num_steps, eta, **({} if num_steps else levels))
    sampler = _ud2m_sampler(model)
    sampler.weights = trained_fingerprint(trained.unfolded)
    # With other sigmas or another nominal RMSE it is another sampler.
    levels = {"sigmas": [float(f"{sigma:.4g}") for sigma in model.sigmas], "nominal_rmse": model.nominal_rmse}
    sampler.settings = {"checkpoint": checkpoint, "eta": eta, **levels}
    return sampler


def _ud2m_sampler(model: UD2M) -> Any:
    def sample(y: Tensor, physics: Physics, seed: int) -> Tensor:
        return model(y, physics, generator=torch.Generator(y.device).manual_seed(seed))

    sampler: Any = sample
    sampler.networks = model.unfolded.networks
    # One of the initial estimate, where it is a network, and one in each iteration.
    sampler.evaluations = model.num_steps * (model.unfolded.num_iterations + len(sampler.networks) - 1)
    return sampler


def _diffpir(
    prior: Denoiser, sigma_y: float, num_steps: int = 100, zeta: float = 0.1, lambda_: float = 7.0
) -> Sampler:
    options = {"max_iter": num_steps, "zeta": zeta, "lambda_": lambda_, "device": _device(prior)}
    return _seeded(dinv.sampling.DiffPIR(prior, dinv.optim.L2(), sigma=sigma_y, **options))


def _ddrm(
    prior: Denoiser,
    sigma_y: float,
    num_steps: int = 20,
    eta: float = 0.85,
    sigma_max: float = 1.0,
    spacing: str = "linear",
) -> Sampler:
    # deepinv spaces its sigmas evenly. That leaves large gaps near zero where they start high.
    spaced: dict[str, Callable] = {"linear": np.linspace, "geometric": np.geomspace}
    if spacing not in spaced:
        raise ValueError(f"spacing of DDRM's sigmas must be one of {list(spaced)}, got {spacing!r}")
    # deepinv ends at 0, where a network with EDM's preconditioning is not defined.
    sigmas = spaced[spacing](sigma_max, 0.002, num_steps)
    model = dinv.sampling.DDRM(prior, sigmas=sigmas, eta=eta)
    # deepinv's DDRM writes into y where the left singular vectors are the identity.
    return _seeded(lambda y, physics: model(y.clone(), physics))


def _dps(
    prior: Denoiser, sigma_y: float, num_steps: int = 1000, weight: float = 1.0, guidance: str = "norm"
) -> Sampler:
    # deepinv's steps are time points, one more than evaluations.
    options = {"num_steps": num_steps + 1, "weight": weight, "guidance": guidance}
    return _seeded(dinv.sampling.DPS(prior, **options, device=_device(prior), dtype=torch.float32))


def _pigdm(prior: Denoiser, sigma_y: float, num_steps: int = 100, weight: float = 1.0) -> Sampler:
    return _posterior_diffusion(prior, dinv.sampling.PiGDMDataFidelity(prior, weight), num_steps)


def _moment_matching(prior: Denoiser, sigma_y: float, num_steps: int = 100, weight: float = 1.0) -> Sampler:
    return _posterior_diffusion(prior, dinv.sampling.MomentMatchingDataFidelity(prior, weight), num_steps)


def _posterior_diffusion(prior: Denoiser, fidelity: Any, num_steps: int) -> Sampler:
    options = {"device": _device(prior), "dtype": torch.float32}
    sde = dinv.sampling.VariancePreservingDiffusion(alpha=1.0, **options)
    solver = dinv.sampling.DDPMSolver(timesteps=torch.linspace(1, 0, num_steps + 1, device=_device(prior)))
    return _seeded(dinv.sampling.PosteriorDiffusion(fidelity, prior, sde, solver, **options))


def _dpir(prior: Denoiser, sigma_y: float) -> Sampler:
    return _seeded(dinv.optim.DPIR(sigma=sigma_y, denoiser=prior, device=_device(prior)))


def _device(prior: nn.Module) -> torch.device:
    return next(prior.parameters()).device


def _seeded(restore: Callable[[Tensor, Physics], Tensor]) -> Sampler:
    """A model of deepinv as a sampler. Seeded globally, for some of them ignore ``seed=0``."""

    def sample(y: Tensor, physics: Physics, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[y.device] if y.is_cuda else []):
            torch.manual_seed(seed)
            return restore(y, physics)

    return sample


_LINEAR, _DECOMPOSABLE = dinv.physics.LinearPhysics, dinv.physics.DecomposablePhysics
_ETAS, _WEIGHTS = [0.0, 0.5, 0.8, 1.0], [0.1, 0.3, 0.6, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0]
#: Methods by name.
METHODS = {
    "ud2m-distilled": Method(_ud2m_distilled, {"eta": _ETAS}),
    "ud2m": Method(_ud2m, {"eta": _ETAS, "reference_level": [0.1, 0.2, 0.4]}),
    "diffpir": Method(
        _diffpir, {"zeta": [0.03, 0.1, 0.3, 0.6, 1.0], "lambda_": [0.1, 0.3, 1.0, 3.0, 7.0, 15.0]}
    ),
    "dps": Method(
        _dps,
        {"guidance": ["norm", "annealed"], "weight": [0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]},
    ),
    "pigdm": Method(_pigdm, {"weight": _WEIGHTS}, _LINEAR),
    "moment-matching": Method(_moment_matching, {"weight": [0.3, 0.6, 1.0, 1.5, 2.5, 4.0]}, _LINEAR),
    "ddrm": Method(
        _ddrm,
        {"eta": [0.3, 0.6, 0.85, 1.0], "sigma_max": [0.25, 0.5, 1.0, 3.0, 10.0, 80.0]}
        | {"spacing": ["linear", "geometric"]},
        _DECOMPOSABLE,
    ),
    "dpir": Method(_dpir, random=False),
    "pinv": Method(lambda prior, sigma_y: _seeded(lambda y, physics: physics.A_dagger(y)), random=False),
}
