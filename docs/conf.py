"""
The documentation site: ``sphinx-build -W -n docs docs/_build``.

``DOCS_GALLERY=1`` runs the examples, or those whose name holds another value of it, such as ``digits``.
``DOCS_INTERSPHINX=1`` links to the documentation of other packages, which is downloaded.
"""

import os
import sys
from pathlib import Path

from docutils import nodes

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

from deepinv_ud2m import __version__  # noqa: E402

project = "deepinv_ud2m"
author = copyright = "The deepinv_ud2m developers"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
    "myst_parser",
]
exclude_patterns = ["_build", "**/GALLERY_HEADER.rst"]
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["custom.css"]

# Markdown, and what docstrings use
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
rst_prolog = """
.. |sep| raw:: html

   <hr />
"""

# The reference
autosummary_generate = True
autodoc_typehints = "none"  # docstrings state the types
autodoc_member_order = "bysource"
autoclass_content = "class"
python_use_unqualified_type_names = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|torchvision|accelerate|deepinv|dinv|numpy|np|pathlib|matplotlib|pandas|PIL|collections)(\..*)?",
    ),
    (r"py:class", r"(optional|Callable|Iterator|Sequence|Mapping|Path|Tensor|TensorList|nn\.Module|Module)"),
    (r"py:.*", r"deepinv_ud2m\..*\._\w+"),  # private
    (r"py:class", r"(Dataset|Denoiser|Reconstructor|Physics|LinearPhysics|Loss|int|float|bool|str|\.\.\.)"),
]
intersphinx_mapping = {}
if os.environ.get("DOCS_INTERSPHINX"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "deepinv": ("https://deepinv.github.io/deepinv", None),
    }


def resolve_by_name(app, env, node, contnode):
    """Each name is documented under one path. This finds it by the others that it can be imported from."""
    target = node.get("reftarget", "").removeprefix("~")
    if node.get("refdomain") != "py" or ("." in target and not target.startswith("deepinv_ud2m.")):
        return None
    objects = env.get_domain("py").objects
    found = [
        entry
        for path, entry in objects.items()
        if path.split(".")[-1] == target.split(".")[-1]
        and not entry.aliased
        and entry.objtype in ("class", "function", "data")
    ]
    if len(found) != 1:
        return None
    uri = app.builder.get_relative_uri(node["refdoc"], found[0].docname)
    return nodes.reference("", "", contnode, internal=True, refuri=f"{uri}#{found[0].node_id}")


# The gallery. What is named by a string is in gallery.py.
LONG = "your_training|real_photographs|full_photo"  # take too long to be run for the site
WANTED = os.environ.get("DOCS_GALLERY", "")
NAMED = "" if WANTED == "1" else f"[^/]*({WANTED})"
plot_gallery = bool(WANTED) and WANTED != "0"
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": rf"/(?!{LONG}){NAMED}[^/]*\.py$",
    "ignore_pattern": r"helpers\.py$",
    "within_subsection_order": "gallery.Position",
    "image_scrapers": ("matplotlib", "gallery.saved_figures"),
    "plot_gallery": plot_gallery,
    "backreferences_dir": "api/backreferences",
    "doc_module": ("deepinv_ud2m",),
    "default_thumb_file": str(DOCS / "figures" / "thumbnail.png"),
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 10,
    "abort_on_example_error": False,
}

# The look
html_theme = "pydata_sphinx_theme"
html_title = f"deepinv_ud2m {version}"
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "deepinv_ud2m"},
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 7,
}
ALONE = ("index", "start", "how_to", "changelog", "map_of_the_code", "releasing")
html_sidebars = {name: [] for name in ALONE}


def setup(app):
    """Called by Sphinx."""
    app.connect("missing-reference", resolve_by_name)
