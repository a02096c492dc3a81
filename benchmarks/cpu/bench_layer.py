"""Times the layers on dense time-major input: forward, and forward + backward."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.harness.grid import DENSE, DENSE_WORKLOADS, GATED_WORKLOADS, ROLES, Workload
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.timed_calls import gated_calls, rows_of_oracle

WITH_GATES = [workload for workload in GATED_WORKLOADS if workload.family == DENSE]


@pytest.fixture(scope="module")
def calls(workload: Workload) -> dict[str, TimedCall]:
    torch.manual_seed(1)
    input = torch.randn(workload.seq_len, workload.batch, workload.input_size)
    return gated_calls(workload, input, rows_of_oracle(workload))


@pytest.mark.parametrize("workload", [*DENSE_WORKLOADS, *WITH_GATES], ids=str, scope="module")
@pytest.mark.parametrize("role", ROLES)
def test_layer(workload: Workload, role: str, publish: Callable[[Workload, str], None]) -> None:
    publish(workload, role)
