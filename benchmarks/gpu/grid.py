"""The workloads of the GPU benchmark, and their precisions.

The grid has batch sizes from 1 to 4096, hidden sizes from 64 to 2048, and 8 to 1024 steps, but not
every combination of them.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from benchmarks.harness.grid import DENSE, MODES, PACKED, PACKED_SHAPE, Workload
from benchmarks.harness.precision import fp32_precision

# Maps (input_size, hidden_size, seq_len) to batch sizes, in the order in which they are timed.
BATCHES = {
    (64, 64, 8): (1, 64, 1024, 4096),
    (64, 256, 8): (1, 16, 64, 256, 1024, 4096),
    (128, 128, 128): (1, 16, 64, 256, 1024, 4096),
    (512, 512, 128): (1, 16, 64, 256, 1024),
    (1024, 1024, 64): (1, 64, 1024),
    (2048, 2048, 32): (1, 64, 512),
    (64, 64, 1024): (1, 64),
    (256, 256, 1024): (1, 64),
}
PACKED_BATCHES = (1, 16, 64, 256, 1024, 4096)
WORKLOADS = (
    *(
        Workload(DENSE, mode, batch, *shape)
        for shape, batches in BATCHES.items()
        for batch in batches
        for mode in MODES
    ),
    *(Workload(PACKED, mode, batch, *PACKED_SHAPE) for batch in PACKED_BATCHES for mode in MODES),
)
DRY_WORKLOADS = tuple(
    Workload(family, mode, 3, 4, 5, seq_len)
    for family, seq_len in ((DENSE, 3), (PACKED, None))
    for mode in MODES
)


@dataclass(frozen=True)
class Precision:
    """A precision in which workloads are timed."""

    name: str
    dtype: torch.dtype
    tf32: bool = False
    """Whether a float32 RNN rounds the factors of its products to TF32, as it does by default."""

    def of_the_process(self) -> AbstractContextManager[None]:
        """Disables TF32 everywhere within a block, if this precision is float32 without TF32.

        Otherwise torch's defaults apply, as in a user's program: TF32 only for RNNs.
        """
        if self.dtype != torch.float32 or self.tf32:
            return nullcontext()
        return fp32_precision("ieee", torch.backends.cuda.matmul, torch.backends.cudnn.rnn)


FLOAT32 = Precision("float32", torch.float32)
TF32 = Precision("tf32", torch.float32, tf32=True)
BFLOAT16 = Precision("bfloat16", torch.bfloat16)
# Torch's default comes first, because the benchmark may stop at its deadline.
PRECISIONS = (TF32, FLOAT32, BFLOAT16)
