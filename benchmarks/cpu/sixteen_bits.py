"""Times the 16-bit types against float32: `python -m benchmarks.cpu.sixteen_bits [--record]`.

`FusedRNN` in three dtypes and `nn.RNN` in bfloat16 alternate. The tests check their results
against the error budget of each dtype.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.cpu.peers import cells
from benchmarks.harness import pages
from benchmarks.harness.grid import BASELINE, FORWARD, FUSED, Cell, shape
from namernn_fast import FusedRNN, ops
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import Call, race
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.workload import call_of, draw_gradients

LAYERS = {
    f"{FUSED} float32": (FusedRNN, torch.float32),
    f"{FUSED} bfloat16": (FusedRNN, torch.bfloat16),
    f"{FUSED} float16": (FusedRNN, torch.float16),
    f"{BASELINE} bfloat16": (nn.RNN, torch.bfloat16),
}


def calls(cell: Cell) -> dict[str, Call]:
    """Returns the calls of every layer and dtype in one cell."""
    found: dict[str, Call] = {}
    for name, (layer_class, dtype) in LAYERS.items():
        torch.manual_seed(0)
        layer = layer_class(cell.input_size, cell.hidden_size, dtype=dtype)
        input = torch.randn(cell.seq_len, cell.batch, cell.input_size, dtype=dtype)
        found[name] = call_of(layer, input, cell.mode, draw_gradients(layer, input))
    return found


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times every cell; returns a row for each."""
    rows = []
    budget = pages.time_budget(options, max_rounds=20)
    for cell in pages.chosen(cells(), options):
        with torch.inference_mode(cell.mode == FORWARD):
            rounds = race(calls(cell), budget)
        medians = {name: statistics.median(r.seconds) for name, r in rounds.items()}
        rows.append({**dataclasses.asdict(cell), "medians": medians})
        print(cell, *(f"{name} {duration(value)}" for name, value in medians.items()))
    return rows


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """Returns a line for each cell of a mode."""
    single, *others = LAYERS
    lines = [["(D, H, T)", "B", single, *(x for name in others for x in (name, "speed-up"))]]
    for row in rows:
        if row["mode"] != mode:
            continue
        medians, cell = row["medians"], Cell.of(row)
        line = [shape(cell), str(cell.batch), duration(medians[single])]
        for name in others:
            line += [duration(medians[name]), ratio(medians[single] / medians[name])]
        lines.append(line)
    return markdown(lines)


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    introduction = (
        f"{document['cpu']}, {document['threads']} thread(s); bfloat16 on "
        f"`{document['bfloat16']}`. Speed-ups are over {FUSED} in float32."
    )
    return pages.by_mode(introduction, document["rows"], table)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.5))
    pages.settle(options.threads)

    rows = run(options)
    document = {"cpu": cpu_name(), "threads": options.threads, "rows": rows}
    document["bfloat16"] = f"cpu {ops.cpu_kernel(torch.bfloat16)}"
    pages.publish("sixteen_bits", document, report(document), options.record)


if __name__ == "__main__":
    main()
