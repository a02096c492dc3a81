"""The fake kernels of the operators, which compute the shapes of results for compilers."""

import itertools
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cells import NUMBERED


@torch.library.register_fake(f"{ops.NAMESPACE}::forward")
def _(*arguments: Any) -> tuple[Any, ...]:
    call = ops.ForwardArguments(*arguments)
    options, weights, states = call.options, call.weights, call.states
    num_layers, directions = ops.layer_count(weights, options), ops.directions_of(options)
    hidden_size = ops.hidden_size_of(weights)
    if states:
        batch: Any = states[0].shape[1]  # a number or a symbol
    elif options & ops.PACKED:  # it is a value in batch_sizes, which a tracer cannot see
        batch = torch.library.get_ctx().new_dynamic_size()
    elif options & ops.JAGGED:
        batch = call.sequence_layout.shape[0] - 1  # type: ignore[union-attr]
    else:
        batch = call.input.shape[0 if options & ops.BATCH_FIRST else 1]
    cell, like = NUMBERED[call.cell], weights[0]  # ids have another dtype
    shape = ops.output_shape(call.input, hidden_size, options)
    saved = []
    if options & ops.WANT_HIDDEN:
        saved += [shape] * (num_layers - 1)
        if cell.kept_blocks:
            saved += [ops.kept_shape(cell, call.input, hidden_size, options)] * num_layers
    states_shape = num_layers * directions, batch, hidden_size
    return (
        like.new_empty(shape),
        [like.new_empty(states_shape) for _ in cell.states],
        [like.new_empty(shape) for shape in saved],
    )


@torch.library.register_fake(f"{ops.NAMESPACE}::backward")
def _(*arguments: Any) -> list[Tensor]:
    call = ops.BackwardArguments(*arguments)
    per_layer, weights = ops.weights_per_layer(call.options), call.weights
    tensors = [*itertools.compress((call.input, *call.states), call.wanted)]
    for k in sorted(call.want_layers):
        tensors += weights[k * per_layer : (k + 1) * per_layer]
    return [weights[0].new_empty(tensor.shape) for tensor in tensors]
