"""Releases: links of README on PyPI, versions that agree, workflows and forms that can be read."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepinv_ud2m import __version__

ROOT = Path(__file__).parents[1]
absolute = runpy.run_path(str(ROOT / ".ci" / "absolute_links.py"))["absolute"]
REPOSITORY = "https://github.com/user/repository"


def test_readme_has_no_relative_link_on_pypi(tmp_path):
    """The command runs on a copy of the tracked files, as .ci/wheel has one."""
    for entry in ROOT.iterdir():
        if entry.name != "README.md":
            (tmp_path / entry.name).symlink_to(entry)
    readme = tmp_path / "README.md"
    readme.write_bytes((ROOT / "README.md").read_bytes())
    command = [sys.executable, ROOT / ".ci" / "absolute_links.py", readme, REPOSITORY, "v1.0"]
    subprocess.run(command, check=True)
    text = readme.read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) == (ROOT / "README.md").read_text().count("](") > 5
    assert [link for link in links if not link.startswith("https://")] == []
    assert not re.search(
        r"""(src|href)=["'](?!https://)|^\[[^\]]+\]: *(?!https://)""", text, flags=re.MULTILINE
    )
    expected = [
        "/raw/v1.0/examples/figures/photo_motion_deblurring.webp",
        "/tree/v1.0/examples",
        "/blob/v1.0/CONTRIBUTING.md#map-of-the-code",
    ]
    assert {REPOSITORY + path for path in expected} <= set(links)


def test_the_check_of_the_site_finds_what_leads_nowhere(tmp_path):
    broken = runpy.run_path(str(ROOT / ".ci" / "links.py"))["broken"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<a href="../a.html#here"></a><h1 id="there"></h1>')
    (tmp_path / "a.html").write_text(
        '<a id="here" href="https://x.y/z"></a><a href="b#there"></a><a href="#here"></a>'
        '<img src="c%20d.png"><a href="b/#gone"></a><a href="e.html"></a><a href="mailto:f@g.h"></a>'
    )
    assert broken(tmp_path) == ["a.html: c%20d.png", "a.html: b/#gone", "a.html: e.html"]
    (tmp_path / "c d.png").write_bytes(b"")
    assert "a.html: c%20d.png" not in broken(tmp_path)


def test_links_that_are_left_alone_and_links_that_lead_nowhere():
    text = "[a](https://b.c/d) [e](#f) [g](mailto:h@i.j) `k[0](l m)`"
    assert absolute(text, ROOT, REPOSITORY, "main") == text
    assert absolute("[a](docs)", ROOT, f"{REPOSITORY}/", "main") == f"[a]({REPOSITORY}/tree/main/docs)"
    with pytest.raises(ValueError, match=r"leads to nothing\.md, which does not exist"):
        absolute("[a](nothing.md#b)", ROOT, REPOSITORY, "main")


def test_another_tag_than_the_version_is_refused():
    result = subprocess.run(["bash", ROOT / ".ci" / "wheel", "v0.0"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"The tag is v0.0, but __about__.py says {__version__}." in result.stderr


def test_the_citation_is_of_this_version_and_of_the_paper_in_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    paper, readme = citation["preferred-citation"], " ".join((ROOT / "README.md").read_text().split())
    assert paper["title"].lower() in readme.lower()
    assert f"{paper['journal']}, {paper['year']}" in readme
    assert f"]({paper['url']})" in readme
    names = [author["family-names"] for author in paper["authors"]]
    assert f"{names[0]}, {names[1]} & {names[2]}" in readme


def test_ruff_has_one_version():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = (repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit"))
    for file in ("constraints.txt", "oldest.txt"):
        assert f"ruff=={hook.removeprefix('v')}" in (ROOT / ".ci" / file).read_text().split()


@pytest.mark.parametrize("file", sorted(ROOT.glob(".github/**/*.yml")), ids=lambda file: file.name)
def test_files_of_github_can_be_read(file):
    """And the files and environments that workflows name are there."""
    content = yaml.safe_load(file.read_text())
    if file.parent.name == "workflows":
        assert content["permissions"]["contents"] == "read"
        for job in content["jobs"].values():
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
        for script in re.findall(r"\.ci/\w+(?:\.txt)?", file.read_text()):
            assert (ROOT / script).is_file(), script
