"""The fused operator with a gradient, used only where a gradient is needed."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import ops, reference
from .call import Call

_Run: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


class FusedStack(torch.autograd.Function):
    """`rnn_forward` with `rnn_backward` as its gradient, applied to `call.flat()`.

    It keeps only outputs of the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hx: Tensor | None,
        sequence_layout: Tensor | None,
        reset: Tensor | None,
        options: int,
        trees: int,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # The backward pass reads every output.
        options = options & ~ops.LAST_STATE | ops.WANT_HIDDEN
        output, h_n, hidden = ops.rnn_forward(
            input, hx, weights, sequence_layout, reset, options, trees
        )
        needed = ctx.needs_input_grad
        of_input, of_hx = input if needed[0] else None, hx if needed[1] else None
        if torch.compiler.is_compiling():  # it keeps values itself, and can read no version
            plan = _plan_backward.__wrapped__(options, needed)  # without its cache
            ctx.call = options, trees, plan, None, None, None
            watched: Iterable[Tensor] = weights
        else:
            plan = _plan_backward(options, needed)
            # Aliases, since `tensor.data = ...` before the backward pass is not to change them.
            values = [weight.detach() for weight in weights]
            input = input.detach()
            hx = None if hx is None else hx.detach()
            sequence_layout = None if sequence_layout is None else sequence_layout.detach()
            reset = None if reset is None else reset.detach()
            ctx.call = options, trees, plan, values, weights, _versions(weights)
            # Autograd watches what is saved for changes in place. The other weights may change
            # in place before the fused backward pass, as with `nn.RNN`.
            watched = itertools.compress(values, plan.reads)
        ctx.save_for_backward(
            of_input, of_hx, input, hx, sequence_layout, reset, output, *hidden, *watched
        )
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        options, trees, plan, weights, originals, versions = ctx.call
        want_input, want_hx, *_ = needed = ctx.needs_input_grad
        of_input, of_hx, input, hx, sequence_layout, reset, output, *rest = _saved_tensors(ctx)
        hidden = rest[: plan.hidden]
        if weights is None:
            weights = originals = rest[plan.hidden :]
        grad_weights: Sequence[Tensor | None]
        if grad_output is None and grad_h_n is None:
            grad_input, grad_hx, grad_weights = None, None, []
        elif _must_be_differentiable(grad_output, grad_h_n):
            if versions is not None and versions != _versions(originals):
                raise RuntimeError(
                    "FusedRNN: a bias or weight_ih was changed in place since the forward pass. "
                    "Only a backward pass without create_graph, is_grads_batched and transforms "
                    "allows that: change it afterwards"
                )
            grad_input, grad_hx, *grad_weights = _differentiable_backward(
                (of_input, of_hx, *originals),
                (input, hx, *weights),
                (*needed[:2], *needed[_BEFORE_WEIGHTS:]),
                sequence_layout,
                reset,
                options,
                (grad_output, grad_h_n),
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
                plan.want_layers,
                trees,
            )
        return (
            grad_input if want_input else None,
            grad_hx if want_hx else None,
            *_NOT_DIFFERENTIABLE,
            # Autograd drops gradients that it did not ask for.
            *(grad_weights or [None] * len(weights)),
        )


apply_untransformed: _Run = super(torch.autograd.Function, FusedStack).apply
"""`FusedStack.apply` where no torch.func transform is active and no compiler traces the call.

It leaves out what those two need, which takes one twentieth of the time of a small call."""

_NOT_DIFFERENTIABLE = (None,) * 4  # sequence_layout, reset, options and trees
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
    originals: tuple[Any, ...],
    values: tuple[Any, ...],
    needed: tuple[bool, ...],
    sequence_layout: Tensor | None,
    reset: Tensor | None,
    options: int,
    grads: tuple[Tensor | None, Tensor | None],
) -> list[Tensor | None]:
    """Returns the gradients of input, hx and weights by way of the reference path.

    These have a graph of their own where gradients are enabled.

    Args:
        originals: input, hx and weights of the forward pass, whose gradients get gradients. Only
            those that need a gradient are read.
        values: what these tensors held in the forward pass.
        needed: which of them need a gradient.
        sequence_layout, reset, options: as of `namernn_fast.ops`.
        grads: the gradients of output and h_n.
    """

    def run(*wanted: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(wanted)
        input, hx, *weights = (
            next(given) if need else value for value, need in zip(values, needed, strict=True)
        )
        return reference.rnn_stack(Call(input, hx, weights, sequence_layout, reset, options))

    with torch.enable_grad():
        wanted = [
            original if original.is_set_to(value) else _Former.apply(original, value)  # type: ignore[no-untyped-call]
            for original, value, need in zip(originals, values, needed, strict=True)
            if need
        ]
    pull_back = _vjp if torch._C._are_functorch_transforms_active() else _autograd_vjp
    gradients = iter(pull_back(run, wanted, grads))
    return [next(gradients) if need else None for need in needed]


class _Former(torch.autograd.Function):
    """What a tensor held before its `.data` was replaced; the gradient goes to the tensor."""

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
