"""The fake kernels of the operators, which compute the shapes of results for compilers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .call import Cell


@torch.library.register_fake(f"{ops.NAMESPACE}::rnn_forward")
def _fake_forward(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    sequence_layout: Tensor | None,
    reset: Tensor | None,
    options: int,
    trees: int = 0,
) -> tuple[Any, ...]:
    num_layers, directions = ops.layer_count(weights, options), ops.directions_of(options)
    hidden_size = ops.hidden_size_of(weights)
    if hx is not None:
        batch: Any = hx.shape[1]  # a number or a symbol
    elif options & ops.PACKED:  # it is a value in batch_sizes, which a tracer cannot see
        batch = torch.library.get_ctx().new_dynamic_size()
    elif options & ops.JAGGED:
        batch = sequence_layout.shape[0] - 1  # type: ignore[union-attr]
    else:
        batch = input.shape[0 if options & ops.BATCH_FIRST else 1]
    shape = ops.output_shape(input, hidden_size, options)
    hidden = num_layers - 1 if options & ops.WANT_HIDDEN else 0
    like = weights[0]  # ids have another dtype
    return (
        like.new_empty(shape),
        like.new_empty((num_layers * directions, batch, hidden_size)),
        [like.new_empty(shape) for _ in range(hidden)],
    )


def _fake_kept(cell: Cell, input: Tensor, weights: Sequence[Tensor], options: int) -> list[Tensor]:
    layers = ops.layer_count(weights, options) if options & ops.WANT_HIDDEN else 0
    shape = ops.kept_shape(cell, input, ops.hidden_size_of(weights), options) if layers else ()
    return [weights[0].new_empty(shape) for _ in range(layers)]


@torch.library.register_fake(f"{ops.NAMESPACE}::gru_forward")
def _(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *arguments: Any
) -> tuple[Any, ...]:
    results = _fake_forward(input, hx, weights, *arguments)
    return *results, _fake_kept("gru", input, weights, arguments[2])


@torch.library.register_fake(f"{ops.NAMESPACE}::lstm_forward")
def _(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    *arguments: Any,
) -> tuple[Any, ...]:
    output, h_n, hidden = _fake_forward(input, hx, weights, *arguments)
    kept = _fake_kept("lstm", input, weights, arguments[2])
    return output, h_n, torch.empty_like(h_n), hidden, kept


@torch.library.register_fake(f"{ops.NAMESPACE}::rnn_backward")
def _fake_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
    hidden: Sequence[Tensor],
    sequence_layout: Tensor | None,
    reset: Tensor | None,
    options: int,
    want_input: bool,
    want_hx: bool,
    want_layers: Sequence[int],
    trees: int = 0,
) -> tuple[Any, ...]:
    per_layer, like = ops.weights_per_layer(options), weights[0]
    return (
        like.new_empty(input.shape if want_input else (0,)),
        like.new_empty(hx.shape if want_hx else (0,)),  # type: ignore[union-attr]
        [
            w.new_empty(w.shape if i // per_layer in want_layers else (0,))
            for i, w in enumerate(weights if want_layers else [])
        ],
    )


@torch.library.register_fake(f"{ops.NAMESPACE}::gru_backward")
def _(*arguments: Any) -> tuple[Any, ...]:
    return _fake_backward(*ops.without_own("gru", arguments))  # type: ignore[no-any-return]


@torch.library.register_fake(f"{ops.NAMESPACE}::lstm_backward")
def _(*arguments: Any) -> tuple[Any, ...]:
    grad_input, grad_hx, grad_weights = _fake_backward(*ops.without_own("lstm", arguments))
    return grad_input, grad_hx, torch.empty_like(grad_hx), grad_weights
