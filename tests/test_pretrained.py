"""Trained samplers as files: what is stored, what comes back, and all that is refused."""

import copy
import json
import os
import pickle
import random
import re
import sys
from pathlib import Path

import deepinv as dinv
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deepinv_ud2m import (
    UD2M,
    LinearInitializer,
    PseudoInverseInitializer,
    UnfoldedDenoiser,
    WienerInitializer,
    add_lora,
    load_prior,
    merge_lora,
    remove_lora,
    save_prior,
    unmerge_lora,
)
from deepinv_ud2m import pretrained as module
from deepinv_ud2m.lora import (
    has_lora,
    lora_config,
    lora_parameters,
    lora_state_dict,
    prior_parameters,
    prior_state_dict,
)
from deepinv_ud2m.pretrained import (
    fingerprint,
    from_pretrained,
    load_trained_state_dict,
    model_card,
    push_to_hub,
    save_pretrained,
    trained_fingerprint,
    trained_state_dict,
)
from deepinv_ud2m.training import sampler_to_train

PHYSICS = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))


@pytest.fixture
def prior_folder(tiny_prior, tiny_config, tmp_path):
    save_prior(tiny_prior, tiny_config, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def model(prior_folder):
    """A sampler with every setting away from its default, and as if trained."""
    return _trained(load_prior(prior_folder))


@pytest.fixture
def folder(model, prior_folder, tmp_path):
    save_pretrained(model, tmp_path / "model", prior=str(prior_folder), metadata={"seed": 7})
    return tmp_path / "model"


def _trained(prior, num_iterations=2, seed=0, lora=True, **settings):
    if lora:
        add_lora(prior, rank=2, alpha=3.0)
    unfolded = UnfoldedDenoiser(
        prior,
        num_iterations,
        reference_level=1 / 3,
        rho=1.7,
        lambda_=[0.1 * (k + 1) for k in range(num_iterations)],
        tol=1e-6,
        max_iter=77,
        **settings,
    )
    model = UD2M(unfolded, eta=0.8, levels=[3.3, 0.7, 0.1], output_range=(-0.25, 1.25))
    _scatter(trained_state_dict(unfolded).values(), seed)
    return model


def _scatter(tensors, seed=0, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))


def _sample(model):
    y = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return model.sample(y, PHYSICS, 2, generator=torch.Generator().manual_seed(2))


def _clone(state):
    return {key: value.clone() for key, value in state.items()}


def _assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def _edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def _edit_weights(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


# -- The state of what was trained ----------------------------------------------------------------


def test_state_holds_what_was_trained_and_nothing_else(model):
    state = trained_state_dict(model.unfolded)
    scalars = {"scalars.log_rho", "scalars.log_delta", "scalars.log_lambda"}
    adapter = {f"lora.{key}" for key in lora_state_dict(model.unfolded.denoiser)}
    assert adapter and state.keys() == scalars | adapter
    trainable = sum(p.numel() for p in model.unfolded.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in state.values()) == trainable
    assert not any(tensor.requires_grad for tensor in state.values())


def test_without_adapter_the_scalars_remain(tiny_prior):
    assert len(trained_state_dict(UnfoldedDenoiser(tiny_prior))) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("merged", [False, True])
def test_state_round_trip_is_exact(prior_folder, dtype, merged):
    first, second = (_trained(load_prior(prior_folder), seed=s).unfolded.to(dtype) for s in (0, 1))
    if merged:
        merge_lora(first.denoiser)
        merge_lora(second.denoiser)
    load_trained_state_dict(second, _clone(trained_state_dict(first)))
    _assert_same(trained_state_dict(second), trained_state_dict(first))
    _assert_same(second.denoiser.state_dict(), first.denoiser.state_dict())


def test_loading_into_itself_changes_nothing(model):
    before = _clone(trained_state_dict(model.unfolded))
    load_trained_state_dict(model.unfolded, trained_state_dict(model.unfolded))
    _assert_same(trained_state_dict(model.unfolded), before)


def test_a_merged_adapter_is_the_same_state(model):
    before = _clone(trained_state_dict(model.unfolded))
    merge_lora(model.unfolded.denoiser)
    _assert_same(trained_state_dict(model.unfolded), before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_prior_that_is_trained_itself(prior_folder, merged):
    first, second = (_trained(load_prior(prior_folder), seed=s).unfolded for s in (0, 1))
    for unfolded in (first, second):
        unfolded.denoiser.requires_grad_(True)
    names = {f"denoiser.{name}" for name, _ in prior_parameters(first.denoiser)}
    _scatter((p for _, p in prior_parameters(first.denoiser)), seed=3)
    if merged:
        merge_lora(first.denoiser)
        merge_lora(second.denoiser)
    state = _clone(trained_state_dict(first))
    assert names == {key for key in state if key.startswith("denoiser.")}
    assert not any("base_layer" in key for key in state)
    load_trained_state_dict(second, state)
    for unfolded in (first, second):
        _assert_same(trained_state_dict(unfolded), state)
        unmerge_lora(unfolded.denoiser)
        _assert_same(trained_state_dict(unfolded), state)


class NetworkInitializer(nn.Module):
    """Stands for RAM: a network that knows nothing of the physics."""

    def __init__(self, seed=0):
        super().__init__()
        self.layers = nn.ModuleDict({n: nn.Conv2d(1, 1, 3, padding=1) for n in ("first", "second")})
        _scatter(self.parameters(), seed)

    def forward(self, y, physics, x_s, sigma, sigma_y):
        return self.layers["second"](self.layers["first"](x_s))


def test_parameters_of_the_initializer_that_were_trained(tiny_prior):
    initializer = NetworkInitializer().requires_grad_(False)
    unfolded = UnfoldedDenoiser(tiny_prior, initializer=initializer)
    assert not any(key.startswith("initializer") for key in trained_state_dict(unfolded))
    initializer.layers["second"].requires_grad_(True)
    assert {key for key in trained_state_dict(unfolded) if key.startswith("initializer")} == {
        "initializer.layers.second.weight",
        "initializer.layers.second.bias",
    }
    state = _clone(trained_state_dict(unfolded))
    _scatter(initializer.parameters(), seed=5)
    frozen = initializer.layers["first"].weight.clone()
    load_trained_state_dict(unfolded, state)
    _assert_same(trained_state_dict(unfolded), state)
    assert torch.equal(initializer.layers["first"].weight, frozen)


def test_adapter_of_the_initializer(tiny_prior):
    initializer = NetworkInitializer()
    add_lora(initializer, rank=1)
    unfolded = UnfoldedDenoiser(tiny_prior, initializer=initializer)
    _scatter(trained_state_dict(unfolded).values())
    state = _clone(trained_state_dict(unfolded))
    assert "initializer.lora.layers.first.lora_A.weight" in state
    merge_lora(initializer)
    _assert_same(trained_state_dict(unfolded), state)
    merged = initializer.layers["first"].get_base_layer().weight.clone()
    load_trained_state_dict(unfolded, {key: 2 * value for key, value in state.items()})
    assert not torch.equal(initializer.layers["first"].get_base_layer().weight, merged)
    load_trained_state_dict(unfolded, state)
    assert torch.equal(initializer.layers["first"].get_base_layer().weight, merged)


def test_a_state_that_does_not_fit_changes_nothing(model):
    unfolded = model.unfolded
    before = _clone(trained_state_dict(unfolded))
    other = {key: torch.full_like(value, 7.0) for key, value in before.items()}
    rho, factor = "scalars.log_rho", next(key for key in before if key.startswith("lora."))

    def refuses(state, *words):
        with pytest.raises(ValueError) as error:
            load_trained_state_dict(unfolded, state)
        assert all(word in str(error.value) for word in words), error.value
        _assert_same(trained_state_dict(unfolded), before)

    refuses({k: v for k, v in other.items() if k != factor}, f"missing: {factor}")
    refuses(other | {"scalars.log_mu": torch.zeros(2)}, "unexpected: scalars.log_mu")
    refuses(other | {rho: torch.zeros(5)}, f"another shape: {rho}: [5] instead of [2]")
    refuses({}, "missing: lora.", "more")
    renamed = {"x" if key == rho else key: value for key, value in other.items()}
    refuses(renamed, f"missing: {rho}", "unexpected: x")


def test_half_precision_rounds_the_weights_and_keeps_the_scalars(model, prior_folder, tmp_path):
    model.unfolded.denoiser.requires_grad_(True)  # all weights, as when no adapter is used
    state = _clone(trained_state_dict(model.unfolded))
    for dtype in (torch.float32, torch.float16):
        model.save_pretrained(tmp_path / str(dtype), prior=str(prior_folder), dtype=dtype)
        loaded = trained_state_dict(UD2M.from_pretrained(tmp_path / str(dtype), merge=False).unfolded)
        for key, value in loaded.items():
            kept = state[key] if key.startswith("scalars.") else state[key].to(dtype).float()
            assert value.dtype == torch.float32 and torch.equal(value, kept), key
    sizes = [
        (tmp_path / str(d) / "model.safetensors").stat().st_size for d in (torch.float32, torch.float16)
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_what_half_precision_cannot_hold_is_refused(model, tmp_path):
    with torch.no_grad():
        next(iter(lora_state_dict(model.unfolded.denoiser).values()))[0] = 1e6
    with pytest.raises(ValueError, match=r"float16 cannot hold the values of lora\."):
        model.save_pretrained(tmp_path / "model", dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype must be"):
        model.save_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert not (tmp_path / "model").exists()


# -- The fingerprint ------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_storage(tiny_prior, prior_folder):
    expected = fingerprint(tiny_prior)
    assert re.fullmatch("[0-9a-f]{64}", expected)
    assert fingerprint(load_prior(prior_folder)) == expected  # stored as float16
    assert fingerprint(copy.deepcopy(tiny_prior).half()) == expected
    assert fingerprint(copy.deepcopy(tiny_prior).double()) == expected
    assert fingerprint(copy.deepcopy(tiny_prior).half().double()) == expected
    assert fingerprint(copy.deepcopy(tiny_prior).bfloat16()) != expected


def test_fingerprint_does_not_depend_on_the_adapter(prior_folder):
    prior = load_prior(prior_folder)
    expected = fingerprint(prior)
    add_lora(prior, rank=2)
    _scatter(lora_parameters(prior))
    assert fingerprint(prior) == expected
    merge_lora(prior)
    assert fingerprint(prior) == expected
    assert fingerprint(copy.deepcopy(prior).half()) == expected
    unmerge_lora(prior)
    assert fingerprint(prior) == expected


def test_fingerprint_depends_on_every_weight_and_name(tiny_prior):
    expected, seen = fingerprint(tiny_prior), set()
    for name, weight in tiny_prior.named_parameters():
        before = weight.data.clone()
        weight.data.flatten()[-1] += 0.1 + weight.data.flatten()[-1].abs()
        seen.add(fingerprint(tiny_prior))
        assert fingerprint(tiny_prior, trained={name}) == fingerprint(
            _with_value(tiny_prior, name, before), trained={name}
        )
        weight.data.copy_(before)
    assert len(seen) == len(list(tiny_prior.parameters())) and expected not in seen
    assert fingerprint(tiny_prior) == expected
    a, b = nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.ModuleDict()
    b["b"] = a["a"]
    assert fingerprint(a) != fingerprint(b)


def _with_value(network, name, value):
    twin = copy.deepcopy(network)
    twin.get_parameter(name).data.copy_(value)
    return twin


def test_fingerprint_of_other_kinds_of_tensors():
    class Odd(nn.Module):
        def __init__(self, scale=1.0):
            super().__init__()
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("filter", scale * torch.tensor([1 + 2j]))
            self.register_buffer("mask", torch.tensor([True, False]))
            self.register_buffer("derived", torch.rand(3), persistent=False)

    assert fingerprint(Odd()) == fingerprint(Odd())
    assert fingerprint(Odd()) != fingerprint(Odd(scale=2.0))


# -- What lora.py tells ---------------------------------------------------------------------------


def test_config_of_the_adapter_makes_the_same_adapter(prior_folder):
    prior, twin = load_prior(prior_folder), load_prior(prior_folder)
    assert lora_config(prior) is None
    targets = add_lora(prior, rank=3, alpha=4.5)
    assert lora_config(prior) == {"rank": 3, "alpha": 4.5, "targets": targets}
    add_lora(twin, **lora_config(prior))
    shapes = [{k: v.shape for k, v in lora_state_dict(p).items()} for p in (prior, twin)]
    assert shapes[0] == shapes[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("merged", [False, True])
def test_removing_the_adapter_gives_the_prior_back(prior_folder, merged):
    prior = load_prior(prior_folder)
    weights = _clone(prior.state_dict())
    add_lora(prior, rank=2)
    _scatter(lora_parameters(prior))
    if merged:
        merge_lora(prior)
    _assert_same(prior_state_dict(prior), weights)
    assert {name for name, _ in prior_parameters(prior)} == {
        name for name, _ in load_prior(prior_folder).named_parameters()
    }
    remove_lora(prior)
    assert not has_lora(prior) and not any(p.requires_grad for p in prior.parameters())
    _assert_same(prior.state_dict(), weights)
    assert add_lora(prior, rank=2)
    remove_lora(load_prior(prior_folder))  # without adapter there is nothing to do


# -- Round trip -----------------------------------------------------------------------------------


def test_samples_are_the_same_bit_for_bit(model, folder):
    loaded = UD2M.from_pretrained(folder, merge=False)
    assert torch.equal(_sample(loaded), _sample(model))
    _assert_same(trained_state_dict(loaded.unfolded), trained_state_dict(model.unfolded))


def test_merged_samples_are_the_same_up_to_rounding(model, folder):
    expected, loaded = _sample(model), UD2M.from_pretrained(str(folder))
    torch.testing.assert_close(_sample(loaded), expected, rtol=0, atol=1e-4)
    unmerge_lora(loaded.unfolded.denoiser)
    assert torch.equal(_sample(loaded), expected)
    assert all(p.requires_grad for p in lora_parameters(loaded.unfolded.denoiser))


def test_settings_come_back(model, folder):
    loaded = UD2M.from_pretrained(folder)
    assert torch.equal(loaded.levels, model.levels)
    assert (loaded.eta, loaded.output_range) == (0.8, (-0.25, 1.25))
    assert not any(part.training for part in loaded.modules())
    for name in ("num_iterations", "reference_level", "tol", "max_iter"):
        assert getattr(loaded.unfolded, name) == getattr(model.unfolded, name)
    for name in ("start_rho", "start_delta", "start_lambda"):
        assert torch.equal(getattr(loaded.unfolded, name), getattr(model.unfolded, name))
    assert lora_config(loaded.unfolded.denoiser) == lora_config(model.unfolded.denoiser)
    assert repr(loaded) == repr(model)


@pytest.mark.parametrize(
    "initializer",
    [
        *(LinearInitializer(0.4, 1 / 3), PseudoInverseInitializer("adjoint")),
        WienerInitializer(0.4, 1e-3, 2.0, 0.02, 0.5, 0.5, 7),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_settings_of_other_kinds(prior_folder, tmp_path, initializer, shared):
    prior = load_prior(prior_folder)
    model = _trained(prior, lora=False, initializer=initializer, shared=shared)
    model.output_range = None
    model.save_pretrained(tmp_path / "m", prior=prior_folder)
    loaded = UD2M.from_pretrained(tmp_path / "m")
    assert loaded.output_range is None and not has_lora(loaded.unfolded.denoiser)
    assert len(loaded.unfolded.log_rho) == (1 if shared else 2)
    assert torch.equal(_sample(loaded), _sample(model))


@pytest.mark.parametrize("shared", [False, True])
def test_one_iteration(prior_folder, tmp_path, shared):
    model = _trained(load_prior(prior_folder), num_iterations=1, shared=shared)
    model.save_pretrained(tmp_path / "m", prior=prior_folder)
    assert torch.equal(_sample(UD2M.from_pretrained(tmp_path / "m", merge=False)), _sample(model))


def test_saving_what_was_loaded_gives_the_same_files(model, folder, prior_folder, tmp_path):
    for merge in (False, True):
        loaded = UD2M.from_pretrained(folder, merge=merge)
        loaded.save_pretrained(tmp_path / "again", prior=str(prior_folder), metadata={"seed": 7})
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_files(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    state = load_file(folder / "model.safetensors")
    _assert_same(state, trained_state_dict(model.unfolded))
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 1 and config["metadata"] == {"seed": 7}
    assert config["prior"]["fingerprint"] == fingerprint(model.unfolded.denoiser)
    assert config["prior"]["channels"] == 1
    assert config["sampler"]["levels"] == model.levels.tolist()
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_weights_are_stored_in_float32(model, tmp_path):
    save_pretrained(copy.deepcopy(model).double(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    _assert_same(state, trained_state_dict(model.unfolded))


def test_loading_spends_no_random_numbers(folder):
    before = torch.get_rng_state()
    UD2M.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_given_prior_is_used_in_place(model, folder, prior_folder, dtype):
    prior = load_prior(prior_folder).to(dtype)
    loaded = UD2M.from_pretrained(folder, prior=prior, merge=False)
    assert loaded.unfolded.denoiser is prior and has_lora(prior)
    torch.testing.assert_close(_sample(loaded), _sample(model), rtol=0, atol=1e-4)


def test_a_prior_given_by_name(model, folder, prior_folder, monkeypatch):
    _edit_config(folder, lambda config: config["prior"].update(name="elsewhere"))
    for prior in (prior_folder, str(prior_folder)):
        loaded = UD2M.from_pretrained(folder, prior=prior, merge=False)
        assert torch.equal(_sample(loaded), _sample(model))
    monkeypatch.setitem(module.PRIORS, "elsewhere", prior_folder)
    assert torch.equal(_sample(UD2M.from_pretrained(folder, merge=False)), _sample(model))


def test_the_name_of_the_prior_is_what_it_was_found_by(model, prior_folder, tmp_path):
    """A sampler of a prior from a folder is loaded without saying where that is."""
    save_pretrained(model, tmp_path / "sampler")
    config = json.loads((tmp_path / "sampler" / "config.json").read_text())
    assert config["prior"]["name"] == str(prior_folder)
    assert torch.equal(_sample(UD2M.from_pretrained(tmp_path / "sampler", merge=False)), _sample(model))


def test_what_was_merged_for_good_must_be_trained_to_be_saved(model, folder, tmp_path):
    loaded = UD2M.from_pretrained(folder, merge=False)
    merge_lora(loaded.unfolded.denoiser, unload=True)
    with pytest.raises(ValueError, match=r"merge_lora.*not trained"):
        save_pretrained(loaded, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    loaded.unfolded.denoiser.requires_grad_(True)
    save_pretrained(loaded, tmp_path / "again")
    again = UD2M.from_pretrained(tmp_path / "again")
    assert torch.allclose(_sample(again), _sample(model), atol=1e-5)


def test_a_sampler_to_train_on(model, folder):
    started = sampler_to_train(folder, levels=[3.0, 0.5])
    assert started.levels.tolist() == [3.0, 0.5]
    assert (started.eta, started.output_range) == (model.eta, model.output_range)
    assert lora_config(started.unfolded.denoiser) is not None
    assert torch.equal(_sample(sampler_to_train(folder)), _sample(model))
    every = sampler_to_train(folder, all_weights=True)
    assert lora_config(every.unfolded.denoiser) is None
    assert all(parameter.requires_grad for parameter in every.unfolded.parameters())
    assert torch.allclose(_sample(every), _sample(model), atol=1e-5)


def test_fingerprint_of_what_was_trained(model, folder):
    name = trained_fingerprint(model.unfolded)
    assert trained_fingerprint(UD2M.from_pretrained(folder).unfolded) == name  # merged or not
    with torch.no_grad():
        model.unfolded.log_rho[0] += 0.1
    assert trained_fingerprint(model.unfolded) != name


def test_shipped_samplers(model, folder, monkeypatch):
    monkeypatch.setattr(module, "_SHIPPED", folder.parent)
    monkeypatch.setitem(module.PRETRAINED, "tiny-denoising", folder.name)
    assert torch.equal(_sample(UD2M.from_pretrained("tiny-denoising", merge=False)), _sample(model))


def test_every_shipped_sampler_loads():
    for name in module.PRETRAINED:
        assert not UD2M.from_pretrained(name).training


def test_targets_are_meant_by_their_full_names(prior_folder, tmp_path):
    # A name that ends another one: as a list of trailing parts it would mean both.
    prior = load_prior(prior_folder)
    prior.extra = nn.ModuleDict({"twin": nn.Linear(2, 2)})
    prior.twin = nn.Linear(2, 2)
    twin = copy.deepcopy(prior)
    assert add_lora(prior, targets="twin") == ["twin"]
    save_pretrained(UD2M(UnfoldedDenoiser(prior)), tmp_path / "m")
    assert lora_config(from_pretrained(tmp_path / "m", prior=twin).unfolded.denoiser)["targets"] == [
        "twin"
    ]


def test_a_prior_that_was_trained_itself_comes_back(prior_folder, tmp_path):
    prior = load_prior(prior_folder)
    expected = fingerprint(prior)
    model = _trained(prior)
    parts = [p for name, p in prior_parameters(prior) if "out" in name or "qkv" in name]
    assert parts
    for parameter in parts:
        parameter.requires_grad_(True)
    _scatter(parts, seed=4)
    model.save_pretrained(tmp_path / "m", prior=prior_folder)
    assert fingerprint(prior) != expected
    loaded = UD2M.from_pretrained(tmp_path / "m", merge=False)
    assert torch.equal(_sample(loaded), _sample(model))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags


def test_a_prior_holds_one_sampler():
    """All weights of the shipped samplers of digits are trained: a second would overwrite the first."""
    prior = load_prior("mnist")
    model = UD2M.from_pretrained("mnist", prior=prior)
    before = trained_fingerprint(model.unfolded)
    for given in (prior, copy.deepcopy(prior)):
        with pytest.raises(ValueError, match="prior already holds the weights that the sampler 'mnist'"):
            UD2M.from_pretrained("mnist-sr4", prior=given)
    assert trained_fingerprint(model.unfolded) == before
    UD2M.from_pretrained("mnist-sr4", prior=load_prior("mnist"))


@pytest.mark.parametrize("trained", [False, True])
def test_an_initializer_that_is_a_network(prior_folder, tmp_path, trained):
    initializer = NetworkInitializer().requires_grad_(trained)
    model = _trained(load_prior(prior_folder), initializer=initializer)
    model.save_pretrained(tmp_path / "m", prior=prior_folder)
    with pytest.raises(ValueError, match=r"trained with a NetworkInitializer.*initializer="):
        UD2M.from_pretrained(tmp_path / "m")
    given = NetworkInitializer(seed=0).requires_grad_(not trained)
    loaded = UD2M.from_pretrained(tmp_path / "m", initializer=given, merge=False)
    assert loaded.unfolded.initializer is given
    assert all(p.requires_grad == trained for p in given.parameters())
    assert torch.equal(_sample(loaded), _sample(model))
    if not trained:
        with pytest.raises(ValueError, match=r"initializer: .*fingerprint"):
            UD2M.from_pretrained(tmp_path / "m", initializer=NetworkInitializer(seed=1))
    with pytest.raises(ValueError, match=r"NetworkInitializer.*got.*LinearInitializer"):
        UD2M.from_pretrained(tmp_path / "m", initializer=LinearInitializer())


def test_a_simple_initializer_may_be_given_if_it_is_the_same(folder):
    UD2M.from_pretrained(folder, initializer=WienerInitializer())
    with pytest.raises(ValueError, match=r"initializer: .*0\.5.*0\.25"):
        UD2M.from_pretrained(folder, initializer=WienerInitializer(mean=0.25))


# -- Saving what cannot be saved, and saving that is interrupted ------------------------------------


def test_what_cannot_be_saved(model, tmp_path):
    target = tmp_path / "m"
    with pytest.raises(TypeError, match="UD2M of an UnfoldedDenoiser, got UnfoldedDenoiser"):
        save_pretrained(model.unfolded, target)
    with pytest.raises(TypeError, match="UnfoldedDenoiser, got Identity"):
        save_pretrained(UD2M(nn.Identity()), target)
    with pytest.raises(TypeError, match="prior must be a name"):
        save_pretrained(model, target, prior=model.unfolded.denoiser)
    with pytest.raises(TypeError, match=r"metadata must hold.*Tensor"):
        save_pretrained(model, target, metadata={"loss": torch.zeros(1)})
    with pytest.raises(TypeError, match="metadata must be a dictionary, got str"):
        save_pretrained(model, target, metadata="MNIST")
    assert not target.exists()


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _other(prior_folder):
    return _trained(load_prior(prior_folder), seed=9)


def test_an_interrupted_save_leaves_the_old_files(folder, prior_folder, monkeypatch):
    before, other = _contents(folder), _other(prior_folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    for function in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, function, interrupted)
            save_pretrained(other, folder, prior=prior_folder)
        assert _contents(folder) == before


def test_a_save_interrupted_between_its_files_is_noticed(folder, prior_folder, monkeypatch):
    before, other, replace = _contents(folder), _other(prior_folder), os.replace

    def interrupted(source, target):
        if Path(target).name == "config.json":
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "replace", interrupted)
        save_pretrained(other, folder, prior=prior_folder)
    assert _contents(folder).keys() == before.keys()
    with pytest.raises(ValueError, match=r"other values than .*saving was interrupted"):
        UD2M.from_pretrained(folder)
    save_pretrained(other, folder, prior=prior_folder)
    assert torch.equal(_sample(UD2M.from_pretrained(folder, merge=False)), _sample(other))


# -- Files that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-model", "", "./nowhere", "a/b/c", "/nowhere/at all"])
def test_unknown_names(name, monkeypatch):
    monkeypatch.setitem(module.PRETRAINED, "mnist-of-a-test", "x")
    with pytest.raises(
        ValueError, match=r"shipped samplers .*mnist-of-a-test.*Hugging Face Hub"
    ) as error:
        UD2M.from_pretrained(name)
    assert repr(name) in str(error.value)


def test_a_revision_of_something_local(folder):
    with pytest.raises(ValueError, match="revision='v2' is for the Hugging Face Hub"):
        UD2M.from_pretrained(folder, revision="v2")


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    content, lengths = file.read_bytes(), random.Random(0)
    cuts = [0, 1, 7, 8, 9, len(content) - 1, *(lengths.randrange(len(content)) for _ in range(20))]
    for cut in cuts:
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated, or not a safetensors"):
            UD2M.from_pretrained(folder)


def test_flipped_bits(folder):
    file = folder / "model.safetensors"
    content, positions = file.read_bytes(), random.Random(0)
    for position in [0, 8, len(content) - 1, *(positions.randrange(len(content)) for _ in range(20))]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << positions.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            UD2M.from_pretrained(folder)


def test_a_pickle_is_refused_unread(folder, tmp_path):
    trace = tmp_path / "trace"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (trace,)

    pickle.loads(pickle.dumps(Malicious()))
    assert trace.exists()  # it would work
    trace.unlink()
    for write in (
        lambda file: file.write_bytes(pickle.dumps(Malicious())),
        lambda file: torch.save(Malicious(), file),
    ):
        write(folder / "model.safetensors")
        with pytest.raises(ValueError, match="not a safetensors file"):
            UD2M.from_pretrained(folder)
        assert not trace.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is missing"):
        UD2M.from_pretrained(folder)


def test_missing_and_extra_tensors(folder):
    def exchange(state):
        state["scalars.log_mu"] = state.pop("scalars.log_rho")

    _edit_weights(folder, exchange)
    message = r"does not belong to .*missing: scalars\.log_rho; unexpected: scalars\.log_mu"
    with pytest.raises(ValueError, match=message):
        UD2M.from_pretrained(folder)


def test_weights_of_another_number_of_iterations(folder, prior_folder, tmp_path):
    save_pretrained(_trained(load_prior(prior_folder), num_iterations=4), tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"another shape: scalars\.log_delta: \[4\] instead of \[2\]"):
        UD2M.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b'{"format": ', b"\xff\xfe\x00", b"[" * 100_000])
def test_config_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        UD2M.from_pretrained(folder)


def test_config_of_something_else(prior_folder, folder):
    with pytest.raises(ValueError, match=r"config\.json is not that of a sampler"):
        UD2M.from_pretrained(prior_folder)
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json is not that of a sampler"):
        UD2M.from_pretrained(folder)


def test_config_of_a_newer_format(folder):
    _edit_config(folder, lambda config: config.update(format=2, package_version="9.9", unfolded=None))
    with pytest.raises(ValueError, match=r"format 2, written by deepinv_ud2m 9\.9.*upgrade"):
        UD2M.from_pretrained(folder)


def _set(section, **values):
    return lambda config: config[section].update(values)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda config: config.pop("unfolded"), "no section 'unfolded'"),
        (lambda config: config.update(lora=[]), "no section 'lora'"),
        (lambda config: config["prior"].pop("fingerprint"), "'prior' has no fingerprint"),
        (lambda config: config["lora"].pop("rank"), "'lora' has no rank"),
        (_set("unfolded", num_iterations=3), "num_iterations"),
        (_set("unfolded", num_iterations=3, delta=1.0, lambda_=1.0, rho=1.0), r"log_rho: \[2\] .*\[3\]"),
        (_set("unfolded", shared=True), r"log_rho: \[2\] instead of \[1\]"),
        (_set("unfolded", rho=["a"]), "rho|str"),
        (_set("unfolded", gamma=1.0), "gamma"),
        (_set("sampler", levels=[1.0, 2.0]), "levels"),
        (_set("sampler", eta="x"), "str"),
        (_set("sampler", output_range=0.5), "float"),
        (_set("lora", rank=4), r"lora_A.*instead of \[4, "),
        (_set("lora", rank=0), "rank=0"),
        (_set("lora", targets=["nowhere.conv", "."]), r"lora\.targets names layers.*nowhere\.conv"),
        (_set("lora", targets=[[]]), r"config\.json cannot be used"),
        (_set("lora", targets=[]), "matches no layer"),
        (lambda config: config["lora"]["targets"].pop(), r"unexpected: lora\."),
        (lambda config: config.update(lora=None), r"unexpected: lora\."),
        (_set("initializer", median=0.5), "median"),
        (_set("initializer", std=-1.0), "std"),
        (_set("initializer", kind=["RAM"]), "RAM"),
        (_set("weights", tensors=None), r"config\.json cannot be used"),
        (_set("weights", sha256=None), "other values"),
    ],
)
def test_damaged_config(folder, prior_folder, edit, message):
    _edit_config(folder, edit)
    prior = load_prior(prior_folder)
    weights = _clone(prior.state_dict())
    with pytest.raises(ValueError, match=message):
        UD2M.from_pretrained(folder, prior=prior)
    _assert_same(prior.state_dict(), weights)  # nothing of the adapter stays
    assert not any(p.requires_grad for p in prior.parameters())


# -- Priors that are refused ----------------------------------------------------------------------


def test_another_prior(folder, prior_folder):
    prior = load_prior(prior_folder)
    expected = fingerprint(prior)
    prior.denoiser.map_layer0.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"prior: .*other weights, or another network") as error:
        UD2M.from_pretrained(folder, prior=prior)
    assert expected in str(error.value) and fingerprint(prior) in str(error.value)
    assert str(prior_folder) in str(error.value)
    assert not has_lora(prior)
    with pytest.raises(ValueError, match=r"prior: .*got 'DRUNet' of fingerprint"):
        UD2M.from_pretrained(folder, prior=dinv.models.DRUNet(1, 1, nc=[2] * 4, nb=1, pretrained=None))


def test_other_channels(folder, tiny_config, tmp_path):
    from deepinv_ud2m.priors import build_network

    tiny_config["prior"].update(channels=3, name="colour")
    save_prior(build_network(tiny_config), tiny_config, tmp_path / "colour")
    with pytest.raises(ValueError, match=r"images of 1 channel\(s\), got '.*colour', for images of 3"):
        UD2M.from_pretrained(folder, prior=tmp_path / "colour")


def test_a_prior_that_cannot_be_found(folder, prior_folder):
    for name in ("elsewhere", None, 3):
        _edit_config(folder, _set("prior", name=name))
        with pytest.raises(ValueError, match=rf"trained with the prior {name!r} .*Give it as prior="):
            UD2M.from_pretrained(folder)
    with pytest.raises(ValueError, match="priors"):
        UD2M.from_pretrained(folder, prior="nowhere")


def test_a_prior_that_has_an_adapter(model, folder):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"already carries an adapter.*remove_lora"):
            UD2M.from_pretrained(folder, prior=model.unfolded.denoiser)
        merge_lora(model.unfolded.denoiser)
    remove_lora(model.unfolded.denoiser)
    UD2M.from_pretrained(folder, prior=model.unfolded.denoiser)


def test_arguments_of_other_types(folder):
    with pytest.raises(TypeError, match="prior must be a deepinv Denoiser"):
        UD2M.from_pretrained(folder, prior=3)
    with pytest.raises(TypeError, match="initializer must be a module, got str"):
        UD2M.from_pretrained(folder, initializer="RAM")


# -- The Hugging Face Hub -------------------------------------------------------------------------


class Repository(str):
    """The address of a repository, as huggingface_hub returns it."""

    def __new__(cls, repo_id):
        url = super().__new__(cls, f"https://huggingface.co/{repo_id}")
        url.repo_id = repo_id
        return url


class FakeHub:
    """A Hub in memory, in place of the functions that would reach the network."""

    def __init__(self, folder):
        self.folder, self.calls, self.files = folder, [], {}

    def HfApi(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        return Repository(full)

    def file_exists(self, repo_id, name):
        return name in self.files.get(repo_id, {})

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, commit_message))
        self.files.setdefault(repo_id, {}).update(_contents(Path(folder_path)))

    def snapshot_download(self, repo_id, revision=None, allow_patterns=None):
        self.calls.append(("download", repo_id, revision))
        if repo_id not in self.files:
            raise OSError("404 repository not found")
        self.folder.mkdir(exist_ok=True)
        for name in allow_patterns:
            (self.folder / name).write_bytes(self.files[repo_id][name])
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.HfApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_to_the_hub_and_back(model, prior_folder, hub, capsys):
    url = model.push_to_hub("repo", private=True, token="t", prior=prior_folder, metadata={"data": "x"})
    assert url == "https://huggingface.co/me/repo"
    assert hub.calls == [
        ("token", "t"),
        ("create", "repo", True, True),
        ("upload", "me/repo", "Upload UD2M sampler"),
    ]
    assert hub.files["me/repo"].keys() == {"config.json", "model.safetensors", "README.md"}
    loaded = UD2M.from_pretrained("me/repo", revision="v1", merge=False)
    assert hub.calls[-1] == ("download", "me/repo", "v1")
    assert torch.equal(_sample(loaded), _sample(model))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("model.safetensors", "'me/repo'", "v1", "Hugging Face Hub"))


def test_model_card_of_others_is_kept(model, hub):
    hub.files["me/repo"] = {"README.md": b"mine"}
    push_to_hub(model, "me/repo")
    assert hub.files["me/repo"]["README.md"] == b"mine"
    assert "config.json" in hub.files["me/repo"]


def test_model_card(model, folder):
    config = json.loads((folder / "config.json").read_text())
    card = model_card("me/repo", config)
    assert card.startswith("---\nlibrary_name: deepinv\n")
    assert 'UD2M.from_pretrained("me/repo", prior=prior)' in card
    assert '"seed": 7' in card and config["prior"]["fingerprint"] in card
    assert "3.3, 0.7, 0.1" in card and "rank 2 on" in card
    config["prior"] |= {"name": "mnist", "channels": None}
    config["initializer"] = {"kind": "RAMInitializer"}
    config["lora"] = None
    card = model_card("me/repo", config)
    assert 'from_pretrained("me/repo", initializer=initializer)' in card and "| LoRA | none |" in card


def test_what_cannot_be_saved_is_not_uploaded(model, hub):
    with pytest.raises(TypeError, match="metadata"):
        push_to_hub(model, "me/repo", metadata={"x": object()})
    assert [call[0] for call in hub.calls] == ["token"]


def test_a_download_that_fails(hub):
    with pytest.raises(OSError, match=r"'runs/typo' is neither a folder nor.*404 repository not found"):
        UD2M.from_pretrained("runs/typo")


def test_a_folder_comes_before_the_hub(model, folder, hub, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    loaded = UD2M.from_pretrained(f"{folder.parent.name}/{folder.name}", merge=False)
    assert torch.equal(_sample(loaded), _sample(model)) and not hub.calls


def test_without_huggingface_hub(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        UD2M.from_pretrained("user/repo")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        model.push_to_hub("user/repo")
