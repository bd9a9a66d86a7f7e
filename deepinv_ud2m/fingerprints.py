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
    A SHA-256, in 64 hexadecimal digits, of the names, shapes and values of all parameters and persistent
    buffers of a network, without its adapter, merged or not.

    Floating point values are rounded to float16 first. The hash is therefore the same on every device, and
    for float16, float32 and float64.

    :param torch.nn.Module network: the network.
    :param Collection[str] trained: names, without adapter, of parameters whose values do not count, because
        they are stored with the sampler.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(prior_state_dict(network).items()):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        if name not in trained:
            digest.update(_bytes(weight))
    return digest.hexdigest()


def trained_fingerprint(unfolded: UnfoldedDenoiser) -> str:
    """The first 16 digits of a hash of what was trained, to tell samplers apart, see :func:`fingerprint`."""
    digest = hashlib.sha256()
    for name, weight in sorted(unfolded.state().items()):
        digest.update(name.encode() + _bytes(weight))
    return digest.hexdigest()[:16]


def _bytes(weight: Tensor) -> bytes:
    weight = weight.detach().cpu()
    if weight.is_complex():
        weight = torch.view_as_real(weight.resolve_conj())
    return (weight.half() if weight.is_floating_point() else weight).contiguous().numpy().tobytes()
