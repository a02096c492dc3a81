"""Options, the description of the machine, and fixtures that time the calls of a workload."""

import dataclasses
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks.cpu import memory
from benchmarks.harness import pages
from benchmarks.harness.grid import (
    EPOCH,
    FORWARD,
    GATED_CELLS,
    PACKED,
    ROLES,
    TRAINING,
    WORKLOADS_OF_EVERY_RUN,
    Workload,
)
from benchmarks.harness.tape import TAPE
from benchmarks.names import data
from namernn_fast import FusedRNN, explain
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import QUICK, Rounds, TimeBudget, TimedCall, race
from namernn_fast.names import encode_names


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.addoption("--seconds", type=float, default=2.0, help="for each workload")
    parser.addoption(
        "--quick", action="store_true", help="a trial run: small workloads and few short rounds"
    )
    parser.addoption(
        "--whole-grid",
        action="store_true",
        help="time all layer workloads instead of a third",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=TAPE.now))
    workloads = [item.callspec.params["workload"] for item in items]
    is_whole = config.getoption("--whole-grid")
    left_out = [
        (config.getoption("--quick") and not workload.is_small)
        or not (is_whole or workload in WORKLOADS_OF_EVERY_RUN or workload.family == EPOCH)
        for workload in workloads
    ]
    config.hook.pytest_deselected(items=[*itertools.compress(items, left_out)])
    items[:] = [item for item, is_out in zip(items, left_out, strict=True) if not is_out]


WRONG: list[str] = []
"""The workloads with failed checks; pytest continues with the next workload."""


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo) -> None:
    if isinstance(node, pytest.Function):
        failure = f"{node.callspec.params['workload']}: {call.excinfo.value}"
        if failure not in WRONG:  # each workload has a test for each layer
            WRONG.append(failure)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(
        cpu=cpu_name(),
        cores=os.cpu_count(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        fused_path=explain(FusedRNN(1, 1), torch.zeros(1, 1, 1)).path,
    )


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for entry in output_json["benchmarks"]:
        # `extra_info` has the parameters as plain values; the options describe the timing that
        # pytest-benchmark itself would do.
        del entry["params"], entry["options"]
    output_json["names"] = data.description()
    output_json["wrong"] = WRONG


@pytest.fixture(scope="session", autouse=True)
def settled_process() -> None:
    """Brings the process into the state of a long-running one before any workload is timed."""
    pages.settle(torch.get_num_threads())
    # The garbage collector stays on, as in a user's program, but must not traverse all of torch
    # during a timed round.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def budget(request: pytest.FixtureRequest) -> TimeBudget:
    options = request.config
    return QUICK if options.getoption("--quick") else TimeBudget(options.getoption("--seconds"))


@pytest.fixture(scope="module")
def rounds(
    workload: Workload, calls: dict[str, TimedCall], budget: TimeBudget
) -> dict[str, Rounds]:
    """The rounds of both layers, timed once per workload; each module provides gated `calls`."""
    # Enter inference mode once: entering it in each call adds a tenth to the shortest calls.
    with torch.inference_mode(workload.mode == FORWARD):
        return race(calls, budget)


@pytest.fixture(scope="module")
def lengths(workload: Workload) -> list[int]:
    """The lengths of a packed batch, which are lengths of surnames; empty for dense input."""
    if workload.family != PACKED:
        return []
    name_lengths = encode_names([name for name, _ in data.names().rows]).lengths
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(name_lengths), (workload.batch,), generator=generator)
    return name_lengths[chosen].tolist()


@pytest.fixture(scope="session")
def executors(request: pytest.FixtureRequest) -> Iterator[dict[str, Executor]]:
    """The executors that measure memory, by role: processes, or a thread in a trial run."""
    if request.config.getoption("--quick"):
        with ThreadPoolExecutor(1) as thread:
            yield dict.fromkeys(ROLES, thread)
    else:
        with memory.processes() as found:
            yield found


@pytest.fixture(scope="module")
def peaks(
    workload: Workload,
    lengths: list[int],
    rounds: dict[str, Rounds],
    executors: dict[str, Executor],
) -> dict[str, int]:
    """The peak bytes of a training step of both layers, by role, for layers with gates.

    Requests `rounds` so that memory is not measured either if the results are wrong.
    """
    if workload.cell not in GATED_CELLS or workload.mode != TRAINING:
        return {}
    return memory.peaks_of_training(workload, torch.get_num_threads(), lengths, executors)


@pytest.fixture
def publish(
    benchmark: Any, rounds: dict[str, Rounds], peaks: dict[str, int]
) -> Callable[[Workload, str], None]:
    """Returns a function that reports the recorded rounds of a layer as this test's benchmark."""

    def enter(workload: Workload, role: str) -> None:
        layer = getattr(workload.layers, role)
        recorded = rounds[layer]
        benchmark.group = str(workload)
        benchmark.extra_info.update(
            dataclasses.asdict(workload), layer=layer, iterations=recorded.iterations
        )
        if peaks:
            benchmark.extra_info["peak_bytes"] = peaks[role]
        TAPE.load(recorded.seconds)
        benchmark.pedantic(TAPE.step, setup=TAPE.rewind, rounds=len(recorded.seconds))

    return enter
