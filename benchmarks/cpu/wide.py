"""Times wide layers on few sequences: `python -m benchmarks.cpu.wide [--record] [--threads N]`.

These calls are bandwidth-bound: each step reads `weight_hh` for one to eight sequences. The read
floor of a workload is the time to read the weights as often as needed, at the rate at which the
threads read a block of the same size from the nearest memory that can hold it.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import torch

from benchmarks.harness import machine, pages
from benchmarks.harness.grid import (
    BASELINE,
    DENSE,
    FORWARD,
    FUSED,
    MODES,
    TRAINING,
    Workload,
    shape,
)
from benchmarks.harness.spread import speed_up_interval
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall, race
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import gated_calls, rows_of_oracle

SHAPES = {  # (input_size, hidden_size, seq_len, batch)
    torch.float32: (
        (16, 300, 1, 1),
        (300, 300, 8, 4),
        (2048, 300, 8, 2),
        (300, 300, 32, 2),
        (300, 300, 64, 8),
        (4096, 384, 16, 4),
        (32, 400, 64, 1),
        (512, 512, 1, 8),
        (512, 512, 10, 2),
        (4096, 512, 4, 2),
        (64, 512, 16, 4),
        (512, 512, 32, 8),
        (512, 512, 64, 1),
        (700, 700, 5, 2),
        (700, 700, 5, 8),
        (1, 700, 20, 1),
        (768, 768, 1, 4),
        (768, 768, 12, 3),
        (768, 768, 32, 1),
        (1000, 1000, 2, 5),
        (200, 1000, 10, 1),
        (200, 1000, 10, 2),
        (1024, 1024, 1, 1),
        (4096, 1024, 3, 1),
        (1024, 1024, 4, 8),
        (16, 1024, 8, 6),
        (1024, 1024, 10, 4),
        (1024, 1024, 16, 32),
        (1024, 1024, 64, 1),
        (64, 1500, 1, 2),
        (1500, 1500, 2, 8),
        (64, 1500, 12, 3),
        (2048, 2048, 1, 8),
        (2048, 2048, 4, 4),
        (2048, 2048, 10, 1),
        (2048, 2048, 10, 2),
        (128, 2048, 16, 1),
        (3000, 3000, 3, 2),
        (100, 3000, 6, 4),
        (64, 4096, 4, 1),
        (4096, 4096, 1, 1),
        (4096, 4096, 2, 8),
    ),
    torch.bfloat16: (
        (300, 300, 8, 4),
        (4096, 512, 4, 2),
        (512, 512, 64, 1),
        (700, 700, 5, 2),
        (200, 1000, 10, 1),
        (200, 1000, 10, 2),
        (1024, 1024, 4, 8),
        (1024, 1024, 16, 32),
        (64, 1500, 12, 3),
        (2048, 2048, 10, 1),
        (2048, 2048, 10, 2),
        (4096, 4096, 2, 8),
    ),
}
QUICK_SHAPES = 2
"""The number of shapes per dtype in a quick run."""
WORST = 10
PROBE_SECONDS = 0.05


def workloads(quick: bool) -> list[tuple[torch.dtype, Workload]]:
    """Returns the workloads of both modes with their dtypes."""
    return [
        (dtype, Workload(DENSE, mode, batch, *sizes))
        for dtype, shapes in SHAPES.items()
        for *sizes, batch in (shapes[:QUICK_SHAPES] if quick else shapes)
        for mode in MODES
    ]


def calls(workload: Workload, dtype: torch.dtype) -> dict[str, TimedCall]:
    """Returns the gated calls of both layers in a dtype."""
    torch.manual_seed(1)
    input = torch.randn(workload.seq_len, workload.batch, workload.input_size, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # for the layers that `gated_calls` creates
    try:
        return gated_calls(workload, input, rows_of_oracle(workload))
    finally:
        torch.set_default_dtype(before)


def weights_read(workload: Workload) -> int:
    """Returns the minimum number of weights that a call reads.

    A call reads `weight_ih` once, and `weight_hh` in each step of each pass except the first step,
    which has no state to multiply.
    """
    passes = 2 if workload.mode == TRAINING else 1
    recurrent = passes * (workload.seq_len - 1) * workload.hidden_size
    return (workload.input_size + recurrent) * workload.hidden_size


def floor(workload: Workload, dtype: torch.dtype, threads: int) -> float:
    """Returns the seconds that the threads need to read the weights as often as a call must."""
    weights = (workload.input_size + workload.hidden_size) * workload.hidden_size
    rate = machine.read_rate(threads, dtype.itemsize * weights, PROBE_SECONDS)
    return dtype.itemsize * weights_read(workload) / rate


def run(options: argparse.Namespace, wrong: list[str]) -> list[dict[str, Any]]:
    """Times every workload.

    Returns a row for each workload with correct results, and adds the others to `wrong`.
    """
    rows: list[dict[str, Any]] = []
    budget = pages.time_budget(options, max_rounds=30)
    for dtype, workload in workloads(options.quick):
        name = str(dtype).removeprefix("torch.")
        with pages.gated(f"{workload} in {name}", wrong):
            found = calls(workload, dtype)
            with torch.set_grad_enabled(workload.mode != FORWARD):
                rounds = {layer: timed.seconds for layer, timed in race(found, budget).items()}
            medians = {layer: statistics.median(seconds) for layer, seconds in rounds.items()}
            row = {**dataclasses.asdict(workload), "dtype": name, "medians": medians}
            row["rounds"] = len(rounds[FUSED])
            row["spread"] = speed_up_interval(rounds[BASELINE], rounds[FUSED])
            rows.append(row | {"floor": floor(workload, dtype, options.threads)})
            print(*line(rows[-1]), workload.mode, name, sep="  ", flush=True)
    return rows


def speed_up(row: dict[str, Any]) -> float:
    """Returns the ratio of the medians of a row."""
    return row["medians"][BASELINE] / row["medians"][FUSED]


def line(row: dict[str, Any]) -> list[str]:
    """Returns the line of a row in a table."""
    workload, medians = Workload.of(row), row["medians"]
    low, high = row["spread"]
    return [
        shape(workload),
        str(workload.batch),
        *(duration(medians[layer]) for layer in (BASELINE, FUSED)),
        ratio(speed_up(row)),
        f"{low:.2f} to {high:.2f}",
        f"{row['floor'] / medians[FUSED]:.0%}",
    ]


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """Returns the worst sizes in a mode and the geometric mean of all, for each dtype."""
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        found = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
        if not found:
            continue
        worst = sorted(found, key=speed_up)[:WORST]
        mean = statistics.geometric_mean(map(speed_up, found))
        head = [["(D, H, T)", "B", BASELINE, FUSED, "speed-up", "95 %", "of read floor"]]
        parts.append(
            f"The worst {len(worst)} of {len(found)} sizes in {dtype}; the geometric mean of all "
            f"is {ratio(mean)}:\n\n{markdown(head + [line(row) for row in worst])}"
        )
    return "\n\n".join(parts)


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    counts = [row["rounds"] for row in document["rows"]]
    if not counts:
        return "No workload was timed."
    introduction = (
        f"{document['cpu']}, {document['threads']} thread(s); torch {document['torch']}. Speed-ups "
        f"are ratios of the medians of {min(counts)} to {max(counts)} rounds, with their 95 % "
        "interval. The read floor is the time to read the weights, the recurrent ones once per "
        f"step and pass; the column gives it as a share of {FUSED}'s time."
    )
    return pages.by_mode(introduction, document["rows"], table)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=1.5))
    pages.settle(options.threads)

    wrong: list[str] = []
    rows = run(options, wrong)
    document = {"cpu": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    document["rows"] = rows
    name = f"wide_{options.threads}"
    pages.publish(name, document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
