"""Training of the first guess of an unfolded denoiser, before that of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepinv.physics import Physics
from torch import Tensor

from deepinv_ud2m.lora import has_lora
from deepinv_ud2m.posterior_mean import PosteriorMeanInitializer
from deepinv_ud2m.proximal import expand_scalar, noise_level
from deepinv_ud2m.training.trainer import DistillationTrainer


@dataclass(kw_only=True)
class FirstGuessTrainer(DistillationTrainer):
    r"""
    Trains the :class:`deepinv_ud2m.PosteriorMeanInitializer` of a sampler, which nothing else of it
    takes part in.

    A step costs one network pass per image, where one of :class:`DistillationTrainer` costs K for each
    draw, and N times that end to end: what y tells of x is learned here. Data, physics, levels,
    checkpoints and the rest are those of that class; losses are called with ``error``, what the first
    guess states of itself, as :class:`deepinv_ud2m.training.FirstGuessLoss` needs it.

    :raises TypeError: for a sampler with another initialiser.
    :raises ValueError: with ``end_to_end``, or losses that need several draws: a first guess is one.
    """

    def _check(self) -> None:
        super()._check()
        if not isinstance(self.unfolded.initializer, PosteriorMeanInitializer):
            raise TypeError(
                "model must have a PosteriorMeanInitializer, the only first guess that is trained, got "
                f"{type(self.unfolded.initializer).__name__}"
            )
        if self.end_to_end:
            raise ValueError("end_to_end is of samples, not of a first guess: leave it False")
        losses = self.losses if isinstance(self.losses, list | tuple) else [self.losses]
        for loss in losses:
            if getattr(loss, "num_samples", 1) > 1:
                raise ValueError(
                    f"losses: {type(loss).__name__} needs {loss.num_samples} draws, and a first guess "
                    "is one: give FirstGuessLoss()"
                )

    def _export(self, name: str, metadata: Mapping | None = None) -> None:
        """With the weights of the denoiser, a trained sampler's, though they are frozen here."""
        denoiser = self.unfolded.denoiser
        frozen = [p for p in denoiser.parameters() if not p.requires_grad and not has_lora(denoiser)]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            super()._export(name, metadata)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def _draw_level(self, x: Tensor, y: Tensor, physics: Physics) -> dict[str, Tensor]:
        x_s, sigma = self._states(x)
        levels = expand_scalar(sigma, x, "sigma"), expand_scalar(noise_level(physics), x, "sigma_y")
        guess, error = self.unfolded.first_guess(y, physics, x_s, *levels)
        return {"x_s": x_s, "sigma": sigma, "samples": guess, "error": error}
