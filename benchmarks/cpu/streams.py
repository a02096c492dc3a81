"""Times single steps: `python -m benchmarks.cpu.streams [--record]`.

The rounds alternate between a stream, torch's cell, one-step calls of torch's, fused and prepared
layers, and runtimes that pack weights once. There is a pause between rounds.
"""

from typing import Any

import torch

from benchmarks.cpu.prepared import PAUSE, RUNTIMES, layer_calls, problem_of, runtime_calls
from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH
from benchmarks.harness.grid import FORWARD, Workload
from benchmarks.harness.machine import multiply_add_rate, read_rate
from benchmarks.harness.study import Calls, CheckedCalls, Study, grid
from namernn_fast import prepare_rnn, prepared_ops
from namernn_fast.bench.race import timed
from namernn_fast.bench.tables import duration
from namernn_fast.bench.timed_calls import equal_layers
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS
from namernn_fast.testing import assert_within_budget

SIZES, BATCHES = (64, 256, 512, 1024), (1, 8, 64)
RIVALS = ("torch's cell", "torch's layer", *RUNTIMES)
MINE = ("stream", "out=")
"""A stream's step that allocates its output, and one with `out=`, as in the runtimes."""
FLOAT_BYTES = 4
SECONDS = 0.05
"""The time to measure each rate of the machine."""


def floor(workload: Workload, calls: Calls) -> dict[str, Any]:
    """Returns the minimum seconds for the multiply-adds or, if longer, for reading the weights.

    The weights are read from the nearest cache or memory that holds a block of their size.
    """
    threads, size = torch.get_num_threads(), FLOAT_BYTES * workload.row_work
    reading = size / read_rate(threads, size, SECONDS)
    multiplying = 2 * workload.row_work * workload.batch / multiply_add_rate(threads, SECONDS)
    return {"floor": max(multiplying, reading)}


def empty_operator() -> dict[str, float]:
    """Returns the overhead of a step's operator, measured in seconds on an empty batch."""
    stream = prepare_rnn(torch.nn.LSTM(1, 1)).stream(0)
    panels, frame = stream._prepared._panels, torch.zeros(0, 1)
    cell = panels.cell.number
    arguments = cell, panels.tensor, stream._states, frame, None, (), panels.options
    seconds = min(timed(lambda: prepared_ops.step(*arguments), 10_000) for _ in range(7))
    return {"empty_operator": seconds}


def calls(workload: Workload) -> CheckedCalls:
    """Returns the calls of a step by name, after an error check of the stream's output."""
    problem = problem_of(workload)
    theirs, ours = equal_layers(workload).values()
    input, hx, size = problem.input, problem.hx, workload.hidden_size
    stream, frame = prepare_rnn(ours).stream(workload.batch), input[0].clone()
    out, cell = torch.empty(workload.batch, size), CELLS[workload.cell]
    module = cell.torch.step_module(workload.input_size, size)
    row_hx = tuple(state[0] for state in hx) if isinstance(hx, tuple) else hx[0]
    stream.states = hx
    wanted = theirs(input, hx)[0][0]
    precise = torch.utils._pytree.tree_map(torch.Tensor.double, (input, hx))
    oracle = theirs.double()(*precise)[0][0]
    assert_within_budget({"output": stream(frame)}, {"output": wanted}, {"output": oracle})
    layers = dict(
        zip(("torch's layer", "layer", "prepared"), layer_calls(problem).values(), strict=True)
    )
    return {
        MINE[0]: lambda: stream(frame),
        MINE[1]: lambda: stream(frame, out=out),
        RIVALS[0]: lambda: module(frame, row_hx),
        **layers,
        **runtime_calls(problem),
    }


COLUMNS = (
    columns.key("cell", "cell"),
    columns.key("H", "hidden_size"),
    BATCH,
    *map(columns.time, (*RIVALS, "layer", "prepared", *MINE)),
    columns.text("floor", lambda row: duration(row["floor"])),
    *(columns.over(RIVALS, name, f"{name} over the best") for name in MINE),
    columns.over(RIVALS, "prepared", "prepared over the best"),
    columns.text(
        "of the floor's rate", lambda row: f"{row['floor'] / row['medians'][MINE[1]]:.0%}"
    ),
)
STUDY = Study(
    name="streams",
    description=__doc__,
    cases=grid(
        [(size, size, 1, batch) for size in SIZES for batch in BATCHES], [*LAYERS_OF], [FORWARD]
    ),
    calls=calls,
    also=floor,
    facts=empty_operator,
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=lambda document: (
        "float32, D = H. `layer` is the fused layer, and `prepared` is that layer after "
        "`prepare()`. `floor` is the time of the multiply-adds at the peak rate or, if longer, the "
        "time to read the weights once from the nearest cache or memory that holds them. An empty "
        f"operator with the arguments of a step takes {duration(document['empty_operator'])}. "
        "onnxruntime and OpenVINO have bound buffers, like a stream with `out=`. The last column "
        "compares `out=` with the floor."
    ),
    by=("threads",),
    is_folded=True,
    one_thread_too=True,
    pause=PAUSE,
)

if __name__ == "__main__":
    STUDY.main()
