"""Cells of the layer on dense time-major input: forward, and forward + backward."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.harness.grid import DENSE_CELLS, LAYERS, Cell
from benchmarks.harness.race import Call
from benchmarks.harness.workload import gated_calls

# The oracle computes at most so many multiply-adds, and at least so many sequences of the batch.
ORACLE_WORK = 2**28
ORACLE_ROWS = 16


@pytest.fixture(scope="module")
def calls(cell: Cell) -> dict[str, Call]:
    torch.manual_seed(1)
    input = torch.randn(cell.seq_len, cell.batch, cell.input_size)
    known = min(cell.batch, max(ORACLE_ROWS, ORACLE_WORK // cell.row_work))
    rows = torch.linspace(0, cell.batch - 1, known).long()
    return gated_calls(cell, input, rows if known < cell.batch else None)


@pytest.mark.parametrize("cell", DENSE_CELLS, ids=str, scope="module")
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(cell: Cell, layer: str, publish: Callable[[Cell, str], None]) -> None:
    publish(cell, layer)
