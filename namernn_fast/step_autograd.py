"""Autograd for single steps: one operator for a forward step, and one for its backward step.

The steps of a loop can share `PackedSteps`: weights that are packed once. Their gradients are then
multiplied once, as products over the rows of all steps, instead of once in each step.
"""

import functools
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops, prepared_ops
from .autograd import (
    _differentiable_backward,
    _must_be_differentiable,
    _Needs,
    _needs_of,
    _saved_tensors,
    _versions,
)
from .cells import Cell
from .machine.context import is_compiling, is_unobserved
from .machine.torch_private import _current_graph_task_id, _will_engine_execute_node
from .reference import PLAIN


def holds_its_values(tensor: Any) -> bool:
    """Returns whether `tensor` is a tensor of torch whose memory holds its values."""
    return type(tensor) in PLAIN and not tensor.is_neg()


class _Rows(NamedTuple):
    """What the gradients of the weights need from one backward step."""

    dz: Tensor
    """(batch, sums * hidden_size): the gradients of the sums that the cell reads."""
    x: Tensor
    h: Tensor | None
    """The previous h, or None for zeros."""
    own: Sequence[Tensor]
    """The gradients of the cell's own parameters."""


class _Sums:
    """The gradients of the weights in one backward pass: sums over the rows of its steps.

    Rows are multiplied in chunks, so that they take little memory.
    """

    def __init__(self, cell: Cell, options: int, weights: Sequence[Tensor]) -> None:
        self._cell, self._parameters = cell, ops.parameters_of(cell, options)
        self._shapes = [weight.shape for weight in weights]
        self._needed = [weight.requires_grad for weight in weights]
        self._steps: list[_Rows] = []
        self._sums: list[Tensor | None] = []

    def add(self, rows: _Rows) -> None:
        """Adds the rows of a step."""
        self._steps.append(rows)
        if len(self._steps) * len(rows.x) >= _CHUNK:
            self._multiply()

    def gradients(self) -> list[Tensor | None]:
        """Returns the gradients of the weights, None where they are not needed."""
        if self._steps:
            self._multiply()
        return self._sums

    def _multiply(self) -> None:
        steps, cell = self._steps, self._cell
        self._steps = []
        dz, x = torch.cat([step.dz for step in steps]), torch.cat([step.x for step in steps])
        own = (torch.stack(each).sum(0) for each in zip(*(step.own for step in steps), strict=True))
        hidden = dz.shape[1] // cell.sums
        separate, rows = cell.separate * hidden, cell.gates * hidden
        of_x, of_h = dz[:, :rows].roll(-separate, 1) if separate else dz, dz[:, separate:]
        products: list[Tensor | None] = []
        for parameter, shape, need in zip(
            self._parameters, self._shapes, self._needed, strict=True
        ):
            if parameter.role == "own":
                product = next(own)
            elif not need:
                product = None
            elif parameter.role == "weight_ih":
                product = of_x.t() @ x
            elif parameter.role == "weight_hh":
                product = _gradient_of_heads(of_h, _previous_h(steps, hidden), shape)
            else:
                product = (of_x if parameter.role == "bias_ih" else of_h).sum(0)
            products.append(product if need else None)
        if not self._sums:
            self._sums = products
            return
        for total, product in zip(self._sums, products, strict=True):
            if total is not None and product is not None:
                total += product


_CHUNK = 1024
"""The number of rows that are multiplied at a time."""


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
        self.options, self.weights = options, weights
        self._cell, self._sums = cell, dict[int, _Sums]()
        self.token: Tensor | None = None
        if any(weight.requires_grad for weight in weights):
            apply: Any = _WeightGradients.apply
            self.token = apply(self._sums, *weights)
        self._steps, self._needed = _optimizer_steps, [*map(_needs_gradient, weights)]
        self.versions = _versions(weights)
        self._addresses = [*map(Tensor.data_ptr, weights)]

    def add(self, rows: _Rows) -> None:
        """Adds the rows of a step to the gradients of the current backward pass."""
        task = _current_graph_task_id()
        if task not in self._sums:
            self._sums[task] = _Sums(self._cell, self.options, self.weights)
        self._sums[task].add(rows)

    def are_current(self, weights: Sequence[Tensor]) -> bool:
        """Returns whether these weights were packed, and have not changed since."""
        return (
            all(map(operator.is_, weights, self.weights))
            and self._steps == _optimizer_steps
            and self.versions == _versions(weights)
            and self._needed == [*map(_needs_gradient, weights)]
            and self._addresses == [*map(Tensor.data_ptr, weights)]
        )


_needs_gradient = operator.attrgetter("requires_grad")

_optimizer_steps = 0
"""The number of steps of all optimizers since the first `PackedSteps`. Fused optimizers change
weights without incrementing their version counters."""


@functools.cache
def _count_optimizer_steps() -> None:
    def count(*_: Any) -> None:
        global _optimizer_steps
        if not is_compiling():  # compiled optimizers increment version counters
            _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


class Unrolled:
    """A block in which the steps of a module share packed weights; see `FusedCell.unrolled`."""

    packed: PackedSteps | None = None
    """The weights that steps read; None before the first step."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._outer: list[Unrolled | None] = []

    def __enter__(self) -> None:
        self._outer.append(_open.blocks.get(id(self._module)))
        _open.blocks[id(self._module)] = self

    def __exit__(self, *_: Any) -> None:
        self.packed = None
        outer = self._outer.pop()
        if outer is None:
            del _open.blocks[id(self._module)]
        else:
            _open.blocks[id(self._module)] = outer


class _Open(threading.local):
    """The blocks that this thread has opened, by the id of their module."""

    def __init__(self) -> None:
        self.blocks: dict[int, Unrolled] = {}


_open = _Open()


def open_block(module: Any) -> Unrolled | None:
    """Returns the innermost block that this thread has opened for a module, or None.

    Returns None in compilers, whose programs do not depend on blocks.
    """
    return None if is_compiling() else _open.blocks.get(id(module))


class _WeightGradients(torch.autograd.Function):
    """Returns a token on which the steps of a loop depend, so that its backward runs after theirs.

    The backward pass multiplies the rows that the steps have collected.
    """

    @staticmethod
    def forward(ctx: Any, sums: dict[int, _Sums], *weights: Tensor) -> Tensor:
        ctx.sums = sums
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ctx.sums.pop(_current_graph_task_id(), None)
        if found is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *found.gradients()


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

    Both passes skip torch's dispatcher unless a mode or profiler has to see what they run, or
    tensors need the dispatcher. Only without the dispatcher they read packed weights.
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
        rows, weights = tensors[:count], tensors[count:]
        last, saved = _forward_directly(cell, options, rows, weights, packed) or _forward(
            cell, options, rows, weights
        )
        needs = _needs_of(cell, options, count, ctx.needs_input_grad[_BEFORE_ROWS:])
        node = None if token is None else token.grad_fn
        if packed is None:
            versions = _versions(weights)
            # Autograd then rejects changes in place of weights that the backward pass reads.
            ctx.save_for_backward(*rows, saved, *compress(weights, needs.reads))
        else:
            versions = packed.versions
            ctx.save_for_backward(*rows, saved)
        ctx.call = options, needs, packed, node, weights, versions
        ctx.set_materialize_grads(False)
        return last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        options, needs, packed, node, weights, versions = ctx.call
        count = needs.ends[0]
        rows, saved = (tensors := _saved_tensors(ctx))[:count], tensors[count]
        is_higher_order = _must_be_differentiable(grads)
        step = _BackwardStep(needs, options, rows, saved, grads)
        if packed is not None and not is_higher_order:
            collects = node is not None and _will_engine_execute_node(node)
            found = step.run_directly([packed.backward], collects)
            if found is not None:
                of_rows, of_sums = found
                if collects:
                    h = rows[1] if options & ops.STATES else None
                    packed.add(_Rows(of_sums[0], rows[0], h, of_sums[1:]))
                return *_NOT_DIFFERENTIABLE, *of_rows, *[None] * len(weights)
        if (is_higher_order or packed is not None) and versions != _versions(weights):
            raise RuntimeError(
                f"{needs.cell.layer}Cell: a weight was changed in place since the forward pass. "
                "With create_graph, is_grads_batched, modes and profilers, change it only after "
                "the backward pass"
            )
        if is_higher_order:
            values = (*_with_steps(rows), *weights)
            gradients: Iterable[Tensor | None] = _differentiable_backward(
                needs,
                values,
                values,
                ctx.needs_input_grad[_BEFORE_ROWS:],
                (None, None, options),
                (None, *_with_steps(grads)),
            )
        else:
            found = step.run_directly(weights, bool(needs.want_layers))
            if found is not None:
                return *_NOT_DIFFERENTIABLE, *found[0], *found[1]
            gradients = step.run(weights)
        return *_NOT_DIFFERENTIABLE, *_without_steps(gradients, count)


def _forward_directly(
    cell: Cell,
    options: int,
    rows: Sequence[Tensor],
    weights: Sequence[Tensor],
    packed: PackedSteps | None,
) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Runs a step without torch's dispatcher, or returns None if the dispatcher is needed.

    Args:
        cell, options, weights: as in `FusedStep`.
        rows: the input, the states and the other inputs.
        packed: the same weights, or None.

    Returns:
        The new states, and what the backward step reads: h and the values that the cell keeps.
    """
    if not is_unobserved():
        return None
    x, states, inputs = _split(cell, options, rows)
    hidden = ops.hidden_size(cell, weights)
    last = [torch.empty(len(x), hidden, dtype=x.dtype) for _ in cell.states]
    saved = torch.empty(len(x), (1 + cell.kept) * hidden, dtype=x.dtype)
    used = [*weights] if packed is None else [packed.forward]
    call = options & ~_BITS_OF_ROWS, cell.number, inputs or None, cell.program, saved
    ran = prepared_ops.step_directly(used, states, last, x, None, None, *call)
    return (tuple(last), saved) if ran else None


def _forward(
    cell: Cell, options: int, rows: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Runs a step as an operator. Arguments and results are as in `_forward_directly`."""
    x, *others = _with_steps(rows)
    tensors, options = [*others, *weights], options | ops.WANT_SAVED
    output, last, kept = ops.forward_untraced(
        cell.number, x, tensors, None, None, options, 0, cell.program
    )
    return tuple(state.squeeze_(0) for state in last), torch.cat([output, *kept], 2).squeeze_(0)


class _BackwardStep(NamedTuple):
    """What a backward step reads besides weights."""

    needs: _Needs
    """The gradients that autograd wants from the step."""
    options: int
    """As in `FusedStep`."""
    rows: Sequence[Tensor]
    """The input, the states and the other inputs."""
    saved: Tensor
    """What the step saved."""
    grads: Sequence[Tensor | None]
    """The gradients of the new states, or None."""

    @property
    def hidden_size(self) -> int:
        """The number of units."""
        return self.saved.shape[1] // (1 + self.needs.cell.kept)

    def run_directly(
        self, weights: Sequence[Tensor], wants_weights: bool
    ) -> tuple[Sequence[Tensor | None], Sequence[Any]] | None:
        """Runs the step without torch's dispatcher, or returns None if the dispatcher is needed.

        Args:
            weights: the weights, or the tensor prepared for the backward pass. Then the gradients
                of the sums and of the cell's own parameters replace the gradients of the weights.
            wants_weights: whether the gradients of the weights are wanted.

        Returns:
            The gradients of the rows, and of the weights, None if they are not wanted.
        """
        given = [grad for grad in self.grads if grad is not None]
        if not is_unobserved() or not all(map(holds_its_values, (*self.rows, *given))):
            return None
        cell, wanted, is_prepared = self.needs.cell, self.needs.wanted, weights[0].dim() == 1
        x, states, inputs = _split(cell, self.options, self.rows)

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=x.dtype)

        of_x = [empty(*x.shape) if wanted[0] else None]
        want_states = any(wanted[1 : 1 + len(states)])
        of_states = [empty(*state.shape) if want_states else None for state in states]
        want_inputs = zip(inputs, wanted[1 + len(states) :], strict=True)
        of_inputs = [empty(*beside.shape) if want else None for beside, want in want_inputs]
        of_weights: list[Tensor] = []
        if wants_weights and is_prepared:
            hidden = self.hidden_size
            blocks = {"gates": cell.gates, "hidden": hidden}
            of_weights = [empty(len(x), cell.sums * hidden)]
            of_weights += [empty(*(blocks[size] for size in p.shape)) for p in cell.own]
        elif wants_weights:
            of_weights = [empty(*weight.shape) for weight in weights]
        read = [*weights], states, x, inputs, self.saved, [*self.grads]
        written = [of_x, of_states, of_inputs, of_weights]
        bits = self.options & ~_BITS_OF_ROWS | ops.FOR_BACKWARD * is_prepared
        if not prepared_ops.step_back_directly(*read, written, bits, cell.number, cell.program):
            return None
        return [*of_x, *of_states, *of_inputs], of_weights or [None] * len(weights)

    def run(self, weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Runs the step as an operator.

        Returns the gradients of the rows, with a time dimension, and of the weights.
        """
        cell, needs, hidden = self.needs.cell, self.needs, self.hidden_size
        x, *others = _with_steps(self.rows)
        output, kept = self.saved.unsqueeze(0).tensor_split([hidden], 2)
        returned = ops.backward_untraced(
            cell.number,
            x,
            [*others, *weights],
            None,
            None,
            self.options,
            0,
            output,
            [kept] if cell.kept else [],
            None,
            _with_steps(self.grads),
            needs.wanted,
            needs.want_layers,
            cell.program,
        )
        return needs.pick([*returned, None])


_BITS_OF_ROWS = ops.STATES | ops.INPUTS


def _split(
    cell: Cell, options: int, rows: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Splits rows into the input, the states and the other inputs."""
    end = 1 + len(cell.states) if options & ops.STATES else 1
    return rows[0], [*rows[1:end]], [*rows[end:]]


def _with_steps(rows: Sequence[Tensor | None]) -> list[Any]:
    return [None if row is None else row.unsqueeze(0) for row in rows]


apply_step: Callable[..., Any] = super(torch.autograd.Function, FusedStep).apply
"""`FusedStep.apply` for calls outside torch.func transforms and compilers."""

_NOT_DIFFERENTIABLE = (None,) * 4  # gradients of the arguments before the input
_BEFORE_ROWS = len(_NOT_DIFFERENTIABLE)


def _without_steps(gradients: Iterable[Tensor | None], count: int) -> Iterable[Tensor | None]:
    """Removes the time dimension of the first `count` gradients."""
    for k, gradient in enumerate(gradients):
        yield gradient if gradient is None or k >= count else gradient.squeeze(0)
