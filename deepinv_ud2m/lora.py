r"""
Low-rank adaptation (LoRA) of a frozen denoiser.

A trained layer :math:`x \mapsto W x + b` of the prior is left as it is, and learns a correction
of rank :math:`r` [Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models"]

.. math::

    W + \frac{\alpha}{r} B A, \qquad
    A \in \mathbb{R}^{r \times n k^2}, \quad B \in \mathbb{R}^{m \times r},

with :math:`n` inputs, :math:`m` outputs and a kernel of side :math:`k` (1 for a linear layer).
For a convolution, :math:`A` is a convolution with the layer's own kernel size and :math:`B` one
with kernel 1. At the start :math:`B = 0`, so that a fresh adapter changes nothing. One layer
costs :math:`r (n k^2 + m)` trainable numbers.

The adapter is put into the denoiser in place (:func:`peft.inject_adapter_in_model`), which keeps
its class and its call ``denoiser(x, sigma)``. Only the names in its ``state_dict`` change
(``qkv.weight`` becomes ``qkv.base_layer.weight``): load pretrained weights first, add the adapter
afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from deepinv.models import Denoiser
from deepinv.models.utils import UpDownConv2d
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deepinv_ud2m.checks import differences, shapes, shorten

__all__ = [
    "add_lora",
    "find_lora_targets",
    "freeze_prior",
    "has_lora",
    "load_lora_state_dict",
    "lora_config",
    "lora_disabled",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "prior_parameters",
    "prior_state_dict",
    "remove_lora",
    "unmerge_lora",
]

# The names attention layers go by: a block that holds one of _QUERIES is an attention block, and
# its projections are its children of any of these names. "proj" alone means nothing (patch and
# time embeddings use it too).
_QUERIES = {"qkv", "to_qkv", "to_q", "q", "q_proj", "query"}
_PROJECTIONS = _QUERIES | {
    *("to_k", "to_v", "to_kv", "k", "v", "kv", "k_proj", "v_proj", "key", "value"),
    *("proj", "proj_out", "project_out", "proj_attn", "to_out", "out_proj", "o_proj"),
}

_ACCEPTED = (
    "nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d (themselves, not subclasses; groups=1), and "
    "deepinv's UpDownConv2d where it does not resample"
)

# The name peft gives to an adapter that is given none.
_ADAPTER = "default"


# -------------------------------------------------------------------------------------------------
# Adding


def add_lora(
    denoiser: Denoiser,
    rank: int = 5,
    alpha: float | None = None,
    targets: str | Iterable[str] | None = None,
) -> list[str]:
    r"""
    Put a LoRA adapter on a denoiser, in place, and freeze everything else in it.

    The fresh adapter changes nothing: the output stays equal bit for bit. The prior is frozen by
    :func:`freeze_prior`; only the factors :math:`A, B` are trainable. :math:`A` is drawn from
    torch's global generator, as the initialisation of any :class:`torch.nn.Module`
    (``torch.manual_seed``).

    :param deepinv.models.Denoiser denoiser: the pretrained denoiser, on its device.
    :param int rank: the rank :math:`r \geq 1` of the corrections. Default: ``5``.
    :param float, None alpha: the scale :math:`\alpha > 0`; corrections are multiplied by
        :math:`\alpha / r`. Default: ``None``, which means :math:`\alpha = r`.
    :param str, list[str], None targets: the layers to adapt.

        - ``None`` (default): those of :func:`find_lora_targets`;
        - ``"all-convs"``: every convolution that can be adapted;
        - a list of names: a layer is meant by its full name or by a trailing part of it,
          ``"qkv"`` or ``"attn.qkv"``;
        - any other string: a regular expression that must match the full name, as in peft.

    :return: (list[str]) the full names of the adapted layers, in the order of the network.
    :raises ValueError: if ``rank`` or ``alpha`` is out of range, if ``targets`` (or one name in
        it) matches nothing or matches a module that cannot be adapted, or if the denoiser has an
        adapter already. Nothing is changed then.
    """
    _check_scale(rank, alpha)
    if any(isinstance(module, BaseTunerLayer) for module in denoiser.modules()):
        raise ValueError(
            "denoiser already carries an adapter, and a second one on top of it is not supported: "
            "train the existing one, or start from a denoiser without adapter."
        )
    names = _select(denoiser, targets)

    for name in names:
        _make_wrappable(denoiser, name)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        # One exact pattern: peft takes the names in a list for suffixes, so "proj" would also
        # mean "block.proj".
        target_modules="|".join(re.escape(name) for name in names),
    )
    inject_adapter_in_model(config, denoiser)
    for _, layer in _lora_layers(denoiser):
        _see_the_same_pixels(layer)
    freeze_prior(denoiser)
    return names


def find_lora_targets(denoiser: Denoiser) -> list[str]:
    r"""
    Find the layers of a denoiser that LoRA should adapt.

    Where there is attention, these are its projections (query, key, value, output), as in the
    paper. A network without attention is adapted in all of its convolutions, transposed and
    grouped ones excepted.

    The search reads names and types only, and does not change the denoiser. Whether it carries an
    adapter already makes no difference.

    :param deepinv.models.Denoiser denoiser: any denoiser.
    :return: (list[str]) full names, in the order of the network; empty if there is nothing to
        adapt.
    """
    layers = _adaptable_layers(denoiser)
    return _attention_projections(layers) or _convolutions(layers)


def freeze_prior(denoiser: Denoiser) -> None:
    r"""
    Make a denoiser a fixed function, but for its LoRA factors: no gradient for its parameters, no
    dropout, no moving batch statistics. Freezing twice is freezing once.

    ``.train()`` on a model that contains the denoiser would wake its dropout up again. Therefore
    the denoiser gets a forward pre-hook that puts it back in eval mode whenever it is called. (A
    hook is part of the module: it survives ``copy.deepcopy`` and pickling, unlike a replaced
    ``train`` method.) It acts on ``denoiser(x, sigma)``, not on a direct call of
    ``denoiser.forward`` or of another method.

    Where a linear layer gets a non-contiguous input, freezing may change the last bit: torch
    chooses the matrix product by ``requires_grad``. Compare with the frozen prior then.

    :param deepinv.models.Denoiser denoiser: the denoiser, with or without adapter.
    """
    denoiser.requires_grad_(False)
    for parameter in lora_parameters(denoiser):
        parameter.requires_grad_(True)
    denoiser.eval()
    if _stay_in_eval not in denoiser._forward_pre_hooks.values():
        denoiser.register_forward_pre_hook(_stay_in_eval)


def has_lora(denoiser: Denoiser) -> bool:
    r"""
    Whether a denoiser carries a LoRA adapter, in use, disabled or merged.

    :param deepinv.models.Denoiser denoiser: any denoiser.
    :return: (bool)
    """
    return any(True for _ in _lora_layers(denoiser))


def has_merged_lora(denoiser: nn.Module) -> bool:
    r"""
    Whether an adapter of a denoiser is merged, where its factors get no gradient.

    :param torch.nn.Module denoiser: any network.
    :return: (bool)
    """
    return any(layer.merged for _, layer in _lora_layers(denoiser))


def remove_lora(denoiser: Denoiser) -> None:
    r"""
    Take the adapter off, and what it learned with it: the layers are the prior's again, bit for bit,
    under their own names, frozen. Without adapter there is nothing to do.

    :param deepinv.models.Denoiser denoiser: the denoiser.
    """
    unmerge_lora(denoiser)
    _unload(denoiser)


# -------------------------------------------------------------------------------------------------
# Training and storing


def lora_config(denoiser: Denoiser) -> dict | None:
    r"""
    What :func:`add_lora` was called with, read off the adapter.

    :param deepinv.models.Denoiser denoiser: the denoiser.
    :return: (dict, None) ``"rank"``, ``"alpha"``, and ``"targets"``, the full names of the adapted
        layers in the order of the network; ``None`` without adapter.
    """
    layers = dict(_lora_layers(denoiser))
    if not layers:
        return None
    layer = next(iter(layers.values()))
    return {"rank": layer.r[_ADAPTER], "alpha": layer.lora_alpha[_ADAPTER], "targets": list(layers)}


def lora_parameters(denoiser: Denoiser) -> Iterator[nn.Parameter]:
    r"""
    The factors :math:`A, B` of all adapted layers: what an optimizer should train.

    :param deepinv.models.Denoiser denoiser: the denoiser; without adapter, there is no parameter.
    :return: (Iterator[torch.nn.Parameter])
    """
    return (factor for _, factor in _factors(denoiser))


def lora_state_dict(denoiser: Denoiser) -> dict[str, Tensor]:
    r"""
    The adapter alone, and nothing of the prior.

    The keys are those of peft, ``"<layer>.lora_A.weight"`` of shape ``[r, n, ...]`` and
    ``"<layer>.lora_B.weight"`` of shape ``[m, r, ...]``. They depend on the architecture and on
    the adapted layers only.

    :param deepinv.models.Denoiser denoiser: the denoiser; without adapter, the dictionary is empty.
    :return: (dict[str, torch.Tensor]) detached tensors which, as in
        :meth:`torch.nn.Module.state_dict`, share the memory of the parameters.
    """
    return {key: factor.detach() for key, factor in _factors(denoiser)}


def load_lora_state_dict(denoiser: Denoiser, state: Mapping[str, Tensor]) -> None:
    r"""
    Load what :func:`lora_state_dict` returned. A merged adapter is merged anew.

    The scale :math:`\alpha` is not part of the state: call :func:`add_lora` with the same
    ``rank``, ``alpha`` and ``targets`` before.

    :param deepinv.models.Denoiser denoiser: the denoiser, with its adapter.
    :param Mapping[str, torch.Tensor] state: the adapter, on any device and in any floating point
        type.
    :raises ValueError: if keys are missing, if there are keys too many, or if shapes differ.
        Nothing is changed then.
    """
    factors = dict(_factors(denoiser))
    _check_state(factors, state)
    with _unmerged(denoiser), torch.no_grad():
        for key, factor in factors.items():
            factor.copy_(state[key])


def prior_parameters(denoiser: Denoiser) -> Iterator[tuple[str, nn.Parameter]]:
    r"""
    The parameters of the prior under the names they have without adapter. While the adapter is
    merged, the adapted ones hold merged values: see :func:`prior_state_dict`.

    :param deepinv.models.Denoiser denoiser: the denoiser, with or without adapter.
    :return: (Iterator[tuple[str, torch.nn.Parameter]])
    """
    adapted = [name for name, _ in _lora_layers(denoiser)]
    for key, parameter in denoiser.named_parameters():
        name = _prior_name(key, adapted)
        if name is not None:
            yield name, parameter


def prior_state_dict(denoiser: Denoiser) -> dict[str, Tensor]:
    r"""
    The prior alone, and nothing of the adapter: its ``state_dict`` as it was before :func:`add_lora`,
    in names and in values, also while the adapter is merged.

    :param deepinv.models.Denoiser denoiser: the denoiser, with or without adapter.
    :return: (dict[str, torch.Tensor]) detached tensors, which share the memory of the prior.
    """
    adapted = dict(_lora_layers(denoiser))
    state = {_prior_name(key, adapted): value for key, value in denoiser.state_dict().items()}
    state.pop(None, None)
    originals = {f"{n}.weight": layer.prior_weight for n, layer in adapted.items() if layer.merged}
    return state | originals


# -------------------------------------------------------------------------------------------------
# Disabling and merging


@contextmanager
def lora_disabled(denoiser: Denoiser) -> Iterator[Denoiser]:
    r"""
    Context in which the denoiser is the frozen prior again, bit for bit. It yields the denoiser.

    On exit, also by an exception, the adapter is as it was. A merged adapter is taken out and
    merged again, which makes the context costlier. ``requires_grad`` is never touched, so a graph
    built outside the context can be differentiated inside it. Without adapter the context does
    nothing.

    :param deepinv.models.Denoiser denoiser: the denoiser.

    |sep|

    :Examples:

        >>> import torch
        >>> from deepinv.models import DRUNet
        >>> from deepinv_ud2m.lora import add_lora, lora_disabled
        >>> denoiser = DRUNet(pretrained=None, nc=(4, 4, 4, 4), nb=1)
        >>> names = add_lora(denoiser, rank=2)
        >>> with lora_disabled(denoiser) as prior, torch.no_grad():
        ...     x = prior(torch.rand(1, 3, 32, 32), 0.1)
    """
    layers = [layer for _, layer in _lora_layers(denoiser)]
    were_enabled = [not layer.disable_adapters for layer in layers]
    with _unmerged(denoiser):
        try:
            for layer in layers:
                _enable(layer, False)
            yield denoiser
        finally:
            for layer, enabled in zip(layers, were_enabled, strict=True):
                _enable(layer, enabled)


def merge_lora(denoiser: Denoiser, unload: bool = False) -> None:
    r"""
    Write :math:`W + \frac{\alpha}{r} B A` into the adapted layers, so that inference costs what
    the prior costs.

    The original :math:`W` is kept beside it, as a buffer that follows the denoiser to another
    device or type but is not part of its ``state_dict``: subtracting :math:`B A` again would
    leave rounding errors. While merged, the factors get no gradient, and
    ``denoiser.state_dict()`` holds the merged weights. Merging twice is merging once; without
    adapter there is nothing to do.

    :param deepinv.models.Denoiser denoiser: the denoiser.
    :param bool unload: merge for good: the adapter is taken off, and the layers, which keep the merged
        weights, are plain and frozen. Where an adapter was trained and all weights shall be trained
        next (default: ``False``). The merged weights are then those of another prior: they can be saved
        only after they were made trainable.
    :raises RuntimeError: inside :func:`lora_disabled`, where the prior is asked for.
    """
    layers = [layer for _, layer in _lora_layers(denoiser) if not layer.merged]
    if any(layer.disable_adapters for layer in layers):
        raise RuntimeError("merge_lora: the adapter is disabled; leave lora_disabled(...) first.")
    with torch.no_grad():
        for layer in layers:
            weight = layer.get_base_layer().weight
            layer.register_buffer("prior_weight", weight.clone(), persistent=False)
            weight.copy_(_corrected_weight(layer))
            layer.merged_adapters.append(_ADAPTER)
    if unload:
        denoiser.merged_for_good = [
            name + ".weight" for name, layer in _lora_layers(denoiser) if layer.merged
        ] + getattr(denoiser, "merged_for_good", [])
        _unload(denoiser)


def unmerge_lora(denoiser: Denoiser) -> None:
    r"""
    Undo :func:`merge_lora`: the prior's weights return exactly, and the adapter acts beside them,
    ready to be trained.

    Does nothing where nothing is merged.

    :param deepinv.models.Denoiser denoiser: the denoiser.
    """
    with torch.no_grad():
        for _, layer in _lora_layers(denoiser):
            if layer.merged:
                layer.get_base_layer().weight.copy_(layer.prior_weight)
                del layer.prior_weight
                layer.merged_adapters.clear()


# -------------------------------------------------------------------------------------------------
# Which layers


def _adaptable_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The layers LoRA can correct, by full name; an adapted layer stands for its base layer."""
    adapted = dict(_lora_layers(denoiser))
    inside_adapted = tuple(f"{name}." for name in adapted)
    layers = {}
    for name, module in denoiser.named_modules():
        layer = module.get_base_layer() if name in adapted else module
        if name and not name.startswith(inside_adapted) and _is_adaptable(layer):
            layers[name] = layer
    return layers


def _is_adaptable(module: nn.Module) -> bool:
    if isinstance(module, UpDownConv2d):
        return module.weight is not None and not (module.up or module.down)
    # Exact types: a subclass may use its weight in another way (standardise it, tie it, let a
    # parent module read it as nn.MultiheadAttention does), and the correction would be wrong or
    # without effect. Grouped convolutions: peft's A mixes the groups, so that the sum is no
    # longer one grouped convolution and cannot be merged.
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, _BiasAfterConv2d)
    return type(module) in kinds and getattr(module, "groups", 1) == 1


def _attention_projections(layers: Mapping[str, nn.Module]) -> list[str]:
    roles = {name: _block_and_role(name) for name in layers}
    blocks = {block for block, role in roles.values() if role in _QUERIES}
    return [n for n, (block, role) in roles.items() if block in blocks and role in _PROJECTIONS]


def _block_and_role(name: str) -> tuple[str, str]:
    """``"mid.attn.to_out.0"`` -> ``("mid.attn", "to_out")``: a number names a place only."""
    parts = name.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[:-1]), parts[-1]


def _convolutions(layers: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]


def _select(denoiser: nn.Module, targets: str | Iterable[str] | None) -> list[str]:
    layers = _adaptable_layers(denoiser)
    if targets is None:
        names = find_lora_targets(denoiser)
    elif isinstance(targets, str) and targets == "all-convs":
        names = _convolutions(layers)
    else:
        names = _match(denoiser, targets)
    if not names:
        raise ValueError(
            f"targets={targets!r} matches no layer of {type(denoiser).__name__}. A string is "
            "a regular expression for the full name; for the ends of names give a list, such as "
            f"['qkv', 'proj']. Layers that can be adapted: {shorten(layers)}"
        )
    refused = [f"{n} ({type(denoiser.get_submodule(n)).__name__})" for n in names if n not in layers]
    if refused:
        raise ValueError(
            f"targets={targets!r} matches modules that LoRA cannot adapt: {shorten(refused)}. "
            f"Accepted: {_ACCEPTED}."
        )
    return names


def _match(denoiser: nn.Module, targets: str | Iterable[str]) -> list[str]:
    names = [name for name, _ in denoiser.named_modules() if name]
    if isinstance(targets, str):
        try:
            return [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise ValueError(f"targets={targets!r} is not a regular expression: {error}.") from error
    targets = _list_of_names(targets)
    idle = [t for t in targets if not any(_is_called(name, t) for name in names)]
    if idle:
        raise ValueError(
            f"targets: {shorten(idle)} match no layer of {type(denoiser).__name__}. Each entry "
            "must be the full name of a layer or a trailing part of it. Layers that can be "
            "adapted: " + shorten(_adaptable_layers(denoiser))
        )
    return [name for name in names if any(_is_called(name, target) for target in targets)]


def _list_of_names(targets: Iterable[str]) -> list[str]:
    names = list(targets) if isinstance(targets, Iterable) else [targets]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"targets={targets!r}: expected None, 'all-convs', a list of layer names, or a "
            "regular expression."
        )
    return names


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


# -------------------------------------------------------------------------------------------------
# How a layer is adapted


class _BiasAfterConv2d(nn.Conv2d):
    """
    What :class:`deepinv.models.utils.UpDownConv2d` computes where it does not resample, as an
    ``nn.Conv2d``, the type peft asks for. The bias is added afterwards and the weight cast to the
    input's type, as there: the same bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight.to(x.dtype), None)
        return x if self.bias is None else x.add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


def _make_wrappable(denoiser: nn.Module, name: str) -> None:
    """Replace an ``UpDownConv2d`` by an equal ``nn.Conv2d`` that holds the same parameters."""
    old = denoiser.get_submodule(name)
    if not isinstance(old, UpDownConv2d):
        return
    kernel = old.weight.shape[-1]
    # On the meta device: no memory, and no random numbers for weights that are replaced at once.
    new = _BiasAfterConv2d(
        old.in_channels,
        old.out_channels,
        kernel,
        padding=kernel // 2,
        bias=old.bias is not None,
        device="meta",
    )
    new.weight, new.bias = old.weight, old.bias
    parent, _, child = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), child, new)


def _see_the_same_pixels(layer: LoraLayer) -> None:
    """
    Give A the padding mode and the dilation of its layer. peft leaves both at their defaults,
    with which A would see zeros where a circular convolution wraps around, or other pixels, and B
    A could not be merged into W.
    """
    base, down = layer.get_base_layer(), layer.lora_A[_ADAPTER]
    for attribute in ("padding_mode", "dilation", "_reversed_padding_repeated_twice"):
        if hasattr(base, attribute):
            setattr(down, attribute, getattr(base, attribute))


def _corrected_weight(layer: LoraLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    # Not peft's get_delta_weight, which fails for Conv3d with kernel 1. Half precision is rounded
    # once, at the end.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a = layer.lora_A[_ADAPTER].weight.to(dtype).flatten(1)
    b = layer.lora_B[_ADAPTER].weight.to(dtype).flatten(1)
    return weight.to(dtype) + layer.scaling[_ADAPTER] * (b @ a).view_as(weight)


def _enable(layer: LoraLayer, enabled: bool) -> None:
    """Switch an adapter on or off, and nothing else: peft also clears or sets ``requires_grad``."""
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.enable_adapters(enabled)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextmanager
def _unmerged(denoiser: nn.Module) -> Iterator[None]:
    merged = any(layer.merged for _, layer in _lora_layers(denoiser))
    unmerge_lora(denoiser)
    try:
        yield
    finally:
        if merged:
            merge_lora(denoiser)


def _stay_in_eval(module: nn.Module, args: tuple) -> None:
    # A function of the module file, not a closure, so that a frozen denoiser can be copied and
    # pickled.
    if module.training:
        module.eval()


# -------------------------------------------------------------------------------------------------
# Small things


def _unload(denoiser: nn.Module) -> None:
    """Put the adapted layers themselves back, with the weights that they have."""
    for name, layer in list(_lora_layers(denoiser)):
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, layer.get_base_layer())
    # What peft notes on the model, and would warn of when the next adapter is added.
    vars(denoiser).pop("peft_config", None)


def _lora_layers(denoiser: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((n, module) for n, module in denoiser.named_modules() if isinstance(module, LoraLayer))


def _factors(denoiser: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in _lora_layers(denoiser):
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


def _check_scale(rank: int, alpha: float | None) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}: expected an integer of at least 1.")
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if alpha is not None and not (is_number and 0 < alpha < math.inf):
        raise ValueError(f"alpha={alpha!r}: expected a positive number, or None for alpha = rank.")


def _check_state(factors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    complaints = differences(shapes(factors), shapes(state))
    if complaints:
        raise ValueError(
            "state does not fit the adapter of this denoiser (same rank and targets?). Tensors "
            + complaints
        )
