"""Reads tables of names from text, CSV and JSON lines, in bounded memory.

Each row of the input, even a damaged row, becomes one row of `Rows`. Columns without
names are kept too.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .folding import why_unusable
from .lines import MAX_LINE_BYTES, Recoded, Source, lines_of, not_in, text_of
from .text import InputError, escaped, escaped_json, quoted

FORMATS = ("text", "csv", "jsonl")

# Maximum number of lines in a CSV record. It also bounds the time: if a quote is never closed, all
# lines after the first are parsed again.
_MAX_RECORD_LINES = 100

# Titles that suggest a column of names, in lower case and without spaces or punctuation.
_TITLES = {"name", "names", "surname", "surnames", "lastname", "familyname", "fullname"}

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""The format of each suffix; files with other suffixes are text."""
_DELIMITER_LINE = re.compile(rb"sep=([,;:|\t])")  # Excel reads it in the first line of CSV
_TOO_LONG = f"a line of more than {MAX_LINE_BYTES:,} bytes"

# Limits on the rows held in memory at once: the number of rows, and their total characters.
_CHUNK_ROWS = 65_536  # large, because more rows share more prefixes
_CHUNK_CHARACTERS = 1_000_000

_log = logging.getLogger(__name__)


@dataclass
class Rows:
    """Rows of the input, in order. This class holds only names, which suffices for text files."""

    names: list[str]
    """The names; for a row without a name, the text that was read."""
    errors: dict[int, str] = field(default_factory=dict)
    """Maps each row without a usable name to the reason."""

    def cells(self, titles: Sequence[str]) -> Iterable[Sequence[str]]:
        """Returns the cells of each row in the columns `titles`."""
        return [[name] for name in self.names]

    def members(self, titles: Sequence[str]) -> Iterable[str]:
        """Returns, for each row, the members of its JSON object as text."""
        return [f'"name": {quoted(name)}' for name in self.names]

    def keys_of_objects(self) -> Iterable[Set[str]]:
        """Returns the keys of each JSON object; different objects may have different keys."""
        return ()


@dataclass
class _CsvRows(Rows):
    """Rows of CSV. A record holds the cells of a row, one per column."""

    records: list[list[str]] = field(default_factory=list)

    def cells(self, titles: Sequence[str]) -> Iterable[Sequence[str]]:
        return self.records

    def members(self, titles: Sequence[str]) -> Iterable[str]:
        keys = [f"{quoted(title)}: " for title in titles]
        return [
            ", ".join([key + quoted(cell) for key, cell in zip(keys, record, strict=True)])
            for record in self.records
        ]


@dataclass
class _JsonRows(Rows):
    """Rows of JSON lines. `objects` holds (object, its text), or None if a row is not an object."""

    objects: list[tuple[dict[str, Any], str] | None] = field(default_factory=list)
    key: str = "name"
    """The title of the column for names from rows that are not objects."""

    def cells(self, titles: Sequence[str]) -> Iterable[Sequence[str]]:
        # If `key` is not a title, the table has a single column, which holds the names.
        place = titles.index(self.key) if self.key in titles else 0
        return [
            [name if column == place else "" for column in range(len(titles))]
            if found is None
            else [_cell_of(found[0].get(title)) for title in titles]
            for name, found in zip(self.names, self.objects, strict=True)
        ]

    def members(self, titles: Sequence[str]) -> Iterable[str]:
        # Keep the text between an object's braces, so that numbers are not reformatted.
        return [
            f'"name": {quoted(name)}' if found is None else escaped_json(found[1].strip()[1:-1])
            for name, found in zip(self.names, self.objects, strict=True)
        ]

    def keys_of_objects(self) -> Iterable[Set[str]]:
        return [found[0].keys() for found in self.objects if found is not None]


class Table(NamedTuple):
    """The input: the titles of its columns, and its rows."""

    titles: list[str]
    """The titles of the columns; for JSON lines, the keys of the first object with a name."""
    rows: Iterable[Rows]


def _cell_of(value: Any) -> str:
    """Returns a value of a JSON object as a cell of CSV."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def format_of(path: Path) -> str:
    """Returns the format that the suffix of `path` indicates, one of `FORMATS`."""
    return SUFFIXES.get(path.suffix.lower(), "text")


def delimiter_of(path: Path) -> str:
    """Returns the CSV delimiter that the suffix of `path` indicates."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def read_table(
    file: Source,
    format: str,
    column: str | None = None,
    *,
    delimiter: str | None = None,
    default_delimiter: str = ",",
    header: bool = True,
    encoding: str = "utf-8",
) -> Table:
    """Reads a table of names from a file.

    Logs a warning after the last row if the file is not in the given encoding.

    Args:
        file: a binary file, open for reading.
        format: "text", with one name per line; "csv"; or "jsonl", with one JSON string or object
            per line.
        column: for CSV, the title of the column of names, or its number, counted from 1; for JSON
            lines, the key of the names. None selects the only column or key, or "name" if there are
            several.
        delimiter: the character between the cells of CSV. If None, the first line names it, as in
            `sep=;`, or it is `default_delimiter`.
        header: whether the first row of CSV contains the titles of the columns.
        encoding: the encoding of the file, by a name that Python knows.

    Raises:
        InputError: the column does not exist, the header cannot be decoded, or the file is UTF-16,
            a spreadsheet or a JSON array.
        OSError: the file could not be read.
    """
    source = Recoded(file, encoding)
    lines = lines_of(source)
    if format == "text":
        if column is not None:
            next(lines, None)  # raises a more helpful error if the file is a spreadsheet
            raise InputError("text has no columns: each line is a name")
        table = Table(["name"], _text_rows(lines))
    elif format == "csv":
        named, lines = _named_delimiter(lines)
        records = _records(lines, delimiter or named or default_delimiter)
        table = _csv_table(records, column, header, encoding)
    else:
        table = _json_table(lines, column)
    return Table(table.titles, _with_warning(table.rows, source, encoding))


def _with_warning(rows: Iterable[Rows], source: Recoded, encoding: str) -> Iterator[Rows]:
    """Yields the rows, then logs a warning if the source is not in `encoding`."""
    yield from rows
    if not source.is_valid:
        _log.warning("the input is %s", not_in(encoding))


def _named_delimiter(lines: Iterator[bytes]) -> tuple[str | None, Iterator[bytes]]:
    """Returns the delimiter that a first line such as `sep=;` names, and the other lines."""
    first = next(lines, None)
    if first is None:
        return None, lines
    if match := _DELIMITER_LINE.fullmatch(first):
        return match[1].decode(), lines
    return None, chain([first], lines)


Item = TypeVar("Item")


def _in_chunks(items: Iterator[Item], size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yields `items` in lists of bounded length and total size."""
    # For speed, the bounds are checked only once every 256 items.
    chunk: list[Item] = []
    size = 0
    while part := list(islice(items, 256)):
        chunk += part
        size += sum(map(size_of, part))
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _text_rows(lines: Iterator[bytes]) -> Iterator[Rows]:
    for chunk in _in_chunks(lines, len):
        errors = {}
        if max(map(len, chunk)) > MAX_LINE_BYTES:
            errors = {i: _TOO_LONG for i, line in enumerate(chunk) if len(line) > MAX_LINE_BYTES}
        yield Rows(text_of(b"\n".join(chunk)).split("\n"), errors)


class _NoRecord(NamedTuple):
    """A line of a CSV file that does not start a valid record, and the reason."""

    line: str
    error: str


def _records(lines: Iterator[bytes], delimiter: str) -> Iterator[list[str] | _NoRecord]:
    """Yields the cells of each record of a CSV file, or a `_NoRecord` if a record is damaged.

    If a record is damaged, for example by an unclosed quote, only its first line is skipped:
    reading continues at the next line.
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
                raise csv.Error("a quote is not closed")
            yield text_of(line) + "\n"

    while True:
        try:
            # Without strict, the end of the file would close an open quote.
            for record in csv.reader(feed(), strict=True, delimiter=delimiter):
                record_lines.clear()
                yield record
            return
        except csv.Error as error:
            first, *others = record_lines
            record_lines.clear()
            again.extendleft(reversed(others))
            yield _NoRecord(text_of(first), f"not readable as CSV: {error}")


def _csv_table(
    records: Iterator[list[str] | _NoRecord], column: str | None, header: bool, encoding: str
) -> Table:
    begin = [*islice(records, 1 if header else _MAX_RECORD_LINES)]
    if not begin:
        return Table(["name"], ())
    first = begin[0]
    if header:
        if isinstance(first, _NoRecord):
            raise InputError(f"the header is {first.error}")
        if any("\ud800" <= character <= "\udfff" for character in "".join(first)):
            raise InputError(f"the header is {not_in(encoding)}")
        place = _place(first, column)
        _warn_of_name(first[place].strip(), column)
        titles = [title.strip() for title in first]
        return Table(titles, _csv_rows(records, place, len(titles)))
    if isinstance(first, _NoRecord) or not first:  # the number of columns is unknown
        place = _numbered(column or "1")
    else:
        place = _place([""] * len(first), column)
    whole = (len(record) for record in begin if isinstance(record, list) and record)
    titles = [f"column_{number}" for number in range(1, max(place + 1, next(whole, 1)) + 1)]
    titles[place] = "name"
    return Table(titles, _csv_rows(chain(begin, records), place, len(titles)))


def _csv_rows(records: Iterator[list[str] | _NoRecord], place: int, width: int) -> Iterator[Rows]:
    for chunk in _in_chunks(records, lambda record: sum(map(len, record))):
        if {*map(type, chunk)} != {list} or {*map(len, chunk)} != {width}:
            yield _odd_rows(chunk, place, width)
        else:
            whole: list[list[str]] = chunk  # type: ignore[assignment]
            yield _CsvRows([record[place] for record in whole], records=whole)


def _odd_rows(chunk: list[list[str] | _NoRecord], place: int, width: int) -> Rows:
    """Returns the rows of a chunk in which records may be damaged, too short or too long."""
    rows = _CsvRows([])
    for i, record in enumerate(chunk):
        cells = [""] * width
        if isinstance(record, _NoRecord):
            name = cells[place] = record.line
            rows.errors[i] = record.error
        else:
            cells[: len(record)] = record[:width]
            name = cells[place]
            surplus = [cell for cell in record[width:] if cell]
            if 0 < len(record) <= place:  # an empty line is an empty record
                name = ", ".join(record)
                rows.errors[i] = f"there is no column {place + 1}"
            elif surplus:
                rows.errors[i] = (
                    f"{len(record)} cells, but there are {width} columns: what is left over is "
                    f"{', '.join(map(repr, surplus)):.200}"
                )
        rows.names.append(name)
        rows.records.append(cells)
    return rows


def _warn_of_name(title: str, column: str | None) -> None:
    """Warns if a title looks like a name, or like several titles joined by another delimiter."""
    if advice := _delimiter_advice([title]):
        _log.warning("the first row, %r, is read as one title%s", title, advice)
        return
    word = "".join(filter(str.isalnum, title.casefold()))
    if column != title and word not in _TITLES and why_unusable(title) is None:
        _log.warning(
            "the first row, %r, is read as the header; --no-header reads it as a name", title
        )


def _delimiter_advice(titles: Sequence[str]) -> str:
    """Returns the end of a message that names another delimiter, or "" if no title contains one."""
    for sign, option in {";": ";", "\t": "tab", "|": "|"}.items():
        if any(sign in title for title in titles):
            return f"; --delimiter '{option}' cuts rows there"
    return ""


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
            advice = _delimiter_advice(titles)
            raise InputError(
                f"there is no column {column}: the first row has {len(titles)}{advice}"
            )
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{len(found)} columns are called {column or 'name'!r}: give a number")
    names = escaped(", ".join(map(repr, filter(None, titles))))
    accepted = f"one of {names:.500}" if names else "a number, because no column has a name"
    raise InputError(
        f"no column is called {column or 'name'!r}; --column takes {accepted}"
        f"{_delimiter_advice(titles)}"
    )


def _numbered(column: str) -> int:
    """Converts a column number, given as text and counted from 1, to an index."""
    if not column.isdecimal() or len(column) > 9 or int(column) == 0:
        raise InputError(f"{column!r:.100} is not the number of a column")
    return int(column) - 1


def _json_table(lines: Iterator[bytes], column: str | None) -> Table:
    chunks = _in_chunks(lines, len)
    begin = next(chunks, None)
    if begin is None:
        return Table([column or "name"], ())
    if next(filter(None, map(bytes.strip, begin)), b"").startswith(b"["):
        raise InputError("the input is a JSON array; JSON lines need one string or object per line")
    first = _json_rows(begin, column)
    named = [
        found[0]
        for place, found in enumerate(first.objects)
        if found is not None and place not in first.errors
    ]
    rest = (_json_rows(chunk, column) for chunk in chunks)
    return Table([*named[0]] if named else [first.key], chain([first], rest))


def _json_rows(chunk: list[bytes], column: str | None) -> _JsonRows:
    rows = _JsonRows([], key=column or "name")
    for i, line in enumerate(chunk):
        name = text = text_of(line)
        found = error = None
        if len(line) > MAX_LINE_BYTES:
            error = _TOO_LONG
        elif not text or text.isspace():
            name = ""
        else:
            try:
                value = json.loads(text)
            # JSON that is nested too deeply raises a RecursionError.
            except (ValueError, RecursionError) as failure:
                error = f"not JSON: {failure}"
            else:
                found = (value, text) if isinstance(value, dict) and value else None
                name, error = _json_name(value, text, column)
        if error is not None:
            rows.errors[i] = error
        rows.names.append(name)
        rows.objects.append(found)
    return rows


def _json_name(value: Any, text: str, column: str | None) -> tuple[str, str | None]:
    """Returns (name, None) if a JSON value contains a name; otherwise (text, reason)."""
    if isinstance(value, dict):
        only = next(iter(value)) if len(value) == 1 else "name"
        key = only if column is None else column
        if key not in value:
            keys = escaped(", ".join(map(repr, value)))
            return (
                text,
                f"there is no {key!r} in the JSON object; --column takes one of {keys:.200}",
            )
        if isinstance(value[key], str):
            return value[key], None
        return text, f"the value of {key!r} in the JSON object is not a string"
    if isinstance(value, str):
        return value, None
    return text, "neither a JSON string nor an object with one"
