"""Tests the cells in docs/guides/cells.md, compared with plain loops over the papers' equations."""

import ast
import copy
import functools

import pytest
import torch
from kinds import needs_extension
from torch import exp, relu, sigmoid, tanh
from torch.nn.functional import linear

from benchmarks.cpu.equations import BLOCKS, CELLS
from namernn_fast import explain
from namernn_fast.testing import assert_within_budget

STEPS, BATCH, INPUT, HIDDEN = 9, 5, 4, 7


class Parameters:
    """The parameters of a layer, in the notation of papers.

    `w(k, x)` is W_k x + b_k, and `u(k, h)` is U_k h + b_k. Other parameters have their names.
    """

    def __init__(self, layer):
        self.of = {name.removesuffix("_l0"): p for name, p in layer.named_parameters()}

    def __getattr__(self, name):
        return self.of[name]

    def _product(self, role, block, values):
        rows = slice(block * HIDDEN, (block + 1) * HIDDEN)
        return linear(values, self.of[f"weight_{role}"][rows], self.of[f"bias_{role}"][rows])

    def w(self, block, x):
        return self._product("ih", block, x)

    def u(self, block, h):
        return self._product("hh", block, h)


def minimal_gated(p, x, h):
    f = sigmoid(p.w(0, x) + p.u(0, h))
    candidate = tanh(p.w(1, x) + f * p.u(1, h))
    return (h - f * h + f * candidate,)


def peephole_lstm(p, x, h, c):
    i = sigmoid(p.w(0, x) + p.u(0, h) + p.p_i * c)
    f = sigmoid(p.w(1, x) + p.u(1, h) + p.p_f * c)
    z = tanh(p.w(2, x) + p.u(2, h))
    c_t = z * i + c * f
    o = sigmoid(p.w(3, x) + p.u(3, h) + p.p_o * c_t)
    return tanh(c_t) * o, c_t


def coupled_lstm(p, x, h, c):
    z = tanh(p.w(1, x) + p.u(1, h))
    i = sigmoid(p.w(0, x) + p.u(0, h) + p.p_i * c)
    f = 1 - i
    c_t = z * i + c * f
    o = sigmoid(p.w(2, x) + p.u(2, h) + p.p_o * c_t)
    return tanh(c_t) * o, c_t


def light_gru(p, x, h):
    z = sigmoid(p.w(0, x) + p.u(0, h))
    candidate = relu(p.w(1, x) + p.u(1, h))
    return (z * h + (1 - z) * candidate,)


def attention_gru(p, i, h, a):
    u = sigmoid(p.w(1, i) + p.u(1, h))
    r = sigmoid(p.w(0, i) + p.u(0, h))
    candidate = tanh(p.w(2, i) + r * p.u(2, h))
    scaled = a * u
    return ((1 - scaled) * h + scaled * candidate,)


def independent_rnn(p, x, h):
    return (relu(p.w(0, x) + p.of["w"] * h),)


def min_gru(p, x, h):
    z, candidate = sigmoid(p.w(0, x)), p.w(1, x)
    return ((1 - z) * h + z * candidate,)


def update_gate_rnn(p, x, h):
    c = tanh(p.u(1, h) + p.w(1, x))
    g = sigmoid(p.u(0, h) + p.w(0, x))
    return (g * h + (1 - g) * c,)


def simple_recurrent(p, x, h, c):
    f = sigmoid(p.w(1, x) + p.v_f * c)
    c_t = f * c + (1 - f) * p.w(0, x)
    r = sigmoid(p.w(2, x) + p.v_r * c)
    return r * c_t + (1 - r) * p.w(3, x), c_t


def norm(rows, gain, shift=None, eps=1e-5, rms=False):
    centred = rows if rms else rows - rows.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt() * gain.flatten()
    return scaled if shift is None else scaled + shift.flatten()


def products(p, x, h):
    of_x = linear(x, p.of["weight_ih"], p.of["bias_ih"])
    return of_x, linear(h, p.of["weight_hh"], p.of["bias_hh"])


def benchmark_lstm(p, x, h, c):
    of_x, of_h = products(p, x, h)
    gates = norm(of_x, p.gain_ih, p.shift_ih) + norm(of_h, p.gain_hh, p.shift_hh)
    i, f, g, o = gates.chunk(4, 1)
    c = norm(sigmoid(f) * c + sigmoid(i) * tanh(g), p.gain, p.shift)
    return sigmoid(o) * tanh(c), c


def rms_norm_gru(p, x, h):
    gates = norm(sum(products(p, x, h)), p.gain, eps=1e-3, rms=True)
    reset, candidate, update = gates.chunk(3, 1)
    update = sigmoid(update - 1)
    return (update * tanh(sigmoid(reset) * candidate) + (1 - update) * h,)


def loop(step, p, sequence, *states, **inputs):
    """Returns the output and the last states of a loop over a step."""
    output = []
    for t, x in enumerate(sequence):
        states = step(p, x, *states, **{name: rows[t] for name, rows in inputs.items()})
        output.append(states[0])
    return torch.stack(output), *states


def gru_d(p, sequence, decayed, h, gap):
    """Computes GRU-D in the order of the paper, in which each step starts with the decay of h."""

    def decay(delta):
        return exp(-relu(p.of["w"] * delta + p.b))

    output = []
    for t, x in enumerate(sequence):
        h_hat = decay(gap[t - 1]) * h if t else decayed
        z = sigmoid(p.w(1, x) + p.u(1, h_hat))
        r = sigmoid(p.w(0, x) + p.u(0, h_hat))
        candidate = tanh(p.w(2, x) + r * p.u(2, h_hat))
        h = (1 - z) * h_hat + z * candidate
        output.append(decay(gap[t]) * h)
    return torch.stack(output), output[-1], h


PAPERS = {
    step.__name__: functools.partial(loop, step)
    for step in (
        minimal_gated,
        peephole_lstm,
        coupled_lstm,
        light_gru,
        attention_gru,
        independent_rnn,
        min_gru,
        update_gate_rnn,
        simple_recurrent,
        benchmark_lstm,
        rms_norm_gru,
    )
} | {"gru_d": gru_d}
"""For each cell a function of parameters, input, states and inputs that runs a plain loop."""
INPUTS = {"attention_gru": "a", "gru_d": "gap"}
"""The names of the cells' inputs. Each has one number in each row."""


def fused(layer, x, *states, **inputs):
    """Runs the layer. Returns the output and the last states, as the plain loops do."""
    hx = tuple(state[None] for state in states)
    output, last = layer(x, hx if len(hx) > 1 else hx[0], **inputs)
    return output, *(state[0] for state in (last if len(hx) > 1 else [last]))


def results(run, layer, arguments, inputs):
    """Runs a layer, and returns the results and the gradients of their weighted sum, by name."""
    dtype = layer.weight_ih_l0.dtype
    arguments = [values.to(dtype).requires_grad_() for values in arguments]
    inputs = {name: values.to(dtype).requires_grad_() for name, values in inputs.items()}
    found = run(*arguments, **inputs)
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(result.shape, generator=generator) for result in found)
    loss = sum((result * weight).sum() for result, weight in zip(found, weights, strict=True))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    wanted = [*arguments, *inputs.values(), *parameters]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    states = [f"state {k}" for k in range(len(found) - 1)]
    names = ["x", *states, *inputs, *names]
    named = dict(zip(["output", *states], found, strict=True))
    return named | {f"grad of {n}": grad for n, grad in zip(names, grads, strict=True)}


def case(name):
    """Returns a layer of the cell with random parameters, and random arguments and inputs."""
    layer = CELLS[name].layer(INPUT, HIDDEN)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    inputs = {INPUTS[name]: 2 * torch.rand(STEPS, BATCH, 1)} if name in INPUTS else {}
    states = [torch.randn(BATCH, HIDDEN) for _ in layer._cell.states]
    return layer, [torch.randn(STEPS, BATCH, INPUT), *states], inputs


def test_the_page_defines_cells_of_at_most_15_lines():
    assert CELLS.keys() == PAPERS.keys()
    functions = [
        node
        for block in BLOCKS
        for node in ast.parse(block).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert {function.name for function in functions} == CELLS.keys()
    for function in functions:
        first = min(decorator.lineno for decorator in function.decorator_list)
        assert function.end_lineno - first < 15, function.name


@needs_extension
@pytest.mark.parametrize("name", CELLS)
def test_cells_run_the_kernel(name):
    layer, (x, *_), inputs = case(name)
    assert explain(layer, x, **inputs).path.startswith("cpu ")


@pytest.mark.parametrize("name", CELLS)
def test_cells_compute_the_equations_of_the_papers(name, path):
    layer, *given = case(name)
    precise = copy.deepcopy(layer).double()
    paper = PAPERS[name]
    exact = results(functools.partial(paper, Parameters(precise)), precise, *given)
    theirs = results(functools.partial(paper, Parameters(layer)), layer, *given)
    assert_within_budget(results(functools.partial(fused, layer), layer, *given), theirs, exact)
    ours = results(functools.partial(fused, precise), precise, *given)
    assert_within_budget(ours, exact, exact)  # nothing here is more precise than float64
