"""Sphinx settings."""

import nbsoftmax

project = "nbsoftmax"
author = "nbsoftmax developers"
copyright = author
version = release = nbsoftmax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
exclude_patterns = ["_build"]
numpydoc_show_class_members = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
html_theme = "alabaster"
html_theme_options = {"description": "softmax on explicit SIMD and all cores, through Numba"}
