"""`torch.func.vmap`: folds the mapped dimension into the batch dimension of one fused call."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_batchedtensor, maybe_get_level
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
)

from .. import ops
from ..call import Call, Path, Results
from ..cells import NUMBERED


def only_vmap_is_active() -> bool:
    """Returns whether every active torch.func transform is `vmap`."""
    return all(i.key() == TransformType.Vmap for i in retrieve_all_functorch_interpreters())


def is_mapped(call: Call) -> bool:
    """Returns whether the innermost `vmap` maps over any tensor of the call."""
    level = retrieve_current_functorch_interpreter().level()
    return any(
        isinstance(value, Tensor) and is_batchedtensor(value) and maybe_get_level(value) == level
        for value in call.flat()
    )


def one_level_below() -> AbstractContextManager[object]:
    """Returns a context without the innermost `vmap`, for a call that it does not map over."""
    return retrieve_current_functorch_interpreter().lower()


class Mapped(torch.autograd.Function):
    """`path(call)` under vmap: its vmap rule runs `path` one level below. Takes `call.flat()`.

    Gradients are recorded by `path`, one level below; this function has none.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        raise AssertionError("the vmap rule takes every call")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        raise AssertionError("the vmap rule takes every call")

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        path: Path,
        cell: int,
        options: int,
        trees: int,
        sequence_layout: Tensor | None,
        reset: Tensor | None,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Results, tuple[int | None, ...]]:
        """Folds the mapped dimension into the batch, or loops over it if weights are mapped over.

        Args:
            info, in_dims: as in `torch.autograd.Function.vmap`.
            path: computes the call one level below.
            cell, options, trees, sequence_layout, reset: as of `namernn_fast.ops`.
            count: the number of states, plus one.
            tensors: input, states and weights.

        Returns:
            The results, and their mapped dimensions. With LAST_STATE output has no elements.

        Raises:
            ValueError: batch_sizes or offsets are mapped over; a jagged tensor is mapped over, but
                the weights are not.
        """
        *_, layout_dim, reset_dim, _ = in_dims[: -len(tensors)]
        dims, size, kind = in_dims[-len(tensors) :], info.batch_size, NUMBERED[cell]
        (input, *states), weights = tensors[:count], tensors[count:]
        (input_dim, *states_dims), weights_dims = dims[:count], dims[count:]
        if layout_dim is not None and options & (ops.PACKED | ops.JAGGED):
            raise ValueError(
                "vmap cannot map over the layout of packed or jagged sequences: map over padded "
                "input and lengths"
            )
        if any(dim is not None for dim in weights_dims):
            results = [
                path(Call(kind, x, None, ws, layout, cuts, options, 0.0, trees, initial))
                for x, initial, ws, layout, cuts in zip(
                    _split(input, input_dim, size),
                    _split_each(states, states_dims, size),
                    _split_each(weights, weights_dims, size),
                    _split(sequence_layout, layout_dim, size),
                    _split(reset, reset_dim, size),
                    strict=True,
                )
            ]
            if options & ops.LAST_STATE:
                return _without_output([*map(torch.stack, zip(*results, strict=True))][1:], 0)
            return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
        if options & ops.JAGGED:
            raise ValueError(
                "vmap can only map over a jagged tensor if it maps over the weights too: map over "
                "padded input and lengths"
            )
        # Packed data holds the sequences of one time side by side, so its rows act as the batch.
        packed, batch_first = options & ops.PACKED, options & ops.BATCH_FIRST
        batch_dim = 0 if batch_first or packed else 1
        folded = Call(
            kind,
            _fold(input, input_dim, batch_dim, size),
            None,
            weights,
            sequence_layout * size if packed else _fold(sequence_layout, layout_dim, 0, size),
            _fold(reset, reset_dim, 0 if batch_first else 1, size),
            options,
            0.0,
            trees,
            [_fold(state, dim, 1, size) for state, dim in zip(states, states_dims, strict=True)],
        )
        output, *last = path(folded)
        last = [state.unflatten(1, (-1, size)) for state in last]
        if options & ops.LAST_STATE:
            return _without_output(last, 2)
        dims = (batch_dim + 1, *(2 for _ in last))
        return (output.unflatten(batch_dim, (-1, size)), *last), dims


def _without_output(states: list[Tensor], dim: int) -> tuple[Results, tuple[int | None, ...]]:
    """Returns results without output and their mapped dimensions, `dim` for the states."""
    return (states[0].new_empty(0), *states), (None, *(dim for _ in states))


def _split(tensor: Any, dim: int | None, size: int) -> Any:
    """Returns one tensor per call: the slices along `dim`, or the same tensor if not mapped."""
    return [tensor] * size if dim is None else tensor.unbind(dim)


def _split_each(
    tensors: Sequence[Tensor], dims: Sequence[int | None], size: int
) -> list[tuple[Tensor, ...]]:
    """Returns for each call the slices of all tensors."""
    if not tensors:
        return [()] * size
    slices = (_split(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True))
    return [*zip(*slices, strict=True)]


def _fold(tensor: Any, dim: int | None, batch_dim: int, size: int) -> Any:
    """Folds the mapped dimension into the batch dimension; the batch index varies slowest."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(batch_dim + 1)
        tensor = tensor.expand(*tensor.shape[: batch_dim + 1], size, *tensor.shape[batch_dim + 2 :])
    else:
        tensor = tensor.movedim(dim, batch_dim + 1)
    return tensor.flatten(batch_dim, batch_dim + 1)
