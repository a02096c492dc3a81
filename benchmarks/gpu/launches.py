"""What one call launches on a GPU, kernel by kernel, found without one.

The operators of the GPU run on tensors that have sizes and no values, and a note is taken of what
they would launch: operators of torch that compute or copy, and kernels of this package.
"""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.gpu.grid import Precision
from benchmarks.gpu.h100 import H100
from benchmarks.harness.grid import PACKED, TRAINING, Cell
from namernn_fast import gpu, ops
from namernn_fast.gpu import device, stepwise

# Operators that allocate memory, or look at it in another way, and launch nothing.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "device", "_unsafe_view"}


class _Notes(TorchDispatchMode):
    """Notes the operators of torch that compute or copy on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.__name__.split(".")[0]
        on_device = isinstance(result, torch.Tensor) and result.is_meta
        if on_device and not operator.is_view and name not in FREE:
            self.noted.append(name)
        return result

    def launch(self, kernel: JITFunction) -> None:
        """Notes a kernel of Triton's, in the place of a launch."""
        self.noted.append(kernel.__name__)


def launched(cell: Cell, precision: Precision, batch_sizes: torch.Tensor | None) -> list[str]:
    """Returns the names of all that one call of a cell launches, in their order, with one kernel
    for all steps.

    Args:
        cell: The cell; in training its input receives no gradient, as in a first layer.
        precision: The precision.
        batch_sizes: Of a packed cell.
    """
    size, units = cell.input_size, cell.hidden_size

    def tensor(*sizes):
        return torch.empty(sizes, dtype=precision.dtype, device="meta")

    if batch_sizes is None:
        rows: tuple[int, ...] = (cell.seq_len or 0, cell.batch)
    else:
        rows = (int(batch_sizes.sum()),)
    options = ops.BIAS | (ops.PACKED if cell.family == PACKED else 0)
    input, h_n = tensor(*rows, size), tensor(1, cell.batch, units)
    weights = [tensor(units, size), tensor(units, units), tensor(units), tensor(units)]
    notes = _Notes()
    with (
        mock.patch.object(device, "find_device", return_value=H100),
        # The model is one of kernels: where torch multiplies the steps, they are the other choice.
        mock.patch.object(stepwise, "suits", return_value=False),
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: notes.launch(kernel)),
        mock.patch.object(
            torch, "is_autocast_enabled", return_value=False
        ),  # meta is unknown to it
        precision.of_the_process(),
        torch.no_grad(),
        notes,
    ):
        given = (batch_sizes, None, options)
        output, _, hidden = gpu.rnn_forward(input, None, weights, *given)
        if cell.mode == TRAINING:
            grads = (tensor(*rows, units), h_n)
            results = (input, None, weights, output, hidden)
            gpu.rnn_backward(*grads, *results, *given, False, False, [0])
    return notes.noted
