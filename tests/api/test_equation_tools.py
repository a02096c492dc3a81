"""Tests what surrounds layers of equations: loops to compare with, replacements, checks."""

import copy

import pytest
import torch
from equation_cells import MORE, TWINS, gru_equation, leaky_equation, rnn_equation
from kinds import EVERY
from torch import nn

from namernn_fast import EquationCell, EquationLayer, recurrent_cell, replace_rnn
from namernn_fast.testing import BudgetError, check_cell

CELLS = {name: cell for name, (cell, _) in TWINS.items()} | MORE


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_loop_over_the_function_computes_what_the_layer_computes(cell, options):
    more = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64} | options
    more |= {"heads": 2} if CELLS[cell]._cell.can_have_heads else {}
    loop, layer = CELLS[cell].loop(3, 8, **more), CELLS[cell].layer(3, 8, **more)
    layer.load_state_dict(loop.state_dict())
    x, hx = torch.randn(5, 4, 3).double(), EVERY[cell].states(torch.randn, 4, 4, 8)
    if options.get("batch_first"):
        hx = EVERY[cell].states(torch.randn, 4, 5, 8)
    hx = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
    inputs = {
        each.name: torch.randn(5, 4, count * each.features(8)).double()
        for each, count in zip(CELLS[cell]._cell.inputs, (1, 4), strict=False)
    }
    torch.testing.assert_close(loop(x, hx, **inputs), layer(x, hx, **inputs))
    torch.testing.assert_close(loop(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cells_pass_the_check_against_their_function(cell, dtype):
    check_cell(CELLS[cell], dtype=dtype, **({"heads": 2} if cell == "everything" else {}))


def test_the_check_finds_layers_that_compute_something_else(monkeypatch):
    """A function differs from its program once a variable that it reads changes."""
    scale = 1.0

    @recurrent_cell(gates=1)
    def scaled(x, u, h):
        return torch.tanh(x[0] + u[0]) * scale

    check_cell(scaled)
    scale = 1.0001
    with pytest.raises(BudgetError, match=r"output: error .* exceeds its budget"):
        check_cell(scaled)
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got t"):
        check_cell(scaled, dtype=torch.float64)


class Loop(nn.Module):
    """A GRU as users write it: weights in one matrix, and a loop over steps."""

    def __init__(self, features, hidden, batch_first=False):
        super().__init__()
        self.both, self.batch_first = nn.Linear(features + hidden, 3 * hidden), batch_first


class Step(nn.GRUCell):
    """A user's class for one step."""


def weights_of(loop):
    matrix, bias = loop.both.weight, loop.both.bias
    hidden = len(bias) // 3
    of_x, of_h = matrix.split([matrix.shape[1] - hidden, hidden], 1)
    weights = {"weight_ih_l0": of_x, "weight_hh_l0": of_h}
    return weights | {"bias_ih_l0": bias, "bias_hh_l0": torch.zeros_like(bias)}


REPLACEMENTS = {
    Loop: (gru_equation, weights_of),
    Step: (gru_equation, lambda step: dict(step.named_parameters())),
}


def test_modules_of_users_are_replaced_with_modules_of_equations():
    model = nn.ModuleList([Loop(3, 8, True), Step(3, 8), nn.ModuleList([Step(3, 8)]), nn.GRU(3, 8)])
    model.append(model[0])
    before, wanted = copy.deepcopy(model), model[1](torch.ones(2, 3))
    trained = [*model[1].parameters()]
    model.eval()
    assert replace_rnn(model, REPLACEMENTS) is model
    layer, step, (nested,), untouched, again = model
    assert again is layer
    assert [type(each) for each in (layer, step, nested)] == [EquationLayer, *[EquationCell] * 2]
    assert type(untouched) is nn.GRU
    assert layer.batch_first
    assert not layer.training
    torch.testing.assert_close(step(torch.ones(2, 3)), wanted)
    assert all(new is old for new, old in zip(step.parameters(), trained, strict=True))
    matrix = torch.cat([layer.weight_ih_l0, layer.weight_hh_l0], 1)
    torch.testing.assert_close(matrix, before[0].both.weight)
    assert all(weight.requires_grad for weight in layer.parameters())
    alone = replace_rnn(Loop(3, 8), REPLACEMENTS)
    assert isinstance(alone, EquationLayer)
    alone(torch.randn(5, 2, 3))[0].sum().backward()


def test_layers_directions_and_own_parameters_are_taken_from_the_names():
    source = leaky_equation.layer(3, 8, 2, bidirectional=True, bias=False, rate=0.25)
    found = replace_rnn(
        nn.ModuleList([source]), {EquationLayer: (leaky_equation, lambda m: m.state_dict())}
    )[0]
    assert found is not source
    assert repr(found) == repr(source)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(found(x), source(x))


def test_replacements_that_cannot_work_leave_the_model_unchanged():
    model = nn.ModuleList([Step(3, 8), Loop(3, 8)])
    wrong = {**REPLACEMENTS, Loop: (rnn_equation, weights_of)}
    text = r"replace_rnn cannot replace 1, a Loop: it does not fit <recurrent cell rnn"
    with pytest.raises(ValueError, match=text):
        replace_rnn(model, wrong)
    with pytest.raises(
        ValueError,
        match=r"weight_ih_l0 of a layer, or weight_ih of a step, is missing, got both \(24, 11\)",
    ):
        replace_rnn(model, {Loop: (gru_equation, lambda m: {"both": m.both.weight})})
    del model[1].batch_first
    with pytest.raises(ValueError, match="the layout of its input is unknown: add options"):
        replace_rnn(model, REPLACEMENTS)
    options = {"batch_first": True, "batch_invariant": True}
    layer = replace_rnn(model[1], {Loop: (gru_equation, weights_of, options)})
    assert layer.batch_first
    assert layer.batch_invariant
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="replace_rnn cannot replace 0, a Step: it has hooks"):
        replace_rnn(model, REPLACEMENTS)
    assert [type(each) for each in model] == [Step, Loop]
    with pytest.warns(UserWarning, match=r"replaced nothing: the Linear has none of Loop, Step"):
        replace_rnn(nn.Linear(1, 1), REPLACEMENTS)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        replace_rnn(3, REPLACEMENTS)
