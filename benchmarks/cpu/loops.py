"""Times training loops over step modules: `python -m benchmarks.cpu.loops [--record]`.

A loop calls a cell for every step, as a program does that computes something between steps, and
then runs backward. It is timed with torch's cell, with our step module, in an `unrolled()` block,
and beside our layer, which sees the whole sequence at once. For the minimal gated unit, which torch
lacks, the rival is a module that calls the function of the cell. Without `--record` only a few
sizes are timed.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu.equations import CELLS as EQUATIONS
from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH
from benchmarks.harness.grid import TRAINING, Workload
from benchmarks.harness.study import Calls, Study, draw_input, grid
from namernn_fast.bench.timed_calls import call_of, draw_gradients, results
from namernn_fast.cells import CELLS
from namernn_fast.nn.states import states_in
from namernn_fast.nn.weights import CLASSES
from namernn_fast.testing import assert_within_budget

OURS = "minimal_gated"
"""The cell that torch lacks."""


class CalledFunction(nn.Module):
    """A step of the minimal gated unit in torch's operators."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        module = EQUATIONS[OURS].step_module(input_size, hidden_size)
        for name, parameter in module.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor, h: Tensor | None) -> Any:
        h = x.new_zeros(len(x), self.weight_hh.shape[1]) if h is None else h
        of_x = F.linear(x, self.weight_ih, self.bias_ih)
        of_h = F.linear(h, self.weight_hh, self.bias_hh)
        return EQUATIONS[OURS](of_x.chunk(2, 1), of_h.chunk(2, 1), h)


MODULES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    name: (cell.torch.step_module, CLASSES[f"{cell.layer}Cell"], CLASSES[cell.layer])
    for name, cell in CELLS.items()
    if cell.torch is not None
}
"""Torch's cell, our step module and our layer, by the name of their cell."""
MODULES[OURS] = CalledFunction, EQUATIONS[OURS].step_module, EQUATIONS[OURS].layer


class Loop(nn.Module):
    """A loop over a step module. Returns the outputs and the last states, as a layer does."""

    def __init__(self, cell: Any, unrolled: bool = False) -> None:
        super().__init__()
        self.cell, self.unrolled = cell, unrolled

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs, hx = [], None
        with self.cell.unrolled() if self.unrolled else contextlib.nullcontext():
            for row in x.unbind():
                hx = self.cell(row, hx)
                outputs.append(states_in(hx)[0])
        return torch.stack(outputs), tuple(state[None] for state in states_in(hx))


def calls(case: Workload) -> Calls:
    """Returns the training steps of the loops and of the layer, after an error check."""
    torch.manual_seed(0)
    theirs, ours, layer = (make(case.input_size, case.hidden_size) for make in MODULES[case.cell])
    ours.load_state_dict(theirs.state_dict())
    x = draw_input(case)
    gradients = draw_gradients(layer, x)
    modules = {
        "torch": Loop(theirs),
        "step module": Loop(ours),
        "unrolled": Loop(ours, unrolled=True),
        "layer": layer,
    }
    named = {name: call_of(module, x, TRAINING, gradients) for name, module in modules.items()}
    oracle = Loop(copy.deepcopy(theirs).double())
    exact = call_of(oracle, x.double(), TRAINING, tuple(g.double() for g in gradients))
    found = {name: results(modules[name], named[name], TRAINING) for name in [*named][:3]}
    precise = results(oracle, exact, TRAINING)
    for name in ("step module", "unrolled"):
        assert_within_budget(found[name], found["torch"], precise)
    return named


COLUMNS = (
    columns.key("cell", "cell"),
    columns.key("T", "seq_len"),
    columns.key("H", "hidden_size"),
    BATCH,
    columns.time("torch", "torch's cell"),
    columns.time("step module"),
    columns.over("torch", "step module"),
    columns.time("unrolled"),
    columns.paired("torch"),
    columns.time("layer"),
)
STUDY = Study(
    name="loops",
    description=__doc__,
    cases=grid(
        [
            (size, size, steps, batch)
            for steps in (16, 64)
            for size in (64, 256, 512, 1024)
            for batch in (1, 16, 64)
        ],
        [*MODULES],
        [TRAINING],
    ),
    calls=calls,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["threads"]),
    caption=lambda _: (
        "float32, input size H; forward and backward. The first speed-up is of the step module, "
        "the second of the `unrolled()` block, both over torch's cell."
    ),
    is_folded=True,
    ours="unrolled",
    few=lambda case: case.seq_len == 16 and case.hidden_size <= 256 and case.batch <= 16,
    one_thread_too=True,
    seconds=0.3,
    max_rounds=30,
)

if __name__ == "__main__":
    STUDY.main()
