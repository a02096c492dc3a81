"""Times one step of a stream: `python -m benchmarks.cpu.streams [--record]`.

A stream, torch's cell, torch's layer with one step, and the runtimes that pack weights once take
turns, with a pause between each two. With `--record` all sizes are timed, on one thread and on
`--threads`.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import torch

from benchmarks.cpu.prepared import PAUSE, RUNTIMES, runtime_calls
from benchmarks.cpu.rivals import Problem
from benchmarks.harness import pages
from benchmarks.harness.grid import DENSE, FORWARD, Workload
from benchmarks.harness.machine import multiply_add_rate, read_rate
from namernn_fast import prepare_rnn, prepared_ops
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall, race, timed
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import equal_layers
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS
from namernn_fast.testing import assert_within_budget

SIZES, BATCHES = (64, 256, 512, 1024), (1, 8, 64)
RIVALS = ("torch's cell", "torch's layer", *RUNTIMES)
MINE = ("stream", "out=")
"""A stream's step with a new output, and with `out=`, as the runtimes have it."""
FLOAT_BYTES = 4
SECONDS = 0.05
"""How long a rate of the machine is measured."""


def workloads() -> list[Workload]:
    """Returns every cell and size, with one step."""
    return [
        Workload(DENSE, FORWARD, batch, size, size, 1, cell)
        for cell in LAYERS_OF
        for size in SIZES
        for batch in BATCHES
    ]


def weight_count(workload: Workload) -> int:
    """Returns the number of elements of weight_ih and weight_hh together."""
    rows = CELLS[workload.cell].weight_blocks * workload.hidden_size
    return rows * (workload.input_size + workload.hidden_size)


def floor(workload: Workload, threads: int, peak: float) -> float:
    """Returns the least seconds of the products: of the multiply-adds, or of reading the weights.

    The weights are read from the caches, or the memory, that a block of their size lies in.
    """
    size = FLOAT_BYTES * weight_count(workload)
    reading = size / read_rate(threads, size, SECONDS)
    return max(2 * weight_count(workload) * workload.batch / peak, reading)


def empty_operator() -> float:
    """Returns the seconds that the operator of a step takes for no sequences."""
    stream = prepare_rnn(torch.nn.LSTM(1, 1)).stream(0)
    panels, frame = stream._prepared._panels, torch.zeros(0, 1)
    arguments = panels.tensor, stream._states, frame, None, panels.options
    return min(timed(lambda: prepared_ops.step(*arguments), 10_000) for _ in range(7))


def gated_calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns the calls of a step by name, after the stream's output has passed the budget."""
    torch.manual_seed(0)
    batch, size, cell = workload.batch, workload.hidden_size, CELLS[workload.cell]
    input = torch.randn(1, batch, workload.input_size)
    states = tuple(torch.randn(1, batch, size) for _ in cell.states)
    theirs, ours = equal_layers(workload).values()
    stream, frame, out = prepare_rnn(ours).stream(batch), input[0].clone(), torch.empty(batch, size)
    module = cell.torch_step_module(workload.input_size, size)
    rows = tuple(state[0] for state in states)
    hx, row_hx = (states, rows) if len(states) > 1 else (states[0], rows[0])
    stream.states = hx
    exact = tuple(state.double() for state in states)
    oracle = theirs.double()(input.double(), exact if len(exact) > 1 else exact[0])[0][0]
    wanted = theirs.float()(input, hx)[0][0]
    assert_within_budget({"output": stream(frame)}, {"output": wanted}, {"output": oracle})
    return {
        MINE[0]: lambda: stream(frame),
        MINE[1]: lambda: stream(frame, out=out),
        RIVALS[0]: lambda: module(frame, row_hx),
        RIVALS[1]: lambda: theirs(input, hx),
        **runtime_calls(Problem(workload, theirs, input, [], states)),
    }


def run(options: argparse.Namespace, wrong: list[str]) -> list[dict[str, Any]]:
    """Times every size; returns a row for each whose results are correct."""
    rows = []
    budget = pages.time_budget(options, max_rounds=20)
    threads = sorted({1, options.threads}) if options.record else [options.threads]
    for count in threads:
        pages.settle(count)
        for workload in pages.chosen(workloads(), options):
            row = {**dataclasses.asdict(workload), "threads": count}
            with pages.gated(row, wrong), torch.inference_mode():
                rounds = race(gated_calls(workload), budget, PAUSE)
                row["floor"] = floor(workload, count, multiply_add_rate(count, SECONDS))
                row["medians"] = {name: statistics.median(r.seconds) for name, r in rounds.items()}
                rows.append(row)
                print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each size, and the geometric means and the worst of the ratios."""
    rivals = [name for name in RIVALS if name in rows[0]["medians"]]
    header = [
        "cell",
        "H",
        "B",
        *rivals,
        *MINE,
        "floor",
        *(f"{name} over the best" for name in MINE),
    ]
    lines = [[*header, "of the floor's rate"]]
    ratios: dict[str, list[float]] = {name: [] for name in MINE}
    for row in rows:
        seconds = row["medians"]
        line = [row["cell"], str(row["hidden_size"]), str(row["batch"])]
        line += [duration(seconds[name]) for name in (*rivals, *MINE)] + [duration(row["floor"])]
        for name, found in ratios.items():
            found.append(min(seconds[rival] for rival in rivals) / seconds[name])
            line.append(ratio(found[-1]))
        lines.append([*line, f"{row['floor'] / seconds[MINE[1]]:.0%}"])
    summaries = [
        f"{name}: {ratio(statistics.geometric_mean(found))}, at least {ratio(min(found))}"
        for name, found in ratios.items()
    ]
    return f"{markdown(lines)}\n\nGeometric means over the best other: {'; '.join(summaries)}."


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    parts = [
        f"{document['cpu']}, float32, D = H. `floor` is what the multiply-adds take at the peak "
        "rate or, if that is more, what reading the weights once takes from where a block of their "
        "size lies; nothing else is in it. An empty operator with the arguments of a step takes "
        f"{duration(document['empty_operator'])}. onnxruntime and OpenVINO have bound buffers, as "
        "a stream has with `out=`, which the last column compares with the floor."
    ]
    for threads in dict.fromkeys(row["threads"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["threads"] == threads]
        parts += [f"**One step of a stream, {threads} thread(s)**", table(rows)]
    return "\n\n".join(parts)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.5))
    wrong: list[str] = []
    document = {"cpu": cpu_name(), "empty_operator": empty_operator()}
    document["rows"] = run(options, wrong)
    pages.publish("streams", document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
