"""Sphinx: MyST pages whose code cells run at build time; every warning is an error."""

import os
import sys
from pathlib import Path

import bayesgen

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Code cells run in the interpreter that builds the page, whatever kernels the machine has besides.
os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")

project = "bayesgen"
author = "The bayesgen maintainers"
project_copyright = "The bayesgen maintainers"
version = release = bayesgen.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "gallery"]

html_theme = "furo"
html_title = "bayesgen"
html_static_path = ["_static"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # a cache would not see that the library changed
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True

apidoc_modules = [
    {
        "path": str(ROOT / "bayesgen"),
        "destination": "api",
        "follow_links": True,  # bayesgen/models and bayesgen/inference are links
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types, shapes and units in words
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
