"""LoRA on every kind of backbone: what it may change, and all that it must leave as it was."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import seeded
from deepinv.models import ADMUNet, Denoiser, DRUNet, NCSNpp, UNet
from deepinv.models.precond import EDMPrecond
from deepinv.models.utils import UpDownConv2d
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from deepinv_ud2m.priors import (
    add_lora,
    find_lora_targets,
    freeze_prior,
    has_lora,
    has_merged_lora,
    load_lora_state_dict,
    lora_config,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    prior_parameters,
    prior_state_dict,
    remove_lora,
    unmerge_lora,
)
from deepinv_ud2m.priors.networks import VPDenoiser
from deepinv_ud2m.priors.published import _noise_of_unet2d

TINY = {"img_resolution": 16, "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1}
TINY |= {"attn_resolutions": (8,), "dropout": 0.1, "pretrained": None}


class RawUNet(nn.Module):
    """A network in EDM's own convention, as EDMPrecond expects it."""

    def __init__(self):
        super().__init__()
        self.unet = ADMUNet(**TINY)

    def forward(self, x, c_noise, class_labels=None):
        return self.unet.forward_unet(x, c_noise, class_labels)


class WithoutAttention(Denoiser):
    """One layer of each kind that LoRA must tell apart."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=2, dilation=2, padding_mode="circular")
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.shrink = nn.Conv2d(8, 8, 2, stride=2)
        self.grow = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(8, 3)

    def forward(self, x, sigma):
        z = self.grow(self.shrink(self.grouped(self.wide(x))))
        z = self.dropout(z).movedim(1, -1).contiguous()  # see freeze_prior on the last bit
        return self.out(z).movedim(-1, 1)


def diffusers_denoiser():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "block_out_channels": (16, 32)}
    options = {"layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8, "dropout": 0.1}
    unet = pytest.importorskip("diffusers").UNet2DModel(16, **blocks, **options)
    return VPDenoiser(unet, _noise_of_unet2d)


BUILDERS = {
    "ADMUNet": lambda: ADMUNet(**TINY),
    "NCSNpp": lambda: NCSNpp(**TINY),
    "EDMPrecond": lambda: EDMPrecond(RawUNet()),
    "DRUNet": lambda: DRUNet(pretrained=None, nc=(8, 8, 16, 16), nb=1),
    "UNet": lambda: UNet(3, 3, channels_per_scale=(8, 16)),
    "UNet circular": lambda: UNet(3, 3, channels_per_scale=(8, 16), circular_padding=True),
    "diffusers": diffusers_denoiser,
    "without attention": WithoutAttention,
}


@pytest.fixture(params=BUILDERS)
def denoiser(request):
    denoiser = tiny(request.param)
    scatter(denoiser.parameters(), 0.05)  # some layers start at zero and would hide all others
    return denoiser


def tiny(name="without attention"):
    torch.manual_seed(0)
    return BUILDERS[name]().eval()


def adapted_twin(scale=0.1, **arguments):
    """The tiny network with a trained adapter, and the output of the prior."""
    model = tiny()
    prior = run(model)
    add_lora(model, **arguments)
    scatter(lora_parameters(model), scale)
    return model, prior


def scatter(parameters, scale):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn_like(parameter))


def batch(size=16):
    generator = seeded(1)
    return torch.rand(2, 3, size, size, generator=generator), torch.tensor([0.1, 0.4])


@torch.no_grad()
def run(denoiser):
    return denoiser(*batch())


def snapshot(denoiser):
    return {key: value.clone() for key, value in denoiser.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("name", "ends", "count"),
    [
        ("ADMUNet", {"qkv", "proj"}, 8),
        ("NCSNpp", {"qkv", "proj"}, 6),
        ("EDMPrecond", {"qkv", "proj"}, 8),
        ("diffusers", {"to_q", "to_k", "to_v", "to_out.0"}, 16),
    ],
)
def test_attention_projections_are_found(name, ends, count):
    names = find_lora_targets(tiny(name))
    assert len(names) == count
    assert all(any(name.endswith(f".{end}") for end in ends) for name in names)


def test_without_attention_all_convolutions_are_found():
    drunet, model = tiny("DRUNet"), tiny()
    convs = [name for name, module in drunet.named_modules() if type(module) is nn.Conv2d]
    assert find_lora_targets(drunet) == convs
    assert find_lora_targets(model) == ["wide", "shrink"]  # not the grouped, not the transposed
    model.attention = nn.MultiheadAttention(8, 2)  # reads its weights itself
    assert find_lora_targets(model) == ["wide", "shrink"]


def test_targets_by_suffix_and_keyword():
    names = add_lora(tiny("DRUNet"), targets=["res.0", "m_tail"])
    assert names[-2:] == ["m_up1.1.res.0", "m_tail"]
    assert add_lora(tiny(), targets="all-convs") == ["wide", "shrink"]
    assert add_lora(tiny(), targets=("out",)) == ["out"]

    adm = tiny("ADMUNet")
    names = add_lora(adm, targets="all-convs")
    assert "enc.16x16_block0.conv0" in names and "enc.8x8_down.conv1" in names
    assert isinstance(adm.get_submodule("enc.8x8_down.conv0"), UpDownConv2d)  # resamples


@pytest.mark.parametrize("targets", [["wide"], ["inner.wide"]])
def test_a_full_name_does_not_mean_its_namesakes(targets):
    model = tiny()
    model.inner = nn.ModuleDict({"wide": nn.Conv2d(3, 3, 1)})
    names = add_lora(model, targets=targets)
    assert names == targets
    assert lora_config(model)["targets"] == names and len(lora_state_dict(model)) == 2


@pytest.mark.parametrize("targets", [None, "all-convs"])
def test_fresh_adapter_changes_nothing(denoiser, targets):
    kind, prior, before = type(denoiser), run(denoiser), repr(denoiser)
    found = find_lora_targets(denoiser)
    assert repr(denoiser) == before, "the search changes nothing"
    names = add_lora(denoiser, targets=targets)
    assert (names == found or targets) and has_lora(denoiser)
    assert type(denoiser) is kind
    assert torch.equal(run(denoiser), prior)


def test_only_the_factors_are_trained(denoiser):
    names, count = find_lora_targets(denoiser), 0
    for name in names:
        weight = denoiser.get_submodule(name).weight  # [m, n, k, k] or [m, n]
        count += 3 * (weight[0].numel() + weight.shape[0])
    add_lora(denoiser, rank=3)
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    factors = {id(p) for p in lora_parameters(denoiser)}
    assert sum(p.numel() for p in trainable) == count and {id(p) for p in trainable} == factors
    scatter(lora_parameters(denoiser), 0.1)
    denoiser(*batch()).square().mean().backward()
    for name, parameter in denoiser.named_parameters():
        if id(parameter) in factors:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("name", ["ADMUNet", "DRUNet", "without attention"])
def test_correction_is_alpha_over_r_times_b_a_and_of_rank_r(name):
    model = tiny(name)
    before = {n: model.get_submodule(n).weight.detach().clone() for n in find_lora_targets(model)}
    names = add_lora(model, rank=2, alpha=6.0)
    assert lora_config(model) == {"rank": 2, "alpha": 6.0, "targets": names}
    scatter(lora_parameters(model), 1.0)
    factors = lora_state_dict(model)
    merge_lora(model)
    for n in names:
        merged = model.get_submodule(n).get_base_layer().weight
        update = (merged - before[n]).flatten(1).double()
        a = factors[f"{n}.lora_A.weight"].flatten(1).double()
        b = factors[f"{n}.lora_B.weight"].flatten(1).double()
        assert torch.allclose(update, 3 * b @ a, atol=1e-5)
        assert torch.linalg.matrix_rank(update, atol=1e-3) == 2


def test_merging_and_removing_give_the_prior_back(denoiser):
    prior, weights = run(denoiser), snapshot(denoiser)
    names = [name for name, _ in denoiser.named_parameters()]
    add_lora(denoiser)
    scatter(lora_parameters(denoiser), 0.05)
    adapted = run(denoiser)
    assert not torch.equal(adapted, prior)

    for _ in range(2):  # merging twice is merging once
        merge_lora(denoiser)
        assert has_merged_lora(denoiser)
        assert torch.allclose(run(denoiser), adapted, rtol=1e-5, atol=1e-5 * adapted.abs().max())
    assert equal(prior_state_dict(denoiser), weights)

    for _ in range(2):
        unmerge_lora(denoiser)
        assert torch.equal(run(denoiser), adapted) and not has_merged_lora(denoiser)
    assert equal(prior_state_dict(denoiser), weights)
    assert [name for name, _ in prior_parameters(denoiser)] == names
    assert all(torch.equal(p, weights[name]) for name, p in prior_parameters(denoiser))

    merge_lora(denoiser)
    for _ in range(2):
        remove_lora(denoiser)
        assert not has_lora(denoiser) and lora_config(denoiser) is None
        assert torch.equal(run(denoiser), prior) and equal(denoiser.state_dict(), weights)
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert add_lora(denoiser)  # and it can be adapted again


def test_merging_in_half_precision_rounds_once():
    # Weights only: some CPUs cannot run a convolution in bfloat16.
    model = tiny().to(torch.bfloat16)
    add_lora(model, rank=3)
    scatter(lora_parameters(model), 0.1)
    layer, factors = model.wide, lora_state_dict(model)
    a, b = (factors[f"wide.lora_{f}.weight"].float().flatten(1) for f in "AB")
    weight = layer.get_base_layer().weight
    prior = weight.clone()
    merge_lora(model)
    assert torch.equal(weight, (prior.float() + (b @ a).view_as(prior)).to(torch.bfloat16))
    unmerge_lora(model)
    assert torch.equal(weight, prior)


def test_without_adapter_there_is_nothing_to_do_and_peft_is_not_imported():
    code = """
import sys
import torch
import deepinv_ud2m
from deepinv_ud2m.priors import *

model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1))
weights = {name: value.clone() for name, value in model.state_dict().items()}
x = torch.rand(1, 3, 8, 8)
prior = model(x)
freeze_prior(model)
assert not has_lora(model) and not has_merged_lora(model) and lora_config(model) is None
assert not list(lora_parameters(model)) and not lora_state_dict(model)
assert find_lora_targets(model) == ["0"]
load_lora_state_dict(model, {})
merge_lora(model), unmerge_lora(model), remove_lora(model)
assert torch.equal(model(x), prior)
assert dict(prior_parameters(model)).keys() == prior_state_dict(model).keys() == weights.keys()
load_prior("mnist")
assert not {"peft", "transformers", "diffusers"} & sys.modules.keys()
assert add_lora(model) == ["0"] and has_lora(model) and "peft" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Unfolded(nn.Module):
    """What a trainer sees: a model that holds the prior, and that it puts in train mode."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.log_rho = nn.Parameter(torch.zeros(()))

    def forward(self, x, sigma):
        return self.denoiser(x, sigma * self.log_rho.exp())


def test_dropout_and_batch_statistics_stay_off_in_train_mode(denoiser):
    add_lora(denoiser)
    scatter(lora_parameters(denoiser), 0.05)
    model = Unfolded(denoiser)
    weights = snapshot(model)
    expected = run(model.eval())
    for twin in (model, copy.deepcopy(model)):
        for _ in range(2):
            twin.train()
            assert torch.equal(run(twin), expected)
        assert twin.training and not any(m.training for m in twin.denoiser.modules())
        assert equal(weights, snapshot(twin))
    unfrozen = Unfolded(tiny()).train()
    assert not torch.equal(run(unfrozen), run(unfrozen)), "which would change the output"


def test_copies_pickles_and_freezing_again():
    model, prior = adapted_twin()
    freeze_prior(model)
    assert len(model._forward_pre_hooks) == 1
    assert all(p.requires_grad for p in lora_parameters(model))
    keys = model.state_dict().keys()
    merge_lora(model)
    assert model.state_dict().keys() == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)).train()):
        assert torch.equal(run(twin), run(model))
        remove_lora(twin)
        assert torch.equal(run(twin), prior)


def test_state_goes_through_safetensors(denoiser, tmp_path):
    twin = copy.deepcopy(denoiser)
    add_lora(denoiser, rank=2)
    scatter(lora_parameters(denoiser), 0.1)
    state = lora_state_dict(denoiser)
    assert state.keys() == get_peft_model_state_dict(denoiser).keys()
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in lora_parameters(denoiser))
    save_file(state, tmp_path / "adapter.safetensors")
    add_lora(twin, **lora_config(denoiser))
    load_lora_state_dict(twin, load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(run(twin), run(denoiser))


def test_loading_what_does_not_fit_changes_nothing():
    model, _ = adapted_twin(rank=2)
    before = {key: value.clone() for key, value in lora_state_dict(model).items()}
    state = {key: torch.full_like(value, 7.0) for key, value in before.items()}
    a, b = "wide.lora_A.weight", "wide.lora_B.weight"
    for fits_not, message in (
        ({k: v for k, v in state.items() if k != a}, f"missing.*{a}"),
        ({**state, "nowhere.lora_A.weight": torch.zeros(1)}, "unexpected.*nowhere"),
        ({**state, b: torch.zeros(8, 3, 1, 1)}, rf"{b}.*\[8, 3, 1, 1\] instead of \[8, 2, 1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora_state_dict(model, fits_not)
        assert equal(before, lora_state_dict(model))
    with pytest.raises(ValueError, match="unexpected"):
        load_lora_state_dict(tiny(), state)


def test_refusals_change_nothing():
    model = tiny()
    model.attention = nn.MultiheadAttention(8, 2)
    before, flags = repr(model), [p.requires_grad for p in model.parameters()]
    for name, value, *words in (
        ("rank", 0, "rank must be an integer >= 1, got 0"),
        ("rank", True, "True"),
        ("alpha", 0, "alpha must be a positive number", "got 0"),
        ("alpha", float("nan"), "nan"),
        ("targets", [], "targets=[]", "wide", "shrink"),
        ("targets", ["to_q"], "'to_q' is not the name of a layer"),
        ("targets", ["wide", "ide"], "'ide' is not the name"),
        ("targets", "wide", "targets must be None, 'all-convs' or a list of names, got 'wide'"),
        ("targets", [3], "targets must be", "[3]"),
        ("targets", ["wide", "grow"], "grow (ConvTranspose2d)", "nn.Conv2d", "nn.Linear"),
        ("targets", ["grouped"], "grouped (Conv2d)", "groups=1"),
        ("targets", ["dropout", "wide"], "dropout (Dropout)"),
        ("targets", ["out_proj"], "attention.out_proj"),
    ):
        with pytest.raises(ValueError) as info:
            add_lora(model, **{name: value})
        assert all(word in str(info.value) for word in (name, *words)), info.value
        assert repr(model) == before and not has_lora(model) and not model._forward_pre_hooks
        assert [p.requires_grad for p in model.parameters()] == flags


def test_resampling_layers_and_a_second_adapter_are_refused():
    model = tiny("ADMUNet")
    with pytest.raises(ValueError, match=r"enc\.8x8_down\.conv0 \(UpDownConv2d\)"):
        add_lora(model, targets=["conv0"])
    assert not any("BiasAfter" in type(module).__name__ for module in model.modules())
    add_lora(model)
    before = repr(model)
    with pytest.raises(ValueError, match="already carries an adapter"):
        add_lora(model, targets=["out_conv"])
    assert repr(model) == before
