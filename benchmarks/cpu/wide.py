"""Times wide layers on few sequences: `python -m benchmarks.cpu.wide [--record]`.

These calls are bandwidth-bound: each step reads `weight_hh` for one to eight sequences. The read
floor is the time to read the weights as often as a call must. The read rate is measured on a
block of the same size from the nearest memory that can hold it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import columns, machine
from benchmarks.harness.columns import BATCH, SHAPE, Row, Rows
from benchmarks.harness.grid import BASELINE, DENSE, FUSED, MODES, SIZES, TRAINING, Workload
from benchmarks.harness.study import Calls, Study, draw_input
from namernn_fast.bench.timed_calls import gated_calls, rows_of_oracle

# Maps each dtype and hidden size to tuples of (input_size, seq_len, batch).
SHAPES = {
    "float32": {
        300: ((16, 1, 1), (300, 8, 4), (2048, 8, 2), (300, 32, 2), (300, 64, 8)),
        384: ((4096, 16, 4),),
        400: ((32, 64, 1),),
        512: ((512, 1, 8), (512, 10, 2), (4096, 4, 2), (64, 16, 4), (512, 32, 8), (512, 64, 1)),
        700: ((700, 5, 2), (700, 5, 8), (1, 20, 1)),
        768: ((768, 1, 4), (768, 12, 3), (768, 32, 1)),
        1000: ((1000, 2, 5), (200, 10, 1), (200, 10, 2)),
        1024: (
            *((1024, 1, 1), (4096, 3, 1), (1024, 4, 8), (16, 8, 6), (1024, 10, 4)),
            *((1024, 16, 32), (1024, 64, 1)),
        ),
        1500: ((64, 1, 2), (1500, 2, 8), (64, 12, 3)),
        2048: ((2048, 1, 8), (2048, 4, 4), (2048, 10, 1), (2048, 10, 2), (128, 16, 1)),
        3000: ((3000, 3, 2), (100, 6, 4)),
        4096: ((64, 4, 1), (4096, 1, 1), (4096, 2, 8)),
    },
    "bfloat16": {
        300: ((300, 8, 4),),
        512: ((4096, 4, 2), (512, 64, 1)),
        700: ((700, 5, 2),),
        1000: ((200, 10, 1), (200, 10, 2)),
        1024: ((1024, 4, 8), (1024, 16, 32)),
        1500: ((64, 12, 3),),
        2048: ((2048, 10, 1), (2048, 10, 2)),
        4096: ((4096, 2, 8),),
    },
}
WORST = 10
"""The sizes with a line in a table, one for all modes and numbers of threads."""
PROBE_SECONDS = 0.05


@dataclass(frozen=True)
class Wide(Workload):
    """A workload with a dtype, given by its name in torch."""

    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def options(self) -> dict[str, Any]:
        return {"dtype": self.torch_dtype}


def calls(workload: Wide) -> Calls:
    input = draw_input(workload).to(workload.torch_dtype)
    return gated_calls(workload, input, rows_of_oracle(workload))


def weights_read(workload: Workload) -> int:
    """Returns the minimum number of weights that a call reads.

    A call reads `weight_ih` once, and `weight_hh` in each step of each pass except the first step,
    which has no state to multiply.
    """
    passes = 2 if workload.mode == TRAINING else 1
    recurrent = passes * ((workload.seq_len or 0) - 1) * workload.hidden_size
    return (workload.input_size + recurrent) * workload.hidden_size


def floor(workload: Wide, calls: Calls) -> Row:
    """Returns the seconds that the threads need to read the weights as often as a call must."""
    weights = (workload.input_size + workload.hidden_size) * workload.hidden_size
    size = workload.torch_dtype.itemsize
    rate = machine.read_rate(torch.get_num_threads(), size * weights, PROBE_SECONDS)
    return {"floor": size * weights_read(workload) / rate}


COLUMNS = (
    SHAPE,
    BATCH,
    *map(columns.time, (BASELINE, FUSED)),
    columns.over(BASELINE, FUSED),
    columns.interval(BASELINE),
    columns.text("of read floor", lambda row: f"{row['floor'] / row['medians'][FUSED]:.0%}"),
)


def table(rows: Rows) -> str:
    """Returns a table of the worst sizes, with the geometric mean of all sizes."""
    sizes: dict[tuple[str, str], Rows] = {}
    for row in sorted(rows, key=lambda row: row["medians"][BASELINE] / row["medians"][FUSED]):
        sizes.setdefault((SHAPE.text(row), BATCH.text(row)), []).append(row)
    worst = [*sizes.values()][:WORST]
    head = f"The worst {len(worst)} of {len(sizes)} sizes, and the geometric mean of all:"
    shown = [row for found in worst for row in found]
    return f"{head}\n\n{columns.table(rows, COLUMNS, ['threads', 'mode'], shown)}"


STUDY = Study(
    name="wide",
    description=__doc__,
    cases=[
        Wide(DENSE, mode, batch, input_size, hidden_size, steps, dtype=dtype)
        for dtype, by_hidden_size in SHAPES.items()
        for mode in MODES
        for hidden_size, shapes in by_hidden_size.items()
        for input_size, steps, batch in shapes
    ],
    calls=calls,
    also=floor,
    table=table,
    caption=lambda _: (
        "float32 and bfloat16. Speed-ups are ratios of the medians, with their 95 % interval. The "
        "read floor is the time to read the weights, the recurrent ones once per step and pass; "
        f"the column gives it as a share of {FUSED}'s time. {SIZES}"
    ),
    by=("dtype",),
    one_thread_too=True,
    seconds=1.5,
    max_rounds=30,
)

if __name__ == "__main__":
    STUDY.main()
