"""`normalise`, which converts a caller's `Arguments` to a `Call`."""

from collections.abc import Sequence

from torch import Tensor

from .. import ops
from ..cells import Cell
from ..machine.context import autocast_is_on
from . import layouts, tokens
from .call import Arguments, Call
from .dtypes import convert_dtypes
from .prepared_weights import PreparedWeights


def normalise(
    arguments: Arguments,
    cell: Cell,
    weights: Sequence[Tensor],
    options: int,
    dropout: float = 0.0,
    prepared: PreparedWeights | None = None,
) -> Call:
    """Converts a caller's arguments to a `Call`.

    Args:
        arguments: the caller's arguments.
        cell, weights, options: as in `namernn_fast.ops`.
        dropout, prepared: as in `Call`.

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type, dtype or layout.
    """
    data = arguments.input
    call = Call(cell, weights, options, data, prepared=prepared)
    if (
        arguments.embedding is not None
        or arguments.padding_idx is not None
        or arguments.share_prefixes
    ):
        call.lookup = tokens.lookup_of(arguments)
    # Fast path: a padded 3-D tensor without hx, resets and other inputs needs no conversion.
    if (
        not isinstance(data, Tensor)
        or data.dim() != (3 if call.lookup is None else 2)
        or data.is_nested
        or arguments.hx is not None
        or arguments.reset is not None
        or arguments.reset_to is not None
        or arguments.inputs
    ):
        layouts.convert(arguments, call)
    if arguments.lengths is not None:
        call.sequence_layout = layouts.as_sequence_layout(
            arguments.lengths, call.data, call.options
        )
    if dropout and len(weights) > ops.weights_per_layer(cell, options):
        call.dropout = dropout
    if call.states or call.restart_states or call.beside or autocast_is_on():
        convert_dtypes(call)
    return call
