"""Writes answers as a human-readable table, as CSV or as JSON lines.

CSV and JSON lines keep all columns of the input, in order, followed by the predictions. Characters
that are not printable, such as control characters, text-direction marks and lone surrogates, are
escaped, for example as `\\x1b` in tables and CSV, and as `\\u001b` in JSON.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from torch import Tensor

from .answers import UNKNOWN, Answers
from .formatting import with_mark
from .tables import SUFFIXES
from .text import InputError, escaped, quoted

# Spreadsheets treat a cell that starts with one of these characters as a formula.
_FORMULA = tuple("=+-@＝＋－＠")
# Cells that are not formulas: numbers, and cells without letters or digits, such as hyphens.
_NOT_FORMULA = re.compile(r"[+-][0-9.,]*[0-9]([eE][+-]?[0-9]+)?%?|[\W_]+")


_BLOCK = 256  # rows of CSV that are checked together


@dataclass
class Writer(ABC):
    """Turns answers into text."""

    top: int
    """The number of predicted languages per row."""
    titles: Sequence[str] = ("name",)
    """The titles of the input's columns."""
    delimiter: str = ","
    """The character between cells of CSV."""
    weak: Set[str] = frozenset()
    """The languages that a table marks as weak."""

    def head(self) -> str:
        """Returns the text before the first answer."""
        return ""

    @abstractmethod
    def body(self, answers: Answers) -> str:
        """Returns `answers` as text that ends with a newline.

        Raises:
            InputError: a column of the input has the same title as a column of the predictions.
        """

    def _check_titles(self, titles: Iterable[str], columns: Sequence[str]) -> None:
        """Raises an error if the input already has a column with one of these titles."""
        taken = [title for title in columns if title in titles]
        if taken:
            names = ", ".join(map(repr, taken))
            raise InputError(
                f"the input has columns that predictions also have: {names}; rename them"
            )


class TableWriter(Writer):
    """Writes a few human-readable lines for each name."""

    def body(self, answers: Answers) -> str:
        lines: list[str] = []
        unusual = answers.unusual.tolist()
        for row, name in enumerate(answers.rows.names):
            lines.append(escaped(name))
            if row in answers.rows.errors:
                lines.append(f"  error: {escaped(answers.rows.errors[row])}")
                continue
            found = answers.of_row(row)
            lines += [
                f"  {value:.3f}  {with_mark(language, weak=language in self.weak)}"
                for language, value in found
            ]
            if not found:
                lines.append(f"  {UNKNOWN}")
            if unusual[row]:
                lines.append("  unusual: unlike the names that the model has learned from")
            if row in answers.dropped:
                lines.append(f"  not read: {escaped(answers.dropped[row])}")
        return "".join(f"{line}\n" for line in lines)


class CsvWriter(Writer):
    """Writes CSV: the input's columns, language_1, probability_1, …, unusual, dropped, error.

    If a spreadsheet would treat a cell as a formula, and the cell is not a number, its first
    character is escaped. If the input is JSON lines, keys that the first object lacks are left out.
    """

    left_out = 0
    """The number of rows with keys that are left out, because the header lacks them."""

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """A pattern that finds cells to quote or escape in printable cells joined by newlines."""
        sign, formula = re.escape(self.delimiter), re.escape("".join(_FORMULA))
        return re.compile(rf'["{sign}]|^[{formula}]', re.MULTILINE)

    def head(self) -> str:
        places = range(1, self.top + 1)
        columns = [title for n in places for title in (f"language_{n}", f"probability_{n}")]
        columns += ["unusual", "dropped", "error"]
        self._check_titles(self.titles, columns)
        return self.delimiter.join(map(self._cell, [*self.titles, *columns])) + "\n"

    def body(self, answers: Answers) -> str:
        titles = {*self.titles}
        self.left_out += sum(not keys <= titles for keys in answers.rows.keys_of_objects())
        sign, absent = self.delimiter, len(answers.languages)
        cells = [sign + self._cell(language) for language in answers.languages]
        cells += [sign, sign + UNKNOWN]
        columns: list[Iterable[str]] = [self._lines(answers.rows.cells(self.titles))]
        best = answers.best.clone()
        unknown = best[:, 0] == absent
        unknown[[*answers.rows.errors]] = False
        best[unknown, 0] = absent + 1
        for places, millionths in zip(best.T, answers.millionths.T, strict=True):
            columns.append(map(cells.__getitem__, places.tolist()))
            columns += _digits(millionths, places >= absent, sign)

        def end(unusual: str, dropped: str = "", error: str = "") -> str:
            return f"{sign}{unusual}{sign}{self._cell(dropped)}{sign}{self._cell(error)}\n"

        return _rows_of(*columns, _ends(answers, end))

    def _lines(self, rows: Iterable[Sequence[str]]) -> Iterator[str]:
        """Yields rows of cells as text, without line ends."""
        rest = iter(rows)
        while block := list(islice(rest, _BLOCK)):
            cells = list(chain.from_iterable(block))
            # Most blocks need neither quotes nor escapes, so checking all cells at once is faster.
            if "".join(cells).isprintable() and not self._special.search("\n".join(cells)):
                yield from map(self.delimiter.join, block)
            else:
                yield from (self.delimiter.join(map(self._cell, row)) for row in block)

    def _cell(self, text: str) -> str:
        if text.isalpha():
            return text
        text = escaped(text)
        if text.startswith(_FORMULA) and not _NOT_FORMULA.fullmatch(text):
            code = ord(text[0])
            text = (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}") + text[1:]
        if self.delimiter in text or '"' in text:
            text = text.replace('"', '""')
            return f'"{text}"'
        return text


class JsonWriter(Writer):
    """Writes JSON lines: the keys of the input, then languages, unusual, dropped and error.

    The value of languages is a list of objects with the keys language and probability. In a
    row with an error, unusual is null; in other rows, error is null.
    """

    _KEYS = ("languages", "unusual", "dropped", "error")

    def head(self) -> str:
        self._check_titles(self.titles, self._KEYS)
        repeated = [title for title in self.titles if self.titles.count(title) > 1]
        if repeated:
            raise InputError(
                f"several columns are called {repeated[0]!r}, but JSON keys are unique: write CSV"
            )
        return ""

    def body(self, answers: Answers) -> str:
        for titles in answers.rows.keys_of_objects():
            self._check_titles(titles, self._KEYS)
        absent = len(answers.languages)
        members = answers.rows.members(self.titles)
        columns: list[Iterable[str]] = [["{"] * len(answers), members]
        begin = ', "languages": ['
        for places, millionths in zip(answers.best.T, answers.millionths.T, strict=True):
            # If a language is absent, all later languages of the row are absent too.
            keys = [
                f'{begin}{{"language": {quoted(language)}, "probability": '
                for language in answers.languages
            ]
            keys.append("" if begin == ", " else begin)
            columns.append(map(keys.__getitem__, places.tolist()))
            columns += _digits(millionths, places >= absent, end="}")
            begin = ", "

        def end(unusual: str, dropped: str = "", error: str = "") -> str:
            members = f'"unusual": {unusual or "null"}, "dropped": {quoted(dropped)}'
            return f'], {members}, "error": {quoted(error) if error else "null"}}}\n'

        return _rows_of(*columns, _ends(answers, end))


def _digits(
    millionths: Tensor, absent: Tensor, begin: str = "", end: str = ""
) -> list[Iterable[str]]:
    """Formats probabilities as two columns of text, to be joined row by row.

    For speed, the digits are looked up in tables.

    Args:
        millionths: int64 (rows), the probabilities in millionths.
        absent: bool (rows), true for rows without a probability, whose text is only `begin`.
        begin, end: the text around each number.
    """
    upper = [f"{begin}{number // 1000}.{number % 1000:03}" for number in range(1001)] + [begin]
    lower = [f"{number:03}{end}" for number in range(1000)] + [""]
    thousandths = millionths.div(1000, rounding_mode="floor")
    rest = millionths - 1000 * thousandths
    return [
        map(table.__getitem__, places.masked_fill(absent, len(table) - 1).tolist())
        for table, places in ((upper, thousandths), (lower, rest))
    ]


def _ends(answers: Answers, end: Callable[..., str]) -> list[str]:
    """Returns `end(unusual, dropped, error)` for each row."""
    words = ["true" if unusual else "false" for unusual in answers.unusual.tolist()]
    usual_ends = {word: end(word) for word in ("false", "true")}
    ends = [usual_ends[word] for word in words]
    for row, lost in answers.dropped.items():
        ends[row] = end(words[row], lost)
    for row, error in answers.rows.errors.items():
        ends[row] = end("", error=error)
    return ends


def _rows_of(*columns: Iterable[str]) -> str:
    """Joins columns of strings row by row, into one string."""
    return "".join(chain.from_iterable(zip(*columns, strict=True)))


WRITERS: dict[str, type[Writer]] = {"table": TableWriter, "csv": CsvWriter, "jsonl": JsonWriter}
"""The writer of each format."""

_SUFFIXES = {".txt": "table", **SUFFIXES}


def format_of(path: Path) -> str:
    """Returns the format that the suffix of `path` indicates, a key of `WRITERS`.

    Raises:
        InputError: the suffix does not indicate a format.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        known = ", ".join(_SUFFIXES)
        raise InputError(f"{path}: --output takes {known}, or any other name with --format")
    return _SUFFIXES[suffix]
