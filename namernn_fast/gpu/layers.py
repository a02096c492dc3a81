"""Runs the layers of a stack: one printed kernel a layer and pass, and torch's products around it.

The forward kernel reads the products of x and weight_ih, and writes the states. The backward kernel
writes dz, the gradients of the sums that the cell reads; torch's products make the gradients of x
and of all weights from dz.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import ops
from ..cells import Cell
from ..cells.cell import LayerWeights
from ..equations import Program, program_of
from ..machine import fp32_precision
from .emit import printed


class SequenceLayout(NamedTuple):
    """Which (time, sequence) rows of a call exist, and where each row is in memory.

    Strides are in rows, except the strides of reset, which are in elements.
    """

    T: int
    """Number of time steps; for a jagged tensor, an upper bound."""
    B: int
    """Number of sequences."""
    N: int
    """Number of rows."""
    time_stride: int
    batch_stride: int
    lengths: Tensor | None = None
    """int64 (B), the number of steps of each sequence. None if every sequence has T steps, or if
    `offsets` determines the lengths."""
    offsets: Tensor | None = None
    """int64 (B + 1), the first row of each sequence of a jagged tensor, then the end of the last
    sequence. None for other layouts."""
    starts: Tensor | None = None
    """int64 (T), the number of rows before each time step in packed data; else None."""
    reset: Tensor | None = None
    """uint8, nonzero for each (time, sequence) at which the state restarts. None without resets."""
    reset_time_stride: int = 0
    reset_batch_stride: int = 0

    @property
    def is_full(self) -> bool:
        """Whether every row belongs to a sequence, and every sequence has a step."""
        return (self.lengths is None and self.offsets is None) or self.starts is not None


@dataclass
class Stack:
    """The checked arguments of a call."""

    cell: Cell
    program: Program
    layout: SequenceLayout
    hidden_size: int
    directions: int
    heads: int
    layers: list[list[LayerWeights]]
    states: Sequence[Tensor]
    """Contiguous initial states (num_layers * directions, B, H), or none for zeros."""
    reset_to: Sequence[Tensor]
    """Contiguous (T, num_layers, B, H), or none."""
    inputs: Sequence[Tensor]
    """Contiguous rows (N, features), or none for zeros."""
    like: Tensor
    """A tensor with the dtype and the device of the call."""

    @property
    def sums(self) -> int:
        """The number of sums that the program reads."""
        return self.program.gates + self.program.separate

    def new(self, *shape: int, zero: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a new tensor, zero or uninitialised."""
        return (self.like.new_zeros if zero else self.like.new_empty)(shape, dtype=dtype)

    def rows(self, blocks: int) -> Tensor:
        """Returns a tensor for `blocks` blocks of each row and direction, zero in padding."""
        shape = self.layout.N, self.directions, blocks, self.hidden_size
        return self.new(*shape, zero=not self.layout.is_full)


class Tiles(NamedTuple):
    """The blocks of a program instance."""

    block_b: int
    block_n: int
    block_k: int

    @property
    def uses_dot(self) -> bool:
        """Whether products run on tensor cores, which take at least 16 rows."""
        return self.block_b >= 16


LARGEST_BLOCK = 64
"""The most units in a block. More registers than an NVIDIA SM has would go to memory."""


def tiles_of(hidden_size: int, batch: int) -> Tiles:
    """Returns the blocks for a layer. Few sequences need no tensor cores, which would idle."""
    units = max(16, triton.next_power_of_2(hidden_size))
    few = batch <= 4
    block_b = triton.next_power_of_2(max(batch, 1)) if few else 16
    return Tiles(block_b, min(LARGEST_BLOCK, units), min(32, units))


def source_of(cell: Cell, nonlinearity: str, hidden_size: int) -> str:
    """Returns the source code of the kernels of a layer."""
    program = program_of(cell, nonlinearity)
    assert program is not None
    return printed(program, tiles_of(hidden_size, 1).block_n >= hidden_size).source


def _precision(like: Tensor) -> str:
    """Returns how kernels multiply float32 numbers, from torch's setting for products."""
    if fp32_precision.of_products() == "tf32" and torch.version.hip is None:
        return "tf32"
    # Three products of TF32 numbers are about as precise as float32, and run on tensor cores.
    return "tf32x3" if torch.version.hip is None else "ieee"


def _launch(stack: Stack, layer: int, is_backward: bool, arguments: dict[str, Any]) -> None:
    """Launches a kernel of a layer. `arguments` are those that only one of the kernels takes."""
    layout, program, H = stack.layout, stack.program, stack.hidden_size
    if layout.B == 0:
        return
    tiles = tiles_of(H, layout.B)
    kernels = printed(program, tiles.block_n >= H)
    grid = -(-layout.B // tiles.block_b), stack.directions
    slots = kernels.slots[is_backward]
    all_arguments = {**_shared_arguments(stack, layer), **arguments}
    all_arguments["scratch"] = (
        stack.new(slots, *grid, tiles.block_b, H, dtype=torch.float32) if slots else None
    )
    constants = {
        **{"H": H, "HEAD": H // stack.heads, "DIRECTIONS": stack.directions},
        **{"BLOCK_B": tiles.block_b, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k},
        **{"DOT": tiles.uses_dot, "PRECISION": _precision(stack.like)},
    }
    kernel = kernels.module.backward if is_backward else kernels.module.forward
    kernel[grid](**all_arguments, **constants, num_warps=4, enable_fp_fusion=True)


def _shared_arguments(stack: Stack, layer: int) -> dict[str, Any]:
    """Returns the arguments that both kernels of a layer take, except constants."""
    layout, program, directions = stack.layout, stack.program, stack.directions
    weights, parts = stack.layers[layer], len(stack.layers) * directions
    arguments: dict[str, Any] = layout._asdict()
    arguments["weight_hh"] = _of_directions(weights, "weight_hh")
    blocks = [torch.cat([w[n].reshape(-1) for n, _ in program.own]) for w in weights if program.own]
    arguments["own"] = torch.cat(blocks) if blocks else None
    arguments["reset_to_stride"] = len(stack.layers) * layout.B * stack.hidden_size
    for i in range(program.states):
        states = stack.states[i].chunk(len(stack.layers))[layer] if stack.states else None
        arguments[f"hx{i}"] = states
        arguments[f"reset_to{i}"] = stack.reset_to[i][:, layer] if stack.reset_to else None
    for i, described in enumerate(stack.cell.inputs):
        rows = stack.inputs[i] if stack.inputs else None
        features = described.features(stack.hidden_size)
        is_shared = parts == 1 or (rows is not None and rows.shape[1] == features)
        if rows is not None and not is_shared:
            rows = rows[:, layer * directions * features :]
        arguments[f"input{i}"] = rows
        arguments[f"input{i}_row"] = 0 if rows is None else rows.stride(0)
        arguments[f"input{i}_direction"] = 0 if is_shared else features
    return arguments


def _of_directions(weights: Sequence[LayerWeights], name: str) -> Tensor | None:
    """Returns a weight of all directions in one tensor, or None if the layer lacks it."""
    found = [w[name] for w in weights if w.get(name) is not None]
    return torch.cat([*found]).contiguous() if found else None


def project(stack: Stack, layer: int, x: Tensor) -> Tensor:
    """Returns the products of x and weight_ih with biases, (N, directions * gates * H).

    `x` is rows of features, or token ids, whose rows of the table are gathered.
    """
    weights = stack.layers[layer]
    biases = [stack.cell.bias_of_input(w) for w in weights]
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    if not ops.has_ids(x):
        weight = torch.cat([w["weight_ih"] for w in weights])
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    table = torch.cat([w["weight_ih"] for w in weights], 1)
    rows = table.index_select(0, x)
    return rows if bias is None else rows.add_(bias)


def forward_layer(
    stack: Stack, layer: int, x: Tensor, *, keeps_output: bool, keeps: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Runs the forward pass of a layer.

    Args:
        stack: the call.
        layer: the layer's index.
        x: the layer's input, (N, features), or token ids (N).
        keeps_output: whether the output of every step is needed.
        keeps: whether the backward pass follows.

    Returns:
        The output (N, directions, 1, H), what rows keep (N, directions, kept, H), and the last
        states. Without `keeps_output` or `keeps`, the first two have two rows for each sequence.
    """
    layout, program, H = stack.layout, stack.program, stack.hidden_size
    ring = 2 * layout.B, stack.directions
    output = stack.rows(1) if keeps_output else stack.new(*ring, 1, H)
    slots = program.kept if keeps else program.states - 1
    kept = None
    if slots:
        kept = stack.rows(slots) if keeps else stack.new(*ring, slots, H)
    last = []
    for i in range(program.states):
        shape = stack.directions, layout.B, H
        of_layer = stack.states[i].chunk(len(stack.layers))[layer] if stack.states else None
        if layout.is_full or of_layer is None:
            last.append(stack.new(*shape, zero=not layout.is_full))
        else:  # an empty sequence ends with its initial states
            last.append(of_layer.clone())
    bias = _of_directions(stack.layers[layer], "bias_hh") if program.separate else None
    arguments = {"x": project(stack, layer, x), "bias": bias, "output": output, "kept": kept}
    arguments |= {f"last{i}": states for i, states in enumerate(last)}
    constants = {"KEEPS_OUTPUT": keeps_output, "KEEPS": keeps, "SLOTS": slots}
    _launch(stack, layer, False, arguments | constants)
    return output, kept, last


@dataclass
class Gradients:
    """The tensors to which the backward passes of all layers write, or None if not wanted."""

    states: list[Tensor | None]
    """(num_layers * directions, B, H)."""
    reset_to: list[Tensor | None]
    """(T, num_layers, B, H)."""
    inputs: list[Tensor | None]
    """(N, features)."""


def backward_layer(
    stack: Stack,
    layer: int,
    output: Tensor,
    kept: Tensor | None,
    grad_output: Tensor | None,
    grad_last: Sequence[Tensor | None],
    gradients: Gradients,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs the recurrence of the backward pass of a layer.

    Args:
        stack: the call.
        layer: the layer's index.
        output, kept: as `forward_layer` returned them, in any shape with their numbers.
        grad_output: the gradient of output, or None for zeros.
        grad_last: the gradients of the last states of all layers, or None for zeros.
        gradients: receives the gradients of states, reset_to and inputs.
        want_weights: whether the gradients of weights are needed.

    Returns:
        dz (N, directions, gates + separate, H), and the previous h of each row (N, directions, H)
        and the gradient of own parameters (directions, blocks, H) if weights want them.
    """
    layout, program = stack.layout, stack.program
    H, directions = stack.hidden_size, stack.directions
    shape, of_layer = (directions, layout.B, H), slice(layer * directions, (layer + 1) * directions)
    dz = stack.rows(stack.sums)
    before = stack.rows(1).squeeze(2) if want_weights and program.has_weight_hh else None
    blocks = sum(count for _, count in program.own)
    # Two slots, because each step adds to the sum of the step before, which other threads may read.
    slots = -(-layout.B // tiles_of(H, layout.B).block_b), directions, 2
    grad_own = stack.new(*slots, blocks, H, zero=True, dtype=torch.float32) if blocks else None
    arguments: dict[str, Any] = {"output": output, "kept": kept, "grad_output": grad_output}
    arguments |= {"dz": dz, "before_rows": before, "grad_own": grad_own}
    for i, grad in enumerate(grad_last):
        carried = stack.new(*shape, zero=grad is None, dtype=torch.float32)
        if grad is not None:
            carried.copy_(grad[of_layer])
        arguments[f"carried{i}"] = carried
        arguments[f"grad_previous{i}"] = stack.new(*shape, zero=True, dtype=torch.float32)
        grad_hx = gradients.states[i]
        if grad_hx is not None:  # the only gradient of an empty sequence is that of its last state
            grad_hx = grad_hx[of_layer].copy_(carried)
        arguments[f"grad_hx{i}"] = grad_hx
        grad_reset_to = gradients.reset_to[i]
        arguments[f"grad_reset_to{i}"] = None if grad_reset_to is None else grad_reset_to[:, layer]
    shared = []
    for i, described in enumerate(stack.cell.inputs):
        total, features = gradients.inputs[i], described.features(H)
        parts = total
        if total is not None and total.shape[1] == features:
            parts = stack.new(layout.N, directions * features, zero=not layout.is_full)
            shared.append((total, parts))
        elif total is not None:
            parts = total[:, layer * directions * features :]
        arguments[f"grad_input{i}"] = parts
        arguments[f"grad_input{i}_row"] = 0 if parts is None else parts.stride(0)
        arguments[f"grad_input{i}_direction"] = features
    constants = {"KEEPS_OUTPUT": True, "KEEPS": True, "SLOTS": program.kept}
    _launch(stack, layer, True, arguments | constants)
    for total, parts in shared:
        total += parts.unflatten(1, (directions, -1)).sum(1)
    return dz, before, None if grad_own is None else grad_own[:, :, 0].sum(0)


def grad_of_x(stack: Stack, layer: int, dz: Tensor) -> Tensor:
    """Returns the gradient of a layer's input, (N, features)."""
    total = None
    for of_direction, weights in zip(dz.unbind(1), stack.layers[layer], strict=True):
        dx = _of_x(stack, of_direction).flatten(1)
        weight = weights["weight_ih"]
        total = torch.mm(dx, weight) if total is None else total.addmm_(dx, weight)
    assert total is not None
    return total


def _of_x(stack: Stack, dz: Tensor) -> Tensor:
    """Returns the gradients of the products of x in the order of weight_ih, (N, gates, H)."""
    gates, separate = stack.program.gates, stack.program.separate
    dx = dz[:, :gates]
    return dx if not separate else torch.cat([dx[:, separate:], dx[:, :separate]], 1)


def weight_gradients(
    stack: Stack, layer: int, x: Tensor, dz: Tensor, before: Tensor | None, own: Tensor | None
) -> list[Tensor]:
    """Returns the gradients of a layer's weights, in the order of the flat list of weights.

    Args:
        stack, layer, x: as in `forward_layer`; rows of x in padding must be zeros.
        dz, before, own: as `backward_layer` returns them.
    """
    gradients = []
    separate = stack.program.separate
    for k, weights in enumerate(stack.layers[layer]):
        dx = _of_x(stack, dz[:, k]).flatten(1)
        du = dz[:, k, separate:]
        grads = {"bias_ih": dx.sum(0), "bias_hh": du.flatten(1).sum(0)}
        if ops.has_ids(x):
            table = torch.zeros(weights["weight_ih"].shape, dtype=torch.float32, device=x.device)
            # Unlike index_add_, this adds rows in a fixed order on GPUs.
            table.index_put_((x,), dx.float(), accumulate=True)
            grads["weight_ih"] = table.to(dx.dtype)
        else:
            grads["weight_ih"] = dx.t() @ x
        if before is not None:
            grads["weight_hh"] = _grad_weight_hh(stack, du, before[:, k])
        if own is not None:
            of_names = [p.name for p in stack.cell.own]
            counts = [count for _, count in stack.program.own]
            for name, grad in zip(of_names, own[k].split(counts), strict=True):
                grads[name] = grad.reshape(weights[name].shape).to(dx.dtype, copy=True)
        gradients += [grads[name] for name in weights]
    return gradients


def _grad_weight_hh(stack: Stack, du: Tensor, before: Tensor) -> Tensor:
    """Returns the gradient of weight_hh from those of the products (N, gates, H)."""
    if stack.heads == 1:
        return du.flatten(1).t() @ before
    heads, gates = stack.heads, stack.program.gates
    of_heads = du.unflatten(2, (heads, -1)).permute(2, 1, 3, 0).flatten(1, 2)  # (heads, rows, N)
    products = of_heads @ before.unflatten(1, (heads, -1)).transpose(0, 1)
    rows: Tensor = products.unflatten(1, (gates, -1)).transpose(0, 1).flatten(0, 2)
    return rows
