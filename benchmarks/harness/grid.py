"""The grid of `make bench`: all workloads, in the order in which they are timed and reported."""

from namernn_fast.bench.workloads import BASELINE as BASELINE
from namernn_fast.bench.workloads import DENSE, LAYERS_OF, MODES, PACKED, TRAINING, Workload
from namernn_fast.bench.workloads import FORWARD as FORWARD
from namernn_fast.bench.workloads import FUSED as FUSED
from namernn_fast.bench.workloads import LAYERS as LAYERS
from namernn_fast.cells import CELLS

EPOCH = "epoch"
"""The family of a training epoch of the names classifier."""

BATCHES = (1, 16, 64, 256, 1024)
SHAPES = ((64, 64, 8), (64, 256, 8), (128, 128, 128), (512, 512, 128))
PACKED_SHAPE = (64, 256)
SIZES = "D is the input size, H the hidden size, T the sequence length, B the batch size."
"""The legend of every table that prints these letters."""

GATED_CELLS = tuple(name for name, cell in CELLS.items() if cell.gates > 1)
"""The names of the cells with gates."""
# Maps each shape to the batch sizes that every run times: (vanilla layer, layers with gates).
BATCHES_OF_EVERY_RUN = {
    (64, 64, 8): ((1, 1024), (1,)),
    (64, 256, 8): ((16, 256), (16,)),
    (128, 128, 128): ((1, 64), (1,)),
    (512, 512, 128): ((64,), (64,)),
    (*PACKED_SHAPE, None): ((16, 256), (256,)),
}
# For layers with gates, a round of both layers takes half a minute at this size.
TOO_LONG_WITH_GATES = ((512, 512, 128), 1024)

LAYER_WORKLOADS = tuple(
    Workload(family, mode, batch, *shape, cell)
    for cell in LAYERS_OF
    for family, shapes in ((DENSE, SHAPES), (PACKED, ((*PACKED_SHAPE, None),)))
    for mode in MODES
    for shape in shapes
    for batch in BATCHES
    if cell not in GATED_CELLS or (shape, batch) != TOO_LONG_WITH_GATES
)
"""All workloads of layers. Only recorded runs time all of them."""
WORKLOADS_OF_EVERY_RUN = tuple(
    workload
    for workload in LAYER_WORKLOADS
    if workload.batch
    in BATCHES_OF_EVERY_RUN[workload.input_size, workload.hidden_size, workload.seq_len][
        workload.cell in GATED_CELLS
    ]
)
"""The workloads of layers that every run times."""
EPOCH_WORKLOAD = Workload(EPOCH, TRAINING, 64, *PACKED_SHAPE)


def shape(workload: Workload) -> str:
    """Returns `(D, H, T)`, with `names` instead of T if the names determine the lengths."""
    sizes = f"{workload.input_size}, {workload.hidden_size}, {workload.seq_len or 'names'}"
    return f"epoch ({sizes})" if workload.family == EPOCH else f"({sizes})"
