"""Times the layers on time-major input: forward, and forward + backward.

A packed batch is packed once and packing is not timed: it costs both layers the same and would only
move the ratio towards one. The epoch of `benchmarks/names/bench_epoch.py` includes packing.
"""

from collections.abc import Callable

import pytest

from benchmarks.harness.grid import (
    DENSE,
    DENSE_WORKLOADS,
    GATED_WORKLOADS,
    PACKED,
    PACKED_WORKLOADS,
    ROLES,
    Workload,
)
from benchmarks.harness.study import draw_input
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.timed_calls import gated_calls, rows_of_oracle

DENSE_CASES, PACKED_CASES = (
    [*workloads, *(workload for workload in GATED_WORKLOADS if workload.family == family)]
    for family, workloads in ((DENSE, DENSE_WORKLOADS), (PACKED, PACKED_WORKLOADS))
)


@pytest.fixture(scope="module")
def calls(workload: Workload, lengths: list[int]) -> dict[str, TimedCall]:
    rows = None if lengths else rows_of_oracle(workload)
    return gated_calls(workload, draw_input(workload, lengths), rows)


@pytest.mark.parametrize("workload", DENSE_CASES, ids=str, scope="module")
@pytest.mark.parametrize("role", ROLES)
def test_layer(workload: Workload, role: str, publish: Callable[[Workload, str], None]) -> None:
    publish(workload, role)


@pytest.mark.parametrize("workload", PACKED_CASES, ids=str, scope="module")
@pytest.mark.parametrize("role", ROLES)
def test_packed(workload: Workload, role: str, publish: Callable[[Workload, str], None]) -> None:
    publish(workload, role)
