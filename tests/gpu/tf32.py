"""A PyTorch layer that rounds the operands of its products to TF32, as cuBLAS and cuDNN do."""

import torch
from torch.nn.functional import linear

from namernn_fast import FusedRNN
from namernn_fast.testing import ErrorBudget


def nearest(x):
    """Rounds float32 numbers to the nearest TF32 value, with ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


class Rounded(torch.autograd.Function):
    """Computes x W^T and the gradients of x and W, with operands rounded to TF32."""

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        return nearest(x) @ nearest(weight).t()

    @staticmethod
    def backward(context, grad):
        x, weight = context.saved_tensors
        return nearest(grad) @ nearest(weight), nearest(grad).t() @ nearest(x)


class RoundedRecurrence(Rounded):
    """Like `Rounded`, but does not round the operands of the gradient of W."""

    @staticmethod
    def backward(context, grad):
        h, weight = context.saved_tensors
        return nearest(grad) @ nearest(weight), grad.t() @ h


def recurrence(projection, product):
    """Returns a function that runs a tanh layer without biases, with the given products.

    Args:
        projection: a function that computes x W^T for the input and weight_ih.
        product: a function that computes x W^T for a state and weight_hh.
    """

    def run(inputs, hx, weights):
        weight_ih, weight_hh = weights
        states = [hx[0]]
        for x in inputs:
            states.append(torch.tanh(projection(x, weight_ih) + product(states[-1], weight_hh)))
        return torch.stack(states[1:]), states[-1][None]

    return run


def results(run, inputs, hx, weights, grads, dtype):
    """Returns the results of `run` in `dtype`, and the gradients of all its arguments."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (inputs, hx, *weights)]
    inputs, hx, *weights = leaves
    output, h_n = run(inputs, hx, weights)
    torch.autograd.backward([output, h_n], [grad.to(dtype) for grad in grads])
    names = ("inputs", "hx", "weight_ih", "weight_hh")
    found = {f"grad_{name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return found | {"output": output.detach(), "h_n": h_n.detach()}


def check_results(name, features, hidden_size, batch, projection, product):
    """Checks a fused layer's error budget against a layer that uses the given products.

    Args:
        name: the name of the case, which error messages show.
        features: the input_size of the layer.
        hidden_size: the number of hidden units.
        batch: the number of sequences.
        projection: a function that computes x W^T for the input and weight_ih.
        product: a function that computes x W^T for a state and weight_hh.
    """
    T, B, H = 5, batch, hidden_size
    arguments = [torch.randn(T, B, features), torch.randn(1, B, H).tanh()]
    arguments += [[(torch.rand(H, n) - 0.5) * 2 / H**0.5 for n in (features, H)]]
    arguments += [(torch.randn(T, B, H), torch.randn(1, B, H))]
    ours = results(fused, *arguments, torch.float32)
    theirs = results(recurrence(projection, product), *arguments, torch.float32)
    exact = results(recurrence(linear, linear), *arguments, torch.float64)
    budget = ErrorBudget(torch.float32)
    for result, reference in exact.items():
        budget.add((name, H, result), ours[result], theirs[result], reference)
    budget.check()


def fused(inputs, hx, weights):
    rnn = FusedRNN(inputs.shape[2], hx.shape[2], bias=False)
    parameters = dict(zip(("weight_ih_l0", "weight_hh_l0"), weights, strict=True))
    return torch.func.functional_call(rnn, parameters, (inputs, hx))
