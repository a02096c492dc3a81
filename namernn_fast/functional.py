"""`rnn()` and `last_state()`: the layer as a function of input, initial states and weights."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops, tokens
from .call import Call
from .layouts import Input, Lengths, as_sequence_layout, normalise, restore, restore_states

_CONVERTIBLE = {torch.float32, torch.bfloat16, torch.float16}

# The one place of the setting: importing the name elsewhere would copy its value of that moment.
_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Within it, the bits of a sequence's results do not depend on how it is batched.

    That is: not on the other sequences of the batch or the place among them, on padding, packing or
    lengths, or on the number of threads. It holds for the results of the forward pass of `rnn` and
    the modules; gradients of parameters are sums over the batch. Chains of
    multiply-adds are then as long for few rows as for many, and the weights of one short sequence
    alone are packed into panels like those of any batch, which is what costs time.
    `FusedRNN(..., batch_invariant=True)` sets it for one module.

    Like torch's own such settings it belongs to the process, not to a thread.

    Args:
        enabled: False switches the setting off within an outer `batch_invariant()`.
    """
    global _batch_invariant
    before, _batch_invariant = _batch_invariant, enabled
    try:
        yield
    finally:
        _batch_invariant = before


def batch_invariant_is_on() -> bool:
    """Returns whether the setting `batch_invariant()` is on."""
    return _batch_invariant


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
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Input, Tensor]:
    """Applies a vanilla RNN of one or more layers to whole sequences; `FusedRNN` calls this.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), as `torch.nn.RNN` defines it.

    Args:
        input: (seq_len, batch, input_size), with batch_first (batch, seq_len, input_size), without
            a batch (seq_len, input_size), a PackedSequence, sorted or not, or a jagged nested
            tensor (batch, any length, input_size). seq_len must be at least 1, except in a jagged
            tensor; the batch may be empty. Any strides. With `embedding`, token ids, int32 or int64
            as for `nn.Embedding`: any of these without the dimension of features.
        hx: initial states (num_layers * num_directions, batch, hidden_size), in the order of the
            input's sequences; without a batch (num_layers * num_directions, hidden_size); None for
            zeros. Float32 and 16-bit types are converted to the dtype of input, which h_n has too.
        weights: for each layer and direction weight_ih (hidden_size, features), weight_hh
            (hidden_size, hidden_size) and, with bias, bias_ih and bias_hh (hidden_size). The number
            of layers follows from their number.
        nonlinearity: "tanh" or "relu".
        bias: whether `weights` holds biases.
        batch_first: whether batch comes before seq_len in input and output (not in hx and h_n).
        dropout: probability of zeroing an element of a layer's output, except the last layer's,
            while training.
        bidirectional: whether every layer also runs from the end of the sequences.
        training: whether dropout is applied.
        lengths: the number of steps of each sequence of a padded input, (batch): integers from 0 to
            seq_len in any order, a tensor of any integer dtype and device, an array or a list.
            Padding costs no computation, and its values, even NaN, do not matter; output is zero
            there. The last state of a sequence of length 0 is its initial state. On an accelerator
            the values are not checked, since reading them would wait for the device.
        reset: bool (seq_len, batch), laid out like input: (batch, seq_len) with batch_first,
            (seq_len) without a batch. Set where a new episode begins: the episode starts from a
            state of zeros, as if the sequence had been split there; the second direction runs each
            part from its own end. In padded order for a PackedSequence; not for a jagged tensor.
        batch_invariant: as within `namernn_fast.batch_invariant()`.
        embedding: (vocabulary, input_size), the rows of features that the token ids of input stand
            for. The result is that of `rnn(F.embedding(input, embedding, padding_idx), ...)`. Ids
            in the padding behind `lengths` may be anything.
        padding_idx: a row of `embedding` that gets no gradient, as in `F.embedding`.

    Returns:
        output: the last layer's states at every step, like input with num_directions * hidden_size
        features, and h_n, like hx: the last state of every layer and direction.

    Raises:
        TypeError: input, hx or embedding is no tensor, lengths holds other things than integers,
            reset is no bool tensor, input with embedding holds no token ids.
        ValueError: the dtype of input or embedding is not that of the weights (outside autocast),
            the number of dimensions of input is wrong, embedding, padding_idx or `weights` does not
            fit, nonlinearity is unknown, lengths or reset do not go with input.
        IndexError: a token id has no row. On an accelerator an assertion fails on the device.
        RuntimeError: a size, device or the dtype of hx does not fit; seq_len is 0; the batch_sizes
            of a packed sequence increase or do not sum to its rows; a length is not from 0 to
            seq_len; batch_invariant is wanted of ATen operators or on a GPU, which cannot promise
            it; on a GPU, Triton is missing or too old, or the GPU is.
    """
    options = option_bits(weights, bias, bidirectional, nonlinearity, batch_first)
    if batch_invariant or _batch_invariant:
        options |= ops.BATCH_INVARIANT
    call = Call(input, hx, weights, None, reset, options, dropout if training else 0.0)  # type: ignore[arg-type]
    lookup = None
    if embedding is not None or padding_idx is not None:
        lookup = _lookup(input, embedding, padding_idx)
    output, h_n, options = _run(call, lengths, lookup)
    return restore(input, output, h_n, options, lookup is not None)


def last_state(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    share_prefixes: bool | None = None,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Returns h_n of `rnn()`: the last state of every layer and direction, and no output.

    In inference no output is written. Sequences of token ids that begin alike can share the states
    of what they have in common, in inference and in training: a trie of the batch is computed
    instead of its sequences.

    Args:
        share_prefixes: None shares where that is expected to take less time; True wherever it is
            possible at all, and it is an error where it is not; False never. The bits of the result
            may differ. It is possible on a CPU, for token ids, in one direction, in float32 and
            float64, without hx, reset, batch_invariant and dropout between layers, outside
            compilers and torch.func transforms.
        input, hx, weights, nonlinearity, bias, batch_first, dropout: as of `rnn()`.
        bidirectional, training, lengths, reset, batch_invariant: as of `rnn()`.
        embedding, padding_idx: as of `rnn()`.

    Returns:
        h_n: (num_layers * num_directions, batch, hidden_size), without a batch (num_layers *
        num_directions, hidden_size).

    Raises:
        ValueError: share_prefixes is True where sharing is impossible.
        TypeError, ValueError, RuntimeError, IndexError: as of `rnn()`.
    """
    options = option_bits(weights, bias, bidirectional, nonlinearity, batch_first)
    options |= ops.LAST_STATE
    if batch_invariant or _batch_invariant:
        options |= ops.BATCH_INVARIANT
    if share_prefixes and embedding is None:
        tokens.refuse_to_share("input holds no token ids")
    call = Call(input, hx, weights, None, reset, options, dropout if training else 0.0)  # type: ignore[arg-type]
    lookup = _lookup(input, embedding, padding_idx, share_prefixes)
    _, h_n, options = _run(call, lengths, lookup)
    return restore_states(input, h_n, options, lookup is not None)


def _lookup(
    input: Tensor | PackedSequence,
    embedding: Tensor | None,
    padding_idx: int | None,
    share_prefixes: bool | None = False,
) -> tokens.Lookup | None:
    """Returns what the token ids of a call stand for, or None if it has no ids."""
    if embedding is not None:
        tokens.check_types(input, embedding)
        return tokens.Lookup(embedding, padding_idx, share_prefixes)
    if padding_idx is not None:
        raise ValueError(f"padding_idx={padding_idx} goes with embedding, which is None")
    return None


def _run(
    call: Call, lengths: Lengths | None, lookup: tokens.Lookup | None
) -> tuple[Tensor, Tensor, int]:
    """Completes a call and runs it; returns output and h_n as the operators do, and its options.

    Args:
        call: with the arguments as the caller gave them.
        lengths: as of `rnn()`.
        lookup: what token ids stand for, or None if input has features.
    """
    data, has_ids = call.data, lookup is not None
    # Fast path: a padded 3-D tensor alone needs no normalisation.
    if (
        not isinstance(data, Tensor)
        or data.dim() + has_ids != 3
        or data.is_nested
        or call.hx is not None
        or call.reset is not None
    ):
        normalise(call, has_ids)
    if lengths is not None:
        call.sequence_layout = as_sequence_layout(lengths, call.data, call.options)
    if call.dropout and len(call.weights) == ops.weights_per_layer(call.options):
        call.dropout = 0.0
    if torch._C._is_any_autocast_enabled():
        call.weights = [cast_like_autocast(w) for w in call.weights]
        call.hx = None if call.hx is None else cast_like_autocast(call.hx)
        if lookup is None:
            call.data = cast_like_autocast(call.data)
        else:
            lookup = lookup._replace(embedding=cast_like_autocast(lookup.embedding))
    if call.hx is not None:
        dtype = call.data.dtype if lookup is None else lookup.embedding.dtype
        if call.hx.dtype != dtype and {call.hx.dtype, dtype} <= _CONVERTIBLE:
            call.hx = call.hx.to(dtype)
    if lookup is not None:
        tokens.look_up(call, lookup)
    output, h_n = dispatch.run(call)
    return output, h_n, call.options


def option_bits(
    weights: Sequence[Tensor],
    bias: bool,
    bidirectional: bool,
    nonlinearity: str,
    batch_first: bool,
) -> int:
    """Returns the option bits of a call, having checked the number of weights."""
    options = ops.BIAS if bias else 0
    if bidirectional:
        options |= ops.BIDIRECTIONAL
    per_layer = ops.weights_per_layer(options)
    if not weights or len(weights) % per_layer:
        raise ValueError(
            f"weights must hold {per_layer} tensors for each layer (bias={bias}, "
            f"bidirectional={bidirectional}), got {len(weights)}"
        )
    if batch_first:
        options |= ops.BATCH_FIRST
    if nonlinearity == "relu":
        options |= ops.RELU
    elif nonlinearity != "tanh":
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return options


def cast_like_autocast(tensor: Tensor) -> Tensor:
    """Casts a tensor as autocast does for `nn.RNN`: to its lower precision, except float64."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
