"""The modules: `torch.nn.RNN` and `torch.nn.RNNCell` with the fused operator underneath."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import tokens
from .functional import batch_invariant_is_on, last_state, rnn
from .integrations.compile import allow_tracing
from .integrations.flops import count_flops
from .integrations.fx import make_leaves
from .integrations.nn_rnn import must_serve, plain_twin
from .layouts import Input, Lengths


def _current(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Returns the tensors of these names: parameters, or what parametrizations compute of them.

    A look-up in `_parameters` costs a tenth of `getattr`.
    """
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]  # type: ignore[misc]
    except KeyError:
        return [getattr(module, name) for name in names]


def what_else_runs(module: torch.nn.Module) -> str | None:
    """Returns what a call of a module runs besides the `forward` of its class, or None."""
    if "forward" in module.__dict__:
        return "a forward of its own"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "hooks"
    return "global hooks" if _has_any_global_hook() else None


class FusedRNN(torch.nn.RNN):
    """A drop-in for `torch.nn.RNN` that runs the whole sequence of a layer in one operator.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), with act tanh or relu. Constructor,
    parameters, `state_dict`, initialisation, errors and the results of `forward` are those of
    `torch.nn.RNN`. Parameters are read at every call: nothing is cached that could go stale.

    Args:
        input_size: features of an input row.
        hidden_size: features of a state.
        num_layers: layers stacked on one another.
        nonlinearity: "tanh" or "relu".
        bias: whether there are bias_ih and bias_hh.
        batch_first: whether input and output are (batch, seq_len, features).
        dropout: probability of zeroing an element between layers, while training.
        bidirectional: whether every layer also runs from the end of the sequences.
        device, dtype: of the parameters. On a CPU, types of 16 to 64 bits take the fused kernel,
            on a GPU types of 16 and 32 bits; everything else takes ATen operators.
            `namernn_fast.explain` says which path an input takes.
        batch_invariant: whether the bits of a sequence's results must not depend on how it is
            batched, as within `namernn_fast.batch_invariant()`.

    Example:
        >>> layer = FusedRNN(8, 16, batch_first=True)
        >>> output, h_n = layer(torch.randn(3, 5, 8), lengths=[2, 5, 0])
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]))
    """

    batch_invariant: bool = False

    # Named one by one, so that `help` and `skip_init`, which looks for `device`, find them.
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
        *,
        batch_invariant: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **refused: NoReturn,  # by nn.RNN, with its own message
    ) -> None:
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

    # Every argument may come by position, since torch's older ONNX exporter hands over a None for
    # every parameter.
    def forward(
        self,
        input: Input,
        hx: Tensor | None = None,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        embedding: Tensor | None = None,
        padding_idx: int | None = None,
    ) -> tuple[Input, Tensor]:
        """Runs the layer over whole sequences.

        Args:
            input: (seq_len, batch, input_size), (batch, seq_len, input_size) with batch_first,
                (seq_len, input_size) for one sequence, a PackedSequence, sorted or not, or a jagged
                nested tensor (batch, any length, input_size). With `embedding` token ids, int32 or
                int64: any of these without input_size.
            hx: (num_layers * num_directions, batch, hidden_size), without the batch for one
                sequence; None for zeros.
            lengths: the number of steps of each sequence of a padded input, (batch), from 0 to
                seq_len in any order. Padding is neither read nor computed, and is zero in output.
            reset: bool (seq_len, batch), (batch, seq_len) with batch_first: set where a new episode
                begins, which starts from a state of zeros.
            embedding: (vocabulary, input_size), the rows that token ids stand for. `TokenRNN` is a
                layer with an embedding of its own.
            padding_idx: a row of `embedding` that gets no gradient, as in `nn.Embedding`.

        Returns:
            output: like input with num_directions * hidden_size features, and h_n, like hx.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as of `namernn_fast.rnn`, which
                documents all arguments in more detail.

        Note:
            Ctrl-C during a call raises KeyboardInterrupt when the call returns, as in `nn.RNN`:
            split a sequence that takes minutes, and pass h_n on as hx. In a process forked from a
            process with threads the CPU kernel runs on one thread. TorchScript records the
            operators of `nn.RNN`, which run at any length.
        """
        weights = _current(self, self._flat_weights_names)
        unusual = (  # asked here, since a call costs as much as all these questions
            type(input) is not Tensor
            or type(weights[0]) is not torch.nn.Parameter
            or (hx is not None and type(hx) is not Tensor)
            or torch._C._get_tracing_state() is not None  # quicker than torch.jit.is_tracing
        )
        if unusual and must_serve(input, hx, weights, lengths is None and reset is None):
            return self._as_nn_rnn(input, hx, embedding, padding_idx)
        return rnn(
            input,
            hx,
            weights,
            nonlinearity="tanh" if self.mode == "RNN_TANH" else "relu",  # as `nn.RNN` reads it
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            training=self.training,
            lengths=lengths,
            reset=reset,
            batch_invariant=self.batch_invariant,
            embedding=embedding,
            padding_idx=padding_idx,
        )

    if TYPE_CHECKING:  # torch declares that a call returns anything
        __call__ = forward

    def last_state(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        *,
        embedding: Tensor | None = None,
        padding_idx: int | None = None,
        share_prefixes: bool | None = None,
    ) -> Tensor:
        """Returns h_n of `forward`, without its output.

        A layer with hooks, or with a `forward` set on the object, is called, so that these run.

        Args:
            input, hx, lengths, reset, embedding, padding_idx: as of `forward`.
            share_prefixes: whether sequences of token ids that begin alike share the states of what
                they have in common, as `namernn_fast.last_state` says; None where that pays.

        Returns:
            h_n: (num_layers * num_directions, batch, hidden_size), without the batch for one
            sequence.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as of `namernn_fast.last_state`.
        """
        what_else = what_else_runs(self)
        if what_else is not None:
            if share_prefixes:
                tokens.refuse_to_share(f"the layer has {what_else}")
            return self(input, hx, lengths, reset, embedding, padding_idx)[1]
        weights = _current(self, self._flat_weights_names)
        if must_serve(input, hx, weights, lengths is None and reset is None):
            if share_prefixes:
                tokens.refuse_to_share("the operators of nn.RNN compute the call")
            return self._as_nn_rnn(input, hx, embedding, padding_idx)[1]
        return last_state(
            input,
            hx,
            weights,
            share_prefixes=share_prefixes,
            nonlinearity="tanh" if self.mode == "RNN_TANH" else "relu",
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            training=self.training,
            lengths=lengths,
            reset=reset,
            batch_invariant=self.batch_invariant,
            embedding=embedding,
            padding_idx=padding_idx,
        )

    def _as_nn_rnn(
        self, input: Any, hx: Tensor | None, embedding: Tensor | None, padding_idx: int | None
    ) -> tuple[Any, Tensor]:
        """Returns what the operators of `nn.RNN` compute."""
        self._refuse_if_invariant()
        if embedding is not None:
            input = tokens.gather_any(input, embedding, padding_idx)
        return super().forward(input, hx)

    def __prepare_scriptable__(self) -> torch.nn.RNN:
        """Returns what `torch.jit.script` compiles in place of this module."""
        self._refuse_if_invariant()
        return self if type(self) not in PLAIN else plain_twin(self, PLAIN[FusedRNN])

    def _refuse_if_invariant(self) -> None:
        """Checks that the operators of `nn.RNN`, which must serve, may serve."""
        if self.batch_invariant or batch_invariant_is_on():
            raise RuntimeError(
                "batch_invariant needs the fused kernel, but TorchScript, expanded weights and "
                "objects that stand for tensors take the operators of nn.RNN"
            )


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_STEPS = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}


class FusedRNNCell(torch.nn.RNNCell):
    """A drop-in for `torch.nn.RNNCell`: one step, h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh).

    Constructor, parameters, `state_dict`, initialisation, errors and results are those of
    `torch.nn.RNNCell`, whose operators compute a step: the fused kernel gains over a sequence. It
    serves for what those operators lack, batch invariance and `vmap`. `namernn_fast.explain` says
    which path an input takes.

    Example:
        >>> cell = FusedRNNCell(8, 16)
        >>> cell(torch.randn(3, 8), torch.zeros(3, 16)).shape
        torch.Size([3, 16])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Returns the next state, (batch, hidden_size), or (hidden_size) for one row.

        Args:
            input: (batch, input_size), or (input_size).
            hx: (batch, hidden_size), or (hidden_size); None for zeros.

        Raises:
            ValueError: input or hx has neither 1 nor 2 dimensions.
            RuntimeError: a size, dtype or device does not fit, or the nonlinearity is unknown.
        """
        weights = _current(self, _CELL_WEIGHTS)
        if self.why_not_fused(input, hx, weights) is None:
            _, h_n = rnn(
                input.unsqueeze(0),
                None if hx is None else hx.unsqueeze(0),
                weights if self.bias else weights[:2],
                nonlinearity=self.nonlinearity,
                bias=self.bias,
            )
            # In place, since a view made under no_grad could not be changed in place afterwards.
            return h_n.squeeze(0) if torch.is_grad_enabled() else h_n.squeeze_(0)
        step = _STEPS.get(self.nonlinearity)
        if step is None or input.dim() != 2 or (hx is not None and hx.dim() != 2):
            return super().forward(input, hx)
        if hx is None:
            hx = input.new_zeros(input.shape[0], self.hidden_size)
        return step(input, hx, *weights)

    if TYPE_CHECKING:  # torch declares that a call returns anything

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...

    def why_not_fused(
        self, input: Tensor, hx: Tensor | None = None, weights: Sequence[Tensor] | None = None
    ) -> str | None:
        """Returns why a call takes torch's own cell, or None if it takes `namernn_fast.rnn`.

        Args:
            input, hx: of the call.
            weights: the current weights of this cell, if they are at hand.
        """
        # torch's own cell promises no bits, and has no rule for `vmap`.
        if not (batch_invariant_is_on() or torch._C._are_functorch_transforms_active()):
            return "torch's own cell is as fast for a single step"
        weights = _current(self, _CELL_WEIGHTS) if weights is None else weights
        if not self._fits(input, hx, weights[0]):
            return "nn.RNNCell has the errors of arguments that do not fit"
        return None

    def _fits(self, input: Tensor, hx: Tensor | None, weight_ih: Tensor) -> bool:
        """Returns whether shapes and dtypes fit, as far as the errors of the layer would differ."""
        batch, dtype = input.shape[:-1], input.dtype
        return (
            self.nonlinearity in _STEPS
            and len(batch) in (0, 1)
            and input.dim() > 0
            and input.shape[-1] == self.input_size
            and input.layout == torch.strided
            and (dtype == weight_ih.dtype or torch._C._is_any_autocast_enabled())
            and (hx is None or (hx.shape == (*batch, self.hidden_size) and hx.dtype == dtype))
        )

    def __prepare_scriptable__(self) -> torch.nn.RNNCell:
        """Returns what `torch.jit.script` compiles in place of this module."""
        return self if type(self) not in PLAIN else plain_twin(self, PLAIN[FusedRNNCell])


allow_tracing(FusedRNN)
make_leaves(FusedRNN, FusedRNNCell)
count_flops()

FUSED: dict[type, type] = {torch.nn.RNN: FusedRNN, torch.nn.RNNCell: FusedRNNCell}
"""The fused class of each class of torch."""
PLAIN = {fused: plain for plain, fused in FUSED.items()}
"""The class of torch for each fused class."""
