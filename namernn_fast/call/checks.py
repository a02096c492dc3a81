"""Argument checks. For arguments that `torch.nn.RNN` rejects, they raise the same error.

The fused operators check their arguments too; the reference path relies on these checks.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..cells import Cell
from ..machine.context import is_compiling
from ..machine.torch_private import get_unwrapped, is_functorch_wrapped_tensor
from .call import Call

ID_DTYPES = (torch.int64, torch.int32)
"""The dtypes of token ids, as for `nn.Embedding`."""


def check_reset(reset: Tensor, is_jagged: bool) -> None:
    """Checks that `reset` is a bool tensor and that the input is not jagged.

    Raises:
        TypeError: reset is not a bool tensor.
        ValueError: the input is jagged.
    """
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset must be a bool tensor, got {kind}")
    if is_jagged:
        raise ValueError(
            "reset does not support a jagged input: pad the input and pass lengths=, or split it"
        )


def check_like_nn_rnn(call: Call) -> None:
    """Raises the errors of `nn.RNN` for input and hx that do not match the weights.

    Does not check the values of batch_sizes.

    Raises:
        ValueError: input holds features that do not have the dtype of the weights.
        RuntimeError: input has no steps, the wrong number of features or the wrong device; reset or
            hx has the wrong shape; hx or reset_to has the wrong device or dtype.
    """
    data, weights, reset, options = call.data, call.weights, call.reset, call.options
    weight_ih = weights[0]  # with SUMS, another weight
    padded = not options & (ops.PACKED | ops.JAGGED)
    has_ids = ops.has_ids(data) and data.dim() == (2 if padded else 1)
    if data.dtype != weight_ih.dtype and not has_ids:
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({weight_ih.dtype}). "
            f"Convert input: input.to({weight_ih.dtype}), "
            f"or convert model: model.to({data.dtype})" + hint_at_embedding(data)
        )
    if data.device != weight_ih.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{data.device} and parameter tensor at {weight_ih.device}"
        )
    if options & ops.SUMS:
        features = ops.directions_of(options) * call.cell.gates * call.hidden_size()
    else:
        features = weight_ih.shape[1]
    if not has_ids and data.shape[-1] != features:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {features}, got {data.shape[-1]}"
        )
    batch_first = options & ops.BATCH_FIRST
    if padded and data.shape[1 if batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if padded and reset is not None:
        check_shape("reset", reset, data.shape[:2])
    like = f"the table, {weight_ih.dtype}" if has_ids else f"input, {data.dtype}"
    for state in call.restart_states:
        if state.device != data.device:
            raise RuntimeError(f"reset_to must be at {data.device}, like input, got {state.device}")
        _check_dtype(call, "reset_to", state, like)
    if not call.states:
        return
    # For packed input take the batch size from hx, because batch_sizes[0] is unknown while tracing.
    # The operator compares hx with batch_sizes.
    batch = data.shape[0 if batch_first else 1] if padded else call.states[0].shape[1]
    number = ops.layer_count(call.cell, weights, options) * ops.directions_of(options)
    for index, (state, size) in enumerate(zip(call.states, call.state_sizes(), strict=True)):
        wanted = (number, batch, size)
        hidden = "hidden" if len(call.states) == 1 else f"hidden[{index}]"
        if state.shape != wanted:
            raise RuntimeError(f"Expected {hidden} size {wanted}, got {list(state.shape)}")
        if state.device != data.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{data.device} and hidden tensor at {state.device}"
            )
        _check_dtype(call, f"{call.cell.states[index].name}x", state, like)


def _check_dtype(call: Call, name: str, state: Tensor, like: str) -> None:
    """Checks that a state has the dtype of the weights, which the error message calls `like`."""
    if state.dtype != call.weights[0].dtype:
        raise RuntimeError(f"{name} must have the dtype of {like}, got {state.dtype}")


def hint_at_embedding(data: Tensor) -> str:
    """Returns a hint that token ids need embedding= if input holds integers, else ""."""
    if data.dtype not in ID_DTYPES:
        return ""
    return ". Token ids need embedding="


def check_reference_arguments(call: Call) -> None:
    """Checks arguments as the fused operators do, for paths that do not use these operators.

    Raises:
        RuntimeError: a shape is wrong, or lengths, batch_sizes or offsets are invalid.
    """
    data, weights, reset, options = call.data, call.weights, call.reset, call.options
    sequence_layout = call.sequence_layout
    for name, weight, shape in weights_and_shapes(call.cell, weights, data, options):
        check_shape(name, weight, shape)
    if options & ops.PACKED:
        sizes = check_batch_sizes(sequence_layout, data.shape[0])  # type: ignore[arg-type]
        if call.states and call.states[0].shape[1] != sizes[0]:
            states, batch, size = call.states[0].shape
            wanted = (states, sizes[0], size)
            raise RuntimeError(f"Expected hidden size {wanted}, got {[states, batch, size]}")
        if reset is not None:
            check_reset_shape(reset, len(sizes), sizes[0], options)
    elif options & ops.JAGGED:
        _check_offsets(sequence_layout, data.shape[0])  # type: ignore[arg-type]
    elif sequence_layout is not None:
        _check_lengths(data, sequence_layout, options)


def weights_and_shapes(
    cell: Cell, weights: Sequence[Tensor], data: Tensor, options: int
) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Yields the name of each weight, the weight, and the shape that it must have.

    Args:
        cell: the cell.
        weights: the flat list of weights.
        data: the operators' `input`. If it holds token ids, the first layer has tables.
        options: the option bits.
    """
    vocabulary = weights[0].shape[0] if ops.has_ids(data) else None
    # Derive hidden_size from the rows of weight_hh, as the C++ operators do, so that these checks
    # and the operators expect the same shapes.
    hidden_size = ops.hidden_size(cell, weights, data, options)
    size = weights[1].shape[-1] if options & ops.PROJECTIONS else hidden_size
    if options & ops.PROJECTIONS and not 0 < size < hidden_size:
        raise RuntimeError(f"the size of h must be between 1 and {hidden_size - 1}, got {size}")
    layers, tables = ops.layer_count(cell, weights, options), ops.directions_of(options)
    heads = ops.heads_of(cell, weights, hidden_size, options)
    sizes = layers, data.shape[-1], hidden_size, size, heads
    shapes = ops.parameters_and_shapes(cell, options, *sizes)
    for weight, (parameter, shape) in zip(weights, shapes, strict=True):
        if parameter.role == "weight_ih" and vocabulary is not None and tables:
            tables -= 1
            yield "table", weight, (vocabulary, cell.gates * hidden_size)
        else:
            yield parameter.name, weight, shape


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> list[int]:
    """Checks the batch_sizes of a PackedSequence; `rows` is the number of rows of its data.

    Returns:
        The batch sizes as a list.

    Raises:
        RuntimeError: there are no steps, a size is not positive, or the sizes increase or do not
            sum to `rows`.
    """
    sizes = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    for t, size in enumerate(sizes):
        if size < 1:
            raise RuntimeError(f"batch_sizes must be positive, got {size} at step {t}")
        if t and size > sizes[t - 1]:
            raise RuntimeError(
                f"batch_sizes must not increase, got {size} after {sizes[t - 1]} at step {t}"
            )
    if sum(sizes) != rows:
        raise RuntimeError(
            f"batch_sizes must sum to {rows} (the rows of data), got a sum of {sum(sizes)}"
        )
    return sizes


def _check_offsets(offsets: Tensor, rows: int) -> None:
    """Checks the offsets of a jagged tensor; `rows` is the number of rows of its values.

    Reading the offsets may wait for an accelerator, but the reference path reads them anyway.
    """
    if is_compiling():
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows:
        raise RuntimeError(
            f"offsets must start with 0 and end with {rows} (the rows of data), "
            f"got {values[0]} and {values[-1]}"
        )
    for b, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            text = f"got {end} after {start} at index {b + 1}"
            raise RuntimeError(f"offsets must not decrease, {text}")


def check_reset_shape(reset: Tensor, seq_len: int, batch: int, options: int) -> None:
    """Checks that `reset` has one element for each step of each sequence.

    Raises:
        RuntimeError: the shape is not (seq_len, batch), or (batch, seq_len) with BATCH_FIRST.
    """
    shape = (batch, seq_len) if options & ops.BATCH_FIRST else (seq_len, batch)
    check_shape("reset", reset, shape)


def check_real(name: str, tensor: Tensor) -> None:
    """Raises TypeError if the tensor called `name` is complex."""
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises RuntimeError unless the tensor called `name` has this shape."""
    if tensor.shape != shape:
        raise RuntimeError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _check_lengths(data: Tensor, lengths: Tensor, options: int) -> None:
    """Checks the shape of `lengths`, and the values if they are on the CPU and not traced."""
    batch_first = options & ops.BATCH_FIRST
    steps, batch = data.shape[1 if batch_first else 0], data.shape[0 if batch_first else 1]
    if lengths.shape != (batch,):
        raise RuntimeError(
            f"lengths must have one length for each of the {batch} sequences, got "
            f"{tuple(lengths.shape)}"
        )
    if not lengths.is_cpu or is_compiling():
        return
    mapped = is_functorch_wrapped_tensor(lengths)
    while is_functorch_wrapped_tensor(lengths):  # values cannot be read under vmap
        lengths = get_unwrapped(lengths)
    for place, length in enumerate(lengths.flatten().tolist()):
        if not 0 <= length <= steps:
            raise RuntimeError(
                f"lengths must be between 0 and {steps} (the steps in input), got {length}"
                + ("" if mapped else f" for sequence {place}")
            )


def check_ids(ids: Tensor, vocabulary: int, sequence_layout: Tensor | None, options: int) -> None:
    """Raises an error that names the first token id out of range; called only after a failure.

    Args:
        ids, sequence_layout, options: as in `namernn_fast.ops`.
        vocabulary: the number of rows of the embedding.

    Raises:
        IndexError: an id outside the padding is not between 0 and vocabulary - 1. Ids on an
            accelerator are not checked, because reading them would wait for the device.
    """
    batch_first, padded = options & ops.BATCH_FIRST, not options & (ops.PACKED | ops.JAGGED)
    lengths = sequence_layout if padded else None
    if not ids.is_cpu or (lengths is not None and not are_lengths_of(lengths, ids, options)):
        return
    wrong = (ids < 0) | (ids >= vocabulary)
    if lengths is not None:
        wrong = wrong & steps_of_sequences(ids, lengths, options)
    mapped = is_functorch_wrapped_tensor(wrong)
    while is_functorch_wrapped_tensor(wrong):
        wrong = get_unwrapped(wrong)
    if not wrong.any():
        return
    allowed = f"input must hold ids from 0 to {vocabulary - 1}"
    if mapped:  # under vmap, the caller does not know the folded positions
        raise IndexError(f"{allowed} (the rows of embedding), got others") from None
    place = wrong.nonzero()[0].tolist()
    got = int(ids[tuple(place)])
    if padded:
        b, t = place if batch_first else reversed(place)
    elif sequence_layout is None:
        return
    else:
        borders = sequence_layout
        if options & ops.PACKED:
            borders = torch.cat([borders.new_zeros(1), borders.cumsum(0)])
        # Packed rows are grouped by step, jagged rows by sequence.
        outer = int(torch.bucketize(place[0], borders[1:], right=True))
        inner = place[0] - int(borders[outer])
        b, t = (inner, outer) if options & ops.PACKED else (outer, inner)
    raise IndexError(f"{allowed}, got {got} at step {t} of sequence {b}") from None


def are_lengths_of(lengths: Tensor, ids: Tensor, options: int) -> bool:
    """Returns whether `lengths` holds one length for each sequence of padded token ids."""
    return lengths.shape == (ids.shape[0 if options & ops.BATCH_FIRST else -1],)


def steps_of_sequences(ids: Tensor, lengths: Tensor, options: int) -> Tensor:
    """Returns a bool mask like `ids`, True for the steps before the end of each sequence.

    Args:
        ids: (seq_len, batch), or (batch, seq_len) with BATCH_FIRST.
        lengths: (batch).
        options: the option bits.
    """
    if options & ops.BATCH_FIRST:
        return torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    return torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) < lengths
