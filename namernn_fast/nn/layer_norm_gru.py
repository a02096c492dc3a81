"""`FusedLayerNormGRU`, `FusedLayerNormGRUCell` and `TokenLayerNormGRU`."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .equation import RecurrentCell, recurrent_cell
from .equation_modules import EquationCell, EquationLayer, TokenEquationLayer

Gates = Sequence[Tensor]


@functools.cache
def layer_norm_gru(eps: float = 1e-5) -> RecurrentCell:
    """Returns the cell whose norm adds `eps` to variances."""

    @recurrent_cell(gates=3, gate_parameters={"gain": 1.0, "shift": 0.0})
    def layer_norm_gru(x: Gates, u: Gates, h: Tensor, gain: Gates, shift: Gates) -> Tensor:
        sums = torch.cat([a + b for a, b in zip(x, u, strict=True)], -1)
        weights = torch.cat([*gain]), torch.cat([*shift])
        r, n, z = F.layer_norm(sums, sums.shape[-1:], *weights, eps).chunk(3, -1)
        z = torch.sigmoid(z - 1)
        return z * torch.tanh(torch.sigmoid(r) * n) + (1 - z) * h

    return layer_norm_gru


class FusedLayerNormGRU(EquationLayer):
    """The GRU of Dreamer, with one norm over all gates. On a CPU, runs in one operator.

    Each step computes::

        r, n, z = norm(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) * gain + shift
        z = sigmoid(z - 1)
        h_t = z * tanh(sigmoid(r) * n) + (1 - z) * h_{t-1}

    norm subtracts the mean of a row of 3 * hidden_size values, all gates together, and divides by
    its standard deviation. The order of the gates and the roles of z and 1 - z differ from
    `FusedGRU`; W_ih and W_hh are the columns of Dreamer's single matrix for x and h. See D. Hafner,
    J. Pasukonis, J. Ba, T. Lillicrap: Mastering Diverse Domains through World Models,
    arXiv:2301.04104, 2023. Calls, states, other parameters and their initialisation are as in
    `FusedGRU`. The parameters `gain_l0` and `shift_l0` and so on are (3, hidden_size). Dreamer's
    product has no bias: pass bias=False for its parameters.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedGRU`.
        bidirectional, device, dtype, batch_invariant, recompute: as in `FusedGRU`.
        own: `eps`, added to variances, 1e-5 by default and 1e-3 in Dreamer; initial values of gain
            and shift, as in `EquationLayer`; and whether they require gradients, as `train_gain`
            and `train_shift`.

    Example:
        >>> layer = FusedLayerNormGRU(8, 16, bias=False, eps=1e-3)
        >>> output, h_n = layer(torch.randn(5, 3, 8))
        >>> output.shape, layer.gain_l0.shape
        (torch.Size([5, 3, 16]), torch.Size([3, 16]))
    """

    _equation = staticmethod(layer_norm_gru)


class FusedLayerNormGRUCell(EquationCell):
    """One step of a `FusedLayerNormGRU`.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `FusedGRUCell`.
        own: as in `FusedLayerNormGRU`.

    Example:
        >>> FusedLayerNormGRUCell(8, 16)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    _equation = staticmethod(layer_norm_gru)


class TokenLayerNormGRU(TokenEquationLayer):
    """An `nn.Embedding` followed by a `FusedLayerNormGRU`; works like `TokenGRU`.

    Example:
        >>> model = TokenLayerNormGRU(31, 8, 16, padding_idx=0)
        >>> model.last_state(torch.randint(1, 31, (5, 3))).shape
        torch.Size([1, 3, 16])
    """

    rnn: FusedLayerNormGRU
    _layer_class = FusedLayerNormGRU
