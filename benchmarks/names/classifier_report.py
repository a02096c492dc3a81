"""Writes the names classifier's section of docs/performance_tables.md."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.harness import columns
from benchmarks.harness.columns import Column, Row, Rows
from benchmarks.names.memory import LABELS, TRAINING
from benchmarks.names.programs import EMBEDDING, HIDDEN, PROGRAMS
from benchmarks.names.stopwatch import PARTS, REST, TOTAL
from namernn_fast.bench.tables import duration, markdown

TORCH, OURS = (program.name for program in PROGRAMS)


PROGRAM = columns.key("program", "program")
SPEED_UP = columns.speed_up("speed-up", lambda row: row.get("speed-up"))
FLOOR = columns.text("floor", lambda row: duration(row["floor"]))


def table(rows: Rows, size: str, seconds: Callable[[Row], float], *shown: Column) -> str:
    """Returns a table with a line per program and size, and the application's speed-up.

    Args:
        rows: The rows of both programs.
        size: The field that, with the number of threads, identifies a row of a program.
        seconds: Returns the seconds of a row that the speed-up compares.
        shown: The columns between the program and the speed-up.
    """
    theirs = {(row["threads"], row[size]): seconds(row) for row in rows if row["program"] == TORCH}
    compared = [
        row | {"speed-up": theirs[row["threads"], row[size]] / seconds(row)}
        if row["program"] == OURS
        else row
        for row in rows
    ]
    return columns.table(compared, (PROGRAM, *shown, SPEED_UP), beside=["threads"])


def part(name: str, head: str = "") -> Column:
    """Returns a column with the seconds of one part of an epoch."""
    return columns.text(head or name, lambda row: duration(row["seconds"][name]))


def training_table(rows: Rows) -> str:
    """Returns a table with a line for each batch size and program."""
    batch = columns.key("B", "batch")
    parts = (part(TOTAL, "epoch"), *map(part, (*PARTS, REST)), FLOOR)
    return table(rows, "batch", lambda row: row["seconds"][TOTAL], batch, *parts)


def settings(rows: Sequence[Row]) -> str:
    """Returns a sentence about the settings with which the user's program was fastest."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "settings" in row:
            place = f"{row['batch']} ({row['threads']} thread(s))"
            found.setdefault(row["settings"], []).append(place)
    parts = (f"{choice} at B = {', '.join(places)}" for choice, places in found.items())
    return f"`{TORCH}` ran with {'; '.join(parts)}."


def rate(count: int, seconds: float) -> str:
    """Returns the names per second, with three digits."""
    return f"{float(f'{count / seconds:.3g}'):,.0f}"


def labels_table(rows: Rows) -> str:
    """Returns a table with a line for each list of names and program."""
    return table(
        rows,
        "names",
        lambda row: row["seconds"],
        columns.key("names", lambda row: f"{row['names']:,}"),
        columns.text("time", lambda row: duration(row["seconds"])),
        columns.text("names / s", lambda row: rate(row["names"], row["seconds"])),
        FLOOR,
    )


def beginnings(rows: Sequence[Row]) -> str:
    """Returns a sentence with the numbers of characters and distinct prefixes in the names."""
    found = {row["names"]: (row["characters"], row["prefixes"]) for row in rows}
    parts = (
        f"{names:,} names have {characters:,} characters and {prefixes:,} distinct prefixes"
        for names, (characters, prefixes) in sorted(found.items())
    )
    return f"{'; '.join(parts)}."


def memory_table(rows: Sequence[Row]) -> str:
    """Returns a table with a line for each task and a column for each program."""
    titles = {TRAINING: "two steps of training, B = {:,}", LABELS: "labels of {:,} names"}
    lines = [["peak memory", TORCH, OURS]]
    for task, title in titles.items():
        sizes = {row["who"]: row for row in rows if row["task"] == task}
        peaks = [f"{sizes[program]['bytes'] / 2**20:.1f} MiB" for program in (TORCH, OURS)]
        lines.append([title.format(sizes[TORCH]["size"]), *peaks])
    return markdown(lines)


def introduction(document: Mapping[str, Any]) -> str:
    """Returns a paragraph about where and how a run was measured."""
    machine = document["machine"]
    timed = document["training"] or document["labels"]
    rounds = [row["rounds"] for row in document["training"]] or [0]
    peaks = {
        threads: median(row["peak"] for row in timed if row["threads"] == threads)
        for threads in dict.fromkeys(row["threads"] for row in timed)
    }
    rates = " and ".join(f"{peak / 1e9:.0f} GFLOP/s" for peak in peaks.values())
    return (
        f"{machine['cpu']}, {' and '.join(map(str, peaks))} thread(s); torch {machine['torch']}; "
        f"float32. One layer, one direction, {EMBEDDING} features, {HIDDEN} hidden units, last "
        f"state, no dropout, Adam. Names: {document['data']}; {document['names']:,} were used for "
        f"training. B is the batch size.\n\n"
        f"An epoch is trained in stretches of a few batches, and the programs take turns. The time "
        f"of an epoch or a part is the median of {min(rounds)} to {max(rounds)} stretches, times "
        f"the number of stretches. `rest` is the loop itself, which counts hits. Every "
        f"program had the same batches in the same order. Losses and labels were checked first: "
        f"their error is at most twice the error of `{TORCH}` against a float64 oracle. The floor "
        f"is the time for the multiply-adds that the results need, at the measured peak of "
        f"{rates}. For the application these are the input product once for each character of the "
        f"alphabet, and one state for each prefix that names share, in training within a batch."
    )


def report(document: Mapping[str, Any]) -> str:
    parts = [introduction(document)]
    if trained := document["training"]:
        parts += ["**An epoch of training**", training_table(trained), settings(trained)]
    if labelled := document["labels"]:
        parts += ["**From strings to labels**", labels_table(labelled), beginnings(labelled)]
    if document["memory"]:
        parts += ["**Memory**", memory_table(document["memory"])]
        parts.append(
            "The rise of the peak resident set (`VmHWM`), each measured in a fresh process after "
            "a small run that starts the threads and loads the code."
        )
    return "\n\n".join(parts)
