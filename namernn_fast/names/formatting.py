"""Tables as text: aligned columns for a terminal, and Markdown for a file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .text import escaped

Cell = str | int | float | None
"""A text as it was read, a number, or None if there is no value."""

_SPECIAL_IN_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|#~&$]")


def aligned(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Returns a table for a terminal: the first column to the left, the others to the right."""
    lines = [list(header), *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Returns a table in Markdown, with text from files escaped."""
    numbers = [
        all(not isinstance(row[column], str) for row in rows) for column in range(len(header))
    ]
    lines = [
        header,
        ["---:" if number else "---" for number in numbers],
        *([literal(_shown(cell)) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def literal(text: str) -> str:
    """Escapes text for Markdown, and characters in it that are not printable."""
    return _SPECIAL_IN_MARKDOWN.sub(r"\\\g<0>", escaped(text))


def with_mark(language: str, *, weak: bool) -> str:
    """Returns the name of a language, with a mark if it is weak (see `WEAK_RECALL`)."""
    return f"{language} (weak)" if weak else language


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return escaped(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"
