"""Configuration of Sphinx for the documentation; needs no network."""

import fimkit

project = "fimkit"
author = "fimkit contributors"
release = version = fimkit.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["build"]
templates_path = ["templates"]

html_theme = "furo"
html_title = f"fimkit {release}"

# A name in single backquotes is a reference, and one that leads nowhere an error, but for names
# of other projects, whose inventories a build would have to download.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(numpy|sklearn|torch|typing|collections)\..*"),
]

autodoc_member_order = "bysource"
# Types stand in the docstrings, with shapes and what they mean.
autodoc_typehints = "none"
numpydoc_show_class_members = False

myst_enable_extensions = ["dollarmath"]


def _skip(app, what, name, member, skip, options):
    """Leave out what scikit-learn generates, with references into its own documentation."""
    return True if name.startswith("set_") and name.endswith("_request") else None


def setup(app):
    """Register what this documentation does by itself."""
    app.connect("autodoc-skip-member", _skip)
