"""The operators: schemas, option bits, and access to the flat list of weights.

`rnn_forward` and `rnn_backward` run a stack of layers, in one or two directions, over whole
sequences. The names of their arguments and results mean the same throughout this package:

- input: (seq_len, batch, features), or (batch, seq_len, features) with BATCH_FIRST. Or int64 token
  ids, without the last dimension; see `has_ids`. Ids of rows that do not exist are not read.
- hx: initial states (num_layers * directions, batch, hidden_size), or None for zeros.
- weights: for each layer and direction weight_ih, weight_hh and, with BIAS, bias_ih and bias_hh;
  `layers_of` groups them. With token ids each weight_ih of the first layer is replaced by a table
  (vocabulary, hidden_size) of the products of all embedding rows with weight_ih.
- sequence_layout: an int64 tensor that says which (time, sequence) rows exist, or None if all do.
  Padded input: lengths (batch), in any order. PACKED: the batch_sizes (seq_len) of a
  PackedSequence, and input is its data (rows, features). JAGGED: offsets (batch + 1), and input
  is the concatenation of all sequences (rows, features). batch_sizes are on the CPU, lengths and
  offsets on the device of input.
- reset: bool (seq_len, batch), (batch, seq_len) with BATCH_FIRST: the steps that begin from a state
  of zeros; or None.
- options: a sum of the option bits below.
- trees: with SHARE_PREFIXES, the least number of prefix trees to cut the sequences into; threads
  share out whole trees. Both operators must get the same number.
- output: like input with directions * hidden_size features, without elements with LAST_STATE; h_n:
  like hx; hidden: with WANT_HIDDEN the outputs of all layers except the last, for the backward
  pass; otherwise empty.

`gru_forward` and `gru_backward` do the same for GRUs. Their weights and biases have 3 * hidden_size
rows, in torch's order of gates: reset, update, new. One more result of the forward operator is an
argument of the backward one: kept, with WANT_HIDDEN one tensor for each layer, like output with
4 * directions * hidden_size features, otherwise empty.

`lstm_forward` and `lstm_backward` do it for LSTMs, with 4 gates in torch's order (input, forget,
cell, output), and keep 5 * directions * hidden_size features. Besides each state there is a cell
state: cx and c_n are like hx and h_n, and hx and cx are either both given or both None. want_hx
asks for the gradients of both.

The backward operators return the gradients of input, hx and weights; a gradient that is not
requested has no elements. want_layers lists the layers whose weights need a gradient. Token ids
have no gradient.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import availability
from .call import Cell, Results

NAMESPACE = "namernn_fast"

# Option bits. csrc/library/options.h repeats these numbers; the operators reject any other bit.
RELU = 1
"""The nonlinearity is relu; otherwise it is tanh."""
BIAS = 2
"""`weights` holds biases."""
BIDIRECTIONAL = 4
"""Each layer has a second direction, which runs from the end of the sequences."""
BATCH_FIRST = 8
"""The batch is the first dimension of padded input, of output and of reset."""
PACKED = 16
"""input is the data of a PackedSequence, and sequence_layout its batch_sizes."""
JAGGED = 32
"""input is the values of a jagged nested tensor, and sequence_layout its offsets."""
BATCH_INVARIANT = 64
"""Results of a sequence are bit-identical however it is batched. CPU kernel only."""
WANT_HIDDEN = 128
"""rnn_forward returns the outputs of the lower layers too."""
LAST_STATE = 256
"""rnn_forward returns no output, only h_n. Not with WANT_HIDDEN."""
SHARE_PREFIXES = 512
"""Sequences of token ids share the states of common prefixes if that is estimated to be faster.
Only with one direction, without hx and reset, in float32 or float64 on a CPU. The output of
rnn_forward is empty with LAST_STATE. Otherwise it and hidden are (number of ids, hidden_size), in
an order that only rnn_backward knows; grad_output must then be None."""

_library = torch.library.Library(NAMESPACE, "DEF")
_LAYOUT = "Tensor? sequence_layout, Tensor? reset, int options"
_library.define(
    f"rnn_forward(Tensor input, Tensor? hx, Tensor[] weights, {_LAYOUT}, int trees=0) -> "
    "(Tensor output, Tensor h_n, Tensor[] hidden)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, "
    f"Tensor[] weights, Tensor output, Tensor[] hidden, {_LAYOUT}, bool want_input, bool want_hx, "
    "int[] want_layers, int trees=0) -> (Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"gru_forward(Tensor input, Tensor? hx, Tensor[] weights, {_LAYOUT}, int trees=0) -> "
    "(Tensor output, Tensor h_n, Tensor[] hidden, Tensor[] kept)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, "
    f"Tensor[] weights, Tensor output, Tensor[] hidden, Tensor[] kept, {_LAYOUT}, bool want_input, "
    "bool want_hx, int[] want_layers, int trees=0) -> (Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"lstm_forward(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, {_LAYOUT}, "
    "int trees=0) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] hidden, Tensor[] kept)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
    "Tensor? hx, Tensor? cx, Tensor[] weights, Tensor output, Tensor[] hidden, Tensor[] kept, "
    f"{_LAYOUT}, bool want_input, bool want_hx, int[] want_layers, int trees=0) -> "
    "(Tensor, Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("cpu_kernel(bool bfloat16) -> str")
_library.define(
    "cpu_plan(int[] batch_sizes, int input_size, int hidden_size, int num_layers, int threads, "
    "int l2_bytes, int weight_blocks=1) -> (int, int, float, int)"
)

_Operator: TypeAlias = Callable[..., tuple[Any, ...]]
rnn_forward: _Operator = torch.ops.namernn_fast.rnn_forward.default
rnn_backward: _Operator = torch.ops.namernn_fast.rnn_backward.default
gru_forward: _Operator = torch.ops.namernn_fast.gru_forward.default
gru_backward: _Operator = torch.ops.namernn_fast.gru_backward.default
lstm_forward: _Operator = torch.ops.namernn_fast.lstm_forward.default
lstm_backward: _Operator = torch.ops.namernn_fast.lstm_backward.default

GATES: dict[Cell, int] = {"rnn": 1, "gru": 3, "lstm": 4}
"""The number of blocks of hidden_size rows in the weights and biases of each cell."""
KEPT: dict[Cell, int] = {"rnn": 0, "gru": 4, "lstm": 5}
"""The number of blocks of hidden_size values that each cell keeps of a row."""
HAS_CELL_STATE: dict[Cell, bool] = {"rnn": False, "gru": False, "lstm": True}
"""Whether there are cell states besides the states of each cell."""


def forward(
    cell: Cell, input: Tensor, hx: Tensor | None, cx: Tensor | None, *arguments: Any
) -> tuple[Results, list[Tensor], list[Tensor]]:
    """Runs the forward operator of a cell.

    Args:
        cell: of the operator.
        input, hx: of the operator.
        cx: of the operator, or None if the cell has no cell states.
        arguments: the other arguments.

    Returns:
        output, h_n and, for an LSTM, c_n; hidden; and kept, which is empty for the vanilla cell.
    """
    if cell == "rnn":
        output, h_n, hidden = rnn_forward(input, hx, *arguments)
        return (output, h_n), hidden, []
    if cell == "gru":
        output, h_n, hidden, kept = gru_forward(input, hx, *arguments)
        return (output, h_n), hidden, kept
    output, h_n, c_n, hidden, kept = lstm_forward(input, hx, cx, *arguments)
    return (output, h_n, c_n), hidden, kept


def backward(cell: Cell, grads: Sequence[Tensor | None], *arguments: Any) -> tuple[Any, ...]:
    """Runs the backward operator of a cell.

    Args:
        cell: of the operator.
        grads: the gradients of output, h_n and, for an LSTM, c_n.
        arguments: the arguments of `lstm_backward` from input on.

    Returns:
        The gradients of input, hx, cx and weights. That of cx is None if the cell has none.
    """
    if cell == "lstm":
        return lstm_backward(*grads, *arguments)
    input, hx, _, weights, output, hidden, kept, *rest = arguments
    shared = *grads, input, hx, weights, output, hidden
    results = rnn_backward(*shared, *rest) if cell == "rnn" else gru_backward(*shared, kept, *rest)
    grad_input, grad_hx, grad_weights = results
    return grad_input, grad_hx, None, grad_weights


def without_own(cell: Cell, arguments: Sequence[Any]) -> list[Any]:
    """Returns the arguments of `rnn_backward`, given those of a cell's backward operator."""
    own = {"rnn": (), "gru": (7,), "lstm": (2, 5, 9)}[cell]  # kept; grad_c_n, cx and kept
    return [argument for place, argument in enumerate(arguments) if place not in own]


class LayerWeights(NamedTuple):
    """The weights of one layer in one direction."""

    weight_ih: Tensor
    """(gates * hidden_size, features)"""
    weight_hh: Tensor
    """(gates * hidden_size, hidden_size)"""
    bias_ih: Tensor | None = None
    """(gates * hidden_size), or None without biases"""
    bias_hh: Tensor | None = None
    """(gates * hidden_size), or None without biases"""

    @property
    def bias(self) -> Tensor | None:
        """The sum of both biases, or None without biases."""
        if self.bias_ih is None or self.bias_hh is None:
            return None
        return self.bias_ih + self.bias_hh


def has_ids(input: Tensor) -> bool:
    """Returns whether `input` holds token ids instead of rows of features."""
    return input.dtype == torch.int64


def hidden_size_of(weights: Sequence[Tensor]) -> int:
    """Returns the number of features of a state: the columns of weight_hh.

    The number of its rows depends on the cell.
    """
    return weights[1].shape[-1]


def output_shape(input: Tensor, hidden_size: int, options: int) -> tuple[int, ...]:
    """Returns the shape of `output`, and of every tensor in `hidden`."""
    features = directions_of(options) * hidden_size
    if options & LAST_STATE:
        return (0,)
    if options & SHARE_PREFIXES:
        return (input.numel(), features)
    return (*(input.shape if has_ids(input) else input.shape[:-1]), features)


def kept_shape(cell: Cell, input: Tensor, hidden_size: int, options: int) -> tuple[int, ...]:
    """Returns the shape of every tensor in `kept`, given that WANT_HIDDEN is set."""
    *rows, features = output_shape(input, hidden_size, options)
    return (*rows, KEPT[cell] * features)


def directions_of(options: int) -> int:
    """Returns the number of directions of each layer, 1 or 2."""
    return 2 if options & BIDIRECTIONAL else 1


def weights_per_layer(options: int) -> int:
    """Returns how many weights each layer has, over all its directions."""
    return (4 if options & BIAS else 2) * (2 if options & BIDIRECTIONAL else 1)


def layer_count(weights: Sequence[Tensor], options: int) -> int:
    """Returns the number of layers."""
    return len(weights) // weights_per_layer(options)


def layers_of(weights: Sequence[Tensor], options: int) -> list[list[LayerWeights]]:
    """Groups the flat list of weights by layer and direction."""
    size, directions = (4 if options & BIAS else 2), directions_of(options)
    each = [LayerWeights(*weights[i : i + size]) for i in range(0, len(weights), size)]
    return [each[k : k + directions] for k in range(0, len(each), directions)]


def zero_states(weights: Sequence[Tensor], options: int, batch: int) -> Tensor:
    """Returns initial states of zeros (num_layers * directions, batch, hidden_size)."""
    states = layer_count(weights, options) * directions_of(options)
    return weights[1].new_zeros(states, batch, hidden_size_of(weights))


def states_of_layers(
    hx: Tensor | None, weights: Sequence[Tensor], options: int
) -> Sequence[Tensor | None]:
    """Returns the initial states of each layer, (directions, batch, hidden_size) or None."""
    layers = layer_count(weights, options)
    return [None] * layers if hx is None else hx.chunk(layers)


def cpu_kernel(dtype: torch.dtype = torch.float32) -> str:
    """Returns the instruction set that the CPU kernel uses on this processor.

    Args:
        dtype: of the input. Only bfloat16 may use another instruction set than the other types.

    Returns:
        `avx512`, `avx2` or `baseline`; for bfloat16 `avx512_bf16` or `amx` if the processor has
        these faster instructions.
    """
    return torch.ops.namernn_fast.cpu_kernel(  # type: ignore[no-any-return]
        dtype == torch.bfloat16
    )


class Plan(NamedTuple):
    """How the CPU kernel divides a layer's recurrence among threads."""

    groups: int
    """The number of groups of sequences."""
    members: int
    """Threads per group; each computes a range of the hidden units."""
    nanoseconds: float
    """The estimated time of the recurrence, in nanoseconds."""
    layers: int
    """The number of layers that run at once, one thread each, instead of groups and members."""


def cpu_plan(
    batch_sizes: Sequence[int],
    input_size: int,
    hidden_size: int,
    threads: int,
    l2_bytes: int = 2**20,
    num_layers: int = 1,
    cell: Cell = "rnn",
) -> Plan:
    """Returns the plan that the CPU kernel makes in float32, for this or any other machine.

    Args:
        batch_sizes: the number of sequences at each step.
        input_size: number of input features.
        hidden_size: number of features of a state.
        threads: number of threads.
        l2_bytes: size of a core's private cache, in bytes.
        num_layers: number of layers of this size in the stack, in one direction.
        cell: of the layers.
    """
    return Plan(
        *torch.ops.namernn_fast.cpu_plan(
            batch_sizes, input_size, hidden_size, num_layers, threads, l2_bytes, GATES[cell]
        )
    )


@functools.cache
def gpu_backend(device: torch.device) -> Any:
    """Imports and returns the GPU implementation of the operators, when a GPU tensor arrives.

    Raises:
        RuntimeError: Triton is missing or too old, or the GPU is too old.
    """
    availability.require_triton(device)
    return importlib.import_module(f"{__package__}.gpu")


@torch.library.impl(_library, "rnn_forward", "CUDA")
def _(input: Tensor, *arguments: Any) -> Any:
    return gpu_backend(input.device).rnn_forward(input, *arguments)


@torch.library.impl(_library, "rnn_backward", "CUDA")
def _(grad_output: Tensor | None, grad_h_n: Tensor | None, input: Tensor, *arguments: Any) -> Any:
    backend = gpu_backend(input.device)
    return backend.rnn_backward(grad_output, grad_h_n, input, *arguments)
