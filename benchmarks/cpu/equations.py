"""Compares layers of equations with Python loops: `python -m benchmarks.cpu.equations [--record]`.

The cells are those of docs/guides/cells.md and those of the package. The rival calls the function
of a cell for every step, with the product of x hoisted out of the loop. For one cell it also runs
under `torch.compile`, which takes a minute or more for each size.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, Row
from benchmarks.harness.grid import FORWARD, Workload
from benchmarks.harness.paths import DOCS
from benchmarks.harness.study import Calls, Study, draw_input, grid
from namernn_fast import RecurrentCell
from namernn_fast.bench.timed_calls import add_cell, call_of, gated_calls
from namernn_fast.bench.workloads import GATES, Layers
from namernn_fast.nn.layer_norm_gru import layer_norm_gru
from namernn_fast.nn.layer_norm_lstm import layer_norm_lstm
from namernn_fast.nn.slstm import slstm_cell

STEPS, INPUT_SIZE = 64, 64
SIZES = [(hidden, batch) for hidden in (64, 256, 512) for batch in (1, 16, 64)]
COMPILED = {("minimal_gated", 64, 1), ("minimal_gated", 256, 16)}
"""The cells and sizes whose loop is also compiled."""
LOOP, COMPILED_LOOP, LAYER = "loop", "compiled loop", "layer"


PAGE = (DOCS / "guides" / "cells.md").read_text(encoding="utf-8")
BLOCKS = [
    block
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    if "recurrent_cell" in block  # not the calls at the end of the page
]
"""The code in the page that imports or defines cells."""


def cells_of_page() -> dict[str, RecurrentCell]:
    """Returns the cells that docs/guides/cells.md defines, by name."""
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)
    return {name: cell for name, cell in names.items() if isinstance(cell, RecurrentCell)}


CELLS = cells_of_page()
TIMED = {
    **CELLS,
    **{cell.__name__: cell for cell in (layer_norm_lstm(), layer_norm_gru(), slstm_cell())},
}
GATES.update((name, cell._cell.gates) for name, cell in TIMED.items())


@dataclass(frozen=True)
class Equation(Workload):
    """A layer of an equation, and a loop over its function."""

    @property
    def layers(self) -> Layers:
        return Layers(LOOP, LAYER)


def calls(case: Equation) -> Calls:
    """Returns the calls of the loop, of the layer and, for some sizes, of the compiled loop."""
    add_cell(case.cell, TIMED[case.cell])
    x = draw_input(case)
    checked = gated_calls(case, x)
    loop = checked[LOOP]
    named = dict(checked)
    if (case.cell, case.hidden_size, case.batch) in COMPILED:
        is_forward = case.mode == FORWARD
        compiled: Any = torch.compile(loop.func if is_forward else loop.args[0])
        gradients = () if is_forward else loop.args[3]
        named[COMPILED_LOOP] = call_of(compiled, x, case.mode, gradients)
        named[COMPILED_LOOP]()  # compiles
    return named


def table(rows: list[Row]) -> str:
    """Returns the table of one mode."""
    return columns.table(rows, COLUMNS, beside=["threads"])


COLUMNS = (
    columns.key("cell", "cell"),
    columns.key("H", "hidden_size"),
    BATCH,
    columns.time(LOOP),
    columns.time(COMPILED_LOOP),
    columns.time(LAYER),
    columns.over((LOOP, COMPILED_LOOP), LAYER),
)
STUDY = Study(
    name="equations",
    description=__doc__,
    cases=grid(
        [(INPUT_SIZE, hidden, STEPS, batch) for hidden, batch in SIZES], [*TIMED], make=Equation
    ),
    calls=calls,
    table=table,
    caption=lambda _: f"float32, D = {INPUT_SIZE}, T = {STEPS}.",
    is_folded=True,
    ours=LAYER,
    one_thread_too=True,
    max_rounds=15,
)

if __name__ == "__main__":
    STUDY.main()
