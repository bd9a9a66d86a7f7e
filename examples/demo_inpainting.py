r"""
Inpainting of digits: where the posterior is certain, and where it is not
=========================================================================

Of a digit only a part is seen: 30 % of the pixels, at random, or all but a box in the middle,

.. math:: y = M x + \sigma_y n, \qquad \sigma_y = 0.05 .

With pixels missing at random, the neighbours tell what is missing, and samples of the posterior agree.
Behind a box they do not: samples differ there, and only there, which is what their standard deviation
shows. One distilled sampler does both; nothing in it knows of masks.
"""

# %%
from pathlib import Path

import deepinv as dinv
import torch

from deepinv_ud2m import UD2M
from deepinv_ud2m.data import mnist_digits

OUT = Path(__file__).parent / "output"
OUT.mkdir(exist_ok=True)
generator = torch.Generator().manual_seed(0)
x = mnist_digits("test", num=4)

# %%
# Two physics, one sampler. Any other mask goes in the same way.
shape = (1, 32, 32)
random_mask = (torch.rand(1, *shape, generator=generator) < 0.3).float()
box_mask = torch.ones(1, *shape)
box_mask[..., 8:24, 8:24] = 0
noise = dinv.physics.GaussianNoise(0.05, rng=generator)
problems = {
    "random": dinv.physics.Inpainting(shape, mask=random_mask, noise_model=noise),
    "box": dinv.physics.Inpainting(shape, mask=box_mask, noise_model=noise),
}
model = UD2M.from_pretrained("mnist")

# %%
# Sixteen samples of each digit, drawn together; their mean and standard deviation.
psnr = dinv.metric.PSNR()
for name, physics in problems.items():
    y = physics(x)
    samples = model.sample(y, physics, num_samples=16, generator=generator)
    mean, std = samples.mean(0), samples.std(0)
    print(
        f"{name}: PSNR of a sample {psnr(samples[0], x).mean():.2f} dB, of the mean of 16 "
        f"{psnr(mean, x).mean():.2f} dB, {model.nfe:.0f} network evaluations per sample"
    )
    columns = {"measurement": y.clamp(0, 1), "truth": x}
    columns |= {f"sample {i + 1}": samples[i] for i in range(4)}
    columns |= {"mean": mean, "std (0 to 0.5)": (2 * std).clamp(0, 1)}
    dinv.utils.plot(
        columns,
        rescale_mode="clip",
        show=False,
        save_fn=OUT / f"inpainting_{name}.png",
        figsize=(1.3 * len(columns), 1.4 * len(x)),
        fontsize=9,
        dpi=100,
    )
    print(f"saved {OUT / f'inpainting_{name}.png'}")
