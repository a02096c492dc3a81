"""Times training steps under two waiting policies: `python -m benchmarks.cpu.waiting [--record]`.

The steps train on a small batch, in new processes with `OMP_WAIT_POLICY` unset or set to `passive`.
The machine is either idle, or other programs keep every processor busy.
"""

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness.grid import BASELINE, FUSED, LAYERS
from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from benchmarks.harness.processes import in_new_process

POLICIES = {"not set": None, "`passive`": "passive"}
NEIGHBOURS = {"idle": False, "busy": True}
SIZES = (64, 256, 8, 16)
"""Input size, hidden size, sequence length, batch size."""
VARIABLE = "OMP_WAIT_POLICY"


def measure(name: str, threads: int, seconds: float) -> float:
    """Returns the mean seconds of a training step in this process, which must be new.

    The mean is used instead of the median, because a program waits for its slowest steps too.
    """
    import torch

    from namernn_fast import FusedRNN

    torch.set_num_threads(threads)
    features, hidden_size, steps, batch = SIZES
    layer = {BASELINE: torch.nn.RNN, FUSED: FusedRNN}[name](features, hidden_size)
    optimizer = torch.optim.Adam(layer.parameters())
    x, grad = torch.randn(steps, batch, features), torch.randn(steps, batch, hidden_size)

    def step() -> None:
        optimizer.zero_grad()
        layer(x)[0].backward(grad)
        optimizer.step()

    step()
    count, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < seconds:
        step()
        count += 1
    return taken / count


def _spin() -> None:
    while True:
        pass


@contextmanager
def _neighbours(are_busy: bool) -> Iterator[None]:
    """If `are_busy`, keeps every processor busy with other programs within a block."""
    context = multiprocessing.get_context("spawn")
    count = (os.cpu_count() or 1) if are_busy else 0
    running = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.terminate()
            process.join()


def _under(policy: str | None, *arguments) -> float:
    """Runs `measure` in a new process with a waiting policy, and returns its result."""
    os.environ.pop(VARIABLE, None)
    if policy is not None:
        os.environ[VARIABLE] = policy
    return in_new_process(measure, *arguments)


def report(document: dict[str, Any]) -> str:
    from namernn_fast.bench.tables import duration, markdown

    found = document["rounds"]
    lines = [["a training step", *(f"{VARIABLE} {policy}" for policy in POLICIES)]]
    for state, name in itertools.product(NEIGHBOURS, LAYERS):
        rounds = [found[f"{state}, {name}, {policy}"] for policy in POLICIES]
        lines.append([f"{name}, {state} machine", *map(duration, map(statistics.median, rounds))])
    features, hidden_size, steps, batch = SIZES
    return (
        f"{document['cpu']}, {document['processors']} processors, {document['threads']} thread(s); "
        f"input size {features}, hidden size {hidden_size}, sequence length {steps}, batch size "
        f"{batch}, with Adam. Each time is the median over {len(rounds[0])} processes of the mean "
        f"step. On the busy machine, one other program runs per processor.\n\n{markdown(lines)}"
    )


SECTION = Section(PERFORMANCE_TABLES, "waiting", report)


def main() -> None:
    from benchmarks.harness import pages
    from namernn_fast.bench.machine import cpu_name

    options = pages.parse(pages.parser(__doc__, seconds=6.0))
    seconds = options.seconds / 3
    found: dict[str, list[float]] = {}
    rounds = 1 if options.quick else 3
    for state, _ in itertools.product(NEIGHBOURS, range(rounds)):
        with _neighbours(NEIGHBOURS[state]):
            for name, policy in itertools.product(LAYERS, POLICIES):
                taken = _under(POLICIES[policy], name, options.threads, seconds)
                found.setdefault(f"{state}, {name}, {policy}", []).append(taken)
    document = {"cpu": cpu_name(), "processors": os.cpu_count(), "threads": options.threads}
    document["rounds"] = found
    pages.publish("waiting", document, [SECTION], options.record)


if __name__ == "__main__":
    main()
