"""Training a prior: what a run learns, and that it resumes."""

import math
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.priors import load_prior, save_prior
from deepinv_ud2m.training import denoising_psnr, train_prior
from deepinv_ud2m.training.checkpoints import lock, read_checkpoint
from deepinv_ud2m.training.prior import edm_loss, training_sigmas
from deepinv_ud2m.training.updates import Update


def train(tiny_config, epochs, file=None, seed=0, workers=0, num=64, **options):
    digits = mnist_digits("validation", num=num)
    loader = DataLoader(digits, batch_size=num // 4, shuffle=True, num_workers=workers)
    options = {"checkpoint": file, "seed": seed, "device": "cpu", "verbose": False} | options
    return train_prior(tiny_config, loader, epochs, **options)


def test_a_prior_learns_to_denoise_and_is_saved(tiny_config, tmp_path):
    x = mnist_digits("test", num=16)
    psnr = [denoising_psnr(train(tiny_config, n, lr=2e-2), x, 0.3) for n in (1, 15)]
    assert psnr[1] > psnr[0] + 2
    prior = train(tiny_config, 1)
    assert not prior.training and not any(p.requires_grad for p in prior.parameters())
    save_prior(prior, tiny_config, tmp_path)
    psnr = [denoising_psnr(one, x, 0.3) for one in (prior, load_prior(tmp_path))]
    assert psnr[1] == pytest.approx(psnr[0], abs=0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_resumes_to_the_same_bits(tiny_config, tmp_path, monkeypatch, workers):
    run = partial(train, tiny_config, num=16)
    whole = run(3).state_dict()  # workers change nothing
    file = tmp_path / "checkpoint.pt"
    with monkeypatch.context() as patch:
        update, calls = Update.apply, []

        def killed(self):
            calls.append(1)
            if len(calls) == 6:  # in the second of three epochs of four batches
                raise KeyboardInterrupt
            update(self)

        patch.setattr(Update, "apply", killed)
        with pytest.raises(KeyboardInterrupt):
            run(3, file, workers=workers)
    assert read_checkpoint(file)["epoch"] == 1
    resumed = run(3, file, workers=workers).state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    with pytest.raises(ValueError, match=r"its lr is 0\.002, here it is 0\.1"):
        run(3, file, lr=0.1)
    file.write_bytes(content := file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be resumed from: .* Delete it"):
        run(3, file)
    assert file.read_bytes() == content
    other = run(3, seed=1).state_dict()
    assert not all(torch.equal(value, other[key]) for key, value in whole.items())


def test_the_levels_of_training():
    """Nine in ten about the median, by a factor of exp(1.4) above or below; the others anywhere."""
    torch.manual_seed(0)
    sigmas = training_sigmas(40_000, 0.25, 0.002, 80.0)
    assert sigmas.min() >= 0.002 and sigmas.max() <= 80
    z, decades = (sigmas / 0.25).log() / 1.4, math.log(80 / 0.002) / 1.4
    # Shares of the normal law, 0.6827 and 0.4207, and of the uniform one; five standard errors are 0.012.
    share = (z.abs() < 1).float().mean().item()
    assert share == pytest.approx(0.9 * 0.6827 + 0.1 * 2 / decades, abs=0.012)
    above = 0.1 * (math.log(80 / 0.25) / 1.4 - 0.2) / decades
    assert (z > 0.2).float().mean().item() == pytest.approx(0.9 * 0.4207 + above, abs=0.012)


def test_the_loss_weighs_all_levels_alike():
    """For white pixels, the best denoiser has the same loss at every level."""
    torch.manual_seed(0)
    sigma, std = torch.tensor([0.01, 0.3, 10.0]).repeat_interleave(200), 0.5
    x = std * torch.randn(600, 1, 16, 16)
    w = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
    best = w * (std**2 / (std**2 + sigma**2)).reshape(-1, 1, 1, 1)
    losses = edm_loss(best, x, sigma, std).reshape(3, 200).mean(1)
    torch.testing.assert_close(losses, torch.ones(3), rtol=0.02, atol=0)


def test_a_prior_that_diverges_is_told(tiny_config):
    loader = DataLoader(torch.full((40, 1, 32, 32), torch.nan), batch_size=2)
    with pytest.raises(RuntimeError, match="not finite in 10 steps in a row, up to step 9"):
        train_prior(tiny_config, loader, 1, device="cpu", verbose=False)


def test_one_run_per_folder(tiny_config, tmp_path):
    with lock(tmp_path), pytest.raises(RuntimeError, match="another training run is using the folder"):
        train(tiny_config, 1, tmp_path / "checkpoint.pt")
