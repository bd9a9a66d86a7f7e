"""Hashes of weights, which tell networks apart."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from deepinv_ud2m.priors import prior_state_dict
from deepinv_ud2m.unfolded import UnfoldedDenoiser


def fingerprint(network: nn.Module, trained: Collection[str] = ()) -> str:
    """
    A hash of the weights of a network, without its adapter, merged or not.

    It covers the names, shapes and values of all parameters and persistent buffers. Settings that are not
    weights, such as the scale of a preconditioning, are not covered.

    Floating point values are rounded to float16 first. The hash is therefore the same on every device, and
    for float16, float32 and float64. It is another for bfloat16, which keeps fewer digits.

    :param torch.nn.Module network: the network.
    :param Collection[str] trained: names, without adapter, of parameters whose values do not count, because
        they are stored with the sampler.
    :returns: SHA-256, as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(prior_state_dict(network).items()):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        if name not in trained:
            digest.update(_bytes(weight))
    return digest.hexdigest()


def trained_fingerprint(unfolded: UnfoldedDenoiser) -> str:
    """
    A hash of what was trained, to tell samplers apart; rounded as by :func:`fingerprint`.

    :param deepinv_ud2m.UnfoldedDenoiser unfolded: the unfolded denoiser.
    :returns: the first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(unfolded.state().items()):
        digest.update(name.encode() + _bytes(weight))
    return digest.hexdigest()[:16]


def _bytes(weight: Tensor) -> bytes:
    weight = weight.detach().cpu()
    if weight.is_complex():
        weight = torch.view_as_real(weight.resolve_conj())
    return (weight.half() if weight.is_floating_point() else weight).contiguous().numpy().tobytes()
