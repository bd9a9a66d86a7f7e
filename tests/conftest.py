"""Oracles: problems whose posterior is known in closed form. Images to train on."""

import sys

import numpy as np
import pytest
import torch
from deepinv import physics as dp
from deepinv.models import Denoiser
from deepinv.utils import TensorList
from torchvision.utils import save_image

from deepinv_ud2m import UD2M, LinearInitializer, UnfoldedDenoiser
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.physics.traits import noise_level
from deepinv_ud2m.priors import PriorInfo, add_lora, build_network, load_prior, save_prior
from deepinv_ud2m.randomness import randn

torch.set_num_threads(1)


class GaussianDenoiser(Denoiser):
    """E[x | x + delta n = w] for x ~ N(mean, covariance), in float64."""

    def __init__(self, mean, covariance, shape):
        super().__init__()
        self.mean, self.covariance, self.shape = mean, covariance, shape
        self.eigenvalues, self.basis = torch.linalg.eigh(covariance)

    def forward(self, w, sigma):
        sigma = torch.as_tensor(sigma, dtype=w.dtype).reshape(-1, 1)
        shrink = self.eigenvalues / (self.eigenvalues + sigma**2)
        centred = (w.flatten(1) - self.mean) @ self.basis
        return (self.mean + (shrink * centred) @ self.basis.T).reshape(w.shape)

    def gain(self, delta):
        """The matrix of the affine map D(., delta)."""
        shrink = self.eigenvalues / (self.eigenvalues + delta**2)
        return self.basis @ torch.diag(shrink) @ self.basis.T


class GaussianProblem:
    """x ~ N(mean, covariance), y = A x + sigma_y n, everything dense and in float64."""

    def __init__(self, physics, shape, seed=0):
        generator = seeded(seed)
        d = int(torch.tensor(shape).prod())
        factor = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
        self.shape, self.d, self.physics = shape, d, physics
        self.mean = 0.5 + 0.1 * torch.randn(d, generator=generator, dtype=torch.float64)
        self.covariance = 0.1 * factor @ factor.T + 0.02 * torch.eye(d, dtype=torch.float64)
        self.sigma_y = noise_level(physics).double()
        self.A = dense_matrix(physics, shape)
        x = self.mean + torch.linalg.cholesky(self.covariance) @ torch.randn(
            d, generator=generator, dtype=torch.float64
        )
        noise = torch.randn(len(self.A), generator=generator, dtype=torch.float64)
        template = physics.A(torch.zeros(1, *shape, dtype=torch.float64))
        self.y = (self.A @ x + self.sigma_y * noise).reshape(template.shape)
        self.denoiser = GaussianDenoiser(self.mean, self.covariance, shape)

    def posterior(self, x_s=None, s=None):
        """Mean and covariance of p(x | y), or of p(x | y, x_s) given x_s, flat, `[B, d]`."""
        prior_precision = torch.linalg.inv(self.covariance)
        precision = prior_precision + self.A.T @ self.A / self.sigma_y**2
        right = prior_precision @ self.mean + self.A.T @ self.y.flatten() / self.sigma_y**2
        if x_s is not None:
            precision = precision + torch.eye(self.d, dtype=torch.float64) / s**2
            right = right + x_s.flatten(1) / s**2
        covariance = torch.linalg.inv(precision)
        return right @ covariance, covariance


class ExactUnfolded(torch.nn.Module):
    """Draws exactly from p(x | y, x_s) of a Gaussian problem."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def draw(self, problem, x_s, sigma, *, generator=None):
        mean, covariance = self.problem.posterior(x_s, sigma)
        noise = randn(x_s, generator).flatten(1)
        return (mean + noise @ torch.linalg.cholesky(covariance).T).reshape(x_s.shape)


def rand(*shape, seed=0, dtype=torch.float64):
    """The same numbers in every dtype."""
    generator = seeded(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


class Bomb:
    """What makes a file, the trace, where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def refused(*cases):
    """Cases are a call, the error that it raises if it is no ValueError, and the pattern of its message."""
    for call, *error, message in cases:
        with pytest.raises(*error or [ValueError], match=message):
            call()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pick(y, images):
    """Some images of a batch, or of measurements."""
    return TensorList([part[images] for part in y]) if isinstance(y, TensorList) else y[images]


PER_IMAGE = ["BlurFFT", "Blur", "Downsampling", "Inpainting", "stack"]


def per_image_physics(name, shape, images=slice(0, 3), dtype=torch.float64):
    """A physics with an operator of its own for each of three images, or for some of them."""
    kernels = rand(3, 1, 3, 3, dtype=dtype)[images]
    kernels = kernels / kernels.sum((-2, -1), keepdim=True)
    blur = dp.Blur(kernels, padding="valid")
    inpainting = dp.Inpainting(shape, (rand(3, 1, *shape[1:], seed=1) < 0.5).to(dtype)[images])
    return {
        "BlurFFT": lambda: dp.BlurFFT(shape, kernels),
        "Blur": lambda: blur,
        "Downsampling": lambda: dp.Downsampling(shape, kernels, 2, padding="circular"),
        "Inpainting": lambda: inpainting,
        "stack": lambda: dp.StackedLinearPhysics([blur, inpainting]),
    }[name]()


def dense_matrix(physics, shape, dtype=torch.float64):
    """The matrix of a linear physics, column by column."""
    identity = torch.eye(int(torch.tensor(shape).prod()), dtype=dtype)
    columns = [flat(physics.A(column.reshape(1, *shape))) for column in identity]
    return torch.stack(columns, 1)


def flat(y):
    """Measurements of one image as a vector, those of a stack one after the other."""
    return torch.cat([part.flatten() for part in y]) if hasattr(y, "x") else y.flatten()


@pytest.fixture
def gaussian_problem():
    return GaussianProblem


def make_tiny_config():
    """A prior of the kind that ships, in miniature."""
    network = {"img_resolution": 16, "model_channels": 32, "channel_mult": [1], "num_blocks": 1}
    options = {"attn_resolutions": [], "dropout": 0.0, "pixel_std": 0.5, "pixel_shuffle": 2}
    info = {"name": "tiny", "channels": 1, "sigma_min": 0.002, "sigma_max": 80.0, "size_multiple": 2}
    return {"network": network | options, "prior": info}


def make_tiny_prior(**network):
    """It, with random weights (no layer left at its zero initialisation), frozen."""
    config = make_tiny_config()
    config["network"] |= network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = build_network(config)
        with torch.no_grad():
            for parameter in prior.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    prior.prior_info = PriorInfo(**config["prior"])
    return prior.requires_grad_(False).eval()


@pytest.fixture
def tiny_config():
    return make_tiny_config()


@pytest.fixture
def tiny_prior():
    return make_tiny_prior()


@pytest.fixture
def tiny_folder(tiny_prior, tiny_config, tmp_path):
    """The folder of that prior."""
    save_prior(tiny_prior, tiny_config, tmp_path / "tiny")
    return tmp_path / "tiny"


def trained_sampler(prior, num_iterations=2, seed=0, lora=True, **settings):
    """A sampler with every setting away from its default, and random values for what is trained."""
    if lora:
        add_lora(prior, rank=2, alpha=3.0)
    lambdas = [0.1 * (k + 1) for k in range(num_iterations)]
    settings = {"initializer": LinearInitializer(0.4, reference_level=1 / 3), **settings}
    unfolded = UnfoldedDenoiser(
        prior, num_iterations, rho=1.7, lambda_=lambdas, tol=1e-6, max_iter=77, **settings
    )
    scatter(unfolded.state().values(), seed)
    return UD2M(unfolded, eta=0.8, sigmas=[3.3, 0.7, 0.1], output_range=(-0.25, 1.25))


def scatter(tensors, seed=0, std=0.1):
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))


def sample(model):
    """Two samples of one seed, which tell samplers of the tiny prior apart."""
    generator = seeded(1)
    y = torch.rand(1, 1, 16, 16, generator=generator)
    return model.sample(y, dp.Denoising(dp.GaussianNoise(0.1)), 2, generator=generator)


@pytest.fixture
def tiny_sampler(tiny_folder):
    return trained_sampler(load_prior(tiny_folder))


@pytest.fixture
def sampler_folder(tiny_sampler, tiny_folder, tmp_path):
    tiny_sampler.save_pretrained(tmp_path / "sampler", prior=str(tiny_folder), metadata={"seed": 7})
    return tmp_path / "sampler"


DRAWN = {"training.history": ["plot_curves"], "training.evaluation": ["plot_samples"]}
DRAWN |= {"benchmark.report": ["plot_calibration", "_plot_sheet"]}


@pytest.fixture(autouse=True)
def figures_where_they_are_tested(request, monkeypatch):
    """And in slow tests: they take most of the time of a short training and of a small benchmark."""
    drawn = "figures" in request.node.name or request.node.get_closest_marker("slow")
    for module, names in DRAWN.items():
        module = sys.modules.get(f"deepinv_ud2m.{module}")
        for name in names if module and not drawn else []:
            monkeypatch.setattr(module, name, lambda *_: None)


@pytest.fixture(autouse=True)
def same_noise_in_every_run():
    """Noise models without a generator of their own draw from PyTorch's: the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The validation digits that ship, as a file of MNIST."""
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    x, y = mnist_digits("validation", labels=True)
    np.savez(file, x=(255 * x[:, 0, 2:-2, 2:-2]).round().byte().numpy(), y=y.numpy())
    return file


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Photographs; ImageNet's names, in subfolders and with upper-case endings, among them."""
    folder = tmp_path_factory.mktemp("photos")
    generator = seeded(0)
    for i in range(4):
        image = torch.rand(1, 3, 6, 7, generator=generator)
        image = torch.nn.functional.interpolate(image, size=(84, 98), mode="bicubic")
        save_image(image.clamp(0, 1), folder / f"{i}.png")
    (folder / "n01").mkdir()
    (folder / "3.png").rename(folder / "n01" / "3.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder
