"""`FusedSLSTM`, `FusedSLSTMCell`, `TokenSLSTM` and `slstm()`."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..call import Arguments, normalise
from ..functional import run
from .equation import RecurrentCell, recurrent_cell
from .equation_modules import EquationCell, EquationLayer, TokenEquationLayer


@functools.cache
def slstm_cell() -> RecurrentCell:
    """Returns the cell."""

    @recurrent_cell(gates=4, states=4, heads=True)
    def slstm(
        x: Sequence[Tensor], u: Sequence[Tensor], h: Tensor, c: Tensor, n: Tensor, m: Tensor
    ) -> tuple[Tensor, ...]:
        i, f, z, o = (a + b for a, b in zip(x, u, strict=True))
        f = F.logsigmoid(f) + m
        m = torch.where(n == 0, i, torch.maximum(i, f))
        # f may exceed m in the first step, where it multiplies zeros.
        i, f = torch.exp(i - m), torch.exp(torch.clamp(f - m, max=0))
        c = f * c + i * torch.tanh(z)
        n = torch.clamp(f * n + i, min=1)
        return torch.sigmoid(o) * c / n, c, n, m

    return slstm


class FusedSLSTM(EquationLayer):
    """The sLSTM of xLSTM: exponential gates, and a state that normalises c.

    Each step computes::

        i, f, z, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        m_t = max(logsigmoid(f) + m_{t-1}, i), or i if n_{t-1} is 0
        c_t = exp(logsigmoid(f) + m_{t-1} - m_t) * c_{t-1} + exp(i - m_t) * tanh(z)
        n_t = exp(logsigmoid(f) + m_{t-1} - m_t) * n_{t-1} + exp(i - m_t), and at least 1
        h_t = sigmoid(o) * c_t / n_t

    m prevents the exponentials from overflowing, and cancels out in h. The lower bound of n only
    matters if the initial n is between 0 and 1. See M. Beck, K. Pöppel, M. Spanring and others:
    xLSTM: Extended Long Short-Term Memory, arXiv:2405.04517, 2024. On a CPU, whole sequences run in
    one operator. Calls, parameters and their initialisation are as in
    `FusedGRU`, with the gates in the order i, f, z, o. `hx` and the returned states are (h, c, n,
    m). Several heads make W_hh block-diagonal: weight_hh_l0 is (4 * hidden_size, hidden_size /
    heads). The paper starts with large biases of f; `weight_ih_l0` and the biases here are drawn
    as in `FusedGRU`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedGRU`.
        bidirectional, device, dtype, batch_invariant, recompute: as in `FusedGRU`.
        own: `heads`, the number of heads, which divides hidden_size, 1 by default.

    Example:
        >>> layer = FusedSLSTM(8, 16, heads=4)
        >>> output, (h_n, c_n, n_n, m_n) = layer(torch.randn(5, 3, 8))
        >>> output.shape, layer.weight_hh_l0.shape
        (torch.Size([5, 3, 16]), torch.Size([64, 4]))
    """

    _equation = staticmethod(slstm_cell)


class FusedSLSTMCell(EquationCell):
    """One step of a `FusedSLSTM`.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `FusedGRUCell`.
        own: as in `FusedSLSTM`.

    Example:
        >>> h, c, n, m = FusedSLSTMCell(8, 16, heads=4)(torch.randn(3, 8))
        >>> h.shape
        torch.Size([3, 16])
    """

    _equation = staticmethod(slstm_cell)


class TokenSLSTM(TokenEquationLayer):
    """An `nn.Embedding` followed by a `FusedSLSTM`; works like `TokenGRU`.

    Example:
        >>> model = TokenSLSTM(31, 8, 16, heads=2, padding_idx=0)
        >>> model.last_state(torch.randint(1, 31, (5, 3)))[0].shape
        torch.Size([1, 3, 16])
    """

    rnn: FusedSLSTM
    _layer_class = FusedSLSTM


def slstm(
    Wx: Tensor,  # noqa: N803 - the names of flashrnn
    R: Tensor,  # noqa: N803
    b: Tensor,
    states: Tensor | None = None,
    *,
    recurrent_shape: str = "GHDP",
    bias_shape: str = "GHD",
) -> tuple[Tensor, Tensor]:
    """Applies an sLSTM to sums W x that the caller has computed, as flashrnn's function does.

    In the shapes below G stands for the gates i, f, z, o; H for heads, D for units of a head, P for
    previous units of a head, equal to D.

    Args:
        Wx: (batch, steps, G, H, D).
        R: the recurrent weights, (G, H, D, P), or in the order of `recurrent_shape`.
        b: the biases, (G, H, D), or in the order of `bias_shape`.
        states: the initial h, c, n and m, (4, batch, 1, H, D); None for zeros.
        recurrent_shape, bias_shape: the order of the dimensions of R and b, in the letters above.

    Returns:
        h of every step, (batch, steps, H, D), and the last states, (4, batch, 1, H, D).

    Raises:
        ValueError: a shape does not match the others, or an order lacks a letter.

    Example:
        >>> Wx, R, b = torch.randn(3, 5, 4, 2, 8), torch.randn(4, 2, 8, 8), torch.zeros(4, 2, 8)
        >>> h, last = slstm(Wx, R, b)
        >>> h.shape, last.shape
        (torch.Size([3, 5, 2, 8]), torch.Size([4, 3, 1, 2, 8]))
    """
    for name, order, letters in (
        ("recurrent_shape", recurrent_shape, "GHDP"),
        ("bias_shape", bias_shape, "GHD"),
    ):
        if sorted(order) != sorted(letters):
            raise ValueError(f"{name} must be an order of the letters {letters}, got {order!r}")
    if Wx.dim() != 5 or Wx.shape[2] != 4:
        raise ValueError(f"Wx must be (batch, steps, 4, heads, D), got {(*Wx.shape,)}")
    batch, _, gates, heads, size = Wx.shape
    weight_hh = R.permute([recurrent_shape.index(letter) for letter in "GHDP"])
    bias = b.permute([bias_shape.index(letter) for letter in "GHD"])
    shapes = {"R": (weight_hh, (gates, heads, size, size)), "b": (bias, (gates, heads, size))}
    if states is not None:
        shapes["states"] = states, (gates, batch, 1, heads, size)
    for name, (tensor, wanted) in shapes.items():
        if tensor.shape != wanted:
            raise ValueError(f"{name} must be {wanted} to match Wx, got {(*tensor.shape,)}")
    hx = None if states is None else states.flatten(3).transpose(1, 2).unbind()
    bias = bias.flatten()
    weights = weight_hh.flatten(0, 2), bias, torch.zeros_like(bias)
    arguments = Arguments(Wx.flatten(2), hx)
    options = ops.SUMS | ops.BIAS | ops.BATCH_FIRST
    output, last = run(arguments, normalise(arguments, slstm_cell()._cell, weights, options, 0.0))
    last = torch.stack(last).transpose(1, 2).unflatten(3, (heads, size))
    return output.unflatten(2, (heads, size)), last
