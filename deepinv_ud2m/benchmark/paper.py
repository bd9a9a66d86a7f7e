r"""Tables 1 and 2 of the paper (Mbakam et al. 2025), measured with one's own copy of its data and networks.

The images are reduced until their shorter side has 256 pixels, and cut to the square in the middle. Each
method draws one sample per image; PSNR, SSIM and LPIPS are means over images, and the FID is that of all
samples to all images, in the 2048 features of the Inception network. Rows are stored as by ``benchmark run``:
an interrupted run goes on, and processes of ``torchrun`` share it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from torch import Tensor

from deepinv_ud2m.benchmark.methods import Entry, Search
from deepinv_ud2m.benchmark.report import stored_arrays
from deepinv_ud2m.benchmark.rows import read_rows
from deepinv_ud2m.benchmark.run import Study, run, synchronize
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.counting import peak_gb
from deepinv_ud2m.data.crops import ResizedCrops
from deepinv_ud2m.files import cached_download, read_weights, write_file
from deepinv_ud2m.metrics import PerceptualDistance, gaussian_frechet
from deepinv_ud2m.metrics.frechet import gaussian_fit
from deepinv_ud2m.priors import load_prior, random_prior

#: Figures of the paper: PSNR (dB), LPIPS and FID by method and task.
Figures = dict[str, dict[str, tuple[float, float, float]]]

_GAUSSIAN, _UNIFORM, _SR = "deblur-gaussian-paper", "deblur-uniform-paper", "sr4-bicubic"
_BOX, _RANDOM = "inpaint-box-paper", "inpaint-random-paper"


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    prior: str  #: name of the prior
    data: str  #: what the images are
    images: int  #: their number
    sigma_y: float  #: noise level
    tasks: tuple[str, ...]
    figures: Figures  #: what the paper says, with the evaluations in the names of the methods


#: The tables by number.
TABLES = {
    1: Table(
        "imagenet256",
        "the validation set of ImageNet",
        1500,
        0.01,
        (_GAUSSIAN, _UNIFORM, _SR, "jpeg-10"),
        {
            "UD2M without RAM, 9": {
                _GAUSSIAN: (38.77, 0.02, 4.61),
                _UNIFORM: (35.57, 0.02, 11.14),
                _SR: (24.42, 0.15, 20.69),
                "jpeg-10": (27.52, 0.18, 35.16),
            },
            "UD2M with RAM, 12": {
                _GAUSSIAN: (35.97, 0.01, 3.30),
                _UNIFORM: (36.96, 0.01, 2.69),
                _SR: (26.70, 0.08, 11.9),
            },
            "CDDB, 1000": {
                _GAUSSIAN: (37.02, 0.06, 5.01),
                _UNIFORM: (31.26, 0.19, 23.15),
                _SR: (26.41, 0.20, 19.88),
                "jpeg-10": (26.34, 0.26, 19.48),
            },
            "I2SB, 1000": {
                _GAUSSIAN: (36.01, 0.07, 5.8),
                _UNIFORM: (30.75, 0.20, 23.01),
                _SR: (25.22, 0.26, 24.13),
                "jpeg-10": (26.12, 0.27, 20.35),
            },
            "DiffPIR, 100": {
                _GAUSSIAN: (28.10, 0.13, 21.53),
                _UNIFORM: (31.44, 0.10, 20.20),
                _SR: (20.39, 0.36, 70.45),
            },
            "DDRM, 20": {
                _GAUSSIAN: (36.73, 0.07, 4.34),
                _UNIFORM: (29.21, 0.21, 19.97),
                _SR: (26.05, 0.27, 46.49),
                "jpeg-10": (26.33, 0.33, 47.02),
            },
        },
    ),
    2: Table(
        "lsun-bedroom256",
        "the validation set of LSUN Bedroom",
        300,
        0.025,
        (_BOX, _RANDOM, _GAUSSIAN, _SR),
        {
            "UD2M without RAM, 9 (box 20)": {
                _BOX: (22.22, 0.11, 8.45),
                _RANDOM: (22.32, 0.19, 43.3),
                _GAUSSIAN: (26.73, 0.26, 88.97),
                _SR: (24.51, 0.19, 32.71),
            },
            "UD2M with RAM, 12": {
                _RANDOM: (27.75, 0.06, 8.61),
                _GAUSSIAN: (29.67, 0.08, 13.23),
                _SR: (25.48, 0.12, 19.48),
            },
            "CoSIGN, 2": {
                _BOX: (22.61, 0.14, 38.64),
                _RANDOM: (23.22, 0.37, float("nan")),
                _GAUSSIAN: (19.74, 0.342, float("nan")),
                _SR: (26.13, 0.22, 40.84),
            },
            "DiffPIR, 100": {
                _BOX: (13.42, 0.34, 66.79),
                _RANDOM: (23.8, 0.36, 97.69),
                _GAUSSIAN: (27.48, 0.32, 64.81),
                _SR: (23.83, 0.45, 101.92),
            },
            "DDRM, 20": {
                _BOX: (18.90, 0.22, 51.50),
                _RANDOM: (19.16, 0.55, float("nan")),
                _GAUSSIAN: (28.94, 0.22, float("nan")),
                _SR: (25.09, 0.37, float("nan")),
            },
            "CM4IR, 4": {
                _BOX: (21.98, 0.24, 42.83),
                _RANDOM: (25.28, 0.33, 159.43),
                _GAUSSIAN: (29.00, 0.21, 53.19),
                _SR: (26.14, 0.30, 124.22),
            },
        },
    ),
}

#: Gradients of the network in each step. Moment matching takes them in conjugate gradients, about five.
_GRADIENTS = {"dps": 1, "pigdm": 1, "moment-matching": 5}

_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


def inception_features(
    download: bool = False, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """
    The features of the FID: 2048 of the Inception network of torch-fidelity.

    :param bool download: allow its weights to be downloaded into the cache of torch.hub (default: ``False``).
    :param torch.device, str device: where to compute.
    :returns: a function of images `[N, 3, H, W]` in [0, 1] that gives features `[N, 2048]`.
    :raises ImportError: without torch-fidelity.
    :raises FileNotFoundError: if the weights are not here; it says where they are, and where to put them.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("the FID needs torch-fidelity: pip install torch-fidelity") from error
    needs = "the FID needs the weights of Inception"
    file = cached_download(_INCEPTION_URL, needs, "95 MB", "give --download", download, "6726825d")
    # torch-fidelity unpickles what it loads. It gets a copy of the tensors alone.
    with tempfile.NamedTemporaryFile(suffix=".pth") as copy:
        torch.save(read_weights(file), copy.name)
        options = {"feature_extractor_weights_path": copy.name}
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], **options).to(device)
    return lambda x: network((255 * x).round().to(torch.uint8))[0]


def make_study(
    table: int,
    images: str | Path,
    methods: Sequence[Entry],
    *,
    number: int | None = None,
    weights: str | Path | None = None,
    settings: Sequence[str] = (),
    perceptual: str = "lpips-vgg",
    download: bool = False,
    smoke: bool = False,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    missing: list[str] | None = None,
) -> Study:
    """
    What a table of the paper compares.

    :param int table: 1 or 2.
    :param str, pathlib.Path images: folder of images, subfolders included; taken evenly by their names.
    :param Sequence[Entry] methods: the methods, see :func:`deepinv_ud2m.benchmark.methods.read_methods`.
    :param int, None number: how many images (default: as many as the paper, or all there are).
    :param str, pathlib.Path, None weights: of the prior, see :func:`deepinv_ud2m.load_prior`.
    :param Sequence[str] settings: files of ``tune``, searched for the perceptual distance.
    :param str perceptual: network of LPIPS (default: VGG16).
    :param bool download: allow weights to be downloaded that are not here (default: ``False``).
    :param bool smoke: small networks with random weights, on images of 32x32 pixels (default: ``False``).
    :param int batch_size: images at a time (default: 1).
    :param torch.device, str device: where to run.
    :param list[str], None missing: gets a message of all that is not here, which random weights stand in for
        (default: ``None``, an error).
    :returns: the study.
    :raises ValueError, FileNotFoundError, RuntimeError: for what is missing or does not fit; it is named.
    """
    if table not in TABLES:
        raise ValueError(f"table must be one of {[*TABLES]}, got {table!r}")
    card = TABLES[table]

    def get(load: Callable, stand_in: Callable) -> Any:
        if not smoke:
            try:
                return load()
            except (OSError, RuntimeError, ImportError) as error:
                if missing is None:
                    raise
                missing.append(str(error))
        with torch.random.fork_rng(devices=[]):  # the same random weights when a run goes on
            torch.manual_seed(0)
            return stand_in()

    options: dict[str, Any] = {"device": device, "download": download}
    prior = get(
        lambda: load_prior(card.prior, weights=weights, download=download),
        lambda: random_prior(card.prior, full_size=not smoke),
    )
    metric = get(
        lambda: PerceptualDistance(perceptual, **options),
        lambda: PerceptualDistance(perceptual, random=True, device=device),
    )
    features = get(lambda: inception_features(**options), lambda: _pixels)
    size = 32 if smoke else 256
    crops = ResizedCrops(images, size, 1)
    count = len(crops.indices)
    if number is not None and number > count:
        raise ValueError(f"number must be at most {count}, the images of {images}, got {number}")
    number = min(card.images if number is None else check_count("number", number), count)
    x = torch.stack([crops.centre(i * count // number) for i in range(number)]).to(device)
    options = {"batch_size": batch_size, "metric": metric, "features": features}
    options |= {"search": Search(settings, "perceptual"), "names": {"prior": card.prior, "data": str(images)}}
    return Study(prior.to(device).eval(), x, card.tasks, methods, card.sigma_y, **options)


def _pixels(x: Tensor) -> Tensor:
    """Stand-in features: the pixels of an image of 4x4."""
    return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def measure_table(folder: str | Path, table: int, study: Study) -> pd.DataFrame:
    """
    Run a study of :func:`make_study`, and write ``paper.csv`` and ``paper.md``, beside the paper's figures.

    :param str, pathlib.Path folder: folder of the results.
    :param int table: 1 or 2.
    :param Study study: what to compare.
    :returns: PSNR, SSIM, LPIPS and FID by task and method; nothing but in the first of several processes.
    """
    run(folder, study)
    if not PartialState().is_main_process:  # it alone has stored the rows of all
        return pd.DataFrame()
    folder, lines = Path(folder), []
    rows = read_rows(folder)
    with np.load(folder / "reference.npz") as arrays:
        reference = torch.from_numpy(arrays["features"]).double()
    for (task, method), group in rows.groupby(["task", "method"], sort=False):
        stored = stored_arrays(folder, task, method, "features")
        features = torch.from_numpy(np.stack([stored[i] for i in group["image"]])).double()
        line = {"task": task, "method": method, "images": len(group), "NFE": group["nfe"].mean()}
        line |= {"PSNR": group["psnr"].mean(), "PSNR_se": group["psnr"].sem()}
        line |= {"SSIM": group["ssim"].mean(), "SSIM_se": group["ssim"].sem()}
        line |= {"LPIPS": group["perceptual"].mean(), "LPIPS_se": group["perceptual"].sem()}
        line["FID"] = gaussian_frechet(*gaussian_fit(features), *gaussian_fit(reference)).item()
        line["seconds"] = group["seconds"].median()
        line |= group.iloc[0][["criterion", "searched_on"]].to_dict()
        lines.append(line)
    lines = pd.DataFrame(lines)
    write_file(folder / "paper.csv", lines.to_csv(index=False, float_format="%.5g"))
    write_file(folder / "paper.md", _markdown(table, study, lines))
    return lines


def _markdown(table: int, study: Study, lines: pd.DataFrame) -> str:
    card, network = TABLES[table], study.metric.network if study.metric else "none"
    shown: dict[str, dict[str, str]] = {}
    for line in lines.to_dict("records"):
        searched = f"searched for {line['criterion']}, {line['searched_on']} images"
        settings = searched if line["criterion"] else "settings not searched"
        title = f"{line['method']}, {line['NFE']:.0f} ({settings})"
        digits = {"PSNR": 2, "SSIM": 3, "LPIPS": 3}
        values = [f"{line[key]:.{d}f} ± {line[f'{key}_se']:.{d}f}" for key, d in digits.items()]
        cell = " / ".join([*values, f"{line['FID']:.2f}", f"{line['seconds']:.3g}"]).replace("nan", "-")
        shown.setdefault(title, {})[line["task"]] = cell
    for method, figures in card.figures.items():
        of_paper = {t: " / ".join(f"{v:.2f}" for v in values) for t, values in figures.items()}
        shown[f"*paper:* {method}"] = {t: text.replace("nan", "-") for t, text in of_paper.items()}
    head = ["method, network evaluations", *card.tasks]
    rows = [head, ["---"] * len(head)]
    rows += [[title, *(cells.get(task, "") for task in card.tasks)] for title, cells in shown.items()]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"# Table {table} of the paper\n\nPSNR (dB) / SSIM / LPIPS / FID / seconds of one sample of each of "
        f"{len(study.x)} images of {study.names['data']} (the paper: {card.images} of {card.data}), noise "
        f"{card.sigma_y:g}; means ± standard errors, median of the seconds. Lines of the paper: PSNR / "
        f"LPIPS / FID. LPIPS by {network}, FID by Inception. Settings that were searched for the perceptual "
        f"distance need not be the best for FID. PSNR of one sample ranks no sampler: a true draw of the "
        f"posterior lies up to 3 dB below its mean.\n\n{text}\n"
    )


def plan(table: int, study: Study) -> str:
    """
    What a run would take, from one pass of the network forward and one with a gradient, measured here.

    :param int table: 1 or 2.
    :param Study study: what to compare.
    :returns: a text of lines.
    """
    x = study.x[: study.batch_size]
    sigma, parts = torch.full((len(x),), 0.1, device=x.device), []
    for needs_gradient in (False, True):
        peak_gb(x.device)
        start = time.perf_counter()
        with torch.set_grad_enabled(needs_gradient), study.precision():
            out = study.prior(x.clone().requires_grad_(needs_gradient), sigma)
            if needs_gradient:
                out.sum().backward()
        synchronize(x)
        parts.append(((time.perf_counter() - start) / len(x), peak_gb(x.device)))
    size = f"{x.shape[-1]}x{x.shape[-2]}"
    lines = [f"table {table}: {len(study.x)} images of {size} pixels, {len(study.tasks)} tasks"]
    for name, (seconds, memory) in zip(("evaluation", "with its gradient"), parts, strict=True):
        lines.append(f"network, {name}: {seconds:.3g} s an image, {memory:.1f} GiB at its peak")
    total = 0.0
    for task, _, entry in study:
        settings = entry.resolve(study.search.best(task, entry)[0])
        sampler = entry.method.build(study.prior, study.sigma_y, **settings)
        # Those of deepinv say their steps, one evaluation each; DPS and its kind take gradients as well.
        steps = getattr(sampler, "evaluations", settings.get("num_steps", 1))
        (forward, _), (both, _) = parts
        seconds = steps * (forward + _GRADIENTS.get(entry.name, 0) * (both - forward)) * len(study.x)
        total += seconds
        lines.append(f"{task}, {entry.label}: {steps} evaluations, about {seconds / 3600:.2g} hours")
    return "\n".join([*lines, f"all: about {total / 3600:.2g} hours by one process"])
