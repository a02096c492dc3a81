"""One layer: its kernel launched, and the matrix products around it."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .device import Device, device_of
from .kernels import backward_kernel, forward_kernel
from .plan import Config, configuration


class Rows(NamedTuple):
    """Which rows exist and where they lie; names as in the kernels."""

    lengths: Tensor | None
    offsets: Tensor | None
    starts: Tensor | None
    reset: Tensor | None
    T: int
    B: int
    N: int
    time_step: int
    batch_step: int
    reset_time: int = 0
    reset_batch: int = 0

    @property
    def padded(self) -> bool:
        return self.lengths is not None and self.starts is None


class Stack(NamedTuple):
    """What both passes are told of a stack of layers; weights are contiguous."""

    rows: Rows
    hx: Tensor | None
    weights: Sequence[Tensor]
    options: int
    directions: int
    hidden_size: int

    def layers(self):
        """The initial states of each layer, and the weights of each of its directions."""
        for hx, weights in ops.layers_of(self.hx, self.weights, self.options):
            count = len(weights) // self.directions
            yield hx, [weights[i : i + count] for i in range(0, len(weights), count)]


@functools.cache
def constants_of(config: Config) -> dict[str, Any]:
    """What a kernel is compiled for, of a configuration."""
    return {
        "BLOCK_B": config.block_b,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "MEMBERS": config.members,
        "TILES": config.tiles,
        "PARTS": config.parts,
        "STAGES": config.stages,
        "PRECISION": config.precision,
    }


@functools.cache
def options_of(config: Config, device: Device) -> dict[str, Any]:
    """How Triton is to compile and launch it."""
    options = {
        "num_warps": config.warps,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": config.members > 1,
    }
    if device.backend == "cuda":
        # All that there are: left to itself the compiler spills some, so that more programs fit.
        options["maxnreg"] = min(255, 65536 // (config.warps * device.lanes))
    return options


def _launch(kernel, stack: Stack, like: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Runs a kernel over the rows of `like`, with `tensors` before the arguments that all share."""
    rows = stack.rows
    if rows.B == 0:
        return
    config = configuration(stack.hidden_size, rows.B, like, stack.directions)
    blocks = -(-rows.B // config.block_b)
    arrivals = None
    if config.members > 1:
        arrivals = like.new_zeros(stack.directions * blocks, dtype=torch.int32)
    constants = {
        "H": stack.hidden_size,
        "DIRECTIONS": stack.directions,
        "PADDED": rows.padded,
        "TANH": not stack.options & ops.RELU,
        **constants_of(config),
    }
    grid = (config.members, blocks, stack.directions)
    arguments = (*tensors, *rows[:4], arrivals, *rows[4:])
    _run(kernel, grid, arguments, constants, options_of(config, device_of(like)))


def _run(kernel, grid, arguments, constants, options) -> None:
    kernel[grid](*arguments, **constants, **options)


def on_device_of(tensor: Tensor) -> contextlib.ExitStack:
    """Kernels go to the device of the tensor, and torch's own operators do but what they say."""
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
    """The part (rows, hidden_size) of each direction."""
    return rows.unflatten(1, (stack.directions, stack.hidden_size)).unbind(1)


def _pair(of_each_direction):
    return of_each_direction if len(of_each_direction) == 2 else (*of_each_direction, None)


def _join(of_each_direction: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat(of_each_direction) if len(of_each_direction) == 2 else of_each_direction[0]


def forward_layer(stack: Stack, x, hx, weights, output, h_n) -> None:
    """A layer from its input's rows: output (rows, directions * hidden_size), and h_n."""
    weights_ih, weights_hh, *biases = zip(*weights, strict=True)
    bias_ih, biases_hh = (_join(biases[0]), biases[1]) if biases else (None, [None] * len(weights))
    # Apart from the output: a program may read a row ahead of the one that it writes.
    projected = torch.nn.functional.linear(x, _join(weights_ih), bias_ih)
    tensors = (projected, *_pair(weights_hh), *_pair(biases_hh), hx, output, h_n)
    _launch(forward_kernel, stack, x, tensors)


def backward_layer(
    stack: Stack, hx, weights, output, grad_output, grad_h_n, dz, previous, grad_hx, grad_input
) -> None:
    """The recurrence of a layer, and from its dz the gradients of hx and input, where wanted."""
    dz_last = None if grad_hx is None else torch.empty_like(grad_hx)
    # Transposed once, so that both kernels read a weight the same way.
    weights_hh = _pair([own[1].t().contiguous() for own in weights])
    tensors = (grad_output, grad_h_n, *weights_hh, hx, output, dz, previous, dz_last, grad_hx)
    _launch(backward_kernel, stack, output, tensors)
    if grad_hx is not None and dz_last is not None:
        for grad, last, own in zip(grad_hx.unbind(0), dz_last.unbind(0), weights, strict=True):
            grad.addmm_(last, own[1])
    if grad_input is not None:
        torch.mm(dz, _join([own[0] for own in weights]), out=grad_input)


def weight_gradients(stack: Stack, x, weights, dz, previous) -> list[Tensor]:
    """Those of a layer, in the order of its weights."""
    gradients = []
    parts = (_of_directions(dz, stack), _of_directions(previous, stack), weights)
    for own_dz, before, own in zip(*parts, strict=True):
        transposed = own_dz.t()
        gradients += [transposed @ x, transposed @ before]
        if own[2:]:
            grad_bias = own_dz.sum(0)
            gradients += [grad_bias, grad_bias.clone()]
    return gradients
