"""The operators on GPUs, in Triton. `gpu_backend` imports this package for the first GPU tensor.

One matrix product projects a layer's input for all rows; then one kernel runs the recurrence, with
the loop over time inside the kernel. Token ids need no product, because the kernel reads each
token's row of a table. In the backward pass one kernel runs the recurrence in reverse and writes
dz, the gradient of the pre-activations. Matrix products compute all other gradients from dz, except
the gradient of a table, which sums dz over the rows of each token. The host never waits for the
device: the kernels read lengths, offsets and resets from device memory.

A call passes through these modules: `operators` checks the arguments and makes a `problem`; `stack`
schedules the layers; `layer` launches `kernels` with the `plan` for the `device`; `products`
computes the matrix products around the kernels. Every launch goes through `launching`. `tuning`
times plans on request.

Legend: T time steps, B sequences, H hidden units, N rows, V tokens (rows of a table). Except in a
table, a row is the vector of one (time, sequence) pair.
"""

from .device import device_of
from .operators import backward, forward
from .tuning import autotune

__all__ = ["autotune", "backward", "device_of", "forward"]
