"""Published diffusion priors by name: the networks of the paper, with weights from elsewhere.

Their weights do not ship with the package. They are read from a file (or, of diffusers, a folder) that
is given, found in the cache of :mod:`torch.hub`, or, if asked for, downloaded; never by unpickling
arbitrary objects. A new prior is one entry in ``PUBLISHED``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from deepinv.models import Denoiser, DiffUNet, DiffusersDenoiserWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deepinv_ud2m.networks import VPDenoiser


@dataclass(frozen=True)
class Published:
    """
    A prior whose weights are elsewhere.

    :param str title: what it is.
    :param Callable build: the network with random weights.
    :param str file: name of the file of weights, or of the repository of diffusers.
    :param int megabytes: its size.
    :param str url: where the file is downloaded from; none for diffusers, which knows.
    :param int image_size: side of the training images.
    :param int size_multiple: sides must be multiples of it.
    """

    title: str
    build: Callable[[], nn.Module] | None
    file: str
    megabytes: int
    url: str | None
    image_size: int = 256
    size_multiple: int = 32


def load_published(
    name: str, weights: str | Path | None = None, download: bool = False
) -> tuple[Denoiser, Published]:
    """
    A published prior as a denoiser with gradients, on the CPU.

    :param str name: a key of ``PUBLISHED``.
    :param str, pathlib.Path weights: file of weights (``.pt`` or ``.safetensors``), or folder of a
        diffusers pipeline; by default what was downloaded before.
    :param bool download: download what is missing (default: ``False``).
    :returns: the denoiser and its entry.
    :raises FileNotFoundError: if the weights are not here; it says what they are called, how large they
        are, and where to put them.
    :raises ImportError: for a prior of diffusers, without that package.
    :raises OSError: if the download fails.
    :raises ValueError: for a file that is damaged or of another network; it names it.
    """
    entry = PUBLISHED[name]
    if entry.build is None:
        network = _load_diffusers(name, entry, weights, download)
        return VPDenoiser(network, _noise_of_diffusers, output="conv_out"), entry
    file = _find_file(name, entry, weights, download)
    network = entry.build()
    load_weights(network, file)
    return VPDenoiser(network, _noise_of_diffunet, output="out.2"), entry


def random_prior(name: str, full_size: bool = False) -> Denoiser:
    """
    A prior of the same class with random weights: what it computes costs the same.

    :param str name: a key of ``PUBLISHED``.
    :param bool full_size: the network itself; by default a small one of its class, to try a recipe.
    :returns: the denoiser.
    :raises ValueError: for another name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name must be one of {sorted(PUBLISHED)}, got {name!r}")
    if PUBLISHED[name].build is not None:
        network = PUBLISHED[name].build() if full_size else _diffunet(large=False)()
        return VPDenoiser(network, _noise_of_diffunet, output="out.2")
    from diffusers import UNet2DModel

    channels = (128, 128, 256, 256, 512, 512) if full_size else (32, 32)
    down = ["DownBlock2D"] * len(channels)
    down[-2 if full_size else -1] = "AttnDownBlock2D"
    network = UNet2DModel(
        sample_size=PUBLISHED[name].image_size if full_size else 32,
        layers_per_block=2 if full_size else 1,
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=[block.replace("Down", "Up") for block in reversed(down)],
    )
    return VPDenoiser(network.eval(), _noise_of_diffusers, output="conv_out")


def load_weights(network: nn.Module, file: str | Path) -> None:
    """
    Load a file of weights into a network.

    :param torch.nn.Module network: the network.
    :param str, pathlib.Path file: ``.safetensors``, or a state dictionary written by ``torch.save``.
    :raises ValueError: for a file that is damaged, or of another network.
    """
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
    ) as error:
        raise ValueError(f"weights: {file} is damaged or no file of weights: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights: {file} is no state dictionary, it holds a {type(state).__name__}")
    expected = network.state_dict()
    # Saved by deepinv after construction, the schedule is among the weights.
    state = {k: v for k, v in state.items() if k in expected or not k.endswith("alphas_cumprod")}
    missing, foreign = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    other = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    if missing or foreign or other:
        raise ValueError(
            f"weights: {file} is of another network: {len(missing)} weights are missing {missing[:2]}, "
            f"{len(foreign)} are unknown {foreign[:2]}, {len(other)} of another shape {other[:2]}"
        )
    network.load_state_dict(state)


def _find_file(name: str, entry: Published, weights: str | Path | None, download: bool) -> Path:
    if weights is not None:
        file = Path(weights)
        if not file.is_file():
            raise FileNotFoundError(f"weights: there is no file {file}")
        return file
    file = Path(torch.hub.get_dir()) / "checkpoints" / entry.file
    if file.is_file():
        return file
    where = f"{entry.file} ({entry.megabytes} MB), the weights of the prior {name!r}, from {entry.url}"
    if not download:
        raise FileNotFoundError(
            f"{file} does not exist: put {where} there, give its path as weights, or set download=True"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(entry.url, str(file))
    except OSError as error:
        raise OSError(
            f"cannot download {where}: {error}. Put the file at {file}, or give its path as weights"
        ) from error
    return file


def _load_diffusers(
    name: str, entry: Published, weights: str | Path | None, download: bool
) -> nn.Module:
    try:
        import diffusers  # noqa: F401
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"the prior {name!r} needs diffusers: pip install diffusers, or deepinv_ud2m[diffusers]"
        ) from error
    where = f"{entry.file} ({entry.megabytes} MB) of the Hugging Face Hub"
    if weights is None:
        try:
            weights = snapshot_download(entry.file, local_files_only=not download)
        except Exception as error:  # of many kinds, by version of the library and of what it uses
            kind = OSError if download else FileNotFoundError
            hint = "" if download else ", or set download=True"
            raise kind(
                f"the prior {name!r} is {where}, which is not here: {error}. Give the folder of a copy "
                f"as weights{hint}"
            ) from error
    elif not Path(weights).is_dir():
        raise FileNotFoundError(f"weights: there is no folder {weights}, expected a copy of {where}")
    try:
        pipeline = DiffusersDenoiserWrapper(str(weights), clip_output=False)
    # Each part of a pipeline has errors of its own: files missing, truncated, of another shape.
    except Exception as error:
        raise ValueError(f"weights: {weights} is no copy of {where}: {error}") from error
    config = pipeline.scheduler.config
    stated = [config.get(k) for k in ("beta_schedule", "beta_start", "beta_end", "prediction_type")]
    if stated != ["linear", 1e-4, 0.02, "epsilon"] or config.num_train_timesteps != 1000:
        raise ValueError(f"weights: the schedule of {weights} is another, {dict(config)}")
    return pipeline.model.eval()


def _diffunet(large: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        network = DiffUNet(large_model=large, pretrained=None).eval()
        # deepinv's table of levels, which its own denoiser rounds to; VPDenoiser has a schedule.
        del network.sqrt_1m_alphas_cumprod, network.sqrt_alphas_cumprod
        return network

    return build


def _noise_of_diffunet(network: nn.Module, v: Tensor, t: Tensor) -> Tensor:
    return network.forward_diffusion(v, t)[:, :3]  # the others are variances


def _noise_of_diffusers(network: nn.Module, v: Tensor, t: Tensor) -> Tensor:
    return network(v, t).sample


_DEEPINV = "https://huggingface.co/deepinv/diffunet/resolve/main/{}?download=true"

#: Published priors by name.
PUBLISHED: dict[str, Published] = {
    "imagenet256": Published(
        "ADM, ImageNet 256x256, unconditional (Dhariwal and Nichol 2021), 552.8 M parameters",
        _diffunet(large=True),
        "diffusion_openai.pt",
        2211,
        _DEEPINV.format("diffusion_openai.pt"),
    ),
    "ffhq256": Published(
        "ADM, FFHQ 256x256 (Choi et al. 2021), 93.6 M parameters",
        _diffunet(large=False),
        "diffusion_ffhq_10m.pt",
        374,
        _DEEPINV.format("diffusion_ffhq_10m.pt"),
    ),
    "lsun-bedroom256": Published(
        "DDPM, LSUN bedrooms 256x256 (Ho et al. 2020), 113.7 M parameters",
        None,
        "google/ddpm-ema-bedroom-256",
        455,
        None,
    ),
}
