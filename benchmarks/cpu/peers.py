"""Races the layer against other implementations: `python -m benchmarks.cpu.peers [options]`.

Every rival that is installed gets the same weights, input and gradients, must agree with a float64
oracle, and then takes turns with the others, round by round, in one process.
"""

import argparse
import copy
import dataclasses
import importlib.util
import os
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.cpu.rivals import RIVALS, Problem
from benchmarks.harness import pages
from benchmarks.harness.gate import check_rival
from benchmarks.harness.grid import DENSE, FORWARD, GATED_CELLS, PACKED, TRAINING, Workload, shape
from benchmarks.harness.machine import hop
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall, race
from namernn_fast.bench.tables import SLOWER, duration, markdown, ratio
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
PACKED_BATCHES = (16, 64, 256, 1024)
LENGTHS = (2, 12)
# Other implementations round differently; a wrong formula has a far larger error.
RIVAL_ERROR = 1e-4


def workloads(odd: bool = False, packed: bool = False) -> Iterator[Workload]:
    """Yields workloads of both modes with usual or odd sizes, and packed batches if `packed`."""
    for mode in (FORWARD, TRAINING):
        for size, hidden, steps, batch in ODD_SHAPES if odd else SHAPES:
            yield Workload(DENSE, mode, batch, size, hidden, steps)
        for batch in PACKED_BATCHES if packed else ():
            yield Workload(PACKED, mode, batch, 64, 256, LENGTHS[1])


def gated_workloads(odd: bool = False) -> Iterator[Workload]:
    """Yields the same workloads for cells with gates, except odd sizes, which have no rival."""
    for cell in () if odd else GATED_CELLS:
        yield from (dataclasses.replace(workload, cell=cell) for workload in workloads(packed=True))


def results(
    workload: Workload, call: TimedCall, layer: nn.RNNBase | None = None
) -> dict[str, Tensor]:
    """Runs a call and returns what a rival returns: h_n, or the gradients of the weights.

    There is a gradient for weight_ih, weight_hh and the sum of the biases; a GRU has different ones
    for bias_ih and bias_hh.

    Args:
        workload: The workload of the call.
        call: The call of a layer or of a rival.
        layer: The layer, if the call runs one.
    """
    separate = CELLS[workload.cell].separate_bias_hh
    with torch.inference_mode(workload.mode == FORWARD):
        returned: Any = call()
    if layer is not None:
        # Except in a GRU, both biases have the gradient of their sum.
        gradients = [p.grad for p in layer.parameters()][: None if separate else 3]
        returned = gradients if workload.mode == TRAINING else tensors_in(returned)[1]
    biases = ("grad bias_ih", "grad bias_hh") if separate else ("grad bias",)
    gradient_names = ("grad weight_ih", "grad weight_hh", *biases)
    names = gradient_names if workload.mode == TRAINING else ("h_n",)
    values = returned if workload.mode == TRAINING else (returned,)
    return {
        name: torch.from_numpy(
            np.array(value.detach().numpy() if isinstance(value, Tensor) else value)
        ).squeeze()
        for name, value in zip(names, values, strict=True)
    }


def calls(workload: Workload, threads: int, rivals: list[str]) -> dict[str, TimedCall]:
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
    found = {name: layer_call(layer) for name, layer in layers.items()}
    theirs, ours = (results(workload, found[name], layer) for name, layer in layers.items())
    assert_within_budget(ours, theirs, oracle)
    problem = Problem(workload, baseline, input, gradients)
    for name in rivals if workload.family == DENSE else ():
        call = RIVALS[name][1](problem, threads)
        if call is not None:
            check_rival(name, results(workload, call), oracle, RIVAL_ERROR)
            found[name] = call
    return found


def confine(threads: int) -> None:
    """Restarts this program with as many CPUs as threads, if it may use more.

    Rivals choose their number of threads from the CPUs that the process may use, some of them at
    import; without this, JAX and NumPy would use all CPUs in a benchmark of one thread.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > threads:
        os.sched_setaffinity(0, cpus[:threads])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def installed() -> list[str]:
    """Returns the installed rivals, and prints the missing ones."""
    found = [name for name, (package, _) in RIVALS.items() if importlib.util.find_spec(package)]
    if missing := [name for name in RIVALS if name not in found]:
        print(f"Not raced because not installed: {', '.join(missing)}.")
    return found


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Races every workload; returns a row for each of its implementations."""
    rivals = [] if options.odd else installed()
    budget = pages.time_budget(options, max_rounds=30)
    rows = []
    grid = (*workloads(options.odd, not options.odd), *gated_workloads(options.odd))
    for workload in pages.chosen(grid, options):
        found = calls(workload, options.threads, rivals)
        with torch.inference_mode(workload.mode == FORWARD):
            rounds = race(found, budget)
        medians = {name: statistics.median(r.seconds) for name, r in rounds.items()}
        print(workload, *(f"{name} {duration(value)}" for name, value in medians.items()), sep="  ")
        for name, recorded in rounds.items():
            rows.append(
                {
                    **dataclasses.asdict(workload),
                    "implementation": name,
                    "iterations": recorded.iterations,
                    "median": medians[name],
                    "seconds": [float(f"{s:.6g}") for s in recorded.seconds],
                }
            )
    return rows


def by_workload(rows: list[dict[str, Any]]) -> dict[Workload, dict[str, float]]:
    """Returns the median of each implementation, by workload."""
    found: dict[Workload, dict[str, float]] = {}
    for row in rows:
        found.setdefault(Workload.of(row), {})[row["implementation"]] = row["median"]
    return found


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """Returns a table for each cell."""
    found = by_workload(rows)
    by_cell = [
        {
            workload: medians
            for workload, medians in found.items()
            if (workload.cell, workload.mode) == (cell, mode)
        }
        for cell in LAYERS_OF
    ]
    return "\n\n".join(table_of(medians) for medians in by_cell if medians)


def table_of(found: dict[Workload, dict[str, float]]) -> str:
    """Returns a line per workload: both layers, their ratio, and the best other implementation."""
    baseline, fused = next(iter(found)).layers
    lines = [["(D, H, T)", "B", baseline, fused, "speed-up", "best other", "its time"]]
    ratios, beaten = [], []
    for workload, medians in found.items():
        ours = medians[fused]
        ratios.append(medians[baseline] / ours)
        others = {n: m for n, m in medians.items() if n not in workload.layers}
        best = min(others, key=others.__getitem__, default="")
        label = shape(workload)
        if workload.family == PACKED:
            label = f"({workload.input_size}, {workload.hidden_size}, {LENGTHS[0]}..{LENGTHS[1]})"
        its_time = ""
        if best:
            beaten.append(others[best] > ours)
            its_time = duration(others[best]) + ("" if beaten[-1] else f" {SLOWER}")
        times = (duration(medians[baseline]), duration(ours), ratio(ratios[-1]))
        lines.append([label, str(workload.batch), *times, best, its_time])
    if not beaten:
        lines = [line[:5] for line in lines]
    text = markdown(lines)
    text += (
        f"\n\nSpeed-up over {baseline}: geometric mean "
        f"{ratio(statistics.geometric_mean(ratios))}, worst {ratio(min(ratios))}."
    )
    if beaten:
        text += f" Faster than the best other at {sum(beaten)} of {len(beaten)} sizes."
    return text


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    machine = document["machine"]
    introduction = (
        f"{machine['cpu']}, {machine['threads']} thread(s), confined to as many CPUs; torch "
        f"{machine['torch']}; float32. Others: {', '.join(document['others']) or 'none'}."
    )
    if "hop" in machine:
        introduction += (
            f" A word went from core to core in {1e9 * machine['hop']:.0f} ns at best, "
            f"{1e9 * machine['hop_median']:.0f} ns in the median."
        )
    return pages.by_mode(introduction, document["rows"], table)


def main() -> None:
    parser = pages.parser(__doc__, seconds=1.0)
    parser.add_argument("--odd", action="store_true", help="odd shapes, against nn.RNN alone")
    options = pages.parse(parser)
    confine(options.threads)
    pages.settle(options.threads)

    rows = run(options)
    others = [name for name in RIVALS if any(row["implementation"] == name for row in rows)]
    machine = {"cpu": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    if options.threads > 1:
        machine["hop"], machine["hop_median"] = hop()
    document = {"machine": machine, "others": others, "rows": rows}
    name = f"{'odd' if options.odd else 'peers'}_{options.threads}"
    pages.publish(name, document, report(document), options.record)


if __name__ == "__main__":
    main()
