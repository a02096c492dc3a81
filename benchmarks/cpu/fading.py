"""Times gradients that fade to subnormal numbers: `python -m benchmarks.cpu.fading [--record]`.

If only `h_n` has a gradient, the gradient of the state shrinks with every step back in time.
After about a hundred steps `nn.RNN` computes in subnormal numbers, which is at least ten times
slower on some processors. The fused layer flushes subnormal numbers to zero in its backward pass.
`torch.set_flush_denormal(True)` makes every operator flush subnormal numbers. No other benchmark
has gradients that fade.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import columns, pages
from benchmarks.harness.columns import BATCH, SHAPE, Row
from benchmarks.harness.grid import BASELINE, DENSE, FUSED, SIZES, TRAINING, Workload
from benchmarks.harness.processes import in_new_process
from benchmarks.harness.study import Calls, Study, draw_input, statistics_of
from namernn_fast.bench.race import Rounds, TimeBudget, race
from namernn_fast.bench.timed_calls import Gradients, Input, Parameters, gated_calls, train


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


@dataclass(frozen=True)
class Fading(Workload):
    """A workload for one entry of `CASES`."""

    case: str = ""


def calls(fading: Fading) -> Calls:
    return gated_calls(fading, draw_input(fading), step=CASES[fading.case][0])


def rounds_of(fading: Fading, threads: int, budget: TimeBudget) -> Mapping[str, Rounds]:
    """Returns the timed rounds of both layers; none if the processor cannot flush subnormals.

    `set_flush_denormal` affects only the calling thread and threads that it starts later, so each
    case needs a new process without other threads.
    """
    flush = CASES[fading.case][1]
    if flush and not torch.set_flush_denormal(True):
        return {}
    try:
        pages.settle(threads)
        return race(calls(fading), budget)
    finally:
        torch.set_flush_denormal(False)


class InNewProcesses(Study):
    """A study that times each case in a new process."""

    def measure(self, case: Fading, budget: TimeBudget) -> Row:
        return statistics_of(in_new_process(rounds_of, case, torch.get_num_threads(), budget))


COLUMNS = (
    columns.key(TRAINING, "case"),
    SHAPE,
    BATCH,
    *map(columns.time, (BASELINE, FUSED)),
    columns.over(BASELINE, FUSED)._replace(number=None),  # no mean over these rows
)
STUDY = InNewProcesses(
    name="fading",
    description=__doc__,
    cases=[Fading(DENSE, TRAINING, 16, 512, 512, 128, case=name) for name in CASES],
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=lambda _: (
        "float32. With a gradient at `h_n` alone, gradients shrink with every step back in time "
        f"until `{BASELINE}` computes in subnormal numbers; the fused layer flushes them to zero. "
        "The last two rows show what subnormal numbers cost on this processor: nothing on some, "
        "ten times the time or more on others. The last row is blank if the processor cannot flush "
        f"them. No mean or worst case includes these rows. {SIZES}"
    ),
    by=(),
    seconds=4.0,
    max_rounds=30,
)

if __name__ == "__main__":
    STUDY.main()
