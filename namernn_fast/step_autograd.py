"""Autograd for single steps: one operator for a forward step, and one for its backward step.

The steps of a loop can share `PackedSteps`: weights that are packed once. Their gradients are then
multiplied once, as products over the rows of all steps, instead of once in each step.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops, prepared_ops
from .autograd import _differentiable_backward, _must_be_differentiable, _needs_of, _saved_tensors
from .cells import Cell
from .machine.torch_private import (
    _current_graph_task_id,
    _will_engine_execute_node,
    version_of,
)


class _Rows(NamedTuple):
    """What the gradients of the weights need from one backward step."""

    dz: Tensor
    """(batch, sums * hidden_size): the gradients of the sums that the cell reads."""
    x: Tensor
    h: Tensor | None
    """The previous h, or None for zeros."""
    own: Sequence[Tensor]
    """The gradients of the cell's own parameters."""


class PackedSteps:
    """The weights of a step module, packed once for many steps.

    Each backward pass collects the rows of its steps under the number of its graph task. So passes
    neither share rows nor leave any behind, in whatever order they run.
    """

    def __init__(self, cell: Cell, weights: Sequence[Tensor], options: int) -> None:
        _count_optimizer_steps()
        hidden = ops.hidden_size(cell, weights)
        heads = ops.heads_of(cell, weights, hidden)
        sizes = [1, weights[0].shape[1], hidden, 0, hidden, heads]
        with torch.no_grad():
            self.forward, self.backward = (
                prepared_ops.prepare(cell.number, weights, sizes, options | bit, cell.program)
                for bit in (0, ops.FOR_BACKWARD)
            )
        self.rows: dict[int, list[_Rows]] = {}
        self.token = None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            apply: Any = _WeightGradients.apply
            self.token = apply(self.rows, cell, options, *weights)
        self._options, self._weights = options, weights
        self._state = _state_of(weights)

    def are_current(self, weights: Sequence[Tensor], options: int) -> bool:
        """Returns whether these weights and options were packed, and have not changed since."""
        return (
            self._options == options
            and all(weight is packed for weight, packed in zip(weights, self._weights, strict=True))
            and self._state == _state_of(weights)
        )


def _state_of(weights: Sequence[Tensor]) -> list[Any]:
    """Returns what changes if weights are changed in place, or an optimizer has made a step."""
    return [_optimizer_steps, *((w.data_ptr(), version_of(w), w.requires_grad) for w in weights)]


_optimizer_steps = 0
"""The number of steps of all optimizers since the first `PackedSteps`. Fused optimizers change
weights without incrementing their version counters."""


@functools.cache
def _count_optimizer_steps() -> None:
    def count(*_: Any) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


class Unrolled:
    """A block in which the steps of a module share packed weights; see `FusedCell.unrolled`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._packed: PackedSteps | None = None
        self._outer: list[Unrolled | None] = []

    def __enter__(self) -> None:
        self._outer.append(_open.blocks.get(id(self._module)))
        _open.blocks[id(self._module)] = self

    def __exit__(self, *_: Any) -> None:
        self._packed = None
        outer = self._outer.pop()
        if outer is None:
            del _open.blocks[id(self._module)]
        else:
            _open.blocks[id(self._module)] = outer

    def packed(self, cell: Cell, weights: Sequence[Tensor], options: int) -> PackedSteps:
        """Returns the packed weights. Packs them again if they have changed."""
        if self._packed is None or not self._packed.are_current(weights, options):
            self._packed = PackedSteps(cell, weights, options)
        return self._packed


class _Open(threading.local):
    """The blocks that this thread has opened, by the id of their module."""

    def __init__(self) -> None:
        self.blocks: dict[int, Unrolled] = {}


_open = _Open()


def open_block(module: Any) -> Unrolled | None:
    """Returns the innermost block that this thread has opened for a module, or None."""
    return _open.blocks.get(id(module))


class _WeightGradients(torch.autograd.Function):
    """Returns a token on which the steps of a loop depend, so that its backward runs after theirs.

    The backward pass multiplies the rows that the steps have collected.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: dict[int, list[_Rows]], cell: Cell, options: int, *weights: Tensor
    ) -> Tensor:
        ctx.rows, ctx.cell, ctx.options = rows, cell, options
        ctx.shapes = [weight.shape for weight in weights]
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[_BEFORE_WEIGHTS:]
        steps = ctx.rows.pop(_current_graph_task_id(), None)
        if steps is None:
            return (None,) * (_BEFORE_WEIGHTS + len(needed))
        cell = ctx.cell
        dz = torch.cat([step.dz for step in steps])
        own = (torch.stack(each).sum(0) for each in zip(*(step.own for step in steps), strict=True))
        hidden = dz.shape[1] // cell.sums
        separate, rows = cell.separate * hidden, cell.gates * hidden
        of_x, of_h = dz[:, :rows].roll(-separate, 1) if separate else dz, dz[:, separate:]
        gradients: list[Tensor | None] = [None] * _BEFORE_WEIGHTS
        for parameter, shape, need in zip(
            ops.parameters_of(cell, ctx.options), ctx.shapes, needed, strict=True
        ):
            if parameter.role == "own":
                gradient = next(own)
            elif not need:
                gradient = None
            elif parameter.role == "weight_ih":
                gradient = of_x.t() @ torch.cat([step.x for step in steps])
            elif parameter.role == "weight_hh":
                gradient = _gradient_of_heads(of_h, _previous_h(steps, hidden), shape)
            else:
                gradient = (of_x if parameter.role == "bias_ih" else of_h).sum(0)
            gradients.append(gradient if need else None)
        return tuple(gradients)


_BEFORE_WEIGHTS = 3


def _previous_h(steps: Sequence[_Rows], hidden_size: int) -> Tensor:
    return torch.cat(
        [step.x.new_zeros(len(step.x), hidden_size) if step.h is None else step.h for step in steps]
    )


def _gradient_of_heads(dz: Tensor, h: Tensor, shape: torch.Size) -> Tensor:
    """Returns the gradient of a weight_hh of this shape, with a block for each head of h."""
    rows, width = shape
    if width == h.shape[1]:
        return dz.t() @ h
    heads = h.shape[1] // width
    dz = dz.view(len(dz), -1, heads, width).permute(2, 1, 3, 0).reshape(heads, -1, len(dz))
    products = dz @ h.view(len(h), heads, width).transpose(0, 1)
    return products.view(heads, -1, width, width).transpose(0, 1).reshape(rows, width)


class FusedStep(torch.autograd.Function):
    """A step of a step module, in one operator forward and one backward.

    The arguments after `token` are the input, the states and the other inputs, (batch, features)
    each as `options` say, and the weights. The results are the new states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        options: int,
        packed: PackedSteps | None,
        token: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = 1 + ops.before_weights(cell, options)
        x, *others = [rows.unsqueeze(0) for rows in tensors[:count]]
        weights: Sequence[Tensor] = tensors[count:]
        bits = options | ops.WANT_SAVED
        if packed is not None:
            used, bits = [packed.forward], bits | ops.PREPARED
        else:
            used = [*weights]
        output, last, saved = ops.forward_untraced(
            cell.number, x, [*others, *used], None, None, bits, 0, cell.program
        )
        needed = ctx.needs_input_grad[_BEFORE_ROWS:]
        needs = _needs_of(cell, options, count, needed)
        node = None if token is None else token.grad_fn
        ctx.call = options, needs, packed, node, weights, [*map(version_of, weights)]
        ctx.save_for_backward(*tensors[:count], output, *saved, *compress(weights, needs.reads))
        ctx.set_materialize_grads(False)
        return tuple(state.squeeze_(0) for state in last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        options, needs, packed, node, weights, versions = ctx.call
        cell, count = needs.cell, needs.ends[0]
        saved = _saved_tensors(ctx)
        rows = [tensor.unsqueeze(0) for tensor in saved[:count]]
        of_states = [None if grad is None else grad.unsqueeze(0) for grad in grads]
        needed = ctx.needs_input_grad[_BEFORE_ROWS:]
        if _must_be_differentiable(grads):
            if versions != [*map(version_of, weights)]:
                raise RuntimeError(
                    f"{cell.layer}Cell: a weight was changed in place since the forward pass. With "
                    "create_graph or is_grads_batched, change it only after the backward pass"
                )
            tensors = (*rows, *weights)
            gradients: Iterable[Tensor | None] = _differentiable_backward(
                needs, tensors, tensors, needed, (None, None, options), (None, *of_states)
            )
            return *_NOT_DIFFERENTIABLE, *_without_steps(gradients, count)
        is_gathered = node is not None and _will_engine_execute_node(node)
        want_layers = needs.want_layers
        if packed is not None:
            used, options = [packed.backward], options | ops.PREPARED | ops.FOR_BACKWARD
            want_layers = [0] if is_gathered else []
        else:
            used = weights
        returned = ops.backward_untraced(
            cell.number,
            rows[0],
            [*rows[1:], *used],
            None,
            None,
            options,
            0,
            saved[count],
            saved[count + 1 : count + 1 + (cell.kept > 0)],
            None,
            of_states,
            needs.wanted,
            want_layers,
            cell.program,
        )
        if packed is None:
            return *_NOT_DIFFERENTIABLE, *_without_steps(needs.pick([*returned, None]), count)
        wanted = sum(needs.wanted)
        if is_gathered:
            dz, *own = returned[wanted:]
            h = saved[1] if options & ops.STATES else None
            steps = packed.rows.setdefault(_current_graph_task_id(), [])
            steps.append(_Rows(dz.squeeze(0), saved[0], h, own))
        found = iter(returned[:wanted])
        gradients = [next(found).squeeze(0) if want else None for want in needs.wanted]
        return *_NOT_DIFFERENTIABLE, *gradients, *[None] * len(weights)


apply_step: Callable[..., Any] = super(torch.autograd.Function, FusedStep).apply
"""`FusedStep.apply` for calls outside torch.func transforms and compilers."""

_NOT_DIFFERENTIABLE = (None,) * 4  # gradients of the arguments before the input
_BEFORE_ROWS = len(_NOT_DIFFERENTIABLE)


def _without_steps(gradients: Iterable[Tensor | None], count: int) -> Iterable[Tensor | None]:
    """Removes the time dimension of the first `count` gradients."""
    for k, gradient in enumerate(gradients):
        yield gradient if gradient is None or k >= count else gradient.squeeze(0)
