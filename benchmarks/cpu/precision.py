"""Times float32 layers in lower precision: `python -m benchmarks.cpu.precision [--record]`.

The fused layers and torch's layers alternate, under each setting of
`torch.set_float32_matmul_precision` and of `torch.backends.mkldnn.rnn`, which `nn.LSTM` follows.
The tests check the results against the error budget of each setting.
"""

from typing import Any

import torch

from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, LAYER, SHAPE
from benchmarks.harness.grid import SIZES, Workload
from benchmarks.harness.precision import precision_of_products
from benchmarks.harness.study import Calls, Study, grid, kernels
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.timed_calls import call_of, draw_gradients, equal_layers
from namernn_fast.bench.workloads import LAYERS_OF

SHAPES = (  # D, H, T, B
    (256, 256, 64, 16),
    (256, 256, 64, 128),
    (512, 512, 32, 64),
    (1024, 1024, 16, 32),
    (1024, 1024, 16, 256),
)
TIMED = ("baseline highest", "baseline medium", "fused highest", "fused high", "fused medium")
"""The role of the layer, and its precision. torch's layers ignore `high` on a CPU."""


def with_precision(call: TimedCall, name: str) -> TimedCall:
    def timed() -> Any:
        with precision_of_products(name):
            return call()

    return timed


def calls(workload: Workload) -> Calls:
    torch.manual_seed(0)
    input = torch.randn(workload.seq_len or 0, workload.batch, workload.input_size)
    layers = dict(zip(workload.layers._fields, equal_layers(workload).values(), strict=True))
    found = {}
    for name in TIMED:
        role, precision = name.split()
        gradients = draw_gradients(layers[role], input)
        call = call_of(layers[role], input, workload.mode, gradients)
        found[name] = with_precision(call, precision)
    return found


COLUMNS = (
    LAYER,
    SHAPE,
    BATCH,
    *map(columns.time, TIMED),
    columns.over("baseline highest", "fused high", "high / nn"),
    columns.over("baseline medium", "fused medium", "medium / nn"),
)
STUDY = Study(
    name="precision",
    description=__doc__,
    cases=grid(SHAPES, [*LAYERS_OF]),
    calls=calls,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["mode"]),
    caption=lambda document: (
        f"bfloat16 products on `{document['bfloat16']}`. `baseline` is torch's layer, `fused` "
        "ours. torch's layers ignore `high` on a CPU, so `high` is compared with torch's layer at "
        f"`highest`. {SIZES}"
    ),
    facts=kernels,
    by=(),
)

if __name__ == "__main__":
    STUDY.main()
