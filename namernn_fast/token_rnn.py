"""`TokenRNN`: an embedding and the layer on top of it, from token ids to states."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from .integrations.fx import make_leaves
from .integrations.nn_rnn import plain_twin
from .layouts import Input, Lengths
from .nn import FusedRNN, what_else_runs
from .tokens import refuse_to_share


class TokenRNN(torch.nn.Module):
    """An `nn.Embedding` and a `FusedRNN` on top of it: `rnn(embedding(ids))`, with less work.

    Where the vocabulary is small, each row of the embedding is multiplied by weight_ih once, not
    once for each token that names the row. `last_state` returns the last states alone, of which
    sequences that begin alike can share those of what they have in common.

    The parts are the modules `embedding` and `rnn`. They are called one after the other where the
    layer would not see what they do: with hooks on the embedding, with its options max_norm,
    scale_grad_by_freq and sparse, and with another class or another `forward` in the place of one.

    Args:
        num_embeddings: the size of the vocabulary.
        input_size: features of a row of the embedding.
        hidden_size, num_layers, nonlinearity, bias, batch_first: as of `FusedRNN`.
        dropout, bidirectional, batch_invariant: as of `FusedRNN`.
        padding_idx: the row of the embedding that begins as zeros and gets no gradient.
        device, dtype: of the parameters.

    Example:
        >>> model = TokenRNN(31, 8, 16, padding_idx=0)
        >>> ids = torch.randint(1, 31, (5, 3))
        >>> torch.allclose(model.last_state(ids), model(ids)[1], atol=1e-6)
        True
    """

    embedding: torch.nn.Embedding
    rnn: FusedRNN

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
        super().__init__()
        self.embedding = torch.nn.Embedding(
            num_embeddings, input_size, padding_idx, device=device, dtype=dtype
        )
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

    def forward(
        self,
        ids: Input,
        hx: Tensor | None = None,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Input, Tensor]:
        """Runs the layer over sequences of token ids.

        Args:
            ids: int32 or int64, (seq_len, batch), (batch, seq_len) with batch_first, (seq_len) for
                one sequence, a PackedSequence of ids, sorted or not, or a jagged nested tensor
                (batch, any length).
            hx, lengths, reset: as of `FusedRNN.forward`. Ids in the padding behind `lengths` may be
                anything.

        Returns:
            output: like ids with num_directions * hidden_size features, and h_n (num_layers *
            num_directions, batch, hidden_size), without the batch for one sequence.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as of `namernn_fast.rnn`.
        """
        if self.why_not_fused() is None:
            embedding = self.embedding
            return self.rnn(ids, hx, lengths, reset, embedding.weight, embedding.padding_idx)
        return self._one_after_the_other(ids, hx, lengths, reset)

    if TYPE_CHECKING:  # torch declares that a call returns anything
        __call__ = forward

    def last_state(
        self,
        ids: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        *,
        share_prefixes: bool | None = None,
    ) -> Tensor:
        """Returns h_n of `forward`, without its output.

        A model with hooks, or with a `forward` set on the object, is called, so that these run.

        Args:
            ids, hx, lengths, reset: as of `forward`.
            share_prefixes: whether sequences that begin alike share the states of what they have
                in common, as `namernn_fast.last_state` says; None where that pays.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as of `namernn_fast.last_state`.
        """
        what_else = what_else_runs(self)
        why_not = self.why_not_fused() if what_else is None else f"the model has {what_else}"
        if why_not is not None:
            if share_prefixes:
                refuse_to_share(why_not)
            if what_else is not None:
                return self(ids, hx, lengths, reset)[1]
            return self._one_after_the_other(ids, hx, lengths, reset)[1]
        return self.rnn.last_state(
            ids,
            hx,
            lengths,
            reset,
            embedding=self.embedding.weight,
            padding_idx=self.embedding.padding_idx,
            share_prefixes=share_prefixes,
        )

    def why_not_fused(self) -> str | None:
        """Returns why both parts are called one after the other, or None if the layer gets ids."""
        embedding = self.embedding
        if type(embedding).forward is not torch.nn.Embedding.forward:
            return f"the embedding is of the class {type(embedding).__name__}"
        if type(self.rnn).forward is not FusedRNN.forward:
            return f"the layer is of the class {type(self.rnn).__name__}"
        if what_else := what_else_runs(embedding):
            return f"the embedding has {what_else}"
        if "forward" in self.rnn.__dict__:
            return "the layer has a forward of its own"
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            return "the embedding has one of the options max_norm, scale_grad_by_freq and sparse"
        return None

    def _one_after_the_other(
        self, ids: Input, hx: Tensor | None, lengths: Lengths | None, reset: Tensor | None
    ) -> tuple[Input, Tensor]:
        """Returns what the layer makes of the rows that the embedding returns."""
        rows: Any
        if isinstance(ids, PackedSequence):
            rows = ids._replace(data=self.embedding(ids.data))
        else:
            rows = self.embedding(ids)
        more = {"lengths": lengths, "reset": reset}  # which nn.RNN does not know
        rnn: torch.nn.Module = self.rnn  # of any class, with the results of a layer
        output, h_n = rnn(rows, hx, **{k: v for k, v in more.items() if v is not None})
        return output, h_n

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Returns what `torch.jit.script` compiles in place of this module."""
        if type(self) is not TokenRNN:
            return self
        twin = plain_twin(self, _Scriptable)
        # The parts are prepared in their turn, and the model is to keep its own.
        twin.__dict__["_modules"] = dict(self._modules)
        return twin


class _Scriptable(torch.nn.Module):
    """What TorchScript compiles of a `TokenRNN`: an embedding and `nn.RNN`."""

    # TorchScript infers the type of the result.
    def forward(self, ids: Tensor, hx: Tensor | None = None):  # type: ignore[no-untyped-def]
        return self.rnn(self.embedding(ids), hx)  # type: ignore[operator]


make_leaves(TokenRNN)
