"""Formats tables as text: aligned columns for a terminal, and Markdown for a file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .text import escaped

Entry = str | int | float | None
"""An entry of a table: text from a file, a number, or None if there is no value."""

_SPECIAL_IN_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|#~&$]")


def aligned(header: Sequence[str], rows: Sequence[Sequence[Entry]]) -> str:
    """Returns a table for a terminal: the first column is aligned left, the other columns right."""
    lines = [list(header), *([_shown(entry) for entry in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[Entry]]) -> str:
    """Returns a table in Markdown, with text from files escaped."""
    numbers = [
        all(not isinstance(row[column], str) for row in rows) for column in range(len(header))
    ]
    lines = [
        header,
        ["---:" if number else "---" for number in numbers],
        *([literal(_shown(entry)) for entry in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def literal(text: str) -> str:
    """Returns `text` with unprintable characters and Markdown's special characters escaped."""
    return _SPECIAL_IN_MARKDOWN.sub(r"\\\g<0>", escaped(text))


def with_mark(language: str, *, weak: bool) -> str:
    """Returns the name of a language, with a mark if it is weak (see `WEAK_RECALL`)."""
    return f"{language} (weak)" if weak else language


def _shown(entry: Entry) -> str:
    if entry is None:
        return "-"
    if isinstance(entry, str):
        return escaped(entry)
    return f"{entry:,}" if isinstance(entry, int) else f"{entry:.3f}"
