"""Samplers that cannot be saved, saves that are interrupted, and files that are refused."""

import os
import pickle
import random
import re
import resource
import signal
from pathlib import Path

import deepinv as dinv
import pytest
import torch
from conftest import Bomb, sample, trained_sampler
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same, clone, contents, edit_config
from torch import nn

from deepinv_ud2m import UD2M, LinearInitializer, load_prior, merge_lora, remove_lora
from deepinv_ud2m import checkpoint as module
from deepinv_ud2m.checkpoint import fingerprint
from deepinv_ud2m.files import sha256
from deepinv_ud2m.priors import build_network, has_lora, lora_parameters, save_prior


def test_what_cannot_be_saved(tiny_sampler, tmp_path):
    target, exact = tmp_path / "m", UD2M(type("Exact", (nn.Module,), {"draw": print})())
    with torch.no_grad():
        next(lora_parameters(tiny_sampler.unfolded.denoiser))[0] = 1e6
    for model, options, error, message in (
        (exact, {}, TypeError, "UnfoldedDenoiser, got Exact"),
        (tiny_sampler, {"prior": tiny_sampler.unfolded.denoiser}, TypeError, "prior must be a name"),
        (tiny_sampler, {"metadata": {"loss": torch.zeros(1)}}, TypeError, "metadata must hold.*Tensor"),
        (tiny_sampler, {"metadata": "MNIST"}, TypeError, "metadata must be a dictionary, got str"),
        (tiny_sampler, {"dtype": torch.bfloat16}, ValueError, "dtype must be"),
        (tiny_sampler, {"dtype": torch.float16}, ValueError, r"float16 cannot hold the values of lora\."),
    ):
        with pytest.raises(error, match=message):
            model.save_pretrained(target, **options)
    assert not target.exists()


def test_weights_that_look_trained_but_are_not_stored(tiny_sampler, tmp_path):
    tiny_sampler.unfolded.denoiser.get_parameter("denoiser.out_norm.bias").requires_grad_(True)
    with pytest.warns(UserWarning, match="denoiser.denoiser.out_norm.bias require a gradient but are not st"):
        tiny_sampler.save_pretrained(tmp_path / "m")


@pytest.fixture
def other_sampler(tiny_folder):
    return trained_sampler(load_prior(tiny_folder), seed=9)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(limit):
    """Files may not grow beyond a number of bytes; a process that tries is sent SIGXFSZ."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


@pytest.mark.parametrize(
    "moment", ["inside the write", "before the data is on the disk", "before the first move"]
)
def test_a_save_that_is_killed_leaves_the_old_sampler(
    tiny_sampler, other_sampler, sampler_folder, tiny_folder, moment
):
    child = os.fork()
    if child == 0:
        try:
            if moment == "inside the write":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                limit_files(1000)
            setattr(os, "fsync" if "disk" in moment else "replace", die)
            other_sampler.save_pretrained(sampler_folder, prior=tiny_folder)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    loaded = UD2M.from_pretrained(sampler_folder, merge=False)
    assert torch.equal(sample(loaded), sample(tiny_sampler))
    other_sampler.save_pretrained(sampler_folder, prior=tiny_folder)
    loaded = UD2M.from_pretrained(sampler_folder, merge=False)
    assert torch.equal(sample(loaded), sample(other_sampler))


def test_a_full_disk_or_an_interrupt_leaves_the_old_files_and_no_others(
    other_sampler, sampler_folder, tiny_folder, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    before, (soft, _) = contents(sampler_folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1000):
        limit_files(limit)
        try:
            with pytest.raises(OSError):
                other_sampler.save_pretrained(sampler_folder, prior=tiny_folder)
        finally:
            limit_files(soft)
        assert contents(sampler_folder) == before
    for function in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, function, interrupted)
            other_sampler.save_pretrained(sampler_folder, prior=tiny_folder)
        assert contents(sampler_folder) == before


def test_a_save_interrupted_between_its_files_is_noticed(
    other_sampler, sampler_folder, tiny_folder, monkeypatch
):
    before, replace = contents(sampler_folder), os.replace

    def interrupted(source, target):
        if Path(target).name == "config.json":
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "replace", interrupted)
        other_sampler.save_pretrained(sampler_folder, prior=tiny_folder)
    assert contents(sampler_folder).keys() == before.keys()
    with pytest.raises(ValueError, match="saving them was interrupted"):
        UD2M.from_pretrained(sampler_folder)
    other_sampler.save_pretrained(sampler_folder, prior=tiny_folder)
    loaded = UD2M.from_pretrained(sampler_folder, merge=False)
    assert torch.equal(sample(loaded), sample(other_sampler))


@pytest.mark.parametrize("name", ["no-such-model", "", "./nowhere", "a/b/c", "/nowhere/at all"])
def test_unknown_names(name, monkeypatch):
    monkeypatch.setitem(module.PRETRAINED, "mnist-of-a-test", "x")
    with pytest.raises(ValueError, match=r"shipped samplers .*mnist-of-a-test.*Hugging Face Hub") as error:
        UD2M.from_pretrained(name)
    assert repr(name) in str(error.value)


def test_damaged_weights(sampler_folder):
    """Truncated, or with a bit flipped, in the header and in the values."""
    file, chance = sampler_folder / "model.safetensors", random.Random(0)
    content = file.read_bytes()
    for cut in [0, 1, 7, 8, 9, len(content) - 1, *(chance.randrange(len(content)) for _ in range(20))]:
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors are damaged"):
            UD2M.from_pretrained(sampler_folder)
    for position in [0, 8, len(content) - 1, *(chance.randrange(len(content)) for _ in range(20))]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            UD2M.from_pretrained(sampler_folder)


def test_a_pickle_is_refused_unread(sampler_folder, tmp_path):
    bomb, file = Bomb(tmp_path / "trace"), sampler_folder / "model.safetensors"
    pickle.loads(pickle.dumps(bomb))
    assert bomb.trace.exists()  # it would work
    bomb.trace.unlink()
    for write in (lambda: file.write_bytes(pickle.dumps(bomb)), lambda: torch.save(bomb, file)):
        write()
        edit_config(sampler_folder, lambda config: _set(config, "weights.sha256", sha256(file)))
        with pytest.raises(ValueError, match="are damaged, or no weights"):
            UD2M.from_pretrained(sampler_folder)
        assert not bomb.trace.exists()


def test_tensors_that_are_missing_extra_or_not_finite(tiny_sampler, sampler_folder, tiny_folder, tmp_path):
    file = sampler_folder / "model.safetensors"
    state = load_file(file)
    state["scalars.log_mu"] = state.pop("scalars.log_rho")
    save_file(state, file)
    edit_config(sampler_folder, lambda config: _set(config, "weights.sha256", sha256(file)))
    message = r"missing: scalars\.log_rho; unexpected: scalars\.log_mu"
    with pytest.raises(ValueError, match=message):
        UD2M.from_pretrained(sampler_folder)
    with torch.no_grad():
        tiny_sampler.unfolded.log_rho[0] = torch.nan
    tiny_sampler.save_pretrained(tmp_path / "m", prior=tiny_folder)
    with pytest.raises(ValueError, match=r"NaN or infinite values in scalars\.log_rho"):
        UD2M.from_pretrained(tmp_path / "m")


NAN, REMOVED = float("nan"), object()
TYPES = {
    "sampler": {"sigmas": None, "eta": "x", "output_range": 0.5, "nominal_rmse": [0.1]},
    "unfolded": {
        **{"num_iterations": "3", "shared": "no", "rho": 1.0, "delta": None, "lambda_": {}, "tol": None},
        **{"max_iter": 1.5, "train_prior": None},
    },
    "initializer": {"kind": ["RAM"]},
    "lora": {"rank": "2", "alpha": None, "targets": "qkv"},
    "prior": {"name": ["mnist"], "fingerprint": None, "channels": "1"},
    "weights": {"sha256": None},
}
EDITS = [  # section or section.key, value, message; see test_errors.py for more that is no setting
    *(
        (f"{s}.{k}", v, rf"{s}\.{k} must be of type")
        for s, values in TYPES.items()
        for k, v in values.items()
    ),
    ("format", None, "was not written by save_pretrained: its format is None"),
    ("format", 0, "its format is 0"),
    ("format", 1, "levels"),
    ("format", 3, "format 3, written by deepinv_ud2m 0.*upgrade"),
    ("unfolded", REMOVED, "no section 'unfolded'"),
    ("lora", [], "no section 'lora'"),
    ("prior.fingerprint", REMOVED, "'prior' has no fingerprint"),
    ("lora.rank", REMOVED, "'lora' has no rank"),
    ("unfolded.num_iterations", 3, "num_iterations"),
    ("unfolded.num_iterations", 1, "rho must be one positive number or 1"),
    ("unfolded.num_iterations", True, "num_iterations must be an integer"),
    ("unfolded.shared", True, r"log_rho: \[2\] instead of \[1\]"),
    ("unfolded.rho", ["a"], "rho must be a number or a sequence of numbers"),
    ("unfolded.rho", [NAN], "rho must be one positive number or 2"),
    ("unfolded.gamma", 1.0, "gamma"),
    ("unfolded.train_prior", "all", r"missing: denoiser\."),
    ("unfolded.train_prior", ["nowhere"], "train_prior must be .*'nowhere'"),
    ("unfolded.train_prior", [["all"]], "train_prior must be 'adapter', 'all' or a list of names"),
    ("sampler.sigmas", [1.0, 2.0], "sigmas must be"),
    ("sampler.eta", 2, r"eta must be in \[0, 1\], got 2"),
    ("sampler.output_range", [1.0, 0.0], "output_range must be .*low < high"),
    ("sampler.output_range", [0.0], r"output_range must be None or \(low, high\)"),
    ("sampler.nominal_rmse", 0.1, "nominal_rmse=0.1 needs an initializer that predicts"),
    ("lora.rank", 4, r"lora_A.*instead of \[4, "),
    ("lora.rank", 0, "rank must be an integer >= 1, got 0"),
    ("lora.targets", ["nowhere.conv", "."], r"targets: 'nowhere\.conv' is not the name of a layer"),
    ("lora.targets", [[]], r"config\.json cannot be used"),
    ("lora.targets", [], "matches no layer"),
    ("lora.targets", ["denoiser.out_conv"], r"unexpected: lora\."),
    ("lora", None, r"unexpected: lora\."),
    ("initializer.median", 0.5, "median"),
    ("initializer.std", -1.0, "std must be"),
    ("initializer.kind", "RAM", "trained with a RAM, which is not stored"),
    ("weights.sha256", "", "their sha256 is"),
]


@pytest.mark.parametrize("name, value, message", EDITS)
def test_damaged_config(sampler_folder, tiny_folder, name, value, message):
    edit_config(sampler_folder, lambda config: _set(config, name, value))
    prior = load_prior(tiny_folder)
    weights = clone(prior.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        UD2M.from_pretrained(sampler_folder, prior=prior)
    assert str(sampler_folder) in str(error.value) or "which is not stored" in message
    assert_same(prior.state_dict(), weights)  # nothing of the adapter stays
    assert not any(p.requires_grad for p in prior.parameters())


def test_settings_of_the_sampler_are_checked_before_weights_are_loaded(tiny_folder, tmp_path):
    model = trained_sampler(load_prior(tiny_folder), lora=False, train_prior="all")
    model.save_pretrained(tmp_path / "m", prior=tiny_folder)
    edit_config(tmp_path / "m", lambda config: _set(config, "sampler.eta", 2))
    prior = load_prior(tiny_folder)
    weights = clone(prior.state_dict())
    with pytest.raises(ValueError, match="eta must be"):
        UD2M.from_pretrained(tmp_path / "m", prior=prior)
    assert_same(prior.state_dict(), weights)


def _set(config, name, value):
    *section, key = name.split(".")
    part = config[section[0]] if section else config
    if value is REMOVED:
        del part[key]
    else:
        part[key] = value


def test_files_that_are_missing_or_of_something_else(sampler_folder, tiny_folder):
    file = sampler_folder / "config.json"
    for content in (b"", b'{"format": ', b"\xff\xfe\x00", b"[" * 100_000, b"[1, 2]", b'"x"'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json cannot be used"):
            UD2M.from_pretrained(sampler_folder)
    file.write_text("{}")
    for folder in (sampler_folder, tiny_folder):
        with pytest.raises(ValueError, match=r"config\.json was not written by save_pretrained"):
            UD2M.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(sampler_folder, name):
    (sampler_folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} (is missing|cannot be read)"):
        UD2M.from_pretrained(sampler_folder)


def test_another_prior(sampler_folder, tiny_folder, tiny_config, tmp_path):
    prior = load_prior(tiny_folder)
    expected = fingerprint(prior)
    prior.denoiser.map_layer0.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"prior: .*other weights, or another network") as error:
        UD2M.from_pretrained(sampler_folder, prior=prior)
    for word in (expected, fingerprint(prior), str(tiny_folder)):
        assert word in str(error.value)
    assert not has_lora(prior)
    with pytest.raises(ValueError, match=r"prior: .*got 'DRUNet' of fingerprint"):
        other = dinv.models.DRUNet(1, 1, nc=[2] * 4, nb=1, pretrained=None)
        UD2M.from_pretrained(sampler_folder, prior=other)
    tiny_config["prior"].update(channels=3, name="colour")
    save_prior(build_network(tiny_config), tiny_config, tmp_path / "colour")
    with pytest.raises(ValueError, match=r"got '.*colour' of fingerprint"):
        UD2M.from_pretrained(sampler_folder, prior=tmp_path / "colour")


def test_arguments_that_do_not_fit(sampler_folder):
    for arguments, error, message in (
        ({"prior": "nowhere"}, ValueError, "priors"),
        ({"prior": 3}, TypeError, "prior must be a deepinv Denoiser"),
        ({"initializer": "RAM"}, TypeError, "initializer must be an Initializer, got str"),
        ({"revision": "v2"}, ValueError, "revision='v2' is for the Hugging Face Hub"),
        ({"initializer": LinearInitializer(0.25, 1 / 3)}, ValueError, r"initializer: .*0\.4.*0\.25"),
    ):
        with pytest.raises(error, match=message):
            UD2M.from_pretrained(sampler_folder, **arguments)
    UD2M.from_pretrained(sampler_folder, initializer=LinearInitializer(0.4, reference_level=1 / 3))
    for name in ("elsewhere", None):
        edit_config(sampler_folder, lambda config, name=name: _set(config, "prior.name", name))
        with pytest.raises(ValueError, match=rf"trained with the prior {name!r} .*Give it as prior="):
            UD2M.from_pretrained(sampler_folder)


def test_a_prior_that_has_an_adapter(tiny_sampler, sampler_folder):
    prior = tiny_sampler.unfolded.denoiser
    for _ in range(2):
        with pytest.raises(ValueError, match=r"already carries an adapter.*remove_lora"):
            UD2M.from_pretrained(sampler_folder, prior=prior)
        merge_lora(prior)
    remove_lora(prior)
    UD2M.from_pretrained(sampler_folder, prior=prior)
