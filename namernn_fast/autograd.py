"""The fused operator with a gradient, used only where a gradient is needed."""

import torch

from . import ops, reference


class FusedStack(torch.autograd.Function):
    """`rnn_forward` with `rnn_backward` as its gradient. Keeps only outputs of the forward pass."""

    @staticmethod
    def forward(ctx, input, hx, sequence_layout, reset, options, *weights):
        options |= ops.WANT_HIDDEN
        output, h_n, hidden = ops.rnn_forward(input, hx, weights, sequence_layout, reset, options)
        ctx.save_for_backward(input, hx, sequence_layout, reset, output, *hidden, *weights)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        options, needed = ctx.options, ctx.needs_input_grad
        want_input, want_hx, want_weights = needed[0], needed[1], needed[_BEFORE_WEIGHTS:]
        input, hx, sequence_layout, reset, output, *hidden = ctx.saved_tensors
        count = len(want_weights)
        hidden, weights = hidden[:-count], hidden[-count:]
        if grad_output is None and grad_h_n is None:
            grad_input, grad_hx, grad_weights = None, None, []
        elif torch.is_grad_enabled():  # create_graph: the gradient itself must have one
            grad_input, grad_hx, *grad_weights = _differentiable_backward(
                ctx, input, hx, weights, sequence_layout, reset, grad_output, grad_h_n
            )
        else:
            per_layer = ops.weights_per_layer(options)
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
                [
                    k // per_layer
                    for k in range(0, count, per_layer)
                    if any(want_weights[k : k + per_layer])
                ],
            )
        return (
            grad_input if want_input else None,
            grad_hx if want_hx else None,
            *_NOT_DIFFERENTIABLE,
            *(grad_weights or [None] * count),  # autograd drops gradients that it did not ask for
        )


_NOT_DIFFERENTIABLE = (None,) * 3  # sequence_layout, reset and options
_BEFORE_WEIGHTS = 2 + len(_NOT_DIFFERENTIABLE)  # arguments of forward before the weights


def _differentiable_backward(
    ctx, input, hx, weights, sequence_layout, reset, grad_output, grad_h_n
):
    """Returns the gradients of input, hx and weights, which the reference path gives a graph."""
    # A view of each tensor, so that a tensor given in two places keeps two gradients.
    input, hx, *weights = (
        None if tensor is None else tensor.view_as(tensor) for tensor in (input, hx, *weights)
    )
    results = reference.rnn_stack(input, hx, weights, sequence_layout, reset, ctx.options)
    given = [
        (result, grad)
        for result, grad in zip(results, (grad_output, grad_h_n), strict=True)
        if grad is not None
    ]
    needed = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[_BEFORE_WEIGHTS:])
    grads = iter(
        torch.autograd.grad(
            [result for result, _ in given],
            [s for s, n in zip((input, hx, *weights), needed, strict=True) if n],
            [grad for _, grad in given],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(grads) if n else None for n in needed]
