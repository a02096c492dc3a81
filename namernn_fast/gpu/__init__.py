"""The operators on GPUs, in Triton, imported when a tensor on one arrives.

A layer's input is projected for all rows at once, by a matrix product of torch's; then one kernel
runs the recurrence, its loop over time inside. Backward, one kernel runs it the other way and
leaves dz of every row, of which all other gradients are matrix products. Nothing waits for the
device: which rows exist is read where the kernels run.

One way: `operators` check, `stack` orders the layers, `layer` launches what `rule` says of the
`device`, and `kernels` compute. `tuning` is for those who ask.

Legend: T time steps, B sequences, H hidden units, N rows; a row is the vector that belongs to one
(time, sequence) pair.
"""

from .device import device_of
from .operators import rnn_backward, rnn_forward
from .tuning import autotune

__all__ = ["autotune", "device_of", "rnn_backward", "rnn_forward"]
