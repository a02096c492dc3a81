"""Splits a file into lines of bounded length, reading the file block by block.

Lines end with LF, CRLF or CR, and a byte order mark is skipped. The encoding is UTF-8; an invalid
byte becomes a lone surrogate (Python's "surrogateescape"), so other lines are not affected.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Protocol

from .text import InputError

MAX_LINE_BYTES = 65_536
"""The maximum length of a line, in bytes."""

_BLOCK_BYTES = 65_536

# The first bytes of .xlsx, .ods and other zip files, and of .xls.
_SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


class Source(Protocol):
    """A buffered binary file that `lines_of` can read."""

    def read1(self, size: int, /) -> bytes:
        """Returns up to `size` bytes as soon as any are available, or b"" at the end."""


class Recoded:
    """Converts a file to UTF-8 while it is read.

    Bytes that are invalid in the encoding become bytes that are invalid in UTF-8, or U+FFFD.

    Args:
        file: a binary file, open for reading.
        encoding: the file's encoding, by a name that Python knows.
    """

    is_valid = True
    """Whether all bytes read so far are valid; always true for encodings in units of 2 or 4 bytes.
    """

    def __init__(self, file: Source, encoding: str) -> None:
        self._file = file
        # In encodings with units of 2 or 4 bytes, lone surrogates cannot represent every bad unit.
        is_wide = "a".encode(encoding) != b"a"
        errors = "replace" if is_wide else "surrogateescape"
        self._decoder = codecs.getincrementaldecoder(encoding)(errors)

    def read1(self, size: int, /) -> bytes:
        while block := self._file.read1(size):
            if text := self._decoder.decode(block):
                return self._encoded(text)
        return self._encoded(self._decoder.decode(b"", final=True))

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError:
            self.is_valid = False
            return text.encode("utf-8", "surrogateescape")


def not_in(encoding: str) -> str:
    """Returns the end of a message about input that is not in `encoding`."""
    other = "utf-8" if codecs.lookup(encoding).name == "cp1252" else "cp1252"
    return f"not {encoding.upper()}; --encoding {other}, for example, names another encoding"


def lines_of(file: Source) -> Iterator[bytes]:
    """Yields the lines of `file` without line ends, and without a byte order mark.

    Longer lines are truncated to `MAX_LINE_BYTES + 1` bytes.

    Raises:
        InputError: the file is UTF-16, a spreadsheet or a zip.
        OSError: the file could not be read.
    """
    lines = _all_lines(file)
    first = next(lines, None)
    if first is None:
        return
    if first.startswith(_SPREADSHEETS):
        raise InputError("the input is a spreadsheet or zip file, not text: save it as CSV")
    # Check for a zero byte too, because damaged UTF-8 can start like a UTF-16 byte order mark.
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in first:
        raise InputError("the input is UTF-16; use --encoding utf-16")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from lines


def _all_lines(file: Source) -> Iterator[bytes]:
    rest = b""  # a line whose end has not been read
    while block := file.read1(_BLOCK_BYTES):
        joined = rest + block
        lines = joined.splitlines()
        rest = b""
        if not joined.endswith(b"\n"):
            # A CR at the end may be the first half of a CRLF, so it stays with its line.
            end = b"\r" if joined.endswith(b"\r") else b""
            rest = lines.pop()[: MAX_LINE_BYTES + 1] + end
        for line in lines:
            yield line if len(line) <= MAX_LINE_BYTES else line[: MAX_LINE_BYTES + 1]
    if rest:
        yield rest.removesuffix(b"\r")


def text_of(line: bytes) -> str:
    """Returns bytes as text, with lone surrogates for bytes that are not UTF-8."""
    return line.decode("utf-8", "surrogateescape")
