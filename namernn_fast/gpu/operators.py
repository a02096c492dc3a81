"""The operators of `namernn_fast.ops` on a GPU, and the checks of their arguments."""

import torch
from torch import Tensor

from .. import ops
from ..call import checks
from ..cells import VANILLA
from ..machine import availability, transfers
from . import launching
from .layer import on_device_of
from .problem import SequenceLayout, Stack
from .stack import backward_stack, forward_stack


def forward(call: ops.ForwardArguments) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Implements `namernn_fast::forward` for the vanilla cell on a GPU; see `namernn_fast.ops`.

    A token id out of range triggers a device-side assertion.

    Raises:
        RuntimeError: an argument is invalid, or BATCH_INVARIANT is set.
    """
    options = call.options
    if options & ops.BATCH_INVARIANT:
        raise _error("batch_invariant is not supported on a GPU")
    if options & ops.LAST_STATE and options & ops.WANT_SAVED:
        raise _error("options must not set both LAST_STATE and WANT_SAVED")
    stack, x = _checked_stack(call)
    with on_device_of(call.input):
        outputs, h_n = forward_stack(stack, x)
    shape = ops.output_shape(call.input, stack.hidden_size, options)
    if options & ops.LAST_STATE:
        return h_n.new_empty(shape), [h_n], []
    outputs = [output.view(shape) for output in outputs]
    return outputs[-1], [h_n], outputs[:-1] if options & ops.WANT_SAVED else []


def backward(call: ops.BackwardArguments) -> list[Tensor]:
    """Implements `namernn_fast::backward` for the vanilla cell on a GPU; see `namernn_fast.ops`.

    Raises:
        RuntimeError: an argument is invalid.
    """
    if call.options & ops.LAST_STATE:
        raise _error("backward does not support LAST_STATE in options")
    stack, x = _checked_stack(call)
    _check_results(call, stack)
    input, want_layers = call.input, call.want_layers
    with on_device_of(input):
        lengths = stack.layout.lengths
        reads_input = 0 in want_layers and not ops.has_ids(input)
        if reads_input and stack.layout.padded and lengths is not None:
            # Zero the padding: it may contain NaN, and a zero dz times NaN is NaN.
            steps = torch.arange(stack.layout.T, device=input.device)
            past = steps >= lengths.unsqueeze(1)
            past = past if call.options & ops.BATCH_FIRST else past.t()
            x = input.masked_fill(past.unsqueeze(2), 0.0).flatten(0, 1)
        outputs = [layer.flatten(0, -2).contiguous() for layer in (*call.saved, call.output)]
        grad = call.grad_output
        grad = None if grad is None else grad.flatten(0, -2).contiguous()
        want_hx = any(call.wanted[1:])
        grad_hx = torch.empty_like(stack.hx) if want_hx and stack.hx is not None else None
        grad_h_n = call.grad_last_states[0]
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        grad_input, grad_weights = backward_stack(
            stack, x, outputs, grad, grad_h_n, grad_hx, call.wanted[0], want_layers
        )
    gradients = [] if grad_input is None else [grad_input.view(input.shape)]
    gradients += [] if grad_hx is None else [grad_hx]
    return gradients + [grad for k in sorted(set(want_layers)) for grad in grad_weights[k]]


def _error(message: str) -> RuntimeError:
    return RuntimeError(f"namernn_fast: {message}")


def _check_tensor(
    name: str, tensor: Tensor | None, input: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Checks the device, dtype and shape of an optional tensor."""
    if tensor is None:
        return
    if tensor.device != input.device:
        raise _error(
            f"{name} must be on the device of input, {input.device}, got {tensor.device}: move one "
            "of them with .to()"
        )
    if tensor.dtype != dtype:
        owner = "weight_hh of the first layer" if ops.has_ids(input) else "input"
        raise _error(f"{name} must have the dtype of {owner}, {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise _error(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _checked_stack(call: ops.AnyArguments) -> tuple[Stack, Tensor]:
    """Checks the arguments of an operator.

    Returns:
        The stack, and the input's rows (N, features) or token ids (N).
    """
    input, options = call.input, call.options
    states, _, _, weights = call.lists
    if options & ops.SHARE_PREFIXES:
        raise _error("share_prefixes needs a CPU: the GPU kernels do not support it")
    if options & ops.SUMS:
        raise _error("given sums need a CPU: the GPU kernels do not support them")
    directions, per_layer = ops.directions_of(options), ops.weights_per_layer(VANILLA, options)
    if not weights or len(weights) % per_layer:
        raise _error(f"weights must hold {per_layer} tensors for each layer, got {len(weights)}")
    if weights[1].dim() != 2:
        raise _error(f"weight_hh must have 2 dimensions, got {weights[1].dim()}")
    with_ids = ops.has_ids(input)
    dtype = weights[1].dtype if with_ids else input.dtype
    if dtype not in availability.TRITON_DTYPES:
        name, others = ("weights", ()) if with_ids else ("input", (torch.int64,))
        dtypes = (*availability.TRITON_DTYPES, *others)
        raise _error(f"{name} must have one of the dtypes {dtypes}, got {dtype}")
    if with_ids and (weights[0].dim() != 2 or len(weights[0]) == 0):
        raise _error(
            "the table of weight_ih must have 2 dimensions and at least one row, got shape "
            f"{tuple(weights[0].shape)}"
        )
    layout = _read_layout(input, call.sequence_layout, call.reset, options)
    hidden_size = ops.hidden_size(VANILLA, weights)
    for name, weight, shape in checks.weights_and_shapes(VANILLA, weights, input, options):
        name = "the table of weight_ih" if name == "table" else name
        _check_tensor(name, weight, input, dtype, shape)
    hx = states[0] if states else None
    shape = ops.layer_count(VANILLA, weights, options) * directions, layout.B, hidden_size
    _check_tensor("hx", hx, input, dtype, shape)
    stack = Stack(
        layout=layout,
        hx=None if hx is None else hx.contiguous(),
        weights=[weight.contiguous() for weight in weights],
        options=options,
        directions=directions,
        hidden_size=hidden_size,
    )
    return stack, input.flatten().contiguous() if with_ids else input.flatten(0, -2)


def _check_results(call: ops.BackwardArguments, stack: Stack) -> None:
    """Checks the arguments of `backward` that `forward` does not take."""
    input, count = call.input, len(call.lists.states)
    if len(call.wanted) != 1 + count:
        raise _error(
            f"wanted must say whether input and each of {count} states need a gradient, got "
            f"{len(call.wanted)} values"
        )
    if ops.has_ids(input) and call.wanted[0]:
        raise _error("wanted must not ask for the gradient of token ids")
    if len(call.grad_last_states) != 1:
        raise _error(f"grad_last_states must hold 1 gradient, got {len(call.grad_last_states)}")
    num_layers = ops.layer_count(VANILLA, stack.weights, stack.options)
    if len(call.saved) != num_layers - 1:
        raise _error(f"saved must hold {num_layers - 1} tensor(s), got {len(call.saved)}")
    dtype = stack.weights[0].dtype
    shape = ops.output_shape(input, stack.hidden_size, stack.options)
    _check_tensor("output", call.output, input, dtype, shape)
    _check_tensor("grad_output", call.grad_output, input, dtype, shape)
    for tensor in call.saved:
        _check_tensor("saved", tensor, input, dtype, shape)
    states = (num_layers * stack.directions, stack.layout.B, stack.hidden_size)
    _check_tensor("grad_h_n", call.grad_last_states[0], input, dtype, states)
    for k in call.want_layers:
        if not 0 <= k < num_layers:
            raise _error(f"want_layers must be between 0 and {num_layers - 1}, got {k}")


def _read_layout(
    input: Tensor, rows: Tensor | None, reset: Tensor | None, options: int
) -> SequenceLayout:
    """Checks the arguments that say which rows exist, and returns the layout.

    `rows` is the operator's argument sequence_layout.
    """
    packed, jagged = options & ops.PACKED, options & ops.JAGGED
    batch_first = options & ops.BATCH_FIRST
    if packed and jagged:
        raise _error("options must not say both packed and jagged")
    padded = not (packed or jagged)
    dimensions = 1 + padded + (not ops.has_ids(input))
    if input.dim() != dimensions:
        raise _error(f"input must have {dimensions} dimension(s), got {input.dim()}")
    name = "batch_sizes" if packed else "offsets" if jagged else "lengths"
    if rows is None and not padded:
        raise _error(f"sequence_layout must be the {name} of input, got none")
    device = torch.device("cpu") if packed else input.device
    if rows is not None and (rows.device, rows.dtype, rows.dim()) != (device, torch.int64, 1):
        where = "CPU" if packed else "device of input"
        raise _error(f"{name} must be a 1-D int64 tensor on the {where}")
    if packed and rows is not None:
        layout = _read_batch_sizes(rows, input)
    elif jagged and rows is not None:
        if len(rows) == 0:
            raise _error("offsets must have at least one element")
        N = input.shape[0]
        layout = SequenceLayout(
            T=N, B=len(rows) - 1, N=N, time_stride=1, batch_stride=0, offsets=rows.contiguous()
        )
    else:
        layout = _read_lengths(rows, input, bool(batch_first))
    if reset is None:
        return layout
    if reset.device != input.device or reset.dtype != torch.bool:
        raise _error("reset must be a bool tensor on the device of input")
    checks.check_reset_shape(reset, layout.T, layout.B, options)
    strides = reset.stride()
    return layout._replace(
        reset=reset.view(torch.uint8),
        reset_time_stride=strides[1 if batch_first else 0],
        reset_batch_stride=strides[0 if batch_first else 1],
    )


def _read_lengths(lengths: Tensor | None, input: Tensor, batch_first: bool) -> SequenceLayout:
    """Checks the sizes of padded input and its lengths, if any; returns the layout."""
    T, B = input.shape[1::-1] if batch_first else input.shape[:2]
    if T == 0:
        raise _error("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None and len(lengths) != B:
        raise _error(
            f"lengths must have one length for each of the {B} sequences, got {len(lengths)}"
        )
    return SequenceLayout(
        T=T,
        B=B,
        N=T * B,
        time_stride=1 if batch_first else B,
        batch_stride=T if batch_first else 1,
        lengths=None if lengths is None else lengths.contiguous(),
    )


def _read_batch_sizes(batch_sizes: Tensor, input: Tensor) -> SequenceLayout:
    """Checks batch_sizes and returns the layout, without waiting for the copy to the device."""
    N = input.shape[0]
    sizes = checks.check_batch_sizes(batch_sizes, N)
    T, B = len(sizes), sizes[0]
    if transfers.is_capturing(input.device):
        with on_device_of(input):
            table = _starts_and_lengths(launching.upload(sizes, input.device), B)
    else:
        table = _starts_and_lengths(batch_sizes, B)
        if input.is_cuda:
            table = transfers.to_gpu(table, input.device, "batch_sizes")
    starts, lengths = table.split([T, B])
    return SequenceLayout(
        T=T, B=B, N=N, time_stride=0, batch_stride=1, lengths=lengths, starts=starts
    )


def _starts_and_lengths(batch_sizes: Tensor, B: int) -> Tensor:
    """Returns one tensor: the number of rows before each time step, then all sequence lengths."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    # The length of sequence b is the number of steps with more than b sequences.
    sequences = torch.arange(B, device=batch_sizes.device)
    lengths = len(batch_sizes) - torch.searchsorted(batch_sizes.flip(0), sequences, right=True)
    return torch.cat([starts, lengths])
