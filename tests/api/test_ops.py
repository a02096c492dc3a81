"""Tests the operators directly: opcheck, second derivatives and argument checks."""

import operators
import oracle
import pytest
import torch
from cases import layer_of
from kinds import EVERY, KINDS, VARIANTS, flat, for_variants, tensors_in
from layouts import check_derivatives
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from namernn_fast import ops
from namernn_fast.cells import NUMBERED

BATCH_SIZES = torch.tensor([3, 3, 2, 1])
OFFSETS = torch.tensor([0, 4, 6, 9])
LAYOUTS = ("padded", "lengths", "packed", "jagged")


def stack_arguments(
    kind, layout, num_layers=1, bidirectional=False, batch_first=False, with_hx=True, tokens=False
):
    """Returns all arguments of the forward operator except `trees`, for a stack of layers."""
    directions = 2 if bidirectional else 1
    layer = kind.nn_layer(4, 6, num_layers, bidirectional=bidirectional, dtype=torch.float64)
    parameters = [p.detach() for p in layer.parameters()]
    padded = layout in ("padded", "lengths")
    x = torch.randn((5, 3, 4) if padded else (9, 4), dtype=torch.float64)
    if tokens:
        x = torch.randint(7, x.shape[:-1])
        per_direction = len(parameters) // (num_layers * directions)
        for place in range(0, per_direction * directions, per_direction):
            parameters[place] = torch.randn(7, kind.gates * 6, dtype=torch.float64)
    batch = 5 if batch_first and padded else 3
    layers = num_layers * directions
    states = [*tensors_in(kind.states(torch.randn, layers, batch, 6, dtype=torch.float64))]
    states = states if with_hx else []
    sequence_layout = {
        "packed": BATCH_SIZES,
        "jagged": OFFSETS,
        "lengths": torch.arange(batch) % (3 if batch_first else 5),
    }.get(layout)
    reset = torch.rand(5, 3) < 0.3 if padded else None
    options = ops.BIAS | ops.WANT_SAVED | kind.bits
    options |= {"packed": ops.PACKED, "jagged": ops.JAGGED}.get(layout, 0)
    options |= (ops.BIDIRECTIONAL if bidirectional else 0) | (ops.BATCH_FIRST if batch_first else 0)
    return kind.cell, x, states, parameters, sequence_layout, reset, options


SCHEMAS = """
backward(int cell, Tensor input, Tensor[] tensors, Tensor? sequence_layout, Tensor? reset, \
int options, int trees, Tensor output, Tensor[] saved, Tensor? grad_output, \
Tensor?[] grad_last_states, bool[] wanted, int[] want_layers, \
str? program=None) -> Tensor[] gradients
checked_rows(Tensor rows, int sequences) -> Tensor
cpu_kernel(str numbers) -> str
forward(int cell, Tensor input, Tensor[] tensors, Tensor? sequence_layout, Tensor? reset, \
int options, int trees, str? program=None) -> (Tensor output, Tensor[] last_states, Tensor[] saved)
forward_prepared(int cell, Tensor input, Tensor[] tensors, int[] sizes, Tensor? sequence_layout, \
Tensor? reset, int options, int trees, str? program=None) -> (Tensor output, Tensor[] last_states)
prepare(int cell, Tensor[] weights, int[] sizes, int options, str? program=None) -> Tensor
refresh(Tensor(a!) prepared, int cell, Tensor[] weights, int[] sizes, int options, \
str? program=None) -> ()
step(int cell, Tensor prepared, Tensor(a!)[] states, Tensor input, Tensor? rows, Tensor[] inputs, \
int options, str? program=None) -> Tensor
unpack(Tensor prepared, int cell, int[] sizes, int options, str? program=None) -> Tensor[]
"""
"""The operators as first released, which programs exported then contain."""


@pytest.mark.parametrize("line", SCHEMAS.split("\n")[1:-1], ids=lambda line: line.partition("(")[0])
def test_schemas_only_gain_arguments_with_defaults(line):
    pinned = torch._C.parse_schema(f"namernn_fast::{line}")
    now = getattr(torch.ops.namernn_fast, pinned.name.partition("::")[2]).default._schema
    assert now.is_backward_compatible_with(pinned)


OPTIONS = """RELU BIAS BIDIRECTIONAL BATCH_FIRST PACKED JAGGED BATCH_INVARIANT WANT_SAVED LAST_STATE
SHARE_PREFIXES MEDIUM_PRECISION HIGH_PRECISION INT8 PROJECTIONS SIGMOID SOFTPLUS STATES RESET_TO
INPUTS SUMS FOR_BACKWARD"""


def test_option_bits_and_cells_keep_their_numbers():
    assert [getattr(ops, name) for name in OPTIONS.split()] == [1 << k for k in range(21)]
    assert [cell.name for cell in NUMBERED[:4]] == ["rnn", "gru", "lstm", "leaky"]


def forward_checks(layout, with_hx):
    """Returns the tests of `opcheck` that apply to a forward pass."""
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    # Without hx the batch size of packed rows is data-dependent, and opcheck cannot compare it.
    if layout != "packed" or with_hx:
        tests.append("test_aot_dispatch_dynamic")
    return tests


@pytest.mark.covering(0)
@for_variants
@pytest.mark.parametrize(
    ("layout", "batch_first"),
    [("padded", False), ("padded", True), ("lengths", True), ("packed", False), ("jagged", False)],
)
@pytest.mark.parametrize(("num_layers", "bidirectional"), [(1, True), (2, False)])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_operators_pass_opcheck(
    kind, layout, batch_first, num_layers, bidirectional, with_hx, tokens
):
    arguments = stack_arguments(
        kind,
        layout,
        num_layers=num_layers,
        bidirectional=bidirectional,
        batch_first=batch_first,
        with_hx=with_hx,
        tokens=tokens,
    )
    arguments = (*arguments, 0)
    tests = forward_checks(layout, with_hx)
    torch.library.opcheck(ops.forward, operators.arguments(*arguments), test_utils=tests)
    output, last, saved = operators.forward(*arguments)
    want_input, layers = not tokens, list(range(num_layers))
    states = [with_hx] * len(last) if with_hx else []
    # Three cases are enough, because the fake kernel handles `grads` and `wanted` independently.
    for grads, wanted in (
        ((output, [None] * len(last)), ([want_input, *states], layers)),
        ((None, last), ([False] * (1 + len(states)), layers[1:])),
        ((output, last), ([want_input, *[False] * len(states)], [])),
    ):
        call = operators.backward_arguments(*arguments, output, saved, *grads, *wanted)
        torch.library.opcheck(ops.backward, call)


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "shared"), [(False, False), (True, False), (True, True)], ids=str
)
def test_last_state_and_shared_prefixes_pass_opcheck(kind, layout, tokens, shared):
    """opcheck passes for inference without an output, and for training with shared prefixes."""
    *arguments, options = stack_arguments(kind, layout, 2, with_hx=not shared, tokens=tokens)
    if shared:
        arguments[-1] = None  # removes reset
        options |= ops.SHARE_PREFIXES
    tests = forward_checks(layout, not shared)
    alone = options & ~ops.WANT_SAVED | ops.LAST_STATE
    torch.library.opcheck(ops.forward, operators.arguments(*arguments, alone, 0), test_utils=tests)
    output, last, saved = operators.forward(*arguments, alone, 0)
    assert output.shape == (0,)
    assert not saved
    if not shared:
        assert all(map(torch.equal, last, operators.forward(*arguments, options, 0)[1]))
        return
    wanted = operators.forward(*arguments, alone - ops.SHARE_PREFIXES, 0)[1]
    torch.testing.assert_close(last, wanted)
    # Sharing leaves the rows that it skips uninitialized, so runs differ and the aot test fails.
    tests = [test for test in tests if "aot" not in test]
    call = operators.arguments(*arguments, options, 2)
    torch.library.opcheck(ops.forward, call, test_utils=tests)
    output, last, saved = operators.forward(*arguments, options, 2)
    rest = output, saved, None, last, [False], [0, 1]
    torch.library.opcheck(ops.backward, operators.backward_arguments(*arguments, options, 2, *rest))


@pytest.mark.covering(0)
@pytest.mark.parametrize("cell", oracle.EQUATIONS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_first_and_second_derivatives_are_correct(cell, bidirectional, packed, resets):
    """Checks derivatives in float64, with respect to all inputs at once."""
    name, options = layer_of(cell)
    kind, options = EVERY[name], options | {"bidirectional": bidirectional}
    module = kind.layer(2, 3, num_layers=2, dtype=torch.float64, **options)
    leaf, steps = {"dtype": torch.float64, "requires_grad": True}, 4
    x = torch.randn((9, 2) if packed else (steps, 3, 2), **leaf)
    hx = kind.states(torch.randn, 4 if bidirectional else 2, 3, 3, **leaf)
    reset, after = torch.rand(steps, 3) < 0.4 if resets else None, {}
    if resets and not bidirectional:
        after["reset_to"] = kind.states(torch.randn, steps, 2, 3, 3, **leaf)
    leaves, spec = tree_flatten((x, hx, after, dict(module.named_parameters())))

    def run(*leaves):
        x, hx, after, parameters = tree_unflatten(leaves, spec)
        call = PackedSequence(x, BATCH_SIZES) if packed else x, hx
        more = {"reset": reset, **after}
        output, *last = flat(torch.func.functional_call(module, parameters, call, more))
        return output.data if packed else output, *last

    check_derivatives(run, leaves)


def test_tied_weights_have_correct_derivatives(kind):
    """First and second derivatives are correct if one tensor is both weight_ih and weight_hh."""
    square = torch.randn(kind.gates * 3, 3, dtype=torch.float64, requires_grad=True)
    module = kind.layer(3, 3, bias=False, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(w):
        tied = {"weight_ih_l0": w, "weight_hh_l0": w}
        return torch.func.functional_call(module, tied, (x,))[:1]

    check_derivatives(run, [square])


@pytest.mark.usefixtures("fused_steps")
def test_derivatives_of_a_step_are_correct(kind):
    """Inside transforms a step module calls its layer's operator, and matches torch's cell."""
    ours = kind.step_module(3, 4, dtype=torch.float64)
    theirs = kind.nn_step_module(3, 4, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, tangent = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)
    jvps = (torch.func.jvp(cell, (x,), (tangent,)) for cell in (ours, theirs))
    torch.testing.assert_close(*jvps)
    hx = kind.states(torch.randn, 5, 4, dtype=torch.float64)
    leaves, spec = tree_flatten((x, hx, dict(ours.named_parameters())))

    def run(*leaves):
        x, hx, parameters = tree_unflatten(leaves, spec)
        return tensors_in(torch.func.functional_call(ours, parameters, (x, hx)))

    check_derivatives(run, [leaf.detach().requires_grad_() for leaf in leaves])


X, OUTPUT, H_N = torch.zeros(5, 2, 4), torch.zeros(5, 2, 5), torch.zeros(1, 2, 5)


def weights_of(kind):
    """Returns valid weights of one layer."""
    rows = kind.gates * 5
    last = [torch.zeros(5) for _ in kind.cell.own]
    return [torch.zeros(rows, 4), torch.zeros(rows, 5), torch.zeros(rows), torch.zeros(rows), *last]


def states_of(kind):
    """Returns valid states of one layer."""
    return [H_N] * len(kind.cell.states)


def good(kind):
    """Returns valid arguments of the forward operator."""
    call = {"cell": kind.cell, "input": X, "states": [], "weights": weights_of(kind)}
    rows = {"sequence_layout": None, "reset": None}
    rows |= {"options": ops.BIAS | ops.WANT_SAVED | kind.bits, "trees": 0}
    return call | rows | {"reset_to": [], "inputs": []}


def changed(kind, arguments, changes):
    """Returns a changed copy of the arguments. Functions in `changes` are called with the kind."""
    values = {name: value(kind) if callable(value) else value for name, value in changes.items()}
    return arguments | values


PACKED_ROWS = {"input": X[0], "options": ops.BIAS | ops.PACKED}
RESETS = {"reset": torch.ones(5, 2) > 0}
JAGGED_ROWS = {"input": X[0], "options": ops.BIAS | ops.JAGGED}


def layout_of(*values, dtype=torch.int64):
    return {"sequence_layout": torch.tensor(values, dtype=dtype)}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weights": lambda kind: weights_of(kind)[:3]}, "hold . tensors for each layer, got 3"),
        ({"weights": []}, "weights must hold . tensors for each layer, got 0"),
        (
            {"weights": lambda kind: weights_of(kind)[:3], "options": ops.BIDIRECTIONAL},
            "hold . tensors .*, got 3",
        ),
        ({"options": 2**21}, "options must be bits of namernn_fast.ops, got"),
        ({"options": -1}, "options must be bits of namernn_fast.ops, got -1"),
        ({"options": ops.PACKED | ops.JAGGED}, "options must not say both packed and jagged"),
        (
            {"options": ops.MEDIUM_PRECISION | ops.HIGH_PRECISION},
            "options must not set both MEDIUM_PRECISION and HIGH_PRECISION",
        ),
        (
            {"weights": lambda kind: weights_of(kind)[1:2] * len(weights_of(kind))},
            r"weight_ih must have shape \(ROWS, 4\), got \(ROWS, 5\)",
        ),
        (
            {"weights": lambda kind: [w[1:] if w.dim() == 1 else w for w in weights_of(kind)]},
            r"bias_ih must have shape \(ROWS\), got",
        ),
        (
            {"weights": lambda kind: [w.double() for w in weights_of(kind)]},
            "weight_ih must have the dtype of",
        ),
        (
            {"states": lambda kind: [torch.zeros(1, 3, 5), *states_of(kind)[1:]]},
            r"hx must have shape \(1, 2, 5\), got \(1, 3, 5\)",
        ),
        ({"cell": -1}, "cell must be between 0 and ., got -1"),
        ({"cell": len(NUMBERED)}, f"cell must be between 0 and ., got {len(NUMBERED)}"),
        ({"input": X[0]}, "input must have 3 dimensions, got 2"),
        ({"input": X[:0]}, "Expected sequence length to be larger than 0 in RNN"),
        (layout_of(2, 3, dtype=torch.int32), "lengths must be a 1-D int64 tensor on the CPU"),
        (layout_of(2), "one length for each of the 2 sequences, got 1"),
        (layout_of(2, 6), r"between 0 and 5 \(the steps in input\), got 6 for sequence 1"),
        (layout_of(-1, 2), "between 0 and 5 .*, got -1 for sequence 0"),
        (layout_of(2) | PACKED_ROWS | {"input": X}, "input must have 2 dimensions, got 3"),
        (PACKED_ROWS, "sequence_layout must be the batch_sizes of input, got none"),
        (layout_of(2, dtype=torch.int32) | PACKED_ROWS, "batch_sizes must be a 1-D int64 tensor"),
        (JAGGED_ROWS, "sequence_layout must be the offsets of input, got none"),
        (layout_of(0, 1) | JAGGED_ROWS, "start with 0 and end with 2 .*, got 0 and 1"),
        (layout_of(0, 3, 2) | JAGGED_ROWS, "offsets must not decrease, got 2 after 3 at index 2"),
        ({"reset": torch.zeros(5, 2)}, "reset must be a bool tensor on the CPU"),
        ({"trees": -1}, "trees must not be negative, got -1"),
        ({"reset": torch.zeros(2, 5) > 0}, r"reset must have shape \(5, 2\), got \(2, 5\)"),
        ({"reset_to": states_of}, "reset_to needs reset, got none"),
        (
            RESETS | {"reset_to": states_of},
            r"reset_to must have shape \(5, 1, 2, 5\), got \(1, 2, 5\)",
        ),
        (
            RESETS
            | {"weights": lambda kind: weights_of(kind) * 2, "reset_to": states_of}
            | {"options": ops.BIAS | ops.BIDIRECTIONAL},
            "reset_to takes one direction, got 2",
        ),
    ],
)
def test_the_forward_operator_rejects_invalid_arguments(kind, changes, text):
    """Without Python's checks, a direct call of the operator must not read out of bounds."""
    arguments = changed(kind, good(kind), changes)
    arguments["options"] |= kind.bits
    with pytest.raises(RuntimeError, match=text.replace("ROWS", str(kind.gates * 5))):
        operators.forward(**arguments)


def test_relu_is_rejected_for_cells_with_a_fixed_nonlinearity(kind):
    arguments = good(kind) | {"options": ops.BIAS | ops.RELU | kind.bits}
    if kind.has_nonlinearity:
        operators.forward(**arguments)
        return
    with pytest.raises(RuntimeError, match="options must not set this nonlinearity"):
        operators.forward(**arguments)


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ([H_N, H_N[:, 1:]], r"cx must have shape \(1, 2, 5\), got \(1, 1, 5\)"),
        ([H_N, H_N.double()], "cx must have the dtype of"),
    ],
)
def test_the_operators_reject_invalid_cell_states(states, text):
    arguments = good(KINDS["lstm"])
    output, last, saved = operators.forward(**arguments)
    arguments["states"] = states
    with pytest.raises(RuntimeError, match=text):
        operators.forward(**arguments)
    results = {"output": output, "saved": saved, "grad_output": output}
    results |= {"grad_last_states": last, "wanted": [True, False, False], "want_layers": [0]}
    with pytest.raises(RuntimeError, match=text):
        operators.backward(**arguments | results)


def test_the_forward_operator_rejects_weights_of_another_cell(kind):
    other = next(other for other in KINDS.values() if other is not kind)
    with pytest.raises(RuntimeError, match=r"must have shape|weights must hold 5 tensors"):
        operators.forward(**good(kind) | {"weights": good(other)["weights"]})


def backward_arguments(kind):
    """Returns valid arguments of the backward operator."""
    arguments = good(kind)
    output, last, saved = operators.forward(**arguments)
    results = {"output": output, "saved": saved, "grad_output": output, "grad_last_states": last}
    return arguments | results | {"wanted": [True], "want_layers": [0]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grad_output": OUTPUT[1:]}, r"grad_output must have shape \(5, 2, 5\), got \(4,"),
        (
            {"grad_last_states": lambda kind: [H_N[0], *[H_N] * kind.has_cell_state]},
            r"grad_h_n must have shape \(1, 2, 5\), got \(2, 5\)",
        ),
        ({"grad_last_states": [H_N, H_N, None]}, r"last_states must hold . gradient\(s\), got 3"),
        ({"output": OUTPUT[..., 1:]}, r"output must have shape \(5, 2, 5\)"),
        ({"saved": [X] * 3}, r"saved must hold . tensor\(s\), got 3"),
        ({"wanted": [True, True]}, r"wanted must say .* input and each of 0 .*, got 2 values"),
        ({"wanted": []}, r"wanted must say .* input and each of 0 .*, got 0 values"),
        ({"want_layers": [1]}, "want_layers must be between 0 and 0, got 1"),
        ({"options": ops.BIAS | ops.LAST_STATE | 2**21}, "options must be bits of"),
    ],
)
def test_the_backward_operator_rejects_invalid_arguments(kind, changes, text):
    with pytest.raises(RuntimeError, match=text):
        operators.backward(**changed(kind, backward_arguments(kind), changes))


def test_the_backward_operator_rejects_gradients_of_ids(kind):
    arguments = backward_arguments(kind)
    arguments["input"] = torch.zeros(5, 2, dtype=torch.int64)
    arguments["weights"][0] = torch.zeros(7, kind.gates * 5)
    with pytest.raises(RuntimeError, match="wanted must not ask for the gradient of token ids"):
        operators.backward(**arguments)
    assert len(operators.backward(**arguments | {"wanted": [False]})) == len(arguments["weights"])


def test_the_operators_reject_invalid_projections():
    number, x, states, weights, _, _, options = stack_arguments(VARIANTS["projected"], "padded")
    weight_ih, weight_hh, *biases, weight_hr = weights
    for call, text in (
        ((KINDS["gru"].cell, x, states[:1], weights), "PROJECTIONS for the GRU cell"),
        ((number, x, states[::-1], weights), r"hx must have shape \(1, 3, 3\), got \(1, 3, 6\)"),
        (
            (number, x, states, [weight_ih, weight_hh, *biases, weight_hr.T]),
            r"weight_hr must have shape \(3, 6\), got \(6, 3\)",
        ),
        (
            (number, x, states, [weight_ih, weight_hh[:, :0], *biases, weight_hr]),
            "the size of h must be between 1 and 5, got 0",
        ),
    ):
        with pytest.raises(RuntimeError, match=text):
            operators.forward(*call, None, None, options, 0)
    with pytest.raises(RuntimeError, match="must not set INT8 without prepared"):
        operators.forward(number, x, states, weights, None, None, options | ops.INT8, 0)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.cell.kept], ids=lambda kind: kind.name
)
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
def test_the_backward_operator_rejects_invalid_saved_tensors(kind, change):
    arguments = backward_arguments(kind)
    arguments["saved"] = change(arguments["saved"][0])
    with pytest.raises(RuntimeError, match=r"saved must hold|what a layer keeps in saved must"):
        operators.backward(**arguments)
