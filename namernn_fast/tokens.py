"""Token ids as input: the table of their products with weight_ih, or the rows that they stand for.

A layer multiplies the row of features of each token by weight_ih. Of a small vocabulary it is less
work to multiply each row of `embedding` once: `table = embedding W_ih^T` (vocabulary, hidden_size),
of which the operators read the row of each id. Where there are fewer ids than rows, ids are
replaced by the rows that they stand for.
"""

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import fp32_precision, ops
from .call import Call
from .checks import ID_DTYPES, are_lengths_of, check_ids, steps_of_sequences
from .dispatch import why_not_kernel
from .integrations import onnx

TRACED_VOCABULARY = 1024
"""The largest vocabulary of which a compiler gets a table: it is not to look at other sizes."""
SHARING_DTYPES = (torch.float32, torch.float64)
SHARED_FROM_HIDDEN = 32
"""hidden_size from which sharing prefixes pays."""
SHARED_FROM_SEQUENCES = 128
"""Sequences from which sharing prefixes pays: finding out costs a few steps of fewer sequences."""


def check_types(input: Tensor | PackedSequence, embedding: Tensor) -> None:
    """Checks that embedding is a tensor and that input, if that is a tensor, holds token ids.

    Raises:
        TypeError: one of them is something else.
    """
    if not isinstance(embedding, Tensor):
        raise TypeError(f"embedding must be a Tensor or None, got {type(embedding).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(data, Tensor) and data.dtype not in ID_DTYPES:
        raise TypeError(
            f"input must hold token ids, int32 or int64, if embedding is given, got {data.dtype}"
        )


class Lookup(NamedTuple):
    """What token ids stand for, and whether sequences that begin alike may share states."""

    embedding: Tensor
    """(vocabulary, input_size)"""
    padding_idx: int | None = None
    """The row of `embedding` that gets no gradient."""
    share_prefixes: bool | None = False
    """As of `namernn_fast.last_state`."""


def look_up(call: Call, lookup: Lookup) -> None:
    """Changes a call on token ids into one that the operators take: with tables, or on features.

    Args:
        call: its data are ids of an integer dtype.
        lookup: what the ids stand for.

    Raises:
        ValueError: embedding or padding_idx does not fit; prefixes are to be shared where that is
            impossible.
        IndexError: an id has no row.
    """
    embedding, padding_idx, share_prefixes = lookup
    ids = call.data
    _check_embedding(embedding, padding_idx, ids, call.weights)
    tracing = torch.compiler.is_compiling()
    if share_prefixes is not False:
        why_not = why_not_shared(call, embedding, tracing, share_prefixes is True)
        if why_not is None:
            call.options |= ops.SHARE_PREFIXES | ops.TREES * torch.get_num_threads()
        elif share_prefixes:
            refuse_to_share(why_not)
    options = call.options
    if not options & ops.SHARE_PREFIXES and why_not_table(ids, embedding, options, tracing):
        call.data = gather(ids, embedding, padding_idx, call.sequence_layout, options)
        return
    if ids.dtype != torch.int64:
        call.data = ids.long()
    call.weights = _with_tables(embedding, padding_idx, call.weights, options)


def why_not_table(ids: Tensor, embedding: Tensor, options: int, tracing: bool) -> str | None:
    """Returns why a call gathers the rows that its ids stand for, or None if it makes a table.

    Args:
        ids, options: of the call.
        embedding: (vocabulary, input_size).
        tracing: whether a compiler traces the call.
    """
    if options & ops.BATCH_INVARIANT:
        return "the product of a table may have other bits for another number of threads"
    vocabulary = embedding.shape[0]
    if tracing:
        if onnx.exporting():
            return "a node of ONNX takes rows"
        # A size that a compiler leaves open is not to become a guard.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        if not statically_known_true(vocabulary <= TRACED_VOCABULARY):
            return f"a compiler gets tables of up to {TRACED_VOCABULARY} rows"
    elif vocabulary > ids.numel():
        return f"multiplying {ids.numel()} ids is less work than multiplying {vocabulary} rows"
    elif (
        embedding.is_cuda
        and embedding.dtype == torch.float32
        and (fp32_precision.of_products(), fp32_precision.of_rnns()) == ("tf32", "ieee")
    ):
        return "the product of a table would be rounded to TF32, and that of an RNN is not to be"
    return None


def why_not_shared(
    call: Call, embedding: Tensor, tracing: bool, at_any_cost: bool = False
) -> str | None:
    """Returns why the sequences of a call do not share prefixes, or None if they may.

    The kernel, which sees the ids, shares as far as they begin alike.

    Args:
        call: on token ids.
        embedding: (vocabulary, input_size).
        tracing: whether a compiler traces the call.
        at_any_cost: whether to ask only what is possible, and not what pays.
    """
    ids, options = call.data, call.options
    if options & ops.BIDIRECTIONAL:
        return "the second direction begins at the ends of sequences"
    if call.hx is not None:
        return "hx gives each sequence its own initial state"
    if call.reset is not None:
        return "reset restarts sequences"
    if call.dropout:
        return "dropout between layers is drawn for each sequence"
    if options & ops.BATCH_INVARIANT:
        return "batch_invariant rules out a table"
    if tracing:
        return "a compiler traces the call"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if not ids.is_cpu:
        return f"kernels on {ids.device.type} do not share prefixes"
    like = call.weights[0]
    if like.dtype not in SHARING_DTYPES:
        return f"the kernel shares prefixes in float32 and float64, not in {like.dtype}"
    why_not = why_not_kernel(like, tracing)
    if why_not is not None or at_any_cost:
        return why_not
    hidden_size = ops.hidden_size_of(call.weights)
    if hidden_size < SHARED_FROM_HIDDEN:
        return f"it pays from hidden_size {SHARED_FROM_HIDDEN}, not for {hidden_size}"
    sequences = _sequences(call)
    if sequences < SHARED_FROM_SEQUENCES:
        return f"it pays from {SHARED_FROM_SEQUENCES} sequences, not for {sequences}"
    return why_not_table(ids, embedding, options, tracing)


def refuse_to_share(why_not: str) -> NoReturn:
    """Raises the error of a call with share_prefixes=True that cannot share them."""
    raise ValueError(f"share_prefixes=True is impossible here: {why_not}")


def gather(
    ids: Tensor,
    embedding: Tensor,
    padding_idx: int | None,
    sequence_layout: Tensor | None = None,
    options: int = 0,
) -> Tensor:
    """Returns the rows of features that ids stand for, (..., input_size).

    Args:
        ids, sequence_layout, options: of the call. In the padding of padded sequences there are
            rows of no meaning.
        embedding, padding_idx: as of `Lookup`.

    Raises:
        IndexError: an id has no row.
    """
    lengths = None if options & (ops.PACKED | ops.JAGGED) else sequence_layout
    if lengths is not None and are_lengths_of(lengths, ids, options):  # else found later
        ids = torch.where(steps_of_sequences(ids, lengths, options), ids, 0)
    if torch.compiler.is_compiling():
        return F.embedding(ids, embedding, padding_idx)
    try:
        return F.embedding(ids, embedding, padding_idx)
    except IndexError:
        check_ids(ids, embedding.shape[0], sequence_layout, options)
        raise


def gather_any(
    input: Tensor | PackedSequence, embedding: Tensor, padding_idx: int | None
) -> Tensor | PackedSequence:
    """Returns an input of any layout with the rows of features that its ids stand for."""
    if isinstance(input, PackedSequence):
        return input._replace(data=F.embedding(input.data, embedding, padding_idx))
    return F.embedding(input, embedding, padding_idx)


def _with_tables(
    embedding: Tensor, padding_idx: int | None, weights: Sequence[Tensor], options: int
) -> list[Tensor]:
    """Returns the weights with a table in the place of each weight_ih of the first layer."""
    if torch.is_grad_enabled():
        if padding_idx is None:
            # A view keeps its values when another `.data` is assigned before the backward pass.
            embedding = embedding.view_as(embedding)
        else:
            # The values of embedding itself, without a gradient for the row padding_idx.
            every_row = torch.arange(embedding.shape[0], device=embedding.device)
            embedding = F.embedding(every_row, embedding, padding_idx)
    given = [*weights]
    for place in range(0, ops.weights_per_layer(options), 4 if options & ops.BIAS else 2):
        given[place] = F.linear(embedding, weights[place])
    return given


def _sequences(call: Call) -> int:
    """Returns the number of sequences of a call on token ids."""
    ids, sequence_layout, options = call.data, call.sequence_layout, call.options
    if sequence_layout is not None and options & ops.PACKED:
        return int(sequence_layout[0]) if len(sequence_layout) else 0
    if sequence_layout is not None and options & ops.JAGGED:
        return len(sequence_layout) - 1
    return ids.shape[0 if options & ops.BATCH_FIRST else 1]


def _check_embedding(
    embedding: Tensor, padding_idx: int | None, ids: Tensor, weights: Sequence[Tensor]
) -> None:
    """Checks embedding and padding_idx.

    Raises:
        ValueError: the shape, dtype or device of embedding does not fit, or padding_idx names none
            of its rows.
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
            f"padding_idx must be from {-vocabulary} to {vocabulary - 1}, as embedding has "
            f"{vocabulary} rows, got {padding_idx}"
        )
