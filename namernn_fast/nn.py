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
    """Returns the weights with these names, computed first if they are parametrized.

    Reads `_parameters` because that takes a tenth of the time of `getattr`.
    """
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]  # type: ignore[misc]
    except KeyError:
        return [getattr(module, name) for name in names]


def what_else_runs(module: torch.nn.Module) -> str | None:
    """Returns what calling a module runs besides the `forward` of its class, or None."""
    if "forward" in module.__dict__:
        return "a forward set on the object"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "hooks"
    return "global hooks" if _has_any_global_hook() else None


class FusedRNN(torch.nn.RNN):
    """A drop-in for `torch.nn.RNN` that runs whole sequences in one operator.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), where act is tanh or relu. The
    constructor, parameters, `state_dict`, initialisation, errors and results of `forward` are those
    of `torch.nn.RNN`. Every call reads the parameters: nothing is cached that could go stale.

    Args:
        input_size: number of input features at each step.
        hidden_size: number of features of the state.
        num_layers: number of stacked layers.
        nonlinearity: "tanh" or "relu".
        bias: whether the layers have bias_ih and bias_hh.
        batch_first: whether input and output are (batch, seq_len, features).
        dropout: probability of zeroing an element between layers, in training mode.
        bidirectional: whether every layer also runs from the end of the sequences.
        device, dtype: of the parameters. The fused kernel takes 16- to 64-bit floating-point types
            on a CPU, and 16- and 32-bit types on a GPU; everything else runs as ATen operators.
            `namernn_fast.explain` says which path an input takes.
        batch_invariant: whether the results of a sequence must be bit-identical however it is
            batched, as within `namernn_fast.batch_invariant()`.

    Example:
        >>> layer = FusedRNN(8, 16, batch_first=True)
        >>> output, h_n = layer(torch.randn(3, 5, 8), lengths=[2, 5, 0])
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]))
    """

    batch_invariant: bool = False

    # Spelled out instead of **kwargs for `help`, and for `skip_init`, which looks for `device`.
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
        **refused: NoReturn,  # nn.RNN rejects them with its own message
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

    # No argument is keyword-only: torch's older ONNX exporter passes None for each by position.
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
                nested tensor (batch, any length, input_size). With `embedding`, int32 or int64
                token ids: any of these without the last dimension.
            hx: (num_layers * num_directions, batch, hidden_size), without the batch for one
                sequence; None for zeros.
            lengths: the number of steps of each sequence of a padded input, (batch), from 0 to
                seq_len in any order. Padding is neither read nor computed; output is zero there.
            reset: bool (seq_len, batch), or (batch, seq_len) with batch_first: True where a new
                episode begins, which starts from a state of zeros.
            embedding: (vocabulary, input_size), the rows that token ids index. `TokenRNN` is a
                layer that owns its embedding.
            padding_idx: a row of `embedding` that gets no gradient, as in `nn.Embedding`.

        Returns:
            output: like input with num_directions * hidden_size features, and h_n, like hx.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as `namernn_fast.rnn`, which documents
                all arguments in more detail.

        Note:
            Ctrl-C during a call raises KeyboardInterrupt when the call returns, as in `nn.RNN`:
            split a sequence that takes minutes, and pass h_n on as hx. In a process forked from a
            multithreaded one, the CPU kernel runs on one thread. TorchScript records the operators
            of `nn.RNN`, which run at any length.
        """
        weights = _current(self, self._flat_weights_names)
        unusual = (  # Tested inline: together these tests cost no more than one function call.
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
            nonlinearity="tanh" if self.mode == "RNN_TANH" else "relu",  # `nn.RNN` reads mode too
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

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
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
        """Returns only h_n of `forward`; in inference the output is never written.

        If the layer has hooks or a `forward` set on the object, it is called so that they run.

        Args:
            input, hx, lengths, reset, embedding, padding_idx: as in `forward`.
            share_prefixes: whether to compute common prefixes of token ids once; see
                `namernn_fast.last_state`. None: if that is expected to be faster.

        Returns:
            h_n: (num_layers * num_directions, batch, hidden_size), without the batch for one
            sequence.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as `namernn_fast.last_state`.
        """
        what_else = what_else_runs(self)
        if what_else is not None:
            if share_prefixes:
                tokens.refuse_to_share(f"the layer has {what_else}")
            return self(input, hx, lengths, reset, embedding, padding_idx)[1]
        weights = _current(self, self._flat_weights_names)
        if must_serve(input, hx, weights, lengths is None and reset is None):
            if share_prefixes:
                tokens.refuse_to_share("this call runs on the operators of nn.RNN")
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
        """Computes the call with the operators of `nn.RNN`."""
        self._refuse_if_invariant()
        if embedding is not None:
            input = tokens.gather_any(input, embedding, padding_idx)
        return super().forward(input, hx)

    def __prepare_scriptable__(self) -> torch.nn.RNN:
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        self._refuse_if_invariant()
        return self if type(self) not in PLAIN else plain_twin(self, PLAIN[FusedRNN])

    def _refuse_if_invariant(self) -> None:
        """Raises an error if batch_invariant is on, which the operators of `nn.RNN` do not have."""
        if self.batch_invariant or batch_invariant_is_on():
            raise RuntimeError(
                "batch_invariant needs the fused kernel, but TorchScript, expanded weights and "
                "tensor-like objects run on the operators of nn.RNN"
            )


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_STEPS = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}


class FusedRNNCell(torch.nn.RNNCell):
    """A drop-in for `torch.nn.RNNCell`: one step, h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh).

    The constructor, parameters, `state_dict`, initialisation, errors and results are those of
    `torch.nn.RNNCell`. So are the operators, because the fused kernel is not faster for a single
    step; it runs only for batch invariance and `vmap`, which those operators do not support.
    `namernn_fast.explain` says which path an input takes.

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
            RuntimeError: a size, dtype or device does not match, or the nonlinearity is unknown.
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
            # Not a view: one made under no_grad could not be modified in place afterwards.
            return h_n.squeeze(0) if torch.is_grad_enabled() else h_n.squeeze_(0)
        step = _STEPS.get(self.nonlinearity)
        if step is None or input.dim() != 2 or (hx is not None and hx.dim() != 2):
            return super().forward(input, hx)
        if hx is None:
            hx = input.new_zeros(input.shape[0], self.hidden_size)
        return step(input, hx, *weights)

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...

    def why_not_fused(
        self, input: Tensor, hx: Tensor | None = None, weights: Sequence[Tensor] | None = None
    ) -> str | None:
        """Returns why a call runs torch's own cell, or None if it runs `namernn_fast.rnn`.

        Args:
            input, hx: of the call.
            weights: the current weights of this cell, if the caller has read them already.
        """
        # Torch's own cell is not batch-invariant and has no rule for `vmap`.
        if not (batch_invariant_is_on() or torch._C._are_functorch_transforms_active()):
            return "torch's own cell is as fast for a single step"
        weights = _current(self, _CELL_WEIGHTS) if weights is None else weights
        if not self._fits(input, hx, weights[0]):
            return "the arguments do not match, and nn.RNNCell raises its own errors"
        return None

    def _fits(self, input: Tensor, hx: Tensor | None, weight_ih: Tensor) -> bool:
        """Returns whether shapes and dtypes match; if not, nn.RNNCell must raise its own errors."""
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
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        return self if type(self) not in PLAIN else plain_twin(self, PLAIN[FusedRNNCell])


allow_tracing(FusedRNN)
make_leaves(FusedRNN, FusedRNNCell)
count_flops()

FUSED: dict[type, type] = {torch.nn.RNN: FusedRNN, torch.nn.RNNCell: FusedRNNCell}
"""Torch's classes and the fused class that replaces each."""
PLAIN = {fused: plain for plain, fused in FUSED.items()}
"""The fused classes and the torch class that each replaces."""
