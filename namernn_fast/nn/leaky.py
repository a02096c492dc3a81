"""`FusedLeakyRNN`, `FusedLeakyRNNCell`, `TokenLeakyRNN` and `leaky()`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.types import Device

from ..call import Arguments, Input, Lengths, normalise
from ..call.options import option_bits
from ..cells import LEAKY
from ..functional import run
from .base.layer import CustomLayer
from .base.step_module import CustomStepModule
from .base.token_layer import TokenLayer
from .weights import arguments_of


class _HasRates(torch.nn.Module):
    """What `FusedLeakyRNN` and `FusedLeakyRNNCell` share."""

    def __init__(self, *, rate: Any, train_rate: bool, **more: Any) -> None:
        super().__init__(rate=rate, train_rate=train_rate, **more)
        if train_rate and bool((torch.as_tensor(rate, device="cpu").float() == 1).any()):
            raise ValueError(
                "rate must be below 1 with train_rate=True, because a rate of 1 gets no gradient: "
                f"got {rate}"
            )

    @property
    def rates(self) -> Tensor:
        """The rates a, the sigmoids of the logits that the module holds.

        (num_layers * num_directions, hidden_size) of a layer, in the order of h_n; (hidden_size) of
        a step module. They get gradients if the rates are trained.
        """
        names: Sequence[str] = self._weight_names()  # type: ignore[operator]
        logits = [getattr(self, name) for name in names if name.startswith("rate")]
        is_layer = hasattr(self, "num_layers")
        return (torch.stack(logits) if is_layer else logits[0]).sigmoid()

    def extra_repr(self) -> str:
        """Returns the sizes, the options, and the smallest and largest rate, for `repr`."""
        text = super().extra_repr()
        rates = self.rates.detach()
        if type(rates) is not Tensor or rates.is_meta or not rates.numel():
            return text  # no values to read, as in fake tensors
        smallest, largest = f"{rates.min():.3g}", f"{rates.max():.3g}"
        shown = smallest if smallest == largest else f"{smallest} to {largest}"
        return f"{text}, rate={shown}"


class FusedLeakyRNN(_HasRates, CustomLayer[tuple[Tensor, Tensor]]):
    """A leaky RNN, as trained in computational neuroscience. On a CPU, runs in one operator.

    Each step computes::

        v_t = (1 - a) * v_{t-1} + a * (W_ih x_t + b_ih + W_hh r_{t-1} + b_hh) + noise_t
        r_t = act(v_t)

    The output is r. `hx` and the returned states are the pair of r and v. Both are zeros by
    default, even if act(0) is not 0. Calls, other parameters and their initialisation are as in
    `FusedLSTM`. The parameters `rate_l0` and so on, (hidden_size), hold the logits of a, so that a
    stays between 0 and 1 in training; `rates` is a.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedRNN`.
        nonlinearity: the function act: "tanh", "relu", "sigmoid" or "softplus".
        bidirectional, device, batch_invariant, recompute: as in `FusedRNN`.
        dtype: the dtype of the parameters.
        rate: the initial a, above 0 and at most 1, as one number or (hidden_size) numbers. a is the
            duration of a step divided by the time constant of the neurons.
        train_rate: whether the rates require gradients. The initial a must then be below 1.

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
        recompute: int | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))


class FusedLeakyRNNCell(_HasRates, CustomStepModule[tuple[Tensor, Tensor]]):
    """One step of a `FusedLeakyRNN`, run by the fused operator or, without a kernel, by PyTorch.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as in `FusedRNNCell`, with the
            nonlinearities of `FusedLeakyRNN`.
        rate, train_rate: as in `FusedLeakyRNN`. The parameter `rate` holds the logits.

    Example:
        >>> cell = FusedLeakyRNNCell(8, 16)
        >>> r, v = cell(torch.randn(3, 8), noise=torch.randn(3, 16))
        >>> r.shape, v.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    _cell = LEAKY

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rate: float | Sequence[float] | Tensor = 0.1,
        train_rate: bool = False,
    ) -> None:
        super().__init__(**arguments_of(locals()))


class TokenLeakyRNN(TokenLayer[tuple[Tensor, Tensor]]):
    """An `nn.Embedding` followed by a `FusedLeakyRNN`; works like `TokenRNN`.

    Args:
        num_embeddings, input_size, padding_idx: as in `TokenRNN`.
        sizes, options: hidden_size and all options, as in `FusedLeakyRNN`.
        device, dtype: the device and dtype of the parameters.

    Example:
        >>> model = TokenLeakyRNN(31, 8, 16, padding_idx=0)
        >>> r_n, v_n = model.last_state(torch.randint(1, 31, (5, 3)))
        >>> r_n.shape, v_n.shape
        (torch.Size([1, 3, 16]), torch.Size([1, 3, 16]))
    """

    rnn: FusedLeakyRNN
    _cell, _layer_class = LEAKY, FusedLeakyRNN


def leaky(
    input: Input,
    hx: tuple[Tensor, Tensor] | None,
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
    reset_to: tuple[Tensor, Tensor] | None = None,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
    noise: Input | None = None,
) -> tuple[Input, tuple[Tensor, Tensor]]:
    """Applies a leaky RNN of one or more layers to sequences; `FusedLeakyRNN` has the equation.

    Args:
        input: as in `rnn()`.
        hx: the pair of initial r and v, each shaped like hx of `rnn()`; None for zeros in both,
            even if act(0) is not 0.
        weights: as in `rnn()`, with rate (hidden_size) as the last weight of each direction.
        nonlinearity: "tanh", "relu", "sigmoid" or "softplus".
        bias, .., padding_idx: as in `lstm()`, with r and v instead of h and c.
        noise: added to v, laid out like input, with num_layers * num_directions * hidden_size
            features: the noise of each layer and direction, in the order of h_n. With hidden_size
            features, all layers and directions share it. Converted to the dtype of input. It may
            require a gradient.

    Returns:
        output, which holds r, and the pair of the last r and v, each shaped like the tensors in hx.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as in `gru()`, or noise is not laid out
            like input. On a GPU, this function runs step by step.
    """
    options = option_bits(
        LEAKY,
        weights,
        nonlinearity=nonlinearity,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
        batch_invariant=batch_invariant,
    )
    arguments = Arguments(
        input, hx, lengths, reset, reset_to, embedding, padding_idx, {"noise": noise}
    )
    return run(arguments, normalise(arguments, LEAKY, weights, options, dropout * training))
