"""Running what is in ``examples/``: scripts in this process, which has imported everything already."""

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from deepinv_ud2m.training import Recipe, Stage

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments) -> str:
    """What ``python examples/<script> <arguments>`` prints, and the message it stops with."""
    file, printed = EXAMPLES / script, io.StringIO()
    with (
        patch.object(sys, "argv", [str(file), *map(str, arguments)]),
        patch.object(sys, "path", [str(file.parent), *sys.path]),
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as stop:
            print(f"stopped: {stop.code}")
    return printed.getvalue()


def miniature(file, **changes):
    """A recipe with one or two steps a stage, without networks that are packages of their own."""
    recipe = Recipe.read(EXAMPLES / "recipes" / file)
    size = None if file == "mnist.yaml" else 32
    recipe.stages = [Stage(s, 2, 2, size) for s in ("initial", "single", "end_to_end")]
    small = {"evaluations": 2, "validation_images": 2, "validation_samples": 2, "factors": [0.8, 1.0]}
    small["losses"] = [loss for loss in recipe.losses if "features" not in loss]
    for name, value in {**small, **changes}.items():
        setattr(recipe, name, value)
    return recipe
