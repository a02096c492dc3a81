"""`FusedLayerNormLSTM`, `FusedLayerNormLSTMCell` and `TokenLayerNormLSTM`."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .equation import RecurrentCell, recurrent_cell
from .equation_modules import EquationCell, EquationLayer, TokenEquationLayer

Gates = Sequence[Tensor]


@functools.cache
def layer_norm_lstm(eps: float = 1e-5) -> RecurrentCell:
    """Returns the cell whose norms add `eps` to variances."""

    def norm(blocks: Gates, gain: Gates, shift: Gates | None = None) -> Tensor:
        rows = torch.cat([*blocks], -1)
        shifts = None if shift is None else torch.cat([*shift])
        return F.layer_norm(rows, rows.shape[-1:], torch.cat([*gain]), shifts, eps)

    @recurrent_cell(
        gates=4,
        states=2,
        gate_parameters={"gain_ih": 1.0, "gain_hh": 1.0, "shift": 0.0},
        parameters={"gain_c": 1.0, "shift_c": 0.0},
    )
    def layer_norm_lstm(
        x: Gates,
        u: Gates,
        h: Tensor,
        c: Tensor,
        gain_ih: Gates,
        gain_hh: Gates,
        shift: Gates,
        gain_c: Tensor,
        shift_c: Tensor,
    ) -> tuple[Tensor, Tensor]:
        i, f, g, o = (norm(x, gain_ih) + norm(u, gain_hh, shift)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(norm([c], [gain_c], [shift_c])), c

    return layer_norm_lstm


class FusedLayerNormLSTM(EquationLayer):
    """An LSTM that normalises W_ih x, W_hh h and c. On a CPU, runs in one operator.

    Each step computes::

        i, f, g, o = norm(W_ih x_t + b_ih) * gain_ih + norm(W_hh h_{t-1} + b_hh) * gain_hh + shift
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(norm(c_t) * gain_c + shift_c)

    norm subtracts the mean of a row and divides by its standard deviation. A row has 4 *
    hidden_size values for the gates, all gates together, and hidden_size values for c. This is the
    LSTM of J. L. Ba, J. R. Kiros, G. E. Hinton: Layer Normalization, arXiv:1607.06450, 2016. Calls,
    states, other parameters and their initialisation are as in `FusedLSTM`. The gains `gain_ih_l0`,
    `gain_hh_l0` and the shift `shift_l0` are (4, hidden_size), `gain_c_l0` and `shift_c_l0`
    (hidden_size). The paper's products have no biases: pass bias=False for its parameters.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedGRU`.
        bidirectional, device, dtype, batch_invariant, recompute: as in `FusedGRU`.
        own: `eps`, added to variances, 1e-5 by default; initial values of the gains and shifts,
            by name, as in `EquationLayer`; and whether they require gradients, as `train_<name>`.

    Example:
        >>> layer = FusedLayerNormLSTM(8, 16, bias=False)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 8))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]))
    """

    _equation = staticmethod(layer_norm_lstm)


class FusedLayerNormLSTMCell(EquationCell):
    """One step of a `FusedLayerNormLSTM`.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `FusedGRUCell`.
        own: as in `FusedLayerNormLSTM`.

    Example:
        >>> h, c = FusedLayerNormLSTMCell(8, 16)(torch.randn(3, 8))
        >>> h.shape, c.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    _equation = staticmethod(layer_norm_lstm)


class TokenLayerNormLSTM(TokenEquationLayer):
    """An `nn.Embedding` followed by a `FusedLayerNormLSTM`; works like `TokenGRU`.

    Example:
        >>> model = TokenLayerNormLSTM(31, 8, 16, padding_idx=0)
        >>> model.last_state(torch.randint(1, 31, (5, 3)))[0].shape
        torch.Size([1, 3, 16])
    """

    rnn: FusedLayerNormLSTM
    _layer_class = FusedLayerNormLSTM
