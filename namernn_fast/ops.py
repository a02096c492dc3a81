"""The operators: schemas, option bits, and access to the flat list of weights.

`forward` and `backward` run a stack of layers of any cell, in one or two directions, over whole
sequences. Their arguments and results keep these names throughout the package:

- cell: the number of the cell, an index of `cells.NUMBERED`; or `equations.EQUATION` if `program`
  describes the cell.
- input: (seq_len, batch, features), or (batch, seq_len, features) with BATCH_FIRST. Or int64 token
  ids in these shapes without the last dimension; see `has_ids`. Ids past a sequence's length are
  ignored. With SUMS, the products of x with weight_ih.
- tensors: with STATES the initial states, with RESET_TO the states after resets, with INPUTS the
  other inputs, and then the weights; `split` separates them. One list holds them all, because each
  list argument costs 0.35 us, and because AOTInductor cannot pass an empty list:

  - states: one tensor (num_layers * directions, batch, hidden_size) for each of `Cell.states`: hx,
    and cx of an LSTM. With PROJECTIONS, h has proj_size features. Zeros without STATES.
  - reset_to: the states that steps start from where `reset` is True: one tensor (seq_len,
    num_layers, batch, hidden_size) for each of `Cell.states`. Read only where `reset` is True.
    Needs `reset` and one direction. CPU kernel only. Zeros without RESET_TO.
  - inputs: for each of `Cell.inputs` a tensor shaped like input, but with `Input.features` for each
    layer and direction, one after the other, or once for all of them. Zeros without INPUTS. Not
    allowed with SHARE_PREFIXES.
  - weights: for each layer and direction the tensors that `parameters_of` lists, in torch's order
    of gates; `layers_of` groups them, and `parameters_and_shapes` has their shapes. With token ids
    each weight_ih of the first layer is replaced with a table (vocabulary, gates * hidden_size) of
    the products of all embedding rows with weight_ih.
- sequence_layout: an int64 tensor that says which (time, sequence) rows exist, or None if all do.
  Padded input: lengths (batch), in any order. PACKED: the batch_sizes (seq_len) of a
  PackedSequence, and input is its data (rows, features). JAGGED: offsets (batch + 1), and input
  is the concatenation of all sequences (rows, features). batch_sizes are on the CPU, lengths and
  offsets on the device of input.
- reset: None, or bool (seq_len, batch), (batch, seq_len) with BATCH_FIRST: True for the steps that
  start from zeros or, with RESET_TO, from `reset_to`.
- options: a sum of the option bits below.
- program: the text of the program of a cell that a user wrote as an equation (`equations.program`).
- trees: 0 without SHARE_PREFIXES, otherwise the minimum number of prefix trees to cut the sequences
  into. A thread processes whole trees. `forward` and `backward` must get the same number.

`forward` returns:

- output: shaped like input, with the h of each direction as features; empty with LAST_STATE.
- last_states: one tensor for each of `Cell.states`, shaped like the initial states: h_n, and c_n of
  an LSTM.
- saved: with WANT_SAVED, a list of the tensors that the backward pass reads in addition to output;
  otherwise an empty list. First come the outputs of all layers except the last. If the cell keeps
  values, one tensor for each layer follows, shaped like output, with `Cell.kept` * directions *
  hidden_size features.

`backward` takes the arguments of `forward`, output, saved, and:

- grad_output, grad_last_states: the gradients of output and of each of last_states, or None.
- wanted: for input, and for each of `tensors` before the weights, whether to compute its gradient.
  Token ids have no gradient.
- want_layers: the layers whose weights need a gradient.

`backward` returns a list of the wanted gradients: for input, for `tensors` before the weights, and
for the weights of the layers in want_layers, in layer order.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .cells import CELLS, Cell, CellName
from .cells.cell import LayerWeights, Parameter, Size
from .equations import find_cell
from .machine.torch_private import without_python

NAMESPACE = "namernn_fast"

# Option bits, the same as in csrc/library/arguments/options.h. The operators reject any other bit.
RELU = 1
"""The nonlinearity is relu. If no nonlinearity bit is set, it is tanh."""
BIAS = 2
"""`weights` holds biases."""
BIDIRECTIONAL = 4
"""Each layer has a second direction, which runs from the end of each sequence."""
BATCH_FIRST = 8
"""The batch is the first dimension of padded input, of output and of reset."""
PACKED = 16
"""input holds the data of a PackedSequence, and sequence_layout its batch_sizes."""
JAGGED = 32
"""input holds the values of a jagged nested tensor, and sequence_layout its offsets."""
BATCH_INVARIANT = 64
"""The results of a sequence are bit-identical however it is batched. CPU kernel only."""
WANT_SAVED = 128
"""`forward` returns `saved` for the backward pass."""
LAST_STATE = 256
"""`forward` returns the last states and an empty output. Not allowed with WANT_SAVED."""
SHARE_PREFIXES = 512
"""Sequences of token ids share the states of common prefixes if that is estimated to be faster.
Only for one direction, without states, reset and PROJECTIONS, in float32 or float64 on a CPU.
Without LAST_STATE, output and the tensors in saved have one row for each id, in an order that only
`backward` knows, and grad_output must be None."""
MEDIUM_PRECISION = 1024
"""Products may round float32 numbers to bfloat16, and sum in float32. Ignored if this would not be
faster, and with SHARE_PREFIXES."""
HIGH_PRECISION = 2048
"""Like MEDIUM_PRECISION, but products replace each float32 number with the sum of two bfloat16
numbers. Not allowed with MEDIUM_PRECISION."""
INT8 = 4096
"""Prepared weights of float32 layers are 8-bit integers with a scale for each row. Products round
inputs and states to such integers, too. Bits for other precisions are ignored."""
PROJECTIONS = 8192
"""The layers project h to fewer features than hidden_size. Not allowed with SHARE_PREFIXES or INT8.
Products are in float32."""
SIGMOID, SOFTPLUS = 16384, 32768
"""The nonlinearity is sigmoid or softplus. At most one of SIGMOID, SOFTPLUS and RELU may be set."""
STATES, RESET_TO, INPUTS = 65536, 131072, 262144
"""Each bit adds tensors to `tensors` before the weights: initial states, reset_to, other inputs."""
SUMS = 524288
"""`input` holds W_ih x_t of a single layer: directions * gates * hidden_size features, in the order
of the rows of weight_ih, which `weights` lack."""
FOR_BACKWARD = 1048576
"""`prepare` packs weights for `prepared_ops.step_back_directly`. Only for these two."""


class Lists(NamedTuple):
    """The argument `tensors`, split by role. Only `weights` must not be empty."""

    states: Sequence[Tensor]
    reset_to: Sequence[Tensor]
    inputs: Sequence[Tensor]
    weights: Sequence[Tensor]
    """The weights, or the prepared tensor."""

    def joined(self, options: int) -> tuple[Sequence[Tensor], int]:
        """Returns `tensors`, and `options` with STATES, RESET_TO and INPUTS added to match."""
        states, reset_to, inputs, weights = self
        options |= STATES * bool(states) | RESET_TO * bool(reset_to) | INPUTS * bool(inputs)
        return (*states, *reset_to, *inputs, *weights), options


def before_weights(cell: Cell, options: int) -> int:
    """Returns how many of `tensors` come before the weights."""
    if not options & (STATES | RESET_TO | INPUTS):
        return 0
    of_states = (options & STATES > 0) + (options & RESET_TO > 0)
    return len(cell.states) * of_states + (len(cell.inputs) if options & INPUTS else 0)


def split(cell: Cell, tensors: Sequence[Any], options: int) -> Lists:
    """Splits `tensors` into states, reset_to, inputs and weights."""
    states = len(cell.states) if options & STATES else 0
    restart = states + (len(cell.states) if options & RESET_TO else 0)
    count = before_weights(cell, options)
    return Lists(tensors[:states], tensors[states:restart], tensors[restart:count], tensors[count:])


@dataclass(slots=True)
class _Arguments:
    """The arguments that `forward` and `backward` share."""

    cell: int
    input: Tensor
    tensors: Sequence[Tensor]
    sequence_layout: Tensor | None
    reset: Tensor | None
    options: int
    trees: int


class _Described:
    """What `forward` and `backward` take, read together."""

    cell: int
    program: str | None
    tensors: Sequence[Tensor]
    options: int

    @property
    def described(self) -> Cell:
        """The cell."""
        return find_cell(self.cell, self.program)

    @property
    def lists(self) -> Lists:
        """`tensors`, split into states, reset_to, inputs and weights."""
        return split(self.described, self.tensors, self.options)


@dataclass(slots=True)
class ForwardArguments(_Arguments, _Described):
    """The arguments of `forward`."""

    program: str | None = None


@dataclass(slots=True)
class BackwardArguments(_Arguments, _Described):
    """The arguments of `backward`."""

    output: Tensor
    saved: Sequence[Tensor]
    grad_output: Tensor | None
    grad_last_states: Sequence[Tensor | None]
    wanted: Sequence[bool]
    want_layers: Sequence[int]
    program: str | None = None


AnyArguments: TypeAlias = ForwardArguments | BackwardArguments


library = torch.library.Library(NAMESPACE, "DEF")
_ARGUMENTS = (
    "int cell, Tensor input, Tensor[] tensors, Tensor? sequence_layout, Tensor? reset, "
    "int options, int trees"
)
library.define(
    f"forward({_ARGUMENTS}, str? program=None) "
    "-> (Tensor output, Tensor[] last_states, Tensor[] saved)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"backward({_ARGUMENTS}, Tensor output, Tensor[] saved, Tensor? grad_output, "
    "Tensor?[] grad_last_states, bool[] wanted, int[] want_layers, str? program=None) "
    "-> Tensor[] gradients",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define("cpu_kernel(str numbers) -> str")
library.define("cpu_terms(int options, int steps, int sequences, int rows, int hidden_size) -> int")
library.define(
    "cpu_plan(int[] batch_sizes, int input_size, int hidden_size, int num_layers, int threads, "
    "int l2_bytes, int weight_blocks=1, bool backward=False) -> (int, int, float, int)"
)
library.define("memory_reserved() -> int")
library.define("empty_cache() -> ()")

_Operator: TypeAlias = Callable[..., Any]
forward: _Operator = torch.ops.namernn_fast.forward.default
backward: _Operator = torch.ops.namernn_fast.backward.default
forward_untraced: _Operator = without_python(forward)
backward_untraced: _Operator = without_python(backward)
"""`forward` and `backward` for calls outside compilers."""


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is neither lazily negated nor a ZeroTensor."""
    return not (tensor.is_neg() or tensor._is_zerotensor())


def _backward_of_plain(*arguments: Any) -> Any:
    """Runs `backward` with plain copies of lazily negated gradients and ZeroTensors.

    The dispatcher resolves such tensors, except in lists of optional tensors.
    """

    def resolved(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [resolved(element) for element in value]
        is_tensor = isinstance(value, Tensor)
        return value.clone() if is_tensor and not is_plain(value) else value

    return backward(*map(resolved, arguments))


for _key in ("Negative", "ZeroTensor"):
    library.impl("backward", _backward_of_plain, _key)


def has_ids(input: Tensor) -> bool:
    """Returns whether `input` holds token ids instead of rows of features."""
    return input.dtype == torch.int64


def _weight_hh(weights: Sequence[Tensor], options: int) -> Tensor:
    """Returns weight_hh of the first layer of a cell that has weight_hh."""
    return weights[0 if options & SUMS else 1]


def hidden_size(
    cell: Cell, weights: Sequence[Tensor], input: Tensor | None = None, options: int = 0
) -> int:
    """Returns the number of hidden units.

    Args:
        cell: the cell.
        weights: the flat list of weights.
        input, options: as in `forward`. Read only if the cell lacks weight_hh, or with SUMS. If
            input is None, it is rows of features.
    """
    if cell.has_weight_hh:
        return _weight_hh(weights, options).shape[0] // cell.gates
    if options & SUMS:
        assert input is not None
        return input.shape[-1] // (cell.gates * directions_of(options))
    return weights[0].shape[int(input is not None and has_ids(input))] // cell.gates


def heads_of(cell: Cell, weights: Sequence[Tensor], hidden_size: int, options: int = 0) -> int:
    """Returns the number of heads into which h is split; 1 if weight_hh has no heads' shape."""
    if not cell.can_have_heads:
        return 1
    width = _weight_hh(weights, options).shape[-1]
    return hidden_size // width if width and hidden_size % width == 0 else 1


def why_only_float(cell: Cell, weights: Sequence[Tensor], hidden: int, options: int) -> str | None:
    """Returns what only float kernels support in calls with these weights, or None.

    Such calls run neither on bfloat16 instructions nor with 8-bit weights.
    """
    if options & PROJECTIONS:
        return "proj_size"
    if options & SUMS:
        return "given sums"
    if heads_of(cell, weights, hidden, options) > 1:
        return "heads"
    return f"the {cell.name} cell" if cell.only_in_float else None


def state_sizes(
    cell: Cell, weights: Sequence[Tensor], input: Tensor | None = None, options: int = 0
) -> list[int]:
    """Returns the number of features of each state. The arguments are as in `hidden_size`."""
    hidden = hidden_size(cell, weights, input, options)
    size_of_h = _weight_hh(weights, options).shape[-1] if cell.can_project else hidden
    return cell.state_sizes(size_of_h, hidden)


def output_shape(input: Tensor, size: int, options: int) -> tuple[int, ...]:
    """Returns the shape of each layer's output, with `size` features for each direction."""
    features = directions_of(options) * size
    if options & LAST_STATE:
        return (0,)
    if options & SHARE_PREFIXES:
        return (input.numel(), features)
    return (*(input.shape if has_ids(input) else input.shape[:-1]), features)


def directions_of(options: int) -> int:
    """Returns the number of directions of each layer, 1 or 2."""
    return 2 if options & BIDIRECTIONAL else 1


def parameters_of(cell: Cell, options: int) -> tuple[Parameter, ...]:
    """Returns the parameters that each direction of a layer has, in the order of its weights."""
    # Dynamo of torch 2.10 and 2.11 cannot index tuples with bools.
    present = cell.present[int(options & BIAS > 0)][int(options & PROJECTIONS > 0)]
    return present[1:] if options & SUMS else present


def weights_per_layer(cell: Cell, options: int) -> int:
    """Returns the number of weights of a layer, including all its directions."""
    return len(parameters_of(cell, options)) * directions_of(options)


def layer_count(cell: Cell, weights: Sequence[Tensor], options: int) -> int:
    """Returns the number of layers."""
    return len(weights) // weights_per_layer(cell, options)


def layers_of(cell: Cell, weights: Sequence[Tensor], options: int) -> list[list[LayerWeights]]:
    """Groups the flat list of weights by layer and direction."""
    names = [parameter.name for parameter in parameters_of(cell, options)]
    size, directions = len(names), directions_of(options)
    groups = [weights[i : i + size] for i in range(0, len(weights), size)]
    each = [dict(zip(names, group, strict=True)) for group in groups]
    return [[*each[k : k + directions]] for k in range(0, len(each), directions)]


def parameters_and_shapes(
    cell: Cell,
    options: int,
    layers: int,
    features: int,
    hidden: int,
    projected: int,
    heads: int = 1,
) -> Iterator[tuple[Parameter, tuple[int, ...]]]:
    """Yields the parameter and the shape of each weight of a stack of layers."""
    sizes: dict[Size, int] = {
        "rows": cell.gates * hidden,
        "gates": cell.gates,
        "hidden": hidden,
        "projected": projected,
        "head": hidden // heads,
    }
    for _ in range(layers):
        sizes["features"] = features
        for parameter in parameters_of(cell, options) * directions_of(options):
            yield parameter, tuple(sizes[size] for size in parameter.shape)
        features = projected * directions_of(options)


@torch.library.register_fake(f"{NAMESPACE}::forward")
def _(*arguments: Any) -> tuple[Any, ...]:
    call = ForwardArguments(*arguments)
    options, weights = call.options, call.lists.weights
    cell = call.described
    num_layers = layer_count(cell, weights, options)
    like = weights[0]  # input may be integer token ids
    sizes = state_sizes(cell, weights, call.input, options)
    shape = output_shape(call.input, sizes[0], options)
    saved = []
    if options & WANT_SAVED:
        saved += [shape] * (num_layers - 1)
        if cell.kept:
            kept = output_shape(call.input, cell.kept * sizes[-1], options)
            saved += [kept] * num_layers
    rows = num_layers * directions_of(options), batch_size(call)
    return (
        like.new_empty(shape),
        [like.new_empty(*rows, size) for size in sizes],
        [like.new_empty(shape) for shape in saved],
    )


def batch_size(call: Any) -> Any:
    """Returns the number of sequences of a traced call: a number or a symbol."""
    if call.options & STATES:
        return call.tensors[0].shape[1]
    if call.options & PACKED:  # a tracer cannot read the values of batch_sizes
        return torch.library.get_ctx().new_dynamic_size()
    if call.options & JAGGED:
        return call.sequence_layout.shape[0] - 1
    return call.input.shape[0 if call.options & BATCH_FIRST else 1]


@torch.library.register_fake(f"{NAMESPACE}::backward")
def _(*arguments: Any) -> list[Tensor]:
    call = BackwardArguments(*arguments)
    cell, tensors = call.described, call.tensors
    first, per_layer = before_weights(cell, call.options), weights_per_layer(cell, call.options)
    wanted = [*itertools.compress((call.input, *tensors[:first]), call.wanted)]
    for k in sorted(set(call.want_layers)):
        wanted += tensors[first + k * per_layer : first + (k + 1) * per_layer]
    return [tensors[-1].new_empty(tensor.shape) for tensor in wanted]


def cpu_kernel(dtype: torch.dtype = torch.float32) -> str:
    """Returns the instruction set that the CPU kernel uses on this processor.

    Args:
        dtype: the dtype of the input, or int8 for layers prepared with 8-bit weights. All dtypes
            except bfloat16 and int8 use the same instruction set.

    Returns:
        `avx512`, `avx2` or `baseline`. If the processor has faster instructions for the dtype,
        `avx512_bf16` or `amx` for bfloat16, and `avx_vnni`, `avx512_vnni` or `amx_int8` for int8.
    """
    numbers = {torch.bfloat16: "bfloat16", torch.int8: "int8"}.get(dtype, "float")
    return torch.ops.namernn_fast.cpu_kernel(numbers)  # type: ignore[no-any-return]


def cpu_terms(options: int, steps: int, sequences: int, rows: int, hidden_size: int) -> int:
    """Returns how the CPU kernel represents float32 numbers in the products of a call.

    Args:
        options: the option bits of the call.
        steps, sequences: the steps of the longest sequence, and the number of nonempty sequences.
        rows, hidden_size: the total number of steps of all sequences, and the number of units.

    Returns:
        0 for float32 numbers, otherwise how many bfloat16 numbers replace each float32 number.
    """
    cpu_terms: _Operator = torch.ops.namernn_fast.cpu_terms
    return cpu_terms(options, steps, sequences, rows, hidden_size)  # type: ignore[no-any-return]


class Plan(NamedTuple):
    """How the CPU kernel divides a layer's recurrence among threads."""

    groups: int
    """The number of groups of sequences."""
    members: int
    """The number of threads per group. Each thread computes a range of the hidden units."""
    nanoseconds: float
    """The estimated time of the recurrence, in nanoseconds."""
    layers: int
    """The number of layers that run at the same time, one thread per layer. If this is more than 1,
    groups and members do not apply."""


def cpu_plan(
    batch_sizes: Sequence[int],
    input_size: int,
    hidden_size: int,
    threads: int,
    l2_bytes: int = 2**20,
    num_layers: int = 1,
    cell: CellName | Cell = "rnn",
    backward: bool = False,
) -> Plan:
    """Returns the float32 plan of the CPU kernel for a given number of threads and cache size.

    Args:
        batch_sizes: the number of sequences at each step.
        input_size, hidden_size, num_layers, cell: describe the layers, which have one direction.
        threads, l2_bytes: the number of threads, and the size of each core's L2 cache in bytes.
        backward: whether to plan the backward pass instead of the forward pass.
    """
    cpu_plan: _Operator = torch.ops.namernn_fast.cpu_plan
    sizes = input_size, hidden_size, num_layers
    gates = (cell if isinstance(cell, Cell) else CELLS[cell]).gates
    return Plan(*cpu_plan(batch_sizes, *sizes, threads, l2_bytes, gates, backward))
