r"""
Restoration of a JPEG
=====================

A photograph is saved as a JPEG of quality 10. The coder rounds coefficients Cx of blocks of 8 x 8 pixels
to multiples of the steps q of its table,

.. math:: y = C^{-1} \left( q \odot \operatorname{round} (Cx / q) \right) ,

so the coefficients of x are known up to half a step, and the posterior has its samples in that box.

UD2M draws samples of the posterior, with nine network evaluations each: what the measurement determines
is the same in all of them, what it leaves open differs. Beside it are deepinv's DiffPIR, with the same
prior and 100 evaluations, and the pseudo-inverse.
"""

# %%
from pathlib import Path

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.benchmark.comparison import compare
from deepinv_ud2m.benchmark.tune import shipped_settings
from deepinv_ud2m.data import photograph
from deepinv_ud2m.physics import JPEG

OUT = Path(__file__).parent / "output"

# %%
# The problem. Any image will do: ``load_images("photo.jpg", channels=3, size=256)`` reads its centre,
# ``load_image("photo.jpg", channels=3)`` the whole. A file that is a JPEG already, to be restored as it
# is: ``y, physics = JPEG.read("photo.jpg")`` and ``model(y, physics)``.
x = photograph("chelsea")
physics = JPEG(x.shape[1:], quality=10)
y = physics(x)

# %%
# The sampler that ships, for all degradations at once, 8 samples.
model = UD2M.from_pretrained("photos")
# DiffPIR has the settings that were best on other photographs.
diffpir = shipped_settings("photos", "jpeg-10", "diffpir")
comparison = compare(x, y, physics, model, load_prior("photos"), num_samples=8, **diffpir)
print(comparison)

# %%
# The figure: the whole image, and its centre enlarged.
comparison.plot(OUT / "photo_jpeg.png")
print(f"saved {OUT / 'photo_jpeg.png'}")
