"""Settings of Sphinx: ``make docs`` builds these pages and runs the notebooks (MyST-NB keeps what did not change)."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # notebooks are written for two cores

project = "hope_jax"
author = "The hope_jax authors"
copyright = "The hope_jax authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

myst_enable_extensions = []  # formulas are written as text, which every reader and terminal shows
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "signature"  # signatures hold the shapes
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # "a, b: text" describes two arguments
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = "hope_jax"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["wide.css"]


def skip(app, kind, name, member, skipped, options):
    """Leave out the fields of named tuples: their class describes them."""
    return True if type(member).__name__ == "_tuplegetter" else None


def short_types(app, kind, name, member, options, signature, returned):
    """``Float[Array, "T K"]`` as the source has it."""
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returned))


def indented_blocks(app, kind, name, member, options, lines):
    """What a docstring indents by four after a blank line is code or a formula, and stays as it is."""
    for i in range(len(lines) - 1, 1, -1):
        above = lines[i - 2]
        starts = lines[i].startswith("    ") and not lines[i - 1].strip() and above.strip()
        if starts and not above.startswith((" ", "*")) and not above.endswith("::"):
            lines[i:i] = ["::", ""]


def setup(app):
    """What Sphinx calls first."""
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", short_types)
    app.connect("autodoc-process-docstring", indented_blocks, priority=100)
