"""Tests that a step, a Python function, becomes a program with the same results and gradients."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from random_steps import cells, compiled_or_none
from torch import sigmoid, tanh

from namernn_fast.equations.compiling import compile_step
from namernn_fast.equations.program import ARITY, Program, evaluate, execute, operands

SIZES = [(1, 2), (3, 5), (7, 130)]
EQUATIONS = {}


def equation(gates, states=1, **options):
    """Adds a step to EQUATIONS."""

    def add(step):
        name = step.__name__.strip("_")
        EQUATIONS[name] = step, {"name": name, "gates": gates, "states": states, **options}
        return step

    return add


@equation(1)
def vanilla(x, u, h):
    return tanh(x[0] + u[0])


@equation(3)
def gru(x, u, h):
    r, z = sigmoid(x[0] + u[0]), sigmoid(x[1] + u[1])
    n = tanh(x[2] + r * u[2])
    return (1 - z) * n + z * h


@equation(4, 2)
def lstm(x, u, h, c):
    i, f, g, o = (a + b for a, b in zip(x, u, strict=True))
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@equation(1, 2, own={"rate": 1}, inputs={"noise": False})
def leaky(x, u, r, v, rate, noise):
    a = sigmoid(rate)
    v = (1 - a) * v + a * (x[0] + u[0]) + noise
    return tanh(v), v


@equation(2)
def minimal_gated(x, u, h):
    f = sigmoid(x[0] + u[0])
    return f * h + (1 - f) * tanh(x[1] + f * u[1])


@equation(4, 2, own={"peephole": 4})
def peephole(x, u, h, c, peephole):
    p_i, p_f, _, p_o = peephole
    i, f = sigmoid(x[0] + u[0] + p_i * c), sigmoid(p_f * c + x[1] + u[1])
    c = f * c + i * tanh(x[2] + u[2])
    return sigmoid(x[3] + (u[3] + p_o * c)) * tanh(c), c


@equation(3, 2)
def coupled(x, u, h, c):
    f, g, o = sigmoid(x[0] + u[0]), tanh(x[1] + u[1]), sigmoid(x[2] + u[2])
    c = torch.lerp(g, c, f)
    return o * tanh(c), c


@equation(2, own={"bias": 1})
def light(x, u, h, bias):
    z = sigmoid(bias + x[0] + u[0])
    return z * h + (1 - z) * torch.relu(x[1] + u[1])


@equation(3, inputs={"attention": True})
def attention(x, u, h, attention):
    r, z = sigmoid(x[0] + u[0]), attention * sigmoid(x[1] + u[1])
    return (1 - z) * h + z * tanh(x[2] + r * u[2])


@equation(1, recurs=False, own={"w": 1})
def independent(x, h, w):
    return torch.relu(x[0] + w * h)


@equation(2, recurs=False)
def min_gru(x, h):
    z = sigmoid(x[0])
    positive = torch.where(x[1] >= 0, x[1] + 0.5, sigmoid(x[1]))
    return (1 - z) * h + z * positive


@equation(2)
def update_gate(x, u, h):
    g = sigmoid(x[0] + u[0] + 1.0)
    return g * h + (1 - g) * tanh(x[1] + u[1])


NORMS = {"gain_x": 4, "bias_x": 4, "gain_h": 4, "bias_h": 4, "gain_c": 1, "bias_c": 1}


@equation(4, 2, own=NORMS)
def layer_norm_lstm(x, u, h, c, gain_x, bias_x, gain_h, bias_h, gain_c, bias_c):
    def normed(z, gain, bias):
        z, gain, bias = (torch.cat(values, -1) for values in (z, gain, bias))
        return F.layer_norm(z, z.shape[-1:], gain, bias, 1e-3)

    sums = normed(x, gain_x, bias_x) + normed(u, gain_h, bias_h)
    f, i, o, g = sums.chunk(4, -1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(F.layer_norm(c, c.shape[-1:], gain_c, bias_c, 1e-3)), c


@equation(3)
def layer_norm_gru(x, u, h):
    sums = torch.cat([a + b for a, b in zip(x, u, strict=True)], -1)
    r, n, z = F.layer_norm(sums, sums.shape[-1:], eps=1e-3).split(h.shape[-1], -1)
    z = sigmoid(z - 1)
    return z * tanh(sigmoid(r) * n) + (1 - z) * h


@equation(1, own={"gain": 1})
def rms_norm(x, u, h, gain):
    return tanh(F.rms_norm(x[0] + u[0], h.shape[-1:], gain, 1e-3))


@equation(4, 4)
def exponential(x, u, h, c, n, m):
    """sLSTM of Beck et al., xLSTM, 2024."""
    z, i, f, o = (a + b for a, b in zip(x, u, strict=True))
    log_f = F.logsigmoid(f)
    new_m = torch.maximum(log_f + m, i)
    i, f = torch.exp(i - new_m), torch.exp(log_f + m - new_m)
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * c / n.abs().clamp(min=1.0), c, n, new_m


@equation(1, 3)
def shifted(x, u, h, first, second):
    return tanh(x[0] + u[0] + second), h, first


@equation(1, 3)
def swapped(x, u, h, first, second):
    return tanh(x[0] + u[0] + first * 0.5), second, first


@equation(2, 2)
def unused(x, u, h, c):
    return tanh(x[1] + u[1]), torch.zeros_like(c)


@equation(1, 2, inputs={"gain": True, "drive": False}, own={"bias": 1})
def detached(x, u, h, c, gain, drive, bias):
    spike = (x[0] + u[0] > 0.2).to(h.dtype)
    soft = sigmoid(4 * (x[0] + u[0] - 0.2) + bias.detach())
    with torch.no_grad():
        decay = tanh(drive) * gain
    return soft + (spike - soft).detach(), c.detach() * decay + h


@equation(1, own={"w": 1}, inputs={"gain": True})
def statistics(x, u, h, w, gain):
    z = x[0] + u[0]
    z = z * w / (w.norm() + 0.5)
    variance, mean = torch.var_mean(z, -1, keepdim=True)
    spread = z.std(-1, keepdim=True, correction=0) + gain * gain + 1
    total = z.sum(1)[:, None] / z.shape[1] ** 0.5
    return (z - mean) / (variance + 1) + spread.log() * total + F.normalize(h, dim=-1)


@equation(1, 2)
def in_place(x, u, h, c):
    z = x[0] + u[0]
    z += c
    mask = (z < 0) & ~(z < -1) | (h > 1) + (c > 1)
    return z.add(1).masked_fill_(mask, 0.5), tanh(z.view(-1, h.shape[1]) * (mask + 0.5))


@equation(1)
def arithmetic(x, u, h):
    z = x[0] + u[0]
    squares = z**2 + z**-2 + (z * z + 1) ** 0.5 + (z * z + 1) ** -0.5 + z.abs() ** 1.5 + z**3
    rest = torch.addcmul(z, z, h, value=2) + torch.addcdiv(h, z, h * h + 1) - torch.rsub(z, h)
    logs = torch.log1p(z * z) + torch.log(z * z + 1) + torch.expm1(-z * z)
    masked = torch.exp(z.masked_fill(h > 0, -torch.inf))
    both = masked + torch.logaddexp(z, h) + torch.minimum(z, h) + z.clamp(-0.5, 0.5) + torch.sign(z)
    chosen = torch.where((z > h) != (z == h), z.square().rsqrt(), 1 / (1 + torch.exp(-h)))
    return tanh(squares) + rest + logs + both + chosen - (-z).reciprocal()


ACTIVATIONS = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": lambda z: F.celu(z, 0.5),
    "selu": F.selu,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "softplus": lambda z: F.softplus(z, 2.0),
    "logsigmoid": F.logsigmoid,
    "threshold": lambda z: F.threshold(z, 0.1, -0.3),
}
for _name, _act in ACTIVATIONS.items():
    equation(1)(lambda x, u, h, act=_act: act(2 * (x[0] + u[0])) + h)
    EQUATIONS[_name] = EQUATIONS.pop("<lambda>")
    EQUATIONS[_name][1]["name"] = _name


def compiled(name):
    step, options = EQUATIONS[name]
    return compile_step(step, **options)


def drawn(program, rows, units):
    """Returns random arguments of a step, by the letters of leaves."""

    def full(count, *size):
        size = size or (rows, units)
        return [torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in range(count)]

    blocks = sum(count for _, count in program.own)
    return SimpleNamespace(
        x=full(program.gates),
        u=full(program.gates if program.has_weight_hh else 0),
        p=full(program.states),
        i=[full(1, rows, 1 if number else units)[0] for _, number in program.inputs],
        o=full(blocks, units),
        g=full(program.states),
    )


def called(step, program, leaves):
    """Returns the states that a step computes, as a list."""
    keywords = dict(zip((name for name, _ in program.inputs), leaves.i, strict=True))
    blocks = iter(leaves.o)
    for name, count in program.own:
        values = tuple(next(blocks) for _ in range(count))
        keywords[name] = values if count > 1 else values[0]
    sums = [tuple(leaves.x)] + ([tuple(leaves.u)] if leaves.u else [])
    result = step(*sums, *leaves.p, **keywords)
    return [result] if isinstance(result, torch.Tensor) else [*result]


@torch.no_grad()
def run_backward(program, leaves):
    """Returns the gradients that the backward instructions compute, by leaf."""
    given = {"p": leaves.p, "i": leaves.i, "o": leaves.o}
    sums = program.sums(leaves.x, leaves.u)
    values = operands(program, sums[0], s=sums, **given)
    execute(program.forward, values, sums[0])
    kept = [values[f"k{k}"] for k in range(program.kept - program.states + 1)]
    kept += [values[f"h{i}"] for i in range(1, program.states)]
    values = operands(program, sums[0], k=kept, y=[values["h0"]], g=leaves.g, **given)
    execute(program.backward, values, sums[0])
    fused, found = program.gates - program.separate, {}
    for g in range(program.gates):
        is_fused = g < fused
        found[f"x{g}"] = values[f"d{g + program.separate if is_fused else g - fused}"]
        if leaves.u:
            u = g + program.separate if is_fused else g - fused + program.gates
            found[f"u{g}"] = values[f"d{u}"]
    for letter, to in (("p", "q"), ("i", "j"), ("o", "w")):
        for i in range(len(vars(leaves)[letter])):
            found[f"{letter}{i}"] = values.get(f"{to}{i}", sums[0].new_zeros(()))
    shaped = {}
    for name, value in found.items():
        leaf = vars(leaves)[name[0]][int(name[1:])]
        rows = value.expand(len(sums[0]), leaf.shape[-1])
        shaped[name] = rows.sum(0) if name[0] == "o" else rows
    return shaped


def check_program(step, program, sizes=SIZES, rtol=1e-9):
    """Compares the results and gradients of a program with those of its step, in float64."""
    check_rules(program)
    assert Program.parse(program.text) == program
    for rows, units in sizes:
        leaves = drawn(program, rows, units)
        wanted = called(step, program, leaves)
        sums = program.sums(leaves.x, leaves.u)
        states = evaluate(program, sums, leaves.p, leaves.i, leaves.o)
        exact = {"rtol": rtol, "atol": 1e-11, "equal_nan": True}
        torch.testing.assert_close(states, wanted, **exact)
        gradients = gradients_of(wanted, leaves)
        torch.testing.assert_close(gradients_of(states, leaves), gradients, **exact)
        torch.testing.assert_close(run_backward(program, leaves), gradients, **exact)


def gradients_of(states, leaves):
    """Returns the gradients of all leaves, by operand."""
    named = {f"{k}{i}": t for k in "xupio" for i, t in enumerate(vars(leaves)[k])}
    used = [(state, g) for state, g in zip(states, leaves.g, strict=True) if state.requires_grad]
    outputs, cotangents = zip(*used, strict=True)
    gradients = torch.autograd.grad(
        outputs, [*named.values()], cotangents, materialize_grads=True, retain_graph=True
    )
    return dict(zip(named, gradients, strict=True))


def check_rules(program):
    """Checks what the C++ engine requires of a program."""
    assert program.gates <= 8
    assert program.gates + program.separate <= 16
    assert program.states - 1 <= program.kept <= 16
    assert len(program.constants) <= 64
    assert len(program.forward) + len(program.backward) <= 1024
    blocks = sum(count for _, count in program.own)
    numbers = {f"{c}{i}" for i, (_, number) in enumerate(program.inputs) if number for c in "ij"}
    registers = {"r": 64, "m": 64, "v": 16}
    counts = {"c": len(program.constants), "n": 1, "p": program.states, "i": len(program.inputs)}
    counts |= registers | {"o": blocks, "s": program.gates + program.separate, "y": 1}
    counts |= {"h": program.states, "g": program.states, "q": program.states, "w": blocks}
    counts |= {"j": len(program.inputs), "d": counts["s"], "k": program.kept}
    kinds = {"m": "m", "v": "v", "o": "v", "c": "c", "n": "c"}

    def kind_of(operand):
        return "m" if operand in numbers else kinds.get(operand[0], "r")

    for instructions, results, readable in (
        (program.forward, "hk", "rmvhk"),
        (program.backward, "dqjw", "rmv"),
    ):
        is_forward, written, too_late = results == "hk", Counter(), set()
        sources_of_pass = "cniop" + ("s" if is_forward else "kyg")
        for op, to, sources in instructions:
            assert ARITY[op] == len(sources)
            assert all(int(operand[1:]) < counts[operand[0]] for operand in (to, *sources))
            for source in sources:
                assert written[source] if source[0] in readable else source[0] in sources_of_pass
                assert source not in too_late
            allowed = {"r": "rmvc", "m": "mc", "v": "vc"}[kind_of(to)]
            if op in ("mean", "accumulate"):
                assert to[0] == ("m" if op == "mean" else "w")
                allowed = "rv"
            assert all(kind_of(source) in allowed for source in sources)
            written[to] += 1
            replaced = {"h": "p", "q": "g"}.get(to[0], "-")
            too_late.add(replaced + to[1:])
            if to == "h0":
                too_late |= {f"s{k}" for k in range(counts["s"])}
        own = counts | {"k": program.kept - (program.states - 1)}
        wanted = {f"{letter}{i}": 1 for letter in results for i in range(own[letter])}
        reads_h = any("p0" in i.sources for i in (*program.forward, *program.backward))
        if not is_forward and not reads_h:
            del wanted["q0"]
        assert {to: n for to, n in written.items() if to[0] in results} == wanted


@pytest.mark.parametrize("name", EQUATIONS)
def test_programs_compute_the_step_and_its_gradient(name):
    # torch's gradient of hardsigmoid contains 1/6 in float32.
    rtol = 1e-7 if name == "hardsigmoid" else 1e-9
    check_program(EQUATIONS[name][0], compiled(name), rtol=rtol)


def test_definitions_are_deterministic():
    assert compiled("layer_norm_lstm").text == compiled("layer_norm_lstm").text


@pytest.mark.parametrize(
    ("name", "separate", "kept", "forward", "backward"),
    [
        ("vanilla", 0, 0, 1, 1),
        ("gru", 1, 4, 8, 11),
        ("lstm", 0, 5, 8, 13),
        ("leaky", 0, 2, 7, 11),
        ("coupled", 0, 4, 7, 13),
        ("peephole", 0, 5, 11, 27),
        ("layer_norm_gru", 0, 6, 24, 37),
        ("relu", 0, 1, 3, 4),
    ],
)
def test_programs_are_small(name, separate, kept, forward, backward):
    program = compiled(name)
    found = program.separate, program.kept, len(program.forward), len(program.backward)
    assert found == (separate, kept, forward, backward)


WEIGHT, SCALE = torch.randn(8, 8), torch.tensor([1.0, 2.0])


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x, u, h: h @ h.mT, "mixes rows or units"),
        (
            lambda x, u, h: F.linear(h, torch.ones(h.shape[1], h.shape[1])),
            "aten.mm multiplies by a matrix: only weight_hh does, so scale u",
        ),
        (lambda x, u, h: torch.einsum("bi,bi->b", h, h)[:, None] * h, "aten.permute mixes rows"),
        (lambda x, u, h: h / h.shape[0], "depends on the number of rows"),
        (lambda x, u, h: h * h.shape[1] ** 1.5, "depends on the number of rows, on hidden_size"),
        (lambda x, u, h: h if h.shape[0] == 5 else tanh(h), "depends on the number of rows"),
        (lambda x, u, h: tanh(x[0] if len(h) == 5 else u[0]), "depends on the number of rows"),
        (
            lambda x, u, h: h * h.tolist()[0][0],
            "depends on the number of rows, on hidden_size or on",
        ),
        (lambda x, u, h: h - h.mean(0), "aten.mean combines rows"),
        (lambda x, u, h: h - h.mean(), "aten.mean combines rows"),
        (lambda x, u, h: h.flip(-1), "aten.flip is not supported"),
        (lambda x, u, h: h.cumsum(-1), "aten.cumsum mixes rows or units"),
        (lambda x, u, h: h.softmax(-1), "aten._softmax is not supported"),
        (lambda x, u, h: h[:, :1] * h, "aten.slice mixes rows or units"),
        (lambda x, u, h: h[:1] * h, "aten.slice mixes rows or units"),
        (lambda x, u, h: torch.cat([h[:, 1:], h[:, :1]], -1), "aten.slice mixes rows or units"),
        (lambda x, u, h: h + torch.rand(()), "aten.rand draws random numbers"),
        (lambda x, u, h: F.dropout(h), "aten.bernoulli_ draws random numbers"),
        (lambda x, u, h: h.add_(1), "aten.add_ changes a tensor in place"),
        (lambda x, u, h: h if h.sum() > 0 else -h, "aten.sum combines rows (to choose by a value"),
        (lambda x, u, h: h if h > 0 else -h, "is ambiguous (to choose by a value of the step, use"),
        (lambda x, u, h: x + u[0], "(x and u are tuples of gates=1 tensors)"),
        (lambda x, u, h: x[1] + h, "tuple index out of range (x and u are tuples of gates=1"),
        (
            lambda x, u, h: F.layer_norm(h, (8,)),
            "normalize over h.shape[-1:], because a step knows",
        ),
        (lambda x, u, h: F.rms_norm(h, (8,)), "units: sizes must come from shapes)"),
        (lambda x, u, h: h if (h.mean(-1, True) > 0) else -h, "Boolean value of Tensor"),
        (lambda x, u, h: h * h.mean(-1, True).item(), "cannot be converted to Scalar"),
        (lambda x, u, h: h * SCALE, "reads a tensor that is not an argument: declare a parameter"),
        (lambda x, u, h: h * WEIGHT[0, 0].requires_grad_(), "that is not an argument"),
        (lambda x, u, h: h.double(), "aten._to_copy changes the dtype"),
        (lambda x, u, h: h * (h > 0).sum(-1, True), "aten.sum returns torch.int64"),
        (lambda x, u, h: F.gelu(h), 'aten.gelu is not supported: use approximate="tanh"'),
        (lambda x, u, h: h**0.3, "aten.pow is not supported: powers other than"),
        (lambda x, u, h: torch.div(h, x[0], rounding_mode="floor"), "aten.div is not supported"),
        (lambda x, u, h: Rounded.apply(h), "must not use autograd Functions"),
        (lambda x, u, h: h * torch.eye(h.shape[1])[0], "declare a parameter"),
        (lambda x, u, h: torch.erf(h), "aten.erf is not supported"),
        (lambda x, u, h: torch.heaviside(h, h), "aten.heaviside is not supported"),
    ],
)
def test_rejected_operations_are_named_with_their_line(step, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        compile_step(step, name="rejected", gates=1, states=1)
    if "Function" not in message and "gradient" not in str(raised.value):
        assert re.match(r"test_tracing.py:\d+: `.*lambda x, u, h: ", str(raised.value))


@pytest.mark.parametrize(
    ("options", "step", "message"),
    [
        ({"gates": 9}, gru, "the number of gates must be between 1 and 8, got 9"),
        ({"states": 5}, gru, "the number of states must be between 1 and 4, got 5"),
        ({"name": "1st"}, gru, "a name must be an identifier"),
        ({"own": {"w": 2}}, gru, "the number of blocks of w must be"),
        ({"states": 2}, lambda x, u, h, c: h, "the step must return 2 tensors"),
        ({}, lambda x, u, h: (h, h), "the step must return 1 tensor (rows"),
        ({}, lambda x, u, h: h.mean(-1, True), "the step must return 1 tensor (rows"),
        ({}, lambda x, u, h: None, "the step must return 1 tensor (rows"),
        (
            {"gates": 8},
            lambda x, u, h: sum(tanh(a) * tanh(b) for a, b in zip(x, u, strict=True)) * x[0],
            "the number of kept values must be between 0 and 16, got 17",
        ),
        (
            {},
            lambda x, u, h: sum(h * (0.5 + i) + tanh(h * i) for i in range(40)),
            "the number of constants must be between 0 and 64",
        ),
        (
            {},
            lambda x, u, h: sum(torch.exp(h.mean(-1, True) * i).log1p() for i in range(80)) * h,
            "registers",
        ),
    ],
)
def test_errors_of_definitions(options, step, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compile_step(step, **({"name": "wrong", "gates": 1, "states": 1} | options))


@pytest.mark.parametrize(
    "number",
    [
        lambda h: 0.1 if h.shape[-1] > 64 else 1.0,
        lambda h: min(h.shape[-1], 64),
        lambda h: max(h.shape[-1], 64),
        lambda h: h.shape[-1] // 2,
        lambda h: 2.0 if h.shape[0] == 1 else 1.0,
    ],
)
def test_numbers_that_only_fit_the_traced_sizes_are_rejected(number):
    with pytest.raises(
        ValueError, match="depends on the number of rows, on hidden_size or on values"
    ):
        compile_step(lambda x, u, h: tanh(x[0] + u[0]) * number(h), name="f", gates=1, states=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("forward 8", "forward 9"),
        lambda text: text.replace("sigmoid k1 s1", "sigmoid k1 s1 s2"),
        lambda text: text.replace("sigmoid", "sigmund"),
        lambda text: text.replace("end", ""),
        lambda text: text + "end",
    ],
)
def test_malformed_texts_are_rejected(change):
    with pytest.raises(ValueError, match="program"):
        Program.parse(change(compiled("gru").text))


def test_texts_of_other_versions_are_rejected_by_their_version():
    text = compiled("gru").text.replace("equation 1", "equation 2")
    message = "program must be of version 1, got version 2: it was written by another version"
    with pytest.raises(ValueError, match=message):
        Program.parse(text)


@given(cells())
def test_random_steps(cell):
    step, options = cell
    program = compiled_or_none(step, options)
    if program is not None:
        check_program(step, program, [(3, 5)])
