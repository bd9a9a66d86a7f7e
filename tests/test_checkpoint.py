"""Trained samplers as files: what is stored, and what comes back."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import sample, scatter, trained_sampler
from safetensors.torch import load_file
from torch import nn

from deepinv_ud2m import (
    UD2M,
    Initializer,
    LinearInitializer,
    PosteriorMeanInitializer,
    PseudoInverseInitializer,
    UnfoldedDenoiser,
    WienerInitializer,
    add_lora,
    load_prior,
    merge_lora,
    unmerge_lora,
)
from deepinv_ud2m import checkpoint as module
from deepinv_ud2m.checkpoint import fingerprint, trained_fingerprint
from deepinv_ud2m.priors import PRIORS, has_lora, lora_parameters, prior_parameters


def clone(state):
    return {key: value.clone() for key, value in state.items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class NetworkInitializer(Initializer):
    """Stands for RAM: a network that the files do not describe."""

    is_rebuilt = False

    def __init__(self, seed=0, trained=()):
        super().__init__()
        self.layers = nn.ModuleDict({n: nn.Conv2d(1, 1, 3, padding=1) for n in ("first", "second")})
        scatter(self.parameters(), seed)
        self.requires_grad_(False)
        self.trained = trained

    def estimate(self, problem, x_s, sigma):
        return self.layers["second"](self.layers["first"](x_s))

    def trained_parameters(self):
        return {n: p for n, p in prior_parameters(self) if n.startswith(self.trained)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("train_prior", ["adapter", "all"])
def test_state_round_trip_is_exact(tiny_folder, dtype, merged, train_prior):
    priors, options = [load_prior(tiny_folder) for _ in range(2)], {"train_prior": train_prior}
    first, second = (trained_sampler(p, seed=s, **options).unfolded.to(dtype) for s, p in enumerate(priors))
    before = clone(first.state())
    assert not any("base_layer" in key for key in before)
    if merged:
        merge_lora(first.denoiser)
        merge_lora(second.denoiser)
        assert_same(first.state(), before)
    second.load_state(clone(first.state()))
    assert_same(second.state(), before)
    assert_same(second.denoiser.state_dict(), first.denoiser.state_dict())
    first.load_state(first.state())  # into itself
    for unfolded in (first, second):
        unmerge_lora(unfolded.denoiser)
        assert_same(unfolded.state(), before)


def test_parameters_of_the_initializer_that_are_declared(tiny_prior):
    initializer = NetworkInitializer(trained=("layers.second",))
    unfolded = UnfoldedDenoiser(tiny_prior, initializer=initializer)
    names = {f"initializer.layers.second.{kind}" for kind in ("weight", "bias")}
    assert {key for key in unfolded.state() if key.startswith("initializer")} == names
    assert names <= unfolded.trained_parameters().keys()
    state = clone(unfolded.state())
    scatter(initializer.parameters(), seed=5)
    frozen = initializer.layers["first"].weight.clone()
    unfolded.load_state(state)
    assert_same(unfolded.state(), state)
    assert torch.equal(initializer.layers["first"].weight, frozen)


def test_adapter_of_the_initializer(tiny_prior):
    initializer = NetworkInitializer(trained="nothing")
    add_lora(initializer, rank=1)
    unfolded = UnfoldedDenoiser(tiny_prior, initializer=initializer)
    scatter(unfolded.state().values())
    state = clone(unfolded.state())
    assert "initializer.lora.layers.first.lora_A.weight" in state
    assert len(unfolded.trained_parameters()) == len(state)
    merge_lora(initializer)
    assert_same(unfolded.state(), state)
    merged = initializer.layers["first"].get_base_layer().weight.clone()
    unfolded.load_state({key: 2 * value for key, value in state.items()})
    assert not torch.equal(initializer.layers["first"].get_base_layer().weight, merged)
    unfolded.load_state(state)
    assert torch.equal(initializer.layers["first"].get_base_layer().weight, merged)


def test_a_state_that_does_not_fit_changes_nothing(tiny_sampler):
    unfolded = tiny_sampler.unfolded
    before = clone(unfolded.state())
    other = {key: torch.full_like(value, 7.0) for key, value in before.items()}
    rho, factor = "scalars.log_rho", next(key for key in before if key.startswith("lora."))
    renamed = {"x" if key == rho else key: value for key, value in other.items()}
    for state, *words in [
        ({k: v for k, v in other.items() if k != factor}, f"missing: {factor}"),
        (other | {"scalars.log_mu": torch.zeros(2)}, "unexpected: scalars.log_mu"),
        (other | {rho: torch.zeros(5)}, f"another shape: {rho}: [5] instead of [2]"),
        ({}, "missing: lora.", "more"),
        (renamed, f"missing: {rho}", "unexpected: x"),
    ]:
        with pytest.raises(ValueError) as error:
            unfolded.load_state(state)
        assert all(word in str(error.value) for word in words), error.value
        assert_same(unfolded.state(), before)


def test_fingerprint_does_not_depend_on_storage_and_adapter(tiny_prior, tiny_folder):
    expected, prior = fingerprint(tiny_prior), load_prior(tiny_folder)  # stored as float16
    assert re.fullmatch("[0-9a-f]{64}", expected)
    assert fingerprint(copy.deepcopy(tiny_prior).bfloat16()) != expected
    add_lora(prior, rank=2)
    scatter(lora_parameters(prior))
    for change in (merge_lora, unmerge_lora):
        for network in (tiny_prior, prior):
            assert fingerprint(network) == expected
            assert fingerprint(copy.deepcopy(network).half()) == expected
            assert fingerprint(copy.deepcopy(network).double()) == expected
            assert fingerprint(copy.deepcopy(network).half().double()) == expected
        change(prior)


def test_fingerprint_depends_on_every_weight_and_name(tiny_prior):
    expected, seen = fingerprint(tiny_prior), set()
    for name, weight in tiny_prior.named_parameters():
        twin = copy.deepcopy(tiny_prior)
        weight.data.flatten()[-1] += 0.1 + weight.data.flatten()[-1].abs()
        seen.add(fingerprint(tiny_prior))
        assert fingerprint(tiny_prior, trained={name}) == fingerprint(twin, trained={name})
        weight.data.copy_(twin.get_parameter(name).data)
    assert len(seen) == len(list(tiny_prior.parameters())) and expected not in seen
    assert fingerprint(tiny_prior) == expected
    a, b = nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.ModuleDict()
    b["b"] = a["a"]
    assert fingerprint(a) != fingerprint(b)


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


def test_samples_are_the_same_bit_for_bit_and_merged_up_to_rounding(tiny_sampler, sampler_folder):
    expected, loaded = sample(tiny_sampler), UD2M.from_pretrained(sampler_folder, merge=False)
    assert torch.equal(sample(loaded), expected)
    assert_same(loaded.unfolded.state(), tiny_sampler.unfolded.state())
    loaded = UD2M.from_pretrained(str(sampler_folder))
    assert has_lora(loaded.unfolded.denoiser) and not torch.equal(sample(loaded), expected)
    torch.testing.assert_close(sample(loaded), expected, rtol=0, atol=1e-4)
    unmerge_lora(loaded.unfolded.denoiser)
    assert torch.equal(sample(loaded), expected)
    assert all(p.requires_grad for p in lora_parameters(loaded.unfolded.denoiser))
    name = trained_fingerprint(tiny_sampler.unfolded)
    assert trained_fingerprint(UD2M.from_pretrained(sampler_folder).unfolded) == name  # merged or not
    with torch.no_grad():
        tiny_sampler.unfolded.log_rho[0] += 0.1
    assert trained_fingerprint(tiny_sampler.unfolded) != name


WIENER = WienerInitializer(0.4, 1e-3, 2.0, 0.02, 0.5, 0.5, 7, 0.0)
KINDS = [LinearInitializer(0.4, 1 / 3, 0.1), PseudoInverseInitializer("adjoint", 0.3), WIENER]


@pytest.mark.parametrize("initializer", KINDS)
@pytest.mark.parametrize("shared, num_iterations", [(False, 2), (True, 2), (False, 1)])
def test_settings_of_other_kinds(tiny_folder, tmp_path, initializer, shared, num_iterations):
    settings = {"initializer": initializer, "shared": shared}
    model = trained_sampler(load_prior(tiny_folder), num_iterations, lora=False, **settings)
    model.output_range = None
    model.save_pretrained(tmp_path / "m", prior=tiny_folder)
    loaded = UD2M.from_pretrained(tmp_path / "m")
    assert loaded.output_range is None and not has_lora(loaded.unfolded.denoiser)
    assert loaded.unfolded.initializer.config() == initializer.config()
    assert len(loaded.unfolded.log_rho) == (1 if shared else num_iterations)
    assert torch.equal(sample(loaded), sample(model))


def test_saving_what_was_loaded_gives_the_same_files(sampler_folder, tiny_folder, tmp_path):
    before = torch.get_rng_state()
    for merge in (False, True):
        loaded = UD2M.from_pretrained(sampler_folder, merge=merge)
        loaded.save_pretrained(tmp_path / "again", prior=str(tiny_folder), metadata={"seed": 7})
        assert contents(tmp_path / "again") == contents(sampler_folder)
    assert torch.equal(torch.get_rng_state(), before), "it spends no random numbers"


def test_files(tiny_sampler, sampler_folder):
    assert contents(sampler_folder).keys() == {"config.json", "model.safetensors"}
    assert_same(load_file(sampler_folder / "model.safetensors"), tiny_sampler.unfolded.state())
    config = json.loads((sampler_folder / "config.json").read_text())
    assert config["format"] == 2 and config["metadata"] == {"seed": 7}
    assert config["prior"]["fingerprint"] == fingerprint(tiny_sampler.unfolded.denoiser)
    assert config["prior"]["channels"] == 1
    assert config["sampler"]["sigmas"] == tiny_sampler.sigmas.tolist()
    umask = os.umask(0)
    os.umask(umask)
    assert (sampler_folder / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_half_precision_rounds_the_weights_and_keeps_the_scalars(tiny_folder, tmp_path):
    model = trained_sampler(load_prior(tiny_folder), train_prior="all")
    state, sizes = clone(model.unfolded.state()), []
    for dtype in (torch.float32, torch.float16):  # also of a sampler in double precision
        model.double().save_pretrained(tmp_path / str(dtype), prior=str(tiny_folder), dtype=dtype)
        loaded = UD2M.from_pretrained(tmp_path / str(dtype), merge=False).unfolded.state()
        for key, value in loaded.items():
            kept = state[key] if key.startswith("scalars.") else state[key].to(dtype).float()
            assert value.dtype == torch.float32 and torch.equal(value, kept), key
        sizes.append((tmp_path / str(dtype) / "model.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_given_prior_is_used_in_place(tiny_sampler, sampler_folder, tiny_folder, dtype):
    prior = load_prior(tiny_folder).to(dtype)
    loaded = UD2M.from_pretrained(sampler_folder, prior=prior, merge=False)
    assert loaded.unfolded.denoiser is prior and has_lora(prior)
    torch.testing.assert_close(sample(loaded), sample(tiny_sampler), rtol=0, atol=1e-4)


def test_names_of_priors(tiny_sampler, tiny_folder, tmp_path, monkeypatch):
    """The stored name is what the prior was found by; another place can be given."""
    folder = tmp_path / "m"
    tiny_sampler.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["prior"]["name"] == str(tiny_folder)
    expected = sample(tiny_sampler)
    assert torch.equal(sample(UD2M.from_pretrained(folder, merge=False)), expected)
    edit_config(folder, lambda config: config["prior"].update(name="elsewhere"))
    for prior in (tiny_folder, str(tiny_folder)):
        assert torch.equal(sample(UD2M.from_pretrained(folder, prior=prior, merge=False)), expected)
    monkeypatch.setitem(PRIORS, "elsewhere", tiny_folder)
    assert torch.equal(sample(UD2M.from_pretrained(folder, merge=False)), expected)


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_every_shipped_sampler_loads_and_is_of_the_present_format():
    for name, folder in module.PRETRAINED.items():
        assert not UD2M.from_pretrained(name).training
        file = Path(module.__file__).parent / "weights" / folder / "config.json"
        assert json.loads(file.read_text())["format"] == module.FORMAT


@pytest.mark.parametrize("train_prior", ["all", ["denoiser.out_conv", "denoiser.enc"]])
def test_a_prior_that_was_trained_itself_comes_back(tiny_folder, tmp_path, train_prior):
    prior = load_prior(tiny_folder)
    expected = fingerprint(prior)
    model = trained_sampler(prior, train_prior=train_prior)
    model.save_pretrained(tmp_path / "m", prior=tiny_folder)
    assert fingerprint(prior) != expected
    loaded = UD2M.from_pretrained(tmp_path / "m", merge=False)
    assert torch.equal(sample(loaded), sample(model))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags


def test_a_prior_holds_one_sampler():
    """All weights of the shipped samplers of digits are trained: a second would overwrite the first."""
    prior = load_prior("mnist")
    model = UD2M.from_pretrained("mnist", prior=prior)
    before = trained_fingerprint(model.unfolded)
    for given in (prior, copy.deepcopy(prior)):
        with pytest.raises(
            ValueError, match="prior already holds the trained weights of the sampler 'mnist'"
        ):
            UD2M.from_pretrained("mnist", prior=given)
    assert trained_fingerprint(model.unfolded) == before
    UD2M.from_pretrained("mnist", prior=load_prior("mnist"))


@pytest.mark.parametrize("trained", [("nothing",), ("layers",)])
def test_an_initializer_that_is_a_network(tiny_folder, tmp_path, trained):
    model = trained_sampler(load_prior(tiny_folder), initializer=NetworkInitializer(trained=trained))
    model.save_pretrained(tmp_path / "m", prior=tiny_folder)
    with pytest.raises(ValueError, match=r"trained with a NetworkInitializer.*initializer="):
        UD2M.from_pretrained(tmp_path / "m")
    given = NetworkInitializer(trained=trained)
    loaded = UD2M.from_pretrained(tmp_path / "m", initializer=given, merge=False)
    assert loaded.unfolded.initializer is given
    assert torch.equal(sample(loaded), sample(model))
    if trained == ("nothing",):
        with pytest.raises(ValueError, match=r"initializer: .*fingerprint"):
            UD2M.from_pretrained(tmp_path / "m", initializer=NetworkInitializer(seed=1, trained=trained))
    with pytest.raises(ValueError, match=r"NetworkInitializer.*got.*LinearInitializer"):
        UD2M.from_pretrained(tmp_path / "m", initializer=LinearInitializer())


FORMAT_1 = {
    "format": 1,
    "package_version": "0.1.0",
    "sampler": {
        **{"levels": [78.69999694824219, 0.6600000262260437, 0.07699999958276749], "eta": 1.0},
        **{"output_range": [0.0, 1.0], "reference_error": 0.22},
    },
    "unfolded": {
        **{"num_iterations": 2, "shared": False, "reference_level": 0.125, "rho": [2.0, 2.0]},
        **{"delta": [4.5, 1.2999999523162842], "lambda_": [1.0, 1.0], "tol": 1e-05, "max_iter": 1000},
    },
    "initializer": {"kind": "WienerInitializer", "mean": 0.1, "decay": 3.6639411573715446},
    "metadata": {"seed": 5},
}


@pytest.mark.parametrize("kind", ["all weights", "adapter"])
def test_the_format_before_is_read(tiny_folder, tiny_config, tmp_path, kind):
    old, prior = copy.deepcopy(FORMAT_1), load_prior(tiny_folder)
    if kind == "adapter":
        add_lora(prior, rank=2)
        initializer = WienerInitializer(mean=0.1, decay=3.6639411573715446, reference_level=0.125)
        del old["sampler"]["reference_error"]
    else:  # a learned initializer has a level of its own
        network = {**tiny_config["network"], "img_resolution": 16}
        initializer = PosteriorMeanInitializer(network, 1, reference_level=0.2)
        old["initializer"] = {"kind": "PosteriorMeanInitializer", **initializer.config()}
    options = {"delta": [4.5, 1.3], "train_prior": "all" if kind == "all weights" else "adapter"}
    unfolded = UnfoldedDenoiser(prior, 2, initializer, **options)
    scatter(unfolded.state().values(), std=0.03)
    settings = {"nominal_rmse": old["sampler"].get("reference_error")}
    model = UD2M(unfolded, sigmas=[78.7, 0.66, 0.077], **settings)
    model.save_pretrained(tmp_path / "m", prior=tiny_folder, metadata={"seed": 5})
    new = json.loads((tmp_path / "m" / "config.json").read_text())

    def as_before(config):
        kept = {key: config[key] for key in ("lora", "prior", "weights")}
        config.clear()
        config.update(old, **kept)

    edit_config(tmp_path / "m", as_before)
    loaded = UD2M.from_pretrained(tmp_path / "m", merge=False)
    assert torch.equal(sample(loaded), sample(model))
    loaded.save_pretrained(tmp_path / "m", prior=tiny_folder, metadata={"seed": 5})
    again = json.loads((tmp_path / "m" / "config.json").read_text())
    if kind == "all weights":  # by their names, which is the same
        named = again["unfolded"].pop("train_prior")
        assert set(named) == {name for name, _ in prior_parameters(prior)}
        assert new["unfolded"].pop("train_prior") == "all"
    assert again == new
