"""Makes `torch.utils.flop_counter` count floating-point operations of the fused operators.

The counts follow torch's rule for `nn.RNN`: two operations per multiply-add of a matrix product,
and nothing else.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .. import ops, prepared_ops
from ..equations import find_cell
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

    Also counts padding if reading the lengths would wait for a device. Counts a shared prefix once
    for each sequence that starts with it.
    """
    padded = not options & (ops.PACKED | ops.JAGGED)
    lengths = sequence_layout if padded else None
    if lengths is not None and lengths.is_cpu and type(lengths) is Tensor:
        return int(lengths.sum())
    return input.numel() if ops.has_ids(input) else input.shape[:-1].numel()


def _products(call: ops.AnyArguments) -> list[tuple[int, int]]:
    """Returns, for each layer, the multiply-adds per row of its input and recurrent products."""
    parameters = ops.parameters_of(call.described, call.options)
    per_layer = len(parameters) * ops.directions_of(call.options)
    products = [[0, 0] for _ in range(len(call.lists.weights) // per_layer)]
    for k, (weight, parameter) in enumerate(zip(call.lists.weights, itertools.cycle(parameters))):
        if parameter.is_matrix:
            products[k // per_layer][parameter.role != "weight_ih"] += weight.numel()
    if ops.has_ids(call.input):  # table rows are read, not multiplied
        products[0][0] = 0
    return [(of_input, of_states) for of_input, of_states in products]


def _forward(*arguments: Any, **kwargs: Any) -> int:
    call = ops.ForwardArguments(*arguments)
    rows = _rows(call.input, call.sequence_layout, call.options)
    return 2 * rows * sum(ih + hh for ih, hh in _products(call))


def _forward_prepared(*arguments: Any, **kwargs: Any) -> int:
    call = prepared_ops.PreparedArguments(*arguments)
    layers, input_size, hidden_size, _, size, heads = call.sizes
    shapes = ops.parameters_and_shapes(
        find_cell(call.cell, call.program),
        call.options,
        layers=layers,
        features=input_size,
        hidden=hidden_size,
        projected=size,
        heads=heads,
    )
    products = sum(math.prod(shape) for parameter, shape in shapes if parameter.is_matrix)
    return 2 * products * _rows(call.input, call.sequence_layout, call.options)


def _backward(*arguments: Any, **kwargs: Any) -> int:
    call = ops.BackwardArguments(*arguments)
    total = 0
    for number, (ih, hh) in enumerate(_products(call)):
        total += hh  # the products for the gradients of the states
        total += ih if number or call.wanted[0] else 0
        total += ih + hh if number in call.want_layers else 0
    return 2 * _rows(call.input, call.sequence_layout, call.options) * total
