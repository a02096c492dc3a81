"""One layer: launches its kernel, and computes the matrix products around it."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .device import Device, device_of
from .kernels import backward_kernel, forward_kernel
from .plan import Plan, plan_of
from .problem import Stack


@functools.cache
def constants_of(plan: Plan) -> dict[str, Any]:
    """Returns the arguments of a plan for which a kernel is compiled."""
    return {
        "BLOCK_B": plan.block_b,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "MEMBERS": plan.members,
        "TILES": plan.tiles,
        "PARTS": plan.parts,
        "STAGES": plan.stages,
        "PRECISION": plan.precision,
    }


@functools.cache
def launch_settings_of(plan: Plan, device: Device) -> dict[str, Any]:
    """Returns how Triton is to compile and launch a kernel."""
    settings = {
        "num_warps": plan.warps,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": plan.members > 1,
    }
    if device.backend == "cuda":
        # As many registers as there are: with fewer the compiler spills some, to fit more programs.
        settings["maxnreg"] = min(255, 65536 // (plan.warps * device.lanes))
    return settings


def _launch(kernel, stack: Stack, like: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Launches a kernel over the rows of `like`.

    Args:
        kernel: `forward_kernel` or `backward_kernel`.
        stack: the layer's stack.
        like: (N, features), for the device and the dtype.
        tensors: the kernel's arguments before those that both kernels have.
    """
    layout = stack.layout
    if layout.B == 0:
        return
    plan = plan_of(stack.hidden_size, layout.B, like, stack.directions)
    blocks = -(-layout.B // plan.block_b)
    arrivals = None
    if plan.members > 1:
        arrivals = like.new_zeros(stack.directions * blocks, dtype=torch.int32)
    constants = {
        "H": stack.hidden_size,
        "DIRECTIONS": stack.directions,
        "PADDED": layout.padded,
        "TANH": not stack.options & ops.RELU,
        **constants_of(plan),
    }
    grid = (plan.members, blocks, stack.directions)
    arguments = (*tensors, *layout[:4], arrivals, *layout[4:])
    _run(kernel, grid, arguments, constants, launch_settings_of(plan, device_of(like)))


def _run(kernel, grid, arguments, constants, settings) -> None:
    kernel[grid](*arguments, **constants, **settings)


def on_device_of(tensor: Tensor) -> contextlib.ExitStack:
    """Returns a context for the kernels and torch's operators of one call.

    In it the current device is that of the tensor, and neither autograd nor autocast is active.
    """
    device = tensor.device
    stack = contextlib.ExitStack()
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if tensor.is_cuda and device.index != torch.cuda.current_device():
        stack.enter_context(torch.cuda.device(device))
    return stack


def _of_directions(rows: Tensor, stack: Stack) -> Sequence[Tensor]:
    """Returns the columns (N, H) of each direction of rows (N, directions * H)."""
    return rows.unflatten(1, (stack.directions, stack.hidden_size)).unbind(1)


def _pair(of_each_direction):
    """Returns two values, the second None where there is one direction."""
    return of_each_direction if len(of_each_direction) == 2 else (*of_each_direction, None)


def _join(of_each_direction) -> Tensor:
    """Returns the tensors of all directions as one, without a copy where there is one direction."""
    return torch.cat(of_each_direction) if len(of_each_direction) == 2 else of_each_direction[0]


def forward_layer(
    stack: Stack,
    x: Tensor,
    hx: Tensor | None,
    weights: list[ops.LayerWeights],
    output: Tensor,
    h_n: Tensor,
) -> None:
    """Runs the forward pass of a layer.

    Args:
        stack: the layer's stack.
        x: the input's rows (N, features).
        hx: initial states (directions, B, H), or None for zeros.
        weights: of each direction.
        output: written, (N, directions * H).
        h_n: written, (directions, B, H).
    """
    weights_ih, weights_hh, biases_ih, biases_hh = zip(*weights, strict=True)
    bias_ih = _join(biases_ih) if stack.options & ops.BIAS else None
    # Not in the memory of output: a program may read a row ahead of the row that it writes.
    projected = torch.nn.functional.linear(x, _join(weights_ih), bias_ih)
    tensors = (projected, *_pair(weights_hh), *_pair(biases_hh), hx, output, h_n)
    _launch(forward_kernel, stack, x, tensors)


def backward_layer(
    stack: Stack,
    hx: Tensor | None,
    weights: list[ops.LayerWeights],
    output: Tensor,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    dz: Tensor,
    previous: Tensor | None,
    grad_hx: Tensor | None,
    grad_input: Tensor | None,
) -> None:
    """Runs the backward recurrence of a layer, and computes the gradients of hx and input.

    Args:
        stack: the layer's stack.
        hx: initial states (directions, B, H), or None for zeros.
        weights: of each direction.
        output: of the forward pass, (N, directions * H).
        grad_output: like output, or None for zeros.
        grad_h_n: (directions, B, H), or None for zeros.
        dz: written: the gradient before the activation, like output.
        previous: written if wanted: the previous state of each row, like output.
        grad_hx: written if wanted: (directions, B, H).
        grad_input: written if wanted: (N, features).
    """
    dz_last = None if grad_hx is None else torch.empty_like(grad_hx)
    # Transposed here, so that both kernels read weights the same way.
    weights_hh = _pair([own.weight_hh.t().contiguous() for own in weights])
    tensors = (grad_output, grad_h_n, *weights_hh, hx, output, dz, previous, dz_last, grad_hx)
    _launch(backward_kernel, stack, output, tensors)
    if grad_hx is not None and dz_last is not None:
        for grad, last, own in zip(grad_hx.unbind(0), dz_last.unbind(0), weights, strict=True):
            grad.addmm_(last, own.weight_hh)
    if grad_input is not None:
        torch.mm(dz, _join([own.weight_ih for own in weights]), out=grad_input)


def weight_gradients(
    stack: Stack, x: Tensor, weights: list[ops.LayerWeights], dz: Tensor, previous: Tensor
) -> list[Tensor]:
    """Returns the gradients of a layer's weights, in the order of the flat list.

    Args:
        stack: the layer's stack.
        x: the input's rows (N, features).
        weights: of each direction.
        dz: the gradient before the activation (N, directions * H).
        previous: the previous state of each row, like dz.
    """
    gradients = []
    parts = (_of_directions(dz, stack), _of_directions(previous, stack), weights)
    for own_dz, before, own in zip(*parts, strict=True):
        transposed = own_dz.t()
        gradients += [transposed @ x, transposed @ before]
        if own.bias_ih is not None:
            grad_bias = own_dz.sum(0)
            gradients += [grad_bias, grad_bias.clone()]
    return gradients
