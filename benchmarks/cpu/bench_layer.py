"""Cells of the layer on dense time-major input: forward, and forward + backward."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.harness.grid import (
    DENSE,
    DENSE_CELLS,
    GRU_CELLS,
    GRU_CELLS_OF_RECORDS,
    ROLES,
    Cell,
)
from namernn_fast.bench.race import Call
from namernn_fast.bench.workload import gated_calls, rows_of_oracle

OF_GRU = [cell for cell in (*GRU_CELLS, *GRU_CELLS_OF_RECORDS) if cell.family == DENSE]


@pytest.fixture(scope="module")
def calls(cell: Cell) -> dict[str, Call]:
    torch.manual_seed(1)
    input = torch.randn(cell.seq_len, cell.batch, cell.input_size)
    return gated_calls(cell, input, rows_of_oracle(cell))


@pytest.mark.parametrize("cell", [*DENSE_CELLS, *OF_GRU], ids=str, scope="module")
@pytest.mark.parametrize("role", ROLES)
def test_layer(cell: Cell, role: str, publish: Callable[[Cell, str], None]) -> None:
    publish(cell, role)
