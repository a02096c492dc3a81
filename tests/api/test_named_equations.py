"""Tests of layers that are equations of the package, against loops as their authors write them.

The shared suites test these cells as well; see `equation_cells`.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from kinds import tensors_in

from namernn_fast import (
    FusedLayerNormGRU,
    FusedLayerNormGRUCell,
    FusedLayerNormLSTM,
    FusedSLSTM,
    TokenLayerNormGRU,
    TokenSLSTM,
    explain,
    slstm,
)
from namernn_fast.testing import assert_within_budget

T, B, D, H = 23, 5, 6, 32
drawn = torch.randn


def norm(rows, gain, shift=None, eps=1e-5):
    shift = None if shift is None else shift.flatten()
    return F.layer_norm(rows, rows.shape[-1:], gain.flatten(), shift, eps)


def lstm_of_ba(p, x, states):
    """The LSTM of Ba et al.; torch's benchmark LayerNormLSTMCell also carries the norm of c."""
    h, c = states
    gates = norm(x @ p["weight_ih_l0"].T, p["gain_ih_l0"])
    gates = gates + norm(h @ p["weight_hh_l0"].T, p["gain_hh_l0"], p["shift_l0"])
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * norm(c, p["gain_c_l0"], p["shift_c_l0"]).tanh(), c


def gru_of_dreamer(p, x, states):
    """The GRU of DreamerV2 and V3, with a single matrix for x and h."""
    (h,) = states
    weight = torch.cat([p["weight_ih_l0"], p["weight_hh_l0"]], 1)
    parts = norm(torch.cat([x, h], 1) @ weight.T, p["gain_l0"], p["shift_l0"], 1e-3)
    reset, candidate, update = parts.chunk(3, 1)
    candidate, update = torch.tanh(reset.sigmoid() * candidate), torch.sigmoid(update - 1)
    return (update * candidate + (1 - update) * h,)


def slstm_step(raw, states, floor):
    """The pointwise part of an sLSTM: of flashrnn with the floor 1, of xlstm with 0."""
    _, c, n, m = states
    i, f, z, o = raw
    forgotten = F.logsigmoid(f) + m
    m = i if bool((n == 0).all()) else torch.maximum(i, forgotten)
    i, f = torch.exp(i - m), torch.exp(forgotten - m)
    c = f * c + i * z.tanh()
    n = (f * n + i).clamp(min=floor)
    return o.sigmoid() * c / n, c, n, m


def products(h, weight, heads):
    """Returns the block-diagonal product of h, (batch, gates, hidden)."""
    blocks = weight.view(-1, heads, weight.shape[1], weight.shape[1])
    return torch.einsum("bhp,ghdp->bghd", h.view(len(h), heads, -1), blocks).flatten(2)


def slstm_loop(floor):
    def step(p, x, states):
        raw = (x @ p["weight_ih_l0"].T + p["bias_ih_l0"] + p["bias_hh_l0"]).view(len(x), 4, -1)
        heads = states[0].shape[1] // p["weight_hh_l0"].shape[1]
        raw = raw + products(states[0], p["weight_hh_l0"], heads)
        return slstm_step(raw.unbind(1), states, floor)

    return step


ORIGINALS = {
    "ba": (lambda: FusedLayerNormLSTM(D, H, bias=False), lstm_of_ba),
    "dreamer": (lambda: FusedLayerNormGRU(D, H, bias=False, eps=1e-3), gru_of_dreamer),
    "flashrnn": (lambda: FusedSLSTM(D, H, heads=4), slstm_loop(1.0)),
    "xlstm": (lambda: FusedSLSTM(D, H, heads=2), slstm_loop(0.0)),
}


def randomized(layer):
    """Moves gains and shifts away from their initial values."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("gain", "shift")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def results(run, parameters, x, gradient):
    """Returns the output, the last states and all gradients of `run(parameters, x)`."""
    x = x.detach().requires_grad_()
    for parameter in parameters.values():
        parameter.grad = None
    output, states = run(parameters, x)
    (output * gradient).sum().backward()
    found = {"output": output.detach(), "x": x.grad}
    found |= {f"state {k}": s.detach() for k, s in enumerate(states)}
    return found | {name: p.grad for name, p in parameters.items()}


def loop_of(step, number):
    """Returns a function that runs a step over a sequence."""

    def run(parameters, x):
        states, outputs = [x.new_zeros(x.shape[1], H) for _ in range(number)], []
        for row in x:
            states = step(parameters, row, states)
            outputs.append(states[0])
        return torch.stack(outputs), [state[None] for state in states]

    return run


@pytest.mark.parametrize("name", ORIGINALS)
def test_layers_equal_the_loops_of_their_authors(name):
    make, step = ORIGINALS[name]
    torch.manual_seed(0)
    layer = randomized(make())
    x, gradient = drawn(T, B, D), drawn(T, B, H)
    assert explain(layer, x).path.startswith("cpu ")

    def run_layer(_, x):
        output, states = layer(x)
        return output, tensors_in(states)

    parameters = dict(layer.named_parameters())
    ours = results(run_layer, parameters, x, gradient)
    loop = loop_of(step, len(layer._cell.states))
    theirs = results(loop, parameters, x, gradient)
    precise = dict(copy.deepcopy(layer).double().named_parameters())
    exact = results(loop, precise, x.double(), gradient.double())
    assert ours.keys() == theirs.keys()
    assert_within_budget(ours, theirs, exact)


@pytest.mark.parametrize("with_states", [False, True])
def test_slstm_takes_sums_as_flashrnn_does(with_states):
    heads, size = 4, H // 4
    sums, recurrent = drawn(B, T, 4, heads, size), 0.3 * drawn(4, heads, size, size)
    b, gradient = drawn(4, heads, size), drawn(B, T, heads, size)
    states = drawn(4, B, 1, heads, size) if with_states else None
    if with_states:
        states[2].abs_().add_(1)  # n is at least 1 after any step

    def run_ours(p, x):
        output, last = slstm(x, p["R"], p["b"], states, recurrent_shape="HPGD", bias_shape="HGD")
        return output, last

    def run_loop(p, x):
        initial = x.new_zeros(4, B, H) if states is None else states.to(x.dtype).flatten(2)
        last, outputs = [*initial], []
        weight = p["R"].permute(2, 0, 3, 1).reshape(4 * H, size)
        for row in x.unbind(1):
            raw = row.flatten(2) + products(last[0], weight, heads)
            raw = raw + p["b"].transpose(0, 1).flatten(1)
            last = slstm_step(raw.unbind(1), last, 1.0)
            outputs.append(last[0])
        output = torch.stack(outputs, 1).unflatten(2, (heads, size))
        return output, torch.stack([*last]).view(4, B, 1, heads, size)

    def parameters(dtype):
        both = {"R": recurrent.permute(1, 3, 0, 2), "b": b.transpose(0, 1)}
        return {name: p.to(dtype, copy=True).requires_grad_() for name, p in both.items()}

    ours = results(run_ours, parameters(torch.float32), sums, gradient)
    theirs = results(run_loop, parameters(torch.float32), sums, gradient)
    exact = results(run_loop, parameters(torch.float64), sums.double(), gradient.double())
    assert_within_budget(ours, theirs, exact)


def test_slstm_rejects_wrong_shapes():
    sums, recurrent, b = drawn(2, 3, 4, 2, 8), drawn(4, 2, 8, 8), drawn(4, 2, 8)
    for arguments, error in (
        (
            (sums[:, :, :3], recurrent, b),
            r"Wx must be \(batch, steps, 4, heads, D\), got \(2, 3, 3, 2, 8\)",
        ),
        ((sums, recurrent[:, :1], b), r"R must be \(4, 2, 8, 8\) to match Wx, got \(4, 1, 8, 8\)"),
        ((sums, recurrent, b[:1]), r"b must be \(4, 2, 8\) to match Wx"),
        ((sums, recurrent, b, drawn(4, 2, 2, 8)), r"states must be \(4, 2, 1, 2, 8\) to match Wx"),
    ):
        with pytest.raises(ValueError, match=error):
            slstm(*arguments)
    with pytest.raises(ValueError, match="recurrent_shape must be an order of the letters GHDP"):
        slstm(sums, recurrent, b, recurrent_shape="GHD")


@pytest.mark.parametrize("size", [-100.0, -30.0, 0.0, 30.0, 100.0])
@pytest.mark.parametrize("gate", ["i", "f"])
def test_the_stabiliser_keeps_extreme_gates_finite(gate, size):
    """Of float32, exp(-100) is subnormal and exp(100) infinite."""
    layer = FusedSLSTM(D, H)
    with torch.no_grad():
        layer.bias_ih_l0.view(4, H)["if".index(gate)] += size
    output, states = layer(drawn(T, B, D))
    output.sum().backward()
    for values in (output, *states, *(p.grad for p in layer.parameters())):
        assert values.isfinite().all()
    assert output.abs().max() <= 1


@pytest.mark.parametrize("make", [FusedLayerNormLSTM, FusedLayerNormGRU])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_norms_of_equal_tiny_and_huge_sums_are_finite(make, scale):
    """Sums of zeros have equal values in a row; squares of 1e15 are finite in float32."""
    layer = make(D, H, bias=False)
    output, _ = layer(drawn(T, B, D) * scale)
    output.sum().backward()
    assert all(
        values.isfinite().all() for values in (output, *(p.grad for p in layer.parameters()))
    )


def test_a_norm_of_one_unit_in_one_gate_is_zero():
    output, (_, c_n) = FusedLayerNormLSTM(D, 1)(drawn(T, B, D))
    assert not output.any()  # the norm of a single c
    assert c_n.isfinite().all()


def test_options_errors_and_copies():
    assert repr(FusedLayerNormGRU(4, 8, bias=False)) == "FusedLayerNormGRU(4, 8, bias=False)"
    assert FusedLayerNormGRU(4, 8, train_gain=False).gain_l0.requires_grad is False
    assert FusedLayerNormGRUCell(4, 8, gain=2.0).gain[0, 0] == 2
    assert TokenSLSTM(7, 4, 8, heads=2).rnn.weight_hh_l0.shape == (32, 4)
    for make in (FusedLayerNormGRU, FusedLayerNormGRUCell):
        with pytest.raises(TypeError, match="takes no argument 'cell', only gain, shift"):
            make(4, 8, cell=None)
    for module in (FusedSLSTM(4, 8, heads=2), TokenLayerNormGRU(7, 4, 8, eps=1e-3)):
        x = drawn(3, 2, 4) if isinstance(module, FusedSLSTM) else torch.tensor([[1, 2]])
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(copied(x)[0], module(x)[0])
        prepared = module.prepare()
        precise = copy.deepcopy(module).double()
        with torch.no_grad():
            exact = precise(x.double() if x.is_floating_point() else x)[0]
            found, expected = prepared(x)[0], module(x)[0]
        assert_within_budget({"output": found}, {"output": expected}, {"output": exact})
        assert type(prepared.restore()) is type(module)
