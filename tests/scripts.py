"""Running the scripts of ``examples/`` in this process, which has imported everything already."""

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

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
