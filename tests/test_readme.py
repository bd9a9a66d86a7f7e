"""What the README says is what the stored results and the package say."""

import doctest
import gzip
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import deepinv_ud2m
from deepinv_ud2m.benchmark.readme import FILES, PARTS, updated
from deepinv_ud2m.benchmark.report import summarise
from deepinv_ud2m.benchmark.run import PACKED_ROWS
from deepinv_ud2m.data import mnist_digits
from deepinv_ud2m.metrics import DigitClassifier

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(deepinv_ud2m.__file__).parent / "benchmark" / "results"
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(deepinv_ud2m.__path__, "deepinv_ud2m.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", FILES)
def test_measured_figures_are_those_of_the_stored_results(name):
    text = README.with_name(name).read_text()
    assert updated(text) == text


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob(f"*/{PACKED_ROWS}")))
def test_stored_summaries_are_those_of_the_stored_rows(folder):
    stored = json.loads((RESULTS / folder / "summary.json").read_text())["lines"]
    elsewhere = {"seconds", "peak_memory_gb"}  # from the timings
    packed = (RESULTS / folder / PACKED_ROWS).read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    lines = summarise(rows, DigitClassifier.from_pretrained().features(mnist_digits("test")).double())
    assert len(lines) == len(stored) > 0
    for line, expected in zip(lines, stored, strict=True):
        assert line.keys() - elsewhere == expected.keys() - elsewhere
        for key in line.keys() - elsewhere:
            wanted = expected[key]
            if isinstance(wanted, float):
                # The features of the reference images are computed here, rounded as this machine does.
                tolerance = 1e-3 if key.startswith("frechet") else 1e-9
                wanted = pytest.approx(wanted, rel=tolerance, abs=tolerance)
            assert line[key] == wanted, key


def test_each_part_stands_in_one_file():
    texts = [README.with_name(name).read_text() for name in FILES]
    for part in PARTS:
        assert sum(text.count(f"<!-- {part} -->") for text in texts) == 1, part
        assert sum(text.count(f"<!-- /{part} -->") for text in texts) == 1, part


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "9.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_linked_exist(name):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README.with_name(name).read_text())
    for link in (link for link in links if not link.startswith("http")):
        assert (README.parent / link).is_file(), link


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert results.failed == 0
