"""Converts input of any layout to time-major rows, for the paths without a kernel, and back."""

import torch
from torch import Tensor

from .. import ops


def with_batch_first(output: Tensor) -> Tensor:
    """Transposes a time-major output to batch first. The output must have no other references.

    With gradients disabled, transposes in place, so that output is not a view, as in `nn.RNN`.
    """
    return output.transpose(0, 1) if torch.is_grad_enabled() else output.transpose_(0, 1)


def to_time_major(
    input: Tensor, sequence_layout: Tensor | None, options: int
) -> tuple[Tensor, list[int] | None, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Converts input of any layout to time-major rows, or to packed rows if it is packed.

    Returns:
        input: (seq_len, batch, features), or the data of a PackedSequence; token ids lack the last
            dimension.
        batch_sizes: the number of sequences at each time step, or None unless packed.
        alive: None, or bool (seq_len, batch, 1): True before the end of each padded sequence.
        places: the time index and the sequence index of each row of a jagged tensor, or None
            unless jagged.
    """
    if sequence_layout is not None and options & ops.PACKED:
        return input, sequence_layout.tolist(), None, None
    lengths, places = sequence_layout, None
    if lengths is not None and options & ops.JAGGED:
        lengths, places = lengths.diff(), _places_of_jagged(lengths)
        longest = max([1, *lengths.tolist()])
        padded = input.new_zeros(longest, len(lengths), *input.shape[1:])
        input = padded.index_put(places, input)
    elif options & ops.BATCH_FIRST:
        input = input.transpose(0, 1)
    if lengths is None:
        return input, None, None, None
    steps = torch.arange(input.shape[0], device=lengths.device)
    alive = (steps[:, None] < lengths).unsqueeze(-1)
    if ops.has_ids(input):  # ids in padding may be out of range
        return torch.where(alive.squeeze(-1), input, 0), None, alive, places
    # NaN in padding must not reach a gradient.
    return torch.where(alive, input, 0.0), None, alive, places


def from_time_major(output: Tensor, options: int, places: tuple[Tensor, Tensor] | None) -> Tensor:
    """Converts output back to the layout of the call; `places` is from `to_time_major`."""
    if places is not None:
        return output[places]
    if options & ops.BATCH_FIRST and not options & ops.PACKED:
        return with_batch_first(output)
    return output


def _places_of_jagged(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the time index and the sequence index of each row of a jagged tensor."""
    row = torch.arange(int(offsets[-1]), device=offsets.device)
    sequence = torch.bucketize(row, offsets[1:], right=True)
    return row - offsets[sequence], sequence
