"""The section of docs/performance_tables.md: tables of the races of the names classifier."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.names.memory import LABELS, TRAINING
from benchmarks.names.programs import EMBEDDING, HIDDEN, PROGRAMS
from benchmarks.names.stopwatch import PARTS, REST, TOTAL
from namernn_fast.bench.tables import duration, markdown, ratio

Row = dict[str, Any]

TORCH, OURS = (program.name for program in PROGRAMS)


def speed_up(program: str, seconds: Mapping[str, float]) -> str:
    """Returns the application's speed-up over the user's program, or a blank for other programs."""
    return ratio(seconds[TORCH] / seconds[program]) if program == OURS else ""


def training_table(rows: Sequence[Row]) -> str:
    """Returns a line for each batch size and program, from rows for one number of threads."""
    lines = [["program", "B", "epoch", *PARTS, REST, "floor", "speed-up"]]
    for row in rows:
        others = [other for other in rows if other["batch"] == row["batch"]]
        totals = {other["program"]: other["seconds"][TOTAL] for other in others}
        times = [*(row["seconds"][part] for part in (TOTAL, *PARTS, REST)), row["floor"]]
        line = [row["program"], str(row["batch"]), *map(duration, times)]
        lines.append([*line, speed_up(row["program"], totals)])
    return markdown(lines)


def settings(rows: Sequence[Row]) -> str:
    """Returns a sentence about the settings with which the user's program was fastest."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "settings" in row:
            found.setdefault(row["settings"], []).append(str(row["batch"]))
    parts = (f"{choice} at B = {', '.join(batches)}" for choice, batches in found.items())
    return f"`{TORCH}` ran with {'; '.join(parts)}."


def rate(count: int, seconds: float) -> str:
    """Returns the names per second, with three digits."""
    return f"{float(f'{count / seconds:.3g}'):,.0f}"


def labels_table(rows: Sequence[Row]) -> str:
    """Returns a line for each list of names and program, from rows for one number of threads."""
    lines = [["program", "names", "time", "names / s", "floor", "speed-up"]]
    for row in rows:
        count, name = row["names"], row["program"]
        seconds = {other["program"]: other["seconds"] for other in rows if other["names"] == count}
        line = [name, f"{count:,}", duration(row["seconds"]), rate(count, row["seconds"])]
        lines.append([*line, duration(row["floor"]), speed_up(name, seconds)])
    return markdown(lines)


def beginnings(rows: Sequence[Row]) -> str:
    """Returns a sentence with the numbers of states with and without sharing."""
    found = {row["names"]: (row["characters"], row["prefixes"]) for row in rows}
    parts = (
        f"{names:,} names have {characters:,} characters and {prefixes:,} distinct prefixes"
        for names, (characters, prefixes) in sorted(found.items())
    )
    return f"{'; '.join(parts)}."


def memory_table(rows: Sequence[Row]) -> str:
    """Returns a line for each task, with a column for each program."""
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
        f"An epoch is trained in stretches of a few batches, and the programs take turns; its "
        f"time, and that of each part, is the median of {min(rounds)} to {max(rounds)} stretches, "
        f"times the number of stretches. `rest` is the loop itself, which counts hits. Every "
        f"program had the same batches in the same order. Losses and labels were checked first: "
        f"their error is at most twice that of `{TORCH}` against an oracle in float64. The floor "
        f"is the time for the multiply-adds that the results need, at the measured peak of "
        f"{rates}. For the application these are the input product once for each character of the "
        f"alphabet, and one state for each prefix that names share, in training within a batch."
    )


def report(document: Mapping[str, Any]) -> str:
    parts = [introduction(document)]
    timed = [*document["training"], *document["labels"]]
    for threads in dict.fromkeys(row["threads"] for row in timed):
        trained, labelled = (
            [row for row in document[key] if row["threads"] == threads]
            for key in ("training", "labels")
        )
        if trained:
            parts += [f"**An epoch of training, {threads} thread(s)**", training_table(trained)]
            parts += [settings(trained)]
        if labelled:
            parts += [f"**From strings to labels, {threads} thread(s)**", labels_table(labelled)]
            parts += [beginnings(labelled)]
    if document["memory"]:
        parts += ["**Memory**", memory_table(document["memory"])]
        parts.append(
            "Each in a fresh process: how far the peak of the resident set (`VmHWM`) rises, after "
            "a small run that starts the threads and loads the code."
        )
    return "\n\n".join(parts)
