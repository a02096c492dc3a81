"""Times 8-bit weights against float32: `python -m benchmarks.cpu.eight_bits [--record]`.

Prepared layers with float32 and 8-bit weights alternate with torch.ao's quantized layers and
onnxruntime's quantized LSTM, with pauses in between. Single steps of streams and of onnxruntime
alternate in the same way. OpenVINO is left out: it needs sample inputs to quantize a layer.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cpu.prepared import PAUSE, problem_of
from benchmarks.cpu.rivals import Problem, bound_session, is_available, new_session, onnx_model
from benchmarks.harness import columns, torch_ao
from benchmarks.harness.columns import BATCH, LAYER, SHAPE, Row
from benchmarks.harness.grid import FORWARD, SIZES, Workload
from benchmarks.harness.machine import read_rate
from benchmarks.harness.study import Calls, CheckedCalls, Study, grid, kernels
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.timed_calls import equal_layers
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS, LSTM, VANILLA
from namernn_fast.testing import BudgetError, max_error

SHAPES = (  # D, H, T, B
    (256, 256, 32, 1),
    (512, 512, 32, 1),
    (1024, 1024, 16, 1),
    (256, 256, 32, 16),
    (512, 512, 32, 64),
    (1024, 1024, 16, 32),
)
STEPS = tuple((size, size, 1, batch) for size in (64, 128, 256, 512, 1024) for batch in (1, 8))
LAYERS, STREAMS = "layers", "one step of a stream, with `out=`"
DTYPES = {"float32": None, "int8": torch.int8}
"""The argument of `prepare()` for each type of weights."""
RIVALS = ("onnxruntime", "torch.ao")
MAX_ERROR = 0.03
"""At these sizes, rounding to 8 bits changes outputs by at most about half of this. Swapped gates
or a missing bias change them by more."""
MAX_RIVAL_ERROR = 0.1
"""torch.ao has one scale for a whole matrix, so its errors are larger."""
ROW_BYTES = 8
"""Each row of 8-bit weights stores its scale and its sum in this many bytes."""
SECONDS = 0.05
"""The time to measure the read rate."""


@dataclasses.dataclass(frozen=True)
class Quantized(Workload):
    """A workload that either calls layers or runs steps of streams."""

    calls: str = LAYERS


def onnxruntime_call(problem: Problem, shape: Sequence[int]) -> TimedCall:
    """Returns the call of onnxruntime's `DynamicQuantizeLSTM`, with bound input and outputs.

    The call returns the output in the given shape.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load_model_from_string(onnx_model(problem))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8)
        session = new_session(path.read_bytes(), torch.get_num_threads())
        run, bound = bound_session(session, problem)
    output = torch.from_numpy(bound["Y"]).view(*shape)

    def call() -> torch.Tensor:
        run()
        return output

    return call


def torch_ao_call(problem: Problem) -> TimedCall:
    """Returns the call of torch.ao's quantized layer, on the fastest engine."""
    layer = problem.baseline
    return torch_ao.fastest(
        nn.Sequential(layer),
        lambda model: lambda: model[0](problem.input, problem.hx)[0],
        {type(layer)},
    )


def calls(case: Quantized) -> CheckedCalls:
    """Returns the error-checked calls of rivals, and of layers with float32 and 8-bit weights.

    Raises:
        BudgetError: The error of 8-bit weights is too large.
    """
    problem, found = problem_of(case), dict[str, TimedCall]()
    input, hx = problem.input, problem.hx
    layer: Any = equal_layers(case)[case.layers.fused]
    for name, dtype in DTYPES.items():
        prepared = layer.prepare(dtype)
        if case.calls == LAYERS:
            found[name] = lambda prepared=prepared: prepared(input, hx)[0]
        else:
            stream, out = prepared.stream(case.batch), torch.empty(case.batch, case.hidden_size)
            stream.states = hx
            found[name] = lambda stream=stream, out=out: stream(input[0], out=out)
    cell = CELLS[case.cell]
    # torch.ao has no nn.RNN.
    if case.calls == LAYERS and cell is not VANILLA and torch_ao.is_available():
        found["torch.ao"] = torch_ao_call(problem)
    if cell is LSTM and find_spec("onnx") and is_available("onnxruntime"):
        shape = (*input.shape[:-1], case.hidden_size)
        found["onnxruntime"] = onnxruntime_call(problem, shape[case.calls != LAYERS :])
    checked: CheckedCalls = {**found}
    for name, error in errors_of(found).items():
        if not error < (MAX_ERROR if name in DTYPES else MAX_RIVAL_ERROR):
            wrong = BudgetError(f"{name} is off by {error:.2g}")
            if name in DTYPES:
                raise wrong
            checked[name] = wrong
    return checked


def errors_of(calls: Calls) -> dict[str, float]:
    """Returns the largest error of each call, compared with float32."""
    exact = calls["float32"]()
    return {name: max_error(call(), exact) for name, call in calls.items() if name != "float32"}


def bytes_read(workload: Workload) -> int:
    """Returns the minimum bytes of 8-bit weights that a call reads: weight_hh once per step."""
    rows = CELLS[workload.cell].gates * workload.hidden_size
    input, state = workload.input_size + ROW_BYTES, workload.hidden_size + ROW_BYTES
    return rows * (input + (workload.seq_len or 0) * state)


def also(case: Quantized, calls: Calls) -> Row:
    """Returns each call's error, the read rate and, for streams, the size of packed weights."""
    once = bytes_read(dataclasses.replace(case, seq_len=1))
    row: Row = {"errors": errors_of(calls)}
    row["read_rate"] = read_rate(torch.get_num_threads(), once, SECONDS)
    if case.calls == STREAMS:
        layer: Any = equal_layers(case)[case.layers.fused]
        for name, dtype in DTYPES.items():
            row[f"{name} bytes"] = layer.prepare(dtype)._panels.tensor.nbytes
    return row


def rate(row: Row) -> float:
    """Returns the bytes per second that a call with 8-bit weights reads."""
    return bytes_read(Workload.of(row)) / row["medians"]["int8"]


def error(name: str, head: str) -> columns.Column:
    return columns.text(
        head, lambda row: f"{row['errors'][name]:.4f}" if name in row["errors"] else ""
    )


def kibibytes(name: str) -> columns.Column:
    return columns.key(
        f"{name}, KiB",
        lambda row: f"{row[f'{name} bytes'] / 2**10:,.0f}" if f"{name} bytes" in row else "",
    )


COLUMNS = (
    LAYER,
    SHAPE,
    BATCH,
    columns.key("MB read", lambda row: f"{bytes_read(Workload.of(row)) / 1e6:.3g}"),
    *map(kibibytes, DTYPES),
    *map(columns.time, DTYPES),
    *(columns.paired(name, f"over {name}") for name in ("float32", *RIVALS)),
    columns.text("of the read rate", lambda row: f"{rate(row) / row['read_rate']:.0%}"),
    error("int8", "error"),
    *(error(name, f"error of {name}") for name in RIVALS),
)
STUDY = Study(
    name="eight_bits",
    description=__doc__,
    cases=[
        *grid(SHAPES, [*LAYERS_OF], [FORWARD], Quantized),
        *grid(STEPS, [*LAYERS_OF], [FORWARD], Quantized, calls=STREAMS),
    ],
    calls=calls,
    also=also,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["threads"]),
    caption=lambda document: (
        f"8-bit products on `{document['int8']}`, float32 on `{document['float32']}`. `float32` "
        "and `int8` are prepared layers with these weights. The speed-ups of int8 over float32, "
        "over onnxruntime's LSTM with 8-bit weights and a scale for each row, and over torch.ao's "
        "quantized layer on the faster of two engines are medians of the ratios within a round. "
        "`MB read` is what a call with 8-bit weights must read: weight_ih once, and weight_hh in "
        "each step. The read rate is measured on threads that reread a block of the weights' size. "
        "A layer can exceed it, because every other step reads weight_hh backwards and so starts "
        "with what is still in the cache. An error is the largest difference of the output from "
        "float32. Every call of a layer gets initial states. `KiB` is the memory of packed "
        f"weights. {SIZES}"
    ),
    facts=kernels,
    by=("calls",),
    is_folded=True,
    ours="int8",
    one_thread_too=True,
    seconds=1.5,
    pause=PAUSE,
)

if __name__ == "__main__":
    STUDY.main()
