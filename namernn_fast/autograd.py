"""Autograd for the fused operators. Calls that need no gradient bypass this module."""

import functools
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import ops, reference
from .call import Call, Results
from .cells import Cell
from .equations import find_cell
from .machine.context import functorch_is_active, is_compiling, is_transformed
from .machine.torch_private import (
    before_first_hook,
    is_legacy_batchedtensor,
    version_of,
)

_Run: TypeAlias = Callable[..., Results]


class FusedStack(torch.autograd.Function):
    """The operator `forward`, differentiated by the operator `backward`.

    The arguments are `call.flat()`. The forward pass saves its arguments, the outputs of the layers
    and the values that the cell keeps (`Cell.kept`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: int,
        program: str | None,
        options: int,
        trees: int,
        sequence_layout: Tensor | None,
        reset: Tensor | None,
        *tensors: Tensor,
    ) -> Results:
        input, *others = tensors
        # The backward pass reads the output of every step, which LAST_STATE would skip.
        options = options & ~ops.LAST_STATE | ops.WANT_SAVED
        described = find_cell(cell, program)
        count = 1 + ops.before_weights(described, options)
        weights = tensors[count:]
        arguments = cell, input, others, sequence_layout, reset, options, trees, program
        needed = ctx.needs_input_grad[_BEFORE_TENSORS:]
        values: Sequence[Tensor]
        watched: Iterable[Tensor]
        if is_compiling():
            # A compiler preserves the saved values itself, and cannot read version counters.
            output, last, saved = ops.forward(*arguments)
            needs = _needs_of.__wrapped__(described, options, count, needed)  # bypasses the cache
            ctx.call = options, trees, needs, None, None, None
            values, watched = tensors[:count], weights
        else:
            output, last, saved = ops.forward_untraced(*arguments)
            needs = _needs_of(described, options, count, needed)
            # Save aliases, so that assigning `tensor.data` before the backward pass does not change
            # the saved values.
            values = [tensor.detach() for tensor in tensors]
            sequence_layout = None if sequence_layout is None else sequence_layout.detach()
            reset = None if reset is None else reset.detach()
            ctx.call = options, trees, needs, values[count:], weights, _versions(weights)
            # Autograd rejects saved tensors that were changed in place. So save only the weights
            # that the fused backward pass reads. The other weights may change, as with `nn.RNN`.
            watched = itertools.compress(values[count:], needs.reads)
        # Higher-order gradients must flow to the original tensors, not to aliases.
        originals = itertools.compress(tensors[:count], needed)
        ctx.save_for_backward(
            sequence_layout, reset, output, *values[:count], *originals, *saved, *watched
        )
        ctx.set_materialize_grads(False)
        return output, *last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options, trees, needs, weights, originals, versions = ctx.call
        sequence_layout, reset, output, *rest = _saved_tensors(ctx)
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        count, wanted, saved = needs.ends
        if weights is None:
            weights = originals = rest[saved:]
        if _must_be_differentiable(grads):
            if versions is not None and versions != _versions(originals):
                raise RuntimeError(
                    f"{needs.cell.layer}: a bias or weight_ih was changed in place since "
                    "the forward pass. With create_graph, is_grads_batched or a transform, change "
                    "it only after the backward pass"
                )
            saved_originals = iter(rest[count:wanted])
            inputs = [next(saved_originals) if want else None for want in needs.wanted]
            gradients: Iterable[Tensor | None] = _differentiable_backward(
                needs,
                (*inputs, *originals),
                (*rest[:count], *weights),
                ctx.needs_input_grad[_BEFORE_TENSORS:],
                (sequence_layout, reset, options),
                grads,
            )
            return *_NOT_DIFFERENTIABLE, *gradients
        run = ops.backward if is_compiling() else ops.backward_untraced
        returned = run(
            needs.cell.number,
            rest[0],
            [*rest[1:count], *weights],
            sequence_layout,
            reset,
            options,
            trees,
            output,
            rest[wanted:saved],
            grads[0],
            grads[1:],
            needs.wanted,
            needs.want_layers,
            needs.cell.program,
        )
        return *_NOT_DIFFERENTIABLE, *needs.pick([*returned, None])


apply_untransformed: _Run = super(torch.autograd.Function, FusedStack).apply
"""`FusedStack.apply` for calls outside torch.func transforms and compilers.

Skips checks that only transforms and compilers need, which take 5% of the time of a small call."""


class _ResultHooks(OrderedDict[int, Callable[..., Any]]):
    """The tensor hooks of one result. They are skipped if the result gets no gradient.

    Autograd calls the hooks of all results of a node, with None for a result that the loss does not
    use. The results of torch's layers come from separate nodes, so only hooks of used results run.
    """

    def __setitem__(self, key: int, hook: Callable[..., Any]) -> None:
        # Torch's own hooks accept None, and `register_multi_grad_hook` counts calls of its hooks.
        if not str(getattr(hook, "__module__", None)).startswith("torch."):
            hook = _skipping_none(hook)
        super().__setitem__(key, hook)


def _skipping_none(hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def run(grad: Tensor | None) -> Any:
        return None if grad is None else hook(grad)

    return run


def _skip_unused(result: Tensor) -> None:
    result._backward_hooks = _ResultHooks()


before_first_hook(FusedStack, _skip_unused)

_NOT_DIFFERENTIABLE = (None,) * 6  # gradients of the arguments before input
_BEFORE_TENSORS = len(_NOT_DIFFERENTIABLE)


class _Needs(NamedTuple):
    """The weights that a fused backward pass reads, and the gradients that it computes."""

    cell: Cell
    reads: tuple[bool, ...]
    """For each weight, whether the fused backward pass reads it. It never reads biases, and reads
    weight_ih of the first layer only for the gradient of the input."""
    ends: tuple[int, int, int]
    """The end index of each group of saved tensors: the values of input and states; the original
    input and states that need a gradient; the tensors in the operator's result `saved`."""
    wanted: list[bool]
    """Whether input, each state and each of `Cell.inputs` need a gradient."""
    want_layers: list[int]
    """The layers whose weights need a gradient."""
    pick: Callable[[list[Tensor | None]], tuple[Tensor | None, ...]]
    """A function that takes the gradients that the operator returned, followed by None, and returns
    a gradient or None for input, each state, each of `Cell.inputs` and each weight."""


@functools.cache
def _needs_of(cell: Cell, options: int, count: int, needed: tuple[bool, ...]) -> _Needs:
    """Returns the `_Needs` of a backward pass.

    Args:
        cell: the cell.
        options: the option bits.
        count: the number of tensors before the weights, including input.
        needed: for each tensor of `Call.flat`, whether it needs a gradient.
    """
    wanted, want_weights = [*needed[:count]], needed[count:]
    roles = [parameter.role for parameter in ops.parameters_of(cell, options)]
    per_layer = len(roles) * ops.directions_of(options)
    reads = tuple(
        (wanted[0] or k >= per_layer) if role == "weight_ih" else not role.startswith("bias_")
        for k, role in zip(range(len(want_weights)), itertools.cycle(roles))
    )
    layers = len(want_weights) // per_layer
    want_layers = [
        k for k in range(layers) if any(want_weights[k * per_layer : (k + 1) * per_layer])
    ]
    returned = [*wanted, *(k // per_layer in want_layers for k in range(len(want_weights)))]
    positions = itertools.count()
    saved = layers - 1 + (layers if cell.kept else 0)
    return _Needs(
        cell,
        reads,
        (count, count + sum(wanted), count + sum(wanted) + saved),
        wanted,
        want_layers,
        operator.itemgetter(*(next(positions) if is_returned else -1 for is_returned in returned)),
    )


def _versions(weights: Sequence[Tensor]) -> list[int] | None:
    """Returns the version counters of the weights, or None if a weight has no counter.

    Torch increments the counter of a tensor whenever it is modified in place.
    """
    try:
        return [*map(version_of, weights)]
    except RuntimeError:  # inference tensors have no version counter
        return None


def _saved_tensors(ctx: Any) -> Any:
    """Returns `ctx.saved_tensors`; adds advice to the error if a saved tensor was changed in place.

    Raises:
        RuntimeError: a saved tensor was changed in place since the forward pass, or was freed.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{error}\nThe backward pass of a fused layer reads its output, its input, hx, "
            "reset_to and weights, so none of them may be changed in place before it runs. "
            "Change a copy: output.clone(), or use an operation that is not in place, such as "
            "relu(output)."
        ) from error


def _must_be_differentiable(grads: Sequence[Tensor | None]) -> bool:
    """Returns whether the backward pass must consist of differentiable ATen operators.

    True with create_graph, which differentiates the gradients again. Also true if `grads` are
    batched or have tangents: under torch.func transforms, forward-mode AD and is_grads_batched.
    """
    if torch.is_grad_enabled():
        return True
    if is_compiling():
        return False
    return is_transformed() or any(
        grad is not None and is_legacy_batchedtensor(grad) for grad in grads
    )


def _differentiable_backward(
    needs: _Needs,
    originals: tuple[Any, ...],
    values: tuple[Any, ...],
    needed: tuple[bool, ...],
    rows_and_options: tuple[Tensor | None, Tensor | None, int],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Computes the gradients of input, states and weights through the reference path.

    The returned gradients are themselves differentiable if gradients are enabled.

    Args:
        needs: the `_Needs` of the backward pass.
        originals: input, states and weights of the forward pass, which receive higher-order
            gradients. A tensor that needs no gradient is not read, and may be None.
        values: the values of input, states and weights in the forward pass.
        needed: for input, each state and each weight, whether it needs a gradient.
        rows_and_options: sequence_layout, reset and options, as in `namernn_fast.ops`.
        grads: the gradient of each result, or None.
    """

    def run(*wanted: Tensor) -> Results:
        replacements = iter(wanted)
        tensors = [
            next(replacements) if need else value
            for value, need in zip(values, needed, strict=True)
        ]
        layout, reset, options = rows_and_options
        cell = needs.cell.number, needs.cell.program
        flat = *cell, options, 0, layout, reset, *tensors
        return reference.run_stack(Call.of_flat(flat))

    with torch.enable_grad():
        wanted = [
            original if original.is_set_to(value) else _FormerValues.apply(original, value)  # type: ignore[no-untyped-call,unused-ignore]
            for original, value, need in zip(originals, values, needed, strict=True)
            if need
        ]
    pull_back = _vjp if functorch_is_active() else _autograd_vjp
    gradients = iter(pull_back(run, wanted, grads))
    return [next(gradients) if need else None for need in needed]


class _FormerValues(torch.autograd.Function):
    """Restores the values that a tensor had before its `.data` was replaced.

    The gradient flows to the tensor itself.
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
    """Returns the gradients with respect to `wanted`, differentiable if gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Use views, so that a tensor that appears twice in `wanted` gets two separate gradients.
        wanted = [value.view_as(value) for value in wanted]
        pairs = [(r, g) for r, g in zip(run(*wanted), grads, strict=True) if g is not None]
        return torch.autograd.grad(
            [result for result, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )


def _vjp(run: _Run, wanted: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Like `_autograd_vjp`, for calls under torch.func transforms."""
    results, pull_back = torch.func.vjp(run, *wanted)  # type: ignore[misc,unused-ignore]
    return pull_back(  # type: ignore[no-any-return]
        tuple(
            torch.zeros_like(result) if grad is None else grad
            for result, grad in zip(results, grads, strict=True)
        )
    )
