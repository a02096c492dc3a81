"""Copies kernel arguments to memory of the device."""

import triton
import triton.language as tl


@triton.jit
def upload_kernel(
    out,  # int64, one element per value
    values,  # a tuple of 2 v + 3 for each integer v
):
    """Stores integers that are passed as arguments, because a CUDA graph captures arguments.

    An integer v is encoded as 2 v + 3, because Triton recompiles for arguments that are 1 or a
    multiple of 16, and 2 v + 3 is neither.
    """
    for i in tl.static_range(len(values)):
        tl.store(out + i, (values[i] - 3) >> 1)
