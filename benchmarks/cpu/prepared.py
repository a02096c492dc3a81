"""Times prepared layers: `python -m benchmarks.cpu.prepared [--record]`.

Prepared, fused and torch's layers alternate with runtimes that pack weights once. All run inference
with nonzero initial states. The runtimes use bound input and output buffers.
`benchmarks/cpu/streams.py` times single steps, and `benchmarks/cpu/eight_bits.py` 8-bit weights.
"""

import torch

from benchmarks.cpu.rivals import ERROR, RIVALS, Problem, is_available
from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, LAYER, SHAPE
from benchmarks.harness.gate import rival_error
from benchmarks.harness.grid import FORWARD, SIZES, Workload
from benchmarks.harness.study import Calls, CheckedCalls, Study, grid
from namernn_fast import prepare_rnn
from namernn_fast.bench.timed_calls import equal_layers, tensors_in
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS

SHAPES = (  # D, H, T, B
    (64, 64, 8, 1),
    (64, 256, 8, 16),
    (1024, 1024, 16, 32),
)
RUNTIMES = ("onnxruntime", "OpenVINO")
OURS = ("torch", "fused", "prepared")
PAUSE = 0.03
"""Seconds before each round; see `race`."""


def problem_of(workload: Workload) -> Problem:
    """Returns torch's layer of a workload with a random input and random initial states."""
    baseline = equal_layers(workload)[workload.layers.baseline].eval()
    input = torch.randn(workload.seq_len or 0, workload.batch, workload.input_size)
    size = 1, workload.batch, workload.hidden_size
    states = tuple(torch.randn(size).tanh() for _ in CELLS[workload.cell].states)
    return Problem(workload, baseline, input, (), states)


def layer_calls(problem: Problem) -> Calls:
    """Returns the calls of torch's layer, the fused layer and the prepared layer."""
    theirs, ours = equal_layers(problem.workload).values()
    layers = dict(zip(OURS, (theirs, ours, prepare_rnn(ours)), strict=True))
    return {
        name: lambda layer=layer: layer(problem.input, problem.hx) for name, layer in layers.items()
    }


def runtime_calls(problem: Problem) -> CheckedCalls:
    """Returns the call of each installed runtime, or an error if its result is wrong."""
    found: CheckedCalls = {}
    h_n = tensors_in(problem.baseline(problem.input, problem.hx))[1]
    for name in RUNTIMES:
        if is_available(name):
            call = RIVALS[name][1](problem, torch.get_num_threads())
            result = {"h_n": torch.as_tensor(call())}
            found[name] = rival_error(name, result, {"h_n": h_n}, ERROR) or call
    return found


def calls(workload: Workload) -> CheckedCalls:
    problem = problem_of(workload)
    return {**layer_calls(problem), **runtime_calls(problem)}


COLUMNS = (
    LAYER,
    SHAPE,
    BATCH,
    *map(columns.time, (*OURS, *RUNTIMES)),
    columns.over("fused", "prepared", "over fused"),
    columns.over(("torch", *RUNTIMES), "prepared", "over the best other"),
)
STUDY = Study(
    name="prepared",
    description=__doc__,
    cases=grid(SHAPES, [*LAYERS_OF], [FORWARD]),
    calls=calls,
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=lambda _: (
        "float32. `torch` is torch's layer, `fused` is ours, and `prepared` is our layer after "
        "`prepare()`. The other columns are runtimes that pack weights once. Every call gets "
        f"initial states. {SIZES}"
    ),
    by=(),
    pause=PAUSE,
)

if __name__ == "__main__":
    STUDY.main()
