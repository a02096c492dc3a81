"""`FusedLSTM`, `FusedLSTMCell`, `TokenLSTM` and `lstm()`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Arguments, Input, Lengths, normalise
from ..call.options import option_bits
from ..cells import LSTM
from ..functional import run
from ..machine.context import autocast_is_on
from .base.layer import GatedLayer
from .base.step_module import FusedCell
from .base.token_layer import GatedTokenLayer


class FusedLSTM(GatedLayer[tuple[Tensor, Tensor]], torch.nn.LSTM):
    """A drop-in for `torch.nn.LSTM` that runs whole sequences in one operator on a CPU.

    As in `torch.nn.LSTM`, each step computes::

        i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    The constructor, parameters, `state_dict`, initialisation, errors and results of `forward` match
    `torch.nn.LSTM`. Every call reads the current parameters; nothing is cached.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedGRU`.
        bidirectional, device, dtype, batch_invariant, recompute: as in `FusedGRU`.
        proj_size: 0, or a number of features less than hidden_size. If it is not 0, the layer
            computes h_t = W_hr (o * tanh(c_t)). Output and every h then have proj_size features.

    Example:
        >>> layer = FusedLSTM(8, 16, batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(3, 5, 8), lengths=[2, 5, 0])
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]), torch.Size([1, 3, 16]))
    """

    _cell = LSTM


class FusedLSTMCell(FusedCell[tuple[Tensor, Tensor]], torch.nn.LSTMCell):
    """A drop-in for `torch.nn.LSTMCell`: one step of `torch.nn.LSTM`.

    The constructor, parameters, `state_dict`, initialisation, errors and results match
    `torch.nn.LSTMCell`. The fused kernel runs in the same cases as in `FusedGRUCell`, except
    under autocast.

    Example:
        >>> cell = FusedLSTMCell(8, 16)
        >>> h, c = cell(torch.randn(3, 8), (torch.zeros(3, 16), torch.zeros(3, 16)))
        >>> h.shape, c.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    _cell = LSTM

    def _why_slower(self, input: Tensor) -> str | None:
        if autocast_is_on():  # autocast treats cells and layers differently
            return "autocast is on"
        return super()._why_slower(input)


class TokenLSTM(GatedTokenLayer[tuple[Tensor, Tensor]]):
    """An `nn.Embedding` followed by a `FusedLSTM`: computes `rnn(embedding(ids))` with less work.

    Works like `TokenRNN`, but has no argument `nonlinearity`. `proj_size` is as in `FusedLSTM`. As
    in `TokenRNN`, the recurrent layer is the module `rnn`.

    Example:
        >>> model = TokenLSTM(31, 8, 16, padding_idx=0)
        >>> h_n, c_n = model.last_state(torch.randint(1, 31, (5, 3)))
        >>> h_n.shape, c_n.shape
        (torch.Size([1, 3, 16]), torch.Size([1, 3, 16]))
    """

    rnn: FusedLSTM
    _cell, _layer_class = LSTM, FusedLSTM


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
    projections: bool = False,
    batch_invariant: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, Tensor] | None = None,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
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
            hidden_size). Then weight_hh is (4 * hidden_size, proj_size). The output, and h in hx,
            reset_to and h_n, have proj_size features, fewer than hidden_size.
        reset: as in `rnn()`; a new episode also starts from a cell state of zeros.
        reset_to: the pair of states and cell states, each shaped like reset_to of `rnn()`.

    Returns:
        output, and the pair of h_n and c_n, each shaped like the tensors in hx.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as in `gru()`.
    """
    options = option_bits(
        LSTM,
        weights,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
        projections=projections,
        batch_invariant=batch_invariant,
    )
    arguments = Arguments(input, hx, lengths, reset, reset_to, embedding, padding_idx)
    return run(arguments, normalise(arguments, LSTM, weights, options, dropout * training))
