"""The operators as torch sees them: opcheck, gradients of gradients."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedRNN, FusedRNNCell, ops

BATCH_SIZES = torch.tensor([3, 3, 2, 1])


def layer_arguments(bidirectional, bias, packed, batch_first, dtype=torch.float64, with_hx=True):
    directions = 2 if bidirectional else 1
    module = torch.nn.RNN(4, 6, bias=bias, bidirectional=bidirectional, dtype=dtype)
    x = torch.randn(9, 4, dtype=dtype) if packed else torch.randn(5, 3, 4, dtype=dtype)
    batch = 5 if batch_first and not packed else 3
    hx = torch.randn(directions, batch, 6, dtype=dtype) if with_hx else None
    weights = [p.detach() for p in module.parameters()]
    return x, hx, weights, BATCH_SIZES if packed else None, "tanh", bidirectional, batch_first


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_opcheck(packed, batch_first, bidirectional, with_hx):
    arguments = layer_arguments(bidirectional, True, packed, batch_first, with_hx=with_hx)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if not packed or with_hx:  # else the batch is a value in batch_sizes, which opcheck compares
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.rnn_forward, arguments, test_utils=tests)
    x, hx, weights, *options = arguments
    output, h_n = ops.rnn_forward(*arguments)
    for grads in ((output, h_n), (None, h_n), (output, None)):
        wants = (True, with_hx, True), (False, False, True), (True, False, False)
        for want in wants:
            torch.library.opcheck(
                ops.rnn_backward, (*grads, x, hx, weights, output, *options, *want)
            )


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(nonlinearity, bidirectional, packed):
    """First and second derivatives in float64, with respect to everything at once."""
    options = {"nonlinearity": nonlinearity, "bidirectional": bidirectional, "num_layers": 2}
    module = FusedRNN(2, 3, dtype=torch.float64, **options)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    shape = (9, 2) if packed else (4, 3, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(4 if bidirectional else 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, hx, *values):
        input = PackedSequence(x, BATCH_SIZES) if packed else x
        parameters = dict(zip(names, values, strict=True))
        output, h_n = torch.func.functional_call(module, parameters, (input, hx))
        return output.data if packed else output, h_n

    # Without a flag torch's own check of undefined gradients, of determinism, all is on.
    assert torch.autograd.gradcheck(run, (x, hx, *values))
    assert torch.autograd.gradgradcheck(run, (x, hx, *values), fast_mode=True)


def test_a_tensor_given_twice_has_one_whole_second_derivative():
    """weight_ih and weight_hh tied: each place has its own gradient, also of the gradient."""
    square = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    module = FusedRNN(3, 3, bias=False, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(w):
        tied = {"weight_ih_l0": w, "weight_hh_l0": w}
        return torch.func.functional_call(module, tied, (x,))[0]

    assert torch.autograd.gradcheck(run, square)
    assert torch.autograd.gradgradcheck(run, square)


def test_only_what_is_asked_for_has_a_gradient():
    module = FusedRNN(4, 6)
    x = torch.randn(5, 3, 4)
    module.requires_grad_(False)
    assert not module(x)[0].requires_grad
    module.bias_hh_l0.requires_grad_(True)
    module(x)[1].sum().backward()
    assert module.bias_hh_l0.grad is not None
    assert module.weight_hh_l0.grad is None
    hx = torch.randn(1, 3, 6, requires_grad=True)
    module.requires_grad_(False)
    module(x, hx)[0].sum().backward()
    assert hx.grad is not None


@pytest.mark.parametrize("layer", [FusedRNN, FusedRNNCell])
def test_torch_func_transforms_agree_with_nn(layer):
    """They take the reference path: right, if not fast."""
    base = torch.nn.RNN if layer is FusedRNN else torch.nn.RNNCell
    ours, theirs = layer(3, 4, dtype=torch.float64), base(3, 4, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, tangent = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)

    def loss(module, x):
        result = module(x)
        return (result[0] if isinstance(result, tuple) else result).square().sum()

    results = []
    for module in (ours, theirs):
        jvp = torch.func.jvp(lambda x, m=module: loss(m, x), (x,), (tangent,))[1]
        grad = torch.func.grad(lambda x, m=module: loss(m, x))(x)
        results.append((jvp, grad))
    torch.testing.assert_close(*results)
    mapped = torch.func.vmap(lambda x: loss(ours, x))(torch.stack([x, tangent]))
    torch.testing.assert_close(mapped, torch.stack([loss(theirs, x), loss(theirs, tangent)]))


def test_the_operator_checks_for_itself():
    """Called directly, past every check in Python, it still reads nothing out of bounds."""
    x = torch.randn(5, 2, 4)
    weights = [p.detach() for p in torch.nn.RNN(4, 5).parameters()]
    good = (x, None, weights, None, "tanh", False, False)
    output, h_n = ops.rnn_forward(*good)

    def forward_with(**changes):
        names = ("input", "hx", "weights", "batch_sizes", "nonlinearity", "bidirectional")
        values = dict(zip((*names, "batch_first"), good, strict=True)) | changes
        return lambda: torch.ops.namernn_fast.rnn_forward(**values)

    def backward(grad_output, grad_h_n, output):
        wants = (True, False, True)
        return lambda: ops.rnn_backward(
            grad_output, grad_h_n, x, None, weights, output, *good[3:], *wants
        )

    for call, text in (
        (forward_with(weights=weights[:3]), "weights must hold 2 or 4 tensors for each direction"),
        (
            forward_with(weights=[weights[1]] * 4),
            r"weight_ih must have shape \(5, 4\), got \(5, 5\)",
        ),
        (forward_with(weights=[w.double() for w in weights]), "weight_ih must have the dtype of"),
        (forward_with(hx=torch.zeros(1, 3, 5)), r"hx must have shape \(1, 2, 5\), got \(1, 3, 5\)"),
        (forward_with(input=x[0]), "input must have 3 dimensions, got 2"),
        (forward_with(input=x[:0]), "Expected sequence length to be larger than 0 in RNN"),
        (forward_with(nonlinearity="gelu"), "nonlinearity must be 'tanh' or 'relu', got 'gelu'"),
        (
            forward_with(input=x[0], batch_sizes=torch.tensor([2], dtype=torch.int32)),
            "batch_sizes must be a 1-D int64 tensor on the CPU",
        ),
        (backward(output[1:], None, output), r"grad_output must have shape \(5, 2, 5\), got \(4,"),
        (backward(output, h_n[0], output), r"grad_h_n must have shape \(1, 2, 5\), got \(2, 5\)"),
        (backward(output, h_n, output[..., 1:]), r"output must have shape \(5, 2, 5\)"),
    ):
        with pytest.raises(RuntimeError, match=text):
            call()
