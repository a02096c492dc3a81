"""Numbers that a launch brings to the device."""

import triton
import triton.language as tl


@triton.jit
def upload_kernel(
    out,  # int64, as many as there are values
    values,  # a tuple of 2 v + 3 for each number v
):
    """Stores numbers that come as arguments, which are a part of a captured launch.

    Triton compiles anew for an argument that is 1 or a multiple of 16; 2 v + 3 is neither.
    """
    for i in tl.static_range(len(values)):
        tl.store(out + i, (values[i] - 3) >> 1)
