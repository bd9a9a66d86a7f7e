r"""
Low-rank adaptation (LoRA) of a frozen network, by peft.

A layer :math:`x \mapsto W x + b` of the prior is left as it is, and learns a correction of rank
:math:`r` (Hu et al. 2021)

.. math:: W + \frac{\alpha}{r} B A, \qquad
    A \in \mathbb{R}^{r \times n k^2}, \quad B \in \mathbb{R}^{m \times r},

with :math:`n` inputs, :math:`m` outputs and a kernel of side :math:`k` (1 for a linear layer). For a
convolution, :math:`A` is a convolution with the layer's own kernel size and :math:`B` one with kernel 1.
At the start :math:`B = 0`. One layer costs :math:`r (n k^2 + m)` trainable numbers.

The adapter is put into the network in place, which keeps its class and its call. Only the names in its
``state_dict`` change (``qkv.weight`` becomes ``qkv.base_layer.weight``): load pretrained weights first.

peft adds and computes the adapter, and is imported when one is added. Merging is done here, because peft's
leaves rounding errors in the prior.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepinv_ud2m.checks import check_count, differences, shapes
from deepinv_ud2m.priors.targets import make_wrappable, select_targets

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_ADAPTER = "default"  # the name peft gives to an adapter that is given none


# -- Adding and removing --------------------------------------------------------------------------


def add_lora(
    network: nn.Module,
    rank: int = 5,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
) -> list[str]:
    r"""
    Put a LoRA adapter on a network, in place, and freeze everything else in it.

    The output stays equal bit for bit until the adapter is trained. :math:`A` is drawn from torch's
    global generator.

    :param torch.nn.Module network: the pretrained network, on its device.
    :param int rank: rank :math:`r \geq 1` of the corrections (default: 5).
    :param float, None alpha: scale :math:`\alpha > 0` (default: ``None``, which means :math:`r`).
    :param str, list[str], None targets: the layers to adapt.

        - ``None`` (default): those of :func:`~deepinv_ud2m.priors.targets.find_lora_targets`;
        - ``"all-convs"``: every convolution that can be adapted;
        - a list of names: full names or, where no layer has that full name, trailing parts of names,
          ``"qkv"`` or ``"attn.qkv"``.

    :returns: full names of the adapted layers, in the order of the network.
    :raises ValueError: if ``rank`` or ``alpha`` is out of range, if ``targets`` (or one name in it)
        matches nothing or matches a module that cannot be adapted, or if the network has an adapter
        already. Nothing is changed then.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_count("rank", rank)
    if alpha is not None and not (isinstance(alpha, Real) and 0 < alpha < math.inf):
        raise ValueError(f"alpha must be a positive number, or None for alpha = rank, got {alpha!r}")
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a module, got {network!r}")
    if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        raise ValueError("the network already carries an adapter: train it, or take it off with remove_lora")
    names = select_targets(network, targets)
    for name in names:
        make_wrappable(network, name)
    # One exact pattern: peft takes "proj" in a list for a suffix, which "block.proj" has too.
    pattern = "|".join(re.escape(name) for name in names)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=pattern)
    inject_adapter_in_model(config, network)
    for _, layer in _lora_layers(network):
        _see_the_same_pixels(layer)
    freeze_prior(network)
    return names


def freeze_prior(network: nn.Module) -> None:
    """
    Make a network a fixed function, but for its LoRA factors: no gradient for its parameters, no
    dropout, no moving batch statistics. Freezing twice is freezing once.

    ``.train()`` on a model that contains the network would switch its dropout on again. Therefore a
    forward pre-hook, which copies and pickles with the network, puts it back in eval mode whenever it is
    called as ``network(...)``.

    Where a linear layer gets a non-contiguous input, freezing may change the last bit: torch chooses the
    matrix product by ``requires_grad``.

    :param torch.nn.Module network: the network, with or without adapter.
    """
    network.requires_grad_(False)
    for parameter in lora_parameters(network):
        parameter.requires_grad_(True)
    network.eval()
    if _stay_in_eval not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_stay_in_eval)


def has_lora(network: nn.Module) -> bool:
    """Whether a network carries a LoRA adapter, in use or merged."""
    return any(True for _ in _lora_layers(network))


def has_merged_lora(network: nn.Module) -> bool:
    """Whether an adapter of a network is merged, so that its factors get no gradient."""
    return any(layer.merged for _, layer in _lora_layers(network))


def remove_lora(network: nn.Module) -> None:
    """
    Take the adapter off, and what it learned with it. Without adapter there is nothing to do.

    The layers are the prior's again, bit for bit, under their own names, frozen.

    :param torch.nn.Module network: the network.
    """
    unmerge_lora(network)
    for name, layer in list(_lora_layers(network)):
        network.set_submodule(name, layer.get_base_layer())
    # peft notes it on the network, and would warn of it when the next adapter is added.
    vars(network).pop("peft_config", None)


# -- Training and storing -------------------------------------------------------------------------


def lora_config(network: nn.Module) -> dict | None:
    """
    The arguments of :func:`add_lora`, read off the adapter.

    :param torch.nn.Module network: the network.
    :returns: ``"rank"``, ``"alpha"``, and ``"targets"``, the full names of the adapted layers in the
        order of the network; ``None`` without adapter.
    """
    layers = dict(_lora_layers(network))
    if not layers:
        return None
    layer = next(iter(layers.values()))
    return {"rank": layer.r[_ADAPTER], "alpha": layer.lora_alpha[_ADAPTER], "targets": list(layers)}


def lora_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """The factors A, B of all adapted layers, for an optimizer; none without adapter."""
    return (factor for _, factor in _factors(network))


def lora_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """
    The adapter alone, under peft's names.

    :param torch.nn.Module network: the network; without adapter, the dictionary is empty.
    :returns: ``"<layer>.lora_A.weight"`` of shape `[r, n, ...]` and ``"<layer>.lora_B.weight"`` of shape
        `[m, r, ...]`, detached tensors which share the memory of the parameters.
    """
    return {key: factor.detach() for key, factor in _factors(network)}


def load_lora_state_dict(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    r"""
    Load what :func:`lora_state_dict` returned. A merged adapter is merged anew.

    The scale :math:`\alpha` is not part of the state: call :func:`add_lora` with the same arguments
    before.

    :param torch.nn.Module network: the network, with its adapter.
    :param Mapping[str, torch.Tensor] state: the adapter, on any device and in any floating point type.
    :raises ValueError: if keys are missing or unexpected, or shapes differ. Nothing is changed then.
    """
    factors = dict(_factors(network))
    complaints = differences(shapes(factors), shapes(state))
    if complaints:
        raise ValueError(
            "state does not fit the adapter of this network (same rank and targets?). Tensors " + complaints
        )
    merged = has_merged_lora(network)
    unmerge_lora(network)
    with torch.no_grad():
        for key, factor in factors.items():
            factor.copy_(state[key])
    if merged:
        merge_lora(network)


def prior_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """
    The parameters of the prior, by the names they have without adapter.

    While the adapter is merged, they hold merged values: see :func:`prior_state_dict`.

    :param torch.nn.Module network: the network, with or without adapter.
    :returns: an iterator over names and parameters.
    """
    adapted = [name for name, _ in _lora_layers(network)]
    for key, parameter in network.named_parameters():
        if (name := _prior_name(key, adapted)) is not None:
            yield name, parameter


def prior_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """
    The ``state_dict`` as it was before :func:`add_lora`, in names and in values, also while the adapter
    is merged.

    :param torch.nn.Module network: the network, with or without adapter.
    :returns: detached tensors, which share the memory of the prior.
    """
    adapted = dict(_lora_layers(network))
    named = ((_prior_name(key, adapted), value) for key, value in network.state_dict().items())
    state = {name: value for name, value in named if name is not None}
    originals = {f"{n}.weight": layer.prior_weight for n, layer in adapted.items() if layer.merged}
    return state | originals


# -- Merging --------------------------------------------------------------------------------------


def merge_lora(network: nn.Module) -> None:
    r"""
    Write :math:`W + \frac{\alpha}{r} B A` into the adapted layers, so that inference costs what the
    prior costs. Merging twice is merging once; without adapter there is nothing to do.

    While merged, the factors get no gradient, and ``network.state_dict()`` holds the merged weights. The
    original :math:`W` is kept in a buffer that follows the network to another device or type but is not
    part of its ``state_dict``: subtracting :math:`B A` again would leave rounding errors.

    :param torch.nn.Module network: the network.
    """
    layers = [layer for _, layer in _lora_layers(network) if not layer.merged]
    with torch.no_grad():
        for layer in layers:
            weight = layer.get_base_layer().weight
            layer.register_buffer("prior_weight", weight.clone(), persistent=False)
            # Not peft's get_delta_weight, which fails for Conv3d with kernel 1. Half precision is
            # rounded once, at the end.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            factors = (layer.lora_B, layer.lora_A)
            b, a = (factor[_ADAPTER].weight.to(dtype).flatten(1) for factor in factors)
            weight.copy_(weight.to(dtype) + layer.scaling[_ADAPTER] * (b @ a).view_as(weight))
            layer.merged_adapters.append(_ADAPTER)


def unmerge_lora(network: nn.Module) -> None:
    """
    Undo :func:`merge_lora`: the prior's weights return exactly, and the adapter acts beside them, ready
    to be trained. Does nothing where nothing is merged.

    :param torch.nn.Module network: the network.
    """
    with torch.no_grad():
        for _, layer in _lora_layers(network):
            if layer.merged:
                layer.get_base_layer().weight.copy_(layer.prior_weight)
                del layer.prior_weight
                layer.merged_adapters.clear()


def _see_the_same_pixels(layer: LoraLayer) -> None:
    """Give A the padding mode and the dilation of its layer, which peft leaves at their defaults."""
    base, down = layer.get_base_layer(), layer.lora_A[_ADAPTER]
    for attribute in ("padding_mode", "dilation", "_reversed_padding_repeated_twice"):
        if hasattr(base, attribute):
            setattr(down, attribute, getattr(base, attribute))


def _stay_in_eval(module: nn.Module, args: tuple) -> None:
    # A function of the module file, not a closure, so that a frozen network can be copied and pickled.
    if module.training:
        module.eval()


def _lora_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    kind = getattr(sys.modules.get("peft.tuners.lora"), "LoraLayer", ())  # no peft, no layer of its
    return ((name, module) for name, module in network.named_modules() if isinstance(module, kind))


def _factors(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in _lora_layers(network):
        yield f"{name}.lora_A.weight", layer.lora_A[_ADAPTER].weight
        yield f"{name}.lora_B.weight", layer.lora_B[_ADAPTER].weight


def _prior_name(key: str, adapted: Iterable[str]) -> str | None:
    """The name of a tensor before the adapter came, ``None`` if it came with the adapter."""
    for name in adapted:
        if key.startswith(f"{name}."):
            inner = key.removeprefix(f"{name}.")
            base = inner.removeprefix("base_layer.")
            return None if base == inner else f"{name}.{base}"
    return key
