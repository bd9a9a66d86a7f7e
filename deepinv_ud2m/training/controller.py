"""The weight of diversity in energy scores, set by what evaluations find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from deepinv.physics import Physics

#: The metric that a :class:`DiversityController` reads.
RATIO = "spread-skill ratio"


class Controller(Protocol):
    """What a :class:`deepinv_ud2m.training.DistillationTrainer` calls with the results of each evaluation."""

    def __call__(self, results: dict[str, float], /) -> dict[str, float]: ...

    def state(self) -> Any: ...

    def load(self, state: Any, /) -> None: ...


class DiversityController:
    r"""
    Sets the weight c of diversity in energy scores, for each physics, by what evaluations find:

    .. math:: c \leftarrow c \, r^\kappa, \qquad c \in [0.8, 1.2],

    where r is the spread-skill ratio of the samples of the sampler, the metric ``"spread-skill ratio"`` of
    ``sample_metrics``. r = 1 is calibrated; above 1, samples are too similar, and c grows.

    :param Sequence[deepinv.physics.Physics] physics: the physics of a trainer, all different.
    :param float kappa: :math:`\kappa`, non-negative.

    The attribute ``weights``, ``{physics: c}``, is given to :class:`deepinv_ud2m.training.EnergyScoreLoss`.

    |sep|

    :Examples:

        >>> from deepinv.physics import Denoising
        >>> from deepinv_ud2m.training import DiversityController
        >>> controller = DiversityController([Denoising()], kappa=0.5)
        >>> controller({"spread-skill ratio": 1.21})  # samples were too similar
        {'diversity/0': 1.1}
    """

    low, high = 0.8, 1.2

    def __init__(self, physics: Sequence[Physics], kappa: float):
        self.weights, self.kappa = dict.fromkeys(physics, 1.0), kappa

    def __call__(self, results: dict[str, float]) -> dict[str, float]:
        """
        Act on the results of an evaluation.

        :returns: the new weights, by ``"diversity/number of the physics"``.
        """
        for i, (physics, c) in enumerate(self.weights.items()):
            name = f"{RATIO}/{i}"
            ratio = results[name if name in results else RATIO]
            self.weights[physics] = min(max(c * ratio**self.kappa, self.low), self.high)
        return {f"diversity/{i}": c for i, c in enumerate(self.weights.values())}

    def state(self) -> list[float]:
        """The weights, in the order of the physics."""
        return list(self.weights.values())

    def load(self, state: list[float]) -> None:
        """Set the weights."""
        self.weights.update(zip(self.weights, state, strict=True))
