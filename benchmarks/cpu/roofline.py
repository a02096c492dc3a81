"""How near the layer comes to what the machine can do: `python -m benchmarks.roofline [--write]`.

First the roofs: the rate of multiply-adds on all threads, and the rate at which a core reads the
weights from its own cache, each measured. Then the layer's cells, each with its floor, the least
time that these roofs allow, and the fraction of the peak that it reaches. A clock drifts, and is
lower where multiply-adds are fed from memory than where they stay in registers: the peak of a cell
is measured right behind each of its rounds. Writes `results/roofline.json` and
`results/roofline.png`.
"""

import dataclasses
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

from benchmarks.cpu.peers import cells
from benchmarks.harness import pages
from benchmarks.harness.grid import FORWARD, FUSED, MODES, TRAINING, Cell
from benchmarks.harness.machine import Machine, cpu_name, measure, momentary_rate
from benchmarks.harness.paths import RESULTS
from benchmarks.harness.race import Budget, Call, timed, warm_up
from benchmarks.harness.tables import duration, markdown, shape
from benchmarks.harness.workload import gated_calls
from benchmarks.report.speed import COLOURS, MARKERS
from namernn_fast import FusedRNN

FLOAT_BYTES = 4
BOUND_BY_MULTIPLY_ADDS = 64  # sequences
# Ever less beside the multiply-adds: relu costs next to nothing, packed weights need no packing.
LESS = {"tanh": "as it is", "relu": "relu for tanh", "prepacked": "and prepacked"}


def flops(cell: Cell) -> int:
    """Two for each multiply-add that the results need; the first step has no state to multiply."""
    size, hidden, batch = cell.input_size, cell.hidden_size, cell.batch
    rows = cell.seq_len * batch
    forward = rows * size + (rows - batch) * hidden
    backward = rows * size + 2 * (rows - batch) * hidden
    return 2 * hidden * (forward + (backward if cell.mode == TRAINING else 0))


def floor(cell: Cell, machine: Machine, peak: float) -> float:
    """Seconds that the multiply-adds take at the peak rate, or, if that is longer, reading the
    recurrent weights at every step and pass, each core its share, from its own cache."""
    passes = 2 if cell.mode == TRAINING else 1
    weights = FLOAT_BYTES * cell.hidden_size**2 * cell.seq_len * passes
    return max(flops(cell) / peak, weights / (machine.near_bytes * machine.threads))


def race_peak(
    calls: dict[str, Call], threads: int, seconds: float
) -> tuple[dict[str, float], float]:
    """The median seconds of each call, and the peak at the clock that they leave behind."""
    budget = Budget(seconds)
    counts = {
        name: max(1, round(budget.round_seconds / warm_up(call, budget.warmup_seconds)))
        for name, call in calls.items()
    }
    recorded: dict[str, list[float]] = {name: [] for name in calls}
    peaks = []
    deadline = time.perf_counter() + seconds
    while len(peaks) < budget.min_rounds * len(calls) or time.perf_counter() < deadline:
        for name, call in calls.items():
            recorded[name].append(timed(call, counts[name]))
            peaks.append(threads * momentary_rate())
    return {name: statistics.median(s) for name, s in recorded.items()}, statistics.median(peaks)


def run(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for cell in cells():
        torch.manual_seed(1)
        input = torch.randn(cell.seq_len, cell.batch, cell.input_size)
        known = torch.arange(min(cell.batch, 16))
        call = gated_calls(cell, input, known if len(known) < cell.batch else None)[FUSED]
        with torch.inference_mode(cell.mode == FORWARD):
            medians, peak = race_peak({FUSED: call}, machine.threads, seconds)
        rows.append(
            {
                **dataclasses.asdict(cell),
                "median": medians[FUSED],
                "flops": flops(cell),
                "peak": peak,
                "floor": floor(cell, machine, peak),
            }
        )
        print(cell, duration(rows[-1]["median"]))
    return rows


def take_away(threads: int, seconds: float) -> list[dict[str, Any]]:
    """Fractions of the peak in the cells where multiply-adds bound a layer, with less and less to
    do beside them: what each step gains is what that work costs."""
    rows = []
    for cell in cells():
        if cell.mode != FORWARD or cell.batch < BOUND_BY_MULTIPLY_ADDS:
            continue
        torch.manual_seed(1)
        input = torch.randn(cell.seq_len, cell.batch, cell.input_size)
        shares = {}
        for count in dict.fromkeys((threads, 1)):
            torch.set_num_threads(count)
            layers = {
                act: FusedRNN(cell.input_size, cell.hidden_size, nonlinearity=act)
                for act in ("tanh", "relu")
            }
            packed = FusedRNN(cell.input_size, cell.hidden_size, nonlinearity="relu").prepack()
            calls = {name: partial(layer, input) for name, layer in layers.items()}
            with torch.inference_mode():
                medians, peak = race_peak(
                    {**calls, "prepacked": partial(packed, input)}, count, seconds
                )
            for name in LESS:
                shares[f"{name} {count}"] = flops(cell) / medians[name] / peak
        torch.set_num_threads(threads)
        rows.append({**dataclasses.asdict(cell), "shares": shares})
    return rows


def rest_table(rows: list[dict[str, Any]], threads: int) -> str:
    counts = dict.fromkeys((threads, 1))
    lines = [["(D, H, T)", "B", *(f"{LESS[n]}, {c} thread(s)" for c in counts for n in LESS)]]
    for row in rows:
        shares = (f"{row['shares'][f'{name} {count}']:.0%}" for count in counts for name in LESS)
        lines.append([shape(Cell.of(row)), str(row["batch"]), *shares])
    return markdown(lines)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        ["(D, H, T)", "B", *(f"{m}: {x}" for m in MODES for x in ("time", "floor", "of peak"))]
    ]
    by_mode = [[row for row in rows if row["mode"] == mode] for mode in MODES]
    for same_cell in zip(*by_mode, strict=True):
        cell = Cell.of(same_cell[0])
        line = [shape(cell), str(cell.batch)]
        for row in same_cell:
            share = row["flops"] / row["median"] / row["peak"]
            line += [duration(row["median"]), duration(row["floor"]), f"{share:.0%}"]
        lines.append(line)
    return markdown(lines)


def draw(rows: list[dict[str, Any]], machine: Machine, path: Path) -> None:
    """Rate against the sequences that share a weight once it is read."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    batches = [2**power for power in range(11)]
    near = machine.near_bytes * machine.threads
    roofs = [min(machine.flops, 2 * batch / FLOAT_BYTES * near) for batch in batches]
    axes.plot(batches, roofs, color="0.3", label="roof: own cache, multiply-adds")
    for mode, marker in zip(MODES, MARKERS, strict=False):
        labels = dict.fromkeys(shape(Cell.of(row)) for row in rows)
        for label, colour in zip(labels, (*COLOURS, "#56B4E9"), strict=False):
            points = {
                row["batch"]: row["flops"] / row["median"]
                for row in rows
                if row["mode"] == mode and shape(Cell.of(row)) == label
            }
            axes.plot(
                [*points],
                [*points.values()],
                color=colour,
                marker=marker,
                linestyle="-" if mode == FORWARD else ":",
                label=f"{label} {mode}",
            )
    axes.set(
        xscale="log", yscale="log", xlabel="batch size", ylabel="floating-point operations / s"
    )
    axes.set_xticks(batches, labels=map(str, batches))
    axes.minorticks_off()
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def report(document: dict[str, Any]) -> str:
    machine = Machine(**document["machine"])
    rest = rest_table(document["rest"], machine.threads)
    peaks = [row["peak"] / 1e9 for row in document["rows"]]
    return (
        f"{document['cpu']}, {machine.threads} thread(s): {machine.flops / 1e9:.0f} GFLOP/s of "
        f"float multiply-adds; a core reads {machine.near_bytes / 1e9:.0f} GB/s from half its own "
        f"cache of {machine.near_size >> 10} KiB and {machine.far_bytes / 1e9:.0f} GB/s from "
        f"beyond; a word goes from core to core in {machine.hop * 1e9:.0f} ns (median "
        f"{machine.hop_median * 1e9:.0f}). The floor is that of multiply-adds and of reading "
        f"weight_hh; it has no tanh, no packing and no call in it. The peak of a cell is what a "
        f"core does in registers right behind it, at the clock that the layer leaves, times the "
        f"threads: {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s."
        f"\n\n{table(document['rows'])}\n\nOf the peak where multiply-adds bound the forward pass, "
        f"with ever less to do beside them:\n\n{rest}"
    )


def main() -> None:
    options = pages.parser(__doc__, seconds=0.5).parse_args()
    pages.settle(options.threads)
    pyplot.switch_backend("Agg")

    machine = measure(options.threads)
    rows = run(machine, options.seconds)
    rest = take_away(options.threads, options.seconds)
    document = {"cpu": cpu_name(), "machine": dataclasses.asdict(machine)}
    document.update(rows=rows, rest=rest)
    pages.publish("roofline", document, report(document), options.write)
    draw(rows, machine, RESULTS / "roofline.png")


if __name__ == "__main__":
    main()
