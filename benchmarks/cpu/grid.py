"""Times the fused layers and torch's over the grid: `python -m benchmarks.cpu.grid [--record]`.

Packing a batch is not timed: it takes the same time for both layers and would only move the ratio
towards 1. The epoch of the names classifier includes packing. Without `--record` only a quarter of
the workloads are timed.
"""

import statistics
from dataclasses import replace

import torch

from benchmarks.cpu import memory
from benchmarks.harness import columns, pages
from benchmarks.harness.columns import BATCH, SHAPE, Column, Row, Rows
from benchmarks.harness.grid import (
    EPOCH,
    EPOCH_WORKLOAD,
    GATED_CELLS,
    LAYER_WORKLOADS,
    PACKED,
    SIZES,
    TRAINING,
    WORKLOADS_OF_EVERY_RUN,
    Workload,
    shape,
)
from benchmarks.harness.paths import PERFORMANCE, README, Section
from benchmarks.harness.study import Calls, Document, Study, draw_input
from benchmarks.names import data, epoch
from benchmarks.report import speed
from namernn_fast import FusedRNN, explain
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.tables import TIMES
from namernn_fast.bench.timed_calls import gated_calls, rows_of_oracle
from namernn_fast.names import encode_names

MOST_WIDTH = 1.5
"""The median ratio of the ends of intervals from which the machine counts as busy."""


def lengths_of(workload: Workload) -> list[int]:
    """Returns the lengths of a packed batch, taken from surnames. Empty for a dense batch."""
    if workload.family != PACKED:
        return []
    name_lengths = encode_names([name for name, _ in data.names().rows]).lengths
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(name_lengths), (workload.batch,), generator=generator)
    return name_lengths[chosen].tolist()


def calls(workload: Workload) -> Calls:
    # Create the layers outside of inference mode, as users do.
    with torch.inference_mode(False):
        if workload.family == EPOCH:
            return epoch.calls(workload)
        lengths = lengths_of(workload)
        rows = None if lengths else rows_of_oracle(workload)
        return gated_calls(workload, draw_input(workload, lengths), rows)


def peaks(workload: Workload) -> Row:
    """Returns each layer's peak memory in a training step, in bytes, for layers with gates."""
    if workload.cell not in GATED_CELLS or workload.mode != TRAINING:
        return {}
    threads, lengths = torch.get_num_threads(), lengths_of(workload)
    return {"peak_bytes": memory.peaks_of_training(workload, threads, lengths)}


def facts() -> Document:
    """Returns the path that `FusedRNN` takes, and which data set the lengths are from."""
    path = explain(FusedRNN(1, 1), torch.zeros(1, 1, 1)).path
    return {"path": path, "names": data.description()}


def mebibytes(layer: str, head: str) -> Column:
    def entry(row: Row) -> str:
        return f"{row['peak_bytes'][layer] / 2**20:.1f} MiB" if "peak_bytes" in row else ""

    return columns.text(head, entry)


def table(rows: Rows) -> str:
    """Returns a cell's table, and which layer is faster, or that the machine was busy."""
    baseline, fused = Workload.of(rows[0]).layers
    speed_up, unsteady = columns.over(baseline, fused), unsteadiness(rows, baseline)
    shown = (
        SHAPE,
        BATCH,
        *map(columns.time, (baseline, fused)),
        speed_up,
        *(() if unsteady else (columns.interval(baseline),)),
        mebibytes(baseline, f"memory: {baseline}"),
        mebibytes(fused, fused),
    )
    text = columns.table(rows, shown, beside=["mode"])
    return "\n\n".join(filter(None, (text, unsteady or verdict(rows, speed_up))))


def verdict(rows: Rows, speed_up: Column) -> str:
    """Returns sentences that list the workloads in which the fused layer is not faster.

    It is faster or slower if the interval of the ratio excludes 1.
    """
    baseline, fused = Workload.of(rows[0]).layers
    slower, equal = [], []
    for row in rows:
        low, high = row["spread"][baseline]
        workload = Workload.of(row)
        name = f"{shape(workload)} B={workload.batch} {workload.mode}"
        if high < 1:
            slower.append(f"{name} {speed_up.number(row):.2f}{TIMES}")
        elif low <= 1:
            equal.append(f"{name} ({low:.2f} to {high:.2f})")
    found = [
        f"{fused} is {what} in {len(names)} of {len(rows)} workloads: {'; '.join(names)}."
        for what, names in (("slower", slower), ("neither faster nor slower", equal))
        if names
    ]
    return " ".join(found) or f"{fused} is faster in all {len(rows)} workloads."


def unsteadiness(rows: Rows, baseline: str) -> str:
    """Returns a sentence to show instead of intervals that are too wide to be useful, or ""."""
    width = statistics.median(high / low for low, high in (row["spread"][baseline] for row in rows))
    if width < MOST_WIDTH:
        return ""
    return (
        f"The machine was busy: the upper end of an interval is typically {width:.1f} times the "
        "lower end. Intervals are not shown; run the benchmark again on an idle machine."
    )


def caption(document: Document) -> str:
    return (
        f"FusedRNN on `{document['path']}`; float32. The two layers alternate; 95 % is the "
        f"interval of the ratio of the medians. {SIZES} `forward` is under `inference_mode`; "
        "`forward + backward` computes the gradients of all parameters from fixed random "
        "gradients at `output` and the last states. Packed batches have lengths from "
        f"{document['names']} (`names` instead of T); packing is not timed. An epoch of the "
        "classifier includes its batching and its steps of Adam. `memory` is how much a training "
        "step raises the peak resident set of a process that runs nothing else and already holds "
        "the parameters, the input and the gradients of the results."
    )


STUDY = Study(
    name="grid",
    description=__doc__,
    cases=(*LAYER_WORKLOADS, EPOCH_WORKLOAD),
    calls=calls,
    of_records=peaks,
    facts=facts,
    table=table,
    caption=caption,
    by=("cell",),
    few=lambda case: case in WORKLOADS_OF_EVERY_RUN or case == EPOCH_WORKLOAD,
    seconds=1.3,
    max_rounds=50,
    round_seconds=0.02,
    more=(
        Section(PERFORMANCE, "classes", speed.classes),
        Section(README, "speed", speed.summary_and_plot),
    ),
    draw=speed.draw,
)


def main() -> None:
    parser = pages.parser(__doc__, STUDY.seconds)
    parser.add_argument(
        "--again",
        action="store_true",
        help="with --record: time the recorded grid again, to see how much the speed-ups differ",
    )
    options = pages.parse(parser)
    if not options.again:
        STUDY.main(options)
        return
    if options.record != pages.ALL:
        parser.error("--again needs --record")
    if (recorded := pages.recorded(STUDY.name)["cpu"]) != cpu_name():
        parser.error(f"--again: the grid was recorded on {recorded}, this is {cpu_name()}")
    replace(STUDY, of_records=lambda case: {}).main(options, again=True)


if __name__ == "__main__":
    main()
