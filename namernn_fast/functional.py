"""`rnn()`: the layer as a function of input, initial states and weights."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops
from .checks import check_reset

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
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Applies a vanilla RNN of one or more layers to whole sequences; `FusedRNN` calls this.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), as `torch.nn.RNN` defines it.

    Args:
        input: (seq_len, batch, input_size), with batch_first (batch, seq_len, input_size), without
            a batch (seq_len, input_size), a PackedSequence, sorted or not, or a jagged nested
            tensor (batch, any length, input_size). seq_len must be at least 1, except in a jagged
            tensor; the batch may be empty. Any strides.
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

    Returns:
        output: the last layer's states at every step, like input with num_directions * hidden_size
        features (a PackedSequence for a PackedSequence, jagged for jagged), and h_n, like hx: the
        last state of every layer and direction.

    Raises:
        TypeError: input or hx is no tensor, lengths holds other things than integers, reset is no
            bool tensor.
        ValueError: the dtype of input is not that of the weights (outside autocast), its number of
            dimensions is wrong, `weights` does not fit the options, nonlinearity is unknown,
            lengths or reset come with an input that they do not go with.
        RuntimeError: a size, device or the dtype of hx does not fit; seq_len is 0; the batch_sizes
            of a packed sequence increase or do not sum to its rows; a length is not from 0 to
            seq_len; batch_invariant is wanted of ATen operators or on a GPU, which cannot promise
            it; on a GPU, Triton is missing or too old, or the GPU is.
    """
    options = _option_bits(weights, bias, bidirectional, nonlinearity, batch_first)
    if batch_invariant or _batch_invariant:
        options |= ops.BATCH_INVARIANT
    data, hx, sequence_layout, reset, options = _normalise(input, hx, weights, reset, options)
    if lengths is not None:
        sequence_layout = _as_sequence_layout(lengths, data, options)
    if torch._C._is_any_autocast_enabled():
        data = cast_like_autocast(data)
        hx = None if hx is None else cast_like_autocast(hx)
        weights = [cast_like_autocast(w) for w in weights]
    if hx is not None and hx.dtype != data.dtype and {hx.dtype, data.dtype} <= _CONVERTIBLE:
        hx = hx.to(data.dtype)
    if dropout and (not training or len(weights) == ops.weights_per_layer(options)):
        dropout = 0.0
    output, h_n = dispatch.run(data, hx, weights, sequence_layout, reset, options, dropout)
    return _restore(input, output, h_n, options)


def _option_bits(weights, bias, bidirectional, nonlinearity, batch_first) -> int:
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


def _normalise(input, hx, weights, reset, options):
    """Returns data, hx, sequence_layout, reset and options, as the operators take them."""
    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"hx must be a Tensor or None, got {type(hx).__name__}")
    packed = isinstance(input, PackedSequence)
    if not packed and not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    if hx is not None and hx.dim() != 3 and (packed or input.is_nested):
        raise RuntimeError(f"hx must have 3 dimensions, got {hx.dim()}")
    if packed:
        return _normalise_packed(input, hx, weights, reset, options)
    if reset is not None:
        check_reset(reset, input.is_nested)
    if input.is_nested:
        _check_jagged(input)
        return input.values(), hx, input.offsets().long(), reset, options | ops.JAGGED
    dim = input.dim()
    if dim == 3:
        if hx is not None and hx.dim() != 3:
            raise RuntimeError(
                f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor"
            )
        return input, hx, None, reset, options
    if dim != 2:
        raise ValueError(f"RNN: Expected input to be 2D or 3D, got {dim}D tensor instead")
    batch_dim = 0 if options & ops.BATCH_FIRST else 1
    if hx is not None:
        if hx.dim() != 2:
            raise RuntimeError(
                f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor"
            )
        hx = hx.unsqueeze(1)
    reset = None if reset is None else reset.unsqueeze(batch_dim)
    return input.unsqueeze(batch_dim), hx, None, reset, options


def _normalise_packed(input: PackedSequence, hx, weights, reset, options):
    """`_normalise` for a PackedSequence: hx and reset come into the order of its data."""
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
            hx = data.new_zeros(states, sorted_indices.shape[0], weights[1].shape[0])
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    return data, hx, batch_sizes, reset, options


def _check_jagged(input) -> None:
    """Checks that a nested tensor is jagged (batch, any length, features) and without holes."""
    if input.layout != torch.jagged:
        raise ValueError(
            "a nested input must have layout=torch.jagged, got torch.strided: make it with "
            "torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    if input.dim() != 3 or input._ragged_idx != 1:
        raise ValueError(
            "a jagged input must be (batch, jagged steps, features), got "
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
    return lengths.to(data.device, torch.int64, non_blocking=True)


def cast_like_autocast(tensor: Tensor) -> Tensor:
    """Casts a tensor as autocast does for `nn.RNN`: to its lower precision, except float64."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _restore(input, output, h_n, options):
    """Returns output and h_n in the layout of `input`."""
    if options & ops.PACKED:
        if input.unsorted_indices is not None:
            h_n = h_n.index_select(1, input.unsorted_indices)
        return PackedSequence(output, *input[1:]), h_n
    if options & ops.JAGGED:
        return torch.nested.nested_tensor_from_jagged(output, input.offsets()), h_n
    if input.dim() == 2:
        return output.squeeze(0 if options & ops.BATCH_FIRST else 1), h_n.squeeze(1)
    return output, h_n
