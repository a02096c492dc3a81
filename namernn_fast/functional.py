"""`last_state()`, and the code shared by `rnn()`, `gru()`, `lstm()` and `leaky()`."""

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops
from .call import Arguments, Call, Input, Lengths, normalise
from .call.dtypes import cast_h
from .call.layouts import restore
from .call.options import option_bits
from .cells import CellName, HasCell, WithOneState, WithTwoStates, cell_passed


def run(arguments: Arguments, call: Call) -> tuple[Any, Any]:
    """Runs a call and returns its output and last states in the layout of the input.

    The last states are h_n, or a pair of states. All modules and functions call this function.

    Args:
        arguments: the caller's arguments.
        call: the result of `normalise` for these arguments.
    """
    results = dispatch.run(call)
    if call.options & ops.PROJECTIONS:
        results = cast_h(call, results)
    return restore(arguments, results, call.options)


def run_last_state(arguments: Arguments, call: Call) -> Any:
    """Runs a call like `run`, but returns only the last states. The path may skip the output."""
    call.options |= ops.LAST_STATE
    return run(arguments, call)[1]


@overload
def last_state(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    cell: WithOneState = "rnn",
    **options: Any,
) -> Tensor: ...


@overload
def last_state(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    cell: WithTwoStates,
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def last_state(
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    cell: HasCell,
    **options: Any,
) -> Any: ...


def last_state(
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    cell: CellName | HasCell = "rnn",
    share_prefixes: bool | None = None,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    projections: bool = False,
    batch_invariant: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: Any = None,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
    **inputs: Input | None,
) -> Any:
    """Returns only the last states of `rnn()`, `gru()`, `lstm()`, `leaky()` or `cell.apply()`.

    In inference the output is not written at all. Sequences of token ids can share the states of
    their common prefixes, in inference and in training: the kernel then computes the trie of the
    batch instead of each sequence.

    Args:
        cell: "rnn", "gru", "lstm", "leaky", or a `RecurrentCell`.
        share_prefixes: whether to look for common prefixes: None if this is expected to be faster,
            True always, False never. With True, raises an error if sharing is impossible. The
            kernel shares prefixes only if they make the call faster. Results may differ in their
            last bits. Sharing needs a CPU, token ids, one direction, and float32 or float64. It
            does not support hx, reset, projections, batch_invariant, dropout between layers,
            compilers or torch.func transforms.
        input, hx, weights: as in the cell's function, like all other arguments. Arguments that the
            cell's function does not take must keep their defaults.

    Returns:
        h_n: (num_layers * num_directions, batch, hidden_size), without a batch (num_layers *
        num_directions, hidden_size). If the cell has two states, a pair of such tensors.

    Raises:
        ValueError: share_prefixes is True, but sharing is impossible; cell is unknown; the cell
            does not have the nonlinearity; projections is True for a cell other than lstm.
        TypeError, ValueError, RuntimeError, IndexError: as in `rnn()`.
    """
    chosen = cell_passed(cell)
    if projections and not chosen.can_project:
        raise ValueError(f"projections must be False for cell={cell!r}, got {projections}")
    if nonlinearity not in chosen.nonlinearities:
        wanted = " or ".join(chosen.nonlinearities)
        raise ValueError(f"nonlinearity must be {wanted} for cell={cell!r}, got {nonlinearity!r}")
    options = option_bits(
        chosen,
        weights,
        nonlinearity=nonlinearity,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
        projections=projections,
        batch_invariant=batch_invariant,
    )
    arguments = Arguments(
        input, hx, lengths, reset, reset_to, embedding, padding_idx, inputs, share_prefixes
    )
    call = normalise(arguments, chosen, weights, options, dropout * training)
    return run_last_state(arguments, call)
