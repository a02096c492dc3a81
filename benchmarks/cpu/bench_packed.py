"""Times the layers on packed batches with the lengths of surnames.

The batch is packed once and packing is not timed: it costs both layers the same and would only
move the ratio towards one. The epoch of `benchmarks/names/bench_epoch.py` includes packing.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.cpu.memory import draw_input
from benchmarks.harness.grid import GATED_WORKLOADS, PACKED, PACKED_WORKLOADS, ROLES, Workload
from benchmarks.names.data import names
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.timed_calls import gated_calls
from namernn_fast.names import encode_names

WITH_GATES = [workload for workload in GATED_WORKLOADS if workload.family == PACKED]


@pytest.fixture(scope="module")
def lengths(workload: Workload) -> list[int]:
    name_lengths = encode_names([name for name, _ in names().rows]).lengths
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(name_lengths), (workload.batch,), generator=generator)
    return name_lengths[chosen].tolist()


@pytest.fixture(scope="module")
def calls(workload: Workload, lengths: list[int]) -> dict[str, TimedCall]:
    return gated_calls(workload, draw_input(workload, lengths))


@pytest.mark.parametrize("workload", [*PACKED_WORKLOADS, *WITH_GATES], ids=str, scope="module")
@pytest.mark.parametrize("role", ROLES)
def test_packed(workload: Workload, role: str, publish: Callable[[Workload, str], None]) -> None:
    publish(workload, role)
