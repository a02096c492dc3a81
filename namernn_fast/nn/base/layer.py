"""`FusedLayer`, the base class of the fused layers, and base classes with shared constructors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.types import Device

from ... import ops
from ...call import Arguments, Call, Input, Lengths, normalise, tokens
from ...call.options import batch_invariant_is_on, option_bits
from ...cells import Cell
from ...functional import run, run_last_state
from ...integrations.nn_rnn import is_exact, must_serve, plain_twin, refuse_script
from ...machine.context import jit_tracer
from ...recompute import check_recompute
from ..inference.prepared import PreparedLayer
from ..last_state import HasLastState
from ..states import States
from ..weights import (
    Preparable,
    arguments_of,
    check_forward,
    current_weights,
    draw_parameters,
    make_parameters,
    options_shown,
)


class FusedLayer(Preparable, torch.nn.RNNBase, HasLastState[States]):
    """The base class of the fused layers.

    A subclass inherits from this class first and then from torch's layer.
    """

    _cell: Cell
    batch_invariant: bool = False
    recompute: int | None = None

    # Subclasses list the arguments for `help`, and because `skip_init` needs an argument `device`.
    def __init__(
        self,
        *,
        batch_invariant: bool = False,
        recompute: int | None = None,
        proj_size: int = 0,
        **more: Any,
    ) -> None:
        if proj_size:
            more["proj_size"] = proj_size
        super().__init__(**more)
        self.batch_invariant = batch_invariant
        if recompute is not None:
            check_recompute(recompute, self.bidirectional)
            self.recompute = recompute

    def forward(
        self,
        input: Input,
        hx: States | None = None,
        lengths: Lengths | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        embedding: Tensor | None = None,
        padding_idx: int | None = None,
        **inputs: Input | None,
    ) -> tuple[Input, States]:
        """Runs the layer over whole sequences.

        Args:
            input: (seq_len, batch, input_size); with batch_first (batch, seq_len, input_size); for
                one sequence (seq_len, input_size). Or a PackedSequence, sorted or not. Or a jagged
                nested tensor (batch, any length, input_size). With `embedding`, int32 or int64
                token ids in any of these shapes without the last dimension.
            hx: (num_layers * num_directions, batch, hidden_size), without the batch for one
                sequence; None for zeros. A pair if the cell has two states: h_0 and c_0
                of an LSTM, r_0 and v_0 of a leaky layer.
            lengths: the number of steps of each sequence of a padded input, (batch), from 0 to
                seq_len in any order. Padding is neither read nor computed; output is zero there.
            reset: bool (seq_len, batch), or (batch, seq_len) with batch_first: True at the first
                step of each new episode, which starts from a state of zeros.
            reset_to: (seq_len, num_layers, batch, hidden_size), with batch_first (batch, seq_len,
                num_layers, hidden_size): the states that episodes start from where reset is True,
                instead of zeros. A pair if the cell has two states.
            embedding: (vocabulary, input_size), the rows that token ids index. `TokenRNN` is a
                layer that owns its embedding.
            padding_idx: a row of `embedding` that gets no gradient, as in `nn.Embedding`.
            inputs: other inputs of the cell. A leaky layer takes `noise`, laid out like input, with
                num_layers * num_directions * hidden_size features, and adds it to v.

        Returns:
            output: laid out like input, with num_directions * hidden_size features; and the last
            states, shaped like hx: h_n, or the pair of h_n and c_n. With proj_size, h and output
            have proj_size features instead of hidden_size.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as in `namernn_fast.rnn`, which
                documents all arguments in more detail.

        Note:
            Ctrl-C during a call raises KeyboardInterrupt when the call returns, as in `nn.RNN`. So
            split a sequence that takes minutes, and pass h_n of each call to the next call as hx.
            TorchScript records the operators of torch's layer, which accept sequences of any
            length.
        """
        arguments = Arguments(input, hx, lengths, reset, reset_to, embedding, padding_idx, inputs)
        weights = current_weights(self, self._flat_weights_names)
        unusual = (  # Tested inline: together these tests cost no more than one function call.
            type(input) is not Tensor
            or type(weights[0]) is not torch.nn.Parameter
            or (hx is not None and type(hx) is not Tensor)
            or jit_tracer() is not None
        )
        if unusual and must_serve(arguments, weights, self._cell):
            return self._as_torch(arguments)
        return run(arguments, self._call(arguments, weights))

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward

    def _last_state(self, arguments: Arguments) -> Any:
        check_forward(self)
        weights = current_weights(self, self._flat_weights_names)
        if must_serve(arguments, weights, self._cell):
            if arguments.share_prefixes:
                tokens.refuse_to_share(
                    f"this call runs on the operators of nn.{self._cell.torch_name}"
                )
            return self._as_torch(arguments)[1]
        return run_last_state(arguments, self._call(arguments, weights))

    def _call(self, arguments: Arguments, weights: Sequence[Tensor]) -> Call:
        """Converts arguments to the `Call` of this layer with these weights."""
        dropout = self.dropout if self.training else 0.0
        call = normalise(arguments, self._cell, weights, self._options(weights), dropout)
        if self.recompute is not None and torch.is_grad_enabled():
            call.recompute = self.recompute
        return call

    def _options(self, weights: Sequence[Tensor]) -> int:
        """Returns the option bits of calls with these weights."""
        bits = option_bits(
            self._cell,
            weights,
            nonlinearity=self._nonlinearity(),
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            projections=self.proj_size > 0,
            batch_invariant=self.batch_invariant,
        )
        return bits | self._more_options

    def _nonlinearity(self) -> str:
        return "relu" if self.mode == "RNN_RELU" else "tanh"  # torch's layer also reads `mode`

    def prepare(self, dtype: torch.dtype | None = None) -> PreparedLayer[States]:
        """Returns a copy of this layer for inference, whose weights are packed once.

        Calls of the copy are faster, because they pack no weights; short calls gain most. The
        results are bit-identical to this layer's, except in calls with few rows, for which this
        layer reads its weights in place. Later changes of this layer do not affect the copy until
        `refresh` copies the weights again.

        Args:
            dtype: None for the dtype of this layer, or torch.int8 for 8-bit weights, which need a
                layer in float32. Weights are then rounded to integers from -127 to 127, with a
                scale for each row. Calls round inputs and states to such integers, and compute
                everything else in float32.

        Raises:
            RuntimeError: this layer has hooks or another `forward`, which the copy would not run.
            ValueError: dtype is neither None nor torch.int8, or this layer does not support int8.
        """
        return PreparedLayer(self, dtype)

    def _weight_names(self) -> Sequence[str]:
        return self._flat_weights_names

    def _as_torch(self, arguments: Arguments) -> tuple[Any, Any]:
        """Computes a call with the operators of torch's own layer."""
        self._refuse_if_invariant()
        input, rows, padding_idx = arguments.input, arguments.embedding, arguments.padding_idx
        if rows is not None:
            input = tokens.embed(input, lambda ids: F.embedding(ids, rows, padding_idx))
        return super().forward(input, arguments.hx)  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> torch.nn.RNNBase:
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        if self._cell.torch is None:
            refuse_script(self._cell)
        self._refuse_if_invariant()
        if not is_exact(self):
            return self
        return plain_twin(self, self._cell.torch.layer)

    def _refuse_if_invariant(self) -> None:
        """Raises an error if batch_invariant is on, which torch's own operators do not support."""
        if self.batch_invariant or batch_invariant_is_on():
            raise RuntimeError(
                "batch_invariant needs the fused kernel, but TorchScript, expanded weights "
                "and tensor-like objects run on the operators of "
                f"nn.{self._cell.torch_name}"
            )


class GatedLayer(FusedLayer[States]):
    """The base class of the layers with fixed nonlinearities."""

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
        recompute: int | None = None,
        **refused: NoReturn,  # torch's layers reject unknown arguments with their own message
    ) -> None:
        super().__init__(**arguments_of(locals()))


class CustomLayer(FusedLayer[States]):
    """The base class of the layers that torch lacks.

    Its constructor takes the arguments of `FusedRNN` without proj_size. For each parameter in
    `Cell.own`, it also takes the initial value, `<name>`, and requires_grad, `train_<name>`. For a
    cell that can have heads, it also takes their number, `heads`.
    """

    def __init__(
        self,
        *,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        **more: Any,
    ) -> None:
        names = [name for p in self._cell.own for name in (p.name, f"train_{p.name}")]
        own = {name: more.pop(name) for name in names}
        heads = {name: more.pop(name) for name in ("heads",) if self._cell.can_have_heads}
        # Torch's constructor checks the options. Its parameters are for another cell: discard them.
        super().__init__(mode="RNN_TANH", device="meta", dtype=dtype, **more)
        self._parameters.clear()
        self.mode, self.nonlinearity = self._cell.name.upper(), nonlinearity
        self.__dict__.update(heads)
        options = ops.BIAS * self.bias | ops.BIDIRECTIONAL * self.bidirectional
        names = [parameter.name for parameter in ops.parameters_of(self._cell, options)]
        self._all_weights = [
            [f"{name}_l{layer}{suffix}" for name in names]
            for layer in range(self.num_layers)
            for suffix in ("", "_reverse")[: ops.directions_of(options)]
        ]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        make_parameters(self, options, own, device, dtype)
        self._init_flat_weights()
        self._options(self._weights())  # rejects an unknown nonlinearity

    def _nonlinearity(self) -> str:
        return self.nonlinearity

    def extra_repr(self) -> str:
        """Returns the sizes and the options without their default values, for `repr`."""
        return super().extra_repr() + options_shown(self, nonlinearity="tanh", heads=1)

    def reset_parameters(self) -> None:
        """Draws new values for all parameters that are not arguments of the constructor."""
        draw_parameters(self)

    def flatten_parameters(self) -> None:
        """No-op, because cuDNN does not support this layer."""
