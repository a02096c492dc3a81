"""Times the step modules against torch's cells: `python -m benchmarks.cpu.steps [--record]`.

If torch's own cell is at least as fast, a step module runs that cell, and the speed-up is about 1.
Each call gets initial states. In training, both states of an LSTM have gradients. Without
`--record` only a few sizes are timed.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, Row
from benchmarks.harness.grid import FORWARD, TRAINING, Workload
from benchmarks.harness.study import Calls, Study, grid
from namernn_fast import explain
from namernn_fast.cells import CELLS
from namernn_fast.nn.states import states_in
from namernn_fast.nn.weights import CLASSES
from namernn_fast.testing import assert_within_budget

MODULES: dict[str, tuple[type, type]] = {
    name: (cell.torch.step_module, CLASSES[f"{cell.layer}Cell"])
    for name, cell in CELLS.items()
    if cell.torch is not None
}
"""Torch's module and the step module of each cell."""
SIZES = (8, 64, 256, 512, 1024)  # input_size and hidden_size
BATCHES = (1, 8, 64)
FEW_SIZES, FEW_BATCHES = (8, 64, 512), (1, 64)
"""The sizes that are timed without `--record`."""

Inputs = tuple[Tensor, Any, tuple[Tensor, ...]]
"""The input of a step, its states, and the gradients of the new states."""


def draw(workload: Workload) -> Inputs:
    """Draws the input and the states of a step, and the gradients of its new states."""
    generator = torch.Generator().manual_seed(1)
    sizes = workload.batch, workload.hidden_size
    x, *tensors = (torch.randn(sizes, generator=generator) for _ in range(5))
    count = len(CELLS[workload.cell].states)
    hx = tuple(tensors[:count])
    return x, hx if count == 2 else hx[0], tuple(tensors[2 : 2 + count])


def step_of(module: nn.RNNCellBase, mode: str, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Returns a call that runs one step of a module and, in training, its backward pass."""
    x, hx, gradients = inputs
    parameters = tuple(module.parameters())

    def train() -> tuple[Tensor, ...]:
        for parameter in parameters:
            parameter.grad = None
        states = states_in(module(x, hx))
        torch.autograd.backward(states, gradients)
        return tuple(states)

    return train if mode == TRAINING else lambda: tuple(states_in(module(x, hx)))


def results(module: nn.RNNCellBase, mode: str, inputs: Inputs) -> dict[str, Tensor]:
    """Returns the states after a step and, in training, the gradients of all parameters."""
    named = dict(zip("hc", step_of(module, mode, inputs)(), strict=False))
    if mode == TRAINING:
        named |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.detach() for name, value in named.items()}


def calls(workload: Workload) -> Calls:
    """Returns the calls of torch's cell and of the step module, after an error check."""
    torch.manual_seed(0)
    sizes, mode = (workload.input_size, workload.hidden_size), workload.mode
    theirs, ours = (cls(*sizes) for cls in MODULES[workload.cell])
    ours.load_state_dict(theirs.state_dict())
    inputs = draw(workload)
    exact = tree_map(Tensor.double, inputs)
    with torch.inference_mode(mode == FORWARD):
        found = [results(module, mode, inputs) for module in (ours, theirs)]
        oracle = results(copy.deepcopy(theirs).double(), mode, exact)
    assert_within_budget(*found, oracle)
    return {"torch": step_of(theirs, mode, inputs), "fused": step_of(ours, mode, inputs)}


def path(workload: Workload, calls: Calls) -> Row:
    """Returns which implementation the step module uses."""
    x, hx, _ = draw(workload)
    module = MODULES[workload.cell][1](workload.input_size, workload.hidden_size)
    return {"path": explain(module, x, hx).path}


COLUMNS = (
    columns.key("module", lambda row: MODULES[row["cell"]][1].__name__),
    columns.key("H", "hidden_size"),
    BATCH,
    columns.time("torch", "torch's cell"),
    columns.time("fused", "step module"),
    columns.text("path", "path"),
    columns.paired("torch"),
)
STUDY = Study(
    name="steps",
    description=__doc__,
    cases=grid([(size, size, 1, batch) for size in SIZES for batch in BATCHES], [*MODULES]),
    calls=calls,
    also=path,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["threads", "mode"]),
    caption=lambda _: (
        "float32. H is the input size and the hidden size, B the batch size; `path` names the "
        "implementation. A speed-up is the median of the ratios of neighbouring rounds."
    ),
    by=(),
    is_folded=True,
    ours="fused",
    few=lambda workload: workload.hidden_size in FEW_SIZES and workload.batch in FEW_BATCHES,
    one_thread_too=True,
    seconds=0.3,
    max_rounds=60,
)

if __name__ == "__main__":
    STUDY.main()
