"""Times several layers in one call: `python -m benchmarks.cpu.layers [--record]`.

Three modules alternate: a stack in one `FusedRNN`, the same number of single-layer `FusedRNN`
modules in sequence, and `nn.RNN`. The column `at once` is the number of layers that the plan in
`csrc/plan.cpp` runs at the same time.
"""

import argparse
import statistics
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks.harness import pages
from benchmarks.harness.grid import BASELINE, FORWARD, FUSED, MODES
from namernn_fast import FusedRNN, ops
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall, race
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import call_of, draw_gradients

SHAPES = [  # hidden_size (also the input_size), seq_len, batch
    (64, 8, 1),
    (64, 128, 1),
    (64, 128, 16),
    (128, 128, 1),
    (128, 128, 4),
    (256, 32, 1),
    (256, 128, 1),
    (256, 128, 4),
    (512, 128, 1),
    (512, 128, 16),
]
LAYERS = (2, 4)


class Chain(nn.Module):
    """Layers in sequence, each a separate call."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(FusedRNN(hidden_size, hidden_size) for _ in range(num_layers))

    def forward(self, x):
        states = []
        for layer in self.layers:
            x, h_n = layer(x)
            states.append(h_n)
        return x, *states


def calls(
    mode: str, num_layers: int, hidden_size: int, input: torch.Tensor
) -> dict[str, TimedCall]:
    """Returns the calls of `nn.RNN`, of single layers and of a stack.

    Gradients start at the output and at the last state of every layer.
    """
    baseline = nn.RNN(hidden_size, hidden_size, num_layers)
    modules: dict[str, nn.Module] = {
        BASELINE: baseline,
        "one by one": Chain(hidden_size, num_layers),
        FUSED: FusedRNN(hidden_size, hidden_size, num_layers),
    }
    grad_output, grad_h_n = draw_gradients(baseline, input)
    chain_gradients = (grad_output, *grad_h_n.split(1))
    return {
        name: call_of(
            module,
            input,
            mode,
            chain_gradients if isinstance(module, Chain) else (grad_output, grad_h_n),
        )
        for name, module in modules.items()
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times every mode, number of layers and shape; returns a row for each combination."""
    rows = []
    budget = pages.time_budget(options, max_rounds=20)
    shapes = SHAPES[:3] if options.quick else SHAPES
    for mode, num_layers, (hidden_size, seq_len, batch) in product(MODES, LAYERS, shapes):
        torch.manual_seed(0)
        input = torch.randn(seq_len, batch, hidden_size)
        with torch.inference_mode(mode == FORWARD):
            raced = calls(mode, num_layers, hidden_size, input)
            rounds = race(raced, budget)
        plan = ops.cpu_plan(
            [batch] * seq_len,
            hidden_size,
            hidden_size,
            torch.get_num_threads(),
            num_layers=num_layers,
        )
        medians = {name: statistics.median(r.seconds) for name, r in rounds.items()}
        shape = [hidden_size, seq_len, batch]
        rows.append({"mode": mode, "num_layers": num_layers, "shape": shape, "medians": medians})
        rows[-1]["at_once"] = plan.layers
        print(rows[-1])
    return rows


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """Returns a line for each number of layers and shape."""
    heads = ["layers", "(H, T, B)", "at once", BASELINE, "one by one", FUSED]
    lines = [[*heads, f"over {BASELINE}", "over one by one"]]
    for row in rows:
        if row["mode"] != mode:
            continue
        medians = row["medians"]
        line = [str(row["num_layers"]), str(tuple(row["shape"])), str(row["at_once"])]
        line += [duration(medians[name]) for name in (BASELINE, "one by one", FUSED)]
        line += [ratio(medians[name] / medians[FUSED]) for name in (BASELINE, "one by one")]
        lines.append(line)
    return markdown(lines)


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    introduction = (
        f"{document['cpu']}, {document['threads']} thread(s); float32. `at once` is the number of "
        "layers that the plan runs at the same time; `one by one` calls a layer at a time."
    )
    return pages.by_mode(introduction, document["rows"], table)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.4))
    pages.settle(options.threads)

    rows = run(options)
    document = {"cpu": cpu_name(), "threads": options.threads, "rows": rows}
    pages.publish("layers", document, report(document), options.record)


if __name__ == "__main__":
    main()
