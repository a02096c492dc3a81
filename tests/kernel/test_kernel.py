"""Tests the CPU kernel on special values, strides, 16-bit dtypes and numbers of threads."""

import copy
import functools
import itertools
import math

import numpy as np
import operators
import oracle
import pytest
import torch
from cases import CELLS, FUSED, LAYERS, layer_of
from kinds import EVERY, flat, map_states, tensors_in
from layouts import trained
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from namernn_fast import FusedRNN, ops
from namernn_fast.call.options import NONLINEARITIES
from namernn_fast.cells import VANILLA
from namernn_fast.testing import ErrorBudget

DTYPES = (torch.float32, torch.float64)
# Instruction sets that multiply bfloat16 directly, except in small batches. All others convert
# bfloat16 to float32 first.
ON_PAIRS = ("amx", "avx512_bf16")


def states_of(cell, *size):
    """Returns random states for `ops.forward`. `size` is their shape, followed by their dtype."""
    return [*tensors_in(EVERY[cell].states(torch.randn, *size[:-1], dtype=size[-1]))]


def options_of(equation):
    return ops.BIAS | NONLINEARITIES.get(equation.split()[-1], 0)


def zeroed(cell, *sizes, dtype):
    """Returns a layer with all parameters set to zero."""
    module = FUSED[cell](*sizes, dtype=dtype)
    for p in module.parameters():
        torch.nn.init.zeros_(p)
    return module


def activation(equation, dtype):
    """Returns a function that applies an activation function by running a layer.

    `equation` is "tanh" or "relu" (of a vanilla RNN), "gru" or "lstm" (the tanh of that cell),
    "sigmoid" (of a GRU's gates), or an equation of a leaky cell.
    """
    if equation.startswith("leaky"):
        options = layer_of(equation)[1] | {"rate": 1, "train_rate": False}
        module = FUSED["leaky"](1, 1, bias=False, dtype=dtype, **options)
        torch.nn.init.ones_(module.weight_ih_l0)
    elif equation in ("tanh", "relu"):
        module = FusedRNN(1, 1, nonlinearity=equation, bias=False, dtype=dtype)
        torch.nn.init.ones_(module.weight_ih_l0)
    else:
        module = zeroed("gru" if equation == "sigmoid" else equation, 1, 1, dtype=dtype)
        with torch.no_grad():
            if equation == "lstm":  # h = tanh(c_0), with i = 0, f = 1, o = 1; c_0 is the argument
                module.bias_ih_l0.copy_(torch.tensor([-math.inf, math.inf, 0.0, math.inf]))
            elif equation == "gru":  # h = n + z (h_0 - n), with z = 0
                module.weight_ih_l0[2] = 1
                module.bias_ih_l0[1] = -math.inf
            else:  # h = z, with n = 0 and h_0 = 1
                module.weight_ih_l0[1] = 1
    torch.nn.init.zeros_(module.weight_hh_l0)

    def compute(x):
        rows = x.view(1, -1, 1)
        if equation == "lstm":
            zeros = torch.zeros_like(rows)
            return module(zeros, (zeros, rows))[0].detach().view_as(x)
        hx = torch.ones_like(rows) if equation == "sigmoid" else None
        return module(rows, hx)[0].detach().view_as(x)

    return compute


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("equation", ["tanh", "relu", "gru", "lstm", "sigmoid"])
def test_activations_of_special_values_match_torch(equation, dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e4, -1e4, info.max, -info.max]
    values += [info.tiny, -info.tiny, info.smallest_normal / 4, 44.5, -44.5, 9.1, -9.1, 20.5]
    x = torch.tensor(values, dtype=dtype)
    if equation in ("gru", "sigmoid"):  # infinity times the other gates' zero weights is NaN
        x = x[~x.isinf()]
    got = activation(equation, dtype)(x)
    wanted = getattr(torch, "tanh" if equation in CELLS else equation)(x)
    assert torch.equal(got.isnan(), wanted.isnan())
    torch.testing.assert_close(got, wanted, rtol=4 * info.eps, atol=0, equal_nan=True)


TANH = ("tanh", "gru", "lstm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("equation", [*TANH, "sigmoid", "leaky sigmoid", "leaky softplus"])
def test_activations_err_by_less_than_3_ulp(equation, dtype):
    """The bound also holds for tiny results, down to twice the smallest normal number."""
    tails = torch.logspace(-30, 3, 100_001, dtype=dtype)
    x = torch.cat([tails, -tails, torch.linspace(-20, 20, 400_001, dtype=dtype)])
    compute = activation(equation, dtype)
    y = compute(x)
    exact = x.numpy().astype(np.float64 if dtype == torch.float32 else np.longdouble)
    if equation in TANH:
        exact = np.tanh(exact)
        assert torch.equal(compute(-x), -y)
    else:
        exact = oracle.sigmoid(exact) if "sigmoid" in equation else np.logaddexp(exact, 0)
        assert y.min() == 0
    error = np.abs(y.numpy() - exact)
    normal = np.abs(exact) > torch.finfo(dtype).tiny * 2
    units = error[normal] / np.spacing(np.abs(exact[normal]).astype(y.numpy().dtype))
    assert units.max() < 3
    assert error[~normal].max(initial=0) <= torch.finfo(dtype).tiny * 2
    assert y.max() == (x.max() if equation == "leaky softplus" else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_relu_of_every_16_bit_value_is_exact(dtype):
    """Only kernels that multiply bfloat16 numbers treat subnormal numbers as zero."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype)
    y = activation("relu", dtype)(x)
    wanted = torch.relu(x)
    assert torch.equal(y.isnan(), wanted.isnan())
    subnormal = (wanted != 0) & (wanted.abs() < torch.finfo(dtype).tiny)
    if ops.cpu_kernel(dtype) in ON_PAIRS:
        wanted = wanted.masked_fill(subnormal, 0)
    assert torch.equal(y[~y.isnan()], wanted[~y.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_update_gate_of_one_keeps_every_16_bit_state(dtype):
    module = zeroed("gru", 1, 1, dtype=dtype)
    with torch.no_grad():
        module.bias_hh_l0[1] = math.inf  # z = 1
    hx = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, -1, 1)
    hx = hx[hx.isfinite()].view(1, -1, 1).requires_grad_()
    _, h_n = module(torch.zeros_like(hx), hx)
    assert torch.equal(h_n, hx)
    wanted = hx.detach().clamp(-1, 1)
    (grad,) = torch.autograd.grad(h_n, hx, wanted)
    # Gradients that are subnormal in float32 become zero. No float16 is subnormal in float32.
    assert torch.equal(grad, wanted.where(wanted.abs() >= torch.finfo(torch.float32).tiny, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 100])  # weights are read in place (1) and in panels (100)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_16_bit_states_accumulate_small_steps(cell, batch, dtype):
    """If steps rounded a GRU's h or an LSTM's c to 16 bits, that state would stop at 0.25."""
    module = zeroed(cell, 1, 1, dtype=dtype)
    # The biases make z = sigmoid(6), n = 1 (GRU), or f = sigmoid(6), i = 1 - f, g = 1 (LSTM).
    biases = [0.0, 6.0, 20.0] if cell == "gru" else [-6.0, 6.0, 20.0, 0.0]
    with torch.no_grad():
        module.bias_ih_l0.copy_(torch.tensor(biases))
        last = tensors_in(module(torch.zeros(1000, batch, 1, dtype=dtype))[1])[-1]
    wanted = 1 - math.exp(1000 * math.log(1 / (1 + math.exp(-6))))
    assert (last.double() - wanted).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cell_state_can_grow_to_10000(dtype):
    """All gates are 1, so each step adds 1 to c, and the gradient of c is 1 at every step."""
    module = zeroed("lstm", 1, 3, dtype=dtype)
    torch.nn.init.constant_(module.bias_ih_l0, 800.0)  # the gates are 1 in float64 too
    states = [torch.zeros(1, 2, 3, dtype=dtype, requires_grad=True) for _ in range(2)]
    output, (_, c_n) = module(torch.zeros(10_000, 2, 1, dtype=dtype), tuple(states))
    assert torch.equal(c_n, torch.full_like(c_n, 10_000))
    assert torch.equal(output[-1], torch.ones_like(output[-1]))
    (grad_cx,) = torch.autograd.grad(c_n.sum(), states[1])
    assert torch.equal(grad_cx, torch.ones_like(grad_cx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("equation", oracle.EQUATIONS)
def test_the_16_bit_backward_pass_computes_in_float32(equation, dtype):
    """Given the same forward results, 16-bit gradients equal rounded float32 gradients."""
    cell, options = layer_of(equation)
    if ops.cpu_kernel(dtype) in ON_PAIRS and not EVERY[cell].bits & ops.PROJECTIONS:
        pytest.skip("this kernel rounds dz for its products")
    module = FUSED[cell](9, 70, bidirectional=True, dtype=dtype, **options)
    weights = [p.detach() for p in module.parameters()]
    x, states = torch.randn(6, 20, 9, dtype=dtype), states_of(cell, 2, 20, 70, dtype)
    options = options_of(equation) | ops.BIDIRECTIONAL | ops.WANT_SAVED | EVERY[cell].bits
    described, rest = EVERY[cell].cell, (None, None, options, 0)
    output, last, kept = operators.forward(described, x, states, weights, *rest)
    grads = torch.randn_like(output), [torch.randn_like(state) for state in last]
    arguments = (x, states, weights, *rest, output, kept, *grads)

    def in_float(value):
        if isinstance(value, Tensor):
            return value.float()
        return [tensor.float() for tensor in value] if isinstance(value, list) else value

    requested = [True] * (1 + len(states)), [0]
    got = operators.backward(described, *arguments, *requested)
    of_float = operators.backward(described, *map(in_float, arguments), *requested)
    for mine, exact in zip(got, of_float, strict=True):
        assert mine.dtype == dtype
        # Each direction rounds its contribution to grad_input before the two are added.
        torch.testing.assert_close(
            mine.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )


def backward_in_steps(grad_output, grad_h, x, hx, weights, output, nonlinearity):
    """Computes the backward pass of one direction with ATen operators, in the tensors' dtype."""
    weight_ih, weight_hh = weights[:2]
    grad_ih, grad_hh = torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)
    grad_bias, grad_x = torch.zeros_like(weights[2]), torch.empty_like(x)
    for t in reversed(range(len(x))):
        h = output[t]
        dz = (grad_h + grad_output[t]) * (1 - h * h if nonlinearity == "tanh" else h > 0)
        grad_ih += dz.T @ x[t]
        grad_hh += dz.T @ (output[t - 1] if t else hx)
        grad_bias += dz.sum(0)
        grad_x[t] = dz @ weight_ih
        grad_h = dz @ weight_hh
    return grad_x, grad_h, grad_ih, grad_hh, grad_bias


# (D, H, T, B): one block of rows, several blocks with an odd number of rows, and full tiles.
@pytest.mark.parametrize("shape", [(9, 70, 6, 20), (5, 200, 31, 37), (64, 256, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_the_16_bit_backward_pass_meets_the_error_budget(nonlinearity, dtype, shape):
    """All backward passes get the same output, so each relu has the same derivative in all."""
    D, H, T, B = shape  # noqa: N806 - named as in the kernels
    module = FusedRNN(D, H, nonlinearity=nonlinearity, dtype=dtype)
    weights = [p.detach() for p in module.parameters()]
    x, hx = torch.randn(T, B, D, dtype=dtype), torch.randn(1, B, H, dtype=dtype)
    call = (VANILLA.number, x, [hx], weights, None, None, options_of(nonlinearity), 0)
    output, (h_n,), _ = operators.forward(*call)
    grads = (torch.randn_like(output), [torch.randn_like(h_n)])
    grad_x, grad_hx, *grad_weights = operators.backward(
        *call, output, [], *grads, [True, True], [0]
    )
    tensors = (grads[0], grads[1][0][0], x, hx[0])
    theirs = backward_in_steps(*tensors, weights, output, nonlinearity)
    exact = backward_in_steps(
        *(t.double() for t in tensors), [w.double() for w in weights], output.double(), nonlinearity
    )
    budget = ErrorBudget(dtype)
    names = ("input", "hx", "weight_ih", "weight_hh", "bias")
    ours = (grad_x, grad_hx[0], *grad_weights[:3])
    for name, mine, baseline, reference in zip(names, ours, theirs, exact, strict=True):
        budget.add(name, mine, baseline, reference.numpy())
    budget.check()
    assert torch.equal(grad_weights[2], grad_weights[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_gradients_do_not_depend_on_other_requested_gradients(threads, cell, bidirectional, dtype):
    """The operator returns only the requested gradients, and always in the same order."""
    threads(1)  # with more threads, directions may run at once if the input needs no gradient
    module = FUSED[cell](9, 70, 2, bidirectional=bidirectional, dtype=dtype)
    weights = [p.detach() for p in module.parameters()]
    x, reset = torch.randn(6, 20, 9, dtype=dtype), torch.rand(6, 20) < 0.3
    states = states_of(cell, 2 * (1 + bidirectional), 20, 70, dtype)
    after = [] if bidirectional else states_of(cell, 6, 2, 20, 70, dtype)
    options = ops.BIAS | ops.WANT_SAVED | ops.BIDIRECTIONAL * bidirectional | EVERY[cell].bits
    call = {"cell": EVERY[cell].cell, "input": x, "states": states, "weights": weights}
    call |= {"sequence_layout": None, "reset": reset, "options": options, "trees": 0}
    output, last, saved = operators.forward(**call, reset_to=after)
    call |= {"output": output, "saved": saved, "grad_output": torch.randn_like(output)}
    call |= {"grad_last_states": [torch.randn_like(state) for state in last], "reset_to": after}
    backward = functools.partial(operators.backward, **call)
    inputs = [x, *states, *after]
    everything = backward(wanted=[True] * len(inputs), want_layers=[0, 1])
    assert [grad.shape for grad in everything] == [value.shape for value in (*inputs, *weights)]
    for wanted, layers in itertools.product(
        itertools.product((True, False), repeat=len(inputs)), ([1, 0], [1], [])
    ):
        of_weights = [k in layers for k in (0, 1) for _ in weights[::2]]
        expected = [*itertools.compress(everything, (*wanted, *of_weights))]
        some = backward(wanted=list(wanted), want_layers=layers)
        assert len(some) == len(expected)
        assert all(map(torch.equal, some, expected))


@pytest.mark.parametrize("cell", LAYERS)
def test_subnormal_gradients_become_zero(cell):
    """Flushing subnormals to zero avoids the slow subnormal arithmetic of some processors."""
    module = FUSED[cell](3, 20)
    x = torch.randn(600, 2, 3, requires_grad=True)
    tensors_in(module(x)[1])[0].sum().backward()
    size = x.grad.abs().flatten(1).amax(1)
    assert size[-1] > 1e-3
    assert size[0] == 0
    assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()
    # The call restores the caller's floating-point mode, in which subnormals are not flushed.
    assert torch.tensor(1e-40) * torch.tensor(1.0) > 0


def gradient_of_input(hidden_size, dtype, grad_output, weight):
    """Returns grad_input of a one-step relu layer: hidden_size * grad_output * weight."""
    module = FusedRNN(1, hidden_size, nonlinearity="relu", bias=False, dtype=dtype)
    torch.nn.init.constant_(module.weight_ih_l0, weight)
    x = torch.ones(1, 1, 1, dtype=dtype, requires_grad=True)
    output = module(x)[0]
    return torch.autograd.grad(output, x, torch.full_like(output, grad_output))[0].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 64, 500])
def test_subnormal_products_in_a_gradient_become_zero(hidden_size, dtype):
    """Each product is flushed before it is added, so even 500 subnormal products sum to zero."""
    tiny = torch.finfo(dtype).tiny
    gradient = functools.partial(gradient_of_input, hidden_size, dtype)
    assert gradient(15 * tiny, 1 / 16) == 0  # the products are subnormal
    assert gradient(0.75 * tiny, 64) == 0  # a factor of each product is subnormal
    assert gradient(16 * tiny, 1 / 16) == pytest.approx(
        hidden_size * tiny, rel=torch.finfo(dtype).eps, abs=0
    )


def test_subnormal_float16_gradients_are_kept():
    """The kernel computes in float32, where all subnormal numbers of float16 are normal."""
    assert gradient_of_input(8, torch.float16, 2**-24, 1) == 8 * 2**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [20, 64, 500])
@pytest.mark.parametrize("cell", LAYERS)
def test_the_error_of_vanishing_gradients_is_bounded(cell, hidden_size, dtype):
    """Flushing a term of a gradient to zero costs at most the smallest normal number.

    The bound assumes weights of at most 1 in magnitude, such as initial weights. Flushing may also
    change the rounding of later sums. Neither effect reaches gradients far above the smallest
    normal number: scaling the gradient of h_n by a power of two scales them exactly.
    """
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    module = FUSED[cell](3, hidden_size, dtype=dtype)
    x = torch.randn(300, 2, 3, dtype=dtype, requires_grad=True)
    h_n = tensors_in(module(x)[1])[0]
    terms = EVERY[cell].gates * hidden_size  # the gradient of x is a sum over units and gates
    far_above = tiny * terms / eps * 2.0**30

    def gradient(factor):
        grad_h_n = torch.full_like(h_n, far_above * 2.0**10 * factor)
        return torch.autograd.grad(h_n, x, grad_h_n, retain_graph=True)[0].double()

    factor = 2.0**40
    exact = gradient(factor) / factor
    lost = (exact - gradient(1.0)).abs()
    rounding = eps * exact.abs().amax(2, keepdim=True)  # relative to a row's largest gradient
    assert lost.max() > tiny
    assert (lost <= tiny * terms + 2 * rounding).all()
    assert lost[exact.abs() > far_above].eq(0).all()
    assert (exact.abs() > far_above).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [2, 100])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_without_features_match_layers_with_zero_input(kind, bidirectional, batch, dtype):
    """The reference layer has one input feature, which is zero in every step."""
    layer = kind.layer(1, 5, dtype=dtype, bidirectional=bidirectional)
    x = torch.zeros(100, batch, 1, dtype=dtype)
    weights = [weight.detach().clone() for weight in layer.parameters()]
    for place in range(0, len(weights), len(weights) // (1 + bidirectional)):
        weights[place] = weights[place][:, :0]
    weights = [weight.requires_grad_() for weight in weights]
    results = flat(kind.run(x[..., :0], None, weights, bidirectional=bidirectional))
    wanted = flat(layer(x))
    assert all(map(torch.equal, results, wanted))
    grads = [torch.randn_like(result) for result in wanted]
    torch.autograd.backward(results, grads)
    torch.autograd.backward(wanted, grads)
    for weight, (name, parameter) in zip(weights, layer.named_parameters(), strict=True):
        grad = parameter.grad[:, :0] if name.startswith("weight_ih") else parameter.grad
        torch.testing.assert_close(weight.grad, grad)


def check_spread(ours, theirs, x, hx=None, compare_values=True):
    """Checks that results and gradients are NaN or infinite exactly where torch's are."""
    results = []
    for module in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *tensors_in(hx))]
        states = leaves[1:] if hx is None or torch.is_tensor(hx) else [tuple(leaves[1:])]
        returned = flat(module(leaves[0], *states))
        sum(result.sum() for result in returned).backward()
        results.append([*returned, *(t.grad for t in (*leaves, *module.parameters()))])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        finite = wanted.isfinite()
        assert torch.equal(got.isfinite(), finite)
        if compare_values:
            torch.testing.assert_close(got[finite], wanted[finite])


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("equation", oracle.EQUATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("where", "with_hx"),
    [("hx", True)]
    + [
        (where, with_hx)
        for where in ("input", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "last weight")
        for with_hx in (True, False)
    ],
)
def test_non_finite_values_spread_as_in_torch(equation, value, where, with_hx, dtype):
    """Results and gradients are non-finite exactly where torch's are, and close elsewhere."""
    cell, options = layer_of(equation)
    ours, theirs = EVERY[cell].twins(5, 20, dtype=dtype, **options)
    x = torch.randn(4, 9, 5, dtype=dtype)
    hx = EVERY[cell].states(torch.randn, 1, 9, 20, dtype=dtype)
    spoiled = {"input": x, "hx": tensors_in(hx)[-1]}
    for module in (ours, theirs):
        spoiled.update(module.named_parameters())
        spoiled["last weight"] = [*module.parameters()][-1]  # bias_hh_l0 or weight_hr_l0
        with torch.no_grad():
            spoiled[where][(-1,) * spoiled[where].dim()] = value
    # In 16 bits, rounding may change the sign of a relu's argument, and so its derivative.
    check_spread(ours, theirs, x, hx if with_hx else None, compare_values=dtype == torch.float32)


@pytest.mark.covering(2)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("cell", "gate"), [("gru", 0), ("gru", 1), ("gru", 2), *(("lstm", gate) for gate in range(4))]
)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("shape", [(4, 9), (2, 1)], ids=["in panels", "in place"])
def test_non_finite_parameters_of_each_gate_spread_as_in_torch(shape, name, cell, gate, value):
    """Even without hx, the kernel multiplies weight_hh by the zero state: inf * 0 is NaN."""
    modules = EVERY[cell].twins(8, 16)
    with torch.no_grad():
        for module in modules:
            module.get_parameter(name).view(EVERY[cell].gates, 16, -1)[gate, 7, -1] = value
    check_spread(*modules, torch.randn(*shape, 8))


@pytest.mark.parametrize("t", [0, 7])
@pytest.mark.parametrize("cell", CELLS)
def test_an_infinite_gradient_of_one_hidden_unit_stays_in_that_unit(t, cell, threads):
    """The gradients of the weights and biases of all other hidden units stay finite."""
    threads(1)
    layer = FUSED[cell](3, 5)
    x, reset = torch.randn(8, 4096, 3), torch.zeros(8, 4096, dtype=torch.bool)
    reset[t, 7] = True  # keeps the gradient from reaching earlier steps
    output, _ = layer(x, reset=reset)
    grad = torch.ones_like(output)
    grad[t, 7, 2] = torch.inf
    output.backward(grad)
    # The last gate's gradient is grad_h times (1 - z)(1 - n^2) (GRU) or tanh(c) o (1 - o) (LSTM).
    last_gate = -1
    grads = [p.grad.view(EVERY[cell].gates, 5, -1) for p in layer.parameters()]
    assert torch.equal(grads[0][last_gate, 2], torch.inf * x[t, 7].sign())
    assert grads[-1][last_gate, 2] == torch.inf
    for grad in grads:
        assert not grad[:, 2].isfinite().all()
        others = torch.cat([grad[:, :2], grad[:, 3:]], 1)
        assert others.isfinite().all()
        assert (others != 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 4), (5, 1, 4), (1, 3, 4)], ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_inputs_and_states_may_be_expanded(cell, shape):
    """Expanded dimensions have stride 0. test_fuzz.py tests sliced and transposed tensors."""
    ours, theirs = EVERY[cell].twins(4, 6)
    x, states = torch.randn(shape).expand(5, 3, 4), EVERY[cell].states(torch.randn, 1, 1, 6)
    hx = map_states(states, lambda state: state.expand(1, 3, -1))
    torch.testing.assert_close(ours(x, hx), theirs(x, hx))


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 400, 9, 1), (16, 128, 20, 60), (16, 512, 130, 4)])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cell", LAYERS)
def test_results_are_bit_identical_for_any_number_of_threads(threads, cell, shape, packed, dtype):
    """In bfloat16, at most 124 of the last shape's steps are converted to float32 at once."""
    D, H, T, B = shape  # noqa: N806 - named as in the kernels
    module = FUSED[cell](D, H, dtype=dtype)
    x = torch.randn(T, B, D, dtype=dtype)
    lengths = torch.arange(B).remainder(T) + 1 if packed else None
    if packed:
        lengths[0] = T
    threads(2)
    first = trained(module, x, lengths)
    for count in (2, 1, 4, 3):
        threads(count)
        bits = trained(module, x, lengths)
        assert all(map(torch.equal, bits, trained(module, x, lengths)))
        # Each thread sums the gradients of parameters over its own sequences, so these gradients
        # are bit-identical only for the same number of threads.
        compared = len(bits) - len([*module.parameters()]) if count != 2 else len(bits)
        assert all(map(torch.equal, first[:compared], bits[:compared]))


@pytest.mark.parametrize("cell", LAYERS)
def test_gradients_are_correct_if_some_threads_finish_early(threads, cell):
    threads(8)
    ours, theirs = EVERY[cell].twins(3, 64)
    precise = copy.deepcopy(theirs).double()
    packed = pack_padded_sequence(torch.randn(300, 23, 3), [300] * 3 + [2] * 20)
    assert ops.cpu_plan(packed.batch_sizes.tolist(), 0, 64, 8).groups == 8
    for module in (ours, theirs, precise):
        module(packed.to(module.weight_ih_l0.dtype))[0].data.sum().backward()
    budget = ErrorBudget(torch.float32)
    for name, exact in precise.named_parameters():
        mine, baseline = ours.get_parameter(name), theirs.get_parameter(name)
        budget.add(name, mine.grad, baseline.grad, exact.grad.numpy())
    budget.check()
