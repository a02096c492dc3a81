"""Reads and writes tensors and plain values as safetensors; validates untrusted files.

A safetensors file contains tensors and a dict of strings, but no code. The plain values are stored
in one entry of this dict, as JSON; the key of the entry is the kind of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import replacing, require
from .text import InputError

MAX_BYTES = 256 * 2**20
"""The limit on the size of a file; the reference model takes about a tenth of it."""

MAX_HEADER_BYTES = 2 * 2**20
"""The limit on the size of a header, which lists the tensors and holds the plain values. With the
library's limit of 100 MB, reading a header could take half a minute and gigabytes of memory."""

_MAX_DEPTH = 32  # maximum nesting of lists and dicts
_MAX_BRACKETS = 50_000  # reading a million lists would be slow


def write_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Writes tensors and plain values to a file of the given kind; the values are stored as JSON.

    The file is replaced only once the new file is complete.

    Raises:
        InputError: `path` exists and is not a regular file, or the content is too large for
            `read_tensors`.
        OSError: the file could not be written.
    """
    library = require("safetensors.torch")
    # Copy the tensors, because safetensors rejects tensors that share memory.
    owned = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(values)
    content = library.save(owned, metadata={kind: text})
    too_large = len(content) > MAX_BYTES or _header_bytes(content) > MAX_HEADER_BYTES
    if too_large or _brackets(text) > _MAX_BRACKETS:
        raise InputError(f"{path}: {len(content):,} bytes would be too large to be read again")
    with replacing(Path(path)) as file:
        file.write(content)


def read_values(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Returns the plain values of a file of tensors; see `read_tensors` for errors."""
    with _opened(path, kind) as (_, values):
        return values


def read_tensors(
    path: str | os.PathLike[str],
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """Reads the tensors of a file.

    Args:
        path: the path of the file.
        kind: the kind that the file must have.
        shapes: maps the names of the tensors that the file must contain to their shapes. Both are
            checked before any tensor is read.

    Raises:
        InputError: there is no regular file at `path`, or the file is too large, is of another kind
            or does not contain exactly these tensors.
        OSError: the file could not be read.
    """
    with _opened(path, kind) as (file, _):
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if found != dict(shapes):
            odd = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
            raise InputError(
                f"{path}: the tensor {odd[0]!r:.100} has the shape {found.get(odd[0])}, "
                f"not {shapes.get(odd[0])}"
            )
        # Copy the tensors, because the library maps the file into memory: truncating the file would
        # crash the process, and unaligned weights would change the last bits of results.
        return {name: file.get_tensor(name).clone() for name in found}


@contextmanager
def _opened(path: str | os.PathLike[str], kind: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Opens a safetensors file and yields it with its plain values."""
    path = Path(path)
    library = require("safetensors")
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: too large: {size:,} bytes, but at most {MAX_BYTES:,} are read")
    with path.open("rb") as content:
        start = content.read(8)
    if _header_bytes(start) > MAX_HEADER_BYTES:
        raise InputError(f"{path}: not a readable safetensors file (its header is too large)")
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            yield file, _values(path, kind, file.metadata() or {})
    except library.SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def _header_bytes(content: bytes) -> int:
    """Returns the header size that a safetensors file states at its start."""
    return int.from_bytes(content[:8], "little")


def _values(path: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        if _brackets(metadata[kind]) > _MAX_BRACKETS:
            raise ValueError("too many arrays and objects")
        values = json.loads(metadata[kind])
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    # JSON that is nested too deeply raises a RecursionError.
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a '{kind}' file") from error
    if _is_deeper(values, _MAX_DEPTH):
        raise InputError(f"{path}: its values are nested more than {_MAX_DEPTH} deep")
    return values


def _brackets(text: str) -> int:
    """Returns an upper bound on the number of arrays and objects in a JSON text."""
    return text.count("[") + text.count("{")


def _is_deeper(value: Any, depth: int) -> bool:
    """Returns whether lists and dicts are nested more than `depth` levels deep."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)
