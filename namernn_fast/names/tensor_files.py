"""Files of tensors and plain values: safetensors, read without trusting the file.

A safetensors file contains tensors and a table of text, but no code. The plain values are one entry
of that table, as JSON, under the name of the kind of file.
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
"""The largest file to read by default; the reference model takes about a tenth of it."""

MAX_HEADER_BYTES = 2 * 2**20
"""The largest table of tensors and plain values. The library's limit of 100 MB would allow files
that take half a minute and gigabytes of memory."""

# torch.save writes a zip, and used to write a pickle with this number; the others are pickles.
_PICKLES = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF", b"\x80\x04\x95", b"\x80\x05\x95")

_MAX_DEPTH = 32  # of nested lists and tables
_MAX_BRACKETS = 50_000  # Python's garbage collection makes a million lists slow


def write_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    values: Any,
    *,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Writes a file of tensors.

    Args:
        path: replaced only by a whole file.
        kind: what the file is, with a version.
        tensors: by name.
        values: anything that JSON can represent.
        max_bytes: the largest size that `read_tensors` will be asked to read.

    Raises:
        InputError: `path` exists and is not a plain file, or `read_tensors` would find the content
            too large.
        OSError: the disk failed.
        ModuleNotFoundError: safetensors is not installed.
    """
    library = require("safetensors.torch")
    # Copied, because safetensors refuses tensors that share memory.
    owned = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(values)
    content = library.save(owned, metadata={kind: text})
    too_large = len(content) > max_bytes or _header_bytes(content) > MAX_HEADER_BYTES
    if too_large or _brackets(text) > _MAX_BRACKETS:
        raise InputError(f"{path}: {len(content):,} bytes would be too large to be read again")
    with replacing(Path(path)) as file:
        file.write(content)


def read_values(path: str | os.PathLike[str], kind: str, *, max_bytes: int = MAX_BYTES) -> Any:
    """Returns the plain values of a file of tensors, without reading the tensors.

    Raises:
        InputError, OSError, ModuleNotFoundError: as in `read_tensors`.
    """
    with _opened(path, kind, max_bytes) as (_, values):
        return values


def read_tensors(
    path: str | os.PathLike[str],
    kind: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
) -> tuple[dict[str, Tensor], Any]:
    """Reads a file of tensors.

    Args:
        path: of the file.
        kind: what the file must be.
        shapes: the shapes of exactly the tensors that the file must have, or None for any; checked
            before a tensor is read.
        max_bytes: the largest size of a file that is read.

    Returns:
        The tensors by name, on the CPU, and the plain values.

    Raises:
        InputError: there is no plain file at `path`, or it is too large, or not of this kind, or
            holds other tensors.
        OSError: the disk failed.
        ModuleNotFoundError: safetensors is not installed.
    """
    with _opened(path, kind, max_bytes) as (file, values):
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if shapes is not None and found != dict(shapes):
            odd = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
            raise InputError(
                f"{path}: the tensor {odd[0]!r:.100} has the shape {found.get(odd[0])}, "
                f"not {shapes.get(odd[0])}"
            )
        # Copied, because the library maps the file into memory: a file truncated later would crash
        # the process, and weights that are not aligned would change the last bits.
        return {name: file.get_tensor(name).clone() for name in found}, values


@contextmanager
def _opened(path: str | os.PathLike[str], kind: str, max_bytes: int) -> Iterator[tuple[Any, Any]]:
    """Opens a safetensors file and yields it with its plain values."""
    path = Path(path)
    library = require("safetensors")
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a plain file")
    if (size := path.stat().st_size) > max_bytes:
        raise InputError(f"{path}: too large: {size:,} bytes, and at most {max_bytes:,} are read")
    with path.open("rb") as content:
        start = content.read(8)
    if start.startswith(_PICKLES):
        raise InputError(
            f"{path}: a pickle, as earlier versions wrote with torch.save; it could run code, so "
            "it is no longer read: train the model again"
        )
    if _header_bytes(start) > MAX_HEADER_BYTES:
        raise InputError(f"{path}: not a readable safetensors file (its header is too large)")
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            yield file, _values(path, kind, file.metadata() or {})
    except library.SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def _header_bytes(content: bytes) -> int:
    """Returns the size of the header that a safetensors file states at its start."""
    return int.from_bytes(content[:8], "little")


def _values(path: Path, kind: str, metadata: Mapping[str, str]) -> Any:
    try:
        if _brackets(metadata[kind]) > _MAX_BRACKETS:
            raise ValueError("too many lists and tables")
        values = json.loads(metadata[kind])
    # JSON that is nested too deeply raises a RecursionError.
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a file of the kind '{kind}'") from error
    if _is_deeper(values, _MAX_DEPTH):
        raise InputError(f"{path}: its values are nested more than {_MAX_DEPTH} deep")
    return values


def _brackets(text: str) -> int:
    """Returns an upper bound on the number of lists and tables in a JSON text."""
    return text.count("[") + text.count("{")


def _is_deeper(value: Any, depth: int) -> bool:
    """Returns whether lists and tables are nested more than `depth` deep."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)
