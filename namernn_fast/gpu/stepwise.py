"""Runs the recurrence of a layer with two launches per step: a torch product and the activation.

The streamed kernel reads weight_hh at every step. If torch is estimated to compute the product of
a step faster, this path replaces the kernel; see `plan`. States overwrite the projected input, and
dz overwrites a copy of the gradient of the output, so that the products can accumulate in place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..machine import transfers
from ..machine.torch_private import _foreach_copy_
from .plan import FEWEST_UNITS_OF_STEPS, plan_of
from .problem import BackwardTensors, Stack
from .products import precision_of_its_own


def suits(stack: Stack, like: Tensor) -> bool:
    """Returns whether this path can run a stack on the device of `like`, and should be faster."""
    layout = stack.layout
    if stack.hidden_size < FEWEST_UNITS_OF_STEPS or like.dtype != torch.float32:
        return False  # a product in 16 bits would round its sums before the activation
    if layout.B == 0 or not layout.is_whole or precision_of_its_own(like) is not None:
        return False
    plan = plan_of(stack.hidden_size, layout.B, like, stack.directions)
    return plan.runs_stepwise(stack.hidden_size, layout.B, transfers.is_capturing(like.device))


def forward_steps(
    stack: Stack,
    hx: Tensor | None,
    weights_hh: Sequence[Tensor],
    states: Tensor,
    h_n: Tensor,
) -> None:
    """Computes the states of a layer.

    Args:
        stack, hx, h_n: as in `layer.forward_layer`.
        weights_hh: the recurrent weights of each direction, (H, H).
        states: the projected input with both biases, (N, directions * H); overwritten by states.
    """
    activate = torch.relu_ if stack.options & ops.RELU else torch.tanh_
    if hx is None:  # Multiply zeros too, because zero times a non-finite weight is NaN.
        hx = torch.zeros_like(h_n)
    for k, weight_hh in enumerate(weights_hh):
        transposed = weight_hh.t()
        steps = _steps(states, stack, k)
        previous_state = hx[k]
        for h in steps:
            activate(h.addmm_(previous_state, transposed))
            previous_state = h
        h_n[k].copy_(steps[-1])


def backward_steps(stack: Stack, tensors: BackwardTensors) -> None:
    """Runs the backward recurrence of a layer."""
    aten = torch.ops.aten
    if tensors.grad_output is None:
        tensors.dz.zero_()
    else:
        tensors.dz.copy_(tensors.grad_output)
    for k, weight_hh in enumerate(tensors.weights_hh):
        states, grads = _steps(tensors.output, stack, k), _steps(tensors.dz, stack, k)
        if tensors.grad_h_n is not None:
            grads[-1].add_(tensors.grad_h_n[k])
        later_dz = None
        for h, grad in zip(reversed(states), reversed(grads), strict=True):
            if later_dz is not None:
                grad.addmm_(later_dz, weight_hh)
            if stack.options & ops.RELU:
                aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)
            else:
                aten.tanh_backward.grad_input(grad, h, grad_input=grad)
            later_dz = grad
        if tensors.grad_hx is not None:
            torch.mm(grads[0], weight_hh, out=tensors.grad_hx[k])
        if tensors.previous_states is not None:
            first, *others = _steps(tensors.previous_states, stack, k)
            first.zero_() if tensors.hx is None else first.copy_(tensors.hx[k])
            if others:
                _foreach_copy_(others, states[:-1])


def _steps(rows: Tensor, stack: Stack, k: int) -> list[Tensor]:
    """Returns a view (B, H) of the rows of each step, in the order of direction k's recurrence."""
    layout, H = stack.layout, stack.hidden_size
    width = rows.shape[1]
    strides = (layout.time_stride * width, layout.batch_stride * width, 1)
    offset = rows.storage_offset() + k * H
    steps = rows.as_strided((layout.T, layout.B, H), strides, offset).unbind(0)
    return list(reversed(steps)) if k else list(steps)
