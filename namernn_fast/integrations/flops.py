"""`torch.utils.flop_counter`: counts the floating-point operations of the fused operators.

Counts as torch does for `nn.RNN`: two operations per multiply-add of a matrix product, and nothing
else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .deferred import when_imported


def count_flops() -> None:
    """Registers the formulas of the operators with `FlopCounterMode`."""
    when_imported("torch.utils.flop_counter", _register)


def _register(flop_counter: Any) -> None:
    for operator, formula in (
        (torch.ops.namernn_fast.rnn_forward, _forward),
        (torch.ops.namernn_fast.rnn_backward, _backward),
        (torch.ops.namernn_fast.gru_forward, _forward),
        (torch.ops.namernn_fast.gru_backward, _gru_backward),
        (torch.ops.namernn_fast.lstm_forward, _lstm_forward),
        (torch.ops.namernn_fast.lstm_backward, _lstm_backward),
    ):
        flop_counter.register_flop_formula(operator, get_raw=True)(formula)


def _rows(input: Tensor, sequence_layout: Tensor | None, options: int) -> int:
    """Returns the number of (time, sequence) rows that are computed.

    Counts padding too if reading the lengths would wait for a device, and shared prefixes as often
    as they occur.
    """
    padded = not options & (ops.PACKED | ops.JAGGED)
    lengths = sequence_layout if padded else None
    if lengths is not None and lengths.is_cpu and type(lengths) is Tensor:
        return int(lengths.sum())
    return input.numel() if ops.has_ids(input) else input.shape[:-1].numel()


def _products(input: Tensor, weights: Sequence[Tensor], options: int) -> list[tuple[int, int]]:
    """Returns the multiply-adds per row of each layer's two products, over both directions."""
    products = [
        (sum(own.weight_ih.numel() for own in layer), sum(own.weight_hh.numel() for own in layer))
        for layer in ops.layers_of(weights, options)
    ]
    if ops.has_ids(input):  # reading a row of the table costs no product
        products[0] = (0, products[0][1])
    return products


def _forward(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    sequence_layout: Tensor | None,
    reset: Tensor | None,
    options: int,
    trees: int = 0,
    **kwargs: Any,
) -> int:
    rows = _rows(input, sequence_layout, options)
    return 2 * rows * sum(ih + hh for ih, hh in _products(input, weights, options))


def _backward(
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
    **kwargs: Any,
) -> int:
    total = 0
    for number, (ih, hh) in enumerate(_products(input, weights, options)):
        total += hh  # the gradient of the previous state
        total += ih if number or want_input else 0
        total += ih + hh if number in want_layers else 0
    return 2 * _rows(input, sequence_layout, options) * total


def _gru_backward(*args: Any, **kwargs: Any) -> int:
    return _backward(*ops.without_own("gru", args), **kwargs)


def _lstm_forward(input: Any, hx: Any, cx: Any, *args: Any, **kwargs: Any) -> int:
    return _forward(input, hx, *args, **kwargs)


def _lstm_backward(*args: Any, **kwargs: Any) -> int:
    return _backward(*ops.without_own("lstm", args), **kwargs)
