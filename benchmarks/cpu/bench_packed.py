"""Cells of the layer on packed batches with the lengths of surnames.

The batch is packed once and packing is not timed: it costs both layers the same and would only
move the ratio towards one. The epoch of `bench_names.py` includes packing.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness.grid import LAYERS, PACKED_CELLS, Cell
from benchmarks.harness.surnames import names
from namernn_fast.bench.race import Call
from namernn_fast.bench.workload import gated_calls
from namernn_fast.names import encode_names


@pytest.fixture(scope="module")
def lengths() -> Tensor:
    return encode_names([name for name, _ in names().rows]).lengths


@pytest.fixture(scope="module")
def calls(cell: Cell, lengths: Tensor) -> dict[str, Call]:
    torch.manual_seed(1)
    drawn = lengths[torch.randint(len(lengths), (cell.batch,))]
    padded = torch.randn(int(drawn.max()), cell.batch, cell.input_size)
    return gated_calls(cell, pack_padded_sequence(padded, drawn, enforce_sorted=False))


@pytest.mark.parametrize("cell", PACKED_CELLS, ids=str, scope="module")
@pytest.mark.parametrize("layer", LAYERS)
def test_packed(cell: Cell, layer: str, publish: Callable[[Cell, str], None]) -> None:
    publish(cell, layer)
