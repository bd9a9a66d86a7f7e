"""Where the training of a sampler starts, if not from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepinv.models import Denoiser

from deepinv_ud2m.lora import merge_lora
from deepinv_ud2m.pretrained import from_pretrained
from deepinv_ud2m.sampler import UD2M


def sampler_to_train(
    name_or_path: str | Path,
    *,
    prior: Denoiser | str | Path | None = None,
    all_weights: bool = False,
    levels: Sequence[float] | None = None,
    reference_error: float | None = None,
) -> UD2M:
    """
    A trained sampler, to be trained on: what was trained in it has ``requires_grad``.

    :param str, pathlib.Path name_or_path: as in :meth:`deepinv_ud2m.UD2M.from_pretrained`.
    :param deepinv.models.Denoiser, str, pathlib.Path prior: likewise.
    :param bool all_weights: train all weights of the prior from here on; an adapter becomes part of them
        (default: ``False``).
    :param Sequence[float] levels: other levels for the sampler, decreasing (default: those it has).
    :param float reference_error: another one for the sampler (default: that it has, if any).
    :raises ValueError: as in :meth:`deepinv_ud2m.UD2M.from_pretrained`.
    """
    model = from_pretrained(name_or_path, prior=prior, merge=False)
    if all_weights:
        merge_lora(model.unfolded.denoiser, unload=True)
        model.unfolded.denoiser.requires_grad_(True)
    if levels is None and reference_error is None:
        return model
    return UD2M(
        model.unfolded,
        levels=model.levels if levels is None else levels,
        eta=model.eta,
        output_range=model.output_range,
        reference_error=model.reference_error if reference_error is None else reference_error,
    )
