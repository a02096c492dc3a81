"""Builds the documentation site; `make docs` runs it, with warnings as errors.

Neither the build nor a page fetches anything: fonts, scripts and styles are files of the site, and
formulas are MathML, which browsers render without a script.
"""

import atexit
import logging
import os
import shutil
import sys
import tempfile
from importlib.metadata import version as version_of
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER / "_extensions"), str(FOLDER.parent)]  # pages, benchmarks

project = "namernn_fast"
author = "The namernn_fast authors"
release = version = version_of(project)
project_copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "pages",  # in the folder _extensions
]
# A page is a Markdown file, or a program with `# %%` cells, which the build executes.
source_suffix = {".md": "myst-nb", ".nb.py": "myst-nb"}
nitpicky = True
# Torch's and Python's documentation cannot be linked, because the build fetches nothing. Text in
# single backticks becomes a link if it names an object of this site, and otherwise stays code.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", "(?s).*"),
    (
        "py:.*",
        r"(torch|nn|collections|contextlib|numpy|np|os|pathlib|namernn_fast\.(gpu|call|nn|cells))\..*",
    ),
    ("py:class", "Tensor|PackedSequence|_Options"),
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_update_mathjax = False
html_math_renderer = "mathml"

nb_custom_formats = {".nb.py": ["pages.read_program", {}]}
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300

# Hides the Jupyter kernel's warning that its local sockets are not encrypted.
_settings = Path(tempfile.mkdtemp(prefix="ipython-"))
(_settings / "profile_default").mkdir()
(_settings / "profile_default" / "ipython_kernel_config.py").write_text(
    'get_config().IPKernelApp.log_level = "ERROR"\n'
)
os.environ["IPYTHONDIR"] = str(_settings)
atexit.register(shutil.rmtree, _settings)
logging.getLogger("traitlets").setLevel("WARNING")  # hides the kernel's messages at start-up

autodoc_default_options = {"member-order": "bysource"}
autodoc_mock_imports = ["triton"]
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_rtype = False
python_maximum_signature_line_length = 80

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

linkcheck_timeout = 5
linkcheck_retries = 1
