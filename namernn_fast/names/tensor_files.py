"""Files of tensors with plain values beside them: safetensors, read without trusting the file.

A safetensors file holds tensors and a table of text, and no code. The plain values are one entry of
that table, as JSON, under the name of the kind of file.
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
"""The largest file that is read; the reference model has about a tenth."""


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], values: Any
) -> None:
    """Writes a file of tensors.

    Args:
        path: replaced only by a whole file.
        kind: what the file is, with a version.
        tensors: by name.
        values: what JSON can hold.

    Raises:
        InputError: `path` exists and is not a plain file.
        OSError: the disk failed.
        ModuleNotFoundError: safetensors is not installed.
    """
    library = require("safetensors.torch")
    # A copy each: safetensors refuses tensors that share memory.
    owned = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    content = library.save(owned, metadata={kind: json.dumps(values)})
    with replacing(Path(path)) as file:
        file.write(content)


def read_values(path: str | os.PathLike[str], kind: str) -> Any:
    """Returns the plain values of a file of tensors, and reads no tensor.

    Raises:
        InputError, OSError, ModuleNotFoundError: as of `read_tensors`.
    """
    with _opened(path, kind) as (_, values):
        return values


def read_tensors(
    path: str | os.PathLike[str], kind: str, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, Tensor], Any]:
    """Reads a file of tensors.

    Args:
        path: of the file.
        kind: what the file must be.
        shapes: of exactly the tensors that the file must hold, or None for any; checked before a
            tensor is read.

    Returns:
        The tensors by name, on the CPU, and the plain values.

    Raises:
        InputError: there is no plain file at `path`, or it is too large, or not of this kind, or
            holds other tensors.
        OSError: the disk failed.
        ModuleNotFoundError: safetensors is not installed.
    """
    with _opened(path, kind) as (file, values):
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if shapes is not None and found != dict(shapes):
            odd = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
            raise InputError(
                f"{path}: the tensor {odd[0]!r:.100} has the shape {found.get(odd[0])}, "
                f"not {shapes.get(odd[0])}"
            )
        return {name: file.get_tensor(name).clone() for name in found}, values


@contextmanager
def _opened(path: str | os.PathLike[str], kind: str) -> Iterator[tuple[Any, Any]]:
    """Opens a safetensors file and yields it with its plain values."""
    path = Path(path)
    library = require("safetensors")
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a plain file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: too large, {size:,} bytes where at most {MAX_BYTES:,} are read")
    with path.open("rb") as start:
        if start.read(4) == b"PK\x03\x04":
            raise InputError(
                f"{path}: a pickle of PyTorch, as earlier versions wrote it, which could run code "
                "and is not read any more; train the model again"
            )
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            yield file, _values(path, kind, file.metadata())
    except library.SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def _values(path: Path, kind: str, metadata: dict[str, str] | None) -> Any:
    try:
        return json.loads((metadata or {})[kind])
    # JSON that is nested too deeply is a RecursionError.
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a file of the kind '{kind}'") from error
