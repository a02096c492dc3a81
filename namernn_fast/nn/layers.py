"""`FusedRNN`, `FusedGRU`, `FusedLSTM`: torch's recurrent layers on the fused operators.

`FusedLeakyRNN` is a layer that torch lacks.
"""

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.types import Device

from ..cells import GRU, LEAKY, LSTM, VANILLA
from ..integrations.compile import allow_tracing
from ..integrations.flops import count_flops
from ..integrations.fx import make_leaves
from .fused_layer import FusedLayer
from .states import States
from .weights import reset_all_but_rates, set_rate


class FusedRNN(FusedLayer[Tensor], torch.nn.RNN):
    """A drop-in for `torch.nn.RNN` that runs whole sequences in one operator.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), where act is tanh or relu. The
    constructor, parameters, `state_dict`, initialisation, errors and results of `forward` match
    `torch.nn.RNN`. Every call reads the parameters: nothing is cached that could go stale.

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

    Example:
        >>> layer = FusedRNN(8, 16, batch_first=True)
        >>> output, h_n = layer(torch.randn(3, 5, 8), lengths=[2, 5, 0])
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]))
    """

    _cell = VANILLA

    # Arguments are spelled out instead of **kwargs for `help`, and because `skip_init` looks for
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
        **refused: NoReturn,  # nn.RNN rejects unknown arguments with its own message
    ) -> None:
        if proj_size:
            refused["proj_size"] = proj_size
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **refused,
        )
        self.batch_invariant = batch_invariant


class _GatedLayer(FusedLayer[States]):
    """The base class of the layers of cells with gates, which defines their constructor."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        batch_invariant: bool = False,
        **refused: NoReturn,  # torch's layers reject unknown arguments with their own message
    ) -> None:
        if proj_size:
            refused["proj_size"] = proj_size  # type: ignore[assignment]
        init: Any = super().__init__  # of torch's layer
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout
        init(*sizes, bidirectional, device=device, dtype=dtype, **refused)
        self.batch_invariant = batch_invariant


class FusedGRU(_GatedLayer[Tensor], torch.nn.GRU):
    """A drop-in for `torch.nn.GRU` that runs whole sequences in one operator on a CPU.

    As in `torch.nn.GRU`, each step computes::

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    The constructor, parameters, `state_dict`, initialisation, errors and results of `forward` match
    `torch.nn.GRU`. Every call reads the parameters: nothing is cached that could go stale.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedRNN`.
        bidirectional, proj_size, batch_invariant: as in `FusedRNN`.
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


class FusedLSTM(_GatedLayer[tuple[Tensor, Tensor]], torch.nn.LSTM):
    """A drop-in for `torch.nn.LSTM` that runs whole sequences in one operator on a CPU.

    As in `torch.nn.LSTM`, each step computes::

        i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    The constructor, parameters, `state_dict`, initialisation, errors and results of `forward` match
    `torch.nn.LSTM`. Every call reads the parameters: nothing is cached that could go stale.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedGRU`.
        bidirectional, device, dtype, batch_invariant: as in `FusedGRU`.
        proj_size: number of features of h, less than hidden_size: h_t = W_hr (o * tanh(c_t)), and
            output and h in hx, h_n and reset_to have proj_size features. 0 for no projection.

    Example:
        >>> layer = FusedLSTM(8, 16, batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(3, 5, 8), lengths=[2, 5, 0])
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]), torch.Size([1, 3, 16]))
    """

    _cell = LSTM


class FusedLeakyRNN(FusedLayer[tuple[Tensor, Tensor]]):
    """A leaky RNN, which computational neuroscience trains, in one operator on a CPU.

    Each step computes::

        v_t = (1 - a) * v_{t-1} + a * (W_ih x_t + b_ih + W_hh r_{t-1} + b_hh) + noise_t
        r_t = act(v_t)

    The output is r. The states, in `hx` and returned, are the pair of r and v. Both are zeros by
    default, even if act(0) is not 0. Calls, other parameters and their initialisation are as in
    `FusedLSTM`. The parameters `rate_l0` and so on, (hidden_size), hold the logits of a, so that a
    stays between 0 and 1 in training.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedRNN`.
        nonlinearity: act: "tanh", "relu", "sigmoid" or "softplus".
        bidirectional, device, batch_invariant: as in `FusedRNN`.
        dtype: the dtype of the parameters.
        rate: the initial a, above 0 and at most 1: a number, or (hidden_size) numbers. It is the
            time of a step divided by the time constant of the neurons.
        train_rate: whether the rates require gradients.

    Example:
        >>> layer = FusedLeakyRNN(8, 16, rate=0.2)
        >>> x, noise = torch.randn(5, 3, 8), 0.1 * torch.randn(5, 3, 16)
        >>> output, (r_n, v_n) = layer(x, noise=noise)
        >>> output.shape, r_n.shape, v_n.shape
        (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]), torch.Size([1, 3, 16]))
    """

    _cell = LEAKY

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
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rate: float | Sequence[float] | Tensor = 0.1,
        train_rate: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout
        super().__init__("RNN_TANH", *sizes, bidirectional, device=device, dtype=dtype)
        self.nonlinearity, self.batch_invariant = nonlinearity, batch_invariant
        for names in self._all_weights:
            names.append(names[0].replace("weight_ih", "rate"))
            set_rate(self, names[-1], rate, train_rate)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        for name in self._flat_weights_names:  # parameters() has the order that leaky() takes
            self._parameters[name] = self._parameters.pop(name)
        self._init_flat_weights()
        self._options(self._weights())  # refuses an unknown nonlinearity

    def _nonlinearity(self) -> str:
        return self.nonlinearity

    def reset_parameters(self) -> None:
        """Draws all parameters except the rates anew, as the constructor does."""
        reset_all_but_rates(self)

    def flatten_parameters(self) -> None:
        """No-op: cuDNN has no such layer."""


LAYERS: dict[str, type[Any]] = {
    cls._cell.name: cls for cls in (FusedRNN, FusedGRU, FusedLSTM, FusedLeakyRNN)
}
"""The layer of each cell, by the name of the cell."""

allow_tracing(*LAYERS.values())
make_leaves(*LAYERS.values())
count_flops()
