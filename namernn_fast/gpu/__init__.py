"""The operators on GPUs, in Triton; imported when the first GPU tensor arrives.

One matrix product projects a layer's input for all rows; then one kernel runs the recurrence, with
the loop over time inside the kernel. Token ids need no product: the kernel reads rows of their
table. In the backward pass one kernel runs the recurrence in reverse and writes dz for every row.
Matrix products compute all other gradients from dz, except that the gradient of a table is a sum of
rows by token. The host never waits for the device: the kernels themselves read which rows exist.

Calls go one way: `operators` checks the arguments and makes a `problem`, `stack` schedules its
layers, `layer` launches `kernels` as the `plan` for the `device` says, and `products` computes the
matrix products around them; both launch through `launching`. `tuning` times plans on request.

Legend: T time steps, B sequences, H hidden units, N rows, V rows of a table of token ids; a row is
the vector of one (time, sequence) pair.
"""

from .device import device_of
from .operators import backward, forward
from .tuning import autotune

__all__ = ["autotune", "backward", "device_of", "forward"]
