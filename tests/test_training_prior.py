"""Training a prior: the data it is trained on, what a run learns, and that it resumes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from deepinv_ud2m.data import RandomCrops, mnist_digits, photograph
from deepinv_ud2m.priors import load_prior, save_prior
from deepinv_ud2m.training import PriorTrainer, denoising_psnr, train_prior

# -- Crops ----------------------------------------------------------------------------------------


def save_image(image, file):
    Image.fromarray((255 * image[0]).round().byte().permute(1, 2, 0).squeeze().numpy()).save(file)


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        save_image(photograph("chelsea")[..., : 128 + 32 * i, :160], tmp_path / f"{i}.png")
    return tmp_path


def test_crops_repeat_with_the_global_seed(folder):
    crops = RandomCrops(folder, 32, num=5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(torch.stack(list(crops)))
    assert drawn[0].shape == (5, 3, 32, 32)
    assert drawn[0].min() >= 0 and drawn[0].max() <= 1
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert RandomCrops(folder, 32, 5, channels=1)[0].shape == (1, 32, 32)


def test_without_reduction_a_crop_is_a_part_of_the_photograph_turned(tmp_path):
    """Every pixel of this image has a value of its own, which tells where a crop was."""
    values = torch.arange(48 * 64).reshape(48, 64)
    image = torch.stack([values // 256, values % 256, values * 0]) / 255.0
    save_image(image[None], tmp_path / "image.png")
    crops = RandomCrops(tmp_path, 8, num=300, max_scale=1)
    torch.manual_seed(0)
    corners, orientations = set(), set()
    for crop in crops:
        red, green, _ = (255 * crop).round().long()
        index = 256 * red + green
        rows, columns = index // 64, index % 64
        assert (index.unique().numel(), rows.unique().numel(), columns.unique().numel()) == (64, 8, 8)
        corners.add((rows.min().item(), columns.min().item()))
        order = index.argsort(stable=True) if index.ndim == 1 else index.flatten().argsort()
        orientations.add(tuple(order.tolist()))
    assert len(orientations) == 8, "four turns, each with its mirror image"
    rows, columns = zip(*corners, strict=True)
    assert (min(rows), max(rows)) == (0, 40) and (min(columns), max(columns)) == (0, 56)


def test_reduction_averages(tmp_path):
    """A checkerboard of single pixels becomes grey; without reduction it stays black and white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    torch.manual_seed(0)
    crops = RandomCrops(tmp_path, 32, num=50, channels=1, max_scale=8)
    assert torch.stack([crop.std() for crop in crops]).max() < 0.15
    assert RandomCrops(tmp_path, 32, num=1, channels=1, max_scale=1)[0].std() > 0.49
    assert (torch.stack([crop.mean() for crop in crops]) - 0.5).abs().max() < 0.02


def test_bad_folders(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"0\.png is 128x160 pixels, but the crops are 144x144"):
        RandomCrops(folder, 144, 1)
    with pytest.raises(ValueError, match="source must be a folder"):
        RandomCrops(tmp_path_factory.mktemp("empty"), 32, 1)
    with pytest.raises(ValueError, match="max_scale must be"):
        RandomCrops(folder, 32, 1, max_scale=0.5)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        RandomCrops(folder, 32, 1)


# -- Training -------------------------------------------------------------------------------------


def train(tiny_config, epochs, file=None, seed=0, workers=0, **options):
    digits = mnist_digits("validation", num=64)
    loader = DataLoader(digits, batch_size=16, shuffle=True, num_workers=workers)
    options = {"checkpoint": file, "seed": seed, "device": "cpu", "verbose": False} | options
    return train_prior(tiny_config, loader, epochs, **options)


def test_a_prior_learns_to_denoise_and_is_saved(tiny_config, tmp_path):
    x = mnist_digits("test", num=16)
    psnr = [denoising_psnr(train(tiny_config, n, lr=2e-2), x, 0.3) for n in (1, 15)]
    assert psnr[1] > psnr[0] + 2
    prior = train(tiny_config, 1)
    assert not prior.training and not any(p.requires_grad for p in prior.parameters())
    save_prior(prior, tiny_config, tmp_path)
    assert denoising_psnr(load_prior(tmp_path), x, 0.3) == pytest.approx(
        denoising_psnr(prior, x, 0.3), abs=0.01
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_resumes_to_the_same_bits(tiny_config, tmp_path, monkeypatch, workers):
    whole = train(tiny_config, 3).state_dict()  # workers change nothing
    file = tmp_path / "checkpoint.pt"
    step = PriorTrainer.step

    def killed(self, epoch, *args, **kwargs):
        if epoch == 1:
            raise KeyboardInterrupt
        step(self, epoch, *args, **kwargs)

    monkeypatch.setattr(PriorTrainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config, 3, file, workers=workers)
    monkeypatch.setattr(PriorTrainer, "step", step)
    resumed = train(tiny_config, 3, file, workers=workers).state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    with pytest.raises(ValueError, match=r"its lr is 0\.002, here it is 0\.1"):
        train(tiny_config, 3, file, lr=0.1)
    file.write_bytes(content := file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be resumed from: .* Delete it"):
        train(tiny_config, 3, file)
    assert file.read_bytes() == content
    other = train(tiny_config, 3, seed=1).state_dict()
    assert not all(torch.equal(value, other[key]) for key, value in whole.items())
