"""Times the reference path: `python -m benchmarks.cpu.torch_operators [--record]`.

The reference path serves every device and dtype without a kernel. Here the C++ extension is
disabled, so that this path runs on a CPU; it is raced against `nn.RNN`. With `--record` all batch
sizes are timed, otherwise two.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness import pages
from benchmarks.harness.grid import (
    BASELINE,
    DENSE,
    FORWARD,
    FUSED,
    MODES,
    PACKED,
    SHAPES,
    SIZES,
    Workload,
)
from benchmarks.harness.spread import paired_speed_up
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall, race
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import gated_calls
from namernn_fast.machine import availability

LAYER_BATCHES = (1, 16, 64, 256)
FEW_BATCHES = (1, 64)
LARGEST_WORK = 10**9
"""The maximum number of multiply-adds in a timed forward pass."""


def layer_calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns the gated calls of both layers on dense or packed input."""
    torch.manual_seed(1)
    input = torch.randn(workload.seq_len, workload.batch, workload.input_size)
    if workload.family == DENSE:
        return gated_calls(workload, input)
    lengths = torch.randint(1, workload.seq_len + 1, (workload.batch,))
    return gated_calls(workload, pack_padded_sequence(input, lengths, enforce_sorted=False))


def workloads(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], partial]]:
    """Yields the fields that identify each row, and a function that makes its calls."""
    batches = LAYER_BATCHES if options.record else FEW_BATCHES
    for family, shape, batch, mode in product((DENSE, PACKED), SHAPES, batches, MODES):
        workload = Workload(family, mode, batch, *shape)
        if batch * workload.row_work > LARGEST_WORK or (options.quick and not workload.is_small):
            continue
        row_fields = {"family": family, "threads": options.threads, "shape": shape, "batch": batch}
        yield row_fields | {"mode": mode}, partial(layer_calls, workload)


def run(options: argparse.Namespace, wrong: list[str]) -> list[dict[str, Any]]:
    """Times every workload.

    Returns a row for each workload with correct results, and adds the others to `wrong`.
    """
    availability.HAS_EXTENSION = False
    rows: list[dict[str, Any]] = []
    budget = pages.time_budget(options, max_rounds=100)
    if not options.quick:
        budget = dataclasses.replace(budget, round_seconds=0.003)
    for row_fields, make_calls in workloads(options):
        pages.settle(row_fields["threads"])
        with pages.gated(row_fields, wrong):
            calls = make_calls()
            with torch.inference_mode(row_fields["mode"] == FORWARD):
                rounds = race(calls, budget)
            medians = {name: statistics.median(r.seconds) for name, r in rounds.items()}
            speed_up = paired_speed_up(rounds[BASELINE].seconds, rounds[FUSED].seconds)
            rows.append({**row_fields, "medians": medians, "speed_up": speed_up})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each shape and batch of one family, and one with the worst ratios."""
    header = ["(D, H, T)", "B"]
    lines: dict[tuple[str, int], list[str]] = {}
    worst = ["worst", ""]
    for mode in MODES:
        untimed = [""] * (len(header) - 2)
        header += [f"{mode}: {BASELINE}", "reference path", "speed-up"]
        ratios = []
        for row in rows:
            if row["mode"] == mode:
                key = (str(tuple(row["shape"])), row["batch"])
                times = [row["medians"][name] for name in (BASELINE, FUSED)]
                ratios.append(row["speed_up"])
                line = lines.setdefault(key, [key[0], str(key[1]), *untimed])
                line += [*map(duration, times), ratio(ratios[-1])]
        for line in lines.values():
            line += [""] * (len(header) - len(line))
        worst += ["", "", ratio(min(ratios)) if ratios else ""]
    return markdown([header, *lines.values(), worst])


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    parts = [
        f"{document['cpu']}; torch {document['torch']}; float32. Times are medians of rounds; a "
        f"speed-up is the median of the ratios of neighbouring rounds. {SIZES}"
    ]
    for family, threads in dict.fromkeys((r["family"], r["threads"]) for r in document["rows"]):
        rows = [r for r in document["rows"] if (r["family"], r["threads"]) == (family, threads)]
        title = f"Reference path, {family} input, {threads} thread(s)"
        parts += [f"**{title}**", table(rows)]
    return "\n\n".join(parts)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.4))
    wrong: list[str] = []
    rows = run(options, wrong)
    document = {"cpu": cpu_name(), "torch": torch.__version__, "rows": rows}
    pages.publish("torch_operators", document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
