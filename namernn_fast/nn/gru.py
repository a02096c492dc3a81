"""`FusedGRU`, `FusedGRUCell`, `TokenGRU` and `gru()`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Arguments, Input, Lengths, normalise
from ..call.options import option_bits
from ..cells import GRU
from ..functional import run
from .base.layer import GatedLayer
from .base.step_module import FusedCell
from .base.token_layer import GatedTokenLayer


class FusedGRU(GatedLayer[Tensor], torch.nn.GRU):
    """A drop-in for `torch.nn.GRU` that runs whole sequences in one operator on a CPU.

    As in `torch.nn.GRU`, each step computes::

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    The constructor, parameters, `state_dict`, initialisation, errors and results of `forward` match
    `torch.nn.GRU`. Every call reads the current parameters; nothing is cached.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedRNN`.
        bidirectional, proj_size, batch_invariant, recompute: as in `FusedRNN`.
        device, dtype: the device and dtype of the parameters. The fused kernel takes 16- to 64-bit
            floating-point types on a CPU. On every other device torch's own operator runs, which
            uses cuDNN on NVIDIA GPUs. `namernn_fast.explain` says which path an input takes.

    Example:
        >>> layer = FusedGRU(8, 16, batch_first=True)
        >>> output, h_n = layer(torch.randn(3, 5, 8), lengths=[2, 5, 0])
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]))
    """

    _cell = GRU


class FusedGRUCell(FusedCell[Tensor], torch.nn.GRUCell):
    """A drop-in for `torch.nn.GRUCell`: one step of `torch.nn.GRU`.

    The constructor, parameters, `state_dict`, initialisation, errors and results match
    `torch.nn.GRUCell`. On a CPU in float32 and float64, the fused kernel runs if it is faster than
    torch's own cell, as for most sizes in inference. It also runs for batch invariance and `vmap`,
    which torch's cell does not support. `namernn_fast.explain` says which path an input takes.

    Example:
        >>> cell = FusedGRUCell(8, 16)
        >>> cell(torch.randn(3, 8), torch.zeros(3, 16)).shape
        torch.Size([3, 16])
    """

    _cell = GRU


class TokenGRU(GatedTokenLayer[Tensor]):
    """An `nn.Embedding` followed by a `FusedGRU`: computes `rnn(embedding(ids))` with less work.

    Works like `TokenRNN`, but has no argument `nonlinearity`. `proj_size` must be 0. As in
    `TokenRNN`, the recurrent layer is the module `rnn`.

    Example:
        >>> model = TokenGRU(31, 8, 16, padding_idx=0)
        >>> ids = torch.randint(1, 31, (5, 3))
        >>> torch.allclose(model.last_state(ids), model(ids)[1], atol=1e-6)
        True
    """

    rnn: FusedGRU
    _cell, _layer_class = GRU, FusedGRU


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
    batch_invariant: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
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
    options = option_bits(
        GRU,
        weights,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
        batch_invariant=batch_invariant,
    )
    arguments = Arguments(input, hx, lengths, reset, reset_to, embedding, padding_idx)
    return run(arguments, normalise(arguments, GRU, weights, options, dropout * training))
