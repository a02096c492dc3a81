"""`TokenRNN` and its like for other cells: an embedding with a layer that reads token ids."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from ..call.layouts import Input, Lengths
from ..call.tokens import refuse_to_share
from ..cells import GRU, LEAKY, LSTM, VANILLA, Cell
from ..integrations.fx import make_leaves
from ..integrations.nn_rnn import exact_class, is_exact, plain_twin
from .fused_layer import FusedLayer
from .layers import FusedGRU, FusedLeakyRNN, FusedLSTM, FusedRNN
from .prepared import PreparedLayer
from .states import States, given
from .weights import what_else_runs, why_not_preparable, with_weights


class _Scriptable(torch.nn.Module):
    """The TorchScript form of a token layer: an embedding and torch's own layer."""

    # No return annotation: TorchScript infers the type.
    def forward(self, ids: Tensor, hx: Tensor | None = None):  # type: ignore[no-untyped-def]
        return self.rnn(self.embedding(ids), hx)  # type: ignore[operator]


class _ScriptableLSTM(torch.nn.Module):
    """Like `_Scriptable`, but with the type of an LSTM's states, which TorchScript needs."""

    def forward(self, ids: Tensor, hx: tuple[Tensor, Tensor] | None = None):  # type: ignore[no-untyped-def]
        return self.rnn(self.embedding(ids), hx)  # type: ignore[operator]


class TokenLayer(torch.nn.Module, Generic[States]):
    """The base class of the token layers: everything except the layer `rnn`."""

    _scriptable: type[torch.nn.Module] = _Scriptable
    _cell: Cell
    embedding: torch.nn.Embedding
    rnn: Any

    def __init__(
        self,
        num_embeddings: int,
        input_size: int,
        padding_idx: int | None,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(
            num_embeddings, input_size, padding_idx, device=device, dtype=dtype
        )

    def forward(
        self,
        ids: Input,
        hx: States | None = None,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        noise: Input | None = None,
    ) -> tuple[Input, States]:
        """Runs the layer over sequences of token ids.

        Args:
            ids: int32 or int64, (seq_len, batch), (batch, seq_len) with batch_first, (seq_len) for
                one sequence, a PackedSequence of ids, sorted or not, or a jagged nested tensor
                (batch, any length).
            hx, lengths, reset, reset_to, noise: as in `FusedRNN.forward`. Ids past a sequence's
                length are ignored.

        Returns:
            output: laid out like ids, with num_directions * hidden_size features; and h_n
            (num_layers * num_directions, batch, hidden_size), without the batch for one sequence.
            For an LSTM, the pair of h_n and c_n instead of h_n.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as in `namernn_fast.rnn`.
        """
        if self.why_not_fused() is None:
            embedding = self.embedding
            return self.rnn(  # type: ignore[no-any-return]
                ids, hx, lengths, reset, embedding.weight, embedding.padding_idx, reset_to, noise
            )
        more = given(lengths=lengths, reset=reset, reset_to=reset_to, noise=noise)
        return self._call_separately(ids, hx, more)

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward

    def last_state(
        self,
        ids: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        noise: Input | None = None,
        *,
        share_prefixes: bool | None = None,
    ) -> States:
        """Returns only the last states of `forward`; in inference the output is never written.

        If the model has hooks or a `forward` set on the object, calls the model so that these run.

        Args:
            ids, hx, lengths, reset, reset_to, noise: as in `forward`.
            share_prefixes: whether to compute common prefixes once; see `namernn_fast.last_state`.
                None shares prefixes if that is expected to be faster.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as in `namernn_fast.last_state`.
        """
        what_else = what_else_runs(self)
        why_not = self.why_not_fused() if what_else is None else f"the model has {what_else}"
        if why_not is not None:
            if share_prefixes:
                refuse_to_share(why_not)
            more = given(lengths=lengths, reset=reset, reset_to=reset_to, noise=noise)
            if what_else is not None:
                return self(ids, hx, **more)[1]
            return self._call_separately(ids, hx, more)[1]
        return self.rnn.last_state(  # type: ignore[no-any-return]
            ids,
            hx,
            lengths,
            reset,
            embedding=self.embedding.weight,
            padding_idx=self.embedding.padding_idx,
            reset_to=reset_to,
            noise=noise,
            share_prefixes=share_prefixes,
        )

    def prepare(self, dtype: torch.dtype | None = None) -> PreparedLayer[States]:
        """Returns a copy of this model for inference, whose weights are packed once.

        The embedding is multiplied by weight_ih once, unless the table of products would take more
        than 64 MiB, or batch_invariant is set. See `FusedRNN.prepare`.

        Args:
            dtype: None for the dtype of this model, or torch.int8 for 8-bit weights.

        Raises:
            RuntimeError: this model or a part of it has hooks or another `forward`, which the copy
                would not run, or the embedding has an option that the copy does not support.
            ValueError: dtype is neither None nor torch.int8, or int8 does not fit this model.
        """
        return PreparedLayer(self, dtype)

    def _weights(self) -> list[Tensor]:
        return [self.embedding.weight, *self.rnn._weights()]

    def _why_not_preparable(self) -> str | None:
        why_not = why_not_preparable(self) or self._why_not_together()
        if why_not is None and what_else_runs(self.embedding) not in (None, "global hooks"):
            why_not = f"the embedding has {what_else_runs(self.embedding)}"
        return why_not or self.rnn._why_not_preparable()

    def _with_weights(self, weights: Sequence[Tensor], requires_grad: bool) -> Any:
        """Returns a copy of this model in eval mode with these weights."""
        copy = with_weights(self, exact_class(self), {}, requires_grad)
        rows = {"weight": weights[0]}
        copy.embedding = with_weights(self.embedding, torch.nn.Embedding, rows, requires_grad)
        copy.rnn = self.rnn._with_weights(weights[1:], requires_grad)
        return copy

    def why_not_fused(self) -> str | None:
        """Returns why the embedding is called separately, or None if the layer gets the ids."""
        what_else = what_else_runs(self.embedding)
        return f"the embedding has {what_else}" if what_else else self._why_not_together()

    def _why_not_together(self) -> str | None:
        """Returns why the parts cannot run together, hooks aside, or None if they can."""
        embedding = self.embedding
        if type(embedding).forward is not torch.nn.Embedding.forward:
            return f"the embedding is of the class {type(embedding).__name__}"
        if type(self.rnn).forward is not FusedLayer.forward:
            return f"the layer is of the class {type(self.rnn).__name__}"
        if "forward" in self.rnn.__dict__:
            return "the layer has a forward set on the object"
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            return "the embedding has one of the options max_norm, scale_grad_by_freq and sparse"
        return None

    def _call_separately(
        self, ids: Input, hx: States | None, more: dict[str, Any]
    ) -> tuple[Input, States]:
        """Calls the embedding, and then the layer on its result, with `more` arguments."""
        rows: Any
        if isinstance(ids, PackedSequence):
            rows = ids._replace(data=self.embedding(ids.data))
        else:
            rows = self.embedding(ids)
        rnn: torch.nn.Module = self.rnn  # may have been replaced by a module of another class
        output, states = rnn(rows, hx, **more)
        return output, states

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        if not is_exact(self):
            return self
        twin = plain_twin(self, self._scriptable)
        # A copy, because TorchScript replaces the modules in this dict with their scriptable twins.
        twin.__dict__["_modules"] = dict(self._modules)
        return twin


class TokenRNN(TokenLayer[Tensor]):
    """An `nn.Embedding` and a `FusedRNN` on top of it: `rnn(embedding(ids))`, with less work.

    If the vocabulary is small, each row of the embedding is multiplied by weight_ih once instead of
    once per token. `last_state` returns only the last states, and can compute the common prefixes
    of sequences once.

    The parts are the modules `embedding` and `rnn`. They are called separately, without these
    shortcuts, if the embedding has hooks or one of the options max_norm, scale_grad_by_freq and
    sparse, or if a part has another class or another `forward`.

    Args:
        num_embeddings: the size of the vocabulary.
        input_size: number of features of an embedding row.
        hidden_size, num_layers, nonlinearity, bias, batch_first: as in `FusedRNN`.
        dropout, bidirectional, batch_invariant: as in `FusedRNN`.
        padding_idx: the row of the embedding that is initialised to zeros and gets no gradient.
        device, dtype: the device and dtype of the parameters.

    Example:
        >>> model = TokenRNN(31, 8, 16, padding_idx=0)
        >>> ids = torch.randint(1, 31, (5, 3))
        >>> torch.allclose(model.last_state(ids), model(ids)[1], atol=1e-6)
        True
    """

    rnn: FusedRNN
    _cell = VANILLA

    def __init__(
        self,
        num_embeddings: int,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        padding_idx: int | None = None,
        batch_invariant: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, input_size, padding_idx, device, dtype)
        self.rnn = FusedRNN(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            batch_invariant=batch_invariant,
            device=device,
            dtype=dtype,
        )


class _TokenGatedLayer(TokenLayer[States]):
    """The base class of the token layers of cells with gates, which defines their constructor."""

    _layer_class: Callable[..., FusedGRU | FusedLSTM]

    def __init__(
        self,
        num_embeddings: int,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        proj_size: int = 0,
        padding_idx: int | None = None,
        batch_invariant: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, input_size, padding_idx, device, dtype)
        self.rnn = self._layer_class(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            batch_invariant=batch_invariant,
            device=device,
            dtype=dtype,
        )


class TokenGRU(_TokenGatedLayer[Tensor]):
    """An `nn.Embedding` and a `FusedGRU` on top of it: `rnn(embedding(ids))`, with less work.

    See `TokenRNN`: everything said there applies, except that GRUs have no nonlinearity to choose.
    `proj_size` must be 0. The recurrent layer is the module `rnn`, as in `TokenRNN`.

    Example:
        >>> model = TokenGRU(31, 8, 16, padding_idx=0)
        >>> ids = torch.randint(1, 31, (5, 3))
        >>> torch.allclose(model.last_state(ids), model(ids)[1], atol=1e-6)
        True
    """

    rnn: FusedGRU
    _layer_class = FusedGRU
    _cell = GRU


class TokenLSTM(_TokenGatedLayer[tuple[Tensor, Tensor]]):
    """An `nn.Embedding` and a `FusedLSTM` on top of it: `rnn(embedding(ids))`, with less work.

    See `TokenRNN`: everything said there applies, except that LSTMs have no nonlinearity to choose.
    `proj_size` is as in `FusedLSTM`. The recurrent layer is the module `rnn`, as in `TokenRNN`.

    Example:
        >>> model = TokenLSTM(31, 8, 16, padding_idx=0)
        >>> h_n, c_n = model.last_state(torch.randint(1, 31, (5, 3)))
        >>> h_n.shape, c_n.shape
        (torch.Size([1, 3, 16]), torch.Size([1, 3, 16]))
    """

    rnn: FusedLSTM
    _layer_class = FusedLSTM
    _cell = LSTM
    _scriptable = _ScriptableLSTM


class TokenLeakyRNN(TokenLayer[tuple[Tensor, Tensor]]):
    """An `nn.Embedding` and a `FusedLeakyRNN` on top of it, as `TokenRNN` has a `FusedRNN`.

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
    _cell = LEAKY

    def __init__(
        self,
        num_embeddings: int,
        input_size: int,
        *sizes: Any,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, input_size, padding_idx, device, dtype)
        options |= {"device": device, "dtype": dtype}
        self.rnn = FusedLeakyRNN(input_size, *sizes, **options)


make_leaves(TokenRNN, TokenGRU, TokenLSTM, TokenLeakyRNN)
