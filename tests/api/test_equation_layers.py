"""Tests layers and definitions of cells that are written as equations."""

import copy
import functools
import pickle
import re

import pytest
import torch
from equation_cells import MORE, TWINS, gru_equation, leaky_equation
from kinds import EVERY, flat, map_states, needs_extension, tensors_in
from torch.nn.utils.rnn import pack_padded_sequence

from namernn_fast import EquationLayer, explain, last_state, recurrent_cell
from namernn_fast.testing import ErrorBudget, assert_within_budget

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


def inputs_of(cell, *rows):
    """Returns an input of each kind for the cell, with rows of this shape."""
    sizes = [1 if each.is_number else 8 for each in EVERY[cell].cell.inputs]
    names = EVERY[cell].cell.input_names
    return {name: torch.randn(*rows, size) for name, size in zip(names, sizes, strict=True)}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_all_modules_compute_what_the_layer_computes(cell, dtype, path):
    """Prepared layers, streams, step modules, token layers and `apply`, of any cell."""
    kind, budget = EVERY[cell], ErrorBudget(dtype)
    layer = kind.layer(3, 8, num_layers=2, dtype=dtype).requires_grad_(False)
    precise = kind.layer(3, 8, num_layers=2, dtype=torch.float64).requires_grad_(False)
    precise.load_state_dict(layer.state_dict())
    embedding, ids = torch.randn(9, 3).to(dtype), torch.randint(9, (5, 2))
    x = embedding[ids]
    inputs = {name: value.to(dtype) for name, value in inputs_of(cell, 5, 2).items()}
    of_inputs = {name: value.double() for name, value in inputs.items()}

    def compare(what, found, given, of_precise):
        """Adds output and last states, or only the last of these, to the budget."""
        expected = flat(layer(x, **given)), flat(precise(x.double(), **of_precise))
        theirs, exact = (results[-len(found) :] for results in expected)
        for k, triple in enumerate(zip(found, theirs, exact, strict=True)):
            assert triple[0].dtype == dtype
            budget.add((what, k), *triple)

    compare("prepared", flat(layer.prepare()(x, **inputs)), inputs, of_inputs)
    stream = layer.prepare().stream(2)
    frames = [
        stream(frame, **{name: value[t] for name, value in inputs.items()})
        for t, frame in enumerate(x)
    ]
    states = [state.to(dtype) for state in tensors_in(stream.states)]
    compare("stream", (torch.stack(frames), *states), inputs, of_inputs)
    applied = kind.run(x, None, [*layer.parameters()], **inputs)
    compare("apply", flat(applied), inputs, of_inputs)
    tokens = kind.tokens(9, 3, 8, num_layers=2, dtype=dtype).requires_grad_(False)
    tokens.rnn.load_state_dict(layer.state_dict())
    tokens.embedding.weight.copy_(embedding)
    for model in (tokens, tokens.prepare()):
        compare(f"ids of a {type(model).__name__}", flat(model(ids)), {}, {})
        last = tensors_in(model.last_state(ids))
        compare(f"last state of a {type(model).__name__}", last, {}, {})
    named = {"cell": kind.passed, "embedding": embedding}
    last = tensors_in(last_state(ids, None, [*layer.parameters()], **named))
    compare("last_state", last, {}, {})
    budget.check()


def gradients(module, states):
    """Returns the gradients of a module's parameters, by the names that step modules use."""
    total = sum(state.square().sum() for state in states)
    found = torch.autograd.grad(total, [*module.parameters()])
    names = (name.removesuffix("_l0") for name, _ in module.named_parameters())
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_step_modules_compute_the_first_step_of_a_layer(cell, path, fused_steps):
    options = {"heads": 2} if EVERY[cell].cell.can_have_heads else {}
    layer, step = (make(3, 8, **options) for make in (EVERY[cell].layer, EVERY[cell].step_module))
    step.load_state_dict({n.removesuffix("_l0"): w for n, w in layer.state_dict().items()})
    x, inputs = torch.randn(1, 2, 3), inputs_of(cell, 1, 2)
    hx = EVERY[cell].states(torch.randn, 1, 2, 8)
    wanted = [*tensors_in(layer(x, hx, **inputs)[1])]
    of_step = {name: value[0] for name, value in inputs.items()}
    arguments = x[0], map_states(hx, lambda state: state[0])
    with torch.no_grad():
        for module in (step, step.prepare()):
            states = module(*arguments, **of_step)
            torch.testing.assert_close([*tensors_in(states)], [state[0] for state in wanted])
    exact = copy.deepcopy(layer).double()
    of_exact = exact(
        x.double(),
        map_states(hx, torch.Tensor.double),
        **{name: value.double() for name, value in inputs.items()},
    )
    assert_within_budget(
        gradients(step, tensors_in(step(*arguments, **of_step))),
        gradients(layer, wanted),
        gradients(exact, tensors_in(of_exact[1])),
    )
    assert "EquationCell" in repr(step)
    assert EVERY[cell].cell.name in repr(step)


@needs_extension
def test_weights_prepared_for_another_program_are_rejected():
    """Programs of the same sizes must not share weights, because that would mix two models up."""

    def plus(x, u, h):
        return torch.tanh(x[0] + u[0])

    def minus(x, u, h):
        return torch.tanh(x[0] - u[0])

    minus.__name__ = "plus"
    ours, theirs = (recurrent_cell(gates=1)(step).layer(3, 8).prepare() for step in (plus, minus))
    with pytest.raises(ValueError, match="layer must be like the prepared"):
        ours.refresh(theirs.restore())
    ours._panels.tensor = theirs._panels.tensor
    calls = (ours, torch.randn(5, 2, 3)), (ours.stream(2), torch.randn(2, 3))
    for module, x in calls:
        with torch.no_grad(), pytest.raises(RuntimeError, match="prepared must come from"):
            module(x)


@pytest.mark.parametrize("names", [["w"], ["b", "weight"], ["p", "p1", "p12"]], ids=str)
def test_parameters_whose_names_start_alike_are_drawn(names):
    """For example, `weight_ih_l0` is drawn although the cell has a parameter `w`."""

    def step(x, u, h, **own):
        return torch.tanh(x[0] + u[0] + sum(own.values()))

    cell = recurrent_cell(gates=1, parameters=dict.fromkeys(names, 0.0) | {"drawn": None})(step)
    for make in (cell.layer, cell.loop, cell.step_module, functools.partial(cell.token_layer, 9)):
        module = make(3, 16)
        own = [f"{name}{suffix}" for name in names for suffix in ("", "_l0")]
        for _ in range(2):
            for name, weight in module.named_parameters():
                if "embedding" in name:
                    continue
                if name.rpartition(".")[2] in own:
                    assert not weight.any()
                else:
                    assert weight.abs().max() <= 0.25
                    assert weight.unique().numel() == weight.numel()
                    torch.nn.init.constant_(weight, 7)
            getattr(module, "rnn", module).reset_parameters()


def test_streams_take_inputs_of_any_name():
    @recurrent_cell(gates=1, number_inputs=["dt"])
    def decaying(x, u, h, dt):
        return torch.tanh(x[0] + u[0]) * torch.exp(-dt)

    layer, x, dt = decaying.layer(3, 8, 2), torch.randn(5, 2, 3), torch.rand(5, 2, 1)
    for module in (layer, decaying.step_module(3, 8)):
        stream = module.prepare().stream(2)
        rows = torch.stack([stream(x[t], dt=dt[t]) for t in range(5)])
        assert rows.isfinite().all()
        if module is layer:
            torch.testing.assert_close(rows, layer(x, dt=dt)[0])
    with pytest.raises(TypeError, match="a stream of decaying takes no argument 'du', only dt"):
        stream(x[0], du=dt[0])
    with pytest.raises(ValueError, match="dt needs a decaying layer that reads features"):
        decaying.token_layer(9, 3, 8).prepare().stream(2)(torch.zeros(2).long(), dt=dt[0])


def test_initial_values_of_the_wrong_shape_are_rejected():
    with pytest.raises(ValueError, match=r"rate must be a number or have shape \(8,\), got shape"):
        leaky_equation.layer(3, 8, rate=torch.ones(3))


def test_a_cell_defined_in_a_function_can_be_copied_but_not_pickled():
    @recurrent_cell(gates=1)
    def inner(x, u, h):
        return torch.tanh(x[0] + u[0])

    assert copy.copy(inner) is copy.deepcopy(inner) is inner
    with pytest.raises(pickle.PicklingError, match="inner', which is inside a function"):
        pickle.dumps(inner)
    layer, x = inner.layer(3, 8), torch.randn(5, 2, 3)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x)[0], layer(x)[0])


def test_a_step_module_with_a_single_weight_is_not_taken_for_a_prepared_one(path):
    cell, x, h, c = MORE["independent_equation"], torch.randn(4, 3), *torch.randn(2, 4, 8)
    module, exact = (cell.step_module(3, 8, bias=False) for _ in range(2))
    exact.load_state_dict(module.state_dict())
    exact.double()
    wanted = exact(x.double(), (h.double(), c.double()))
    with torch.no_grad():
        results = [module(x, (h, c)), module.prepare()(x, (h, c))]
    with module.unrolled():
        results.append(module(x, (h, c)))
    for states in results:
        torch.testing.assert_close(states, wanted, check_dtype=False)


def test_a_cell_is_pickled_by_its_name():
    assert pickle.loads(pickle.dumps(gru_equation)) is gru_equation


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "step(x, h, w, a) must take (x, u, 1 state): missing a required argument: 'a'"),
        ({"parameters": {"w": 0.0}, "inputs": ["a"], "states": 2}, "must take (x, u, 2 states, w"),
        ({"parameters": ["w"]}, "parameters must be a mapping of names to initial values, got"),
        ({"inputs": "ab"}, "inputs must be a sequence of names, got the string 'ab'"),
        ({"gate_parameters": {"w": 0.0}}, "gate_parameters need gates of at least 2"),
    ],
)
def test_errors_of_definitions_name_what_a_step_must_take(options, message):
    def step(x, h, w, a):
        return torch.tanh(x[0] + w * h + a)

    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        recurrent_cell(gates=1, **options)(step)


def test_steps_cannot_multiply_by_matrices():
    matrix = torch.randn(8, 8)

    def step(x, u, h):
        return torch.tanh(x[0] + h @ matrix)

    with pytest.raises(ValueError, match="multiplies by a matrix: only weight_hh does, so scale u"):
        recurrent_cell(gates=1)(step)


def test_what_equations_do_not_support_is_an_error():
    layer = gru_equation.layer(3, 8)
    with pytest.raises(RuntimeError, match="torch has no gru_equation: trace the call"):
        torch.jit.script(layer)
    with pytest.raises(TypeError, match="a gru_equation module takes no argument 'rate'"):
        gru_equation.layer(3, 8, rate=0.5)
    with pytest.raises(TypeError, match="a call of gru_equation takes no argument 'lateral'"):
        layer(torch.randn(5, 2, 3), lateral=torch.randn(5, 2, 8))
    assert repr(layer) == "EquationLayer(gru_equation, 3, 8)"
    assert isinstance(layer, EquationLayer)
