"""Options, the machine's description, and the way from a cell's gated calls to its benchmarks."""

import dataclasses
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness import surnames
from benchmarks.harness.grid import FORWARD, Cell
from benchmarks.harness.race import QUICK, TAPE, Budget, Call, Rounds, keep_freed_memory, race
from namernn_fast import FusedRNN, explain

# A quick run times only cells of at most so many multiply-adds a call.
QUICK_WORK = 4 * 10**8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.addoption("--quick", action="store_true", help="small cells only, a few short rounds")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=TAPE.now))
    if config.getoption("--quick"):
        big = [item for item in items if item.callspec.params["cell"].work > QUICK_WORK]
        config.hook.pytest_deselected(items=big)
        items[:] = [item for item in items if item not in big]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    cpu = machine_info["cpu"]
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", "unknown CPU"),
        cores=os.cpu_count(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        fused_path=explain(FusedRNN(1, 1), torch.zeros(1, 1, 1)).path,
    )


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for entry in output_json["benchmarks"]:
        # `extra_info` says all of it, as plain values; the options were made for pytest-benchmark's
        # own way of timing and would be false here.
        del entry["params"], entry["options"]
    output_json["names"] = surnames.description()


@pytest.fixture(scope="session", autouse=True)
def settled_process() -> None:
    """Bring the process to the state of one that has run for long, before any cell is timed."""
    keep_freed_memory()
    # The collector stays on, as in use, but need not walk all of torch in some timed round.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def budget(request: pytest.FixtureRequest) -> Budget:
    return QUICK if request.config.getoption("--quick") else Budget()


@pytest.fixture(scope="module")
def rounds(
    cell: Cell, calls: dict[str, Call], budget: Budget, request: pytest.FixtureRequest
) -> dict[str, Rounds]:
    """The rounds of both layers, run once a cell; `calls` is the module's own, and gated."""
    if request.config.getoption("--benchmark-disable"):
        return {name: Rounds(0, ()) for name in calls}
    # Entered once and not in each call: it costs as much as a tenth of the shortest calls.
    with torch.inference_mode(cell.mode == FORWARD):
        return race(calls, budget)


@pytest.fixture
def publish(benchmark: Any, rounds: dict[str, Rounds]) -> Callable[[Cell, str], None]:
    """Enter the recorded rounds of one layer as this test's benchmark."""

    def enter(cell: Cell, layer: str) -> None:
        recorded = rounds[layer]
        benchmark.group = str(cell)
        benchmark.extra_info.update(
            dataclasses.asdict(cell), layer=layer, iterations=recorded.iterations
        )
        TAPE.load(recorded.seconds)
        benchmark.pedantic(TAPE.step, setup=TAPE.rewind, rounds=max(1, len(recorded.seconds)))

    return enter
