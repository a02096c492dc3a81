"""Times several layers in one call: `python -m benchmarks.cpu.layers [--record]`.

Three modules alternate: a stack in one `FusedRNN`, the same number of single-layer `FusedRNN`
modules in sequence, and `nn.RNN`. The column `at once` is the number of layers that the plan in
`csrc/plan.cpp` runs at the same time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, SHAPE
from benchmarks.harness.grid import BASELINE, FUSED, SIZES, Workload
from benchmarks.harness.study import Calls, Study, draw_input, grid
from namernn_fast import FusedRNN, ops
from namernn_fast.bench.timed_calls import call_of, draw_gradients, gated_calls

STEPS_AND_BATCHES = {
    64: ((8, 1), (128, 1), (128, 16)),
    128: ((128, 1), (128, 4)),
    256: ((32, 1), (128, 1), (128, 4)),
    512: ((128, 1), (128, 16)),
}
"""What is timed, by input size and hidden size."""
SHAPES = [(size, size, *shape) for size, shapes in STEPS_AND_BATCHES.items() for shape in shapes]
ONE_BY_ONE = "one by one"


@dataclass(frozen=True)
class Stack(Workload):
    """Several layers of the same size."""

    num_layers: int = 2

    @property
    def options(self) -> dict[str, Any]:
        return {"num_layers": self.num_layers}


class Chain(nn.Module):
    """Single-layer modules that run in sequence."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(FusedRNN(hidden_size, hidden_size) for _ in range(num_layers))

    def forward(self, x):
        states = []
        for layer in self.layers:
            x, h_n = layer(x)
            states.append(h_n)
        return x, *states


def calls(stack: Stack) -> Calls:
    """Returns the calls of `nn.RNN`, of single layers and of a stack.

    The output and the last state of every layer receive gradients.
    """
    size, num_layers = stack.hidden_size, stack.num_layers
    input = draw_input(stack)
    found = gated_calls(stack, input)
    chain = Chain(size, num_layers)
    grad_output, grad_h_n = draw_gradients(nn.RNN(size, size, num_layers), input)
    gradients = grad_output, *grad_h_n.split(1)
    return found | {ONE_BY_ONE: call_of(chain, input, stack.mode, gradients)}


def at_once(stack: Stack, calls: Calls) -> dict[str, Any]:
    sizes = [stack.batch] * (stack.seq_len or 0), stack.input_size, stack.hidden_size
    plan = ops.cpu_plan(*sizes, torch.get_num_threads(), num_layers=stack.num_layers)
    return {"at_once": plan.layers}


COLUMNS = (
    columns.key("layers", "num_layers"),
    SHAPE,
    BATCH,
    columns.key("at once", "at_once"),
    *map(columns.time, (BASELINE, ONE_BY_ONE, FUSED)),
    *(columns.over(name, FUSED, f"over {name}") for name in (BASELINE, ONE_BY_ONE)),
)
STUDY = Study(
    name="layers",
    description=__doc__,
    cases=[
        stack for layers in (2, 4) for stack in grid(SHAPES, ["rnn"], make=Stack, num_layers=layers)
    ],
    calls=calls,
    also=at_once,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["mode"]),
    caption=lambda _: (
        "float32. `at once` is the number of layers that the plan runs at the same time; "
        f"`one by one` calls a layer at a time. {SIZES}"
    ),
    by=(),
    seconds=0.4,
)

if __name__ == "__main__":
    STUDY.main()
