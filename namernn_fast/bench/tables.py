"""Formats durations, ratios and tables, for terminals and documents."""

from collections.abc import Iterable

UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
SLOWER = "▼"
TIMES = "\N{MULTIPLICATION SIGN}"


def duration(seconds: float) -> str:
    """Returns a duration with three significant digits and a unit."""
    unit, scale = next((unit for unit in UNITS if seconds >= unit[1]), UNITS[-1])
    value = seconds / scale
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def ratio(value: float) -> str:
    """Returns a speed-up as text, marked as slower if it is below 1."""
    return f"{value:.2f}{TIMES}" + (f" {SLOWER}" if value < 1 else "")


def markdown(rows: Iterable[list[str]]) -> str:
    """Returns a Markdown table, padded so that it is readable in a terminal too.

    Numbers are aligned on the right, and text on the left.
    """
    rows = list(rows)
    columns = [*zip(*rows, strict=True)]
    # Each column is at least 2 wide, because the divider of a right-aligned column is "-:".
    widths = [max(2, *map(len, column)) for column in columns]
    are_numbers = [False, *(all(map(_is_number, column[1:])) for column in columns[1:])]
    divider = [
        "-" * (width - is_number) + ":" * is_number
        for width, is_number in zip(widths, are_numbers, strict=True)
    ]
    lines = []
    for row in (rows[0], divider, *rows[1:]):
        entries = (
            entry.rjust(width) if is_number else entry.ljust(width)
            for entry, width, is_number in zip(row, widths, are_numbers, strict=True)
        )
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _is_number(entry: str) -> bool:
    """Returns whether an entry is empty, dashes, or starts with a number."""
    return not entry.strip("*-−–—+, ") or entry.lstrip("*-−+~( ")[:1].isdigit()
