"""UD2M inside deepinv, unchanged: test, Trainer, DiffusionSampler, and the public benchmark."""

import copy
import warnings

import deepinv as dinv
import pytest
import torch
from conftest import seeded
from deepinv.loss.metric import PSNR
from deepinv.physics import GaussianNoise
from deepinv.physics.functional.blur import gaussian_blur
from torch.utils.data import DataLoader, Dataset

from deepinv_ud2m import UD2M, UnfoldedDenoiser
from deepinv_ud2m.data import mnist_digits

pytestmark = pytest.mark.filterwarnings("ignore:non_blocking_transfers")  # deepinv, on a CPU

CLOSE = {"rtol": 0, "atol": 1e-5}


class Digits(Dataset):
    def __init__(self, num):
        self.x = mnist_digits("test", num=num)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


@pytest.fixture
def model(tiny_prior):
    return UD2M(UnfoldedDenoiser(tiny_prior, num_iterations=2), num_steps=2)


def _kernels(batch):
    """A narrow, ..., a wide one, `[batch, 1, 9, 9]`."""
    widths = torch.linspace(0.5, 2.0, batch).reshape(-1, 1).expand(-1, 2)
    return gaussian_blur((9, 9), widths).reshape(batch, 1, 9, 9)


# The four problems of deepinv's public benchmark, on grey 32x32 images.
BENCHMARK = {
    "deblurring": lambda: dinv.physics.Blur(
        gaussian_blur(sigma=(2.0, 2.0)), padding="valid", noise_model=GaussianNoise(0.05)
    ),
    "inpainting": lambda: dinv.physics.Inpainting((1, 32, 32), mask=0.5),
    "super-resolution": lambda: dinv.physics.Downsampling(filter="bicubic", factor=2),
    "denoising": lambda: dinv.physics.Denoising(GaussianNoise(0.1)),
}


def _assert_image(x_hat, shape):
    assert isinstance(x_hat, torch.Tensor)
    assert x_hat.shape == shape and x_hat.dtype == torch.float32
    assert x_hat.isfinite().all() and x_hat.min() >= 0 and x_hat.max() <= 1
    assert not x_hat.requires_grad


def _test(model, physics, num, batch_size, **options):
    """What ``deepinv.test`` reports, and the samples."""
    outputs = []
    hook = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loader = DataLoader(Digits(num), batch_size=batch_size)
    options = {"metrics": [PSNR()], "verbose": False, "show_progress_bar": False, **options}
    results = dinv.test(model, loader, physics, online_measurements=True, **options)
    hook.remove()
    assert len(outputs) == num // batch_size
    for x_hat in outputs:
        _assert_image(x_hat, (batch_size, 1, 32, 32))
    return results, outputs


@pytest.mark.parametrize(
    "context, problem",
    [("autocast", "deblurring"), ("autocast", "inpainting"), *(("inference", name) for name in BENCHMARK)],
)
def test_sampling_in_a_context(problem, context):
    """
    Under autocast the networks are in bfloat16 and the operators are not: samples change little. What deepinv
    makes under inference mode, such as masks, are tensors without version counters.
    """
    model, physics = UD2M.from_pretrained("mnist"), BENCHMARK[problem]()
    y = physics(mnist_digits("test", num=1 if context == "autocast" else 2))
    noise = {"sigma_y": 0.05} if not isinstance(physics.noise_model, GaussianNoise) else {}
    num_samples = 1 if context == "autocast" else 2
    expected = model.sample(y, physics, num_samples, generator=seeded(), **noise)
    half = torch.autocast("cpu", torch.bfloat16)
    with half if context == "autocast" else torch.inference_mode():
        samples = model.sample(y, physics, num_samples, generator=seeded(), **noise)
    if context == "autocast":
        assert samples.dtype == torch.float32
        assert 0 < (samples - expected).square().mean().sqrt() < 0.02
    else:
        torch.testing.assert_close(samples, expected, atol=1e-4, rtol=0)


def test_diffusion_sampler(model):
    physics = BENCHMARK["denoising"]()
    y = physics(mnist_digits("test", num=2))
    sampler = dinv.sampling.DiffusionSampler(model, max_iter=5, save_chain=True)
    mean, variance = sampler(y, physics, seed=0)
    assert mean.shape == variance.shape == (2, 1, 32, 32)
    assert mean.isfinite().all() and (variance >= 0).all()
    chain = [state["x"] for state in sampler.get_chain()]
    assert len(chain) == 6  # deepinv counts its start as a sample
    for i in range(1, len(chain)):
        _assert_image(chain[i], (2, 1, 32, 32))
        assert not torch.equal(chain[i], chain[i - 1])
    again, _ = sampler(y, physics, seed=0)
    assert torch.equal(again, mean)


@pytest.mark.parametrize("problem, batch_size", [*((problem, 1) for problem in BENCHMARK), ("denoising", 3)])
def test_benchmark_contract(model, problem, batch_size):
    """Of deepinv's public benchmark: no warning, and its PSNR is that of the samples against the digits."""
    model.device = torch.device("cpu")
    assert model.device == torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "non_blocking_transfers")
        warnings.filterwarnings("ignore", "the samples do not explain y")  # of a prior with random weights
        options = {"device": model.device, "compare_no_learning": False}
        results, outputs = _test(model, BENCHMARK[problem](), 2 * batch_size, batch_size, **options)
    expected = PSNR()(torch.cat(outputs), mnist_digits("test", num=2 * batch_size)).mean()
    assert results["PSNR"] == pytest.approx(expected.item(), rel=1e-4)
    assert not torch.equal(*outputs)


def test_str_identifies_the_model(tiny_prior):
    def name(num_iterations=2, **kwargs):
        return str(UD2M(UnfoldedDenoiser(copy.deepcopy(tiny_prior), num_iterations), **kwargs))

    assert name() == name()
    assert len(name()) < 300 and "\n" not in name() and "0x" not in name()
    assert len({name(), name(3), name(num_steps=4), name(eta=0.5)}) == 4


def test_copies_and_state_dicts(model, tiny_prior, tmp_path):
    physics = BENCHMARK["denoising"]()
    y = physics(mnist_digits("test", num=2))
    before, copied = model(y, physics, generator=seeded()), copy.deepcopy(model)
    for parameter in (model.unfolded.log_rho, model.unfolded.log_delta, model.unfolded.log_lambda):
        parameter.data += 0.3
    x_hat = model(y, physics, generator=seeded())
    assert torch.equal(copied(y, physics, generator=seeded()), before) and not torch.equal(before, x_hat)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin = UD2M(UnfoldedDenoiser(copy.deepcopy(tiny_prior), num_iterations=2), num_steps=2)
    twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(twin(y, physics, generator=seeded()), x_hat)
    # What was learned, and what it multiplies; the levels are the constructor's.
    keys = {key for key in model.state_dict() if not key.startswith("unfolded.denoiser.")}
    scalars = ("rho", "delta", "lambda")
    assert keys == {f"unfolded.{kind}_{name}" for kind in ("log", "start") for name in scalars}


def test_double_precision(model):
    """Of the model and the problem, or of the model alone."""
    physics = BENCHMARK["denoising"]()
    y = physics(mnist_digits("test", num=2))
    single = model(y, physics, generator=seeded())
    model.to(torch.float64)
    mixed = model(y, physics, generator=seeded())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, single, rtol=0, atol=1e-4)
    x_hat = model(y.double(), physics.to(torch.float64), generator=seeded())
    assert x_hat.dtype == torch.float64
    assert x_hat.isfinite().all() and x_hat.shape == y.shape


def test_gradients_do_not_flow_but_may_be_asked_of_y(model):
    physics = BENCHMARK["denoising"]()
    y = physics(mnist_digits("test", num=1)).requires_grad_()
    assert not model(y, physics).requires_grad
    _, trajectory = model.sample(y, physics, 2, return_trajectory=True)
    assert trajectory.x0.shape == trajectory.x_s.shape == (2, 2, 1, 1, 32, 32)


def _blur(kernels, sigma):
    return dinv.physics.BlurFFT((1, 32, 32), kernels, noise_model=GaussianNoise(sigma))


def _inpainting(masks, sigma):
    return dinv.physics.Inpainting((1, 32, 32), mask=masks, noise_model=GaussianNoise(sigma))


@pytest.mark.parametrize("kind", ["blur", "inpainting", "sigma_y"])
def test_per_sample_operators(model, kind):
    """Of inpainting with a noise level for each image, too, which the physics or the call gives."""
    make, operators, sigma = _blur, _kernels(3), torch.full((3,), 0.1)
    if kind != "blur":
        make, sigma = _inpainting, torch.tensor([0.02, 0.1, 0.5])
        operators = (torch.rand(3, 1, 32, 32, generator=seeded()) < 0.5).float()
    physics = make(operators, sigma)
    y, override = physics(mnist_digits("test", num=3)), {}
    if kind == "sigma_y":
        physics, override = make(operators, 10.0), {"sigma_y": sigma}
    batch = model(y, physics, generator=seeded(), **override)
    _assert_image(batch, (3, 1, 32, 32))
    # The initial estimate from a mask, which is not solved to the end, amplifies rounding.
    close = CLOSE if kind == "blur" else {"rtol": 0, "atol": 2e-3}
    # Several samples, in any split, keep each image with its operator.
    samples = model.sample(y, physics, 4, generator=seeded(1), **override)
    split = model.sample(y, physics, 4, batch_size=6, generator=seeded(1), **override)
    torch.testing.assert_close(split, samples, **close)
    # Alone, sample i of image i has the random stream of image i in the batch.
    for i in range(3):
        part = slice(i, i + 1)
        alone = model.sample(y[part], make(operators[part], sigma[part]), i + 1, generator=seeded())
        torch.testing.assert_close(alone[i, 0], batch[i], **close)


@pytest.mark.parametrize("batch", [1, 2])
def test_stacked_physics(model, batch):
    masks = (torch.rand(batch, 1, 32, 32, generator=seeded()) < 0.5).float()
    physics = dinv.physics.StackedLinearPhysics([_blur(_kernels(batch), 0.1), _inpainting(masks, 0.1)])
    y = physics(mnist_digits("test", num=batch))
    assert isinstance(y, dinv.utils.TensorList)
    _assert_image(model(y, physics), (batch, 1, 32, 32))
    samples = model.sample(y, physics, 3, generator=seeded())
    split = model.sample(y, physics, 3, batch_size=batch, generator=seeded())
    # Conjugate gradients stop at a relative residual of 1e-4, not at the same iterate.
    torch.testing.assert_close(split, samples, rtol=0, atol=5e-3)
    with_level = model.sample(y, physics, 3, generator=seeded(), sigma_y=0.1)
    torch.testing.assert_close(with_level, samples, rtol=0, atol=5e-3)
