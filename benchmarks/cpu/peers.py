"""Times the layer against other implementations: `python -m benchmarks.cpu.peers [options]`.

Every installed rival gets the same weights, input and gradients, and must agree with a float64
oracle. Then all implementations alternate, round by round, in one process.
`benchmarks/cpu/streams.py` times single steps, and `benchmarks/cpu/eight_bits.py` 8-bit weights.
"""

import argparse
import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.cpu.rivals import ERROR, RIVALS, TRAINED, Problem, is_available
from benchmarks.harness import columns, pages
from benchmarks.harness.columns import BATCH, Row, Rows
from benchmarks.harness.gate import rival_error
from benchmarks.harness.grid import DENSE, FORWARD, MODES, PACKED, SIZES, TRAINING, Workload, shape
from benchmarks.harness.machine import hop
from benchmarks.harness.processes import in_new_process
from benchmarks.harness.study import CheckedCalls, Document, Study, grid
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.tables import SLOWER, duration
from namernn_fast.bench.timed_calls import draw_gradients, equal_layers, tensors_in, train
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS
from namernn_fast.testing import assert_within_budget

# (input_size, hidden_size, seq_len, batch)
SHAPES = (
    *((64, 64, 8, batch) for batch in (1, 16)),
    *((64, 256, 8, batch) for batch in (1, 16, 64, 256, 1024)),
    *((128, 128, 128, batch) for batch in (1, 16, 64, 256)),
    *((512, 512, 128, batch) for batch in (1, 32)),
    (1024, 1024, 64, 64),
)
ODD_SHAPES = (
    *((64, hidden, 8, 64) for hidden in (100, 200, 300, 384)),
    *((size, 256, 8, 64) for size in (1, 57, 300)),
    *((64, 256, 8, batch) for batch in (3, 7, 48, 100)),
    *((64, 256, steps, 16) for steps in (1, 3, 1000)),
    (57, 100, 3, 7),
    (1, 300, 1000, 3),
)
BESIDE = ("threads", "mode")
PACKED_BATCHES = (16, 64, 256, 1024)
LENGTHS = (2, 12)
WORKLOADS = [
    *grid(SHAPES, [*LAYERS_OF]),
    *(
        Workload(PACKED, mode, batch, 64, 256, LENGTHS[1], cell)
        for mode in MODES
        for cell in LAYERS_OF
        for batch in PACKED_BATCHES
    ),
]


def results(
    workload: Workload, call: TimedCall, layer: nn.RNNBase | None = None
) -> dict[str, Tensor]:
    """Runs a call of a rival or, if given, of `layer`; returns h_n or, in training, the gradients.

    The gradients are those of weight_ih, weight_hh and the sum of the biases. A GRU has separate
    gradients for bias_ih and bias_hh.
    """
    with torch.inference_mode(workload.mode == FORWARD):
        returned: Any = call()
    if workload.mode == FORWARD:
        named = {"h_n": returned if layer is None else tensors_in(returned)[1]}
    else:
        # Except in a GRU, both biases have the same gradient.
        separate = CELLS[workload.cell].separate
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if separate else ("bias",)))
        values = returned if layer is None else [p.grad for p in layer.parameters()][: len(names)]
        named = {f"grad {name}": value for name, value in zip(names, values, strict=True)}
    return {name: torch.from_numpy(np.array(value)).squeeze() for name, value in named.items()}


def calls(workload: Workload, rivals: Sequence[str] = ()) -> CheckedCalls:
    """Returns the checked calls of both layers and of the given rivals in one workload."""
    layers = equal_layers(workload)
    baseline = layers[workload.layers.baseline]
    input = torch.randn(workload.seq_len, workload.batch, workload.input_size)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (workload.batch,))

    def batch_of(input: Tensor) -> Tensor | PackedSequence:
        if workload.family == DENSE:
            return input
        return pack_padded_sequence(input, lengths, enforce_sorted=False)

    gradients = draw_gradients(baseline, batch_of(input)) if workload.mode == TRAINING else ()

    def layer_call(layer: nn.RNNBase) -> TimedCall:
        parameters = tuple(layer.parameters())
        x, *layer_gradients = (value.to(parameters[0].dtype) for value in (input, *gradients))
        if workload.mode == FORWARD:
            return lambda: layer(batch_of(x))
        return lambda: train(layer, parameters, batch_of(x), tuple(layer_gradients))

    precise = copy.deepcopy(baseline).double()
    oracle = results(workload, layer_call(precise), precise)
    found: CheckedCalls = {name: layer_call(layer) for name, layer in layers.items()}
    theirs, ours = (results(workload, found[name], layer) for name, layer in layers.items())
    assert_within_budget(ours, theirs, oracle)
    problem = Problem(workload, baseline, input, gradients)
    for name in rivals if workload.family == DENSE else ():
        if workload.mode == FORWARD or name in TRAINED:
            call = RIVALS[name][1](problem, torch.get_num_threads())
            found[name] = rival_error(name, results(workload, call), oracle, ERROR) or call
    return found


@cache
def available() -> list[str]:
    """Returns the rivals that can be compared with."""
    return [name for name in RIVALS if is_available(name)]


def best_other(row: Row) -> tuple[str, float] | None:
    """Returns the name and the time of the fastest other implementation, if there is any."""
    layers = Workload.of(row).layers
    others = ((name, time) for name, time in row["medians"].items() if name not in layers)
    return min(others, key=itemgetter(1), default=None)


def is_faster(row: Row, time: float) -> bool:
    """Returns whether the fused layer takes less than `time` seconds."""
    return row["medians"][Workload.of(row).layers.fused] < time


def best_and_time(row: Row) -> str:
    """Returns the fastest rival and its time, marked if the fused layer is not faster."""
    if (best := best_other(row)) is None:
        return ""
    name, time = best
    return f"{name} {duration(time)}{'' if is_faster(row, time) else f' {SLOWER}'}"


def label(row: Row) -> str:
    if row["family"] == DENSE:
        return shape(Workload.of(row))
    return f"({row['input_size']}, {row['hidden_size']}, {LENGTHS[0]}..{LENGTHS[1]})"


def table(rows: Rows) -> str:
    """Returns a table of sizes, with both layers, their ratio and the best other implementation."""
    baseline, fused = Workload.of(rows[0]).layers
    shown = (
        columns.key("(D, H, T)", label),
        BATCH,
        *map(columns.time, (baseline, fused)),
        columns.over(baseline, fused),
        columns.text("best other", best_and_time),
    )
    text = columns.table(rows, shown, BESIDE)
    beaten: dict[str, list[bool]] = {}
    for row in rows:
        if best := best_other(row):
            kind = columns.labels(BESIDE, [row[field] for field in BESIDE])
            beaten.setdefault(kind, []).append(is_faster(row, best[1]))
    if beaten:
        counts = (f"{sum(found)} of {len(found)} sizes ({kind})" for kind, found in beaten.items())
        text += f"\n\nFaster than the best other at {', '.join(counts)}."
    return text


def hops() -> Document:
    """Returns how long a word takes from core to core, which limits multithreaded calls."""
    return dict(zip(("hop", "hop_median"), hop(), strict=True))


def caption(document: Document) -> str:
    return (
        "confined to as many CPUs as threads; float32. Others: "
        f"{', '.join(document['others']) or 'none'}. Passing a word between cores took "
        f"{1e9 * document['hop']:.0f} ns at best, and {1e9 * document['hop_median']:.0f} ns in the "
        f"median. {SIZES}"
    )


@contextmanager
def confined(threads: int) -> Iterator[None]:
    """Limits processes that start within the block to one CPU per thread.

    Rivals choose their number of threads from the CPUs that the process may use, some of them at
    import. Without this limit, JAX and NumPy would use all CPUs in a benchmark of one thread.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cpus)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


class Confined(Study):
    """A study that times each number of threads in a new process with one CPU per thread."""

    def run_on(self, threads: int, options: argparse.Namespace, wrong: list[str]) -> Rows:
        with confined(threads):
            rows, found = in_new_process(run_here, self.name, threads, options)
        wrong += found
        return rows


def run_here(name: str, threads: int, options: argparse.Namespace) -> tuple[Rows, list[str]]:
    """Runs a study in this process; returns its rows and failed checks."""
    wrong: list[str] = []
    return Study.run_on(STUDIES[name], threads, options, wrong), wrong


STUDY = Confined(
    name="peers",
    description=__doc__,
    cases=WORKLOADS,
    calls=lambda workload: calls(workload, available()),
    table=table,
    caption=caption,
    facts=lambda: {"others": available(), **hops()},
    by=("cell",),
    one_thread_too=True,
    seconds=1.0,
    max_rounds=30,
)
ODD = replace(
    STUDY,
    name="odd",
    cases=grid(ODD_SHAPES, ["rnn"]),
    calls=calls,
    facts=lambda: {"others": [], **hops()},
    is_folded=True,
)
STUDIES = {study.name: study for study in (STUDY, ODD)}


def main() -> None:
    parser = pages.parser(__doc__, STUDY.seconds)
    parser.add_argument("--odd", action="store_true", help="odd shapes, against nn.RNN alone")
    options = pages.parse(parser)
    (ODD if options.odd else STUDY).main(options)


if __name__ == "__main__":
    main()
