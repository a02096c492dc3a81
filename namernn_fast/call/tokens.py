"""Token ids as input: multiplies the embedding by weight_ih once, or gathers its rows.

A layer multiplies the embedding row of every token by weight_ih. If the vocabulary is small, it is
cheaper to multiply each row of `embedding` once: `table = embedding W_ih^T` (vocabulary,
hidden_size). The operators then read the table row of each id. If there are fewer ids than rows of
`embedding`, a call gathers the embedding row of each id instead, and uses these rows as input.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..cells import Cell
from ..machine.context import autocast_is_on, functorch_is_active, is_compiling
from .call import Arguments, Call, Choice, Lookup
from .checks import ID_DTYPES, are_lengths_of, check_ids, steps_of_sequences

TRACED_VOCABULARY = 1024
"""The largest vocabulary for which a compiled call uses a table. The limit is fixed, because a
comparison with the number of ids would add a guard."""
SHARING_DTYPES = (torch.float32, torch.float64)
SHARED_FROM_HIDDEN = 32
"""The smallest hidden_size for which sharing prefixes pays off."""
SHARED_FROM_SEQUENCES = 128
"""The smallest number of sequences for which sharing prefixes pays off; with fewer sequences,
finding the prefixes takes as long as a few steps."""


def check_types(input: Tensor | PackedSequence, embedding: Tensor) -> None:
    """Checks that embedding is a tensor and that a tensor input holds token ids.

    Raises:
        TypeError: embedding is not a tensor, or input does not have the dtype of token ids.
    """
    if not isinstance(embedding, Tensor):
        hint = ": pass its weight" if isinstance(embedding, torch.nn.Embedding) else ""
        raise TypeError(f"embedding must be a Tensor or None, got {type(embedding).__name__}{hint}")
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(data, Tensor) and data.dtype not in ID_DTYPES:
        raise TypeError(
            f"input must hold token ids, int32 or int64, if embedding is given, got {data.dtype}"
        )


def lookup_of(arguments: Arguments) -> Lookup:
    """Returns the `Lookup` of a call with one of embedding, padding_idx and share_prefixes.

    Raises:
        TypeError: as in `check_types`.
        ValueError: padding_idx or share_prefixes is given without embedding.
    """
    embedding, padding_idx = arguments.embedding, arguments.padding_idx
    if embedding is None:
        if arguments.share_prefixes:
            refuse_to_share("embedding is None, so input does not hold token ids")
        raise ValueError(f"padding_idx={padding_idx} needs embedding, which is None")
    check_types(arguments.input, embedding)
    return Lookup(embedding, padding_idx, arguments.share_prefixes)


def look_up(call: Call, choice: Choice) -> None:
    """Rewrites a call on token ids in place so that it reads tables or features.

    Args:
        call: a call with `lookup`, whose data are int32 or int64 ids.
        choice: the path of the call.

    Raises:
        ValueError: embedding or padding_idx is wrong; share_prefixes is True, but sharing is
            impossible.
        IndexError: an id is out of range.
    """
    assert call.lookup is not None
    embedding, padding_idx, share_prefixes = call.lookup
    ids = call.data
    check_embedding(embedding, padding_idx, ids, call.weights)
    if share_prefixes is not False:
        why_not = why_not_shared(call, embedding, choice, share_prefixes is True)
        if why_not is None:
            call.options |= ops.SHARE_PREFIXES
            call.trees = torch.get_num_threads()
        elif share_prefixes:
            refuse_to_share(why_not)
    options = call.options
    if not options & ops.SHARE_PREFIXES and why_not_table(call, embedding, choice):
        call.data = gather(ids, embedding, padding_idx, call.sequence_layout, options)
        return
    if ids.dtype != torch.int64:
        call.data = ids.long()
    call.has_tables = True
    if call.prepared is None:
        call.weights = with_tables(embedding, padding_idx, call.weights, call.cell, options)
    else:
        call.weights = call.prepared.shapes


def why_not_table(call: Call, embedding: Tensor, choice: Choice) -> str | None:
    """Returns why a call gathers embedding rows, or None if it computes a table.

    Args:
        call: a call on token ids.
        embedding: (vocabulary, input_size).
        choice: the path of the call.
    """
    if choice.why_not_ids is not None:
        return choice.why_not_ids
    if call.beside:
        return f"{' and '.join(call.cell.input_names)} needs rows of features as input"
    if call.prepared is not None:
        return None if call.prepared.has_table else "the layer was prepared without a table"
    ids, options = call.data, call.options
    if options & ops.BATCH_INVARIANT:
        return "the bits of a table may depend on the number of threads"
    vocabulary = embedding.shape[0]
    if is_compiling():
        # A plain comparison would guard on a dynamic size and force recompiles;
        # statically_known_true adds no guard.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        if not statically_known_true(vocabulary <= TRACED_VOCABULARY):
            return f"a compiled call uses tables of up to {TRACED_VOCABULARY} rows only"
    elif vocabulary > ids.numel():
        return f"multiplying {ids.numel()} ids is less work than multiplying {vocabulary} rows"
    return None


def why_not_shared(
    call: Call, embedding: Tensor, choice: Choice, at_any_cost: bool = False
) -> str | None:
    """Returns why the sequences of a call do not share prefixes, or None if they may.

    The kernel inspects the ids and shares the prefixes it finds.

    Args:
        call: a call on token ids.
        embedding: (vocabulary, input_size).
        choice: the path of the call.
        at_any_cost: whether to ignore speed and return only reasons why sharing is impossible.
    """
    ids, options = call.data, call.options
    if call.prepared is not None and not call.prepared.has_table:
        return why_not_table(call, embedding, choice)
    if options & ops.BIDIRECTIONAL:
        return "the second direction starts at the ends of sequences"
    if call.states:
        return "hx gives each sequence its own initial state"
    if call.reset is not None:
        return "reset restarts sequences"
    if call.beside:
        return f"each sequence has its own {' and '.join(call.cell.input_names)}"
    if options & ops.PROJECTIONS:
        return "shared prefixes do not support proj_size"
    if call.dropout:
        return "dropout between layers is drawn for each sequence"
    if call.recompute is not None:
        return "recompute runs sequences in pieces"
    if options & ops.BATCH_INVARIANT:
        return "batch_invariant rules out a table"
    if is_compiling():
        return "a compiler is tracing the call"
    if functorch_is_active():
        return "a torch.func transform is active"
    if not ids.is_cpu:
        return f"kernels on {ids.device.type} do not share prefixes"
    like = call.weights[0]
    dtype = torch.int8 if options & ops.INT8 else like.dtype
    if dtype not in SHARING_DTYPES:
        return f"the kernel shares prefixes in float32 and float64, not in {dtype}"
    if choice.why_not_kernel is not None or at_any_cost:
        return choice.why_not_kernel
    hidden_size = call.state_sizes()[0]
    if hidden_size < SHARED_FROM_HIDDEN:
        return f"it pays off if hidden_size is at least {SHARED_FROM_HIDDEN}, not {hidden_size}"
    sequences = _sequences(call)
    if sequences < SHARED_FROM_SEQUENCES:
        return f"it pays off for at least {SHARED_FROM_SEQUENCES} sequences, not for {sequences}"
    return why_not_table(call, embedding, choice)


def refuse_to_share(why_not: str) -> NoReturn:
    """Raises the error for share_prefixes=True in a call for which sharing is impossible."""
    raise ValueError(f"share_prefixes=True is impossible here: {why_not}")


def gather(
    ids: Tensor,
    embedding: Tensor,
    padding_idx: int | None,
    sequence_layout: Tensor | None = None,
    options: int = 0,
) -> Tensor:
    """Returns the embedding rows of ids, (..., input_size). Rows in padding are arbitrary.

    Args:
        ids, sequence_layout, options: the token ids, layout and option bits of the call.
        embedding, padding_idx: as in `Lookup`.

    Raises:
        IndexError: an id is out of range.
    """
    lengths = None if options & (ops.PACKED | ops.JAGGED) else sequence_layout
    # Lengths of the wrong shape are reported later, by the operator.
    if lengths is not None and are_lengths_of(lengths, ids, options):
        ids = torch.where(steps_of_sequences(ids, lengths, options), ids, 0)
    if is_compiling():
        return F.embedding(ids, embedding, padding_idx)
    try:
        return F.embedding(ids, embedding, padding_idx)
    except IndexError:
        check_ids(ids, embedding.shape[0], sequence_layout, options)
        raise


def embed(input: Any, embedding: Callable[[Tensor], Tensor]) -> Any:
    """Returns an input of any layout with its ids replaced by the rows that `embedding` returns."""
    if isinstance(input, PackedSequence):
        return input._replace(data=embedding(input.data))
    return embedding(input)


def places_of_inputs(cell: Cell, options: int) -> list[int]:
    """For each direction, returns the index of the first layer's weight_ih among the weights."""
    parameters = ops.parameters_of(cell, options) * ops.directions_of(options)
    return [k for k, parameter in enumerate(parameters) if parameter.role == "weight_ih"]


def with_tables(
    embedding: Tensor, padding_idx: int | None, weights: Sequence[Tensor], cell: Cell, options: int
) -> list[Tensor]:
    """Returns the weights with each weight_ih of the first layer replaced with a table."""
    if torch.is_grad_enabled():
        if padding_idx is None:
            # A view keeps its values if `embedding.data` is replaced before the backward pass.
            embedding = embedding.view_as(embedding)
        else:
            # Look up every row: the values are the same, but row padding_idx gets no gradient.
            every_row = torch.arange(embedding.shape[0], device=embedding.device)
            embedding = F.embedding(every_row, embedding, padding_idx)
    replaced = [*weights]
    for place in places_of_inputs(cell, options):
        replaced[place] = _product(embedding, weights[place])
    return replaced


def _product(embedding: Tensor, weight_ih: Tensor) -> Tensor:
    """Returns embedding W_ih^T, with autocast off, because both operands have already been cast."""
    device = embedding.device.type
    if device == "cpu" and embedding.dtype.itemsize == 2:
        # oneDNN may read past the end of 16-bit rows (uxlfoundation/oneDNN#5717). For a slice of a
        # wider matrix, a NaN in the column after the slice would then reach the result.
        embedding, weight_ih = embedding.contiguous(), weight_ih.contiguous()
    if not (autocast_is_on() and torch.is_autocast_enabled(device)):
        return F.linear(embedding, weight_ih)
    with torch.autocast(device, enabled=False):
        return F.linear(embedding, weight_ih)


def _sequences(call: Call) -> int:
    """Returns the number of sequences of a call on token ids."""
    ids, sequence_layout, options = call.data, call.sequence_layout, call.options
    if sequence_layout is not None and options & ops.PACKED:
        return int(sequence_layout[0]) if len(sequence_layout) else 0
    if sequence_layout is not None and options & ops.JAGGED:
        return len(sequence_layout) - 1
    return ids.shape[0 if options & ops.BATCH_FIRST else 1]


def check_embedding(
    embedding: Tensor, padding_idx: int | None, ids: Tensor, weights: Sequence[Tensor]
) -> None:
    """Checks embedding and padding_idx.

    Raises:
        ValueError: the shape, dtype or device of embedding does not match, or padding_idx is out of
            range.
    """
    weight_ih = weights[0]
    if embedding.dim() != 2 or embedding.shape[1] != weight_ih.shape[1]:
        raise ValueError(
            f"embedding must have shape (vocabulary, {weight_ih.shape[1]}), got "
            f"{tuple(embedding.shape)}"
        )
    if embedding.dtype != weight_ih.dtype:
        raise ValueError(
            f"embedding must have the dtype of the weights, {weight_ih.dtype}, got "
            f"{embedding.dtype}"
        )
    if not embedding.device == weight_ih.device == ids.device:
        raise ValueError(
            "input, embedding and weights must be on one device, got input on "
            f"{ids.device}, embedding on {embedding.device} and weights on {weight_ih.device}"
        )
    vocabulary = embedding.shape[0]
    if padding_idx is not None and not -vocabulary <= padding_idx < vocabulary:
        raise ValueError(
            f"padding_idx must be between {-vocabulary} and {vocabulary - 1} (embedding has "
            f"{vocabulary} rows), got {padding_idx}"
        )
