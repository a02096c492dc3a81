"""Writers of answers: a table to read, CSV and JSON lines, with one row for each answer.

Characters that are not printable are escaped: in tables and CSV with a backslash, such as `\\x1b`,
in JSON as `\\u001b`. Controls, marks of the text direction and lone surrogates are among them.
"""

from __future__ import annotations

import csv
import functools
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring_ascii
from pathlib import Path

from .answers import UNKNOWN, Answer
from .text import MAX_LANGUAGES, escaped

# With one of these, ASCII or of full width, a cell begins that a spreadsheet takes for a formula.
_FORMULA = tuple("=+-@＝＋－＠")


class Writer(ABC):
    """Turns answers into text."""

    def head(self) -> str:
        """Returns the text before all answers."""
        return ""

    @abstractmethod
    def body(self, answers: Iterable[Answer]) -> str:
        """Returns the text of some answers, which ends with a line end."""


class TableWriter(Writer):
    """Some lines for each name, for people."""

    def body(self, answers: Iterable[Answer]) -> str:
        lines: list[str] = []
        for answer in answers:
            lines.append(escaped(answer.name))
            if answer.error is not None:
                lines.append(f"  error: {escaped(answer.error)}")
                continue
            told = zip(answer.languages, answer.probabilities, strict=True)
            lines += [f"  {value:.3f}  {language}" for language, value in told]
            if not answer.languages:
                lines.append(f"  {UNKNOWN}")
            if answer.dropped:
                lines.append(f"  not read: {escaped(answer.dropped)}")
        return "".join(f"{line}\n" for line in lines)


class CsvWriter(Writer):
    """CSV with a header: name, language_1, probability_1, …, dropped, error.

    A cell that a spreadsheet would take for a formula has an escape for its first character.

    Args:
        top: the number of languages in a row; cells of languages that are not told are empty.
    """

    def __init__(self, top: int) -> None:
        self._top = top

    def head(self) -> str:
        places = range(1, self._top + 1)
        titles = [title for n in places for title in (f"language_{n}", f"probability_{n}")]
        return ",".join(["name", *titles, "dropped", "error"]) + "\n"

    def body(self, answers: Iterable[Answer]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(self._cells, answers))
        return text.getvalue()

    def _cells(self, answer: Answer) -> Sequence[str | float]:
        name, languages, values, lost, error = answer
        cells: list[str | float] = [""] * (2 * self._top + 3)
        cells[0] = _cell(name)
        end = 2 * len(languages) + 1
        cells[1:end:2] = map(_language_cell, languages)
        cells[2:end:2] = values
        if error is not None:
            cells[-1] = _cell(error)
        elif not languages:
            cells[1] = UNKNOWN
        if lost:
            cells[-2] = _cell(lost)
        return cells


class JsonWriter(Writer):
    """JSON lines with the keys name, languages, dropped and error, which is null where all is well.

    The languages are a list of objects with the keys language and probability.
    """

    def body(self, answers: Iterable[Answer]) -> str:
        return "".join(map(self._line, answers))

    @staticmethod
    def _line(answer: Answer) -> str:
        # Written piece by piece, in half the time of json.dumps.
        name, languages, values, lost, error = answer
        told = ", ".join(
            [
                f'{{"language": {quoted(language)}, "probability": {value}}}'
                for language, value in zip(languages, values, strict=True)
            ]
        )
        return (
            f'{{"name": {quoted(name)}, "languages": [{told}], "dropped": {quoted(lost)}, '
            f'"error": {"null" if error is None else quoted(error)}}}\n'
        )


def quoted(text: str) -> str:
    """Returns a JSON string of `text`, in which printable characters stand as they are."""
    if text.isprintable():
        text = text.replace("\\", r"\\").replace('"', r"\"")
        return f'"{text}"'
    return f'"{"".join(map(_json_character, text))}"'


def _json_character(character: str) -> str:
    if character.isprintable() and character not in '"\\':
        return character
    return encode_basestring_ascii(character)[1:-1]


FORMATS = ("table", "csv", "jsonl")


def format_of(path: Path) -> str:
    """Returns the format, one of `FORMATS`, that the suffix of `path` stands for."""
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in FORMATS else "table"


def writer_of(format: str, top: int) -> Writer:
    """Returns the writer of `format`, one of `FORMATS`; `top` as of `CsvWriter`."""
    if format == "csv":
        return CsvWriter(top)
    return JsonWriter() if format == "jsonl" else TableWriter()


def _cell(text: str) -> str:
    text = escaped(text)
    # Signs alone are no formula; hyphens that were not read are a common case of them.
    if text.startswith(_FORMULA) and any(map(str.isalnum, text)):
        return _escape(text[0]) + text[1:]
    return text


def _escape(character: str) -> str:
    """Returns the backslash escape of a character, printable or not."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


_language_cell = functools.lru_cache(MAX_LANGUAGES)(_cell)  # of few languages are many cells
