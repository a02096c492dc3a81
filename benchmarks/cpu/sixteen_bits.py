"""The 16-bit types against float32: `python -m benchmarks.sixteen_bits [--write]`.

The same layer in three dtypes and `nn.RNN` in bfloat16 take turns. What they compute is checked by
the tests, against the error budget of each dtype.
"""

import dataclasses
import statistics
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cpu.peers import cells
from benchmarks.harness import pages
from benchmarks.harness.grid import BASELINE, FORWARD, FUSED, TRAINING, Cell
from benchmarks.harness.machine import cpu_name
from benchmarks.harness.race import Budget, Call, race
from benchmarks.harness.tables import duration, markdown, ratio, shape
from benchmarks.harness.workload import train
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
    for cell in cells():
        with torch.inference_mode(cell.mode == FORWARD):
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
        medians, cell = row["medians"], Cell.of(row)
        line = [shape(cell), str(cell.batch), duration(medians[single])]
        for name in others:
            line += [duration(medians[name]), ratio(medians[single] / medians[name])]
        lines.append(line)
    return markdown(lines)


def report(document: dict[str, Any]) -> str:
    introduction = (
        f"{document['cpu']}, {document['threads']} thread(s); bfloat16 on "
        f"`{document['bfloat16']}`. Speed-ups are over {FUSED} in float32."
    )
    return pages.by_mode(introduction, document["rows"], table)


def main() -> None:
    options = pages.parser(__doc__, seconds=0.5).parse_args()
    pages.settle(options.threads)

    rows = run(options.seconds)
    document = {"cpu": cpu_name(), "threads": options.threads, "rows": rows}
    document["bfloat16"] = f"cpu {ops.cpu_kernel(torch.bfloat16)}"
    pages.publish("sixteen_bits", document, report(document), options.write)


if __name__ == "__main__":
    main()
