"""Files and optional packages: the cache folder, replacing a file as a whole, imports on demand."""

from __future__ import annotations

import importlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .text import InputError

# Packages that another extra of pyproject.toml than "names" brings.
_EXTRAS = {
    "matplotlib": "evaluate",
    "scipy": "evaluate",
    "sklearn": "evaluate",
    "starlette": "serve",
    "uvicorn": "serve",
}


def cache_folder() -> Path:
    """Returns the folder for what is downloaded and trained; it need not exist.

    Raises:
        InputError: neither XDG_CACHE_HOME nor a home folder says where it is.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore relative paths.
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise InputError(
                "there is no folder for what is downloaded and trained: set HOME or XDG_CACHE_HOME"
            ) from error
    return base / "namernn_fast"


def check_replaceable(path: Path) -> None:
    """Raises now what `replacing` would raise later, and makes the folder of `path` if need be.

    Raises:
        InputError: `path` exists and is not a plain file, so that replacing it would do harm.
        OSError: the folder of `path` cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a plain file")
    tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` which replaces `path` when the block succeeds.

    When the block fails, nothing is left behind and `path` is as it was.

    Raises:
        InputError, OSError: as of `check_replaceable`.
    """
    check_replaceable(path)
    # Not made by tempfile, whose files no other user may read.
    # The name of `path` is not part of the name, which could become too long for the disk.
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with partial.open("x+b") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require(module: str) -> Any:
    """Imports and returns an optional dependency.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # it is installed, but something that it needs is not
        extra = _EXTRAS.get(package, "names")
        raise ModuleNotFoundError(
            f"{package} is not installed; run: pip install 'namernn_fast[{extra}]'", name=package
        ) from error
