"""Compares the layer's speed with the machine's limits: `python -m benchmarks.cpu.roofline`.

First the program measures the limits: the rate of multiply-adds on all threads, and the rate at
which a core reads weights from its L2 cache. For each workload it reports the floor, which is the
minimum time that these limits allow, and the fraction of the peak rate that the layer reaches. The
kernels' products are also timed by themselves: what a layer loses beside them is its cell, packing,
memory and overhead. A core's clock drifts, and is lower if multiply-adds read memory than if their
operands stay in registers. So the peak is measured again after each round.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

from benchmarks.harness import columns, pages
from benchmarks.harness.columns import BATCH, SHAPE, Row, Rows
from benchmarks.harness.grid import FORWARD, MODES, SIZES, TRAINING, Workload, shape
from benchmarks.harness.machine import Machine, measure, momentary_rate, product_share
from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from benchmarks.harness.study import Document, draw_input, grid
from benchmarks.report.plots import save
from namernn_fast import FusedRNN
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.plot import COLOURS, MARKERS
from namernn_fast.bench.race import QUICK, TimeBudget, TimedCall, timed, warm_up
from namernn_fast.bench.tables import duration
from namernn_fast.bench.timed_calls import gated_calls
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS, VANILLA

FLOAT_BYTES = 4
BOUND_BY_MULTIPLY_ADDS = 64  # minimum batch size
SHAPES = (  # D, H, T, B
    *((64, 64, 8, batch) for batch in (1, 16)),
    *((64, 256, 8, batch) for batch in (1, 16, 64, 256, 1024)),
    *((128, 128, 128, batch) for batch in (1, 16, 64, 256, 512)),
    (256, 256, 64, 64),
    *((512, 512, 64, batch) for batch in (1, 64, 256)),
    (1024, 1024, 32, 64),
)
WORKLOADS = grid(SHAPES, [*LAYERS_OF])
# Besides multiply-adds, the forward pass computes the activation; relu costs next to nothing.
ACTIVATIONS = ("tanh", "relu")


def flops(workload: Workload) -> int:
    """Returns the number of required operations; a multiply-add counts as two.

    The first step has no state to multiply.
    """
    size, hidden, batch = workload.input_size, workload.hidden_size, workload.batch
    rows = workload.seq_len * batch
    forward = rows * size + (rows - batch) * hidden
    backward = rows * size + 2 * (rows - batch) * hidden
    gates = CELLS[workload.cell].gates
    return 2 * gates * hidden * (forward + (backward if workload.mode == TRAINING else 0))


def floor(workload: Workload, machine: Machine, peak: float) -> float:
    """Returns the minimum seconds of a workload.

    This is the time of the multiply-adds at the peak rate or, if longer, of reading weight_hh in
    every step and pass. The threads split weight_hh equally and read it from their L2 caches.
    """
    passes = 2 if workload.mode == TRAINING else 1
    weight_hh = FLOAT_BYTES * CELLS[workload.cell].gates * workload.hidden_size**2
    weights = weight_hh * workload.seq_len * passes
    return max(flops(workload) / peak, weights / (machine.l2_rate * machine.threads))


def race_peak(
    calls: dict[str, TimedCall], threads: int, budget: TimeBudget
) -> tuple[dict[str, float], float]:
    """Returns each call's median seconds, and the median of the peak rates after the rounds."""
    counts = {
        name: max(1, round(budget.round_seconds / warm_up(call, budget.warmup_seconds)))
        for name, call in calls.items()
    }
    recorded: dict[str, list[float]] = {name: [] for name in calls}
    peaks = []
    deadline = time.perf_counter() + budget.seconds
    while len(peaks) < budget.min_rounds * len(calls) or time.perf_counter() < deadline:
        for name, call in calls.items():
            recorded[name].append(timed(call, counts[name]))
            peaks.append(threads * momentary_rate())
    return {name: statistics.median(s) for name, s in recorded.items()}, statistics.median(peaks)


def run(machine: Machine, workloads: list[Workload], threads: int, budget: TimeBudget) -> Rows:
    """Times every workload and measures its peak; returns a row for each."""
    rows = []
    torch.set_num_threads(threads)
    for workload in workloads:
        checked = torch.arange(16) if workload.batch > 16 else None
        fused = workload.layers.fused
        call = gated_calls(workload, draw_input(workload), checked)[fused]
        with torch.inference_mode(workload.mode == FORWARD):
            medians, peak = race_peak({fused: call}, threads, budget)
        rows.append(
            {
                **dataclasses.asdict(workload),
                "threads": threads,
                "median": medians[fused],
                "flops": flops(workload),
                "peak": peak,
                "floor": floor(workload, dataclasses.replace(machine, threads=threads), peak),
            }
        )
        if workload.batch >= BOUND_BY_MULTIPLY_ADDS:
            sequences, hidden = workload.batch // threads, workload.hidden_size
            rows[-1]["products"] = product_share(sequences, hidden, hidden)
        print(workload, f"{threads} thread(s)", duration(rows[-1]["median"]))
    return rows


def measure_products(rows: Sequence[int], sizes: Sequence[int]) -> Rows:
    """Measures the fraction of a core's peak that square products reach."""
    return [
        {"size": size, "shares": {str(count): product_share(count, size, size) for count in rows}}
        for size in sizes
    ]


def race_activations(most_threads: int, workloads: list[Workload], budget: TimeBudget) -> Rows:
    """Measures what fraction of the peak tanh and relu layers reach at compute-bound sizes.

    The difference is the cost of tanh.
    """
    rows = []
    for workload in workloads:
        is_vanilla = CELLS[workload.cell] is VANILLA
        is_bound = workload.mode == FORWARD and workload.batch >= BOUND_BY_MULTIPLY_ADDS
        if not (is_vanilla and is_bound):
            continue
        input, shares = draw_input(workload), {}
        for threads in dict.fromkeys((most_threads, 1)):
            torch.set_num_threads(threads)
            sizes = workload.input_size, workload.hidden_size
            calls = {
                name: partial(FusedRNN(*sizes, nonlinearity=name), input) for name in ACTIVATIONS
            }
            with torch.inference_mode():
                medians, peak = race_peak(calls, threads, budget)
            for name in ACTIVATIONS:
                shares[f"{name} {threads}"] = flops(workload) / medians[name] / peak
        torch.set_num_threads(most_threads)
        rows.append({**dataclasses.asdict(workload), "shares": shares})
    return rows


def activation_table(rows: Rows, threads: int) -> str:
    """Returns a line for each workload, with a column for each activation and number of threads."""
    shares = (
        columns.text(
            f"{name}, {count} thread(s)",
            lambda row, key=f"{name} {count}": f"{row['shares'][key]:.0%}",
        )
        for count in dict.fromkeys((threads, 1))
        for name in ACTIVATIONS
    )
    return columns.table(rows, (SHAPE, BATCH, *shares))


def share(row: Row) -> float:
    """Returns the fraction of the peak rate that a layer reaches."""
    return float(row["flops"] / row["median"] / row["peak"])


def share_of_products(row: Row) -> str:
    """Returns the layer's rate as a fraction of its products' rate, or an empty string."""
    return f"{share(row) / row['products']:.0%}" if "products" in row else ""


COLUMNS = (
    SHAPE,
    BATCH,
    columns.text("time", lambda row: duration(row["median"])),
    columns.text("floor", lambda row: duration(row["floor"])),
    columns.text("of peak", lambda row: f"{share(row):.0%}"),
    columns.text("of products", share_of_products),
)
ROWS_OF_PRODUCTS, SIZES_OF_PRODUCTS = (6, 32, 64, 96, 128, 256), (128, 256, 512, 1024)


def product_table(rows: Rows) -> str:
    """Returns a line for each size, with a column for each number of rows."""
    shares = (
        columns.text(f"{count} rows", lambda row, count=count: f"{row['shares'][count]:.0%}")
        for count in rows[0]["shares"]
    )
    return columns.table(rows, (columns.key("inputs, outputs", "size"), *shares))


def drawn(row: Row, machine: Machine) -> bool:
    """Returns whether the plot shows a row: it shows the vanilla layer on all threads."""
    return CELLS[row["cell"]] is VANILLA and row["threads"] == machine.threads


def draw(document: Document, folder: Path) -> list[Path]:
    """Plots the rate against the batch size: a larger batch reuses each weight more often."""
    pyplot.switch_backend("Agg")
    machine = Machine(**document["machine"])
    rows = [row for row in document["rows"] if drawn(row, machine)]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    batches = [2**power for power in range(11)]
    l2_rate = machine.l2_rate * machine.threads
    roofs = [min(machine.flops, 2 * batch / FLOAT_BYTES * l2_rate) for batch in batches]
    axes.plot(batches, roofs, color="0.3", label="roof: L2 cache, multiply-adds")
    for mode, marker in zip(MODES, MARKERS, strict=False):
        labels = dict.fromkeys(shape(Workload.of(row)) for row in rows)
        for label, colour in zip(labels, COLOURS, strict=False):
            chosen = [r for r in rows if (r["mode"], shape(Workload.of(r))) == (mode, label)]
            axes.plot(
                [row["batch"] for row in chosen],
                [row["flops"] / row["median"] for row in chosen],
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
    figure.legend(
        title="(input size, hidden size,\nsequence length)",
        loc="outside right center",
        frameon=False,
        fontsize="small",
        title_fontsize="small",
    )
    path = folder / "roofline.png"
    save(figure, path)
    return [path]


def report(document: dict[str, Any]) -> str:
    machine = Machine(**document["machine"])
    activations, rows = activation_table(document["activations"], machine.threads), document["rows"]
    times = "\n\n".join(
        f"**{LAYERS_OF[cell].fused}, {threads} thread(s)**\n\n"
        + columns.table(
            [row for row in rows if (row["cell"], row["threads"]) == (cell, threads)],
            COLUMNS,
            beside=["mode"],
        )
        for cell, threads in dict.fromkeys(
            (row["cell"], row["threads"]) for row in document["rows"]
        )
    )
    peaks = [row["peak"] / row["threads"] / 1e9 for row in rows]
    return (
        f"{document['cpu']}, {machine.threads} thread(s): {machine.flops / 1e9:.0f} GFLOP/s of "
        f"float multiply-adds; a core reads {machine.l2_rate / 1e9:.0f} GB/s from half its own "
        f"L2 cache of {machine.l2_bytes >> 10} KiB and {machine.beyond_l2_rate / 1e9:.0f} GB/s "
        f"from beyond; passing a word between cores takes {machine.hop * 1e9:.0f} ns (median "
        f"{machine.hop_median * 1e9:.0f}). The peak is the rate of multiply-adds from registers, "
        f"measured on one core right after each round, when the clock is still the same: "
        f"{min(peaks):.0f} to {max(peaks):.0f} GFLOP/s a core."
        "\n\nFractions of a core's peak that the forward pass's products reach by themselves. The "
        f"weights are square matrices:\n\n{product_table(document['products'])}"
        "\n\nWhole layers. The floor counts multiply-adds and reading weight_hh, but not the cell, "
        "packing or call overhead. `of products` compares the layer with products of as many rows "
        f"as a thread has sequences. {SIZES}\n\n{times}"
        "\n\nFractions of the peak that the forward pass of FusedRNN reaches with tanh and with "
        f"relu, at sizes bound by multiply-adds:\n\n{activations}"
    )


SECTION = Section(PERFORMANCE_TABLES, "roofline", report)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.5))
    pages.settle(options.threads)
    machine = measure(options.threads)
    workloads = [case for case in WORKLOADS if case.is_small or not options.quick]
    # The default rounds are longer than the rounds of other benchmarks.
    budget = QUICK if options.quick else TimeBudget(options.seconds)
    rows = [
        row
        for threads in sorted({1, options.threads})
        for row in run(machine, workloads, threads, budget)
    ]
    document = {"cpu": cpu_name(), "machine": dataclasses.asdict(machine), "rows": rows}
    document["products"] = measure_products(ROWS_OF_PRODUCTS, SIZES_OF_PRODUCTS)
    document["activations"] = race_activations(options.threads, workloads, budget)
    pages.publish("roofline", document, [SECTION], options.record, draw=draw)


if __name__ == "__main__":
    main()
