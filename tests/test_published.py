"""Published priors on their real architectures, with random weights; and what strangers may send."""

import copy
import dataclasses
import hashlib
import json
import shutil
import urllib.request

import deepinv as dinv
import pytest
import torch
from conftest import Bomb, seeded
from deepinv.models import DiffUNet
from safetensors.torch import load_file, save_file

from deepinv_ud2m import UD2M, UnfoldedDenoiser, VPSchedule, add_lora, load_prior
from deepinv_ud2m.files import cached_download
from deepinv_ud2m.priors import PUBLISHED, random_prior
from deepinv_ud2m.priors.networks import VPDenoiser

UNET = "diffusion_pytorch_model"


def randomize(network: torch.nn.Module) -> None:
    """Weights such that no layer is zero, and the output is about white noise of level one."""
    generator = seeded(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(0, fan_in**-0.5, generator=generator)


def images(batch_size=1):
    return torch.rand(batch_size, 3, 32, 32, generator=seeded(0))


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change_card(monkeypatch, name, **changes):
    monkeypatch.setitem(PUBLISHED, name, dataclasses.replace(PUBLISHED[name], **changes))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Weights of a small network, which stands for that of ffhq256 in all but its call."""
    change_card(monkeypatch, "ffhq256", build=lambda full_size: torch.nn.Conv2d(3, 3, 1))
    torch.save(torch.nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "ffhq.pt")
    return tmp_path / "ffhq.pt"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def reference() -> DiffUNet:
    torch.manual_seed(0)
    network = DiffUNet(pretrained=None).eval().requires_grad_(False)
    randomize(network)
    return network


@pytest.fixture(scope="module")
def prior(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ffhq.pt"
    torch.save(reference.state_dict(), path)  # as deepinv saves it, with its table of noise levels
    prior = load_prior("ffhq256", weights=path)
    path.unlink()
    return prior


def test_what_the_prior_says_about_itself(prior):
    info = prior.prior_info
    assert (info.channels, info.image_size, info.size_multiple) == (3, 256, 32)
    assert info.sigma_min == pytest.approx(0.0050, rel=1e-2)
    assert info.sigma_max == pytest.approx(78.70, rel=1e-4)
    assert not prior.training and not any(p.requires_grad for p in prior.parameters())


@pytest.mark.parametrize("t", [0, 37, 400, 999])
def test_equal_to_deepinvs_denoiser_at_integer_times(prior, reference, t):
    sigma = VPSchedule().sigma(t)
    x = 0.5 + 0.2 * torch.randn(1, 3, 32, 32, generator=seeded(0))
    with torch.no_grad():
        expected, denoised = reference(x, sigma), prior(x, sigma)
    inside = (expected > 0) & (expected < 1)
    assert inside.float().mean() > (0.5 if t < 500 else 0.001)
    # deepinv divides by another rounding of the same number; at high levels the noise is multiplied.
    torch.testing.assert_close(denoised[inside], expected[inside], rtol=0, atol=2e-4 * (1 + sigma))
    assert torch.equal(denoised.clamp(0, 1)[~inside], expected[~inside])


def test_each_image_has_its_level(prior):
    x, sigmas = images(2), torch.tensor([0.03, 0.7])
    with torch.no_grad():
        together = prior(x, sigmas)
        assert torch.equal(together, prior(x, sigmas.reshape(2, 1, 1, 1)))
        alone = torch.cat([prior(x[i : i + 1], sigmas[i]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    """deepinv's own denoiser rounds time and clamps, so its gradients are not those of the function."""

    def noise(network, v, t):
        return torch.tanh(network(v)) * (1 + 0.01 * t.reshape(-1, 1, 1, 1)).log()

    torch.manual_seed(0)
    denoiser = VPDenoiser(torch.nn.Conv2d(1, 1, 3, padding=1).double(), noise)
    denoiser.schedule.double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.0834, 1.217], dtype=torch.float64, requires_grad=True)
    # Time is kept in float32 by the schedule: the step must be larger than that.
    torch.autograd.gradcheck(denoiser, (x, sigma), eps=1e-3, atol=2e-3, rtol=1e-3)


def test_gradients_through_the_network(prior):
    x, sigma = images().requires_grad_(), torch.tensor(0.31, requires_grad=True)
    loss = prior(x, sigma).double().square().mean()
    of_x, of_sigma = torch.autograd.grad(loss, (x, sigma))
    with torch.no_grad():
        step = 1e-4  # small against the distance of two times
        ends = [prior(x, sigma + d).double().square().mean().item() for d in (-step, step)]
    assert of_sigma.item() == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=0.03)
    assert bool((of_x != 0).all())


def test_adapter_of_the_paper(prior):
    prior = copy.deepcopy(prior)
    names = add_lora(prior, rank=5)
    assert {name.rpartition(".")[2] for name in names} == {"qkv", "proj_out"}
    trained = sum(p.numel() for p in prior.parameters() if p.requires_grad)
    assert trained == 61_440  # of 93.6 million
    model, x = UD2M(UnfoldedDenoiser(prior, 1), 1), images()
    physics = dinv.physics.Inpainting((3, 32, 32), mask=0.5, noise_model=dinv.physics.GaussianNoise(0.05))
    y = physics(x)
    with pytest.warns(UserWarning, match="256x256"):
        samples = model(y, physics)
    assert samples.shape == x.shape and model.nfe == 1
    # A training step reaches the adapter alone.
    model.unfolded(y, physics, x, 0.5).square().mean().backward()
    assert all(p.grad is None or p.requires_grad for p in prior.parameters())
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in prior.parameters())


def test_weights_of_every_format(file, tmp_path):
    state = torch.load(file)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "half.safetensors")
    for name in ("ffhq.pt", "old.pt", "half.safetensors"):
        loaded = load_prior("ffhq256", weights=tmp_path / name).network.state_dict()
        for key, value in state.items():
            value = value.half().float() if "half" in name else value
            assert loaded[key].dtype == torch.float32 and torch.equal(loaded[key], value)


@pytest.mark.parametrize("name", ["imagenet256", "ffhq256"])
def test_weights_that_are_not_here(name, hub, monkeypatch, capfd):
    card = PUBLISHED[name]
    with pytest.raises(FileNotFoundError) as error:
        load_prior(name)
    said = str(error.value)
    assert str(hub / card.files[0]) in said and f"{card.megabytes} MB" in said
    assert "weights" in said and "download=True" in said

    def refuse(*args, **kwargs):
        said = capfd.readouterr().err  # before anything is asked for
        assert all(part in said for part in (card.files[0], f"{card.megabytes} MB", card.repository))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(OSError, match=rf"cannot download {card.files[0]}.*no network.*copy as weights"):
        load_prior(name, download=True)


def test_downloads_are_checked_and_kept(file, hub, monkeypatch):
    change_card(monkeypatch, "ffhq256", sha256=digest(file))
    asked = []

    def download(url, destination, hash_prefix):
        asked.append((url, hash_prefix))
        shutil.copy(file, destination)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        load_prior("ffhq256", download=True)
    revision = "deepinv/diffunet/resolve/6b0a2cf45decab1f022d22eefe3787d9d515f32b"
    url = f"https://huggingface.co/{revision}/diffusion_ffhq_10m.pt"
    assert asked == [(url, digest(file))]


def test_files_of_another_digest_are_refused(file, hub, monkeypatch):
    """A download leaves nothing; what is in the cache stays."""
    expected, response = PUBLISHED["ffhq256"].sha256, urllib.request.urlopen(file.as_uri())
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: response)
    with pytest.raises(OSError, match=f"{expected}.*{digest(file)}"):
        load_prior("ffhq256", download=True)
    assert not [*hub.iterdir()]
    cached = shutil.copy(file, hub / "diffusion_ffhq_10m.pt")
    with pytest.raises(ValueError, match=f"{digest(file)}, expected {expected}"):
        load_prior("ffhq256", download=True)
    assert digest(cached) == digest(file)


def test_a_download_on_request(tmp_path, monkeypatch):
    """Refused with the place of a copy; a file of another digest does not stay; the second call has it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "weights.pth").write_bytes(b"tensors")
    digest, url = hashlib.sha256(b"tensors").hexdigest(), (tmp_path / "weights.pth").as_uri()
    place = tmp_path / "hub" / "checkpoints" / "weights.pth"
    about = ("a network is not here", "7 B", "say so")
    with pytest.raises(FileNotFoundError) as refusal:
        cached_download(url, *about, download=False, digest=digest[:8])
    assert str(refusal.value) == (
        f"a network is not here, 7 B from {url}, whose sha256 begins with {digest[:8]}: "
        f"put the file at {place}, or say so"
    )
    with pytest.raises(RuntimeError, match="invalid hash"):
        cached_download(url, *about, download=True, digest="0" * 8)
    assert not place.exists()
    assert cached_download(url, *about, download=True, digest=digest[:8]) == place
    (tmp_path / "weights.pth").unlink()
    assert cached_download(url, *about, download=False) == place and place.read_bytes() == b"tensors"


def test_damaged_and_foreign_files(file, tmp_path):
    content, other = file.read_bytes(), tmp_path / "other.pt"
    damaged = {"truncated.pt": content[: len(content) // 2], "page.safetensors": b"<html>", "empty.pt": b""}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} are damaged"):
            load_prior("ffhq256", weights=tmp_path / name)
    good = torch.load(file)
    for state, message in (  # see also test_priors.py
        ({"weight": good["weight"]}, "missing: bias"),
        (good | {"bias": torch.tensor([0, 1e300, 0]).double()}, "NaN or infinite values in bias"),
        ({"model": good}, "tensors by name, got .*dict"),
        ([*good.values()], "tensors by name, got list"),
    ):
        torch.save(state, other)
        with pytest.raises(ValueError, match=message):
            load_prior("ffhq256", weights=other)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_prior("ffhq256", weights=tmp_path / "nowhere.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(zipped, tmp_path):
    torch.save(Bomb(tmp_path / "victim"), tmp_path / "b.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"b\.pt are damaged"):
        load_prior("ffhq256", weights=tmp_path / "b.pt")
    assert not (tmp_path / "victim").exists()
    torch.load(tmp_path / "b.pt", weights_only=False)
    assert (tmp_path / "victim").exists()  # it is a bomb


def test_other_names():
    for options in ({"weights": "x.pt"}, {"download": True}):
        with pytest.raises(ValueError, match="weights and download are for"):
            load_prior("mnist", **options)
    with pytest.raises(ValueError, match="name must be one of"):
        random_prior("mnist")
    prior = random_prior("lsun-bedroom256")
    assert prior(images(), 0.3).shape == (1, 3, 32, 32)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 32)}
    network = diffusers.UNet2DModel(32, layers_per_block=1, **blocks)
    randomize(network)
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "copy")


def as_in_googles_repository(folder):
    """All files in one folder, a pickle with the names of attention layers of 2022, fewer settings."""
    state = load_file(folder / "unet" / f"{UNET}.safetensors")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert any(".query." in name for name in state) and not any(".to_" in name for name in state)
    torch.save(state, folder / f"{UNET}.bin")
    shutil.move(folder / "unet" / "config.json", folder)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kept = ("_class_name", "beta_end", "beta_schedule", "beta_start", "num_train_timesteps")
    schedule = {name: schedule[name] for name in kept} | {"timestep_values": None, "clip_sample": True}
    (folder / "scheduler_config.json").write_text(json.dumps(schedule))
    shutil.rmtree(folder / "unet"), shutil.rmtree(folder / "scheduler")


def edit_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))


def test_diffusers_equal_to_deepinvs_wrapper_at_integer_times(pipeline, folder):
    prior, x = load_prior("lsun-bedroom256", weights=pipeline), images(2)
    reference = dinv.models.DiffusersDenoiserWrapper(str(pipeline), clip_output=False)
    as_in_googles_repository(folder)
    other = load_prior("lsun-bedroom256", weights=folder)
    for t in (5, 250, 700):
        sigma = VPSchedule().sigma(t)
        with torch.no_grad():
            torch.testing.assert_close(prior(x, sigma), reference(x, sigma), rtol=1e-3, atol=1e-3)
            assert torch.equal(prior(x, sigma), other(x, sigma))
    ends = {name.rpartition(".attentions.")[2][2:] for name in add_lora(prior)}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}


def test_diffusers_that_are_not_here(tmp_path, monkeypatch, pipeline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_prior("lsun-bedroom256", weights=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"scheduler_config\.json cannot be used"):
        load_prior("lsun-bedroom256", weights=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"455 MB.*as weights, or set download=True"):
        load_prior("lsun-bedroom256")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    for options in ({"weights": pipeline}, {"download": True}):
        with pytest.raises(ImportError, match="pip install diffusers"):
            load_prior("lsun-bedroom256", **options)


def test_exactly_three_files_are_downloaded(folder, tmp_path, monkeypatch, capfd):
    as_in_googles_repository(folder)
    revision, asked = PUBLISHED["lsun-bedroom256"].revision, []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--google--ddpm-ema-bedroom-256" / "snapshots" / revision

    def download(repository, name, revision):
        assert "455 MB" in capfd.readouterr().err or asked  # said before anything is asked for
        asked.append((repository, name, revision))
        snapshot.mkdir(parents=True, exist_ok=True)
        return shutil.copy(folder / name, snapshot)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError, match="their sha256 is"):
        load_prior("lsun-bedroom256", download=True)
    files = [f"{UNET}.bin", "config.json", "scheduler_config.json"]
    assert asked == [("google/ddpm-ema-bedroom-256", name, revision) for name in files]
    change_card(monkeypatch, "lsun-bedroom256", sha256=digest(folder / f"{UNET}.bin"))
    load_prior("lsun-bedroom256")
    assert len(asked) == 3


OTHER_SCHEDULES = {"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.03, "beta_start": None}
OTHER_SCHEDULES |= {"num_train_timesteps": 500, "prediction_type": "v_prediction"}
OTHER_SCHEDULES |= {"trained_betas": [0.1] * 1000, "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("name, value", OTHER_SCHEDULES.items())
def test_a_schedule_that_is_another(name, value, folder):
    edit_json(folder / "scheduler" / "scheduler_config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"schedule of .+ is another.*{name}"):
        load_prior("lsun-bedroom256", weights=folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": ["evil", "Evil"]}, "_class_name must be 'UNet2DModel'"),
        ({"_class_name": "Evil"}, "_class_name must be 'UNet2DModel', got 'Evil'"),
        ({"in_channels": 1}, "in_channels must be 3, got 1"),
        ({"block_out_channels": [32, -32]}, "does not describe a network"),
        ({"down_block_types": ["evil.Evil", "DownBlock2D"]}, "does not describe a network"),
        ({"block_out_channels": [32, 64]}, "of another network"),
    ],
)
def test_a_network_that_is_another(changes, message, folder):
    edit_json(folder / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_prior("lsun-bedroom256", weights=folder)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_settings_that_are_damaged(name, content, folder):
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=name):
        load_prior("lsun-bedroom256", weights=folder)


@pytest.mark.parametrize("place", ["", "unet", "scheduler"])
def test_no_module_of_a_folder_is_executed(place, folder, tmp_path, monkeypatch):
    """The attacks that DiffusionPipeline.from_pretrained of diffusers 0.30 to 0.37 falls for."""
    victim, spot = tmp_path / "victim", folder / place
    code = f"open({str(victim)!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "pipeline.py", "unet.py", "__init__.py", "modeling_evil.py"):
        (spot / name).write_text(code)
    index = folder / "model_index.json"
    edit_json(index, _class_name=["evil", "Evil"], unet=["evil", "Evil"], scheduler=["evil", "Evil"])
    hostile = {"auto_map": {"AutoModel": "evil.Evil"}, "_module": "evil.py", "trust_remote_code": True}
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        edit_json(folder / name, **hostile)
    monkeypatch.chdir(spot)
    prior = load_prior("lsun-bedroom256", weights=folder)  # it is a good network, beside evil files
    assert type(prior.network).__module__.startswith("diffusers.")
    edit_json(folder / "unet" / "config.json", _class_name=["evil", "Evil"])
    with pytest.raises(ValueError, match="_class_name must be 'UNet2DModel'"):
        load_prior("lsun-bedroom256", weights=folder)
    assert not victim.exists()
    exec(code)
    assert victim.exists()  # the code does what it is for


@pytest.mark.parametrize("name", [f"{UNET}.bin", f"{UNET}.safetensors"])
def test_no_pickle_of_a_folder_is_executed(name, folder, tmp_path):
    (folder / "unet" / f"{UNET}.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        load_prior("lsun-bedroom256", weights=folder)
    torch.save({"conv_in.weight": Bomb(tmp_path / "victim")}, folder / "unet" / name)
    with pytest.raises(ValueError, match=f"{name} are damaged"):
        load_prior("lsun-bedroom256", weights=folder)
    assert not (tmp_path / "victim").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "adapter"),
    [("imagenet256", 552.8e6, 414_720), ("lsun-bedroom256", 113.7e6, 122_880)],
)
def test_the_large_networks(name, parameters, adapter):
    prior = random_prior(name, full_size=True)
    assert sum(p.numel() for p in prior.parameters()) == pytest.approx(parameters, rel=1e-3)
    add_lora(prior, rank=5)
    assert sum(p.numel() for p in prior.parameters() if p.requires_grad) == adapter
