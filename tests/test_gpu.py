"""The same on a GPU as on the CPU: ``pytest -m gpu``."""

import pytest
import torch
from conftest import seeded
from deepinv.loss.metric import PSNR
from deepinv.physics import Blur, GaussianNoise
from deepinv.physics.functional import gaussian_blur

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.data import photograph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_the_prior_and_its_gradient():
    w, found = torch.rand(2, 3, 64, 64, generator=seeded()), []
    for device in ("cpu", "cuda"):
        images = w.to(device).requires_grad_()
        denoised = load_prior("photos").to(device)(images, torch.tensor([0.1, 1.0], device=device))
        denoised.square().sum().backward()
        found.append((denoised.detach().cpu(), images.grad.cpu()))
    for of_cpu, of_gpu in zip(*found, strict=True):
        assert (of_cpu - of_gpu).abs().max() < 1e-2 * of_cpu.abs().max()


def test_samples_are_as_good_and_repeat():
    x, kernel, found = photograph("chelsea")[..., 64:128, 64:128], gaussian_blur(sigma=(1.5, 1.5)), {}
    for device in ("cpu", "cuda"):
        model = UD2M.from_pretrained("photos", device=device)
        generator = torch.Generator(device).manual_seed(0)
        noise = GaussianNoise(0.025, rng=generator)
        physics = Blur(kernel.to(device), padding="valid", noise_model=noise, device=device)
        y = physics(x.to(device))
        draws = [
            model.sample(y, physics, 4, generator=torch.Generator(device).manual_seed(1)) for _ in range(2)
        ]
        assert draws[0].device.type == device and (draws[0] - draws[1]).abs().max() < 1e-3
        assert model.nfe == 9 and 0.7 < model.residual.item() < 1.5
        found[device] = PSNR()(draws[0].mean(0).cpu(), x).item()
    assert abs(found["cpu"] - found["cuda"]) < 1.5  # other random numbers
