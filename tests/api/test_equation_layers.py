"""Tests layers and definitions of cells that are written as equations."""

import copy
import pickle

import pytest
import torch
from equation_cells import MORE, TWINS, gru_equation, leaky_equation
from kinds import EVERY, needs_extension
from torch.nn.utils.rnn import pack_padded_sequence

from namernn_fast import EquationLayer, explain, recurrent_cell

CELLS = [*TWINS, *MORE]


@needs_extension
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_layout_runs_the_kernel(cell, dtype):
    layer = EVERY[cell].layer(3, 8, num_layers=2, bidirectional=True, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    calls = (x, {}), (x, {"lengths": [5, 3]}), (pack_padded_sequence(x, [5, 3]), {})
    for input, more in (*calls, (x, {"reset": torch.zeros(5, 2, dtype=torch.bool)})):
        assert explain(layer, input, **more).path.startswith("cpu ")


@pytest.mark.parametrize("cell", CELLS)
def test_copies_and_pickles_compute_the_same(cell, path):
    layer, x = EVERY[cell].layer(3, 8), torch.randn(5, 2, 3)
    wanted = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), wanted, rtol=0, atol=0)
        assert [*other.state_dict()] == [*layer.state_dict()]
        other.reset_parameters()
        for parameter in layer._cell.own:
            name = f"{parameter.name}_l0"
            assert torch.equal(other.get_parameter(name), layer.get_parameter(name))


def test_initial_values_of_parameters_can_be_chosen():
    kept, chosen = leaky_equation.layer(3, 8), leaky_equation.layer(3, 8, rate=0.25)
    assert torch.equal(kept.rate_l0, torch.full((8,), 0.5))
    assert kept.rate_l0.requires_grad
    assert torch.equal(chosen.rate_l0, torch.full((8,), 0.25))
    values = torch.linspace(0, 1, 8)
    fixed = leaky_equation.layer(3, 8, rate=values, train_rate=False)
    assert torch.equal(fixed.rate_l0, values)
    assert not fixed.rate_l0.requires_grad


def test_a_definition_is_traced_once():
    scale = 2.0

    @recurrent_cell(gates=1)
    def scaled(x, u, h):
        return torch.tanh(x[0] + u[0]) * scale

    layer, x = scaled.layer(3, 8), torch.randn(5, 2, 3)
    wanted, program, scale = layer(x)[0], scaled.program, 3.0
    assert torch.equal(layer(x)[0], wanted)

    @recurrent_cell(gates=1)
    def scaled(x, u, h):
        return torch.tanh(x[0] + u[0]) * 2.0

    assert scaled.program == program
    assert torch.equal(scaled([x], [x], x), torch.tanh(x + x) * 2)


@pytest.mark.parametrize(
    "name", ["cell", "hx", "reset", "dropout", "weight_ih", "train_rate", "a b"]
)
def test_names_that_layers_use_are_rejected(name):
    with pytest.raises(ValueError, match="a parameter or an input must not be called"):
        recurrent_cell(gates=1, parameters={name: 0.0})
    with pytest.raises(ValueError, match="a parameter or an input must not be called"):
        recurrent_cell(gates=1, inputs=[name])


def test_what_equations_do_not_support_is_an_error():
    layer = gru_equation.layer(3, 8)
    with pytest.raises(RuntimeError, match="prepared layers do not support the cells of equations"):
        layer.prepare()
    with pytest.raises(RuntimeError, match="TorchScript cannot compile a gru_equation"):
        torch.jit.script(layer)
    with pytest.raises(TypeError, match="a gru_equation layer takes no argument 'rate'"):
        gru_equation.layer(3, 8, rate=0.5)
    with pytest.raises(TypeError, match="a call of a gru_equation takes no argument 'lateral'"):
        layer(torch.randn(5, 2, 3), lateral=torch.randn(5, 2, 8))
    assert repr(layer) == "EquationLayer(gru_equation, 3, 8)"
    assert isinstance(layer, EquationLayer)
