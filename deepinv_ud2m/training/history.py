"""What a training run has measured: losses and metrics against steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from deepinv_ud2m.files import write_file
from deepinv_ud2m.training.figures import plot_curves


class History(dict):
    """Points `(step, value)` by name. Values of steps are averaged before they become a point."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, list] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Values of one step."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + value, count + 1]

    def means(self) -> dict[str, float]:
        """Means of the values since the last call."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def record(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """New points."""
        for name, value in values.items():
            self.setdefault(prefix + name, []).append((step, value))

    def load(self, points: Mapping[str, list], sums: Mapping[str, list]) -> None:
        """That of a checkpoint."""
        self.update({name: [tuple(point) for point in of] for name, of in points.items()})
        self.sums = dict(sums)

    def summary(self, most: int = 20) -> dict[str, list[list[float]]]:
        """
        What a sampler keeps of its training: the metrics of its evaluations, without those of single
        physics, or else the loss, at ``most`` points that end with the last.
        """
        of_evaluations = {n: points for n, points in self.items() if n.startswith("eval: ") and "/" not in n}
        kept = of_evaluations or {"loss": self.get("loss", [])}
        thinned = {name: points[:: -max(1, -(-len(points) // most))][::-1] for name, points in kept.items()}
        return {
            name.removeprefix("eval: "): [[s, float(f"{v:.4g}")] for s, v in points]
            for name, points in thinned.items()
        }

    def write(self, folder: Path) -> None:
        """Write ``history.json``."""
        write_file(folder / "history.json", json.dumps(self, indent=1) + "\n")

    def draw(self, folder: Path) -> None:
        """Draw ``curves.png``, which takes longer than a step of a small network."""
        plot_curves(folder / "curves.png", self)
