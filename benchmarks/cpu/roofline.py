"""Compares the layer's speed with the machine's limits: `python -m benchmarks.cpu.roofline`.

First the program measures the limits: the rate of multiply-adds on all threads, and the rate at
which a core reads weights from its L2 cache. For each workload it reports the floor, which is the
minimum time that these limits allow, and the fraction of the peak rate that the layer reaches. A
core's clock drifts, and is lower if multiply-adds read memory than if their operands stay in
registers. So the peak is measured again after each round.
"""

import dataclasses
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

from benchmarks.cpu.peers import SHAPES
from benchmarks.harness import columns, pages
from benchmarks.harness.columns import BATCH, SHAPE, Rows
from benchmarks.harness.grid import FORWARD, FUSED, MODES, SIZES, TRAINING, Workload, shape
from benchmarks.harness.machine import Machine, measure, momentary_rate
from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from benchmarks.harness.study import Document, draw_input, grid
from benchmarks.report.plots import save
from namernn_fast import FusedRNN
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.plot import COLOURS, MARKERS
from namernn_fast.bench.race import QUICK, TimeBudget, TimedCall, timed, warm_up
from namernn_fast.bench.tables import duration
from namernn_fast.bench.timed_calls import gated_calls

FLOAT_BYTES = 4
BOUND_BY_MULTIPLY_ADDS = 64  # minimum batch size
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
    return 2 * hidden * (forward + (backward if workload.mode == TRAINING else 0))


def floor(workload: Workload, machine: Machine, peak: float) -> float:
    """Returns the minimum seconds of a workload.

    This is the time of the multiply-adds at the peak rate or, if longer, of reading weight_hh in
    every step and pass. The threads split weight_hh equally and read it from their L2 caches.
    """
    passes = 2 if workload.mode == TRAINING else 1
    weights = FLOAT_BYTES * workload.hidden_size**2 * workload.seq_len * passes
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


def run(machine: Machine, workloads: list[Workload], budget: TimeBudget) -> Rows:
    """Times every workload and measures its peak; returns a row for each."""
    rows = []
    for workload in workloads:
        checked = torch.arange(16) if workload.batch > 16 else None
        call = gated_calls(workload, draw_input(workload), checked)[FUSED]
        with torch.inference_mode(workload.mode == FORWARD):
            medians, peak = race_peak({FUSED: call}, machine.threads, budget)
        rows.append(
            {
                **dataclasses.asdict(workload),
                "median": medians[FUSED],
                "flops": flops(workload),
                "peak": peak,
                "floor": floor(workload, machine, peak),
            }
        )
        print(workload, duration(rows[-1]["median"]))
    return rows


def race_activations(most_threads: int, workloads: list[Workload], budget: TimeBudget) -> Rows:
    """Measures what fraction of the peak tanh and relu layers reach at compute-bound sizes.

    The difference is the cost of tanh.
    """
    rows = []
    for workload in workloads:
        if workload.mode != FORWARD or workload.batch < BOUND_BY_MULTIPLY_ADDS:
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


COLUMNS = (
    SHAPE,
    BATCH,
    columns.text("time", lambda row: duration(row["median"])),
    columns.text("floor", lambda row: duration(row["floor"])),
    columns.text("of peak", lambda row: f"{row['flops'] / row['median'] / row['peak']:.0%}"),
)


def draw(document: Document, folder: Path) -> list[Path]:
    """Plots the rate against the batch size: a larger batch reuses each weight more often."""
    pyplot.switch_backend("Agg")
    rows, machine = document["rows"], Machine(**document["machine"])
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
    activations = activation_table(document["activations"], machine.threads)
    times = columns.table(document["rows"], COLUMNS, beside=["mode"])
    peaks = [row["peak"] / 1e9 for row in document["rows"]]
    return (
        f"{document['cpu']}, {machine.threads} thread(s): {machine.flops / 1e9:.0f} GFLOP/s of "
        f"float multiply-adds; a core reads {machine.l2_rate / 1e9:.0f} GB/s from half its own "
        f"L2 cache of {machine.l2_bytes >> 10} KiB and {machine.beyond_l2_rate / 1e9:.0f} GB/s "
        f"from beyond; passing a word between cores takes {machine.hop * 1e9:.0f} ns (median "
        f"{machine.hop_median * 1e9:.0f}). The floor counts multiply-adds and reading weight_hh, "
        f"but not tanh, packing or call overhead. The peak for a size is the rate of multiply-adds "
        f"from registers, measured on one core right after the rounds of that size, when the clock "
        f"is still the same, times the number of threads: {min(peaks):.0f} to {max(peaks):.0f} "
        f"GFLOP/s. {SIZES}"
        f"\n\n{times}\n\nFractions of the peak that the forward pass reaches "
        f"with tanh and with relu, at sizes bound by multiply-adds:\n\n{activations}"
    )


SECTION = Section(PERFORMANCE_TABLES, "roofline", report)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.5))
    pages.settle(options.threads)
    machine = measure(options.threads)
    workloads = [case for case in grid(SHAPES, ["rnn"]) if case.is_small or not options.quick]
    # The default rounds are longer than the rounds of other benchmarks.
    budget = QUICK if options.quick else TimeBudget(options.seconds)
    rows = run(machine, workloads, budget)
    document = {"cpu": cpu_name(), "machine": dataclasses.asdict(machine), "rows": rows}
    document["activations"] = race_activations(options.threads, workloads, budget)
    pages.publish("roofline", document, [SECTION], options.record, draw=draw)


if __name__ == "__main__":
    main()
