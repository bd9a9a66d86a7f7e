"""Published diffusion priors by name: the networks of the paper, with weights from elsewhere.

Their weights do not ship with the package. They are read from a file or folder that the caller names,
found in the cache of :mod:`torch.hub` or of the Hugging Face Hub, or downloaded if asked for. What is
cached or downloaded must have the sha256 of its card. A new prior is one entry in ``PUBLISHED``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from deepinv.models import Denoiser, DiffUNet
from torch import Tensor, nn

from deepinv_ud2m.files import check_digest, load_weights, read_weights
from deepinv_ud2m.priors.networks import VPDenoiser
from deepinv_ud2m.priors.unet2d import build_unet2d, load_unet2d, unet2d_class


@dataclass(frozen=True)
class Published:
    """
    A prior whose weights are in a repository of the Hugging Face Hub.

    :param Callable build: ``build(full_size)`` gives the network with random weights, or a small one of
        its class.
    :param Callable noise: ``noise(network, v, t)`` gives the noise that the network predicts.
    :param str repository: name of the repository.
    :param str revision: its commit.
    :param tuple[str, ...] files: the file of weights. A diffusers network has further files.
    :param int megabytes: size of the weights.
    :param str sha256: digest of the weights.
    :param int image_size: side of the training images (default: 256).
    :param int size_multiple: sides must be multiples of it (default: 32).
    """

    build: Callable[[bool], nn.Module]
    noise: Callable[[nn.Module, Tensor, Tensor], Tensor]
    repository: str
    revision: str
    files: tuple[str, ...]
    megabytes: int
    sha256: str
    image_size: int = 256
    size_multiple: int = 32

    @property
    def is_folder(self) -> bool:
        """Whether it is a diffusers network, whose files make a folder."""
        return len(self.files) > 1

    @property
    def source(self) -> str:
        """What is downloaded, how large it is, and from where."""
        where = f"https://huggingface.co/{self.repository}/tree/{self.revision}"
        of = f" of {self.files[0]}" if self.is_folder else ""
        return f"{', '.join(self.files)} ({self.megabytes} MB, sha256{of} {self.sha256}) from {where}"


def load_published(
    name: str, weights: str | Path | None = None, download: bool = False
) -> tuple[Denoiser, Published]:
    """
    A published prior as a denoiser with gradients, on the CPU.

    :param str name: a key of ``PUBLISHED``.
    :param str, pathlib.Path, None weights: file of weights (``.pt`` or ``.safetensors``), or folder of a
        diffusers network. It may be a conversion, so its digest is not checked. ``None`` (default)
        stands for the file in the cache.
    :param bool download: download what is not in the cache (default: ``False``).
    :returns: the denoiser and its card.
    :raises FileNotFoundError: if the weights are not here; it says what they are called, how large they
        are, and where to put them.
    :raises ImportError: for a diffusers network, without that package.
    :raises OSError: if the download fails.
    :raises ValueError: for weights that are damaged, of another network, or of another digest.
    """
    card = PUBLISHED[name]
    if card.is_folder:
        unet2d_class()  # without diffusers, nothing is downloaded
    path = _find(name, card, download) if weights is None else Path(weights)
    if not (path.is_dir() if card.is_folder else path.is_file()):
        kind = "folder" if card.is_folder else "file"
        raise FileNotFoundError(f"weights: there is no {kind} {path}, expected {card.source}")
    if card.is_folder:
        network = load_unet2d(path)
    else:
        # deepinv saves its table of noise levels with the weights.
        state = {k: v for k, v in read_weights(path).items() if not k.endswith("alphas_cumprod")}
        with torch.device("meta"):
            network = card.build(True)
        load_weights(network, state, path)
    return VPDenoiser(network, card.noise), card


def random_prior(name: str, full_size: bool = False) -> Denoiser:
    """
    A published prior with random weights, to measure what it costs or to try a recipe.

    :param str name: a key of ``PUBLISHED``.
    :param bool full_size: the network itself, or a small one of its class (default: ``False``).
    :returns: the denoiser.
    :raises ValueError: for another name.
    :raises ImportError: for a diffusers network, without that package.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name must be one of {sorted(PUBLISHED)}, got {name!r}")
    card = PUBLISHED[name]
    return VPDenoiser(card.build(full_size), card.noise)


def _find(name: str, card: Published, download: bool) -> Path:
    """The file, or the folder of the files, in the cache."""
    files = _cached(card)
    if files is None and not download:
        place = " Put them into one folder." if card.is_folder else f" Put it at {_hub_file(card)}."
        raise FileNotFoundError(
            f"the weights of the prior {name!r} are not here: {card.source}.{place} Give the path of a "
            "copy as weights, or set download=True"
        )
    if files is None:
        print(f"downloading {card.source}", file=sys.stderr, flush=True)
        try:
            files = _download(card)
        except Exception as error:  # of many kinds, by version of the library and of what it uses
            raise OSError(
                f"cannot download {card.source}: {error}. Give the path of a copy as weights"
            ) from error
    check_digest(files[0], card.sha256)
    return files[0].parent if card.is_folder else files[0]


def _cached(card: Published) -> list[Path] | None:
    if not card.is_folder:
        return [_hub_file(card)] if _hub_file(card).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(card.repository, f, revision=card.revision) for f in card.files]
    files = [Path(file) for file in found if isinstance(file, str)]
    return files if len(files) == len(found) else None


def _download(card: Published) -> list[Path]:
    if not card.is_folder:
        file = _hub_file(card)
        file.parent.mkdir(parents=True, exist_ok=True)
        url = f"https://huggingface.co/{card.repository}/resolve/{card.revision}/{card.files[0]}"
        # A file of another digest does not get into the cache.
        torch.hub.download_url_to_file(url, str(file), hash_prefix=card.sha256)
        return [file]
    from huggingface_hub import hf_hub_download

    return [Path(hf_hub_download(card.repository, f, revision=card.revision)) for f in card.files]


def _hub_file(card: Published) -> Path:
    # deepinv looks for its weights there, too.
    return Path(torch.hub.get_dir()) / "checkpoints" / card.files[0]


def _diffunet(large: bool) -> nn.Module:
    network = DiffUNet(large_model=large, pretrained=None).eval()
    # deepinv's table of noise levels, which its own denoiser rounds to. VPDenoiser has a schedule.
    del network.sqrt_1m_alphas_cumprod, network.sqrt_alphas_cumprod
    return network


def _noise_of_diffunet(network: DiffUNet, v: Tensor, t: Tensor) -> Tensor:
    return network.forward_diffusion(v, t)[:, :3]  # the others are variances


def _noise_of_unet2d(network: nn.Module, v: Tensor, t: Tensor) -> Tensor:
    return network(v, t).sample


#: Published priors by name. The digests are those that the Hugging Face Hub states for these commits.
PUBLISHED: dict[str, Published] = {
    # ADM, unconditional, 552.8 M parameters (Dhariwal and Nichol 2021)
    "imagenet256": Published(
        build=lambda full_size: _diffunet(large=full_size),
        noise=_noise_of_diffunet,
        repository="deepinv/diffunet",
        revision="6b0a2cf45decab1f022d22eefe3787d9d515f32b",
        files=("diffusion_openai.pt",),
        megabytes=2211,
        sha256="a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
    ),
    # ADM, 93.6 M parameters (Choi et al. 2021)
    "ffhq256": Published(
        build=lambda full_size: _diffunet(large=False),
        noise=_noise_of_diffunet,
        repository="deepinv/diffunet",
        revision="6b0a2cf45decab1f022d22eefe3787d9d515f32b",
        files=("diffusion_ffhq_10m.pt",),
        megabytes=374,
        sha256="81d535743156ec6be34d8668e6920da94f0614074d7793a16c8fa9e306237faa",
    ),
    # DDPM, 113.7 M parameters (Ho et al. 2020)
    "lsun-bedroom256": Published(
        build=build_unet2d,
        noise=_noise_of_unet2d,
        repository="google/ddpm-ema-bedroom-256",
        revision="df329a8d5319a212e813ba83427e4af56760c35f",
        files=("diffusion_pytorch_model.bin", "config.json", "scheduler_config.json"),
        megabytes=455,
        sha256="73d137f32e27a033b1fbf2684e007aceef4bf458d897354f325349985662fd78",
    ),
}
