"""`TokenLayer`, the base class of the token layers: an embedding followed by a layer."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from ...call import Input, Lengths, given
from ...call.tokens import embed, refuse_to_share
from ...cells import Cell
from ...integrations.nn_rnn import exact_class, is_exact, plain_twin
from ..inference.prepared import PreparedLayer
from ..states import States
from ..weights import (
    Preparable,
    arguments_of,
    check_forward,
    what_else_runs,
    why_not_preparable,
    with_weights,
)
from .layer import FusedLayer


class _Scriptable(torch.nn.Module):
    """Replaces a token layer in TorchScript: an embedding followed by torch's own layer."""

    # No return annotation: TorchScript infers the type.
    def forward(self, ids: Tensor, hx: Tensor | None = None):  # type: ignore[no-untyped-def]
        return self.rnn(self.embedding(ids), hx)  # type: ignore[operator]


class _ScriptablePair(torch.nn.Module):
    """Like `_Scriptable`, but annotated with a pair of states for TorchScript."""

    def forward(self, ids: Tensor, hx: tuple[Tensor, Tensor] | None = None):  # type: ignore[no-untyped-def]
        return self.rnn(self.embedding(ids), hx)  # type: ignore[operator]


class TokenLayer(Preparable, torch.nn.Module, Generic[States]):
    """The base class of the token layers: an `nn.Embedding` followed by a layer."""

    _cell: Cell
    _layer_class: Callable[..., Any]
    embedding: torch.nn.Embedding
    rnn: Any

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
        super().__init__()
        self.embedding = torch.nn.Embedding(
            num_embeddings, input_size, padding_idx, device=device, dtype=dtype
        )
        self.rnn = self._layer_class(input_size, *sizes, device=device, dtype=dtype, **options)

    def forward(
        self,
        ids: Input,
        hx: States | None = None,
        lengths: Lengths | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        **inputs: Input | None,
    ) -> tuple[Input, States]:
        """Runs the layer over sequences of token ids.

        Args:
            ids: int32 or int64. (seq_len, batch); with batch_first (batch, seq_len); for one
                sequence (seq_len). Or a PackedSequence of ids, sorted or not. Or a jagged nested
                tensor (batch, any length).
            hx, lengths, reset, reset_to, inputs: as in `FusedRNN.forward`. Ids past a sequence's
                length are ignored.

        Returns:
            output: laid out like ids, with num_directions * hidden_size features; and h_n
            (num_layers * num_directions, batch, hidden_size), without the batch for one sequence.
            If the cell has two states, a pair instead of h_n.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as in `namernn_fast.rnn`.
        """
        if self.why_not_fused() is None:
            return self.rnn(  # type: ignore[no-any-return]
                ids,
                hx,
                lengths,
                reset=reset,
                reset_to=reset_to,
                embedding=self.embedding.weight,
                padding_idx=self.embedding.padding_idx,
                **inputs,
            )
        more = given(lengths=lengths, reset=reset, reset_to=reset_to, **inputs)
        return self._call_separately(ids, hx, **more)

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward

    def last_state(
        self,
        ids: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Lengths | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        share_prefixes: bool | None = None,
        **inputs: Tensor | PackedSequence | None,
    ) -> States:
        """Returns only the last states of `forward`; in inference the output is never written.

        If the model has hooks, or a `forward` set on the object, calls the model to run them.

        Args:
            ids, hx, lengths, reset, reset_to, inputs: as in `forward`.
            share_prefixes: whether to compute common prefixes once; see `namernn_fast.last_state`.
                None shares prefixes if this is expected to be faster.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as in `namernn_fast.last_state`, or
                the class of the model has another `forward`.
        """
        check_forward(self)
        more = given(lengths=lengths, reset=reset, reset_to=reset_to, **inputs)
        what_else = what_else_runs(self)
        why_not = self.why_not_fused() if what_else is None else f"the model has {what_else}"
        if why_not is None:
            rows, more["padding_idx"] = self.embedding.weight, self.embedding.padding_idx
            more["share_prefixes"] = share_prefixes
            return self.rnn.last_state(ids, hx, embedding=rows, **more)  # type: ignore[no-any-return]
        if share_prefixes:
            refuse_to_share(why_not)
        run = self._call_separately if what_else is None else self
        return run(ids, hx, **more)[1]

    def prepare(self, dtype: torch.dtype | None = None) -> PreparedLayer[States]:
        """Returns a copy of this model for inference, whose weights are packed once.

        The embedding is multiplied by weight_ih once, unless the table of products would take more
        than 64 MiB, or batch_invariant is set. See `FusedRNN.prepare`.

        Args:
            dtype: None for the dtype of this model, or torch.int8 for 8-bit weights.

        Raises:
            RuntimeError: this model, its embedding or its layer has hooks or another `forward`,
                which the copy would not run; or an embedding option is unsupported.
            ValueError: dtype is neither None nor torch.int8, or this model does not support int8.
        """
        return PreparedLayer(self, dtype)

    @property
    def _recurrent(self) -> Any:
        return self.rnn

    def _names_in_state_dict(self) -> list[str]:
        return ["embedding.weight", *(f"rnn.{name}" for name in self.rnn._weight_names())]

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
        """Returns why embedding and layer cannot run as one call, or None. Ignores hooks."""
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

    def _call_separately(self, ids: Input, hx: States | None, **more: Any) -> tuple[Input, States]:
        """Calls the embedding, then passes its result and `more` to the layer."""
        rnn: torch.nn.Module = self.rnn  # users may have replaced it with another class
        output, states = rnn(embed(ids, self.embedding), hx, **more)
        return output, states

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        if not is_exact(self):
            return self
        twin = plain_twin(self, _Scriptable if len(self._cell.states) == 1 else _ScriptablePair)
        # Copy the dict, because TorchScript replaces its modules with their scriptable twins.
        twin.__dict__["_modules"] = dict(self._modules)
        return twin


class GatedTokenLayer(TokenLayer[States]):
    """The base class of the token layers with fixed nonlinearities."""

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
        recompute: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))
