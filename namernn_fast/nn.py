"""The modules: `torch.nn.RNN` and `torch.nn.RNNCell` with the fused operator underneath."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .functional import rnn
from .integrations.compile import allow_tracing


def _current(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Returns the tensors of these names: parameters, or what parametrizations compute of them.

    A look-up in `_parameters` costs a tenth of `getattr`.
    """
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]  # type: ignore[misc]
    except KeyError:
        return [getattr(module, name) for name in names]


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
    """

    batch_invariant: bool = False

    # `device` is an argument by name because `torch.nn.utils.skip_init` requires that.
    def __init__(self, *args, batch_invariant: bool = False, device=None, dtype=None, **kwargs):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.batch_invariant = batch_invariant

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input, hx=None, *, lengths=None, reset=None):
        """Runs the layer over whole sequences.

        Args:
            input: (seq_len, batch, input_size), (batch, seq_len, input_size) with batch_first,
                (seq_len, input_size) for one sequence, a PackedSequence, sorted or not, or a jagged
                nested tensor (batch, any length, input_size).
            hx: (num_layers * num_directions, batch, hidden_size), without the batch for one
                sequence; None for zeros.
            lengths: the number of steps of each sequence of a padded input, (batch), from 0 to
                seq_len in any order. Padding is neither read nor computed, and is zero in output.
            reset: bool (seq_len, batch), (batch, seq_len) with batch_first: set where a new episode
                begins, which starts from a state of zeros.

        Returns:
            output: like input with num_directions * hidden_size features, and h_n, like hx.

        Raises:
            TypeError, ValueError, RuntimeError: as of `namernn_fast.rnn`, which documents all
                arguments in more detail.

        Note:
            Ctrl-C during a call raises KeyboardInterrupt when the call returns, as in `nn.RNN`:
            split a sequence that takes minutes, and pass h_n on as hx. In a process forked from a
            process with threads the CPU kernel runs on one thread.
        """
        return rnn(
            input,
            hx,
            _current(self, self._flat_weights_names),
            nonlinearity=self.nonlinearity,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            training=self.training,
            lengths=lengths,
            reset=reset,
            batch_invariant=self.batch_invariant,
        )


allow_tracing(FusedRNN)


class FusedRNNCell(torch.nn.RNNCell):
    """A drop-in for `torch.nn.RNNCell`: one step, h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh).

    Constructor, parameters, `state_dict`, initialisation and errors are those of
    `torch.nn.RNNCell`.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Returns the next state, (batch, hidden_size), or (hidden_size) for one row.

        Args:
            input: (batch, input_size), or (input_size).
            hx: (batch, hidden_size), or (hidden_size); None for zeros.

        Raises:
            ValueError: input or hx has neither 1 nor 2 dimensions, or another dtype than the
                weights.
            RuntimeError: a size or device does not fit, or the nonlinearity is unknown.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else hx.unsqueeze(0)
        if input.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[1]} "
                f"expected {self.input_size}"
            )
        if hx is not None:
            if hx.shape[-1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden0 has inconsistent hidden_size: got {hx.shape[-1]}, "
                    f"expected {self.hidden_size}"
                )
            if hx.shape[0] != input.shape[0]:
                raise RuntimeError(
                    f"Input batch size {input.shape[0]} doesn't match hidden0 batch size "
                    f"{hx.shape[0]}"
                )
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        _, h_n = rnn(
            input.unsqueeze(0),
            None if hx is None else hx.unsqueeze(0),
            _current(self, names),
            nonlinearity=self.nonlinearity,
            bias=self.bias,
        )
        return h_n[0] if batched else h_n[0, 0]


_FUSED = {torch.nn.RNN: FusedRNN, torch.nn.RNNCell: FusedRNNCell}


def replace_rnn(model: torch.nn.Module) -> torch.nn.Module:
    """Turns every `nn.RNN` and `nn.RNNCell` in `model`, or `model` itself, into its fused class.

    The modules stay the same objects; only their class changes. So parameters, buffers, hooks,
    training flags and all references to modules stay as they are. Subclasses of `nn.RNN` and
    `nn.RNNCell` are left alone, since they may override anything.

    Args:
        model: any module.

    Returns:
        `model`, for chaining.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]
    return model
