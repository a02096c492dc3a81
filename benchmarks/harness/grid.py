"""The grid of `make bench`: all workloads, in the order in which they are timed and reported."""

from dataclasses import replace

from namernn_fast.bench.workloads import BASELINE as BASELINE
from namernn_fast.bench.workloads import DENSE, MODES, PACKED, TRAINING, Layers, Workload
from namernn_fast.bench.workloads import FORWARD as FORWARD
from namernn_fast.bench.workloads import FUSED as FUSED
from namernn_fast.bench.workloads import LAYERS as LAYERS
from namernn_fast.cells import CELLS

EPOCH = "epoch"
FAMILIES = (DENSE, PACKED, EPOCH)

BATCHES = (1, 16, 64, 256, 1024)
SHAPES = ((64, 64, 8), (64, 256, 8), (128, 128, 128), (512, 512, 128))
PACKED_SHAPE = (64, 256)
ROLES = Layers._fields
"""The roles of the two layers in a workload: "baseline" and "fused"."""
SIZES = "D is the input size, H the hidden size, T the sequence length, B the batch size."
"""The legend of every table that prints these letters."""

DENSE_WORKLOADS = tuple(
    Workload(DENSE, mode, batch, *shape) for mode in MODES for shape in SHAPES for batch in BATCHES
)
PACKED_WORKLOADS = tuple(
    Workload(PACKED, mode, batch, *PACKED_SHAPE) for mode in MODES for batch in BATCHES
)
GATED_CELLS = tuple(name for name, cell in CELLS.items() if cell.gates > 1)
"""The names of the cells with gates."""
# By shape: the batch sizes that every run times, for the vanilla layer and for layers with gates.
BATCHES_OF_EVERY_RUN = {
    (64, 64, 8): ((1, 64, 1024), (1,)),
    (64, 256, 8): ((1, 16, 256), (16,)),
    (128, 128, 128): ((1, 64), (1,)),
    (512, 512, 128): ((16, 64), (64,)),
    (*PACKED_SHAPE, None): ((1, 16, 256), (16, 256)),
}
# At these sizes a round of both layers takes half a minute.
TOO_LONG_WITH_GATES = ((512, 512, 128), 1024)


def _sizes(workload: Workload) -> tuple[tuple[int, int, int | None], int]:
    return (workload.input_size, workload.hidden_size, workload.seq_len), workload.batch


GATED_WORKLOADS = tuple(
    replace(workload, cell=cell)
    for cell in GATED_CELLS
    for workload in (*DENSE_WORKLOADS, *PACKED_WORKLOADS)
    if _sizes(workload) != TOO_LONG_WITH_GATES
)
"""The workloads of `nn.GRU` and `nn.LSTM`."""
WORKLOADS_OF_EVERY_RUN = tuple(
    workload
    for workload in (*DENSE_WORKLOADS, *PACKED_WORKLOADS, *GATED_WORKLOADS)
    if workload.batch in BATCHES_OF_EVERY_RUN[_sizes(workload)[0]][workload.cell in GATED_CELLS]
)
"""The layer workloads that every run times; a run that records times all of them."""
EPOCH_WORKLOADS = (Workload(EPOCH, TRAINING, 64, *PACKED_SHAPE),)


def shape(workload: Workload) -> str:
    """Returns `(D, H, T)`, with `names` instead of T if the names determine the lengths."""
    sizes = f"{workload.input_size}, {workload.hidden_size}, {workload.seq_len or 'names'}"
    return f"epoch ({sizes})" if workload.family == EPOCH else f"({sizes})"
