"""
Makes the relative links of a Markdown file absolute. PyPI shows it without the repository:

    python .ci/absolute_links.py README.md https://github.com/user/repository v0.1.0

The file is changed in place. Links to images lead to the raw files.
"""

import re
import sys
from pathlib import Path

IMAGES = {".gif", ".jpg", ".jpeg", ".png", ".svg", ".webp"}


def absolute(text: str, folder: Path, repository: str, ref: str) -> str:
    """The text of a file in ``folder``, with absolute links; ValueError for one that leads nowhere."""

    def replace(match: re.Match) -> str:
        path, hash_, anchor = match[1].partition("#")
        if not (folder / path).exists():
            raise ValueError(f"a link leads to {path}, which does not exist")
        kind = "raw" if Path(path).suffix in IMAGES else "tree" if (folder / path).is_dir() else "blob"
        return f"]({repository.rstrip('/')}/{kind}/{ref}/{path}{hash_}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", replace, text)


if __name__ == "__main__":
    file, repository, ref = Path(sys.argv[1]), *sys.argv[2:]
    file.write_text(absolute(file.read_text("utf-8"), file.parent, repository, ref), "utf-8")
