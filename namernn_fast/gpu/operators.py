"""The operators of `namernn_fast.ops` on a GPU, and the checks of their arguments."""

import contextlib
import itertools

import torch
from torch import Tensor

from .. import ops
from ..call import checks
from ..call.options import nonlinearity_of
from ..equations import program_of
from ..machine import availability, transfers
from .layers import (
    Gradients,
    SequenceLayout,
    Stack,
    backward_layer,
    forward_layer,
    grad_of_x,
    weight_gradients,
)


def forward(call: ops.ForwardArguments) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Implements `namernn_fast::forward` on a GPU; see `namernn_fast.ops`.

    A token id out of range triggers a device-side assertion.

    Raises:
        RuntimeError: an argument is invalid, or BATCH_INVARIANT is set.
    """
    options = call.options
    if options & ops.BATCH_INVARIANT:
        raise _error("batch_invariant is not supported on a GPU")
    if options & ops.LAST_STATE and options & ops.WANT_SAVED:
        raise _error("options must not set both LAST_STATE and WANT_SAVED")
    keeps = bool(options & ops.WANT_SAVED)
    outputs, all_kept, last_of_layers = [], [], []
    with _on_device_of(call.input):
        stack, x = _checked_stack(call)
        number = len(stack.layers)
        for k in range(number):
            keeps_output = k < number - 1 or not options & ops.LAST_STATE
            output, kept, last = forward_layer(stack, k, x, keeps_output=keeps_output, keeps=keeps)
            outputs.append(output)
            all_kept.append(kept)
            last_of_layers.append(last)
            x = output.flatten(1)
        last_states = [torch.cat(states) for states in zip(*last_of_layers, strict=True)]
    shape = ops.output_shape(call.input, stack.hidden_size, options)
    if options & ops.LAST_STATE:
        return stack.like.new_empty(shape), last_states, []
    outputs = [output.view(shape) for output in outputs]
    if not keeps:
        return outputs[-1], last_states, []
    shape = ops.output_shape(call.input, stack.program.kept * stack.hidden_size, options)
    saved = [*outputs[:-1], *(kept.view(shape) for kept in all_kept if kept is not None)]
    return outputs[-1], last_states, saved


def backward(call: ops.BackwardArguments) -> list[Tensor]:
    """Implements `namernn_fast::backward` on a GPU; see `namernn_fast.ops`.

    Raises:
        RuntimeError: an argument is invalid.
    """
    if call.options & ops.LAST_STATE:
        raise _error("backward does not support LAST_STATE in options")
    with _on_device_of(call.input):
        stack, x = _checked_stack(call)
        _check_results(call, stack)
        return _backward(call, stack, x)


def _backward(call: ops.BackwardArguments, stack: Stack, x: Tensor) -> list[Tensor]:
    """Computes the wanted gradients of a call whose arguments are checked."""
    number, layout = len(stack.layers), stack.layout
    outputs = [layer.flatten(0, -2).contiguous() for layer in (*call.saved, call.output)]
    kept: list[Tensor | None] = [None] * number
    if stack.program.kept:
        *outputs, output = outputs
        outputs, kept = [*outputs[: number - 1], output], [*outputs[number - 1 :]]
    if 0 in call.want_layers and not ops.has_ids(x) and not layout.is_full:
        # The padding may contain NaN, and zero times NaN is NaN.
        x = torch.where(_rows_exist(layout, x), x, 0.0)
    wanted = iter(call.wanted[1:])
    lists = [
        [torch.zeros_like(t) if next(wanted) else None for t in tensors] or [None] * count
        for tensors, count in (
            (stack.states, stack.program.states),
            (stack.reset_to, stack.program.states),
            (stack.inputs, len(stack.cell.inputs)),
        )
    ]
    gradients = Gradients(*lists)
    grad = call.grad_output
    grad = None if grad is None else grad.flatten(0, -2).contiguous()
    of_weights: dict[int, list[Tensor]] = {}
    for k in reversed(range(number)):
        want = k in call.want_layers
        dz, before_rows, own = backward_layer(
            stack, k, outputs[k], kept[k], grad, call.grad_last_states, gradients, want
        )
        if want:
            rows = outputs[k - 1] if k else x
            of_weights[k] = weight_gradients(stack, k, rows, dz, before_rows, own)
        grad = grad_of_x(stack, k, dz) if k or call.wanted[0] else None
    found = [] if grad is None else [grad.view(call.input.shape)]
    made = [*gradients.states, *gradients.reset_to, *gradients.inputs]
    found += [
        grad.view(like.shape)
        for grad, like in zip((g for g in made if g is not None), _wanted_of(call), strict=True)
    ]
    return found + [grad for k in sorted(of_weights) for grad in of_weights[k]]


def _wanted_of(call: ops.BackwardArguments) -> list[Tensor]:
    """Returns the tensors before the weights whose gradients are wanted."""
    pairs = zip(call.tensors, call.wanted[1:], strict=False)
    return [tensor for tensor, want in pairs if want]


def _rows_exist(layout: SequenceLayout, like: Tensor) -> Tensor:
    """Returns whether each row belongs to a sequence, bool (N, 1), for layouts with padding."""
    if layout.offsets is not None:
        rows = torch.arange(layout.N, device=like.device)
        return ((rows >= layout.offsets[0]) & (rows < layout.offsets[-1])).unsqueeze(1)
    assert layout.lengths is not None
    exist = torch.arange(layout.T, device=like.device)[:, None] < layout.lengths
    exist = exist if layout.batch_stride == 1 else exist.t()
    return exist.reshape(-1, 1)


def _on_device_of(tensor: Tensor) -> contextlib.ExitStack:
    """Returns a context that selects the tensor's device and disables autograd and autocast."""
    device = tensor.device
    stack = contextlib.ExitStack()
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if tensor.is_cuda and device.index != torch.cuda.current_device():
        stack.enter_context(torch.cuda.device(device))
    return stack


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
    input, options, cell = call.input, call.options, call.described
    states, reset_to, inputs, weights = call.lists
    for bit, what in REFUSED.items():
        if options & bit:
            raise _error(f"{what} a CPU: the GPU kernels do not support it")
    directions, per_layer = ops.directions_of(options), ops.weights_per_layer(cell, options)
    if not weights or len(weights) % per_layer:
        raise _error(f"weights must hold {per_layer} tensors for each layer, got {len(weights)}")
    if cell.has_weight_hh and weights[1].dim() != 2:
        raise _error(f"weight_hh must have 2 dimensions, got {weights[1].dim()}")
    with_ids = ops.has_ids(input)
    dtype = weights[0].dtype if with_ids else input.dtype
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
    hidden = ops.hidden_size(cell, weights, input, options)
    for name, weight, shape in checks.weights_and_shapes(cell, weights, input, options):
        name = "the table of weight_ih" if name == "table" else name
        _check_tensor(name, weight, input, dtype, shape)
    number = ops.layer_count(cell, weights, options)
    for described, tensor in zip(cell.states, states, strict=False):
        name = "hx" if described is cell.states[0] else f"{described.name}x"
        _check_tensor(name, tensor, input, dtype, (number * directions, layout.B, hidden))
    if reset_to and (call.reset is None or directions == 2):
        raise _error("reset_to needs reset, and one direction")
    for tensor in reset_to:
        _check_tensor("reset_to", tensor, input, dtype, (layout.T, number, layout.B, hidden))
    for described_input, tensor in zip(cell.inputs, inputs, strict=False):
        features, parts = described_input.features(hidden), number * directions
        if tensor.shape[-1] != features:
            features *= parts
        rows = input.shape if with_ids else input.shape[:-1]
        _check_tensor(described_input.name, tensor, input, dtype, (*rows, features))
    program = program_of(cell, nonlinearity_of(options))
    assert program is not None
    stack = Stack(
        cell=cell,
        program=program,
        layout=layout,
        hidden_size=hidden,
        directions=directions,
        heads=ops.heads_of(cell, weights, hidden, options),
        layers=ops.layers_of(cell, [weight.contiguous() for weight in weights], options),
        states=[state.contiguous() for state in states],
        reset_to=[state.contiguous() for state in reset_to],
        inputs=[rows.flatten(0, -2).contiguous() for rows in inputs],
        like=weights[0],
    )
    if not with_ids:
        return stack, input.flatten(0, -2)
    ids = input.flatten()
    # Ids past the end of a sequence may be anything.
    return stack, ids if layout.is_full else torch.where(_rows_exist(layout, ids)[:, 0], ids, 0)


REFUSED = {
    ops.SHARE_PREFIXES: "share_prefixes needs",
    ops.SUMS: "given sums need",
    ops.INT8: "8-bit weights need",
    ops.PROJECTIONS: "proj_size needs",
}
"""The options that only CPU kernels have."""


def _check_results(call: ops.BackwardArguments, stack: Stack) -> None:
    """Checks the arguments of `backward` that `forward` does not take."""
    input, program, number = call.input, stack.program, len(stack.layers)
    count = ops.before_weights(stack.cell, call.options)
    if len(call.wanted) != 1 + count:
        raise _error(
            f"wanted must say whether input and each of {count} states need a gradient, got "
            f"{len(call.wanted)} values"
        )
    if ops.has_ids(input) and call.wanted[0]:
        raise _error("wanted must not ask for the gradient of token ids")
    if len(call.grad_last_states) != program.states:
        raise _error(
            f"grad_last_states must hold {program.states} gradient(s), got "
            f"{len(call.grad_last_states)}"
        )
    saved = number - 1 + (number if program.kept else 0)
    if len(call.saved) != saved:
        raise _error(f"saved must hold {saved} tensor(s), got {len(call.saved)}")
    dtype, H = stack.like.dtype, stack.hidden_size
    shape = ops.output_shape(input, H, call.options)
    _check_tensor("output", call.output, input, dtype, shape)
    _check_tensor("grad_output", call.grad_output, input, dtype, shape)
    kept = ops.output_shape(input, program.kept * H, call.options)
    for k, tensor in enumerate(call.saved):
        _check_tensor("saved", tensor, input, dtype, shape if k < number - 1 else kept)
    states = (number * stack.directions, stack.layout.B, H)
    for described, grad in zip(stack.cell.states, call.grad_last_states, strict=True):
        _check_tensor(f"grad_{described.name}_n", grad, input, dtype, states)
    for k in call.want_layers:
        if not 0 <= k < number:
            raise _error(f"want_layers must be between 0 and {number - 1}, got {k}")


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
    if transfers.is_capturing(input.device):  # a replay would read the memory of the CPU again
        runs = [(size, len([*steps])) for size, steps in itertools.groupby(sizes)]
        parts = [torch.full((steps,), size, device=input.device) for size, steps in runs]
        batch_sizes = torch.cat(parts)
    table = _starts_and_lengths(batch_sizes, B)
    if table.device != input.device:
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
