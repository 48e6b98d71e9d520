"""The site, built from the root of the repository, so that links are the same as on disk.

uv run --group docs sphinx-build -E -W -c docs . docs/_build
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402  (beside this file)
from sphinx.ext.napoleon import GoogleDocstring  # noqa: E402

project = "jaxlm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "benchmarks/*.md", "docs/*.md"]
exclude_patterns = [".*", "docs/_build", "runs", "wandb"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
highlight_language = "none"

default_role = "code"  # docstrings put names in single backticks
napoleon_numpy_docstring = False
# It takes what comes before a colon in the docstring of a field for the type of the field.
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "jaxlm"
html_extra_path = ["site"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False


def fill_in(app, docname: str, source: list[str]) -> None:
    """Puts what is made from the code in the place of its mark on a page."""
    for mark, make in {"settings": reference.settings, "commands": reference.commands}.items():
        if f"<!-- {mark} -->" in source[0]:
            source[0] = source[0].replace(f"<!-- {mark} -->", make())


def leave_out(app, what: str, name: str, obj: object, options, lines: list[str]) -> None:
    """Drops what Python itself says of the field of a NamedTuple."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", leave_out)
    app.connect("source-read", fill_in)
