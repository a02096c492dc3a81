"""`last_state()`, and what the functions of all cells, `rnn()` and so on, have in common."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops
from .call import Call, Results, tokens
from .call.dtypes import cast_h, convert_dtypes
from .call.layouts import Input, Lengths, as_sequence_layout, normalise, restore, restore_states
from .call.options import option_bits
from .cells import CELLS, CellName, WithOneState, WithTwoStates
from .machine.torch_private import _is_any_autocast_enabled

if TYPE_CHECKING:
    from typing_extensions import Unpack


def run(
    call: Call,
    input: Input,
    lengths: Lengths | None = None,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Input, Any]:
    """Runs a call and returns its output and last states in the layout of `input`.

    The last states are h_n, or a pair of states. All modules and functions call this function.
    """
    lookup = None
    if embedding is not None or padding_idx is not None:
        lookup = tokens.lookup_of(input, embedding, padding_idx)
    results = _run(call, lengths, lookup)
    return restore(input, results, call.options, lookup is not None)


class _Options(TypedDict, total=False):
    share_prefixes: bool | None
    nonlinearity: str
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    training: bool
    lengths: Lengths | None
    reset: Tensor | None
    reset_to: Any
    batch_invariant: bool
    embedding: Tensor | None
    padding_idx: int | None
    projections: bool
    noise: Tensor | PackedSequence | None


@overload
def last_state(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    cell: WithOneState = "rnn",
    **options: "Unpack[_Options]",
) -> Tensor: ...


@overload
def last_state(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    cell: WithTwoStates,
    **options: "Unpack[_Options]",
) -> tuple[Tensor, Tensor]: ...


def last_state(
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    cell: CellName = "rnn",
    share_prefixes: bool | None = None,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: Any = None,
    batch_invariant: bool = False,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
    projections: bool = False,
    noise: Input | None = None,
) -> Any:
    """Returns only the last states of `rnn()`, `gru()`, `lstm()` or `leaky()`.

    In inference the output is not written at all. Sequences of token ids can share the states of
    their common prefixes, in inference and in training: the kernel then computes the trie of the
    batch instead of each sequence.

    Args:
        cell: "rnn", "gru", "lstm" or "leaky".
        share_prefixes: None looks for common prefixes if that is expected to be faster. True always
            looks for them, and raises an error if sharing is impossible. False never looks. The
            kernel shares the prefixes it finds if there are enough to make the call faster. The
            result may differ in its last bits. Sharing needs a CPU, token ids, one direction, and
            float32 or float64; it does not support hx, reset, projections, batch_invariant, dropout
            between layers, compilers or torch.func transforms.
        input, hx, weights: as in the function of the cell, and so are all other arguments. An
            argument that this function lacks must have its default.

    Returns:
        h_n: (num_layers * num_directions, batch, hidden_size), without a batch (num_layers *
        num_directions, hidden_size). For an LSTM, the pair of h_n and c_n, as `lstm()` returns it.

    Raises:
        ValueError: share_prefixes is True, but sharing is impossible; cell is unknown; nonlinearity
            is relu for a cell with gates; projections is True for a cell other than lstm.
        TypeError, ValueError, RuntimeError, IndexError: as in `rnn()`.
    """
    chosen = CELLS.get(cell)
    if chosen is None:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if projections and not chosen.can_project:
        raise ValueError(f"projections must be False for cell={cell!r}, got {projections}")
    settings = batch_first, batch_invariant, projections
    if nonlinearity not in chosen.nonlinearities:
        wanted = " or ".join(chosen.nonlinearities)
        raise ValueError(f"nonlinearity must be {wanted} for cell={cell!r}, got {nonlinearity!r}")
    options = option_bits(chosen, weights, bias, bidirectional, nonlinearity, *settings)
    call = Call(chosen, input, hx, weights, None, reset, options, dropout * training, reset_to)  # type: ignore[arg-type]
    if noise is not None:
        call.inputs = {"noise": noise}
    return run_last_state(call, input, lengths, embedding, padding_idx, share_prefixes)


def run_last_state(
    call: Call,
    input: Tensor | PackedSequence,
    lengths: Lengths | None,
    embedding: Tensor | None,
    padding_idx: int | None,
    share_prefixes: bool | None,
) -> Any:
    """Runs a call and returns only its last states, for `last_state()` and the modules."""
    if share_prefixes and embedding is None:
        tokens.refuse_to_share("embedding is None, so input does not hold token ids")
    call.options |= ops.LAST_STATE
    lookup = tokens.lookup_of(input, embedding, padding_idx, share_prefixes)
    results = _run(call, lengths, lookup)
    return restore_states(input, results, call.options, lookup is not None)


def _run(call: Call, lengths: Lengths | None, lookup: tokens.Lookup | None) -> Results:
    """Normalises a call and runs it.

    Args:
        call: the arguments as the caller passed them; this function modifies the call.
        lengths: as in `rnn()`.
        lookup: the embedding of token ids, or None if input holds features.
    """
    data, has_ids = call.data, lookup is not None
    # Fast path: a padded 3-D tensor without hx, resets and `inputs` needs no normalisation.
    if (
        not isinstance(data, Tensor)
        or data.dim() + has_ids != 3
        or data.is_nested
        or call.hx is not None
        or call.reset is not None
        or call.reset_to is not None
        or call.inputs is not None
    ):
        normalise(call, has_ids)
    if lengths is not None:
        call.sequence_layout = as_sequence_layout(lengths, call.data, call.options)
    if call.dropout and len(call.weights) == ops.weights_per_layer(call.cell, call.options):
        call.dropout = 0.0
    if call.states or call.restart_states or _is_any_autocast_enabled():
        lookup = convert_dtypes(call, lookup)
        if call.options & ops.PROJECTIONS:
            return cast_h(call, dispatch.run(call, lookup))
    return dispatch.run(call, lookup)
