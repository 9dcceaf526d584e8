"""Sphinx: MyST pages whose code cells run at build time; every warning is an error."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.ext.napoleon.docstring import GoogleDocstring

import bayesgen

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Code cells run in the interpreter that builds the page, whatever kernels the machine has besides.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm in a kernel without widgets
os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
# A profile of its own, so that the reader's does not leak in: pictures are drawn inline.
PROFILE = Path(tempfile.mkdtemp(prefix="bayesgen-docs-"))
atexit.register(shutil.rmtree, PROFILE, ignore_errors=True)
(PROFILE / "profile_default").mkdir()
(PROFILE / "profile_default" / "ipython_kernel_config.py").write_text(
    "c.InteractiveShellApp.matplotlib = 'inline'\n"
    "c.InlineBackend.figure_formats = {'svg'}\n"
    "c.HistoryManager.enabled = False\n"
)
os.environ["IPYTHONDIR"] = str(PROFILE)

project = "bayesgen"
author = "The bayesgen maintainers"
project_copyright = "The bayesgen maintainers"
version = release = bayesgen.__version__

extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_ext"]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "bayesgen"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # a cache would not see that the library changed
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True

add_module_names = False  # every page says where to import from
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types, shapes and units in words
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Napoleon takes what stands before a colon in an attribute's docstring for a type; ours is prose.
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end
