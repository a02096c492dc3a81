"""Runs one layer: launches the kernel of its recurrence and computes the products around it."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..cells import VANILLA
from ..cells.cell import LayerWeights
from . import launching, stepwise
from .device import Device, device_of, let_no_programs_meet
from .kernels import Form, LayoutTensors, backward_kernel, forward_kernel
from .plan import Plan, plan_of
from .problem import BackwardTensors, Stack
from .products import product
from .sums import sums_by_token


@functools.cache
def form_of(
    plan: Plan,
    hidden_size: int,
    directions: int,
    *,
    tanh: bool,
    padded: bool,
    ring: bool = False,
    transposed: bool = False,
) -> Form:
    """Returns the compile-time constants of a kernel. The keyword arguments are as in `Form`."""
    has_remainder = plan.members * plan.tiles * plan.block_n != hidden_size
    return Form(
        H=hidden_size,
        DIRECTIONS=directions,
        TANH=tanh,
        PADDED=padded,
        RING=ring,
        BLOCK_B=plan.block_b,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        MEMBERS=plan.members,
        TILES=plan.tiles,
        PARTS=plan.parts,
        # With more than 8 warps, threads lack the registers for more loads in flight.
        VECTOR=2 if plan.warps > 8 else 4,
        STAGES=plan.stages,
        PRECISION=plan.precision,
        TRANSPOSED=transposed,
        KEEP_WEIGHT=plan.kind != "streamed",
        KEEP_STATE=plan.kind == "resident",
        WIDTH=directions * hidden_size,
        LIMIT=hidden_size if has_remainder else None,
    )


@functools.cache
def launch_settings_of(plan: Plan, device: Device, with_ids: bool = False) -> dict[str, Any]:
    """Returns Triton's compile and launch options for a kernel of the recurrence.

    If `with_ids` is set, the kernel reads token ids and asserts that they are in range.
    """
    settings = {
        "num_warps": plan.warps,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": plan.members > 1,
    }
    if device.backend == "cuda":
        # Without a limit, the compiler may spill registers to fit more programs on an SM. Let two
        # programs fit if each has one sequence, because each hides the other's latency.
        programs = 2 if plan.kind == "resident" and plan.block_b == 1 else 1
        settings["maxnreg"] = device.most_registers(plan.warps, programs)
    if with_ids:
        settings |= {"debug": True, "sanitize_overflow": False}
    return settings


def takes_transpose(plan: Plan, dtype: torch.dtype) -> bool:
    """Returns whether the forward kernel takes the transpose of weight_hh.

    Without tensor cores, the lanes of a warp read different units n of a streamed tile at once. In
    weight_hh itself these units are one row apart, which causes shared-memory bank conflicts.
    """
    return plan.kind == "streamed" and plan.precision == "ieee" and dtype == torch.float32


def _launch(
    kernel: Any,
    stack: Stack,
    like: Tensor,
    arguments: dict[str, Tensor | int | None],
    *,
    padded: bool,
    ring: bool = False,
) -> None:
    """Launches a kernel of the recurrence over all rows of a layer.

    `like` has the layer's device and dtype, `arguments` holds the arguments that only this kernel
    takes, and `padded` and `ring` are fields of `Form`.
    """
    layout = stack.layout
    if layout.B == 0:
        return
    plan = plan_of(stack.hidden_size, layout.B, like, stack.directions)
    members, groups = plan.members, -(-layout.B // plan.block_b) * stack.directions
    transposed = kernel is forward_kernel and takes_transpose(plan, like.dtype)
    sizes = layout._asdict()
    all_arguments: dict[str, Any] = arguments | (_transposes(arguments) if transposed else {})
    all_arguments["layout"] = LayoutTensors(**{k: sizes.pop(k) for k in LayoutTensors._fields})
    all_arguments |= sizes
    all_arguments["arrivals"] = like.new_zeros(groups, dtype=torch.int32) if members > 1 else None
    all_arguments["FORM"] = form_of(
        plan,
        stack.hidden_size,
        stack.directions,
        tanh=not stack.options & ops.RELU,
        padded=padded,
        ring=ring,
        transposed=transposed,
    )
    grid = (members * groups,)
    settings = launch_settings_of(plan, device_of(like), arguments.get("ids") is not None)
    if members == 1:
        launching.run(kernel, grid, all_arguments, settings)
        return
    try:
        with launching.turn(like.device):
            launching.run(kernel, grid, all_arguments, settings)
    except RuntimeError as error:
        if not launching.is_refusal(error):
            raise
        let_no_programs_meet(like, error)
        _launch(kernel, stack, like, arguments, padded=padded, ring=ring)


def _transposes(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the transposed weight_hh of all directions, by argument name."""
    names = ("weight_hh", "weight_hh_reverse")
    return {name: arguments[name].t().contiguous() for name in names if arguments[name] is not None}


def on_device_of(tensor: Tensor) -> contextlib.ExitStack:
    """Returns a context that selects the tensor's device and disables autograd and autocast."""
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
    """Splits rows (N, directions * H) into the columns (N, H) of each direction."""
    columns: Tensor = rows.unflatten(1, (stack.directions, stack.hidden_size))
    return columns.unbind(1)


def _pair(of_each_direction: Sequence[Any]) -> tuple[Any, Any]:
    """Returns the values of both directions; the second value is None if there is one direction."""
    return of_each_direction[0], of_each_direction[1] if len(of_each_direction) == 2 else None


def _join(of_each_direction: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenates the tensors of both directions, or returns the tensor of a single direction."""
    return (
        torch.cat(of_each_direction, dim) if len(of_each_direction) == 2 else of_each_direction[0]
    )


def _join_biases(of_each_direction: list[Tensor | None]) -> Tensor | None:
    """Concatenates the biases of both directions; returns None if they have none."""
    biases = [bias for bias in of_each_direction if bias is not None]
    return _join(biases) if biases else None


def forward_layer(
    stack: Stack,
    x: Tensor,
    hx: Tensor | None,
    weights: list[LayerWeights],
    output: Tensor,
    h_n: Tensor,
    ring: bool,
) -> None:
    """Runs the forward pass of a layer.

    Args:
        stack: the stack that contains the layer.
        x: the input's rows (N, features), or token ids (N).
        hx: initial states (directions, B, H), or None for zeros.
        weights: the weights of each direction.
        output: receives the states, (N, directions * H), or (2 * B, directions * H) with `ring`.
        h_n: receives the last states, (directions, B, H).
        ring: whether only h_n is needed; output is then a ring buffer for the states of two steps.
    """
    weights_ih = [direction["weight_ih"] for direction in weights]
    weights_hh = [direction["weight_hh"] for direction in weights]
    biases_hh = [direction.get("bias_hh") for direction in weights]
    if not ops.has_ids(x) and stepwise.suits(stack, h_n):
        bias = _join_biases([VANILLA.bias_of_input(direction) for direction in weights])
        states = product(x, _join(weights_ih).t(), bias, out=None if ring else output)
        stepwise.forward_steps(stack, hx, weights_hh, states, h_n)
        return
    if ops.has_ids(x):
        # The kernel reads table rows instead of projected rows, and adds both biases.
        projected, ids = _join(weights_ih, dim=1), x
        biases_hh = [VANILLA.bias_of_input(direction) for direction in weights]
    else:
        # Do not project into output: a program may read one row ahead of the row that it writes.
        bias_ih = _join_biases([direction.get("bias_ih") for direction in weights])
        projected, ids = product(x, _join(weights_ih).t(), bias_ih), None
    weight_hh, weight_hh_reverse = _pair(weights_hh)
    bias, bias_reverse = _pair(biases_hh)
    arguments = {
        "projected": projected,
        "ids": ids,
        "V": len(projected),
        "weight_hh": weight_hh,
        "weight_hh_reverse": weight_hh_reverse,
        "bias": bias,
        "bias_reverse": bias_reverse,
        "hx": hx,
        "output": output,
        "h_n": h_n,
    }
    padded = stack.layout.padded and not ring
    _launch(forward_kernel, stack, h_n, arguments, padded=padded, ring=ring)


def backward_layer(
    stack: Stack,
    weights: list[LayerWeights],
    tensors: BackwardTensors,
    grad_input: Tensor | None,
) -> None:
    """Runs the backward recurrence of a layer, and computes the gradients of hx and input.

    `weights` holds the weights of each direction. `grad_input` (N, features) receives the gradient
    of the input, unless it is None.
    """
    if stepwise.suits(stack, tensors.output):
        stepwise.backward_steps(stack, tensors)
    else:
        _backward_in_one_kernel(stack, tensors)
    if grad_input is not None:
        weight_ih = _join([direction["weight_ih"] for direction in weights])
        product(tensors.dz, weight_ih, out=grad_input)


def _backward_in_one_kernel(stack: Stack, tensors: BackwardTensors) -> None:
    """Runs the backward recurrence of a layer in one kernel."""
    arguments: dict[str, Any] = tensors._asdict()
    arguments["weight_hh"], arguments["weight_hh_reverse"] = _pair(arguments.pop("weights_hh"))
    grad_hx = tensors.grad_hx
    arguments["dz_first"] = dz_first = None if grad_hx is None else torch.empty_like(grad_hx)
    _launch(backward_kernel, stack, tensors.output, arguments, padded=stack.layout.padded)
    if grad_hx is not None and dz_first is not None:
        for grad, first, weight in zip(grad_hx, dz_first, tensors.weights_hh, strict=True):
            product(first, weight, plus=grad, out=grad)


def weight_gradients(
    stack: Stack,
    x: Tensor,
    hx: Tensor | None,
    weights: list[LayerWeights],
    output: Tensor,
    dz: Tensor,
    previous_states: Tensor | None,
) -> list[Tensor]:
    """Returns the gradients of a layer's weights, in the order of the flat list of weights.

    Args:
        stack, x, hx, weights, output: as in `forward_layer`.
        dz: the gradient of the pre-activations, shaped like output.
        previous_states: the previous state of each row, shaped like output, or None if the
            layout is `consecutive`.
    """
    gradients = []
    tables = None
    if ops.has_ids(x):
        tables = _of_directions(sums_by_token(dz, x, len(weights[0]["weight_ih"])), stack)
    for k, direction_dz in enumerate(_of_directions(dz, stack)):
        transposed = direction_dz.t()
        gradients.append(product(transposed, x) if tables is None else tables[k].contiguous())
        if previous_states is None:
            states, initial = _of_directions(output, stack)[k], None if hx is None else hx[k]
            gradients.append(_grad_weight_hh(direction_dz, states, initial, stack.layout.B, k == 1))
        else:
            gradients.append(product(transposed, _of_directions(previous_states, stack)[k]))
        if weights[k].get("bias_ih") is not None:
            grad_bias = direction_dz.sum(0)
            gradients += [grad_bias, grad_bias.clone()]
    return gradients


def _grad_weight_hh(
    dz: Tensor, states: Tensor, hx: Tensor | None, batch: int, reverse: bool
) -> Tensor:
    """Returns the gradient of weight_hh of one direction. The layout must be `consecutive`.

    Args:
        dz: the gradient of the pre-activations (N, H).
        states: the direction's output (N, H). The rows of one step are the previous states of the
            next step in recurrence order.
        hx: initial states (B, H), or None for zeros.
        batch: number of rows per step.
        reverse: whether the direction goes back in time.
    """
    border = len(dz) - batch if reverse else batch
    if reverse:
        later, previous, first = dz[:border], states[batch:], dz[border:]
    else:
        later, previous, first = dz[border:], states[: len(dz) - batch], dz[:border]
    if hx is None:
        # With zero initial states, the first step adds dz * 0: zero, or NaN if dz is not finite.
        grad_first = (first * 0).sum(0).unsqueeze(1)
        return product(later.t(), previous, plus=grad_first)
    grad = product(first.t(), hx)
    return product(later.t(), previous, plus=grad, out=grad)
