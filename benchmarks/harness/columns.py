"""Tables of rows of results: one line for each case, described by columns.

A row is a program's record of one case: the fields of the case, the number of threads and the
median seconds of each call (`medians`). A row may also compare calls with a reference call: then
`paired` holds median ratios of neighbouring rounds, and `spread` holds 95 % confidence intervals.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.grid import shape
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.workloads import LAYERS_OF, Workload

Row = dict[str, Any]
Rows = list[Row]


class Column(NamedTuple):
    """A column of a table."""

    head: str
    text: Callable[[Row], str]
    """Returns the entry of a row, an empty string if the row has none."""
    number: Callable[[Row], float | None] | None = None
    """Returns the ratio of a row, for columns with the mean and the worst ratio at the foot."""
    is_key: bool = False
    """Whether the entry identifies a line."""


def text(head: str, value: str | Callable[[Row], object]) -> Column:
    """Returns a column that shows a field, or the result of a function of the row."""
    if callable(value):
        return Column(head, lambda row: str(value(row)))
    return Column(head, lambda row: str(row.get(value, "")))


def key(head: str, value: str | Callable[[Row], object]) -> Column:
    """Returns a column like `text`; its entries identify a line."""
    return text(head, value)._replace(is_key=True)


LAYER = key("layer", lambda row: Workload.of(row).layers.fused)
SHAPE = key("(D, H, T)", lambda row: shape(Workload.of(row)))
BATCH = key("B", "batch")


def time(name: str, head: str = "") -> Column:
    """Returns a column with the median time of a call."""

    def entry(row: Row) -> str:
        return duration(row["medians"][name]) if name in row["medians"] else ""

    return Column(head or name, entry)


def speed_up(head: str, number: Callable[[Row], float | None]) -> Column:
    """Returns a column of speed-ups. `number` returns None for rows without a speed-up."""

    def entry(row: Row) -> str:
        value = number(row)
        return "" if value is None else ratio(value)

    return Column(head, entry, number)


def over(theirs: str | Iterable[str], ours: str, head: str = "speed-up") -> Column:
    """Returns a column with the speed-up of `ours` over `theirs`, or over the fastest of them."""
    names = (theirs,) if isinstance(theirs, str) else tuple(theirs)

    def number(row: Row) -> float | None:
        medians = row["medians"]
        found = [medians[name] for name in names if name in medians]
        return min(found) / medians[ours] if found and ours in medians else None

    return speed_up(head, number)


def paired(theirs: str, head: str = "speed-up") -> Column:
    """Returns a column with the median ratio of neighbouring rounds."""
    return speed_up(head, lambda row: row["paired"].get(theirs))


def interval(theirs: str) -> Column:
    """Returns a column with the 95 % confidence interval of the ratio of medians."""

    def entry(row: Row) -> str:
        low, high = row["spread"][theirs]
        return f"{low:.2f} to {high:.2f}"

    return Column("95 %", entry)


def label(field: str, value: Any) -> str:
    """Returns the value of a field, as shown in titles and column heads."""
    if field == "cell":
        return LAYERS_OF[value].fused
    return {"threads": f"{value} thread(s)", "family": f"{value} input"}.get(field, str(value))


def labels(fields: Iterable[str], values: Iterable[Any]) -> str:
    """Returns the values of several fields, as shown in titles and column heads."""
    return ", ".join(map(label, fields, values))


def table(
    rows: Rows, columns: Sequence[Column], beside: Sequence[str] = (), shown: Rows | None = None
) -> str:
    """Returns a table with a line for each row and, if there are several, a mean and a worst ratio.

    Columns without any entry are left out.

    Args:
        rows: The rows.
        columns: The columns; those that identify a line come first.
        beside: Names of fields. Rows that differ only in these fields share a line, which has
            separate columns for each combination of their values.
        shown: The rows that have a line; default: all.
    """

    def kind(row: Row) -> tuple[Any, ...]:
        return tuple(row[field] for field in beside)

    keys = [column for column in columns if column.is_key and any(map(column.text, rows))]
    lines: dict[tuple[str, ...], dict[Any, Row]] = {}
    for row in rows if shown is None else shown:
        lines.setdefault(tuple(c.text(row) for c in keys), {})[kind(row)] = row
    parts = []
    for values in dict.fromkeys(map(kind, rows)):
        begins = f"{labels(beside, values)}: " if beside else ""
        here = [row for row in rows if kind(row) == values]
        for column in columns:
            if column.is_key:
                continue
            found = (line.get(values) for line in lines.values())
            entries = ["" if row is None else column.text(row) for row in found]
            if any(entries):
                parts.append([begins + column.head, *entries, *_foot(column, here)])
                begins = ""
    first = [[column.head for column in keys], *map(list, lines)]
    if len(rows) > 1 and any(part[-1] for part in parts):
        blank = [""] * (len(keys) - 1)
        first += [["geometric mean", *blank], ["worst", *blank]]
    return markdown([*line, *(part[i] for part in parts)] for i, line in enumerate(first))


def _foot(column: Column, rows: Rows) -> tuple[str, str]:
    """Returns a column's geometric mean and worst ratio, or empty strings if it has no ratios."""
    found = [value for row in rows if column.number and (value := column.number(row)) is not None]
    return (ratio(statistics.geometric_mean(found)), ratio(min(found))) if found else ("", "")
