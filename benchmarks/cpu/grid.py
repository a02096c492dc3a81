"""Times the fused layers and torch's over the grid: `python -m benchmarks.cpu.grid [--record]`.

Packing a batch is not timed: it takes the same time for both layers and would only move the ratio
towards 1. The epoch of the names classifier includes packing. Without `--record` only a third of
the workloads are timed.
"""

import torch

from benchmarks.cpu import memory
from benchmarks.harness import columns
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
from namernn_fast.bench.tables import TIMES
from namernn_fast.bench.timed_calls import gated_calls, rows_of_oracle
from namernn_fast.names import encode_names


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


def peaks(workload: Workload, calls: Calls) -> Row:
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
    """Returns a cell's table, and a sentence that lists the workloads with slower fused layers."""
    baseline, fused = Workload.of(rows[0]).layers
    speed_up = columns.over(baseline, fused)
    shown = (
        SHAPE,
        BATCH,
        *map(columns.time, (baseline, fused)),
        speed_up,
        columns.interval(baseline),
        mebibytes(baseline, f"memory: {baseline}"),
        mebibytes(fused, fused),
    )
    losses = [
        f"{shape(workload)} B={workload.batch} {workload.mode} {ratio:.2f}{TIMES}"
        for workload, ratio in ((Workload.of(row), speed_up.number(row)) for row in rows)
        if ratio < 1
    ]
    text = f"{fused} is faster in all {len(rows)} workloads."
    if losses:
        text = f"{fused} is slower in {len(losses)} of {len(rows)} workloads: {'; '.join(losses)}."
    return f"{columns.table(rows, shown, beside=['mode'])}\n\n{text}"


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
    also=peaks,
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

if __name__ == "__main__":
    STUDY.main()
