"""Bad inputs are refused at the door. They are data, in bad_inputs.txt: calls that a user may write."""

import copy
import itertools
import json
import shutil
import socket
import traceback
from pathlib import Path

import deepinv as dinv
import numpy as np
import pytest
import torch
from conftest import make_tiny_config, make_tiny_prior, trained_sampler
from deepinv.models import Denoiser
from PIL import Image

import deepinv_ud2m
from deepinv_ud2m import *  # noqa: F403 (names of the data)
from deepinv_ud2m.cli import main
from deepinv_ud2m.data import *  # noqa: F403
from deepinv_ud2m.metrics import *  # noqa: F403
from deepinv_ud2m.photographs import physics_of, read_kernel, read_photograph  # noqa: F401
from deepinv_ud2m.physics import *  # noqa: F403
from deepinv_ud2m.pictures import write_png  # noqa: F401
from deepinv_ud2m.priors import PriorInfo, build_network, load_prior, save_prior  # noqa: F401
from deepinv_ud2m.problem import Problem
from deepinv_ud2m.proximal import posterior_prox
from deepinv_ud2m.sampler import UD2M
from deepinv_ud2m.training import *  # noqa: F403
from deepinv_ud2m.training import distill
from deepinv_ud2m.uncertainty import *  # noqa: F403
from deepinv_ud2m.unfolded import UnfoldedDenoiser

LINES = [line.split(" => ") for line in (Path(__file__).parent / "bad_inputs.txt").read_text().splitlines()
         if line and not line.startswith("#")]  # fmt: skip
PACKAGE = str(Path(deepinv_ud2m.__file__).parent)


class Called(BaseException):
    """A network was called, or the internet."""


class Prior(Denoiser):
    """A prior on grey images whose sides are multiples of 4."""

    prior_info = PriorInfo("untouchable", channels=1, sigma_min=0.01, sigma_max=50.0, size_multiple=4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the names in the data are: files, and short ways to make things."""
    tmp_path = tmp_path_factory.mktemp("files")
    tiny_prior, tiny_config = make_tiny_prior(), make_tiny_config()
    tiny_folder, edits = tmp_path / "tiny", itertools.count()
    save_prior(tiny_prior, tiny_config, tiny_folder)
    for name in ("empty", "images", "damaged"):
        (tmp_path / name).mkdir()
    picture = Image.fromarray((np.arange(40 * 40 * 3) % 251).astype(np.uint8).reshape(40, 40, 3))
    for name in ("photo.png", "photo.jpg", "images/a.png", "images/b.png"):
        picture.save(tmp_path / name)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for cut in ("cut.png", "damaged/cut.png", "cut.jpg"):
        whole = (tmp_path / "photo").with_suffix(cut[-4:]).read_bytes()
        (tmp_path / cut).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.png").write_bytes(bytes(range(256)))
    (tmp_path / "file.txt").write_text("no image, and no folder")
    prior = copy.deepcopy(tiny_prior)
    trained_sampler(prior).save_pretrained(tmp_path / "sampler", prior=str(tiny_folder))

    def edited(folder, **changes):
        """A copy of a stored network with other values in its config.json."""
        out = shutil.copytree(folder, tmp_path / f"edited {next(edits)}")
        config = json.loads((out / "config.json").read_text())
        for keys, value in changes.items():
            *parents, last = keys.split("__")
            inner = config
            for key in parents:
                inner = inner[key]
            if not parents and last not in config:
                inner = config["prior"]
            inner[last] = value
        (out / "config.json").write_text(json.dumps(config))
        return out

    def cli(*arguments):
        """The command line; what it prints as an error becomes one."""
        capsys = names["capsys"]
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        if code:
            error = ValueError(capsys.readouterr().err)
            error.told = True
            raise error

    def noise(sigma=0.1):
        return dinv.physics.Denoising(dinv.physics.GaussianNoise(sigma))

    def unfolded(**arguments):
        return UnfoldedDenoiser(**{"denoiser": Prior(), **arguments})

    y = torch.full((1, 1, 16, 16), 0.5)

    def prox(x=y, x_s=y, sigma=0.5, rho=1.0, **options):
        return posterior_prox(Problem(y, noise()), x, x_s, sigma, rho, **options)

    def train(**arguments):
        images = torch.rand(40, 1, 16, 16)
        recipe = {"recipe": Recipe.read("default", tasks=["deblur-gaussian"])}  # noqa: F405
        given = {"prior": tiny_prior, "physics": None, "images": images, "save_path": tmp_path / "run"}
        return distill(**given | recipe | arguments)

    stage = {"stage": "single", "steps": 1, "batch_size": 2, "size": 16}
    names = {**globals(), "here": tmp_path, "PRIOR": tiny_folder, "SAMPLER": tmp_path / "sampler"}
    names |= {"edited": edited, "cli": cli, "noise": noise, "unfolded": unfolded}
    names |= {"prox": prox, "train": train}
    names |= {"tiny": tiny_prior, "tiny_config": tiny_config, "prior": Prior(), "model": UD2M(unfolded())}
    names |= {"Y": y, "S": y.expand(4, 1, -1, -1, -1), "nan": float("nan"), "inf": float("inf")}
    names |= {"sized": Recipe.read("default", stages=[stage], tasks=["deblur-gaussian"])}  # noqa: F405
    names |= {"mask": lambda size=16: dinv.physics.Inpainting((1, size, size), mask=0.5)}
    names |= {"sampler": lambda **arguments: UD2M(**{"unfolded": unfolded(), **arguments})}
    return names


@pytest.fixture
def nothing_is_called(monkeypatch):
    """Neither a denoiser nor the internet."""

    def called(*arguments, **keywords):
        raise Called

    def check(module, _):
        if isinstance(module, Denoiser):
            raise Called

    monkeypatch.setattr(socket.socket, "connect", called)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(check)
    yield
    hook.remove()


@pytest.mark.usefixtures("nothing_is_called")
@pytest.mark.parametrize("call, message", LINES, ids=[call for call, _ in LINES])
def test_bad_inputs(call, message, names, capsys, monkeypatch):
    names["capsys"] = capsys
    monkeypatch.chdir(names["here"])
    before = {file for file in names["here"].rglob("*") if "edited" not in str(file)}
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as raised:
        eval(call, names)
    last = traceback.extract_tb(raised.value.__traceback__)[-1].filename
    told = isinstance(raised.value, FileNotFoundError) or hasattr(raised.value, "told")
    assert told or last.startswith(PACKAGE), f"raised by {last}"
    left = {file for file in names["here"].rglob("*") if "edited" not in str(file)} - before
    assert not {file for file in left if file.is_file()}, "it wrote files"


def test_there_are_many():
    assert len({call for call, _ in LINES}) == len(LINES) >= 200
