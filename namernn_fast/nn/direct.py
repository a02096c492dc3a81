"""Steps without torch's dispatcher, which takes longer than a small step, for modules on a CPU."""

from typing import Any

import torch
from torch import Tensor, empty_like
from torch.compiler import is_dynamo_compiling

from ..cells import Cell
from ..machine.torch_private import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _profiler_enabled,
    forward_ad,
)
from ..prepared_ops import step_directly
from .states import states_in

_PLAIN = (Tensor, torch.nn.Parameter)


def is_unobserved() -> bool:
    """Returns whether no compiler, transform, mode or profiler has to see what a call runs."""
    return (
        not is_dynamo_compiling()
        and _get_tracing_state() is None
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and not _profiler_enabled()
    )


def step(
    cell: Cell, input: Tensor, hx: Any, weights: list[Tensor], hidden_size: int, options: int
) -> Any:
    """Runs a step of a step module in inference, if `is_unobserved()`.

    Args:
        cell: the cell.
        input: (batch, input_size).
        hx: the states as the module takes them, (batch, hidden_size) each, or None.
        weights: the weights of the module, or the prepared tensor.
        hidden_size: the number of features of a state.
        options: the option bits of the module.

    Returns:
        The new states as the module returns them, or None if the arguments are of another kind or
        do not match.
    """
    states = [] if hx is None else [hx] if len(cell.states) == 1 else [*states_in(hx)]
    if hx is not None and len(states) != len(cell.states):
        return None
    for tensor in (input, *states, *weights):
        # The values of a subclass, or of a lazily negated tensor, may differ from its memory.
        if type(tensor) not in _PLAIN or tensor.is_neg():
            return None
    if input.dim() != 2:
        return None
    if states:
        last = [empty_like(state) for state in states]
    else:
        size = input.shape[0], hidden_size
        last = [torch.empty(size, dtype=input.dtype) for _ in cell.states]
    try:
        number = cell.number
        if not step_directly(weights, states, last, input, None, None, options, number, None):
            return None
    except RuntimeError:  # the caller raises its own
        return None
    return last[0] if len(last) == 1 else tuple(last)
