"""The fused operator with a gradient, used only where a gradient is needed."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import ops, reference

_Run: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


class FusedStack(torch.autograd.Function):
    """`rnn_forward` with `rnn_backward` as its gradient. Keeps only outputs of the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hx: Tensor | None,
        sequence_layout: Tensor | None,
        reset: Tensor | None,
        options: int,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        options |= ops.WANT_HIDDEN
        output, h_n, hidden = ops.rnn_forward(input, hx, weights, sequence_layout, reset, options)
        compiling = torch.compiler.is_compiling()
        plan = _plan_backward.__wrapped__ if compiling else _plan_backward  # which has a cache
        ctx.plan = plan(options, ctx.needs_input_grad)
        read = itertools.compress(weights, ctx.plan.reads)
        ctx.save_for_backward(input, hx, sequence_layout, reset, output, *hidden, *read)
        # Autograd watches what is saved for changes in place. The other weights may change before
        # the fused backward pass, as with `nn.RNN`. A compiler can read no version.
        ctx.weights, ctx.versions = weights, None if compiling else _versions(weights)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        options, needed = ctx.options, ctx.needs_input_grad
        want_input, want_hx, weights = needed[0], needed[1], ctx.weights
        input, hx, sequence_layout, reset, output, *rest = _saved_tensors(ctx)
        hidden = rest[: ctx.plan.hidden]  # the other tensors are weights
        grad_weights: Sequence[Tensor | None]
        if grad_output is None and grad_h_n is None:
            grad_input, grad_hx, grad_weights = None, None, []
        elif _must_be_differentiable(grad_output, grad_h_n):
            grad_input, grad_hx, *grad_weights = _differentiable_backward(
                ctx, input, hx, weights, sequence_layout, reset, grad_output, grad_h_n
            )
        else:
            grad_input, grad_hx, grad_weights = ops.rnn_backward(
                grad_output,
                grad_h_n,
                input,
                hx,
                weights,
                output,
                hidden,
                sequence_layout,
                reset,
                options,
                want_input,
                want_hx,
                ctx.plan.want_layers,
            )
        return (
            grad_input if want_input else None,
            grad_hx if want_hx else None,
            *_NOT_DIFFERENTIABLE,
            # Autograd drops gradients that it did not ask for.
            *(grad_weights or [None] * len(weights)),
        )


_NOT_DIFFERENTIABLE = (None,) * 3  # sequence_layout, reset and options
_BEFORE_WEIGHTS = 2 + len(_NOT_DIFFERENTIABLE)  # arguments of forward before the weights


class _Plan(NamedTuple):
    """What the fused backward pass of a call needs."""

    reads: tuple[bool, ...]
    """For each weight whether its values are read. Biases are not, and weight_ih of the first layer
    only for the gradient of the input."""
    hidden: int
    """The number of tensors in `hidden`."""
    want_layers: list[int]
    """The layers whose weights need a gradient."""


@functools.cache
def _plan_backward(options: int, needs_input_grad: tuple[bool, ...]) -> _Plan:
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
    return _Plan(reads, count // per_layer - 1, want_layers)


_version = operator.attrgetter("_version")


def _versions(weights: Sequence[Tensor]) -> list[int] | None:
    """Returns how often each weight has been changed in place, or None where torch cannot say."""
    try:
        return [*map(_version, weights)]
    except RuntimeError:  # one was made in inference mode
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
            f"{error}\nThe backward pass of FusedRNN reads its output, its input, hx and weights, "
            "so that none of them may be changed in place before it runs. Change a copy: "
            "output.clone(), or an operation that is not in place, such as relu(output)."
        ) from error


def _must_be_differentiable(grad_output: Tensor | None, grad_h_n: Tensor | None) -> bool:
    """Returns whether the backward pass must consist of operators that torch can transform.

    With create_graph the gradient itself has a gradient. Within torch.func transforms and forward
    mode it has a tangent or is mapped over, with is_grads_batched it is mapped over.
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        reference.is_transformed()
        or (grad_output is not None and is_legacy_batchedtensor(grad_output))
        or (grad_h_n is not None and is_legacy_batchedtensor(grad_h_n))
    )


def _differentiable_backward(
    ctx: Any,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    sequence_layout: Tensor | None,
    reset: Tensor | None,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
) -> list[Tensor | None]:
    """Returns the gradients of input, hx and weights by way of the reference path.

    These have a graph of their own where gradients are enabled.
    """
    if ctx.versions is not None and ctx.versions != _versions(ctx.weights):
        raise RuntimeError(
            "FusedRNN: a bias or weight_ih was changed in place since the forward pass. Only a "
            "backward pass without create_graph, is_grads_batched and transforms allows that: "
            "change it afterwards"
        )
    values: tuple[Any, ...] = (input, hx, *weights)  # a Tensor where a gradient is needed
    needed = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[_BEFORE_WEIGHTS:])

    def run(*wanted: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(wanted)
        input, hx, *weights = (
            next(given) if need else value for value, need in zip(values, needed, strict=True)
        )
        return reference.rnn_stack(input, hx, weights, sequence_layout, reset, ctx.options)

    wanted = [value for value, need in zip(values, needed, strict=True) if need]
    pull_back = _vjp if torch._C._are_functorch_transforms_active() else _autograd_vjp
    grads = iter(pull_back(run, wanted, (grad_output, grad_h_n)))
    return [next(grads) if need else None for need in needed]


def _autograd_vjp(
    run: _Run, wanted: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """Returns the gradients of `wanted`, with graphs of their own where gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each tensor, so that a tensor given in two places keeps two gradients.
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
    """Returns the gradients of `wanted` within transforms of torch.func, unknown to autograd."""
    results, pull_back = torch.func.vjp(run, *wanted)  # type: ignore[misc]
    return pull_back(  # type: ignore[no-any-return]
        tuple(
            torch.zeros_like(result) if grad is None else grad
            for result, grad in zip(results, grads, strict=True)
        )
    )
