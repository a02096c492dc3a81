"""The warning that the C++ extension is missing points at the user's line, however it imports."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import namernn_fast

PACKAGE = Path(namernn_fast.__file__).parent

IMPORTS = {
    "import": "import namernn_fast",
    "submodule": "from namernn_fast.names import text",
    "name": "from namernn_fast import FusedRNN",
    "importlib": "namernn_fast = importlib.import_module('namernn_fast')",
    "function": "(lambda: __import__('namernn_fast'))()",
}


@pytest.mark.parametrize("line", IMPORTS.values(), ids=IMPORTS)
def test_the_warning_points_at_the_import(line, tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "namernn_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    script = tmp_path / "namernn_fast_user.py"  # its name must not be taken for the package's
    # An editable install would lead back to the extension that it was built with.
    script.write_text(
        "import importlib, sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
        f"{line}\n"
        f"{line}\n"
    )
    ran = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    warning = "UserWarning: namernn_fast was built without its C++ extension"
    assert f"{script}:3: {warning}" in ran.stderr
    assert ran.stderr.count(warning) == 1
