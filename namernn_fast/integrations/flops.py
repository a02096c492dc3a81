"""Makes `torch.utils.flop_counter` count floating-point operations of the fused operators.

The counts follow torch's rule for `nn.RNN`: two operations per multiply-add of a matrix product,
and nothing else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, prepared_ops
from ..cells import NUMBERED
from .deferred import when_imported


def count_flops() -> None:
    """Registers the formulas of the operators with `FlopCounterMode`."""
    when_imported("torch.utils.flop_counter", _register, "count the FLOPs of the fused layers")


def _register(flop_counter: Any) -> None:
    operators = torch.ops.namernn_fast
    flop_counter.register_flop_formula(operators.forward, get_raw=True)(_forward)
    flop_counter.register_flop_formula(operators.backward, get_raw=True)(_backward)
    flop_counter.register_flop_formula(operators.forward_prepared, get_raw=True)(_forward_prepared)


def _rows(input: Tensor, sequence_layout: Tensor | None, options: int) -> int:
    """Returns the number of (time, sequence) rows that are computed.

    Counts padding too if reading the lengths would wait for a device. Counts a shared prefix once
    for each sequence that begins with it.
    """
    padded = not options & (ops.PACKED | ops.JAGGED)
    lengths = sequence_layout if padded else None
    if lengths is not None and lengths.is_cpu and type(lengths) is Tensor:
        return int(lengths.sum())
    return input.numel() if ops.has_ids(input) else input.shape[:-1].numel()


def _products(input: Tensor, weights: Sequence[Tensor], options: int) -> list[tuple[int, int]]:
    """Returns each layer's multiply-adds per row for its input and for its states."""
    products = []
    for layer in ops.layers_of(weights, options):
        matrices = [w for direction in layer for w in direction if w is not None and w.dim() == 2]
        of_input = sum(direction.weight_ih.numel() for direction in layer)
        products.append((of_input, sum(weight.numel() for weight in matrices) - of_input))
    if ops.has_ids(input):  # rows of the table are read, not multiplied
        products[0] = (0, products[0][1])
    return products


def _forward(*arguments: Any, **kwargs: Any) -> int:
    call = ops.ForwardArguments(*arguments)
    products = _products(call.input, call.weights, call.options)
    rows = _rows(call.input, call.sequence_layout, call.options)
    return 2 * rows * sum(ih + hh for ih, hh in products)


def _forward_prepared(*arguments: Any, **kwargs: Any) -> int:
    call = prepared_ops.PreparedArguments(*arguments)
    layers, input_size, hidden_size, _, size = call.sizes
    directions = ops.directions_of(call.options)
    features = input_size + (layers - 1) * directions * size + layers * size
    products = directions * NUMBERED[call.cell].weight_blocks * hidden_size * features
    if call.options & ops.PROJECTIONS:
        products += directions * layers * size * hidden_size
    return 2 * products * _rows(call.input, call.sequence_layout, call.options)


def _backward(*arguments: Any, **kwargs: Any) -> int:
    call = ops.BackwardArguments(*arguments)
    total = 0
    for number, (ih, hh) in enumerate(_products(call.input, call.weights, call.options)):
        total += hh  # the gradients of the states
        total += ih if number or call.wanted[0] else 0
        total += ih + hh if number in call.want_layers else 0
    return 2 * _rows(call.input, call.sequence_layout, call.options) * total
