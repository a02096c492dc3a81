"""`rnn()`, `gru()`, `lstm()`, `leaky()`, `last_state()`: layers as functions of their weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops
from .call import Call, Results, tokens
from .call.dtypes import cast_h, convert_dtypes
from .call.layouts import Input, Lengths, as_sequence_layout, normalise, restore, restore_states
from .call.options import option_bits
from .cells import CELLS, GRU, LEAKY, LSTM, VANILLA, CellName
from .machine.torch_private import _is_any_autocast_enabled

if TYPE_CHECKING:
    from typing_extensions import Unpack


def rnn(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Input, Tensor]:
    """Applies a vanilla RNN of one or more layers to whole sequences.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), as `torch.nn.RNN` defines it.

    Args:
        input: (seq_len, batch, input_size), with batch_first (batch, seq_len, input_size), without
            a batch (seq_len, input_size), a PackedSequence, sorted or not, or a jagged nested
            tensor (batch, any length, input_size). seq_len must be at least 1, except in a jagged
            tensor; the batch may be empty. Strides may be arbitrary. With `embedding`, int32 or
            int64 token ids, in any of these shapes without the last dimension.
        hx: initial states (num_layers * num_directions, batch, hidden_size), in the order of the
            input's sequences; without a batch (num_layers * num_directions, hidden_size); None for
            zeros. Float32 and 16-bit types are converted to input's dtype, which h_n has, too.
        weights: for each layer and direction weight_ih (hidden_size, features), weight_hh
            (hidden_size, hidden_size) and, with bias, bias_ih and bias_hh (hidden_size). The number
            of weights determines the number of layers.
        nonlinearity: "tanh" or "relu".
        bias: whether `weights` holds biases.
        batch_first: whether batch comes before seq_len in input and output (not in hx and h_n).
        dropout: probability of zeroing an element of a layer's output, except the last layer's.
        bidirectional: whether every layer also runs backward, from the end of each sequence.
        training: whether dropout is applied.
        lengths: the number of steps of each sequence of a padded input, (batch): integers from 0 to
            seq_len in any order, as a tensor of any integer dtype on any device, an array or a
            list. Padding is not computed, and its values are ignored, even NaN; output is zero
            there. The last state of a sequence of length 0 is its initial state.
        reset: bool (seq_len, batch), laid out like input: (batch, seq_len) with batch_first,
            (seq_len) without a batch. True where a new episode begins, from a state of zeros, as if
            the sequence had been split there; the second direction runs each episode from its end.
            For a PackedSequence, pass it padded, with the sequences in their original order. Jagged
            tensors do not support it.
        reset_to: the states that episodes start from instead of zeros, laid out like reset:
            (seq_len, num_layers, batch, hidden_size), (batch, seq_len, num_layers, hidden_size)
            with batch_first. Read only where reset is True; at the first step it replaces hx.
            Float32 and 16-bit types are converted to the dtype of h_n. Takes one direction.
        batch_invariant: whether the results of a sequence must be bit-identical however it is
            batched, as within `namernn_fast.batch_invariant()`.
        embedding: (vocabulary, input_size), the rows that the token ids in input index, as in
            `rnn(F.embedding(input, embedding), ...)`. Ids past a sequence's length are ignored.
        padding_idx: a row of `embedding` that gets no gradient, as in `F.embedding`.

    Returns:
        output: the last layer's states at every step, laid out like input, with num_directions *
        hidden_size features; and h_n, shaped like hx: the last state of every layer and direction.

    Raises:
        TypeError: input, hx, reset_to or embedding is not a tensor; lengths are not integers; reset
            is not a bool tensor; embedding is given but input does not hold token ids.
        ValueError: input or embedding does not have the dtype of the weights (outside
            autocast); the dimensions of input or embedding, padding_idx, or the number of weights
            is wrong; nonlinearity is unknown; the layout of input does not support lengths or
            reset; reset_to has no reset, or two directions.
        IndexError: a token id is out of range. On an accelerator a device-side assertion fails.
        RuntimeError: a size, a device or the dtype of hx or reset_to does not match; seq_len is 0;
            batch_sizes increase or do not sum to the rows of data; a length is not from 0 to
            seq_len (not checked on an accelerator, where this would wait); batch_invariant is set,
            but the call runs on a GPU or as ATen operators; Triton or the GPU is too old.
    """
    settings = nonlinearity, batch_first, batch_invariant
    options = option_bits(VANILLA, weights, bias, bidirectional, *settings)
    call = Call(VANILLA, input, hx, weights, None, reset, options, dropout * training, reset_to)  # type: ignore[arg-type]
    return run(call, input, lengths, embedding, padding_idx)


def gru(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Input, Tensor]:
    """Applies a GRU of one or more layers to whole sequences; `FusedGRU` has the equation.

    Args:
        input, hx: as in `rnn()`.
        weights: for each layer and direction weight_ih (3 * hidden_size, features), weight_hh
            (3 * hidden_size, hidden_size) and, with bias, bias_ih and bias_hh (3 * hidden_size), in
            torch's order of gates: r, z, n. The number of weights determines the number of layers.
        bias, batch_first, dropout, bidirectional, training: as in `rnn()`.
        lengths, reset, reset_to, batch_invariant, embedding, padding_idx: as in `rnn()`.

    Returns:
        output and h_n, as in `rnn()`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as in `rnn()`. On a GPU, torch's own
            operator computes the call, so Triton is not needed.
    """
    settings = "tanh", batch_first, batch_invariant
    options = option_bits(GRU, weights, bias, bidirectional, *settings)
    call = Call(GRU, input, hx, weights, None, reset, options, dropout * training, reset_to)  # type: ignore[arg-type]
    return run(call, input, lengths, embedding, padding_idx)


def lstm(
    input: Input,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, Tensor] | None = None,
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
    projections: bool = False,
) -> tuple[Input, tuple[Tensor, Tensor]]:
    """Applies an LSTM of one or more layers to whole sequences; `FusedLSTM` has the equation.

    Args:
        input: as in `rnn()`.
        hx: the pair of initial states and initial cell states, each shaped like hx of `rnn()`; None
            for zeros.
        weights: as in `gru()`, with 4 * hidden_size rows in torch's order of gates: i, f, g, o.
        bias, batch_first, dropout, bidirectional, training: as in `rnn()`.
        lengths, batch_invariant, embedding, padding_idx: as in `rnn()`.
        projections: whether the weights of each direction end with weight_hr (proj_size,
            hidden_size). Then weight_hh is (4 * hidden_size, proj_size), and h in hx, reset_to, h_n
            and output has proj_size features, fewer than hidden_size.
        reset: as in `rnn()`; a new episode also starts from a cell state of zeros.
        reset_to: the pair of states and cell states, each shaped like reset_to of `rnn()`.

    Returns:
        output, and the pair of h_n and c_n, each shaped like the tensors in hx.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as in `gru()`.
    """
    settings = batch_first, batch_invariant, projections
    options = option_bits(LSTM, weights, bias, bidirectional, "tanh", *settings)
    call = Call(LSTM, input, hx, weights, None, reset, options, dropout * training, reset_to)  # type: ignore[arg-type]
    return run(call, input, lengths, embedding, padding_idx)


def leaky(
    input: Input,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, Tensor] | None = None,
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
    noise: Input | None = None,
) -> tuple[Input, tuple[Tensor, Tensor]]:
    """Applies a leaky RNN of one or more layers to sequences; `FusedLeakyRNN` has the equation.

    Args:
        input: as in `rnn()`.
        hx: the pair of initial r and v, each shaped like hx of `rnn()`; None for zeros in both,
            even if act(0) is not 0.
        weights: as in `rnn()`, with rate (hidden_size) as the last of each layer and direction.
        nonlinearity: "tanh", "relu", "sigmoid" or "softplus".
        bias, .., padding_idx: as in `lstm()`, with r and v instead of h and c.
        noise: what is added to v, laid out like input, with num_layers * num_directions *
            hidden_size features: the noise of each layer and direction, in the order of h_n.
            Converted to the dtype of input. It may require a gradient.

    Returns:
        output, which holds r, and the pair of the last r and v, each shaped like the tensors in hx.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as in `gru()`, and for noise of another
            layout. On a GPU, this function runs step by step.
    """
    settings = nonlinearity, batch_first, batch_invariant
    options = option_bits(LEAKY, weights, bias, bidirectional, *settings)
    call = Call(LEAKY, input, hx, weights, None, reset, options, dropout * training, reset_to)  # type: ignore[arg-type]
    call.noise = noise
    return run(call, input, lengths, embedding, padding_idx)


def run(
    call: Call,
    input: Input,
    lengths: Lengths | None = None,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Input, Any]:
    """Runs a call and returns its output and last states in the layout of `input`.

    The last states are h_n, or a pair of states. All modules and functions call this function.
    """
    lookup = None
    if embedding is not None or padding_idx is not None:
        lookup = tokens.lookup_of(input, embedding, padding_idx)
    results = _run(call, lengths, lookup)
    return restore(input, results, call.options, lookup is not None)


class _Options(TypedDict, total=False):
    share_prefixes: bool | None
    nonlinearity: str
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    training: bool
    lengths: Lengths | None
    reset: Tensor | None
    reset_to: Any
    batch_invariant: bool
    embedding: Tensor | None
    padding_idx: int | None
    projections: bool
    noise: Tensor | PackedSequence | None


@overload
def last_state(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    cell: Literal["rnn", "gru"] = "rnn",
    **options: "Unpack[_Options]",
) -> Tensor: ...


@overload
def last_state(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    cell: Literal["lstm", "leaky"],
    **options: "Unpack[_Options]",
) -> tuple[Tensor, Tensor]: ...


def last_state(
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    cell: CellName = "rnn",
    share_prefixes: bool | None = None,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: Any = None,
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
    projections: bool = False,
    noise: Input | None = None,
) -> Any:
    """Returns only the last states of `rnn()`, `gru()`, `lstm()` or `leaky()`.

    In inference the output is not written at all. Sequences of token ids can share the states of
    their common prefixes, in inference and in training: the kernel then computes the trie of the
    batch instead of each sequence.

    Args:
        cell: "rnn", "gru", "lstm" or "leaky".
        share_prefixes: None looks for common prefixes if that is expected to be faster. True always
            looks for them, and raises an error if sharing is impossible. False never looks. The
            kernel shares the prefixes it finds if there are enough to make the call faster. The
            result may differ in its last bits. Sharing needs a CPU, token ids, one direction, and
            float32 or float64; it does not support hx, reset, projections, batch_invariant, dropout
            between layers, compilers or torch.func transforms.
        input, hx, weights: as in the function of the cell, and so are all other arguments. An
            argument that this function lacks must have its default.

    Returns:
        h_n: (num_layers * num_directions, batch, hidden_size), without a batch (num_layers *
        num_directions, hidden_size). For an LSTM, the pair of h_n and c_n, as `lstm()` returns it.

    Raises:
        ValueError: share_prefixes is True, but sharing is impossible; cell is unknown; nonlinearity
            is relu for a cell with gates; projections is True for a cell other than lstm.
        TypeError, ValueError, RuntimeError, IndexError: as in `rnn()`.
    """
    chosen = CELLS.get(cell)
    if chosen is None:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if projections and not chosen.can_project:
        raise ValueError(f"projections must be False for cell={cell!r}, got {projections}")
    settings = batch_first, batch_invariant, projections
    if nonlinearity not in chosen.nonlinearities:
        wanted = " or ".join(chosen.nonlinearities)
        raise ValueError(f"nonlinearity must be {wanted} for cell={cell!r}, got {nonlinearity!r}")
    options = option_bits(chosen, weights, bias, bidirectional, nonlinearity, *settings)
    call = Call(chosen, input, hx, weights, None, reset, options, dropout * training, reset_to)  # type: ignore[arg-type]
    call.noise = noise
    return run_last_state(call, input, lengths, embedding, padding_idx, share_prefixes)


def run_last_state(
    call: Call,
    input: Tensor | PackedSequence,
    lengths: Lengths | None,
    embedding: Tensor | None,
    padding_idx: int | None,
    share_prefixes: bool | None,
) -> Any:
    """Runs a call and returns only its last states, for `last_state()` and the modules."""
    if share_prefixes and embedding is None:
        tokens.refuse_to_share("embedding is None, so input does not hold token ids")
    call.options |= ops.LAST_STATE
    lookup = tokens.lookup_of(input, embedding, padding_idx, share_prefixes)
    results = _run(call, lengths, lookup)
    return restore_states(input, results, call.options, lookup is not None)


def _run(call: Call, lengths: Lengths | None, lookup: tokens.Lookup | None) -> Results:
    """Normalises a call and runs it.

    Args:
        call: the arguments as the caller passed them; this function modifies the call.
        lengths: as in `rnn()`.
        lookup: the embedding of token ids, or None if input holds features.
    """
    data, has_ids = call.data, lookup is not None
    # Fast path: a padded 3-D tensor without hx, resets and noise needs no normalisation.
    if (
        not isinstance(data, Tensor)
        or data.dim() + has_ids != 3
        or data.is_nested
        or call.hx is not None
        or call.reset is not None
        or call.reset_to is not None
        or call.noise is not None
    ):
        normalise(call, has_ids)
    if lengths is not None:
        call.sequence_layout = as_sequence_layout(lengths, call.data, call.options)
    if call.dropout and len(call.weights) == ops.weights_per_layer(call.options):
        call.dropout = 0.0
    if call.states or call.restart_states or _is_any_autocast_enabled():
        lookup = convert_dtypes(call, lookup)
        if call.options & ops.PROJECTIONS:
            return cast_h(call, dispatch.run(call, lookup))
    return dispatch.run(call, lookup)
