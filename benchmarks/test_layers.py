"""Times the layers of the grid with pytest-benchmark: `pytest benchmarks`.

Useful when changing a kernel. `-k "gru and B16"` selects workloads, and `-m ""` adds the two thirds
that are skipped by default. `--benchmark-autosave` keeps the times, and `--benchmark-compare`
compares them with an earlier run. Layers are timed one after the other, so compare a layer with its
earlier times; `make bench` compares layers with each other. `OMP_NUM_THREADS` sets the number of
threads.
"""

from typing import Any

import pytest
import torch

from benchmarks.cpu import grid
from benchmarks.harness.grid import FORWARD, LAYER_WORKLOADS, WORKLOADS_OF_EVERY_RUN, Workload
from namernn_fast.bench.race import TimedCall, keep_freed_memory

CASES = [
    pytest.param(
        case, id=str(case), marks=() if case in WORKLOADS_OF_EVERY_RUN else pytest.mark.slow
    )
    for case in LAYER_WORKLOADS
]


@pytest.fixture(scope="module")
def calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns the calls of both layers, after their results have passed the gate."""
    keep_freed_memory()
    return grid.calls(workload)


@pytest.mark.parametrize("workload", CASES, scope="module")
@pytest.mark.parametrize("role", ["baseline", "fused"])
def test_layer(benchmark: Any, workload: Workload, role: str, calls: dict[str, TimedCall]) -> None:
    benchmark.group = str(workload)
    with torch.inference_mode(workload.mode == FORWARD):
        benchmark(calls[getattr(workload.layers, role)])
