"""The 16-bit types against float32: `python -m benchmarks.sixteen_bits [--write]`.

The same layer in three dtypes and `nn.RNN` in bfloat16 take turns. What they compute is checked by
the tests, against the error budget of each dtype.
"""

import argparse
import dataclasses
import json
import os
import statistics
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.grid import BASELINE, DENSE, FORWARD, FUSED, MODES, TRAINING, Cell
from benchmarks.machine import cpu_name
from benchmarks.peers import PAGE, RESULTS, SHAPES
from benchmarks.race import Budget, Call, race
from benchmarks.report import duration, markdown, ratio, write_section
from benchmarks.workload import train
from namernn_fast import FusedRNN, ops

LAYERS = {
    f"{FUSED} float32": (FusedRNN, torch.float32),
    f"{FUSED} bfloat16": (FusedRNN, torch.bfloat16),
    f"{FUSED} float16": (FusedRNN, torch.float16),
    f"{BASELINE} bfloat16": (nn.RNN, torch.bfloat16),
}


def calls(cell: Cell) -> dict[str, Call]:
    found: dict[str, Call] = {}
    for name, (layer_class, dtype) in LAYERS.items():
        torch.manual_seed(0)
        layer = layer_class(cell.input_size, cell.hidden_size, dtype=dtype)
        input = torch.randn(cell.seq_len, cell.batch, cell.input_size, dtype=dtype)
        if cell.mode == TRAINING:
            found[name] = partial(train, layer, tuple(layer.parameters()), input)
        else:
            found[name] = partial(layer, input)
    return found


def run(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for mode in MODES:
        for size, hidden, steps, batch in SHAPES:
            cell = Cell(DENSE, mode, batch, size, hidden, steps)
            with torch.inference_mode(mode == FORWARD):
                rounds = race(calls(cell), Budget(seconds, max_rounds=20, round_seconds=0.01))
            medians = {name: statistics.median(r.seconds) for name, r in rounds.items()}
            rows.append({**dataclasses.asdict(cell), "medians": medians})
            print(cell, *(f"{name} {duration(value)}" for name, value in medians.items()))
    return rows


def table(rows: list[dict[str, Any]], mode: str) -> str:
    single, *others = LAYERS
    lines = [["(D, H, T)", "B", single, *(x for name in others for x in (name, "speed-up"))]]
    for row in rows:
        if row["mode"] != mode:
            continue
        medians = row["medians"]
        line = [f"({row['input_size']}, {row['hidden_size']}, {row['seq_len']})", str(row["batch"])]
        line.append(duration(medians[single]))
        for name in others:
            line += [duration(medians[name]), ratio(medians[single] / medians[name])]
        lines.append(line)
    return markdown(lines)


def report(document: dict[str, Any]) -> str:
    lines = [
        f"{document['cpu']}, {document['threads']} thread(s); bfloat16 forward on "
        f"`{document['bfloat16']}`. Speed-ups are over {FUSED} in float32."
    ]
    for mode in MODES:
        lines += [f"**{mode}**", table(document["rows"], mode)]
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each cell")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # as conftest.py has it: glibc keeps freed memory

    rows = run(options.seconds)
    document = {"cpu": cpu_name(), "threads": options.threads, "rows": rows}
    document["bfloat16"] = f"cpu {ops.cpu_kernel(torch.bfloat16)}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sixteen_bits.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(report(document))
    if options.write:
        write_section(PAGE, "sixteen bits", report(document))


if __name__ == "__main__":
    main()
