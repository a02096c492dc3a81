"""The cache folder, safe replacement of files, and optional packages."""

from __future__ import annotations

import importlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .text import InputError

# Maps each optional package that the extra "names" does not install to the extra that does.
_EXTRAS = {
    "matplotlib": "evaluate",
    "scipy": "evaluate",
    "sklearn": "evaluate",
}


def cache_folder() -> Path:
    """Returns the folder for downloads and trained models, which may not exist yet.

    Raises:
        InputError: XDG_CACHE_HOME is not an absolute path, and there is no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore relative paths.
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise InputError(
                "there is no folder for downloads and trained models: set HOME or XDG_CACHE_HOME"
            ) from error
    return base / "namernn_fast"


Used = tuple[str, Path | int]
"""A file's name in error messages, such as an option, and the file's path or descriptor."""


def check_no_overwrite(outputs: Iterable[Used], inputs: Iterable[Used]) -> None:
    """Raises an InputError if an output is also an input, even if their paths look different.

    Only regular files count, because a terminal or a pipe can be both an input and an output.
    """
    inputs = list(inputs)
    for written, output in outputs:
        for read, source in inputs:
            if is_same_file(output, source):
                path = output if isinstance(output, Path) else source
                shown = f", {path}" if isinstance(path, Path) else ""
                raise InputError(
                    f"{written} would overwrite what {read} reads{shown}: choose another file"
                )


def is_same_file(output: Path | int, source: Path | int) -> bool:
    """Returns whether two paths or descriptors refer to the same existing regular file."""
    if isinstance(output, Path):
        output = output.resolve()  # like `replacing`, so that absent/../file counts as file
    try:
        status = os.stat(output)
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.stat(source))
    except OSError:
        return False


def check_replaceable(path: Path) -> None:
    """Raises the errors that `replacing` would raise; creates the folder of `path` if needed.

    Raises:
        InputError: `path` exists and is not a regular file.
        OSError: the folder of `path` cannot be created or written to.
    """
    folder = path.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file")
    tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` that replaces `path` when the block succeeds.

    If the block fails, the temporary file is removed and `path` stays as it was. If `path` is a
    symbolic link, the link stays and the file that it points to is replaced.

    Raises:
        InputError, OSError: as in `check_replaceable`.
    """
    check_replaceable(path)
    path = path.resolve()
    # tempfile would create a file that only this user may read. The temporary name does not
    # contain the name of `path`, because the result could be too long.
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
        ModuleNotFoundError: the module is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is installed, but one of its dependencies is not
        extra = _EXTRAS.get(package, "names")
        raise ModuleNotFoundError(
            f"{package} is not installed; run: pip install 'namernn_fast[{extra}]'", name=package
        ) from error
