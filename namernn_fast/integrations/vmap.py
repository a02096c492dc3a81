"""The layer under `torch.func.vmap`: what is mapped over joins the batch of fused calls."""

from collections.abc import Callable

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from .. import ops


def only_vmap_is_active() -> bool:
    """Whether the torch.func transforms that look on are `vmap`, each of them."""
    return all(i.key() == TransformType.Vmap for i in retrieve_all_functorch_interpreters())


class Mapped(torch.autograd.Function):
    """`run_stack(input, hx, weights, ...)` under vmap, by a rule that calls it one level below.

    Gradients are a matter for what runs there: nothing of them is seen here.
    """

    @staticmethod
    def forward(*arguments):
        raise AssertionError("its vmap rule takes every call")

    @staticmethod
    def setup_context(ctx, inputs, output):
        raise AssertionError("its vmap rule takes every call")

    @staticmethod
    def vmap(info, in_dims, run_stack: Callable, input, hx, rows, reset, options, *weights):
        _, input_dim, hx_dim, rows_dim, reset_dim, _, *weight_dims = in_dims
        if rows_dim is not None and options & (ops.PACKED | ops.JAGGED):
            raise ValueError(
                "vmap cannot map over the layout of packed or jagged sequences: map over padded "
                "input and lengths"
            )

        def of_each(tensor, dim):
            return [tensor] * info.batch_size if dim is None else tensor.unbind(dim)

        if any(dim is not None for dim in weight_dims):  # a call for each model
            results = [
                run_stack(x, h, ws, own_rows, cuts, options)
                for x, h, own_rows, cuts, *ws in zip(
                    of_each(input, input_dim),
                    of_each(hx, hx_dim),
                    of_each(rows, rows_dim),
                    of_each(reset, reset_dim),
                    *map(of_each, weights, weight_dims),
                    strict=True,
                )
            ]
            return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0)

        if options & ops.JAGGED:
            raise ValueError(
                "vmap cannot map over a jagged tensor with weights that are not mapped over: map "
                "over padded input and lengths"
            )

        def join(tensor, dim, batch_dim):
            """What is mapped over and the batch as one dimension, the batch first."""
            if tensor is None:
                return None
            if dim is None:
                tensor = tensor.unsqueeze(batch_dim + 1)
                tensor = tensor.expand(
                    *tensor.shape[: batch_dim + 1], info.batch_size, *tensor.shape[batch_dim + 2 :]
                )
            else:
                tensor = tensor.movedim(dim, batch_dim + 1)
            return tensor.flatten(batch_dim, batch_dim + 1)

        # Rows of packed data are joined like sequences: one after the other for each time.
        packed, batch_first = options & ops.PACKED, options & ops.BATCH_FIRST
        batch_dim = 0 if batch_first or packed else 1
        output, h_n = run_stack(
            join(input, input_dim, batch_dim),
            join(hx, hx_dim, 1),
            weights,
            rows * info.batch_size if packed else join(rows, rows_dim, 0),
            join(reset, reset_dim, 0 if batch_first else 1),
            options,
        )
        split = (-1, info.batch_size)
        return (output.unflatten(batch_dim, split), h_n.unflatten(1, split)), (batch_dim + 1, 2)
