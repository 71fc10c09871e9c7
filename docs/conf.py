"""Settings of Sphinx: ``make docs`` builds these pages and runs the notebooks (MyST-NB keeps what did not change)."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # notebooks are written for two cores

project = "hope_jax"
author = "The hope_jax authors"
copyright = "The hope_jax authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = "_build/notebooks"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "none"  # signatures hold shapes; they are shown as they are written
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
