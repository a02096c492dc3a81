"""Times prepared layers: `python -m benchmarks.cpu.prepared [--record]`.

The prepared layers, the fused layers, torch's layers and the runtimes that pack weights once take
turns, in inference, from initial states that are not zeros. `onnxruntime` has bound buffers.
"""

import importlib.util
import statistics
from typing import Any

import torch

from benchmarks.cpu.rivals import RIVALS, Problem
from benchmarks.harness import medians
from benchmarks.harness.grid import DENSE, FORWARD, SIZES, Workload, shape
from namernn_fast import prepare_rnn
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import equal_layers
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS

SHAPES = (  # D, H, T, B
    (64, 64, 8, 1),
    (64, 256, 8, 16),
    (1024, 1024, 16, 32),
    *((size, size, 1, batch) for size in (64, 256, 512, 1024) for batch in (1, 8, 64)),
)
RUNTIMES = ("onnxruntime", "OpenVINO")
OURS = ("torch", "fused", "prepared")
PAUSE = 0.03
"""Seconds before each round; see `race`."""


def workloads() -> list[Workload]:
    """Returns every cell and shape."""
    return [
        Workload(DENSE, FORWARD, batch, input_size, hidden_size, steps, cell)
        for cell in LAYERS_OF
        for input_size, hidden_size, steps, batch in SHAPES
    ]


def calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns a call of each layer and of each runtime that is installed."""
    torch.manual_seed(0)
    input = torch.randn(workload.seq_len or 0, workload.batch, workload.input_size)
    size = 1, workload.batch, workload.hidden_size
    states = tuple(torch.randn(size) for _ in CELLS[workload.cell].states)
    hx = states if len(states) > 1 else states[0]
    theirs, ours = equal_layers(workload).values()
    layers = dict(zip(OURS, (theirs, ours, prepare_rnn(ours)), strict=True))
    found: dict[str, TimedCall] = {
        name: lambda layer=layer: layer(input, hx) for name, layer in layers.items()
    }
    return found | runtime_calls(Problem(workload, theirs, input, [], states))


def runtime_calls(problem: Problem) -> dict[str, TimedCall]:
    """Returns the call of each runtime that is installed."""
    found: dict[str, TimedCall] = {}
    for name in RUNTIMES:
        package, make = RIVALS[name]
        if importlib.util.find_spec(package) is not None:
            call = make(problem, torch.get_num_threads())
            assert call is not None
            found[name] = call
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each workload, and the geometric means."""
    names = [name for name in (*OURS, *RUNTIMES) if name in rows[0]["medians"]]
    lines = [["layer", "(D, H, T)", "B", *names, "over fused", "over the best other"]]
    ratios: list[tuple[float, float]] = []
    for row in rows:
        seconds, workload = row["medians"], Workload.of(row)
        mine = seconds["prepared"]
        best = min(seconds[name] for name in names if name not in ("fused", "prepared"))
        ratios.append((seconds["fused"] / mine, best / mine))
        times = [duration(seconds[name]) for name in names]
        line = [workload.layers.fused, shape(workload), str(workload.batch)]
        lines.append([*line, *times, *map(ratio, ratios[-1])])
    over_fused, over_best = (statistics.geometric_mean(each) for each in zip(*ratios, strict=True))
    means = f"over fused {ratio(over_fused)}, over the best other {ratio(over_best)}"
    return f"{markdown(lines)}\n\nGeometric means: {means}."


def report(document: dict[str, Any]) -> str:
    """Returns the table of a run."""
    introduction = (
        f"{document['cpu']}, {document['threads']} thread(s), float32. `torch` is torch's layer, "
        "`fused` ours and `prepared` what `prepare()` makes of it; the other columns are runtimes "
        f"that pack weights once. Every call gets initial states. {SIZES}"
    )
    return f"{introduction}\n\n{table(document['rows'])}"


def main() -> None:
    medians.run("prepared", __doc__, workloads(), calls, report, PAUSE)


if __name__ == "__main__":
    main()
