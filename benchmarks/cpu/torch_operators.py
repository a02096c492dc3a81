"""Times the reference path: `python -m benchmarks.cpu.torch_operators [--record]`.

The reference path serves every device and dtype without a kernel. Here the C++ extension is
disabled, so that this path runs on a CPU, against `nn.RNN`. All batches are timed with `--record`,
otherwise two.
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
    Cell,
)
from benchmarks.harness.spread import paired_speed_up
from namernn_fast import availability
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import Call, race
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.workload import gated_calls

LAYER_BATCHES = (1, 16, 64, 256)
FEW_BATCHES = (1, 64)
LARGEST_WORK = 10**9
"""Limit of multiply-adds of a timed forward pass."""


def layer_calls(cell: Cell) -> dict[str, Call]:
    """Returns the gated calls of both layers on dense or packed input."""
    torch.manual_seed(1)
    input = torch.randn(cell.seq_len, cell.batch, cell.input_size)
    if cell.family == DENSE:
        return gated_calls(cell, input)
    lengths = torch.randint(1, cell.seq_len + 1, (cell.batch,))
    return gated_calls(cell, pack_padded_sequence(input, lengths, enforce_sorted=False))


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], partial]]:
    """Yields what identifies each row, and what makes its calls."""
    batches = LAYER_BATCHES if options.record else FEW_BATCHES
    for family, shape, batch, mode in product((DENSE, PACKED), SHAPES, batches, MODES):
        cell = Cell(family, mode, batch, *shape)
        if batch * cell.row_work > LARGEST_WORK or (options.quick and not cell.is_small):
            continue
        of_row = {"family": family, "threads": options.threads, "shape": shape, "batch": batch}
        yield of_row | {"mode": mode}, partial(layer_calls, cell)


def run(options: argparse.Namespace, wrong: list[str]) -> list[dict[str, Any]]:
    """Times every case whose results are right; returns a row for each, and adds the others to
    `wrong`."""
    availability.HAS_EXTENSION = False
    rows: list[dict[str, Any]] = []
    budget = pages.time_budget(options, max_rounds=100)
    if not options.quick:
        budget = dataclasses.replace(budget, round_seconds=0.003)
    for of_row, make_calls in cases(options):
        pages.settle(of_row["threads"])
        with pages.gated(of_row, wrong):
            calls = make_calls()
            with torch.inference_mode(of_row["mode"] == FORWARD):
                rounds = race(calls, budget)
            medians = {name: statistics.median(r.seconds) for name, r in rounds.items()}
            speed_up = paired_speed_up(rounds[BASELINE].seconds, rounds[FUSED].seconds)
            rows.append({**of_row, "medians": medians, "speed_up": speed_up})
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
