"""Converts input of any layout to the operators' layouts, and converts results back.

The layouts are: padded, with time or batch first; a single sequence without a batch; packed; and
jagged. Each holds features or token ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..cells import Cell, called_with, only
from ..machine import transfers
from ..machine.context import is_compiling, is_jit_tracing
from ..machine.torch_private import _assert_async
from .call import Arguments, Call, Lengths, Results, given
from .checks import check_real, check_reset, check_shape, hint_at_embedding

_GROUPS = ("", "a Tensor", "a pair of tensors", "a tuple of 3 tensors", "a tuple of 4 tensors")
"""What errors call the states, by the number of states of a cell."""


def convert(arguments: Arguments, call: Call) -> None:
    """Converts arguments of any layout for the operators, and stores them in a call.

    Args:
        arguments: the caller's arguments, without lengths.
        call: the call, with the caller's input as `data`.
    """
    input: object = arguments.input
    has_ids, reset = call.lookup is not None, arguments.reset
    if arguments.inputs and isinstance(input, Tensor | PackedSequence):
        call.beside = _beside(given(**arguments.inputs), call)
    if arguments.hx is not None:
        call.states = _states_of(arguments.hx, call.cell)
    if reset is not None:
        check_reset(reset, is_jagged=isinstance(input, Tensor) and input.is_nested)
        call.reset = reset = _savable(reset)
    elif arguments.reset_to is not None:
        raise ValueError("reset_to needs reset, which marks where its states are used, got None")
    if isinstance(input, PackedSequence):
        _convert_packed(call, input, arguments.reset_to)
        return
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    if input.is_nested:
        _convert_jagged(call, input)
        return
    dim = input.dim() + has_ids
    if dim not in (2, 3):
        _refuse_dimensions(input, has_ids, call.cell)
    if arguments.reset_to is not None:
        call.restart_states = _restart_states_of(arguments.reset_to, call, input.shape[: dim - 1])
    for state in call.states:
        if state.dim() != dim:
            _refuse_dimensions_of_states(call, input.dim(), dim)
    if dim == 3:
        return
    batch_dim = 0 if call.options & ops.BATCH_FIRST else 1
    call.convert_states(lambda states: states.unsqueeze(-2))
    if reset is not None:
        call.reset = reset.unsqueeze(batch_dim)
    call.data = input.unsqueeze(batch_dim)
    call.beside = [rows.unsqueeze(batch_dim) for rows in call.beside]


def _rows_of(name: str, more: Any, call: Call) -> Tensor:
    """Checks one of `Arguments.inputs`; returns its rows, without a batch if input has none.

    Args:
        name: the name of the argument.
        more: the value of the argument.
        call: the call, with the caller's input as `data`.

    Raises:
        TypeError: no cell takes this argument, or the argument is complex or not laid out like
            input.
        ValueError: only other cells take this argument.
        RuntimeError: the sequence lengths, their order, the shape or the device of the argument
            is wrong.
    """
    cell, options = call.cell, call.options
    input: Any = call.data
    if name not in cell.input_names:
        if not called_with(name):
            known = only(cell.input_names)
            raise TypeError(f"a call of {cell.layer} takes no argument {name!r}{known}")
        raise ValueError(
            f"{name} must be None for a {cell.layer}: only {called_with(name)} cells take {name}"
        )
    if (wanted := _kind_of(input)) != (kind := _kind_of(more)):
        raise TypeError(f"{name} must be laid out like input, a {wanted}, got a {kind}")
    if isinstance(input, PackedSequence):
        _check_same(f"{name} must have {_LENGTHS}", more.batch_sizes, input.batch_sizes)
        if more.sorted_indices is not input.sorted_indices:
            _check_same(f"{name} must have the sorted_indices of input", *_orders_of(more, input))
        more, input = more.data, input.data
    elif wanted == "jagged tensor":
        _check_same(f"{name} must have {_LENGTHS}", more.offsets(), input.offsets())
        more, input = more.values(), input.values()
    states = ops.layer_count(cell, call.weights, options) * ops.directions_of(options)
    rows = input.shape[: input.dim() - (call.lookup is None)]
    described = cell.inputs[cell.input_names.index(name)]
    size = described.features(call.hidden_size())
    shared, of_each = (*rows, size), (*rows, states * size)
    if more.shape not in (shared, of_each):
        either = "" if states == 1 else f", or {tuple(shared)} for all layers and directions"
        raise RuntimeError(
            f"{name} must have shape {tuple(of_each)}{either}, got {tuple(more.shape)}"
        )
    if more.device != input.device:
        raise RuntimeError(f"{name} must be at {input.device}, like input, got {more.device}")
    check_real(name, more)
    return more  # type: ignore[no-any-return]


def _beside(inputs: Mapping[str, Any], call: Call) -> list[Tensor]:
    """Returns the operators' `inputs`, with zeros for those that the caller has not given."""
    rows = {name: _rows_of(name, inputs[name], call) for name in inputs}
    if not rows:
        return []
    like, size = next(iter(rows.values())), call.hidden_size()
    return [rows[i.name] if i.name in rows else i.zeros(like, size) for i in call.cell.inputs]


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):  # including subclasses, such as Parameter
        return "jagged tensor" if value.is_nested else "Tensor"
    return type(value).__name__


_LENGTHS = "the sequence lengths of input"


def _orders_of(*packed: PackedSequence) -> list[Tensor]:
    """Returns the indices that sort the sequences of two packed arguments, not both None."""
    orders = [argument.sorted_indices for argument in packed]
    known = next(order for order in orders if order is not None)
    return [torch.arange(len(known), device=known.device) if o is None else o for o in orders]


def _check_same(error: str, values: Tensor, of_input: Tensor) -> None:
    """Raises RuntimeError unless an argument has the lengths or the order of input."""
    if values.shape != of_input.shape:
        raise RuntimeError(error)
    if is_compiling():  # only the compiled program knows the values
        _assert_async((values == of_input).all(), error)
    elif not torch.equal(values, of_input):
        raise RuntimeError(error)


def _states_of(hx: Any, cell: Cell) -> Sequence[Tensor]:
    """Returns the initial states in hx: a tensor, or a tuple if the cell has several states."""
    if len(cell.states) == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx must be a Tensor or None, got {type(hx).__name__}")
        return (hx,)
    number = len(cell.states)
    # For an LSTM, fails like nn.LSTM if hx has fewer states.
    states = hx if cell.torch is None else [hx[i] for i in range(number)]
    if not isinstance(hx, tuple | list):
        raise TypeError(f"hx must be {_GROUPS[number]} or None, got {type(hx).__name__}")
    if len(hx) != number:
        if cell.torch is not None:  # as nn.LSTM
            raise RuntimeError(f"{cell.name} expects two hidden states")
        raise RuntimeError(f"hx must be {_GROUPS[number]} or None, got {len(hx)} of them")
    for described, state in zip(cell.states, states, strict=True):
        if not isinstance(state, Tensor):
            raise TypeError(f"{described.name}x must be a Tensor, got {type(state).__name__}")
    return states


def _restart_states_of(reset_to: Any, call: Call, rows: Sequence[int]) -> list[Tensor]:
    """Returns the states of reset_to in the operators' layout, without a batch if input has none.

    Args:
        reset_to: the caller's argument.
        call: the call, with `reset` set.
        rows: the shape that reset must have.

    Raises:
        TypeError: reset_to is not a tensor, or not a tuple of tensors if the cell has several
            states.
        ValueError: the layer has two directions.
        RuntimeError: the shape of reset or reset_to is wrong.
    """
    options, first = call.options, call.options & ops.BATCH_FIRST
    if options & ops.BIDIRECTIONAL:
        raise ValueError(
            "reset_to takes one direction: the second direction would start from its states at the "
            "end of each episode, which is before the step where reset is True"
        )
    number = len(call.cell.states)
    states = (reset_to,) if number == 1 else reset_to
    is_group = isinstance(states, tuple | list)
    if not is_group or [isinstance(state, Tensor) for state in states] != [True] * number:
        wanted = _GROUPS[number]
        got = ", ".join(type(state).__name__ for state in (states if is_group else (states,)))
        raise TypeError(f"reset_to must be {wanted} or None, got {got}")
    if not is_jit_tracing():  # torch.jit.trace would warn about every comparison
        layers = ops.layer_count(call.cell, call.weights, options)
        # As in hx, the layer dimension precedes the batch dimension, unless batch_first is set.
        at = len(rows) if first else 1
        assert call.reset is not None
        check_shape("reset", call.reset, tuple(rows))
        for state, size in zip(states, call.state_sizes(), strict=True):
            check_shape("reset_to", state, (*rows[:at], layers, *rows[at:], size))
    batched = len(rows) == 2
    return [state.permute(1, 2, 0, 3) if first and batched else state for state in states]


def _refuse_dimensions_of_states(call: Call, input_dim: int, wanted: int) -> NoReturn:
    """Raises the error for states of a padded input that do not have `wanted` dimensions."""
    names = " and ".join(f"{state.name}x" for state in call.cell.states)
    if call.cell.torch is None and len(call.states) > 1:
        names = "the states in hx"
    got = ", ".join(f"{state.dim()}-D" for state in call.states)
    raise RuntimeError(
        f"For {'batched' if wanted == 3 else 'unbatched'} {input_dim}-D input, "
        f"{names} should {'also ' if input_dim == wanted else ''}be {wanted}-D but got "
        + (f"{got} tensor" if len(call.states) == 1 else f"({got}) tensors")
    )


def _refuse_dimensions(input: Tensor, has_ids: bool, cell: Cell) -> NoReturn:
    """Raises the error for a padded input with the wrong number of dimensions."""
    if has_ids:
        raise ValueError(
            "input with embedding holds token ids, which must have 1 or 2 dimensions, got "
            f"{input.dim()}"
        )
    tensor = " tensor" if cell.name == "rnn" else ""  # nn.GRU and nn.LSTM omit the word
    raise ValueError(
        f"{cell.name.upper()}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead"
        + hint_at_embedding(input)
    )


def _convert_packed(call: Call, input: PackedSequence, reset_to: Any) -> None:
    """Converts a call on a PackedSequence; sorts hx and reset like the packed data."""
    if call.states:
        _check_states(call)
    data, batch_sizes, sorted_indices, _ = input
    reset = call.reset
    if reset is not None and reset.dim() != 2:
        raise RuntimeError(
            "reset of a PackedSequence must be padded to 2 dimensions, the steps and the "
            f"sequences, got shape {tuple(reset.shape)}"
        )
    if reset is not None and reset_to is not None:
        steps, first = batch_sizes.shape[0], call.options & ops.BATCH_FIRST
        # Take the batch size from reset, because a tracer cannot read batch_sizes.
        batch = reset.shape[0 if first else -1] if reset.dim() else 0
        rows = (batch, steps) if first else (steps, batch)
        call.restart_states = _restart_states_of(reset_to, call, rows)
    if sorted_indices is not None:
        if call.reset is not None:
            batch_dim = 0 if call.options & ops.BATCH_FIRST else 1
            call.reset = call.reset.index_select(batch_dim, sorted_indices)
        order = _savable(sorted_indices)
        call.convert_states(lambda state: state.index_select(-2, order))
        if not call.states and is_compiling():
            # A tracer cannot read the batch size from the values of batch_sizes without breaking
            # the graph. So pass states, whose shape includes the batch size.
            call.states = call.initial_states(sorted_indices.shape[0])
    wanted = 2 if call.lookup is None else 1
    if data.dim() != wanted:
        raise RuntimeError(f"input must have {wanted} dimensions, got {data.dim()}")
    call.data, call.sequence_layout = data, _savable(batch_sizes)
    call.options |= ops.PACKED


def _convert_jagged(call: Call, input: Any) -> None:
    """Converts a call on a nested tensor."""
    if call.states:
        _check_states(call)
    _check_jagged(input, has_ids=call.lookup is not None)
    call.data, call.sequence_layout = input.values(), _savable(input.offsets().long())
    call.options |= ops.JAGGED


def _savable(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if it is an inference tensor, which autograd cannot save."""
    if is_compiling() or not torch.is_grad_enabled():
        return tensor  # Dynamo cannot trace is_inference
    return tensor.clone() if tensor.is_inference() else tensor


def _check_states(call: Call) -> None:
    """Checks that the states of a packed or jagged input have a batch dimension."""
    for described, state in zip(call.cell.states, call.states, strict=True):
        if state.dim() != 3:
            raise RuntimeError(f"{described.name}x must have 3 dimensions, got {state.dim()}")


def _check_jagged(input: Any, has_ids: bool) -> None:
    """Checks that a nested tensor is jagged, (batch, any length, features), without holes.

    Token ids lack the feature dimension.
    """
    if input.layout != torch.jagged:
        raise ValueError(
            "a nested input must have layout=torch.jagged, got torch.strided: make it with "
            "torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    if input.dim() + has_ids != 3 or input._ragged_idx != 1:
        features = "" if has_ids else ", features"
        raise ValueError(
            f"a jagged input must be (batch, jagged steps{features}), got "
            f"{input.dim()} dimensions with dimension {input._ragged_idx} jagged"
        )
    if input.lengths() is not None:
        raise ValueError("a jagged input must have no holes: remove them by input.contiguous()")


def as_sequence_layout(lengths: Lengths, data: Tensor, options: int) -> Tensor:
    """Returns lengths as int64 on the device of input, without waiting for that device."""
    if options & (ops.PACKED | ops.JAGGED):
        raise ValueError(
            "lengths need a padded input: a PackedSequence or a jagged tensor has its own lengths"
        )
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.tensor(lengths, device="cpu")  # a copy that the caller cannot modify
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"lengths must be integers, got {lengths!r:.200}") from None
        if not lengths.numel():  # torch.tensor makes an empty list float32
            lengths = lengths.long()
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.is_cpu and data.is_cuda and not is_compiling():
        return transfers.to_gpu(lengths.long(), data.device, "lengths")
    return _savable(lengths.to(data.device, torch.int64, non_blocking=True))


def restore(arguments: Arguments, results: Results, options: int) -> tuple[Any, Any]:
    """Returns the output and the last states, h_n or (h_n, c_n), in the layout of the input.

    With LAST_STATE, does not convert the output.

    Args:
        arguments: the caller's arguments.
        results: the results of the call.
        options: the option bits of the call.
    """
    input = arguments.input
    output: Any = results[0]
    states = results[1:]
    has_output = not options & ops.LAST_STATE
    if options & ops.PACKED:
        if has_output:
            output = PackedSequence(output, *input[1:])
        if input.unsorted_indices is not None:
            order = _savable(input.unsorted_indices)
            states = tuple(state.index_select(1, order) for state in states)
    elif options & ops.JAGGED:
        if has_output:
            output = torch.nested.nested_tensor_from_jagged(output, input.offsets())
    elif input.dim() == (2 if arguments.embedding is None else 1):  # a single sequence
        if has_output:
            output = output.squeeze(0 if options & ops.BATCH_FIRST else 1)
        states = tuple(state.squeeze(1) for state in states)
    return output, states if len(states) > 1 else states[0]
