"""Tables of names: rows of names read from text, CSV and JSON lines, in bounded memory.

Each row of the input becomes one `Row`, a row that cannot be read included. Lines end with LF, CRLF
or CR, a byte order mark is skipped, and the encoding is UTF-8: bytes that are not become lone
surrogates, as Python's "surrogateescape" has it, so that the fault stays within its row.
"""

from __future__ import annotations

import codecs
import csv
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .text import InputError, escaped, why_unusable

FORMATS = ("text", "csv", "jsonl")

MAX_LINE_BYTES = 65_536
"""The longest line that is read, and the longest record of several lines of CSV."""

# Lines are read again after a quote that nothing closes, so the bound is on the time as well.
_MAX_RECORD_LINES = 100

# Titles of a column of names, without the signs that may be in them.
_TITLES = {"name", "names", "surname", "surnames", "lastname", "familyname", "fullname"}

_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_BLOCK_BYTES = 65_536
_TOO_LONG = f"a line of more than {MAX_LINE_BYTES:,} bytes"

# Bounds on what is held of the input at a time; names that are as long as they may be reach the
# second one first.
_CHUNK_ROWS = 16_384
_CHUNK_CHARACTERS = 1_000_000

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A row of the input."""

    name: str
    """The name, or what was read where there is no name to be had."""
    error: str | None = None
    """Why the row holds no name, or None if it does."""


def format_of(path: Path) -> str:
    """Returns the format, one of `FORMATS`, that the suffix of `path` stands for."""
    return _SUFFIXES.get(path.suffix.lower(), "text")


def delimiter_of(path: Path) -> str:
    """Returns what separates the cells of a CSV file with the suffix of `path`."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


class Source(Protocol):
    """What is read of a buffered binary file."""

    def read1(self, size: int, /) -> bytes:
        """Returns at most `size` bytes, as soon as there are some; none at the end."""


def read_rows(
    file: Source,
    format: str,
    column: str | None = None,
    *,
    delimiter: str = ",",
    header: bool = True,
) -> Iterator[Row]:
    """Reads the names of a file, one `Row` for each row of the file.

    Args:
        file: open for reading.
        format: "text", a name on each line; "csv"; or "jsonl", on each line a JSON string or
            object.
        column: of CSV the column of the names, by its name or by its number from 1; of JSON lines
            the key of the names. If None, the only one or the one called "name".
        delimiter: what separates the cells of CSV.
        header: whether the first row of CSV has the names of the columns.

    Raises:
        InputError: there is no such column, or the file is in UTF-16.
        OSError: the disk failed.
    """
    lines = _without_mark(_lines(file))
    if format == "text":
        if column is not None:
            raise InputError("text has no columns: one name is on each line")
        return _text_rows(lines)
    if format == "csv":
        return _csv_rows(_records(lines, delimiter), column, header)
    return _json_rows(lines, column)


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Cuts `rows` into lists of bounded size."""
    rows = iter(rows)
    # Rows are counted in bulk, which is fast, and characters once for each few rows.
    chunk: list[Row] = []
    characters = 0
    while part := list(islice(rows, 256)):
        chunk += part
        characters += sum(len(row.name) for row in part)
        if len(chunk) >= _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _lines(file: Source) -> Iterator[bytes]:
    """Yields the lines of `file` without their ends.

    Of a line that is too long, only the first `MAX_LINE_BYTES + 1` bytes are kept.
    """
    rest = b""  # a line whose end has not been read
    while block := file.read1(_BLOCK_BYTES):
        joined = rest + block
        lines = joined.splitlines()
        rest = b""
        if not joined.endswith(b"\n"):
            # A CR may be the first half of a CRLF, so it stays with its line.
            end = b"\r" if joined.endswith(b"\r") else b""
            rest = lines.pop()[: MAX_LINE_BYTES + 1] + end
        for line in lines:
            yield line if len(line) <= MAX_LINE_BYTES else line[: MAX_LINE_BYTES + 1]
    if rest:
        yield rest.removesuffix(b"\r")


def _without_mark(lines: Iterator[bytes]) -> Iterator[bytes]:
    first = next(lines, None)
    if first is None:
        return
    # A zero byte as well, because both marks can also be two damaged bytes of one name.
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in first:
        raise InputError("the input is in UTF-16; UTF-8 is read")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from lines


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _text_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    for line in lines:
        yield Row(_text(line), None if len(line) <= MAX_LINE_BYTES else _TOO_LONG)


class _NoRecord(NamedTuple):
    """What stands in a CSV file where no record can be read."""

    line: str
    error: str


def _records(lines: Iterator[bytes], delimiter: str) -> Iterator[list[str] | _NoRecord]:
    """Yields the cells of each record of a CSV file.

    A record that is damaged, for example by a quote that nothing closes, costs the line where it
    begins: reading goes on at the next line.
    """
    again: deque[bytes] = deque()
    record_lines: list[bytes] = []

    def feed() -> Iterator[str]:
        size = 0
        while (line := again.popleft() if again else next(lines, None)) is not None:
            size = len(line) + (size if record_lines else 0)
            record_lines.append(line)
            if len(line) > MAX_LINE_BYTES:
                raise csv.Error(_TOO_LONG)
            if size > MAX_LINE_BYTES or len(record_lines) > _MAX_RECORD_LINES:
                raise csv.Error("no quote closes one that was opened")
            yield _text(line) + "\n"

    while True:
        try:
            # Strict, because otherwise the end of the file closes a quote.
            for record in csv.reader(feed(), strict=True, delimiter=delimiter):
                record_lines.clear()
                yield record
            return
        except csv.Error as error:
            first, *others = record_lines
            record_lines.clear()
            again.extendleft(reversed(others))
            yield _NoRecord(_text(first), f"not readable as CSV: {error}")


def _csv_rows(
    records: Iterator[list[str] | _NoRecord], column: str | None, header: bool
) -> Iterator[Row]:
    first = next(records, None)
    if first is None:
        return
    if header:
        if isinstance(first, _NoRecord):
            raise InputError(f"the header is {first.error}")
        place = _place(first, column)
        _warn_of_name(first[place].strip(), column)
    else:
        # A damaged or empty record does not tell how many columns there are.
        titles = [] if isinstance(first, _NoRecord) else [""] * len(first)
        place = _place(titles, column) if titles else _numbered(column or "1")
        yield _cell(first, place)
    for record in records:
        yield _cell(record, place)


def _warn_of_name(title: str, column: str | None) -> None:
    """Warns that the first row was read as a header if nothing tells it from a name."""
    word = "".join(filter(str.isalnum, title.casefold()))
    if column != title and word not in _TITLES and why_unusable(title) is None:
        _log.warning(
            "the first row, %r, is read as the header; --no-header reads it as a name", title
        )


def _cell(record: list[str] | _NoRecord, place: int) -> Row:
    if isinstance(record, _NoRecord):
        return Row(*record)
    if place < len(record):
        return Row(record[place])
    # The csv module gives an empty record for an empty line.
    return Row("") if not record else Row(", ".join(record), f"there is no column {place + 1}")


def _place(header: Sequence[str], column: str | None) -> int:
    """Returns the index of the column of the names."""
    if not header:
        raise InputError("the header is an empty line")
    titles = [title.strip() for title in header]
    if column is None:
        if len(titles) == 1:
            return 0
        found = [place for place, title in enumerate(titles) if title.casefold() == "name"]
    else:
        found = [place for place, title in enumerate(titles) if title == column]
        if not found and column.isdecimal():
            if (place := _numbered(column)) < len(titles):
                return place
            raise InputError(f"there is no column {column}: the first row has {len(titles)}")
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{len(found)} columns are called {column or 'name'!r}: give a number")
    names = escaped(", ".join(map(repr, filter(None, titles))))
    advice = f"one of {names:.500}" if names else "a number, because no column has a name"
    raise InputError(f"no column is called {column or 'name'!r}; --column takes {advice}")


def _numbered(column: str) -> int:
    """Returns the index of a column that is given by its number."""
    if not column.isdecimal() or len(column) > 9 or int(column) == 0:
        raise InputError(f"{column!r:.100} is not the number of a column")
    return int(column) - 1


def _json_rows(lines: Iterable[bytes], column: str | None) -> Iterator[Row]:
    for line in lines:
        text = _text(line)
        if len(line) > MAX_LINE_BYTES:
            yield Row(text, _TOO_LONG)
        elif not text or text.isspace():
            yield Row("")
        else:
            try:
                value = json.loads(text)
            # JSON that is nested too deeply is a RecursionError.
            except (ValueError, RecursionError) as error:
                yield Row(text, f"not JSON: {error}")
            else:
                yield _json_row(value, text, column)


def _json_row(value: Any, text: str, column: str | None) -> Row:
    if isinstance(value, dict):
        only = next(iter(value)) if len(value) == 1 else "name"
        key = only if column is None else column
        if key not in value:
            return Row(text, f"there is no {key!r} in the JSON object")
        value = value[key]
    if isinstance(value, str):
        return Row(value)
    return Row(text, "neither a JSON string nor an object with one")
