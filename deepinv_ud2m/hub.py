"""The Hugging Face Hub: download, upload, model cards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from deepinv_ud2m.initializers import Initializer
from deepinv_ud2m.priors import PRIORS


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
        Path(folder, "README.md").write_text(model_card(repo_id, config), encoding="utf-8")
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(repository)


def model_card(repo_id: str, config: Mapping) -> str:
    """A model card, Markdown with a YAML head: what a sampler is, how to load it, what it was trained on."""
    prior, initializer, lora = config["prior"], config["initializer"]["kind"], config["lora"]
    given = [f'"{repo_id}"']
    if prior["name"] not in PRIORS:  # those of others have to be fetched
        given.append("prior=prior")
    known = Initializer.registry.get(initializer)
    if known is None or not known.is_rebuilt:  # they are not in the files
        given.append("initializer=initializer")
    channels = "" if prior["channels"] is None else f", {prior['channels']} channel(s)"
    adapter = "none" if lora is None else f"rank {lora['rank']} on {len(lora['targets'])} layers"
    return f"""---
library_name: deepinv
tags: [inverse-problems, posterior-sampling, diffusion, ud2m]
---

# {repo_id}

A UD2M posterior sampler (an unfolded and distilled diffusion model,
[arXiv:2507.02686](https://arxiv.org/abs/2507.02686)) for [deepinv](https://deepinv.github.io), saved
with deepinv_ud2m {config["package_version"]}. The prior is not part of the files.

```python
from deepinv_ud2m import UD2M

model = UD2M.from_pretrained({", ".join(given)})
x_hat = model(y, physics)
```

| | |
|---|---|
| prior | {prior["name"] or "not named"}{channels} |
| fingerprint of the prior | `{prior["fingerprint"]}` |
| iterations K | {config["unfolded"]["num_iterations"]} |
| noise levels | {", ".join(f"{sigma:.4g}" for sigma in config["sampler"]["sigmas"])} |
| nominal RMSE | {config["sampler"].get("nominal_rmse") or "none"} |
| eta | {config["sampler"]["eta"]:g} |
| initializer | {initializer} |
| LoRA | {adapter} |

```json
{json.dumps(config["metadata"], indent=2)}
```
"""
