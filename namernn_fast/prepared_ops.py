"""The operators of prepared layers, whose weights are packed once for many calls.

Their arguments and results are as in `ops`, except that the prepared tensor replaces the weights in
`tensors`. `program` describes the cell if `cell` is `equations.EQUATION`. Two arguments are new:

- prepared: one tensor with the packed weights of all layers, in the dtype of the weights or, with
  INT8, in int8. Its contents depend on the processor that packed the weights.
- sizes: num_layers, input_size, hidden_size, the size of the vocabulary and the size of h, which is
  hidden_size without PROJECTIONS. The vocabulary is 0 unless the first layer reads token ids; then
  input_size is 0.

`prepare` returns a new prepared tensor. `refresh` packs other weights of the same sizes into it.
`unpack` returns the original weights (with INT8, the rounded weights), and an empty tensor for each
table. `forward_prepared` does what `forward` does. These operators run on a CPU, for inference. In
all calls, BIAS, BIDIRECTIONAL, INT8 and PROJECTIONS must be the same; WANT_SAVED is not allowed.

`step` advances the sequences of a stream, and returns the output of the last layer. It updates the
states in place: one tensor (num_layers, sequences, features) for each of `Cell.states`, in float32
for layers in 16 bits. The input may lack the time dimension. For each sequence in the input, `rows`
(int64) holds its index in the stream; None means all sequences.

`checked_rows` returns rows in int64, and raises an error unless they are distinct indices of the
sequences of a stream. Only compiled programs need this operator.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import ops
from .equations import find_cell
from .machine.torch_private import without_python

ops.library.define(
    "prepare(int cell, Tensor[] weights, int[] sizes, int options, str? program=None) -> Tensor"
)
ops.library.define(
    "refresh(Tensor(a!) prepared, int cell, Tensor[] weights, int[] sizes, int options, "
    "str? program=None) -> ()"
)
ops.library.define(
    "unpack(Tensor prepared, int cell, int[] sizes, int options, str? program=None) -> Tensor[]"
)
ops.library.define(
    "forward_prepared(int cell, Tensor input, Tensor[] tensors, int[] sizes, "
    "Tensor? sequence_layout, Tensor? reset, int options, int trees, str? program=None) "
    "-> (Tensor output, Tensor[] last_states)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
ops.library.define(
    "step(int cell, Tensor prepared, Tensor(a!)[] states, Tensor input, Tensor? rows, "
    "Tensor[] inputs, int options, str? program=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
ops.library.define(
    "checked_rows(Tensor rows, int sequences) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)

_Operator: TypeAlias = Callable[..., Any]
prepare: _Operator = torch.ops.namernn_fast.prepare.default
refresh: _Operator = torch.ops.namernn_fast.refresh.default
unpack: _Operator = torch.ops.namernn_fast.unpack.default
forward: _Operator = torch.ops.namernn_fast.forward_prepared.default
step: _Operator = torch.ops.namernn_fast.step.default
checked_rows: _Operator = torch.ops.namernn_fast.checked_rows.default
_C = sys.modules.get(f"{ops.NAMESPACE}._C")
step_directly: Callable[..., bool] = getattr(_C, "step", lambda *_: False)
"""Runs a step without torch's dispatcher, which would take 2 us: step_directly(weights, states,
last_states, input, output, rows, options, cell, inputs, program, saved). `weights` lists the
prepared tensor or the weights of one layer. `states` is empty for zeros. The last states are
written to `last_states`, or to `states` if `last_states` is None. Pass None for an unwanted
`output`. `rows` (a list of integers), `inputs` (a list of tensors) and `program` may be None.
Unless `saved` is None, h and the values that the cell keeps are written to it: (batch, (1 +
Cell.kept) * hidden_size).

Returns False and does nothing if the tensors need an operator. Raises RuntimeError for arguments
that do not match. Autograd, compilers, modes and profilers do not see the call."""
step_back_directly: Callable[..., bool] = getattr(_C, "step_back", lambda *_: False)
"""Runs a step of a step module backward, without torch's dispatcher: step_back_directly(weights,
states, input, inputs, saved, grad_states, gradients, options, cell, program). `weights` are as in
`step_directly`, but prepared with FOR_BACKWARD. `gradients` are four lists of the tensors to write,
with None for unwanted gradients: of the input, of the states (all or none), of `inputs`, and of the
weights (all or none) or, with prepared weights, of the sums and of the cell's own parameters."""
forward_untraced: _Operator = without_python(forward)
"""`forward` for calls outside compilers."""


@dataclass(slots=True)
class PreparedArguments:
    """The arguments of `forward_prepared`."""

    cell: int
    input: Tensor
    tensors: Sequence[Tensor]
    sizes: Sequence[int]
    sequence_layout: Tensor | None
    reset: Tensor | None
    options: int
    trees: int
    program: str | None = None


def _like(prepared: Tensor) -> Tensor:
    """Returns a tensor with the dtype of results computed from these prepared weights."""
    if prepared.dtype != torch.int8:
        return prepared
    return prepared.new_empty(0, dtype=torch.float32)


@torch.library.register_fake(f"{ops.NAMESPACE}::forward_prepared")  # type: ignore[untyped-decorator]
def _(*arguments: Any) -> tuple[Any, ...]:
    call = PreparedArguments(*arguments)
    layers, _, hidden_size, _, size_of_h, _ = call.sizes
    like = _like(call.tensors[-1])
    rows = layers * ops.directions_of(call.options), ops.batch_size(call)
    output = ops.output_shape(call.input, size_of_h, call.options)
    sizes = find_cell(call.cell, call.program).state_sizes(size_of_h, hidden_size)
    return like.new_empty(output), [like.new_empty(*rows, size) for size in sizes]


@torch.library.register_fake(f"{ops.NAMESPACE}::step")  # type: ignore[untyped-decorator]
def _(cell: int, prepared: Tensor, states: Any, input: Tensor, *_: Any) -> Tensor:
    shape = input.shape if ops.has_ids(input) else input.shape[:-1]
    return _like(prepared).new_empty(*shape, states[0].shape[-1])


_INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8


def as_mask(rows: Any) -> Tensor | None:
    """Returns `rows` as a tensor if it is a bool mask, else None."""
    if isinstance(rows, list | tuple):
        is_mask = bool(rows) and all(isinstance(row, bool) for row in rows)
    else:
        is_mask = str(getattr(rows, "dtype", "")) in ("bool", "torch.bool")
    return torch.as_tensor(rows) if is_mask else None


def check_mask(mask: Tensor, sequences: int) -> None:
    """Raises ValueError unless a mask has an element for each sequence of a stream."""
    if mask.shape != (sequences,):
        raise ValueError(
            f"rows must be integers or a mask of shape ({sequences},), got a mask of shape "
            f"{tuple(mask.shape)}"
        )


def list_of_rows(rows: Any, sequences: int) -> list[int]:
    """Returns the row indices of a stream as a list; does not check the elements.

    Args:
        rows: indices, or a mask.
        sequences: the number of sequences of the stream.

    Raises:
        TypeError: rows are neither.
        ValueError: the mask has another shape.
    """
    if type(rows) is list and not (rows and type(rows[0]) is bool):
        return rows
    mask = as_mask(rows)
    if mask is not None:
        check_mask(mask, sequences)
        return mask.nonzero().flatten().tolist()
    if isinstance(rows, Tensor) and rows.dtype == torch.uint8:
        raise TypeError("rows must not be uint8, which elsewhere is a mask: pass bool or int64")
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    try:
        return [*rows]
    except TypeError:
        raise TypeError(f"rows must be a sequence of integers, got {rows!r}") from None


def check_integers(rows: Sequence[Any]) -> None:
    """Raises TypeError unless each row is an integer, or a tensor with one integer."""
    for row in rows:
        if isinstance(row, Tensor):
            is_integer = row.dim() == 0 and row.dtype in _INTEGERS
        else:
            is_integer = not isinstance(row, bool) and hasattr(row, "__index__")
        if not is_integer:
            raise TypeError(f"rows must be integers or a bool mask, got {rows}")


def check_rows(rows: Sequence[Any], sequences: int) -> None:
    """Raises an error unless rows are distinct indices below the number of sequences."""
    check_integers(rows)
    numbers = [int(row) for row in rows]
    if len({*numbers}) < len(numbers) or not all(0 <= row < sequences for row in numbers):
        raise RuntimeError(f"rows must be distinct, between 0 and {sequences - 1}, got {numbers}")


@torch.library.impl(ops.library, "checked_rows", "CompositeExplicitAutograd")
def _(rows: Tensor, sequences: int) -> Tensor:
    check_rows(list_of_rows(rows, sequences), sequences)
    return rows.to(torch.int64, copy=True)


@torch.library.register_fake(f"{ops.NAMESPACE}::checked_rows")  # type: ignore[untyped-decorator]
def _(rows: Tensor, sequences: int) -> Tensor:
    return rows.new_empty(rows.numel(), dtype=torch.int64)
