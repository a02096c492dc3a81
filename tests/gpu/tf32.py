"""A layer in PyTorch with operands that are rounded to TF32 as libraries round them."""

import torch
from torch.nn.functional import linear

from namernn_fast import FusedRNN
from namernn_fast.testing import ErrorBudget


def nearest(x):
    """Returns float32 numbers rounded to TF32, to the nearest value."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & -0x2000).view(torch.float32)


class Rounded(torch.autograd.Function):
    """x W^T and its gradients from operands that are rounded to TF32."""

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        return nearest(x) @ nearest(weight).t()

    @staticmethod
    def backward(context, grad):
        x, weight = context.saved_tensors
        return nearest(grad) @ nearest(weight), nearest(grad).t() @ nearest(x)


class RoundedRecurrence(Rounded):
    """x W^T with rounded operands, and the gradient of W, which the recurrence lacks, unrounded."""

    @staticmethod
    def backward(context, grad):
        h, weight = context.saved_tensors
        return nearest(grad) @ nearest(weight), grad.t() @ h


def recurrence(projection, product):
    """Returns a layer with tanh and without biases, made from products x W^T.

    Args:
        projection: of input and weight_ih.
        product: of a state and weight_hh.
    """

    def run(inputs, hx, weights):
        weight_ih, weight_hh = weights
        states = [hx[0]]
        for x in inputs:
            states.append(torch.tanh(projection(x, weight_ih) + product(states[-1], weight_hh)))
        return torch.stack(states[1:]), states[-1][None]

    return run


def results(run, inputs, hx, weights, grads, dtype):
    """Returns the results of `run` and the gradients of all that it is given."""
    inputs, hx, *weights = (
        of.to(dtype, copy=True).requires_grad_() for of in (inputs, hx, *weights)
    )
    output, h_n = run(inputs, hx, weights)
    torch.autograd.backward([output, h_n], [of.to(dtype) for of in grads])
    names = ("inputs", "hx", "weight_ih", "weight_hh")
    found = {
        f"grad_{name}": of.grad for name, of in zip(names, (inputs, hx, *weights), strict=True)
    }
    return found | {"output": output.detach(), "h_n": h_n.detach()}


def check_results(name, features, hidden_size, batch, projection, product):
    """Holds a layer to the error of products whose operands are rounded.

    Args:
        name: of the case.
        features: of the input.
        hidden_size: hidden units of the layer.
        batch: sequences.
        projection: the rounded product of input and weight_ih.
        product: the rounded product of a state and weight_hh.
    """
    T, B, H = 5, batch, hidden_size
    given = [torch.randn(T, B, features), torch.randn(1, B, H).tanh()]
    given += [[(torch.rand(H, n) - 0.5) * 2 / H**0.5 for n in (features, H)]]
    given += [(torch.randn(T, B, H), torch.randn(1, B, H))]
    ours = results(fused, *given, torch.float32)
    theirs = results(recurrence(projection, product), *given, torch.float32)
    exact = results(recurrence(linear, linear), *given, torch.float64)
    budget = ErrorBudget(torch.float32)
    for result, reference in exact.items():
        budget.add((name, H, result), ours[result], theirs[result], reference)
    budget.check()


def fused(inputs, hx, weights):
    rnn = FusedRNN(inputs.shape[2], hx.shape[2], bias=False)
    parameters = dict(zip(("weight_ih_l0", "weight_hh_l0"), weights, strict=True))
    return torch.func.functional_call(rnn, parameters, (inputs, hx))
