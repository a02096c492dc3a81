"""Cells of the layer on dense time-major input: forward, and forward + backward."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.harness.grid import DENSE, DENSE_CELLS, GATED_CELLS, ROLES, Cell
from namernn_fast.bench.race import Call
from namernn_fast.bench.workload import gated_calls, rows_of_oracle

WITH_GATES = [cell for cell in GATED_CELLS if cell.family == DENSE]


@pytest.fixture(scope="module")
def calls(cell: Cell) -> dict[str, Call]:
    torch.manual_seed(1)
    input = torch.randn(cell.seq_len, cell.batch, cell.input_size)
    return gated_calls(cell, input, rows_of_oracle(cell))


@pytest.mark.parametrize("cell", [*DENSE_CELLS, *WITH_GATES], ids=str, scope="module")
@pytest.mark.parametrize("role", ROLES)
def test_layer(cell: Cell, role: str, publish: Callable[[Cell, str], None]) -> None:
    publish(cell, role)
