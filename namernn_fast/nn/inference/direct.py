"""Decides when a single step runs the kernel, and runs it without torch's dispatcher.

The dispatcher would take longer than a small step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, empty_like, is_grad_enabled

from ... import ops
from ...cells import Cell
from ...machine import availability
from ...prepared_ops import step_directly
from ...reference import PLAIN
from ..states import states_in

# Looked up at import, because a tracer cannot record an operator that returns a string.
KERNEL, BFLOAT16_KERNEL = (
    map(ops.cpu_kernel, (torch.float32, torch.bfloat16))
    if availability.HAS_EXTENSION
    else ("none", "none")
)
SLOW_KERNELS = ("none", "baseline")
"""Where torch's operators are faster for a single step."""
MIN_UNROLLED = 256
"""The least hidden_size at which vanilla cells gain from `unrolled()`. Torch's cell has only four
operators, which take as long as the `autograd.Function` of a step."""


def is_faster(
    cell: Cell, batch: int, input_size: int, hidden_size: int, *, skips_dispatcher: bool
) -> bool:
    """Returns whether a step is faster on the kernel than with the operators of torch's cell.

    The limits were measured with `benchmarks.cpu.steps` on one and two threads. They are the same
    for any number of threads, because results must not depend on the number of threads.

    Args:
        cell: the cell.
        batch, input_size, hidden_size: the sizes of the step.
        skips_dispatcher: whether the step skips torch's dispatcher, as in inference. Torch's
            operators cannot skip it.
    """
    if KERNEL in SLOW_KERNELS:
        return False
    if skips_dispatcher:
        return batch <= 16 or input_size + hidden_size <= 256
    if cell.gates == 1:
        return False
    if BFLOAT16_KERNEL == "avx512_bf16":  # AMD, where torch's BLAS is slower
        multiply_adds = batch * cell.gates * hidden_size * (input_size + hidden_size)
        return batch > 1 and multiply_adds >= 2**19
    return 8 <= batch <= 16 and hidden_size >= 512


def is_faster_with_gradients(cell: Cell, hidden_size: int) -> bool:
    """Returns whether a step with gradients is faster as one operator than with torch's cell.

    Wider layers lose: a single backward step packs weights for one product.
    """
    return KERNEL not in SLOW_KERNELS and cell.gates > 1 and hidden_size <= 256


def try_step(
    cell: Cell,
    weights: Sequence[Tensor],
    input: Tensor,
    options: int,
    states: Sequence[Tensor],
    *,
    hidden_size: int = 0,
    in_place: bool = False,
    output: Tensor | None = None,
    rows: Sequence[int] | None = None,
    inputs: Sequence[Tensor] = (),
) -> Sequence[Tensor] | None:
    """Runs a step without torch's dispatcher if all tensors are plain.

    Call this function only if `is_unobserved()` returns True.

    Args:
        cell, options: as in `namernn_fast.ops`.
        weights: the weights of one layer, or the prepared tensor.
        input: (batch, input_size), or as in the operator `step`.
        states: (batch, hidden_size) each, or as in the operator `step`; empty for zeros.
        hidden_size: the number of features of a state; only read if `states` is empty.
        in_place: whether to update `states`; `states` and `weights` then belong to a stream.
        output: the tensor to write the output to, or None.
        rows, inputs: as in the operator `step`.

    Returns:
        The last states, or None if the step did not run and nothing has changed.

    Raises:
        RuntimeError: the arguments do not match.
    """
    has_gradients = is_grad_enabled()
    for tensor in (input, *inputs) if in_place else (input, *states, *weights):
        # The memory of a subclass or of a lazily negated tensor may not hold the tensor's values.
        if type(tensor) not in PLAIN or tensor.is_neg() or (has_gradients and tensor.requires_grad):
            return None
    last: Sequence[Tensor] | None
    if in_place:
        last = None
    elif states:
        last = [empty_like(state) for state in states]
    else:
        last = [torch.empty(input.shape[0], hidden_size, dtype=input.dtype) for _ in cell.states]
    if step_directly(
        weights,
        states,
        last,
        input,
        output,
        rows,
        options,
        cell.number,
        inputs or None,
        cell.program,
        None,
    ):
        return states if last is None else last
    return None


def step_of_module(
    cell: Cell, input: Tensor, hx: Any, weights: list[Tensor], hidden_size: int, options: int
) -> Any:
    """Runs a step of a step module with `try_step`, if `is_unobserved()` returns True.

    Args:
        cell: the cell.
        input: (batch, input_size).
        hx: the states as passed to the module, (batch, hidden_size) each, or None.
        weights: the weights of the module, or the prepared tensor.
        hidden_size: the number of features of a state.
        options: the option bits of the module.

    Returns:
        The new states as the module returns them, or None if the step did not run.
    """
    if hx is None:
        states = []
    elif len(cell.states) == 1:
        states = [hx]
    else:
        states = [*states_in(hx)]
        if len(states) != len(cell.states):
            return None
    if input.dim() != 2:
        return None
    try:
        last = try_step(cell, weights, input, options, states, hidden_size=hidden_size)
    except RuntimeError:  # the caller raises its own error
        return None
    if last is None:
        return None
    return last[0] if len(last) == 1 else tuple(last)
