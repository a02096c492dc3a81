"""Times gradients that fade to subnormal numbers: `python -m benchmarks.cpu.fading [--record]`.

With a gradient at `h_n` alone, the gradient of the state shrinks with every step back in time.
After about a hundred steps `nn.RNN` computes in subnormal numbers, which is at least ten times
slower on some processors. The fused layer flushes subnormal numbers to zero in its backward pass;
`torch.set_flush_denormal(True)` makes the processor do so in every operator. No other benchmark has
gradients that fade.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import pages
from benchmarks.harness.grid import BASELINE, DENSE, FUSED, SIZES, TRAINING, Workload, shape
from benchmarks.harness.processes import in_new_process
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimeBudget, race
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import Gradients, Input, Parameters, gated_calls, train

WORKLOAD = Workload(DENSE, TRAINING, 16, 512, 512, 128)
QUICK_WORKLOAD = Workload(DENSE, TRAINING, 2, 8, 8, 128)


def train_on_last_state(
    module: nn.Module, parameters: Parameters, input: Input, gradients: Gradients
) -> tuple[Input, Tensor]:
    """Runs a layer forward, and backward from `h_n.sum()`; `gradients` is not used."""
    for parameter in parameters:
        parameter.grad = None
    output, h_n = module(input)
    h_n.sum().backward()
    return output, h_n


CASES = {
    "gradients at `output` and `h_n`, as in every other table": (train, False),
    "`h_n.sum().backward()`: gradients fade to subnormal numbers": (train_on_last_state, False),
    "`h_n.sum().backward()` with `torch.set_flush_denormal(True)`": (train_on_last_state, True),
}
"""Rows by name: the training step, and whether subnormal numbers are flushed to zero."""


@contextmanager
def flushed(flush: bool) -> Iterator[bool]:
    """Flushes subnormal numbers to zero if `flush`; yields whether the processor supports that."""
    try:
        yield not flush or torch.set_flush_denormal(True)
    finally:
        if flush:
            torch.set_flush_denormal(False)


def measure(
    name: str, workload: Workload, threads: int, budget: TimeBudget
) -> dict[str, float] | None:
    """Returns the median seconds of both layers, or None if the processor cannot flush.

    Only the calling thread and threads that it starts afterwards flush, so each case needs a fresh
    process that has not started its threads.
    """
    step, flush = CASES[name]
    with flushed(flush) as possible:
        if not possible:
            return None
        pages.settle(threads)
        torch.manual_seed(1)
        input = torch.randn(workload.seq_len, workload.batch, workload.input_size)
        rounds = race(gated_calls(workload, input, step=step), budget)
    return {layer: statistics.median(recorded.seconds) for layer, recorded in rounds.items()}


def run(
    workload: Workload, threads: int, budget: TimeBudget, wrong: list[str]
) -> list[dict[str, Any]]:
    """Times every case in a separate process.

    Returns a row for each case with correct results, and adds the others to `wrong`.
    """
    rows = []
    for name in CASES:
        with pages.gated(name, wrong):
            medians = in_new_process(measure, name, workload, threads, budget)
            rows.append({"case": name, "medians": medians})
    return rows


def report(document: dict[str, Any]) -> str:
    """Returns the table of a run and the sentences that explain it."""
    workload, machine = Workload.of(document["workload"]), document["machine"]
    lines = [[f"{TRAINING}, {shape(workload)}, B = {workload.batch}", BASELINE, FUSED, "speed-up"]]
    for row in document["rows"]:
        medians = row["medians"]
        if medians is None:
            lines.append([row["case"], "not on this processor", "", ""])
            continue
        times = (duration(medians[layer]) for layer in (BASELINE, FUSED))
        lines.append([row["case"], *times, ratio(medians[BASELINE] / medians[FUSED])])
    return (
        f"{machine['cpu']}, {machine['threads']} thread(s); torch {machine['torch']}; float32. "
        f"{SIZES}\n\n"
        f"{markdown(lines)}\n\n"
        f"With a gradient at `h_n` alone, gradients shrink with every step back in time until "
        f"`{BASELINE}` computes in subnormal numbers; the fused layer flushes them to zero. The "
        f"last two rows show what subnormal numbers cost on this processor: nothing on some, ten "
        f"times the time or more on others. No mean and no worst case includes these rows."
    )


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=4.0))
    workload = QUICK_WORKLOAD if options.quick else WORKLOAD
    wrong: list[str] = []
    rows = run(workload, options.threads, pages.time_budget(options, max_rounds=30), wrong)
    machine = {"cpu": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    document = {"machine": machine, "workload": dataclasses.asdict(workload), "rows": rows}
    pages.publish("fading", document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
