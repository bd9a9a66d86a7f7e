"""The Hugging Face Hub: download, upload, model cards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from deepinv_ud2m.initializers import Initializer
from deepinv_ud2m.priors import PRIORS

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

#: Names of data sets on the Hub, by the first word of what ``metadata["data"]`` says.
_DATASETS = {"MNIST": "ylecun/mnist"}
#: What a card says of the training, by the key in ``metadata`` or in the recipe that it holds.
_TRAINING = {
    "data": "images",
    "tasks": "degradations",
    "sigma_y": "noise levels, least and largest",
    "image_size": "image size in pixels",
    "measurements": "measurements seen",
    "batch_size": "batch size",
    "step": "training steps",
    "loss": "loss",
    "losses": "losses",
    "spread": "weight of the spread in the loss",
    "trained": "what was trained",
    "factor of delta": "calibration: factor on all delta_k",
    "delta_factor": "calibration: factor on all delta_k",
    "delta_factor_note": "note on that factor",
}


def find() -> ModuleType:
    """The package ``huggingface_hub``; ImportError says how to install it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face Hub needs: pip install huggingface_hub (or deepinv_ud2m[hub]). Without "
            "it, copy the files by hand and give their folder"
        ) from error
    return huggingface_hub


def download(repo_id: str, revision: str | None, files: Sequence[str]) -> Path:
    """
    Download files of a repository, unless they are in the cache.

    :param str repo_id: ``"user/repo"``.
    :param str, None revision: branch, tag or commit; the main branch by default.
    :param Sequence[str] files: their names.
    :returns: the folder they are in.
    :raises ImportError: without ``huggingface_hub``.
    :raises OSError: if the download fails.
    """
    hub = find()
    print(
        f"Downloading {' and '.join(files)} of {repo_id!r} (revision {revision or 'main'}) from the "
        "Hugging Face Hub, unless they are in its cache. A folder with these files can be given instead."
    )
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # of many kinds, by version of the library and of what it uses
        raise OSError(
            f"{repo_id!r} is neither a folder nor the name of a shipped sampler, and cannot be downloaded "
            f"from the Hugging Face Hub: {error}"
        ) from error


def upload(
    folder: str, repo_id: str, config: Mapping, private: bool, token: str | None, commit_message: str
) -> str:
    """
    Upload the folder of a sampler with this ``config.json``, and a model card unless the repository has one,
    see :func:`deepinv_ud2m.checkpoint.push_to_hub`. It returns the address of the repository.
    """
    api = find().HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = repository.repo_id
    if not api.file_exists(repo_id, "README.md"):
        model_card(repo_id, config).save(Path(folder, "README.md"))
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(repository)


def model_card(repo_id: str, config: Mapping) -> ModelCard:
    """
    The model card of a sampler: how to load it, what it was trained on, its figures and its limits.

    What was trained on and measured is in ``config["metadata"]``, see :func:`deepinv_ud2m.checkpoint.save`. A
    card says no more than that. ``metadata["license"]`` and ``metadata["datasets"]`` are names that the Hub
    knows. Without a licence it is that of this package, if the prior ships with it, else ``"unknown"``.

    :param str repo_id: ``"user/repo"``.
    :param Mapping config: what ``config.json`` holds.
    :returns: a ``huggingface_hub.ModelCard``.
    :raises ImportError: without ``huggingface_hub``.
    """
    hub = find()
    metadata, prior, name = config["metadata"], config["prior"], config["initializer"]["kind"]
    training, results = _training(metadata), _results(metadata)
    dataset = _DATASETS.get(str(metadata.get("data", "")).partition(" ")[0])
    data = hub.ModelCardData(
        license=metadata.get("license", "bsd-3-clause" if prior["name"] in PRIORS else "unknown"),
        library_name="deepinv",
        pipeline_tag="image-to-image",
        tags=["inverse-problems", "image-restoration", "posterior-sampling", "diffusion", "ud2m"],
        datasets=metadata.get("datasets", [dataset] if dataset else None),
        metrics=sorted({key.partition("/")[0] for key in results}) or None,
    )
    given = [f'"{repo_id}"']
    if prior["name"] not in PRIORS:  # those of others have to be fetched
        given.append("prior=prior")
    known = Initializer.registry.get(name)
    if known is None or not known.is_rebuilt:  # they are not in the files
        given.append("initializer=initializer")
    channels = "" if prior["channels"] is None else f", {prior['channels']} channel(s)"
    lora = config["lora"]
    model = {
        "prior": f"{prior['name'] or 'not named'}{channels}",
        "fingerprint of the prior": f"`{prior['fingerprint']}`",
        "iterations K": config["unfolded"]["num_iterations"],
        "noise levels": ", ".join(f"{sigma:.4g}" for sigma in config["sampler"]["sigmas"]),
        "nominal RMSE": config["sampler"].get("nominal_rmse") or "none",
        "eta": f"{config['sampler']['eta']:g}",
        "initializer": name,
        "LoRA": "none" if lora is None else f"rank {lora['rank']} on {len(lora['targets'])} layers",
    }
    return hub.ModelCard(f"""---
{data.to_yaml()}
---

# {repo_id}

A UD2M posterior sampler (an unfolded and distilled diffusion model,
[arXiv:2507.02686](https://arxiv.org/abs/2507.02686)) for [deepinv](https://deepinv.github.io), saved
with deepinv_ud2m {config["package_version"]}. The prior is not part of the files.

```python
from deepinv_ud2m import UD2M

model = UD2M.from_pretrained({", ".join(given)})
x_hat = model(y, physics)  # one sample, for measurements y of a deepinv physics
samples = model.sample(y, physics, num_samples=8)
```

## Model

{_table(model)}

## Training

{_table(training) or "The file does not say what the sampler was trained on."}

## Results

{_results_table(results, metadata) or "The file holds no results."}

## Limits

- The sampler was trained for the degradations, noise levels and images above. This card says nothing of
  others.
- `model.residual` is about 1 if a sample fits its measurement.
- Details that the measurement does not determine come from the model. They may be wrong.
- The posterior is approximate. The spread-skill ratio of a calibrated sampler is 1. Above 1, samples differ
  too little. `deepinv_ud2m.uncertainty.Conformal` calibrates intervals on images of yours.

## Metadata

```json
{json.dumps(metadata, indent=2)}
```
""")


def _training(metadata: Mapping) -> dict:
    """Rows of the card on the training, of metadata and of the recipe in it."""
    recipe = metadata.get("recipe") or {}
    sizes = sorted({stage["size"] for stage in recipe.get("stages", []) if stage.get("size")})
    known = {**recipe, "image_size": sizes, **metadata}
    found = {name: known[key] for key, name in _TRAINING.items() if known.get(key) not in (None, [])}
    return {name: _text(value) for name, value in found.items()}


def _text(value: object) -> str:
    if isinstance(value, list):  # each once, in order
        return ", ".join(dict.fromkeys(map(_text, value)))
    if isinstance(value, dict):
        return " ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _results(metadata: Mapping) -> dict:
    """Figures of the validation, ``"PSNR"`` of all tasks and ``"PSNR/0"`` of the first."""
    found = metadata.get("validation") or {key: metadata[key] for key in metadata if key not in _TRAINING}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, float) and not key.startswith("diversity/")  # a weight of the loss
    }


def _table(rows: Mapping) -> str:
    lines = [f"| {key} | {str(value).replace('|', ' ')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _results_table(results: Mapping, metadata: Mapping) -> str:
    """One column for each metric; a row for all tasks, and one for each."""
    if not results:
        return ""
    metrics = list(dict.fromkeys(key.partition("/")[0] for key in results))
    tasks = list(dict.fromkeys(key.partition("/")[2] for key in results))
    names = metadata.get("tasks") or (metadata.get("recipe") or {}).get("tasks") or []
    if len(names) != len([task for task in tasks if task]):  # drawn at random, or physics without names
        names = []
    lines = [["validation", *metrics], ["---"] * (len(metrics) + 1)]
    for task in sorted(tasks, key=lambda task: (len(task), task)):
        name = names[int(task)] if task and names else f"task {task}" if task else "all"
        values = [results.get(f"{metric}/{task}" if task else metric) for metric in metrics]
        lines.append([name, *("" if value is None else f"{value:.4g}" for value in values)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = metadata.get("validation_note")
    return f"{table}\n\nNote: {note}." if note else table
