"""How near the layer comes to what the machine can do: `python -m benchmarks.roofline [--write]`.

First the roofs: the rate of multiply-adds on all threads, and the rate at which a core reads the
weights from its own cache, each measured. Then the layer's cells, each with its floor, the least
time that these roofs allow, and the fraction of the peak that it reaches. Clocks drift: each cell
takes turns with a measurement of the peak. Writes `results/roofline.json` and
`results/roofline.png`.
"""

import dataclasses
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

from benchmarks import page
from benchmarks.grid import FORWARD, FUSED, MODES, TRAINING, Cell
from benchmarks.machine import Machine, cpu_name, measure, multiply_add_rate
from benchmarks.peers import cells
from benchmarks.race import Budget, race
from benchmarks.report import COLOURS, MARKERS, RESULTS, duration, markdown, shape
from benchmarks.workload import gated_calls

FLOAT_BYTES = 4
PEAK = "peak"
PEAK_SECONDS = 0.02


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


def _append_peak(peaks: list[float], threads: int) -> None:
    peaks.append(multiply_add_rate(threads, PEAK_SECONDS))


def run(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for cell in cells():
        torch.manual_seed(1)
        input = torch.randn(cell.seq_len, cell.batch, cell.input_size)
        known = torch.arange(min(cell.batch, 16))
        call = gated_calls(cell, input, known if len(known) < cell.batch else None)[FUSED]
        peaks: list[float] = []
        calls = {
            FUSED: call,
            PEAK: partial(_append_peak, peaks, machine.threads),
        }
        with torch.inference_mode(cell.mode == FORWARD):
            recorded = race(calls, Budget(seconds, max_rounds=20))[FUSED].seconds
        peak = statistics.median(peaks)
        rows.append(
            {
                **dataclasses.asdict(cell),
                "median": statistics.median(recorded),
                "best": min(recorded),
                "flops": flops(cell),
                "peak": peak,
                "floor": floor(cell, machine, peak),
            }
        )
        print(cell, duration(rows[-1]["median"]))
    return rows


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
    peaks = [row["peak"] / 1e9 for row in document["rows"]]
    return (
        f"{document['cpu']}, {machine.threads} thread(s): {machine.flops / 1e9:.0f} GFLOP/s of "
        f"float multiply-adds; a core reads {machine.near_bytes / 1e9:.0f} GB/s from half its own "
        f"cache of {machine.near_size >> 10} KiB and {machine.far_bytes / 1e9:.0f} GB/s from "
        f"beyond; a word goes from core to core in {machine.hop * 1e9:.0f} ns (median "
        f"{machine.hop_median * 1e9:.0f}). The floor is that of multiply-adds and of reading "
        f"weight_hh; it has no tanh, no packing and no call in it. The peak is measured again in "
        f"turns with each cell, {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s: the clock drifts."
        f"\n\n{table(document['rows'])}"
    )


def main() -> None:
    options = page.parser(__doc__, seconds=0.5).parse_args()
    page.settle(options.threads)
    pyplot.switch_backend("Agg")

    machine = measure(options.threads)
    rows = run(machine, options.seconds)
    document = {"cpu": cpu_name(), "machine": dataclasses.asdict(machine), "rows": rows}
    page.publish("roofline", document, report(document), options.write)
    draw(rows, machine, RESULTS / "roofline.png")


if __name__ == "__main__":
    main()
