"""Which layers LoRA adapts: what peft can correct, and where attention is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepinv.models.utils import UpDownConv2d
from torch import Tensor, nn

from deepinv_ud2m.checks import shorten

# The names attention layers go by. A block that holds one of _QUERIES is an attention block, and its
# projections are its children of any of these names. "proj" alone means nothing: patch and time
# embeddings use it too.
_QUERIES = {"qkv", "to_qkv", "to_q", "q", "q_proj", "query"}
_PROJECTIONS = _QUERIES | {
    *("to_k", "to_v", "to_kv", "k", "v", "kv", "k_proj", "v_proj", "key", "value"),
    *("proj", "proj_out", "project_out", "proj_attn", "to_out", "out_proj", "o_proj"),
}


def find_lora_targets(network: nn.Module) -> list[str]:
    """
    Find the layers of a network that LoRA should adapt.

    These are the projections of attention (query, key, value, output), as in the paper. In a network
    without attention they are all convolutions, transposed and grouped ones excepted.

    :param torch.nn.Module network: any network without adapter.
    :returns: full names, in the order of the network; empty if there is nothing to adapt.
    """
    layers = _adaptable_layers(network)
    roles = {name: _block_and_role(name) for name in layers}
    blocks = {block for block, role in roles.values() if role in _QUERIES}
    projections = [n for n, (block, role) in roles.items() if block in blocks and role in _PROJECTIONS]
    return projections or _convolutions(layers)


def select_targets(network: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    layers = _adaptable_layers(network)
    if targets is None:
        names = find_lora_targets(network)
    elif targets == "all-convs":
        names = _convolutions(layers)
    else:
        names = _match([name for name, _ in network.named_modules() if name], targets)
    refused = [f"{n} ({type(network.get_submodule(n)).__name__})" for n in names if n not in layers]
    if refused:
        raise ValueError(
            f"targets={targets!r} matches modules that LoRA cannot adapt: {shorten(refused)}. Accepted: "
            "nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d (themselves, not subclasses; groups=1), and "
            "deepinv's UpDownConv2d where it does not resample."
        )
    if not names:
        raise ValueError(
            f"targets={targets!r} matches no layer. Layers that can be adapted: {shorten(layers)}"
        )
    return names


def _match(names: list[str], targets: Sequence[str]) -> list[str]:
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"targets must be None, 'all-convs' or a list of names, got {targets!r}")
    found = set()
    for target in targets:
        named = {target} & set(names) or {name for name in names if name.endswith(f".{target}")}
        if not named:
            raise ValueError(f"targets: {target!r} is not the name of a layer, or the end of one")
        found |= named
    return [name for name in names if name in found]


def _adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in network.named_modules() if name and _is_adaptable(layer)}


def _is_adaptable(module: nn.Module) -> bool:
    if isinstance(module, UpDownConv2d):
        return module.weight is not None and not (module.up or module.down)
    # Exact types: a subclass may use its weight in another way (standardise it, tie it, let a parent
    # module read it as nn.MultiheadAttention does), and the correction would be wrong or without effect.
    # Grouped convolutions: peft's A mixes the groups, so that the sum is no longer one grouped
    # convolution and cannot be merged.
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, BiasAfterConv2d)
    return type(module) in kinds and getattr(module, "groups", 1) == 1


def _block_and_role(name: str) -> tuple[str, str]:
    """``"mid.attn.to_out.0"`` -> ``("mid.attn", "to_out")``: a number names a place only."""
    parts = name.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[:-1]), parts[-1]


def _convolutions(layers: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]


class BiasAfterConv2d(nn.Conv2d):
    """
    :class:`deepinv.models.utils.UpDownConv2d` where it does not resample, as the type peft asks for. As
    there, the bias is added afterwards and the weight cast to the input's type: the same bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight.to(x.dtype), None)
        return x if self.bias is None else x.add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


def make_wrappable(network: nn.Module, name: str) -> None:
    """Replace an ``UpDownConv2d`` by an equal ``nn.Conv2d`` that holds the same parameters."""
    old = network.get_submodule(name)
    if isinstance(old, UpDownConv2d):
        kernel, bias = old.weight.shape[-1], old.bias is not None
        options = {"padding": kernel // 2, "bias": bias}
        # On the meta device: no memory, and no random numbers for weights that are replaced at once.
        new = BiasAfterConv2d(old.in_channels, old.out_channels, kernel, **options, device="meta")
        new.weight, new.bias = old.weight, old.bias
        network.set_submodule(name, new)
