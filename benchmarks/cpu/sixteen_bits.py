"""Times the 16-bit types against float32: `python -m benchmarks.cpu.sixteen_bits [--record]`.

`FusedRNN` in three dtypes and `nn.RNN` in bfloat16 alternate. The tests check their results
against the error budget of each dtype.
"""

from typing import Any

import torch
from torch import nn

from benchmarks.cpu.peers import workloads
from benchmarks.harness import medians, pages
from benchmarks.harness.grid import BASELINE, FUSED, Workload, shape
from namernn_fast import FusedRNN
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import call_of, draw_gradients

LAYERS = {
    f"{FUSED} float32": (FusedRNN, torch.float32),
    f"{FUSED} bfloat16": (FusedRNN, torch.bfloat16),
    f"{FUSED} float16": (FusedRNN, torch.float16),
    f"{BASELINE} bfloat16": (nn.RNN, torch.bfloat16),
}


def calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns the calls of a workload with every layer and dtype."""
    found: dict[str, TimedCall] = {}
    for name, (layer_class, dtype) in LAYERS.items():
        torch.manual_seed(0)
        layer = layer_class(workload.input_size, workload.hidden_size, dtype=dtype)
        input = torch.randn(workload.seq_len, workload.batch, workload.input_size, dtype=dtype)
        found[name] = call_of(layer, input, workload.mode, draw_gradients(layer, input))
    return found


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """Returns a line for each workload of a mode."""
    single, *others = LAYERS
    lines = [["(D, H, T)", "B", single, *(x for name in others for x in (name, "speed-up"))]]
    for row in rows:
        if row["mode"] != mode:
            continue
        seconds, workload = row["medians"], Workload.of(row)
        line = [shape(workload), str(workload.batch), duration(seconds[single])]
        for name in others:
            line += [duration(seconds[name]), ratio(seconds[single] / seconds[name])]
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
    medians.run("sixteen_bits", __doc__, workloads(), calls, report)


if __name__ == "__main__":
    main()
