"""Tests that calls with invalid or extreme arguments never crash."""

import itertools
import sys

import mutated
import operators
import pytest
import torch
from kinds import KINDS, flat, needs_extension, tensors_in
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import last_state, ops, prepared_ops
from namernn_fast.cells import NUMBERED

pytestmark = needs_extension
CELL = KINDS["gru"].cell
LAST_CELL = len(NUMBERED) - 1
SIZES = [1, 4, 5, 0, 5, 1]
WEIGHTS = [torch.zeros(15, 4), torch.zeros(15, 5), torch.zeros(15), torch.zeros(15)]


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads the memory size of its process from /proc"
)
@pytest.mark.parametrize(
    ("first", "count"), [(0, 500), pytest.param(500, 4500, marks=pytest.mark.slow)]
)
def test_calls_with_one_changed_argument_do_not_crash(first, count):
    """To run more calls and see their errors, run `python tests/mutated.py`."""
    outcomes, faults = mutated.run(first, count)
    assert not faults, "\n".join(faults)
    assert outcomes.total() == count
    assert outcomes["accepted"] < count / 2


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("input", lambda none: ops.forward(2, none, WEIGHTS, None, None, ops.BIAS, 0)),
        ("prepared", lambda none: prepared_ops.step(2, none, (), WEIGHTS[0], None, (), ops.BIAS)),
        ("input", lambda none: prepared_ops.step(2, WEIGHTS[0], (), none, None, (), ops.BIAS)),
        ("prepared", lambda none: prepared_ops.refresh(none, 2, WEIGHTS, SIZES, ops.BIAS)),
    ],
)
def test_none_for_a_required_tensor_is_named(name, call):
    with pytest.raises(RuntimeError, match=f"{name} must be a Tensor, got None"):
        call(None)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([2**62 + 1, *SIZES[1:]], "no memory for weights of shape"),
        ([2**40, *SIZES[1:]], "no memory for weights of shape|weights must hold"),
        ([1, 2**62, 2**62, 0, 2**62, 1], "no memory for a weight of shape"),
        ([1, 0, 5, 2**62, 5, 1], "no memory for a table of shape"),
        (
            [1, 2**18, 5, 7, 5, 1],
            "a stack with a vocabulary must have an input_size of 0, got 262144",
        ),
        ([*SIZES[:5], 5], "a GRU cell with hidden_size 5 cannot have 5 heads"),
        ([-1, *SIZES[1:]], "sizes must be num_layers, .*, got"),
    ],
    ids=str,
)
def test_wrong_sizes_of_prepared_weights_are_rejected(sizes, text):
    """Sizes are rejected even if the header of the packed weights holds the same wrong sizes."""
    number = CELL.number
    prepared = prepared_ops.prepare(number, WEIGHTS, SIZES, ops.BIAS)
    layers, *others = sizes
    header = prepared.view(torch.uint8)[32:112].view(torch.int64)
    assert header.tolist()[:9] == [number, 1, 1, 4, 4, 5, 0, 5, 1]
    header[1], header[4:9] = layers, torch.tensor(others)
    vocabulary = sizes[3]
    ids, states = torch.zeros(2, 3, dtype=torch.int64), [torch.zeros(1, 3, 5)]
    frame = ids if vocabulary else torch.zeros(2, 3, 4)
    for call in (
        lambda: prepared_ops.prepare(number, WEIGHTS, sizes, ops.BIAS),
        lambda: prepared_ops.refresh(prepared, number, WEIGHTS, sizes, ops.BIAS),
        lambda: prepared_ops.unpack(prepared, number, sizes, ops.BIAS),
        lambda: operators.forward_prepared(
            *(number, frame, (), prepared, sizes, None, None, ops.BIAS, 0)
        ),
    ):
        with pytest.raises(RuntimeError, match=f"{text}|prepared must come from"):
            call()
    output = torch.empty(2, 3, 5)
    with pytest.raises(RuntimeError, match="prepared must come from"):
        prepared_ops.step(number, prepared, states, frame, None, (), ops.BIAS)
    step = [prepared], states, None, frame, output, None, ops.BIAS, number, None, None, None
    with pytest.raises(RuntimeError, match="prepared must come from"):
        prepared_ops.step_directly(*step)


def direct_step(**changes):
    """Calls `step_directly` with valid arguments, except for those in `changes`."""
    state = torch.zeros(2, 5)
    call = {"weights": WEIGHTS, "states": [state], "last": [state.clone()]}
    call |= {"frame": torch.zeros(2, 4), "output": None, "rows": None}
    call |= {"options": ops.BIAS, "cell": CELL.number, "inputs": None, "program": None}
    call |= {"saved": None} | changes
    return prepared_ops.step_directly(*call.values())


def test_direct_steps_reject_invalid_options_and_cells():
    assert direct_step()
    with pytest.raises(RuntimeError, match="must not set INT8 without prepared weights"):
        direct_step(options=ops.BIAS | ops.INT8)
    for cell in (-1, LAST_CELL + 1, 2**32 + CELL.number):
        with pytest.raises(
            RuntimeError, match=f"cell must be between 0 and {LAST_CELL}, got {cell}"
        ):
            direct_step(cell=cell)


def test_steps_reject_extra_inputs_of_the_wrong_shape_or_dtype():
    for kind in KINDS.values():
        panels = kind.layer(4, 5).requires_grad_(False).prepare()._panels
        states, frame = [torch.zeros(1, 2, 5) for _ in kind.cell.states], torch.zeros(2, 4)
        number, options = kind.cell.number, panels.options
        for inputs in ([torch.zeros(2, 4)], [torch.zeros(2, 5).double()], [torch.zeros(2, 5)] * 2):
            with pytest.raises(RuntimeError, match=r"must have (shape|the dtype)|must hold"):
                prepared_ops.step(number, panels.tensor, states, frame, None, inputs, options)


def test_direct_steps_accept_rows_only_as_a_list_of_integers():
    class Number:
        def __index__(self):
            raise AssertionError("a direct step must not call Python code")

    assert not direct_step(rows=[Number(), 1])
    with pytest.raises(TypeError, match=r"rows must be a list of integers or None, got \(0, 1\)"):
        direct_step(rows=(0, 1))


def weights_without_units(kind, features, num_layers, directions):
    """Returns the weights, which require gradients, of a stack of layers with hidden_size 0."""
    biases = [(0,)] * (2 + len(kind.cell.own))
    sizes = itertools.chain([features], [0] * (num_layers - 1))
    shapes = [((0, size), (0, 0), *biases) for size in sizes for _ in range(directions)]
    return [torch.empty(shape, requires_grad=True) for shape in itertools.chain(*shapes)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("features", [0, 3])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layout", ["padded", "lengths", "packed", "jagged", "reset"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_layers_with_hidden_size_0_return_empty_tensors(
    kind, features, num_layers, bidirectional, layout, tokens, with_hx
):
    """torch's own functions also return empty tensors for hidden_size 0."""
    directions = 2 if bidirectional else 1
    weights = weights_without_units(kind, features, num_layers, directions)
    rows = torch.randn(8 if layout in ("packed", "jagged") else 10, features, requires_grad=True)
    more, leaves = {"bidirectional": bidirectional}, [rows, *weights]
    x = rows
    if tokens:
        x, more["embedding"] = torch.randint(8, (len(rows),)), rows
    if layout == "packed":
        x = PackedSequence(x, torch.tensor([2, 2, 2, 1, 1]))
    elif layout == "jagged":
        x = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 5, 8]))
    else:
        x = x.unflatten(0, (5, 2))
        more |= {"lengths": {"lengths": [5, 3]}, "reset": {"reset": torch.rand(5, 2) < 0.5}}.get(
            layout, {}
        )
    shape = num_layers * directions, 2, 0
    hx = kind.states(torch.zeros, *shape, requires_grad=True) if with_hx else None
    output, *last = flat(kind.run(x, hx, weights, **more))
    output = output.data if layout == "packed" else output
    output = output.values() if layout == "jagged" else output
    assert output.shape == (*((5, 2) if rows.shape[0] == 10 else (8,)), 0)
    assert [state.shape for state in last] == [shape] * len(kind.cell.states)
    for gradient in torch.autograd.grad((output.sum(), *(state.sum() for state in last)), leaves):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_modules_with_hidden_size_0_return_empty_tensors(kind, dtype):
    module = kind.step_module(3, 0, dtype=dtype).requires_grad_(False)
    x = torch.randn(2, 3).to(dtype)
    for hx in (None, kind.states(torch.zeros, 2, 0, dtype=dtype)):
        assert all(state.shape == (2, 0) for state in tensors_in(module(x, hx)))


def test_sharing_prefixes_with_hidden_size_0_returns_empty_tensors(kind):
    weights, embedding = weights_without_units(kind, 3, 2, 1), torch.randn(7, 3, requires_grad=True)
    ids, more = torch.randint(2, (5, 9)), {"cell": kind.passed, "share_prefixes": True}
    results = tensors_in(last_state(ids, None, weights, embedding=embedding, **more))
    assert all(state.shape == (2, 9, 0) for state in results)
    assert not torch.autograd.grad([state.sum() for state in results], embedding)[0].any()
