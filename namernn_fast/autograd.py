"""The fused operator with a gradient; calls that need none skip it."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import ops, reference
from .call import CLASSES, Call, Cell, Results

_Run: TypeAlias = Callable[..., Results]


class FusedStack(torch.autograd.Function):
    """The forward operator of a cell with the backward operator as its gradient.

    Applied to `call.flat()`. Of the intermediate results it saves only the outputs of the layers
    and what the cell keeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        sequence_layout: Tensor | None,
        reset: Tensor | None,
        options: int,
        trees: int,
        cell: Cell,
        *weights: Tensor,
    ) -> Results:
        # The backward pass reads every output.
        options = options & ~ops.LAST_STATE | ops.WANT_HIDDEN
        arguments = input, hx, cx, weights, sequence_layout, reset, options, trees
        results, hidden, kept = ops.forward(cell, *arguments)
        needed = ctx.needs_input_grad
        of_input, of_hx = input if needed[0] else None, hx if needed[1] else None
        of_cx = cx if needed[2] else None
        if torch.compiler.is_compiling():  # a compiler keeps the values, and cannot read versions
            plan = _plan_backward.__wrapped__(cell, options, needed)  # without its cache
            ctx.call = options, trees, plan, None, None, None
            watched: Iterable[Tensor] = weights
        else:
            plan = _plan_backward(cell, options, needed)
            # Aliases, so that `tensor.data = ...` before the backward pass does not change them.
            values = [weight.detach() for weight in weights]
            input = input.detach()
            hx = None if hx is None else hx.detach()
            cx = None if cx is None else cx.detach()
            sequence_layout = None if sequence_layout is None else sequence_layout.detach()
            reset = None if reset is None else reset.detach()
            ctx.call = options, trees, plan, values, weights, _versions(weights)
            # Autograd watches what is saved for changes in place. The other weights may change
            # in place before the fused backward pass, as with `nn.RNN`.
            watched = itertools.compress(values, plan.reads)
        of_call = of_input, of_hx, of_cx, input, hx, cx, sequence_layout, reset
        ctx.save_for_backward(*of_call, results[0], *hidden, *kept, *watched)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options, trees, plan, weights, originals, versions = ctx.call
        want_input, want_hx, want_cx, *_ = needed = ctx.needs_input_grad
        of_input, of_hx, of_cx, input, hx, cx, sequence_layout, reset, output, *rest = (
            _saved_tensors(ctx)
        )
        hidden, rest = rest[: plan.hidden], rest[plan.hidden :]
        kept, rest = rest[: plan.kept], rest[plan.kept :]
        if weights is None:
            weights = originals = rest
        grad_weights: Sequence[Tensor | None]
        if all(grad is None for grad in grads):
            grad_input, grad_hx, grad_cx, grad_weights = None, None, None, []
        elif _must_be_differentiable(grads):
            if versions is not None and versions != _versions(originals):
                raise RuntimeError(
                    f"{CLASSES[plan.cell]}: a bias or weight_ih was changed in place since the "
                    "forward pass, which a backward pass with create_graph, is_grads_batched or a "
                    "transform does not allow: change it after the backward pass"
                )
            grad_input, grad_hx, grad_cx, *grad_weights = _differentiable_backward(
                (of_input, of_hx, of_cx, *originals),
                (input, hx, cx, *weights),
                (*needed[:3], *needed[_BEFORE_WEIGHTS:]),
                sequence_layout,
                reset,
                options,
                plan.cell,
                grads,
            )
        else:
            grad_input, grad_hx, grad_cx, grad_weights = ops.backward(
                plan.cell,
                grads,
                input,
                hx,
                cx,
                weights,
                output,
                hidden,
                kept,
                sequence_layout,
                reset,
                options,
                want_input,
                want_hx or want_cx,
                plan.want_layers,
                trees,
            )
        return (
            grad_input if want_input else None,
            grad_hx if want_hx else None,
            grad_cx if want_cx else None,
            *_NOT_DIFFERENTIABLE,
            # Autograd drops the gradients that are not needed.
            *(grad_weights or [None] * len(weights)),
        )


apply_untransformed: _Run = super(torch.autograd.Function, FusedStack).apply
"""`FusedStack.apply` for calls outside torch.func transforms and compilers.

It skips the checks that those two need, which take 5% of the time of a small call."""

_NOT_DIFFERENTIABLE = (None,) * 5  # sequence_layout, reset, options, trees and cell
_BEFORE_WEIGHTS = 3 + len(_NOT_DIFFERENTIABLE)  # arguments of forward before the weights


class _Plan(NamedTuple):
    """The inputs and gradients that the fused backward pass of a call needs."""

    cell: Cell
    reads: tuple[bool, ...]
    """Whether the values of each weight are read. Those of biases are not, and those of weight_ih
    of the first layer only for the gradient of the input."""
    hidden: int
    """The number of tensors in `hidden`."""
    kept: int
    """The number of tensors in `kept`."""
    want_layers: list[int]
    """The layers whose weights need a gradient."""


@functools.cache
def _plan_backward(cell: Cell, options: int, needs_input_grad: tuple[bool, ...]) -> _Plan:
    want_input, want_weights = needs_input_grad[0], needs_input_grad[_BEFORE_WEIGHTS:]
    count, per_layer = len(want_weights), ops.weights_per_layer(options)
    of_one = per_layer // ops.directions_of(options)
    reads = tuple(
        k % of_one == 1 or (k % of_one == 0 and (want_input or k >= per_layer))
        for k in range(count)
    )
    want_layers = [
        k // per_layer for k in range(0, count, per_layer) if any(want_weights[k : k + per_layer])
    ]
    layers = count // per_layer
    return _Plan(cell, reads, layers - 1, layers if ops.KEPT[cell] else 0, want_layers)


_version = operator.attrgetter("_version")


def _versions(weights: Sequence[Tensor]) -> list[int] | None:
    """Returns the version counters of the weights, or None if one has none.

    Torch increments the counter of a tensor whenever it is modified in place.
    """
    try:
        return [*map(_version, weights)]
    except RuntimeError:  # a tensor made in inference mode
        return None


def _saved_tensors(ctx: Any) -> Any:
    """Returns the saved tensors.

    Raises:
        RuntimeError: one of them was changed in place since the forward pass, or is gone.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{error}\nThe backward pass of a fused layer reads its output, its input, hx and "
            "weights, so none of them may be changed in place before it runs. Change a copy: "
            "output.clone(), or use an operation that is not in place, such as relu(output)."
        ) from error


def _must_be_differentiable(grads: Sequence[Tensor | None]) -> bool:
    """Returns whether the backward pass must consist of differentiable ATen operators.

    With create_graph the gradient itself needs a gradient. Under torch.func transforms and
    forward-mode AD it has a tangent or is batched, and with is_grads_batched it is batched.
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return reference.is_transformed() or any(
        grad is not None and is_legacy_batchedtensor(grad) for grad in grads
    )


def _differentiable_backward(
    originals: tuple[Any, ...],
    values: tuple[Any, ...],
    needed: tuple[bool, ...],
    sequence_layout: Tensor | None,
    reset: Tensor | None,
    options: int,
    cell: Cell,
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Computes the gradients of input, hx, cx and weights through the reference path.

    The gradients are differentiable themselves if gradients are enabled.

    Args:
        originals: input, hx, cx and weights of the forward pass, which higher-order gradients flow
            to. Only those that need a gradient are read.
        values: the values of these tensors in the forward pass.
        needed: which of them need a gradient.
        sequence_layout, reset, options: as in `namernn_fast.ops`.
        grads: the gradients of the results.
    """

    def run(*wanted: Tensor) -> Results:
        given = iter(wanted)
        input, hx, cx, *weights = (
            next(given) if need else value for value, need in zip(values, needed, strict=True)
        )
        call = Call(input, hx, weights, sequence_layout, reset, options, cell=cell, cx=cx)
        return reference.run_stack(call)

    with torch.enable_grad():
        wanted = [
            original if original.is_set_to(value) else _FormerValues.apply(original, value)  # type: ignore[no-untyped-call]
            for original, value, need in zip(originals, values, needed, strict=True)
            if need
        ]
    pull_back = _vjp if torch._C._are_functorch_transforms_active() else _autograd_vjp
    gradients = iter(pull_back(run, wanted, grads))
    return [next(gradients) if need else None for need in needed]


class _FormerValues(torch.autograd.Function):
    """Restores the values that a tensor had before its `.data` was replaced.

    The gradient goes to the tensor.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _autograd_vjp(
    run: _Run, wanted: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """Returns the gradients of `wanted`, differentiable if gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor that appears twice gets two separate gradients.
        wanted = [value.view_as(value) for value in wanted]
        given = [(r, g) for r, g in zip(run(*wanted), grads, strict=True) if g is not None]
        return torch.autograd.grad(
            [result for result, _ in given],
            wanted,
            [grad for _, grad in given],
            create_graph=create_graph,
            allow_unused=True,
        )


def _vjp(run: _Run, wanted: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Returns the gradients of `wanted` under torch.func transforms, bypassing autograd's tape."""
    results, pull_back = torch.func.vjp(run, *wanted)  # type: ignore[misc]
    return pull_back(  # type: ignore[no-any-return]
        tuple(
            torch.zeros_like(result) if grad is None else grad
            for result, grad in zip(results, grads, strict=True)
        )
    )
