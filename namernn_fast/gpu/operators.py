"""The operators of `namernn_fast.ops` on a GPU: what they are told, checked and read."""

from typing import Any

import torch
from torch import Tensor

from .. import availability, ops
from .layer import Rows, Stack, on_device_of
from .stack import backward_stack, forward_stack


def rnn_forward(input, hx, weights, rows, reset, options):
    """`namernn_fast::rnn_forward` on a GPU; arguments and results as in `namernn_fast.ops`."""
    _require(not options & ops.BATCH_INVARIANT, "batch_invariant is not promised on a GPU")
    stack, x = _checked_stack(input, hx, weights, rows, reset, options)
    with on_device_of(input):
        outputs, h_n = forward_stack(stack, x)
    outputs = [output.view(*input.shape[:-1], output.shape[1]) for output in outputs]
    return outputs[-1], h_n, outputs[:-1] if options & ops.WANT_HIDDEN else []


def rnn_backward(
    grad_output,
    grad_h_n,
    input,
    hx,
    weights,
    output,
    hidden,
    rows,
    reset,
    options,
    want_input,
    want_hx,
    want_layers,
):
    """`namernn_fast::rnn_backward` on a GPU; arguments and results as in `namernn_fast.ops`."""
    stack, x = _checked_stack(input, hx, weights, rows, reset, options)
    num_layers = ops.layer_count(weights, options)
    width = stack.directions * stack.hidden_size
    _require(
        len(hidden) == num_layers - 1,
        "hidden must hold the outputs of {} layer(s), got {}",
        *(num_layers - 1, len(hidden)),
    )
    for name, tensor in (
        ("output", output),
        ("grad_output", grad_output),
        *(("hidden", tensor) for tensor in hidden),
    ):
        _check_tensor(name, tensor, input, (*input.shape[:-1], width))
    states = (num_layers * stack.directions, stack.rows.B, stack.hidden_size)
    _check_tensor("grad_h_n", grad_h_n, input, states)
    for k in want_layers:
        _require(0 <= k < num_layers, "want_layers must be from 0 to {}, got {}", num_layers - 1, k)
    with on_device_of(input):
        if stack.rows.padded and 0 in want_layers:
            # What lies past the end of a sequence may be NaN, which zeros of dz would not hide.
            steps = torch.arange(stack.rows.T, device=input.device)
            past = steps >= rows.unsqueeze(1)
            past = past if options & ops.BATCH_FIRST else past.t()
            x = input.masked_fill(past.unsqueeze(2), 0.0)
            x = x.flatten(0, 1)
        outputs = [layer.flatten(0, -2).contiguous() for layer in (*hidden, output)]
        grad = None if grad_output is None else grad_output.flatten(0, -2).contiguous()
        grad_hx = torch.empty_like(stack.hx) if want_hx else None
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        grad_input, found = backward_stack(
            stack, x, outputs, grad, grad_h_n, grad_hx, want_input, want_layers
        )
    nothing = input.new_empty(0)
    grad_weights = []
    for k, (_, own) in enumerate(ops.layers_of(None, weights, options)):
        grad_weights += found.get(k) or [w.new_empty(0) for w in own]
    return (
        grad_input.view(input.shape) if want_input else nothing,
        grad_hx if want_hx else nothing,
        grad_weights if want_layers else [],
    )


def _require(condition: bool, message: str, *values: Any) -> None:
    """The text is made where there is an error only: it would take longer than all checks."""
    if not condition:
        raise RuntimeError("namernn_fast: " + message.format(*values))


def _check_tensor(name: str, tensor: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    _require(
        tensor.device == like.device,
        "{} must be on the device of input, {}, got {}: move one of them with .to()",
        *(name, like.device, tensor.device),
    )
    _require(tensor.dtype == like.dtype, "{} must have the dtype of input", name)
    _require(tensor.shape == shape, "{} must have shape {}, got {}", name, shape, _Shape(tensor))


class _Shape:
    """Of a tensor, as an error shows it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __str__(self) -> str:
        return str(tuple(self.tensor.shape))


def _checked_stack(input, hx, weights, rows, reset, options) -> tuple[Stack, Tensor]:
    """The arguments of an operator, checked, and the rows (rows, features) of its input."""
    directions, per_layer = ops.directions_of(options), ops.weights_per_layer(options)
    _require(
        len(weights) > 0 and len(weights) % per_layer == 0,
        "weights must hold {} tensors for each layer, got {}",
        *(per_layer, len(weights)),
    )
    _require(weights[1].dim() == 2, "weight_hh must have 2 dimensions, got {}", weights[1].dim())
    _require(
        input.dtype in availability.TRITON_DTYPES,
        "input must be of one of {}, got {}",
        *(availability.TRITON_DTYPES, input.dtype),
    )
    read = _read_rows(input, rows, reset, options)
    hidden_size = weights[1].shape[0]
    count = per_layer // directions
    due = (
        ("weight_ih", (hidden_size, input.shape[-1])),
        ("weight_hh", (hidden_size, hidden_size)),
        ("bias_ih", (hidden_size,)),
        ("bias_hh", (hidden_size,)),
    )
    for i, weight in enumerate(weights):
        name, shape = due[i % count]
        if i >= per_layer and i % count == 0:
            shape = (hidden_size, directions * hidden_size)
        _check_tensor(name, weight, input, shape)
    states = ops.layer_count(weights, options) * directions
    _check_tensor("hx", hx, input, (states, read.B, hidden_size))
    stack = Stack(
        read,
        None if hx is None else hx.contiguous(),
        [weight.contiguous() for weight in weights],
        options,
        directions,
        hidden_size,
    )
    return stack, input.flatten(0, -2)


def _read_rows(input, rows, reset, options) -> Rows:
    """Which rows there are, of what an operator is told."""
    packed, jagged = options & ops.PACKED, options & ops.JAGGED
    batch_first = options & ops.BATCH_FIRST
    _require(not (packed and jagged), "options must not say both packed and jagged")
    dimensions = 2 if packed or jagged else 3
    _require(
        input.dim() == dimensions,
        "input must have {} dimensions, got {}",
        *(dimensions, input.dim()),
    )
    name = "batch_sizes" if packed else "offsets" if jagged else "lengths"
    _require(rows is not None or dimensions == 3, "rows must be the {} of input, got none", name)
    _require(
        rows is None
        or packed
        or (rows.device == input.device and rows.dtype == torch.int64 and rows.dim() == 1),
        "{} must be a 1-D int64 tensor on the device of input",
        name,
    )
    N = input.shape[0] if dimensions == 2 else input.shape[0] * input.shape[1]
    if packed:
        read = _read_batch_sizes(rows, input, N)
    elif jagged:
        _require(len(rows) > 0, "offsets must have one element at least")
        read = Rows(None, rows.contiguous(), None, None, N, len(rows) - 1, N, 1, 0)
    else:
        T, B = input.shape[1::-1] if batch_first else input.shape[:2]
        _require(T > 0, "Expected sequence length to be larger than 0 in RNN")
        if rows is not None:
            _require(
                len(rows) == B,
                "lengths must have one length for each of the {} sequences, got {}",
                *(B, len(rows)),
            )
            rows = rows.contiguous()
        steps = (1, T) if batch_first else (B, 1)
        read = Rows(rows, None, None, None, T, B, N, *steps)
    if reset is None:
        return read
    shape = (read.B, read.T) if batch_first else (read.T, read.B)
    _require(
        reset.device == input.device and reset.dtype == torch.bool,
        "reset must be a bool tensor on the device of input",
    )
    _require(reset.shape == shape, "reset must have shape {}, got {}", shape, _Shape(reset))
    strides = reset.stride()
    return read._replace(
        reset=reset.view(torch.uint8),
        reset_time=strides[1 if batch_first else 0],
        reset_batch=strides[0 if batch_first else 1],
    )


def _read_batch_sizes(batch_sizes, input, N) -> Rows:
    """Packed rows: the host knows where they lie, and tells the device without waiting for it."""
    _require(
        batch_sizes.is_cpu and batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1,
        "batch_sizes must be a 1-D int64 tensor on the CPU",
    )
    sizes = batch_sizes.tolist()
    _require(bool(sizes), "Expected sequence length to be larger than 0 in RNN")
    for t, size in enumerate(sizes):
        _require(size >= 1, "batch_sizes must be positive, got {} at step {}", size, t)
        _require(
            t == 0 or size <= sizes[t - 1],
            "batch_sizes must not increase, got {} after {} at step {}",
            *(size, sizes[t - 1], t),
        )
    _require(
        sum(sizes) == N,
        "batch_sizes must sum to the rows of data, {}, got a sum of {}",
        *(N, sum(sizes)),
    )
    T, B = len(sizes), sizes[0]
    starts = batch_sizes.cumsum(0) - batch_sizes
    # How many steps have more than b sequences, for every b.
    lengths = T - torch.searchsorted(batch_sizes.flip(0), torch.arange(B), right=True)
    table = torch.cat([starts, lengths])
    if input.is_cuda:
        table = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured.append(table)
        table = table.to(input.device, non_blocking=True)
    starts, lengths = table.split([T, B])
    return Rows(lengths, None, starts, None, T, B, N, 0, 1)


_captured: list[Tensor] = []
"""What a CUDA graph reads again at every replay: kept for the life of the process."""
