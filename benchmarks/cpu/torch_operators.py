"""Times the reference path: `python -m benchmarks.cpu.torch_operators [--record]`.

The reference path serves every device and dtype without a kernel. Here the C++ extension is
disabled, so that the reference path runs on a CPU. The rival is `nn.RNN`. Without `--record` only
two batch sizes are timed.
"""

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, SHAPE
from benchmarks.harness.grid import BASELINE, DENSE, FUSED, MODES, PACKED, SHAPES, SIZES, Workload
from benchmarks.harness.study import Calls, Study, draw_input
from namernn_fast.bench.timed_calls import gated_calls
from namernn_fast.machine import availability

LAYER_BATCHES = (1, 16, 64, 256)
FEW_BATCHES = (1, 64)
LARGEST_WORK = 10**9
"""The maximum number of multiply-adds in a timed forward pass."""


def calls(workload: Workload) -> Calls:
    input = draw_input(workload)
    if workload.family == DENSE:
        return gated_calls(workload, input)
    lengths = torch.randint(1, len(input) + 1, (workload.batch,))
    return gated_calls(workload, pack_padded_sequence(input, lengths, enforce_sorted=False))


WORKLOADS = [
    Workload(family, mode, batch, *shape)
    for family in (DENSE, PACKED)
    for shape in SHAPES
    for batch in LAYER_BATCHES
    for mode in MODES
]
COLUMNS = (
    SHAPE,
    BATCH,
    columns.time(BASELINE),
    columns.time(FUSED, "reference path"),
    columns.paired(BASELINE),
)
STUDY = Study(
    name="torch_operators",
    description=__doc__,
    cases=[case for case in WORKLOADS if case.batch * case.row_work <= LARGEST_WORK],
    calls=calls,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["mode"]),
    caption=lambda _: (
        f"float32. A speed-up is the median of the ratios of neighbouring rounds. {SIZES}"
    ),
    by=("family",),
    is_folded=True,
    few=lambda workload: workload.batch in FEW_BATCHES,
    seconds=0.4,
    max_rounds=100,
    round_seconds=0.003,
)


if __name__ == "__main__":
    availability.HAS_EXTENSION = False
    STUDY.main()
