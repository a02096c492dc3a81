"""Times the 16-bit types against float32: `python -m benchmarks.cpu.sixteen_bits [--record]`.

`FusedRNN` in three dtypes and `nn.RNN` in bfloat16 alternate. The tests check their results
against the error budget of each dtype.
"""

import torch
from torch import nn

from benchmarks.cpu.peers import SHAPES
from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, SHAPE
from benchmarks.harness.grid import BASELINE, FUSED, SIZES, Workload
from benchmarks.harness.study import Calls, Study, grid, kernels
from namernn_fast import FusedRNN
from namernn_fast.bench.timed_calls import call_of, draw_gradients

SINGLE = f"{FUSED} float32"
LAYERS = {
    SINGLE: (FusedRNN, torch.float32),
    f"{FUSED} bfloat16": (FusedRNN, torch.bfloat16),
    f"{FUSED} float16": (FusedRNN, torch.float16),
    f"{BASELINE} bfloat16": (nn.RNN, torch.bfloat16),
}


def calls(workload: Workload) -> Calls:
    found = {}
    for name, (layer_class, dtype) in LAYERS.items():
        torch.manual_seed(0)
        layer = layer_class(workload.input_size, workload.hidden_size, dtype=dtype)
        input = torch.randn(workload.seq_len, workload.batch, workload.input_size, dtype=dtype)
        found[name] = call_of(layer, input, workload.mode, draw_gradients(layer, input))
    return found


COLUMNS = [SHAPE, BATCH, columns.time(SINGLE)]
for name in [*LAYERS][1:]:
    COLUMNS += [columns.time(name), columns.over(SINGLE, name)]

STUDY = Study(
    name="sixteen_bits",
    description=__doc__,
    cases=grid(SHAPES, ["rnn"]),
    calls=calls,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["mode"]),
    caption=lambda document: (
        f"bfloat16 on `{document['bfloat16']}`. Speed-ups are over {FUSED} in float32. {SIZES}"
    ),
    facts=kernels,
    by=(),
)

if __name__ == "__main__":
    STUDY.main()
