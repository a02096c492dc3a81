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
    """Returns a Markdown table, padded so that it is readable in a terminal too."""
    rows = list(rows)
    # Each column is at least 2 wide, because the divider of a right-aligned column is "-:".
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]
    divider = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (rows[0], divider, *rows[1:]):
        first, *rest = (
            entry.ljust(width) if place == 0 else entry.rjust(width)
            for place, (entry, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("| " + " | ".join((first, *rest)) + " |")
    return "\n".join(lines)
