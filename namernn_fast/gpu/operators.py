"""The operators of `namernn_fast.ops` on a GPU, and the checks of their arguments."""

from typing import Any

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
    _require(not options & ops.BATCH_INVARIANT, "batch_invariant is not supported on a GPU")
    _require(
        not (options & ops.LAST_STATE and options & ops.WANT_SAVED),
        "options must not set both LAST_STATE and WANT_SAVED",
    )
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
    _require(not call.options & ops.LAST_STATE, "backward does not support LAST_STATE in options")
    stack, x = _checked_stack(call)
    _check_results(call, stack)
    input, want_layers = call.input, call.want_layers
    with on_device_of(input):
        lengths = stack.layout.lengths
        reads_input = 0 in want_layers and not ops.has_ids(input)
        if reads_input and stack.layout.padded and lengths is not None:
            # Zero the padding, which may contain NaN, because NaN times a dz of zero is NaN.
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


def _require(condition: bool, message: str, *values: Any) -> None:
    """Raises a RuntimeError unless `condition` holds.

    Formats the message only on failure, because formatting takes longer than all checks.
    """
    if not condition:
        raise RuntimeError("namernn_fast: " + message.format(*values))


def _check_tensor(
    name: str, tensor: Tensor | None, input: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Checks the device, dtype and shape of an optional tensor."""
    if tensor is None:
        return
    _require(
        tensor.device == input.device,
        "{} must be on the device of input, {}, got {}: move one of them with .to()",
        *(name, input.device, tensor.device),
    )
    if tensor.dtype != dtype:
        owner = "weight_hh of the first layer" if ops.has_ids(input) else "input"
        _require(
            False, "{} must have the dtype of {}, {}, got {}", name, owner, dtype, tensor.dtype
        )
    _require(tensor.shape == shape, "{} must have shape {}, got {}", name, shape, _Shape(tensor))


class _Shape:
    """The shape of a tensor, converted to text only if an error is raised."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __str__(self) -> str:
        return str(tuple(self.tensor.shape))


def _checked_stack(call: ops.ForwardArguments) -> tuple[Stack, Tensor]:
    """Checks the arguments of an operator.

    Returns:
        The stack, and the input's rows (N, features) or token ids (N).
    """
    input, options = call.input, call.options
    states, _, _, weights = call.lists
    _require(
        not options & ops.SHARE_PREFIXES,
        "share_prefixes needs a CPU: the GPU kernels do not support it",
    )
    directions, per_layer = ops.directions_of(options), ops.weights_per_layer(VANILLA, options)
    _require(
        len(weights) > 0 and len(weights) % per_layer == 0,
        "weights must hold {} tensors for each layer, got {}",
        *(per_layer, len(weights)),
    )
    _require(weights[1].dim() == 2, "weight_hh must have 2 dimensions, got {}", weights[1].dim())
    with_ids = ops.has_ids(input)
    dtype = weights[1].dtype if with_ids else input.dtype
    _require(
        dtype in availability.TRITON_DTYPES,
        "{} must have one of the dtypes {}, got {}",
        "weights" if with_ids else "input",
        (*availability.TRITON_DTYPES, *([] if with_ids else [torch.int64])),
        dtype,
    )
    _require(
        not with_ids or (weights[0].dim() == 2 and len(weights[0]) > 0),
        "the table of weight_ih must have 2 dimensions and at least one row, got shape {}",
        _Shape(weights[0]),
    )
    layout = _read_layout(input, call.sequence_layout, call.reset, options)
    hidden_size = ops.size_of_h(weights)
    tables = directions if with_ids else 0
    features = 0 if with_ids else input.shape[-1]
    for name, weight, shape in checks.weights_and_shapes(VANILLA, weights, features, options):
        if tables and name == "weight_ih":
            name, tables = "the table of weight_ih", tables - 1
            shape = (len(weights[0]), hidden_size)
        _check_tensor(name, weight, input, dtype, shape)
    hx = states[0] if states else None
    shape = ops.layer_count(VANILLA, weights, options) * directions, layout.B, hidden_size
    _check_tensor("hx", hx, input, dtype, shape)
    stack = Stack(
        layout,
        None if hx is None else hx.contiguous(),
        [weight.contiguous() for weight in weights],
        options,
        directions,
        hidden_size,
    )
    return stack, input.flatten().contiguous() if with_ids else input.flatten(0, -2)


def _check_results(call: ops.BackwardArguments, stack: Stack) -> None:
    """Checks the arguments of `backward` that `forward` does not take."""
    input, count = call.input, len(call.lists.states)
    _require(
        len(call.wanted) == 1 + count,
        "wanted must say whether input and each of {} states need a gradient, got {} values",
        *(count, len(call.wanted)),
    )
    _require(
        not (ops.has_ids(input) and call.wanted[0]),
        "wanted must not ask for the gradient of token ids",
    )
    _require(
        len(call.grad_last_states) == 1,
        "grad_last_states must hold 1 gradient, got {}",
        len(call.grad_last_states),
    )
    num_layers = ops.layer_count(VANILLA, stack.weights, stack.options)
    _require(
        len(call.saved) == num_layers - 1,
        "saved must hold {} tensor(s), got {}",
        *(num_layers - 1, len(call.saved)),
    )
    dtype = stack.weights[0].dtype
    shape = ops.output_shape(input, stack.hidden_size, stack.options)
    _check_tensor("output", call.output, input, dtype, shape)
    _check_tensor("grad_output", call.grad_output, input, dtype, shape)
    for tensor in call.saved:
        _check_tensor("saved", tensor, input, dtype, shape)
    states = (num_layers * stack.directions, stack.layout.B, stack.hidden_size)
    _check_tensor("grad_h_n", call.grad_last_states[0], input, dtype, states)
    for k in call.want_layers:
        _require(0 <= k < num_layers, "want_layers must be from 0 to {}, got {}", num_layers - 1, k)


def _read_layout(
    input: Tensor, rows: Tensor | None, reset: Tensor | None, options: int
) -> SequenceLayout:
    """Checks the arguments that say which rows exist, and returns the layout.

    `rows` is the operator's argument sequence_layout.
    """
    packed, jagged = options & ops.PACKED, options & ops.JAGGED
    batch_first = options & ops.BATCH_FIRST
    _require(not (packed and jagged), "options must not say both packed and jagged")
    padded = not (packed or jagged)
    dimensions = 1 + padded + (not ops.has_ids(input))
    _require(
        input.dim() == dimensions,
        "input must have {} dimension(s), got {}",
        *(dimensions, input.dim()),
    )
    name = "batch_sizes" if packed else "offsets" if jagged else "lengths"
    _require(rows is not None or padded, "sequence_layout must be the {} of input, got none", name)
    _require(
        rows is None
        or bool(packed)
        or (rows.device == input.device and rows.dtype == torch.int64 and rows.dim() == 1),
        "{} must be a 1-D int64 tensor on the device of input",
        name,
    )
    if packed and rows is not None:
        layout = _read_batch_sizes(rows, input)
    elif jagged and rows is not None:
        _require(len(rows) > 0, "offsets must have at least one element")
        N = input.shape[0]
        layout = SequenceLayout(
            T=N, B=len(rows) - 1, N=N, time_stride=1, batch_stride=0, offsets=rows.contiguous()
        )
    else:
        layout = _read_lengths(rows, input, bool(batch_first))
    if reset is None:
        return layout
    _require(
        reset.device == input.device and reset.dtype == torch.bool,
        "reset must be a bool tensor on the device of input",
    )
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
    _require(T > 0, "Expected sequence length to be larger than 0 in RNN")
    _require(
        lengths is None or len(lengths) == B,
        "lengths must have one length for each of the {} sequences, got {}",
        *(B, None if lengths is None else len(lengths)),
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
    """Checks batch_sizes and returns the layout, without waiting for its copy to the device."""
    _require(
        batch_sizes.is_cpu and batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1,
        "batch_sizes must be a 1-D int64 tensor on the CPU",
    )
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
    """Returns the number of rows before each time step, then the length of each sequence."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    # The length of sequence b is the number of steps with more than b sequences.
    sequences = torch.arange(B, device=batch_sizes.device)
    lengths = len(batch_sizes) - torch.searchsorted(batch_sizes.flip(0), sequences, right=True)
    return torch.cat([starts, lengths])
