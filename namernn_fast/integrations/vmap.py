"""Supports `torch.func.vmap` by folding the mapped dimension into the batch of one fused call."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..call import Call, Path, Results
from ..machine.torch_private import (
    is_batchedtensor,
    maybe_get_level,
    retrieve_current_functorch_interpreter,
)


def is_mapped(call: Call) -> bool:
    """Returns whether the innermost `vmap` maps over any tensor of the call."""
    level = retrieve_current_functorch_interpreter().level()
    return any(
        isinstance(value, Tensor) and is_batchedtensor(value) and maybe_get_level(value) == level
        for value in call.flat()
    )


def one_level_below() -> AbstractContextManager[object]:
    """Returns a context outside the innermost `vmap`, for calls that this `vmap` does not map."""
    return retrieve_current_functorch_interpreter().lower()  # type: ignore[no-any-return]


class Mapped(torch.autograd.Function):
    """Runs `path(call)` one level below vmap. Its arguments are `path` and `call.flat()`.

    `path` records gradients at that level, so this function has no backward pass.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        raise AssertionError("the vmap rule handles every call")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        raise AssertionError("the vmap rule handles every call")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], path: Path, *arguments: Any
    ) -> tuple[Results, tuple[int | None, ...]]:
        """Folds the mapped dimension into the batch, or loops over it if weights are mapped over.

        Args:
            info, in_dims: as in `torch.autograd.Function.vmap`.
            path: the function that computes the call one level below.
            arguments: the call, as `call.flat()`.

        Returns:
            The results, and their mapped dimensions. With LAST_STATE, output has no elements.

        Raises:
            ValueError: batch_sizes or offsets are mapped over; a jagged tensor is mapped over, but
                the weights are not.
        """
        call, size = Call.of_flat(arguments), info.batch_size
        options, layout = call.options, call.sequence_layout
        layout_dim, reset_dim, input_dim, *dims = in_dims[5:]
        lists: Any = ops.split(call.cell, dims, arguments[2])
        state_dims, restart_dims, beside_dims, weight_dims = lists
        if layout_dim is not None and options & (ops.PACKED | ops.JAGGED):
            raise ValueError(
                "vmap cannot map over the layout of packed or jagged sequences: map over padded "
                "input and lengths"
            )
        if any(dim is not None for dim in weight_dims):
            slices = (
                _split(argument, dim, size)
                for argument, dim in zip(arguments, in_dims[1:], strict=True)
            )
            results = [path(Call.of_flat(flat)) for flat in zip(*slices, strict=True)]
            if options & ops.LAST_STATE:
                return _without_output([*map(torch.stack, zip(*results, strict=True))][1:], 0)
            return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
        if options & ops.JAGGED:
            raise ValueError(
                "vmap can only map over a jagged tensor if it maps over the weights too: map over "
                "padded input and lengths"
            )
        # Packed data holds all sequences of a time step side by side, so its rows act as the batch.
        packed, batch_first = options & ops.PACKED, options & ops.BATCH_FIRST
        batch_dim = 0 if batch_first or packed else 1
        folded = replace(
            call,
            data=_fold(call.data, input_dim, batch_dim, size),
            sequence_layout=layout * size if packed else _fold(layout, layout_dim, 0, size),
            reset=_fold(call.reset, reset_dim, 0 if batch_first else 1, size),
            states=[_fold(*of, 1, size) for of in zip(call.states, state_dims, strict=True)],
            restart_states=[
                _fold(*of, 2, size) for of in zip(call.restart_states, restart_dims, strict=True)
            ],
            beside=[
                _fold(*of, batch_dim, size) for of in zip(call.beside, beside_dims, strict=True)
            ],
        )
        output, *last = path(folded)
        last = [state.unflatten(1, (-1, size)) for state in last]
        if options & ops.LAST_STATE:
            return _without_output(last, 2)
        output = output.unflatten(batch_dim, (-1, size))
        return (output, *last), (batch_dim + 1, *(2 for _ in last))


def _without_output(states: list[Tensor], dim: int) -> tuple[Results, tuple[int | None, ...]]:
    """Returns results with an empty output, and their mapped dimensions: `dim` for the states."""
    return (states[0].new_empty(0), *states), (None, *(dim for _ in states))


def _split(tensor: Any, dim: int | None, size: int) -> Any:
    """Returns one value per call: slices of `tensor` along `dim`, or `tensor` if dim is None."""
    return [tensor] * size if dim is None else tensor.unbind(dim)


def _fold(tensor: Any, dim: int | None, batch_dim: int, size: int) -> Any:
    """Folds the mapped dimension into the batch dimension; the mapped index varies fastest."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(batch_dim + 1)
        tensor = tensor.expand(*tensor.shape[: batch_dim + 1], size, *tensor.shape[batch_dim + 2 :])
    else:
        tensor = tensor.movedim(dim, batch_dim + 1)
    return tensor.flatten(batch_dim, batch_dim + 1)
