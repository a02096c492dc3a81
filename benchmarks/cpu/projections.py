"""Times LSTMs that project h: `python -m benchmarks.cpu.projections [--record]`.

The rival is `nn.LSTM(proj_size=...)`, which runs step by step in ATen operators, because torch does
not use oneDNN for LSTMs with projections.
"""

import argparse
import copy
import statistics
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness import pages
from benchmarks.harness.grid import DENSE, FORWARD, PACKED, TRAINING
from benchmarks.harness.spread import race_on_threads
from namernn_fast import FusedLSTM
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import call_of, draw_gradients, results
from namernn_fast.testing import assert_within_budget

BASELINE, FUSED = "nn.LSTM", "FusedLSTM"
SHAPES = (  # input_size, hidden_size, proj_size, num_layers, seq_len
    (64, 64, 32, 1, 8),
    (80, 256, 64, 2, 50),
    (80, 512, 128, 1, 40),
    (128, 320, 160, 2, 40),
    (256, 1024, 256, 1, 20),
)
BATCHES = (1, 16, 64)
KINDS = ((DENSE, FORWARD), (DENSE, TRAINING), (PACKED, FORWARD), (PACKED, TRAINING))
THREADS = (2, 1)


def calls(shape: tuple[int, ...], batch: int, layout: str, mode: str) -> dict[str, TimedCall]:
    """Returns the calls of both layers, whose results meet the error budget.

    The lengths of packed sequences are spread evenly from one step to seq_len.
    """
    input_size, hidden_size, proj_size, num_layers, seq_len = shape
    torch.manual_seed(0)
    baseline = nn.LSTM(input_size, hidden_size, num_layers, proj_size=proj_size)
    fused = FusedLSTM(input_size, hidden_size, num_layers, proj_size=proj_size)
    fused.load_state_dict(baseline.state_dict())
    input: Any = torch.randn(seq_len, batch, input_size)
    if layout == PACKED:
        lengths = torch.linspace(seq_len, 1, batch).round().long()
        input = pack_padded_sequence(input, lengths)
    gradients = draw_gradients(baseline, input)
    with torch.inference_mode(mode == FORWARD):
        precise = copy.deepcopy(baseline).double()
        exact_call = call_of(precise, input.double(), mode, tuple(g.double() for g in gradients))
        exact = results(precise, exact_call, mode)
        raced = {
            name: (layer, call_of(layer, input, mode, gradients))
            for name, layer in ((BASELINE, baseline), (FUSED, fused))
        }
        theirs, ours = (results(layer, call, mode) for layer, call in raced.values())
    assert_within_budget(ours, theirs, exact)
    return {name: call for name, (_, call) in raced.items()}


def run(options: argparse.Namespace, wrong: list[str]) -> list[dict[str, Any]]:
    """Times every kind of call, shape and batch on every number of threads; returns rows."""
    rows: list[dict[str, Any]] = []
    budget = pages.time_budget(options, max_rounds=30)
    shapes = SHAPES[:1] if options.quick else SHAPES
    for (layout, mode), shape, batch in product(KINDS, shapes, BATCHES):
        if layout == PACKED and batch == 1:
            continue
        row = {"layout": layout, "mode": mode, "shape": shape, "batch": batch}
        with pages.gated(f"{shape}, {batch} sequences, {layout}, {mode}", wrong):
            found = calls(shape, batch, layout, mode)
            with torch.set_grad_enabled(mode == TRAINING):
                row["threads"] = race_on_threads(THREADS, found, budget, (BASELINE, FUSED))
            rows.append(row)
            print(row, flush=True)
    return rows


def speed_up(row: dict[str, Any], threads: int) -> float:
    """Returns the ratio of the medians on this number of threads."""
    medians = row["threads"][str(threads)]["medians"]
    return medians[BASELINE] / medians[FUSED]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each shape and batch of one kind of call, and the geometric means."""
    lines = [["(D, H, P, layers, T)", "B", BASELINE, FUSED, "speed-up", "95 %", "1 thread"]]
    for row in rows:
        measured = row["threads"][str(THREADS[0])]
        low, high = measured["spread"]
        lines.append(
            [
                str(tuple(row["shape"])),
                str(row["batch"]),
                *(duration(measured["medians"][name]) for name in (BASELINE, FUSED)),
                ratio(speed_up(row, THREADS[0])),
                f"{low:.2f} to {high:.2f}",
                ratio(speed_up(row, 1)),
            ]
        )
    both, one = (statistics.geometric_mean(speed_up(row, n) for row in rows) for n in THREADS)
    lines.append(["geometric mean", "", "", "", ratio(both), "", ratio(one)])
    return markdown(lines)


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    parts = [
        f"{document['cpu']}, {THREADS[0]} threads, and the speed-up on one; float32. P is "
        "proj_size; `nn.LSTM` runs ATen operators. The lengths of packed sequences are spread from "
        "1 to T."
    ]
    for layout, mode in KINDS:
        rows = [row for row in document["rows"] if (row["layout"], row["mode"]) == (layout, mode)]
        if rows:
            parts += [f"**{layout}, {mode}**", table(rows)]
    return "\n\n".join(parts)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.5))
    pages.settle(THREADS[0])

    wrong: list[str] = []
    rows = run(options, wrong)
    document = {"cpu": cpu_name(), "rows": rows}
    pages.publish("projections", document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
