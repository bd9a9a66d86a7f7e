"""What the gallery needs besides settings: the order of the scripts, and the figures that they save."""

import time
from pathlib import Path

from PIL import Image
from sphinx_gallery.scrapers import figure_rst

OUTPUT = Path(__file__).parents[1] / "examples" / "output"
ORDER = [
    *("photo_motion_deblurring", "photo_gaussian_deblurring", "photo_uniform_deblurring"),
    *("photo_superresolution", "photo_random_inpainting", "photo_box_inpainting", "photo_jpeg"),
    *("full_photo", "real_photographs", "uncertainty", "any_physics", "scan_ct", "scan_mri", "microscopy"),
    *("digits_superresolution", "digits_inpainting", "digits_deblurring", "exact_posterior"),
    *("benchmark", "in_deepinv", "your_prior", "your_training"),
]
_shown = {}
_start = time.time()


class Position:
    """Place of a script in the gallery; new ones come last."""

    def __init__(self, src_dir):
        pass

    def __call__(self, file):
        """Its number."""
        name = Path(file).stem
        return ORDER.index(name) if name in ORDER else len(ORDER)

    def __repr__(self):
        return "<Position>"


def saved_figures(block, block_vars, gallery_conf):
    """A scraper: shows the figures that a block of a script has saved in ``examples/output``."""
    found = []
    for file in sorted(OUTPUT.glob("*.webp")):
        written = file.stat().st_mtime
        if written >= _start and _shown.get(file) != written:
            _shown[file] = written
            found.append(next(block_vars["image_path_iterator"]))
            Image.open(file).convert("RGB").save(found[-1])
    return figure_rst(found, gallery_conf["src_dir"])
