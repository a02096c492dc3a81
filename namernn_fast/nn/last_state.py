"""The method `last_state` of layers and prepared layers."""

from typing import Any, Generic

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..call import Arguments, Lengths, tokens
from .states import States
from .weights import what_else_runs


class HasLastState(Generic[States]):
    """A module whose calls can return only their last states."""

    def last_state(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Lengths | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        embedding: Tensor | None = None,
        padding_idx: int | None = None,
        share_prefixes: bool | None = None,
        **inputs: Tensor | PackedSequence | None,
    ) -> States:
        """Returns only the last states of `forward`; in inference the output is never written.

        If the module has hooks, or a `forward` set on the object, calls the module to run them.

        Args:
            input, .., padding_idx, inputs: as in `forward`.
            share_prefixes: whether to compute common prefixes of token ids once; see
                `namernn_fast.last_state`. None shares prefixes if this is expected to be faster.

        Returns:
            h_n: (num_layers * num_directions, batch, hidden_size), without the batch for one
            sequence; a pair if the cell has two states.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as in `namernn_fast.last_state`, or
                the class of the module has another `forward`.
        """
        arguments = Arguments(
            input, hx, lengths, reset, reset_to, embedding, padding_idx, inputs, share_prefixes
        )
        module: Any = self
        what_else = what_else_runs(module)
        if what_else is None:
            return self._last_state(arguments)  # type: ignore[no-any-return]
        if share_prefixes:
            tokens.refuse_to_share(f"the module has {what_else}")
        return module(input, hx, **arguments.keywords())[1]  # type: ignore[no-any-return]

    def _last_state(self, arguments: Arguments) -> Any:
        """Computes `last_state` of a module without hooks."""
        raise NotImplementedError
