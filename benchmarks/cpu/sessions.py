"""Steps one of 1,000 sequences at a time: `python -m benchmarks.cpu.sessions [--record]`.

The sequences are the rows of one stream, or each has bound buffers in onnxruntime, in one session
for all or a session each. They step in random order, one at a time or all together. Passes over all
sequences alternate.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cpu.prepared import problem_of
from benchmarks.cpu.rivals import bound_session, new_session, onnx_model
from benchmarks.harness.grid import FORWARD, Workload
from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from benchmarks.harness.peak import resident_bytes
from benchmarks.harness.study import Document
from namernn_fast import prepare_rnn
from namernn_fast.bench.race import TimedCall, timed
from namernn_fast.bench.tables import duration, markdown
from namernn_fast.bench.timed_calls import equal_layers
from namernn_fast.bench.workloads import DENSE, LAYERS_OF

SEQUENCES, SIZES = 1000, (64, 256)
STREAM, SESSION, SESSIONS = "one stream", "one onnxruntime session", "a session each"
MEBI = 2**20
Calls = tuple[Callable[[int], object], TimedCall]
"""A function that steps the sequence with an index, and one that steps all sequences."""


def stream_of(workload: Workload) -> Calls:
    """Returns calls that step the rows of a stream."""
    stream = prepare_rnn(equal_layers(workload)[workload.layers.fused]).stream(SEQUENCES)
    frames, out = (torch.randn(SEQUENCES, size) for size in SIZES)
    arrived = [(row[None], result[None]) for row, result in zip(frames, out, strict=True)]

    def step(i: int) -> None:
        frame, result = arrived[i]
        stream(frame, rows=[i], out=result)

    return step, lambda: stream(frames, out=out)


def runtime_of(workload: Workload, sessions: int) -> Calls:
    """Returns calls that step sequences, which share `sessions` sessions of onnxruntime."""
    problem = problem_of(workload)
    model = onnx_model(problem)
    shared = [new_session(model, threads=1) for _ in range(sessions)]
    runs = []
    for i in range(SEQUENCES):
        states = tuple(state.clone() for state in problem.states)
        of_sequence = replace(problem, input=problem.input.clone(), states=states)
        runs.append(bound_session(shared[i % sessions], of_sequence)[0])
    return lambda i: runs[i](), lambda: [run() for run in runs]


METHODS: dict[str, Callable[[Workload], Calls]] = {
    STREAM: stream_of,
    SESSION: partial(runtime_of, sessions=1),
    SESSIONS: partial(runtime_of, sessions=SEQUENCES),
}


def measure(cell: str, seconds: float) -> dict[str, Any]:
    """Returns the median and the 99th percentile of a step, and the memory, by method."""
    workload = Workload(DENSE, FORWARD, 1, *SIZES, 1, cell)
    calls, found = {}, {}
    for name, make in METHODS.items():
        before = resident_bytes()
        calls[name] = make(workload)
        calls[name][1]()
        found[name] = {"memory": resident_bytes() - before, "one": [], "all": []}
    draw, until = random.Random(0), time.monotonic() + seconds
    while time.monotonic() < until:
        order = draw.sample(range(SEQUENCES), SEQUENCES)
        for name, (one, all_of_them) in calls.items():
            found[name]["one"] += [timed(partial(one, i)) for i in order]
            found[name]["all"].append(timed(all_of_them))
    for numbers in found.values():
        numbers["percentile"] = statistics.quantiles(numbers["one"], n=100)[-1]
        for key in ("one", "all"):
            numbers[key] = statistics.median(numbers[key])
    return {"cell": cell, "by_name": found}


def report(document: Document) -> str:
    lines = [["cell", "", "one sequence: median", "99th percentile", "all sequences", "MiB added"]]
    for row in document["rows"]:
        for name, found in row["by_name"].items():
            times = (duration(found[key]) for key in ("one", "percentile", "all"))
            lines.append([row["cell"], name, *times, f"{found['memory'] / MEBI:.0f}"])
    return (
        f"{document['cpu']}, one thread, float32, D = {SIZES[0]}, H = {SIZES[1]}. A stream steps "
        "all rows in one call; onnxruntime steps them one after another, from the same states at "
        f"every step.\n\n{markdown(lines)}"
    )


SECTION = Section(PERFORMANCE_TABLES, "sessions", report)


def main() -> None:
    from benchmarks.harness import pages
    from namernn_fast.bench.machine import cpu_name

    options = pages.parse(pages.parser(__doc__, seconds=10.0))
    pages.settle(1)
    seconds = 0.5 if options.quick else options.seconds
    with torch.inference_mode():
        rows = [measure(cell, seconds) for cell in LAYERS_OF]
    pages.publish("sessions", {"cpu": cpu_name(), "rows": rows}, [SECTION], options.record)


if __name__ == "__main__":
    main()
