"""Times LSTMs with a projection: `python -m benchmarks.cpu.projections [--record]`.

The rival is `nn.LSTM(proj_size=...)`. It runs step by step in ATen operators, because torch does
not use oneDNN for LSTMs with a projection.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, Row
from benchmarks.harness.grid import DENSE, MODES, PACKED, Workload
from benchmarks.harness.study import Calls, Study, draw_input
from namernn_fast.bench.timed_calls import gated_calls
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import LSTM

BASELINE, FUSED = LAYERS_OF[LSTM.name]
SHAPES = (  # input_size, hidden_size, proj_size, num_layers, seq_len
    (64, 64, 32, 1, 8),
    (80, 256, 64, 2, 50),
    (80, 512, 128, 1, 40),
    (128, 320, 160, 2, 40),
    (256, 1024, 256, 1, 20),
)
BATCHES = {DENSE: (1, 16, 64), PACKED: (16, 64)}


@dataclass(frozen=True)
class Projection(Workload):
    """A stack of LSTM layers with a projection."""

    proj_size: int = 1
    num_layers: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {"proj_size": self.proj_size, "num_layers": self.num_layers}


def calls(case: Projection) -> Calls:
    """Returns the calls of both layers, after checking the error budget.

    The lengths of packed sequences are spread evenly from one step to seq_len.
    """
    input: Any = draw_input(case)
    if case.family == PACKED:
        lengths = torch.linspace(case.seq_len or 0, 1, case.batch).round().long()
        input = pack_padded_sequence(input, lengths)
    return gated_calls(case, input)


def shape(row: Row) -> str:
    names = "input_size", "hidden_size", "proj_size", "num_layers", "seq_len"
    return str(tuple(row[name] for name in names))


COLUMNS = (
    columns.key("(D, H, P, layers, T)", shape),
    BATCH,
    *map(columns.time, (BASELINE, FUSED)),
    columns.over(BASELINE, FUSED),
    columns.interval(BASELINE),
)
STUDY = Study(
    name="projections",
    description=__doc__,
    cases=[
        Projection(family, mode, batch, size, hidden, steps, LSTM.name, proj, layers)
        for family, batches in BATCHES.items()
        for mode in MODES
        for size, hidden, proj, layers, steps in SHAPES
        for batch in batches
    ],
    calls=calls,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["threads", "mode"]),
    caption=lambda _: (
        "float32. P is proj_size; `nn.LSTM` runs ATen operators. The lengths of packed sequences "
        "are spread from 1 to T."
    ),
    by=("family",),
    one_thread_too=True,
    max_rounds=30,
)

if __name__ == "__main__":
    STUDY.main()
