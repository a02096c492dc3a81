"""The operators on GPUs, in Triton, imported when a tensor on a GPU arrives.

A layer's input is projected for all rows at once, by one matrix product; then one kernel
runs the recurrence, with its loop over time inside. Token ids need no product: the kernel reads
rows of their table. In the backward pass one kernel runs the recurrence the other way and leaves dz
of every row, from which matrix products make all other gradients, and sums of rows by token the
gradient of a table. Nothing waits for the device: the kernels themselves read which rows exist.

Calls go one way: `operators` checks and reads a `problem`, `stack` orders its layers, `layer`
launches `kernels` by the `plan` for the `device`, and `products` multiplies around them; both do so
by way of `launching`. `tuning` times plans for those who ask.

Legend: T time steps, B sequences, H hidden units, N rows, V rows of a table of token ids; a row is
the vector of one (time, sequence) pair.
"""

from .device import device_of
from .operators import rnn_backward, rnn_forward
from .tuning import autotune

__all__ = ["autotune", "device_of", "rnn_backward", "rnn_forward"]
