"""The operators as torch sees them: opcheck, second derivatives, checks of arguments."""

import pytest
import torch
from cases import layer_of
from kinds import KINDS, flat, tensors_in
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import ops

BATCH_SIZES = torch.tensor([3, 3, 2, 1])
OFFSETS = torch.tensor([0, 4, 6, 9])
LAYOUTS = ("padded", "lengths", "packed", "jagged")


def stack_arguments(
    kind, layout, num_layers=1, bidirectional=False, batch_first=False, with_hx=True, tokens=False
):
    """Returns arguments for the forward operator of a kind of cell."""
    directions = 2 if bidirectional else 1
    layer = kind.nn_layer(
        4, 6, num_layers=num_layers, bidirectional=bidirectional, dtype=torch.float64
    )
    parameters = [p.detach() for p in layer.parameters()]
    padded = layout in ("padded", "lengths")
    x = torch.randn((5, 3, 4) if padded else (9, 4), dtype=torch.float64)
    if tokens:
        x = torch.randint(7, x.shape[:-1])
        for place in range(0, 4 * directions, 4):
            parameters[place] = torch.randn(7, kind.gates * 6, dtype=torch.float64)
    batch = 5 if batch_first and padded else 3
    shape = num_layers * directions, batch, 6
    states = tensors_in(kind.states(torch.randn, *shape, dtype=torch.float64))
    states = states if with_hx else [None] * len(states)
    sequence_layout = {
        "packed": BATCH_SIZES,
        "jagged": OFFSETS,
        "lengths": torch.arange(batch) % (3 if batch_first else 5),
    }.get(layout)
    reset = torch.rand(5, 3) < 0.3 if padded else None
    options = ops.BIAS | ops.WANT_HIDDEN
    options |= {"packed": ops.PACKED, "jagged": ops.JAGGED}.get(layout, 0)
    options |= (ops.BIDIRECTIONAL if bidirectional else 0) | (ops.BATCH_FIRST if batch_first else 0)
    return x, *states, parameters, sequence_layout, reset, options


def forward_checks(layout, with_hx):
    """Returns the tests of `opcheck` that apply to a forward pass."""
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    # Without hx the batch size of packed rows is data-dependent: opcheck cannot compare it.
    if layout != "packed" or with_hx:
        tests.append("test_aot_dispatch_dynamic")
    return tests


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_opcheck(kind, layout, batch_first, num_layers, bidirectional, with_hx, tokens):
    arguments = stack_arguments(
        kind, layout, num_layers, bidirectional, batch_first, with_hx, tokens
    )
    forward, backward = operators(kind)
    torch.library.opcheck(forward, arguments, test_utils=forward_checks(layout, with_hx))
    output, last, hidden_and_kept = results_of(kind, forward(*arguments))
    want_input, layers = not tokens, list(range(num_layers))
    # The fake kernel handles incoming and requested gradients separately: three pairs cover both.
    for grads, want in (
        ((output, *[None] * len(last)), (want_input, with_hx, layers)),
        ((None, *last), (False, False, layers[1:])),
        ((output, *last), (want_input, False, [])),
    ):
        given = (*grads, *backward_arguments(arguments, output, hidden_and_kept), *want)
        torch.library.opcheck(backward, given)


def results_of(kind, results):
    """Splits the results of a forward operator: output, the last states, hidden and kept."""
    states = 1 + kind.has_cell_state
    return results[0], results[1 : 1 + states], results[1 + states :]


def backward_arguments(arguments, output, hidden_and_kept):
    """Returns the arguments of a backward operator from input to options, given the forward's."""
    ends = next(place for place, a in enumerate(arguments) if isinstance(a, list)) + 1
    return (*arguments[:ends], output, *hidden_and_kept, *arguments[ends:])


def operators(kind):
    """Returns the operators of a kind of cell."""
    return getattr(ops, kind.forward), getattr(ops, kind.forward.replace("forward", "backward"))


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "shared"), [(False, False), (True, False), (True, True)], ids=str
)
def test_opcheck_of_the_last_state(kind, layout, tokens, shared):
    """Without an output and with shared prefixes, in inference and in training."""
    *arguments, options = stack_arguments(kind, layout, 2, with_hx=not shared, tokens=tokens)
    forward, backward = operators(kind)
    if shared:
        arguments[-1] = None  # reset
        options |= ops.SHARE_PREFIXES
    tests = forward_checks(layout, not shared)
    alone = options & ~ops.WANT_HIDDEN | ops.LAST_STATE
    torch.library.opcheck(forward, (*arguments, alone), test_utils=tests)
    output, last, hidden_and_kept = results_of(kind, forward(*arguments, alone))
    assert output.shape == (0,)
    assert not any(hidden_and_kept)
    if not shared:
        wanted = results_of(kind, forward(*arguments, options))[1]
        assert all(map(torch.equal, last, wanted))
        return
    wanted = results_of(kind, forward(*arguments, alone - ops.SHARE_PREFIXES))[1]
    torch.testing.assert_close(last, wanted)
    # The rows that sharing saves are never written, so no two runs return the same numbers.
    tests = [test for test in tests if "aot" not in test]
    torch.library.opcheck(forward, (*arguments, options, 2), test_utils=tests)
    output, last, hidden_and_kept = results_of(kind, forward(*arguments, options, 2))
    rest = backward_arguments((*arguments, options), output, hidden_and_kept)
    torch.library.opcheck(backward, (None, *last, *rest, False, False, [0, 1], 2))


@pytest.mark.covering(2)
@pytest.mark.parametrize("cell", ["tanh", "relu", "gru", "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(cell, bidirectional, packed):
    """First and second derivatives are right in float64, with respect to all inputs at once."""
    name, options = layer_of(cell)
    kind, options = KINDS[name], options | {"bidirectional": bidirectional}
    module = kind.layer(2, 3, num_layers=2, dtype=torch.float64, **options)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    shape = (9, 2) if packed else (4, 3, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    states = 4 if bidirectional else 2
    hx = kind.states(torch.randn, states, 3, 3, dtype=torch.float64, requires_grad=True)
    given = (x, *tensors_in(hx), *values)

    def run(x, *given):
        input = PackedSequence(x, BATCH_SIZES) if packed else x
        hx = given[:2] if kind.has_cell_state else given[0]
        parameters = dict(zip(names, given[-len(names) :], strict=True))
        output, *last = flat(torch.func.functional_call(module, parameters, (input, hx)))
        return output.data if packed else output, *last

    # By default gradcheck runs all its checks, undefined gradients and determinism included.
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_a_tensor_given_twice_gets_both_derivatives(kind):
    """A tensor that is both weight_ih and weight_hh gets both derivatives, second ones too."""
    square = torch.randn(kind.gates * 3, 3, dtype=torch.float64, requires_grad=True)
    module = kind.layer(3, 3, bias=False, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(w):
        tied = {"weight_ih_l0": w, "weight_hh_l0": w}
        return torch.func.functional_call(module, tied, (x,))[0]

    assert torch.autograd.gradcheck(run, square)
    assert torch.autograd.gradgradcheck(run, square)


def test_only_what_requires_a_gradient_gets_one(kind):
    module = kind.layer(4, 6)
    x = torch.randn(5, 3, 4)
    module.requires_grad_(False)
    assert not module(x)[0].requires_grad
    module.bias_hh_l0.requires_grad_(True)
    flat(module(x))[1].sum().backward()
    assert module.bias_hh_l0.grad is not None
    assert module.weight_hh_l0.grad is None
    hx = kind.states(torch.randn, 1, 3, 6, requires_grad=True)
    module.requires_grad_(False)
    module(x, hx)[0].sum().backward()
    assert all(state.grad is not None for state in tensors_in(hx))


def test_transforms_of_a_cell(kind):
    """Inside transforms a cell calls the operator of its layer, and matches torch's cell."""
    ours, theirs = (cls(3, 4, dtype=torch.float64) for cls in (kind.cell, kind.nn_cell))
    ours.load_state_dict(theirs.state_dict())
    x, tangent = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)
    jvps = (torch.func.jvp(cell, (x,), (tangent,)) for cell in (ours, theirs))
    torch.testing.assert_close(*jvps)
    torch.testing.assert_close(torch.func.jacrev(ours)(x), torch.func.jacrev(theirs)(x))


X, OUTPUT, H_N = torch.zeros(5, 2, 4), torch.zeros(5, 2, 5), torch.zeros(1, 2, 5)


def good(kind):
    """Returns arguments that the forward operator takes."""
    rows = kind.gates * 5
    weights = [torch.zeros(rows, 4), torch.zeros(rows, 5), torch.zeros(rows), torch.zeros(rows)]
    more = {"sequence_layout": None, "reset": None, "options": ops.BIAS | ops.WANT_HIDDEN}
    states = {"hx": None, "cx": None} if kind.has_cell_state else {"hx": None}
    return {"input": X, **states, "weights": weights} | more


PACKED_ROWS = {"input": X[0], "options": ops.BIAS | ops.PACKED}
JAGGED_ROWS = {"input": X[0], "options": ops.BIAS | ops.JAGGED}


def layout_of(*values, dtype=torch.int64):
    return {"sequence_layout": torch.tensor(values, dtype=dtype)}


def with_weights(change):
    """Returns a change of the weights, which depend on the kind of cell."""
    return {"weights": change}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (with_weights(lambda w: w[:3]), "weights must hold 4 tensors for each layer, got 3"),
        ({"weights": []}, "weights must hold 4 tensors for each layer, got 0"),
        (
            with_weights(lambda w: w[:3]) | {"options": ops.BIDIRECTIONAL},
            "hold 4 tensors .*, got 3",
        ),
        ({"options": 1024}, "options must be bits of namernn_fast.ops, got 1024"),
        ({"options": -1}, "options must be bits of namernn_fast.ops, got -1"),
        ({"options": ops.PACKED | ops.JAGGED}, "options must not say both packed and jagged"),
        (
            with_weights(lambda w: [w[1]] * 4),
            r"weight_ih must have shape \(ROWS, 4\), got \(ROWS, 5\)",
        ),
        (
            with_weights(lambda w: [w[0], w[1], w[2][1:], w[3]]),
            r"bias_ih must have shape \(ROWS\), got",
        ),
        (with_weights(lambda w: [one.double() for one in w]), "weight_ih must have the dtype of"),
        ({"hx": torch.zeros(1, 3, 5)}, r"hx must have shape \(1, 2, 5\), got \(1, 3, 5\)"),
        ({"input": X[0]}, "input must have 3 dimensions, got 2"),
        ({"input": X[:0]}, "Expected sequence length to be larger than 0 in RNN"),
        (layout_of(2, 3, dtype=torch.int32), "lengths must be a 1-D int64 tensor on the CPU"),
        (layout_of(2), "one length for each of the 2 sequences, got 1"),
        (layout_of(2, 6), "from 0 to 5, the steps of input, got 6 for sequence 1"),
        (layout_of(-1, 2), "from 0 to 5, .*, got -1 for sequence 0"),
        (layout_of(2) | PACKED_ROWS | {"input": X}, "input must have 2 dimensions, got 3"),
        (PACKED_ROWS, "sequence_layout must be the batch_sizes of input, got none"),
        (layout_of(2, dtype=torch.int32) | PACKED_ROWS, "batch_sizes must be a 1-D int64 tensor"),
        (JAGGED_ROWS, "sequence_layout must be the offsets of input, got none"),
        (layout_of(0, 1) | JAGGED_ROWS, "begin with 0 and end with 2, .*, got 0 and 1"),
        (layout_of(0, 3, 2) | JAGGED_ROWS, "offsets must not decrease, got 2 after 3 at 2"),
        ({"reset": torch.zeros(5, 2)}, "reset must be a bool tensor on the CPU"),
        ({"trees": -1}, "trees must not be negative, got -1"),
        ({"reset": torch.zeros(2, 5) > 0}, r"reset must have shape \(5, 2\), got \(2, 5\)"),
    ],
)
def test_the_forward_operator_checks_for_itself(kind, changes, text):
    """An operator called directly, past all checks in Python, never reads out of bounds."""
    arguments = good(kind)
    if callable(changes.get("weights")):
        changes = changes | {"weights": changes["weights"](arguments["weights"])}
    if kind.has_cell_state and "hx" in changes:
        changes = changes | {"cx": H_N}
    with pytest.raises(RuntimeError, match=text.replace("ROWS", str(kind.gates * 5))):
        operators(kind)[0](**arguments | changes)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_the_forward_operators_with_gates_have_no_relu(name):
    kind = KINDS[name]
    with pytest.raises(RuntimeError, match="options"):
        operators(kind)[0](**good(kind) | {"options": ops.BIAS | ops.RELU})


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ({"hx": H_N}, "hx and cx must be given together"),
        ({"cx": H_N}, "hx and cx must be given together"),
        ({"hx": H_N, "cx": H_N[:, 1:]}, r"cx must have shape \(1, 2, 5\), got \(1, 1, 5\)"),
        ({"hx": H_N, "cx": H_N.double()}, "cx must have the dtype of"),
    ],
)
def test_the_operators_of_lstms_check_cell_states(states, text):
    kind = KINDS["lstm"]
    arguments = good(kind)
    results = ops.lstm_forward(**arguments)
    with pytest.raises(RuntimeError, match=text):
        ops.lstm_forward(**arguments | states)
    output, last, hidden_and_kept = results_of(kind, results)
    given = tuple((arguments | states).values())
    rest = backward_arguments(given, output, hidden_and_kept)
    with pytest.raises(RuntimeError, match=text):
        ops.lstm_backward(output, *last, *rest, True, False, [0])


def test_the_forward_operators_refuse_weights_of_the_other_kind(kind):
    other = next(other for other in KINDS.values() if other is not kind)
    with pytest.raises(RuntimeError, match="must have shape"):
        operators(kind)[0](**good(kind) | {"weights": good(other)["weights"]})


@pytest.mark.parametrize(
    ("grad_output", "grad_h_n", "output", "hidden", "layers", "text"),
    [
        (OUTPUT[1:], None, OUTPUT, [], [0], r"grad_output must have shape \(5, 2, 5\), got \(4,"),
        (OUTPUT, H_N[0], OUTPUT, [], [0], r"grad_h_n must have shape \(1, 2, 5\), got \(2, 5\)"),
        (OUTPUT, H_N, OUTPUT[..., 1:], [], [0], r"output must have shape \(5, 2, 5\)"),
        (OUTPUT, H_N, OUTPUT, [X], [0], r"hidden must hold the outputs of 0 layer\(s\), got 1"),
        (OUTPUT, H_N, OUTPUT, [], [1], "want_layers must be from 0 to 0, got 1"),
    ],
)
def test_the_backward_operator_checks_for_itself(
    kind, grad_output, grad_h_n, output, hidden, layers, text
):
    blocks = ops.KEPT[kind.name]
    kept = [[torch.zeros(5, 2, blocks * 5)]] if blocks else []
    grads = grad_output, grad_h_n, *[None] * kind.has_cell_state
    rest = backward_arguments((*good(kind).values(),), output, [hidden, *kept])
    with pytest.raises(RuntimeError, match=text):
        operators(kind)[1](*grads, *rest, True, False, layers)


@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.parametrize(
    "change",
    [
        lambda kept: [],
        lambda kept: [kept[..., 5:]],
        lambda kept: [kept.double()],
        lambda kept: [kept] * 2,
    ],
    ids=["none", "too narrow", "another dtype", "too many"],
)
def test_the_backward_operator_checks_what_the_cell_kept(name, change):
    kind = KINDS[name]
    kept = change(torch.zeros(5, 2, ops.KEPT[name] * 5))
    grads = OUTPUT, H_N, *[None] * kind.has_cell_state
    rest = backward_arguments((*good(kind).values(),), OUTPUT, [[], kept])
    with pytest.raises(RuntimeError, match="kept must"):
        operators(kind)[1](*grads, *rest, True, False, [0])
