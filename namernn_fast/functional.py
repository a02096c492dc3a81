"""`rnn()` and `last_state()`: the layer as a function of input, initial states and weights."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops, tokens, transfers
from .checks import check_reset, hint_at_embedding

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
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
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
    dropout = dropout if training else 0.0
    output, h_n, options = _run(
        input, hx, weights, lengths, reset, options, dropout, embedding, padding_idx, False
    )
    return _restore(input, output, h_n, options, embedding is not None)


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
    lengths: Tensor | Sequence[int] | None = None,
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
    dropout = dropout if training else 0.0
    if share_prefixes and embedding is None:
        tokens.refuse_to_share("input holds no token ids")
    _, h_n, options = _run(
        input, hx, weights, lengths, reset, options, dropout, embedding, padding_idx, share_prefixes
    )
    return _restore_states(input, h_n, options, embedding is not None)


def _run(
    input, hx, weights, lengths, reset, options, dropout, embedding, padding_idx, share_prefixes
):
    """Returns output and h_n as the operators return them, and the options of the call."""
    if embedding is not None:
        tokens.check_types(input, embedding)
    elif padding_idx is not None:
        raise ValueError(f"padding_idx={padding_idx} goes with embedding, which is None")
    # The usual input is what the operators take, and a function call is dear.
    data, sequence_layout = input, None
    has_ids = embedding is not None
    if (
        not isinstance(input, Tensor)
        or input.dim() + has_ids != 3
        or input.is_nested
        or hx is not None
        or reset is not None
    ):
        data, hx, sequence_layout, reset, options = normalise(
            input, hx, weights, reset, options, has_ids
        )
    if lengths is not None:
        sequence_layout = _as_sequence_layout(lengths, data, options)
    if dropout and len(weights) == ops.weights_per_layer(options):
        dropout = 0.0
    rows = data if embedding is None else embedding
    if torch._C._is_any_autocast_enabled():
        rows = cast_like_autocast(rows)
        hx = None if hx is None else cast_like_autocast(hx)
        weights = [cast_like_autocast(w) for w in weights]
    if hx is not None and hx.dtype != rows.dtype and {hx.dtype, rows.dtype} <= _CONVERTIBLE:
        hx = hx.to(rows.dtype)
    if embedding is not None:
        rows, weights, options = tokens.look_up(
            data,
            rows,
            padding_idx,
            hx,
            weights,
            sequence_layout,
            reset,
            options,
            dropout,
            share_prefixes,
        )
    output, h_n = dispatch.run(rows, hx, weights, sequence_layout, reset, options, dropout)
    return output, h_n, options


def option_bits(weights, bias, bidirectional, nonlinearity, batch_first) -> int:
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


def normalise(input, hx, weights, reset, options, has_ids):
    """Returns data, hx, sequence_layout, reset and options, as the operators take them.

    `has_ids` says whether input holds token ids, which have no dimension of features.
    """
    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"hx must be a Tensor or None, got {type(hx).__name__}")
    packed = isinstance(input, PackedSequence)
    if not packed and not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    if hx is not None and hx.dim() != 3 and (packed or input.is_nested):
        raise RuntimeError(f"hx must have 3 dimensions, got {hx.dim()}")
    if packed:
        return _normalise_packed(input, hx, weights, reset, options, has_ids)
    if reset is not None:
        check_reset(reset, input.is_nested)
    if input.is_nested:
        _check_jagged(input, has_ids)
        return input.values(), hx, input.offsets().long(), reset, options | ops.JAGGED
    dim = input.dim() + has_ids
    if dim == 3:
        if hx is not None and hx.dim() != 3:
            raise RuntimeError(
                f"For batched {input.dim()}-D input, hx should be 3-D but got {hx.dim()}-D tensor"
                if has_ids
                else f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor"
            )
        return input, hx, None, reset, options
    if dim != 2:
        _refuse_dimensions(input, has_ids)
    batch_dim = 0 if options & ops.BATCH_FIRST else 1
    if hx is not None:
        if hx.dim() != 2:
            raise RuntimeError(
                f"For unbatched 1-D input, hx should be 2-D but got {hx.dim()}-D tensor"
                if has_ids
                else f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor"
            )
        hx = hx.unsqueeze(1)
    reset = None if reset is None else reset.unsqueeze(batch_dim)
    return input.unsqueeze(batch_dim), hx, None, reset, options


def _refuse_dimensions(input: Tensor, has_ids: bool) -> NoReturn:
    """Raises the error of a padded input that has the wrong number of dimensions."""
    if has_ids:
        raise ValueError(
            "input with embedding holds token ids, which must have 1 or 2 dimensions, got "
            f"{input.dim()}"
        )
    raise ValueError(
        f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead"
        + hint_at_embedding(input)
    )


def _normalise_packed(input: PackedSequence, hx, weights, reset, options, has_ids):
    """`normalise` for a PackedSequence: hx and reset come into the order of its data."""
    data, batch_sizes, sorted_indices, _ = input
    options |= ops.PACKED
    if reset is not None:
        check_reset(reset, is_jagged=False)
    if sorted_indices is not None:
        if reset is not None:
            reset = reset.index_select(0 if options & ops.BATCH_FIRST else 1, sorted_indices)
        if hx is not None:
            hx = hx.index_select(1, sorted_indices)
        elif torch.compiler.is_compiling():
            # A tracer must know the batch as a size: in batch_sizes it is a value, at which a
            # graph breaks.
            states = ops.layer_count(weights, options) * ops.directions_of(options)
            hx = weights[1].new_zeros(states, sorted_indices.shape[0], weights[1].shape[0])
    if data.dim() + has_ids != 2:
        raise RuntimeError(f"input must have {2 - has_ids} dimensions, got {data.dim()}")
    return data, hx, batch_sizes, reset, options


def _check_jagged(input, has_ids: bool) -> None:
    """Checks that a nested tensor is jagged (batch, any length, features) and without holes.

    Token ids have no dimension of features.
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
            f"{input.dim()} dimensions, of which number {input._ragged_idx} is jagged"
        )
    if input.lengths() is not None:
        raise ValueError("a jagged input must have no holes, which input.contiguous() removes")


def _as_sequence_layout(lengths, data, options) -> Tensor:
    """Returns lengths as the operators take them: int64, on the device of input.

    Nothing waits for that device.
    """
    if options & (ops.PACKED | ops.JAGGED):
        raise ValueError(
            "lengths go with a padded input; a PackedSequence or a jagged tensor has its own"
        )
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, device="cpu")  # a copy, which nobody can change
        if not lengths.numel():  # no value says which type it has
            lengths = lengths.long()
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.is_cpu and data.is_cuda and not torch.compiler.is_compiling():
        return transfers.to_gpu(lengths.long(), data.device, "lengths")
    return lengths.to(data.device, torch.int64, non_blocking=True)


def cast_like_autocast(tensor: Tensor) -> Tensor:
    """Casts a tensor as autocast does for `nn.RNN`: to its lower precision, except float64."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _restore(input, output, h_n, options, has_ids):
    """Returns output and h_n in the layout of `input`."""
    if options & ops.PACKED:
        output = PackedSequence(output, *input[1:])
    elif options & ops.JAGGED:
        output = torch.nested.nested_tensor_from_jagged(output, input.offsets())
    elif input.dim() + has_ids == 2:
        output = output.squeeze(0 if options & ops.BATCH_FIRST else 1)
    else:
        return output, h_n
    return output, _restore_states(input, h_n, options, has_ids)


def _restore_states(input, h_n, options, has_ids):
    """Returns h_n in the layout of `input`."""
    if options & ops.PACKED:
        order = input.unsorted_indices
        return h_n if order is None else h_n.index_select(1, order)
    return h_n.squeeze(1) if input.dim() + has_ids == 2 and not options & ops.JAGGED else h_n
