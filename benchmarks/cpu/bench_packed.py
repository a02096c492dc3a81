"""Cells of the layer on packed batches with the lengths of surnames.

The batch is packed once and packing is not timed: it costs both layers the same and would only
move the ratio towards one. The epoch of `bench_names.py` includes packing.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.cpu.memory import draw_input
from benchmarks.harness.grid import GATED_CELLS, PACKED, PACKED_CELLS, ROLES, Cell
from benchmarks.harness.surnames import names
from namernn_fast.bench.race import Call
from namernn_fast.bench.workload import gated_calls
from namernn_fast.names import encode_names

WITH_GATES = [cell for cell in GATED_CELLS if cell.family == PACKED]


@pytest.fixture(scope="module")
def lengths(cell: Cell) -> list[int]:
    known = encode_names([name for name, _ in names().rows]).lengths
    generator = torch.Generator().manual_seed(1)
    return known[torch.randint(len(known), (cell.batch,), generator=generator)].tolist()


@pytest.fixture(scope="module")
def calls(cell: Cell, lengths: list[int]) -> dict[str, Call]:
    return gated_calls(cell, draw_input(cell, lengths))


@pytest.mark.parametrize("cell", [*PACKED_CELLS, *WITH_GATES], ids=str, scope="module")
@pytest.mark.parametrize("role", ROLES)
def test_packed(cell: Cell, role: str, publish: Callable[[Cell, str], None]) -> None:
    publish(cell, role)
