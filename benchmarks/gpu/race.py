"""Times workloads on a GPU: draws their input, and launches, checks and times their calls.

No workload is timed before its results have passed the gate. No workload is dropped: the table and
the JSON also list workloads that were wrong, failed or did not start before the deadline.
"""

import copy
import dataclasses
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from triton.errors import TritonError
from triton.testing import do_bench

from benchmarks.gpu.flash import FLASH, FLASH_COMPILES, FLASH_ERROR, FlashElman
from benchmarks.gpu.grid import BFLOAT16, DRY_WORKLOADS, FLOAT32, PRECISIONS, WORKLOADS, Precision
from benchmarks.harness.gate import rival_error
from benchmarks.harness.grid import BASELINE, DENSE, FORWARD, FUSED, PACKED, TRAINING, Workload
from benchmarks.names.data import SHARED, VARIABLE, names
from namernn_fast import FusedRNN, explain
from namernn_fast.bench.race import TimedCall, timed
from namernn_fast.bench.timed_calls import Input, call_of, draw_gradients, results
from namernn_fast.names import NamesData, encode_names
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.testing import BudgetError, assert_within_budget

EAGER, GRAPH = "eager", "CUDA graph"
MEASURED, RED, FAILED, LATE = "measured", "red gate", "failed", "not measured"
WRONG_RIVAL = "wrong rival"

# The gate checks the states of this many sequences of a dense batch, and all gradients.
GATE_ROWS = 64
MILLISECONDS = {"warmup": 5, "rep": 10}

Row = dict[str, Any]


@dataclass(frozen=True)
class Platform:
    """Defines where workloads run, how calls are launched and timed, and which path they take."""

    device: str
    workloads: tuple[Workload, ...]
    precisions: tuple[Precision, ...]
    launches: Mapping[str, Callable[[TimedCall], TimedCall]]
    clock: Callable[[TimedCall], list[float]]
    """Returns the seconds of each round of a call."""
    path: Callable[[nn.RNN, Input], str]
    """Returns the path that the fused layer takes for an input."""


def captured(call: TimedCall) -> TimedCall:
    """Returns a call that replays `call` as a CUDA graph and returns the captured tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()

    def replay() -> object:
        graph.replay()
        return returned

    return replay


def event_clock(call: TimedCall) -> list[float]:
    return [1e-3 * ms for ms in do_bench(call, **MILLISECONDS, return_mode="all")]


def wall_clock(call: TimedCall) -> list[float]:
    return [timed(call) for _ in range(2)]


def eager(call: TimedCall) -> TimedCall:
    """Returns the call itself: every operator is launched from Python."""
    return call


def explained_path(layer: nn.RNN, input: Input) -> str:
    return explain(layer, input).path


GPU = Platform(
    "cuda", WORKLOADS, PRECISIONS, {EAGER: eager, GRAPH: captured}, event_clock, explained_path
)
DRY = Platform("cpu", DRY_WORKLOADS, (FLOAT32,), {EAGER: eager}, wall_clock, explained_path)


def known_names() -> NamesData:
    """Returns the local names if there are any, else the embedded sample. Never downloads."""
    is_local = os.environ.get(VARIABLE) or SHARED.is_dir()
    return names() if is_local else embedded_sample()


def draw_input(workload: Workload, dtype: torch.dtype, device: str) -> Input:
    """Returns a dense time-major input, or a packed input with the lengths of names."""
    torch.manual_seed(1)
    lengths = None
    if workload.family == PACKED:
        name_lengths = encode_names([name for name, _ in known_names().rows]).lengths
        lengths = name_lengths[torch.randint(len(name_lengths), (workload.batch,))]
    steps = workload.seq_len or int(lengths.max())
    input = torch.randn(steps, workload.batch, workload.input_size).to(device, dtype)
    return input if lengths is None else pack_padded_sequence(input, lengths, enforce_sorted=False)


def gate_rows(workload: Workload) -> Tensor | None:
    """Returns the sequences that the gate checks, or None for all sequences of a packed batch."""
    if workload.family == PACKED:
        return None
    return torch.linspace(0, workload.batch - 1, min(workload.batch, GATE_ROWS)).long()


def baseline_path(input: Input) -> str:
    """Returns the path that `nn.RNN` takes for an input."""
    data = input.data if isinstance(input, PackedSequence) else input
    return "cuDNN" if torch.backends.cudnn.is_acceptable(data) else "ATen"


def race_workload(
    workload: Workload, precision: Precision, platform: Platform, rival: str = BASELINE
) -> Iterator[Row]:
    """Yields a row for each way to launch a workload, in the precision of the process.

    Raises:
        BudgetError: The oracle and `nn.RNN` cannot be compared.
        RuntimeError, TritonError: No call can be timed.
    """
    input = draw_input(workload, precision.dtype, platform.device)
    classes = {BASELINE: nn.RNN, FUSED: FusedRNN} | ({FLASH: FlashElman} if rival == FLASH else {})
    sizes = workload.input_size, workload.hidden_size
    torch.manual_seed(0)
    layers = {
        name: layer_class(*sizes, device=platform.device, dtype=precision.dtype)
        for name, layer_class in classes.items()
    }
    for layer in layers.values():
        layer.load_state_dict(layers[BASELINE].state_dict())
    paths = {
        "fused_path": platform.path(layers[FUSED], input),
        "nn.RNN_path": baseline_path(input),
    }

    with torch.inference_mode(workload.mode == FORWARD):
        look = partial(results, mode=workload.mode, rows=gate_rows(workload))
        gradients = draw_gradients(layers[BASELINE], input) if workload.mode == TRAINING else ()
        exact_gradients = tuple(value.double() for value in gradients)
        precise = copy.deepcopy(layers[BASELINE]).double()
        exact_input = input.to(torch.float64)
        oracle = look(precise, call_of(precise, exact_input, workload.mode, exact_gradients))
        calls = {
            name: call_of(layer, input, workload.mode, gradients) for name, layer in layers.items()
        }
        theirs = look(layers[BASELINE], calls[BASELINE])
        for launch, launched in platform.launches.items():
            row = {**label(workload, precision, launch, rival), **paths}
            raced, failures = launch_calls({name: calls[name] for name in (rival, FUSED)}, launched)
            try:
                if FUSED in raced:
                    assert_within_budget(look(layers[FUSED], raced[FUSED]), theirs, oracle)
                if FLASH in raced:
                    found = look(layers[FLASH], raced[FLASH])
                    if wrong := rival_error(FLASH, found, oracle, FLASH_ERROR):
                        yield row | {"status": WRONG_RIVAL, "why": str(wrong)}
                        continue
                row |= time_calls(raced, platform) | {"status": MEASURED}
            except (RuntimeError, TritonError) as error:
                failures.append(str(error))
            except BudgetError as error:
                yield row | {"status": RED, "why": str(error)}
                continue
            yield row | ({"status": FAILED, "why": "; ".join(failures)} if failures else {})


def launch_calls(
    calls: Mapping[str, TimedCall], launched: Callable[[TimedCall], TimedCall]
) -> tuple[dict[str, TimedCall], list[str]]:
    """Applies `launched` to each call. Returns the results by name, and errors of failed calls."""
    raced, failures = {}, []
    for name, call in calls.items():
        try:
            raced[name] = launched(call)
        except (RuntimeError, TritonError) as error:
            failures.append(f"{name}: {error}")
    return raced, failures


def time_calls(calls: Mapping[str, TimedCall], platform: Platform) -> Row:
    """Times all calls in order, then in reverse, so that no call always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in (*calls, *reversed([*calls])):
        seconds[name] += platform.clock(calls[name])
    return {
        "medians": {name: statistics.median(found) for name, found in seconds.items()},
        "seconds": {name: [float(f"{s:.4g}") for s in found] for name, found in seconds.items()},
    }


def label(workload: Workload, precision: Precision, launch: str, rival: str) -> Row:
    """Returns the fields of a row that identify what is timed."""
    return {
        **dataclasses.asdict(workload),
        "precision": precision.name,
        "launch": launch,
        "rival": rival,
    }


def run(platform: Platform, deadline: float) -> Iterator[Row]:
    """Yields all rows of the grid in order; workloads after the deadline count as not measured."""
    plan = [(workload, p, BASELINE) for p in platform.precisions for workload in platform.workloads]
    if platform is GPU and importlib.util.find_spec("flashrnn") is not None:
        # FlashRNN comes last, because it compiles at its first call.
        dense = [workload for workload in platform.workloads if workload.family == DENSE]
        plan += [(workload, BFLOAT16, FLASH) for workload in dense]
    for workload, precision, rival in plan:
        late = time.monotonic() > deadline - (FLASH_COMPILES if rival == FLASH else 0)
        outcome = {"status": LATE, "why": "the deadline had passed"}
        found: list[Row] = []
        try:
            if not late:
                with precision.of_the_process():
                    found = list(race_workload(workload, precision, platform, rival))
        except (RuntimeError, TritonError) as error:
            outcome = {"status": FAILED, "why": str(error)}
        found = found or [
            label(workload, precision, launch, rival) | outcome for launch in platform.launches
        ]
        print(f"{workload} {precision.name} against {rival}: {found[-1]['status']}", flush=True)
        yield from found
