"""What the README and the docstrings say works."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import deepinv_ud2m

ROOT = Path(__file__).parents[1]
TEXTS = sorted(str(file.relative_to(ROOT)) for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PACKAGES = pkgutil.walk_packages(deepinv_ud2m.__path__, "deepinv_ud2m.")
MODULES = sorted(module.name for module in PACKAGES if not module.name.endswith("__main__"))


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "9.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_linked_exist(name):
    text = ROOT / name
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text.read_text())
    for link in (link for link in links if not link.startswith(("http", "data:"))):
        assert (text.parent / link).exists(), link


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert results.failed == 0
