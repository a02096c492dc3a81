"""The operators on GPUs, in Triton. `gpu_backend` imports this package for the first GPU tensor.

Every cell is a program (see `equations.program`). `emit` prints it as two Triton kernels, which
loop over time and call `functions`; `layers` launches them, and computes the products around them
with torch; `operators` checks the arguments. The host never waits for the device: the kernels read
lengths, offsets and resets from device memory.

Legend: T time steps, B sequences, H hidden units, N rows. A row is the vector of one (time,
sequence) pair.
"""

from .operators import backward, forward

__all__ = ["backward", "forward"]
