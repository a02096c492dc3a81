"""`FusedRNN`, `FusedRNNCell`, `TokenRNN` and `rnn()`."""

from collections.abc import Sequence
from typing import Literal, NoReturn

import torch
from torch import Tensor
from torch.types import Device

from ..call import Arguments, Input, Lengths, normalise
from ..call.options import option_bits
from ..cells import VANILLA
from ..functional import run
from .base.layer import FusedLayer
from .base.step_module import FusedCell
from .base.token_layer import TokenLayer
from .weights import arguments_of


class FusedRNN(FusedLayer[Tensor], torch.nn.RNN):
    """A drop-in for `torch.nn.RNN` that runs whole sequences in one operator.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), where act is tanh or relu. The
    constructor, parameters, `state_dict`, initialisation, errors and results of `forward` match
    `torch.nn.RNN`. Every call reads the current parameters; nothing is cached.

    Args:
        input_size: number of input features at each step.
        hidden_size: number of features of the state.
        num_layers: number of stacked layers.
        nonlinearity: "tanh" or "relu".
        bias: whether the layers have bias_ih and bias_hh.
        batch_first: whether input and output are (batch, seq_len, features).
        dropout: probability of zeroing an element between layers, in training mode.
        bidirectional: whether every layer also runs backward, from the end of each sequence.
        proj_size: must be 0. This argument keeps `device` in its position in `torch.nn.RNN`.
        device, dtype: the device and dtype of the parameters. The fused kernel takes 16- to 64-bit
            floating-point types on a CPU, and 16- and 32-bit types on a GPU; everything else runs
            as ATen operators. `namernn_fast.explain` says which path an input takes.
        batch_invariant: whether the results of a sequence must be bit-identical however it is
            batched, as within `namernn_fast.batch_invariant()`.
        recompute: the number of steps between the states that training keeps. The backward pass
            computes everything else again. None keeps everything. Supports one direction only.

    Example:
        >>> layer = FusedRNN(8, 16, batch_first=True)
        >>> output, h_n = layer(torch.randn(3, 5, 8), lengths=[2, 5, 0])
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]))
    """

    _cell = VANILLA

    # Lists the arguments instead of **kwargs for `help`, and because `skip_init` needs an argument
    # `device`.
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Literal[0] = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        batch_invariant: bool = False,
        recompute: int | None = None,
        **refused: NoReturn,  # nn.RNN rejects unknown arguments with its own message
    ) -> None:
        super().__init__(**arguments_of(locals()))


class FusedRNNCell(FusedCell[Tensor], torch.nn.RNNCell):
    """A drop-in for `torch.nn.RNNCell`: one step, h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh).

    The constructor, parameters, `state_dict`, initialisation, errors and results match
    `torch.nn.RNNCell`. On a CPU in float32 and float64, the fused kernel runs in inference if it is
    faster than torch's own cell. It also runs for batch invariance and `vmap`, which torch's cell
    does not support. `namernn_fast.explain` says which path an input takes.

    Example:
        >>> cell = FusedRNNCell(8, 16)
        >>> cell(torch.randn(3, 8), torch.zeros(3, 16)).shape
        torch.Size([3, 16])
    """

    _cell = VANILLA


class TokenRNN(TokenLayer[Tensor]):
    """An `nn.Embedding` followed by a `FusedRNN`: computes `rnn(embedding(ids))` with less work.

    If the vocabulary is small, each row of the embedding is multiplied by weight_ih once instead of
    once per token. `last_state` returns only the last states, and can compute the common prefixes
    of sequences once.

    The parts are the modules `embedding` and `rnn`. They are called separately, without these
    shortcuts, if the embedding has hooks or one of the options max_norm, scale_grad_by_freq and
    sparse. The same applies if a part was replaced with a module that has another `forward`.

    Args:
        num_embeddings: the size of the vocabulary.
        input_size: number of features of an embedding row.
        hidden_size, num_layers, nonlinearity, bias, batch_first: as in `FusedRNN`.
        dropout, bidirectional, batch_invariant, recompute: as in `FusedRNN`.
        padding_idx: the row of the embedding that is initialised to zeros and gets no gradient.
        device, dtype: the device and dtype of the parameters.

    Example:
        >>> model = TokenRNN(31, 8, 16, padding_idx=0)
        >>> ids = torch.randint(1, 31, (5, 3))
        >>> torch.allclose(model.last_state(ids), model(ids)[1], atol=1e-6)
        True
    """

    rnn: FusedRNN
    _cell, _layer_class = VANILLA, FusedRNN

    def __init__(
        self,
        num_embeddings: int,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        padding_idx: int | None = None,
        batch_invariant: bool = False,
        recompute: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))


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
    batch_invariant: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Input, Tensor]:
    """Applies a vanilla RNN of one or more layers to whole sequences.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), as `torch.nn.RNN` defines it.

    Args:
        input: (seq_len, batch, input_size), with batch_first (batch, seq_len, input_size), without
            a batch (seq_len, input_size), a PackedSequence, sorted or not, or a jagged nested
            tensor (batch, any length, input_size). seq_len must be at least 1 except in a jagged
            tensor. With `embedding`, int32 or int64 token ids, without the last dimension.
        hx: initial states (num_layers * num_directions, batch, hidden_size), in the order of the
            input's sequences; without a batch (num_layers * num_directions, hidden_size); None for
            zeros. A float32 or 16-bit hx is converted to the dtype of input, which h_n also has.
        weights: for each layer and direction weight_ih (hidden_size, features), weight_hh
            (hidden_size, hidden_size) and, with bias, bias_ih and bias_hh (hidden_size). The number
            of weights determines the number of layers.
        nonlinearity, batch_first, dropout, bidirectional, batch_invariant: as in `FusedRNN`.
        bias: whether `weights` holds biases.
        training: whether dropout is applied.
        lengths: the number of steps of each sequence of a padded input, (batch): integers from 0 to
            seq_len in any order, as a tensor of any integer dtype on any device, an array or a
            list. Padding is not computed, and its values are ignored, even NaN; output is zero
            there. The last state of a sequence of length 0 is its initial state.
        reset: bool (seq_len, batch), laid out like input: (batch, seq_len) with batch_first,
            (seq_len) without a batch. True where a new episode starts from a state of zeros, as if
            the sequence had been split there; the second direction runs each episode from its end.
            For a PackedSequence, pass reset padded, with the sequences in their original order.
        reset_to: the states that episodes start from instead of zeros, laid out like reset:
            (seq_len, num_layers, batch, hidden_size), (batch, seq_len, num_layers, hidden_size)
            with batch_first. Read only where reset is True; at the first step it replaces hx.
            A float32 or 16-bit reset_to is converted to the dtype of h_n. Needs one direction.
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
            autocast); the dimensions of input or embedding, padding_idx, nonlinearity or the number
            of weights is wrong; input of this layout cannot have lengths or reset; reset_to is
            given without reset, or with two directions.
        IndexError: a token id is out of range. On an accelerator a device-side assertion fails.
        RuntimeError: a size, a device or the dtype of hx or reset_to does not match; seq_len is 0;
            batch_sizes increase or do not sum to the rows of data; a length is not between 0 and
            seq_len (not checked on an accelerator, where this would wait); batch_invariant is set,
            but the call runs on a GPU or as ATen operators; Triton or the GPU is too old.
    """
    options = option_bits(
        VANILLA,
        weights,
        nonlinearity=nonlinearity,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
        batch_invariant=batch_invariant,
    )
    arguments = Arguments(input, hx, lengths, reset, reset_to, embedding, padding_idx)
    return run(arguments, normalise(arguments, VANILLA, weights, options, dropout * training))
