"""Published priors on their real architectures, with random weights."""

import deepinv as dinv
import pytest
import torch
from deepinv.models import DiffUNet
from safetensors.torch import save_file

import deepinv_ud2m.published as published
from deepinv_ud2m import UD2M, UnfoldedDenoiser, VPSchedule, add_lora, load_prior
from deepinv_ud2m.networks import VPDenoiser
from deepinv_ud2m.published import PUBLISHED, load_weights


def randomize(network: torch.nn.Module) -> None:
    """Weights such that no layer is zero, and the output is about white noise of level one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(0, fan_in**-0.5, generator=generator)


@pytest.fixture(scope="module")
def reference() -> DiffUNet:
    torch.manual_seed(0)
    network = DiffUNet(pretrained=None).eval().requires_grad_(False)
    randomize(network)
    return network


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ffhq.pt"
    # As published: without the table that deepinv adds when it is built.
    torch.save({k: v for k, v in reference.state_dict().items() if "cumprod" not in k}, path)
    return path


@pytest.fixture(scope="module")
def prior(file):
    return load_prior("ffhq256", weights=file)


def test_what_the_prior_says_about_itself(prior):
    info = prior.prior_info
    assert (info.channels, info.image_size, info.size_multiple) == (3, 256, 32)
    assert info.sigma_min == pytest.approx(0.0050, rel=1e-2)
    assert info.sigma_max == pytest.approx(78.70, rel=1e-4)
    assert not prior.training and not any(p.requires_grad for p in prior.parameters())


@pytest.mark.parametrize("t", [0, 37, 400, 999])
def test_equal_to_deepinvs_denoiser_at_integer_times(prior, reference, t):
    sigma = VPSchedule().sigma(t)
    x = 0.5 + 0.2 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, denoised = reference(x, sigma), prior(x, sigma)
    inside = (expected > 0) & (expected < 1)
    assert inside.float().mean() > (0.5 if t < 500 else 0.001)
    # deepinv divides by another rounding of the same number; at high levels the noise is multiplied.
    torch.testing.assert_close(denoised[inside], expected[inside], rtol=0, atol=2e-4 * (1 + sigma))
    assert torch.equal(denoised.clamp(0, 1)[~inside], expected[~inside])


def test_each_image_has_its_level(prior):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.03, 0.7])
    with torch.no_grad():
        together = prior(x, levels)
        assert torch.equal(together, prior(x, levels.reshape(2, 1, 1, 1)))
        alone = torch.cat([prior(x[i : i + 1], levels[i]) for i in range(2)])
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
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sigma = torch.tensor(0.31, requires_grad=True)
    loss = prior(x, sigma).double().square().mean()
    of_x, of_sigma = torch.autograd.grad(loss, (x, sigma))
    with torch.no_grad():
        step = 1e-4  # small against the distance of two times
        ends = [prior(x, sigma + d).double().square().mean().item() for d in (-step, step)]
    assert of_sigma.item() == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=0.03)
    assert bool((of_x != 0).all())


def test_adapter_of_the_paper(file):
    prior = load_prior("ffhq256", weights=file)
    names = add_lora(prior, rank=5)
    assert {name.rpartition(".")[2] for name in names} == {"qkv", "proj_out"}
    trained = sum(p.numel() for p in prior.parameters() if p.requires_grad)
    assert trained == 61_440  # of 93.6 million
    model = UD2M(UnfoldedDenoiser(prior, 1), 1)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    physics = dinv.physics.Inpainting(
        (3, 32, 32), mask=0.5, noise_model=dinv.physics.GaussianNoise(0.05)
    )
    y = physics(x)
    with pytest.warns(UserWarning, match="256x256"):
        samples = model(y, physics)
    assert samples.shape == x.shape and model.nfe == 1
    # A training step reaches the adapter alone.
    model.unfolded(y, physics, x, 0.5).square().mean().backward()
    assert all(p.grad is None or p.requires_grad for p in prior.parameters())
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in prior.parameters())


def test_weights_as_safetensors_and_as_deepinv_saves_them(reference, tmp_path):
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(reference.state_dict(), tmp_path / "a.pt")
    save_file(reference.state_dict(), tmp_path / "b.safetensors")
    with torch.no_grad():
        a, b = (load_prior("ffhq256", weights=tmp_path / f)(x, 0.2) for f in ("a.pt", "b.safetensors"))
    assert torch.equal(a, b)


# -- What can go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet256", "ffhq256"])
def test_weights_that_are_not_here(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    entry = PUBLISHED[name]
    with pytest.raises(FileNotFoundError) as error:
        load_prior(name)
    said = str(error.value)
    assert str(tmp_path / "checkpoints" / entry.file) in said and f"{entry.megabytes} MB" in said
    assert "weights" in said and "download=True" in said

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(OSError, match=f"cannot download {entry.file}.*no network.*Put the file at"):
        load_prior(name, download=True)


def test_downloaded_weights_are_used(file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def download(url, destination, **kwargs):
        asked.append(url)
        with open(destination, "wb") as copy:
            copy.write(file.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        load_prior("ffhq256", download=True)
    assert len(asked) == 1 and asked[0].endswith("diffusion_ffhq_10m.pt?download=true")


def test_damaged_and_foreign_files(file, tmp_path):
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"truncated\.pt is damaged"):
        load_prior("ffhq256", weights=truncated)
    text = tmp_path / "page.safetensors"
    text.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.safetensors is damaged"):
        load_prior("ffhq256", weights=text)
    network = torch.nn.Linear(2, 3)
    for state, message in (
        ({"weight": torch.zeros(3, 2)}, r"1 weights are missing \['bias'\]"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "c": torch.zeros(1)}, r"unknown \['c'\]"),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, r"another shape \['weight'\]"),
        ({"model": {"weight": torch.zeros(3, 2)}}, "no state dictionary"),
    ):
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message):
            load_weights(network, tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_prior("ffhq256", weights=tmp_path / "nowhere.pt")


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return print, ("unpickled",)

    torch.save(Bomb(), tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt is damaged"):
        load_weights(torch.nn.Linear(2, 3), tmp_path / "bomb.pt")


@pytest.mark.parametrize("options", [{"weights": "x.pt"}, {"download": True}])
def test_weights_of_a_prior_that_ships(options):
    with pytest.raises(ValueError, match="weights and download are for"):
        load_prior("mnist", **options)


# -- diffusers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    randomize(network)
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def test_diffusers_equal_to_deepinvs_wrapper_at_integer_times(pipeline):
    prior = load_prior("lsun-bedroom256", weights=pipeline)
    reference = dinv.models.DiffusersDenoiserWrapper(str(pipeline), clip_output=False)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for t in (5, 250, 700):
        sigma = VPSchedule().sigma(t)
        with torch.no_grad():
            torch.testing.assert_close(prior(x, sigma), reference(x, sigma), rtol=1e-3, atol=1e-3)
    assert {name.rpartition(".attentions.")[2][2:] for name in add_lora(prior)} == {
        *("to_q", "to_k", "to_v", "to_out.0")
    }


def test_diffusers_that_are_not_here(tmp_path, monkeypatch, pipeline):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_prior("lsun-bedroom256", weights=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no copy of google/ddpm-ema-bedroom-256"):
        load_prior("lsun-bedroom256", weights=tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"455 MB.*weights, or set download=True"):
        load_prior("lsun-bedroom256")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        load_prior("lsun-bedroom256", weights=pipeline)


def test_a_schedule_that_is_another(pipeline, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel.from_pretrained(pipeline, subfolder="unet")
    other = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(network, other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"schedule of .+ is another"):
        load_prior("lsun-bedroom256", weights=tmp_path)


@pytest.mark.slow
def test_the_large_network():
    """The architecture of the paper: 552.8 million parameters, 414 720 of an adapter of rank 5."""
    network = published.PUBLISHED["imagenet256"].build()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(552.8e6, rel=1e-3)
    prior = VPDenoiser(network, published._noise_of_diffunet)
    add_lora(prior, rank=5)
    assert sum(p.numel() for p in prior.parameters() if p.requires_grad) == 414_720
