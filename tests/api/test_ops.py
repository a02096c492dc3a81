"""The operators as torch sees them: opcheck, second derivatives, checks of arguments."""

import pytest
import torch
from cases import every_other, one_in
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedRNN, FusedRNNCell, ops

BATCH_SIZES = torch.tensor([3, 3, 2, 1])
OFFSETS = torch.tensor([0, 4, 6, 9])
LAYOUTS = ("padded", "lengths", "packed", "jagged")


def stack_arguments(
    layout, num_layers=1, bidirectional=False, batch_first=False, with_hx=True, tokens=False
):
    """Returns arguments for `rnn_forward`."""
    directions = 2 if bidirectional else 1
    layer = torch.nn.RNN(
        4, 6, num_layers=num_layers, bidirectional=bidirectional, dtype=torch.float64
    )
    parameters = [p.detach() for p in layer.parameters()]
    padded = layout in ("padded", "lengths")
    x = torch.randn((5, 3, 4) if padded else (9, 4), dtype=torch.float64)
    if tokens:
        x = torch.randint(7, x.shape[:-1])
        for place in range(0, 4 * directions, 4):
            parameters[place] = torch.randn(7, 6, dtype=torch.float64)
    batch = 5 if batch_first and padded else 3
    hx = torch.randn(num_layers * directions, batch, 6, dtype=torch.float64) if with_hx else None
    sequence_layout = {
        "packed": BATCH_SIZES,
        "jagged": OFFSETS,
        "lengths": torch.arange(batch) % (3 if batch_first else 5),
    }.get(layout)
    reset = torch.rand(5, 3) < 0.3 if padded else None
    options = ops.BIAS | ops.WANT_HIDDEN
    options |= {"packed": ops.PACKED, "jagged": ops.JAGGED}.get(layout, 0)
    options |= (ops.BIDIRECTIONAL if bidirectional else 0) | (ops.BATCH_FIRST if batch_first else 0)
    return x, hx, parameters, sequence_layout, reset, options


def forward_checks(layout, with_hx):
    """Returns the tests of `opcheck` that apply to a forward pass."""
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    # Without hx the batch size of packed rows is data-dependent: opcheck cannot compare it.
    if layout != "packed" or with_hx:
        tests.append("test_aot_dispatch_dynamic")
    return tests


@pytest.mark.parametrize(
    ("layout", "batch_first", "num_layers", "bidirectional", "with_hx", "tokens"),
    [
        *one_in(4, LAYOUTS, (False, True), (1, 2), (False, True), (False, True), (False,)),
        *every_other(LAYOUTS, (True,), (2,), (False, True), (False, True), (True,)),
    ],
)
def test_opcheck(layout, batch_first, num_layers, bidirectional, with_hx, tokens):
    arguments = stack_arguments(layout, num_layers, bidirectional, batch_first, with_hx, tokens)
    torch.library.opcheck(ops.rnn_forward, arguments, test_utils=forward_checks(layout, with_hx))
    output, h_n, hidden = ops.rnn_forward(*arguments)
    want_input, layers = not tokens, list(range(num_layers))
    # The fake kernel handles incoming and requested gradients separately: three pairs cover both.
    for grads, want in (
        ((output, None), (want_input, with_hx, layers)),
        ((None, h_n), (False, False, layers[1:])),
        ((output, h_n), (want_input, False, [])),
    ):
        torch.library.opcheck(
            ops.rnn_backward, (*grads, *arguments[:3], output, hidden, *arguments[3:], *want)
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "shared"), [(False, False), (True, False), (True, True)], ids=str
)
def test_opcheck_of_the_last_state(layout, tokens, shared):
    """Without an output and with shared prefixes, in inference and in training."""
    *arguments, options = stack_arguments(layout, 2, with_hx=not shared, tokens=tokens)
    if shared:
        arguments[-1] = None  # reset
        options |= ops.SHARE_PREFIXES
    tests = forward_checks(layout, not shared)
    alone = options & ~ops.WANT_HIDDEN | ops.LAST_STATE
    torch.library.opcheck(ops.rnn_forward, (*arguments, alone), test_utils=tests)
    output, h_n, hidden = ops.rnn_forward(*arguments, alone)
    assert output.shape == (0,)
    assert not hidden
    if not shared:
        assert torch.equal(h_n, ops.rnn_forward(*arguments, options)[1])
        return
    torch.testing.assert_close(h_n, ops.rnn_forward(*arguments, alone - ops.SHARE_PREFIXES)[1])
    torch.library.opcheck(ops.rnn_forward, (*arguments, options, 2), test_utils=tests)
    output, h_n, hidden = ops.rnn_forward(*arguments, options, 2)
    rest = (*arguments[:3], output, hidden, *arguments[3:], options)
    torch.library.opcheck(ops.rnn_backward, (None, h_n, *rest, False, False, [0, 1], 2))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(nonlinearity, bidirectional, packed):
    """First and second derivatives are right in float64, with respect to all inputs at once."""
    options = {"nonlinearity": nonlinearity, "bidirectional": bidirectional, "num_layers": 2}
    module = FusedRNN(2, 3, dtype=torch.float64, **options)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    shape = (9, 2) if packed else (4, 3, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(4 if bidirectional else 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, hx, *values):
        input = PackedSequence(x, BATCH_SIZES) if packed else x
        parameters = dict(zip(names, values, strict=True))
        output, h_n = torch.func.functional_call(module, parameters, (input, hx))
        return output.data if packed else output, h_n

    # By default gradcheck runs all its checks, undefined gradients and determinism included.
    assert torch.autograd.gradcheck(run, (x, hx, *values))
    assert torch.autograd.gradgradcheck(run, (x, hx, *values), fast_mode=True)


def test_a_tensor_given_twice_gets_both_derivatives():
    """A tensor that is both weight_ih and weight_hh gets both derivatives, second ones too."""
    square = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    module = FusedRNN(3, 3, bias=False, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(w):
        tied = {"weight_ih_l0": w, "weight_hh_l0": w}
        return torch.func.functional_call(module, tied, (x,))[0]

    assert torch.autograd.gradcheck(run, square)
    assert torch.autograd.gradgradcheck(run, square)


def test_only_what_requires_a_gradient_gets_one():
    module = FusedRNN(4, 6)
    x = torch.randn(5, 3, 4)
    module.requires_grad_(False)
    assert not module(x)[0].requires_grad
    module.bias_hh_l0.requires_grad_(True)
    module(x)[1].sum().backward()
    assert module.bias_hh_l0.grad is not None
    assert module.weight_hh_l0.grad is None
    hx = torch.randn(1, 3, 6, requires_grad=True)
    module.requires_grad_(False)
    module(x, hx)[0].sum().backward()
    assert hx.grad is not None


def test_transforms_of_a_cell():
    """Inside transforms a cell calls `rnn`, and matches `nn.RNNCell`."""
    ours, theirs = (cls(3, 4, dtype=torch.float64) for cls in (FusedRNNCell, torch.nn.RNNCell))
    ours.load_state_dict(theirs.state_dict())
    x, tangent = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)
    jvps = (torch.func.jvp(cell, (x,), (tangent,)) for cell in (ours, theirs))
    torch.testing.assert_close(*jvps)
    torch.testing.assert_close(torch.func.jacrev(ours)(x), torch.func.jacrev(theirs)(x))


X, OUTPUT, H_N = torch.zeros(5, 2, 4), torch.zeros(5, 2, 5), torch.zeros(1, 2, 5)
WEIGHTS = [torch.zeros(5, 4), torch.zeros(5, 5), torch.zeros(5), torch.zeros(5)]
GOOD = {"input": X, "hx": None, "weights": WEIGHTS, "sequence_layout": None, "reset": None}
GOOD |= {"options": ops.BIAS | ops.WANT_HIDDEN}
PACKED_ROWS = {"input": X[0], "options": ops.BIAS | ops.PACKED}
JAGGED_ROWS = {"input": X[0], "options": ops.BIAS | ops.JAGGED}


def layout_of(*values, dtype=torch.int64):
    return {"sequence_layout": torch.tensor(values, dtype=dtype)}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weights": WEIGHTS[:3]}, "weights must hold 4 tensors for each layer, got 3"),
        ({"weights": []}, "weights must hold 4 tensors for each layer, got 0"),
        ({"weights": WEIGHTS[:3], "options": ops.BIDIRECTIONAL}, "hold 4 tensors .*, got 3"),
        ({"options": 1024}, "options must be bits of namernn_fast.ops, got 1024"),
        ({"options": -1}, "options must be bits of namernn_fast.ops, got -1"),
        ({"options": ops.PACKED | ops.JAGGED}, "options must not say both packed and jagged"),
        ({"weights": [WEIGHTS[1]] * 4}, r"weight_ih must have shape \(5, 4\), got \(5, 5\)"),
        ({"weights": [w.double() for w in WEIGHTS]}, "weight_ih must have the dtype of"),
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
def test_the_forward_operator_checks_for_itself(changes, text):
    """An operator called directly, past all checks in Python, never reads out of bounds."""
    with pytest.raises(RuntimeError, match=text):
        torch.ops.namernn_fast.rnn_forward(**GOOD | changes)


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
    grad_output, grad_h_n, output, hidden, layers, text
):
    x, hx, weights, *rest = GOOD.values()
    results = grad_output, grad_h_n, x, hx, weights, output, hidden
    with pytest.raises(RuntimeError, match=text):
        ops.rnn_backward(*results, *rest, True, False, layers)
