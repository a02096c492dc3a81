"""The operators as torch sees them: opcheck, gradients of gradients."""

import pytest
import torch
from cases import every_other
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedRNN, FusedRNNCell, ops

BATCH_SIZES = torch.tensor([3, 3, 2, 1])
OFFSETS = torch.tensor([0, 4, 6, 9])
LAYOUTS = ("padded", "lengths", "packed", "jagged")


def stack_arguments(
    layout, num_layers=1, bidirectional=False, batch_first=False, with_hx=True, tokens=False
):
    """Returns arguments of `rnn_forward`."""
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


@pytest.mark.parametrize(
    ("layout", "batch_first", "num_layers", "bidirectional", "with_hx"),
    every_other(LAYOUTS, (False, True), (1, 2), (False, True), (False, True)),
)
def test_opcheck(layout, batch_first, num_layers, bidirectional, with_hx):
    arguments = stack_arguments(layout, num_layers, bidirectional, batch_first, with_hx)
    check_operators(arguments, layout, num_layers, with_hx, want_input=True)


@pytest.mark.parametrize(
    ("layout", "bidirectional", "with_hx"),
    every_other(LAYOUTS, (False, True), (False, True)),
)
def test_opcheck_of_token_ids(layout, bidirectional, with_hx):
    arguments = stack_arguments(layout, 2, bidirectional, with_hx, with_hx, tokens=True)
    check_operators(arguments, layout, 2, with_hx, want_input=False)


def check_operators(arguments, layout, num_layers, with_hx, want_input):
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    # Without hx the batch of a packed sequence is a value, which opcheck compares.
    if layout != "packed" or with_hx:
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.rnn_forward, arguments, test_utils=tests)
    output, h_n, hidden = ops.rnn_forward(*arguments)
    for grads in ((output, h_n), (None, h_n), (output, None)):
        layers = list(range(num_layers))
        for want in (
            (want_input, with_hx, layers),
            (False, False, layers[1:]),
            (want_input, False, []),
        ):
            torch.library.opcheck(
                ops.rnn_backward, (*grads, *arguments[:3], output, hidden, *arguments[3:], *want)
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck_of_the_last_state(layout, tokens, shared):
    """Without an output, and where sequences share prefixes, in inference and in training."""
    if shared and not tokens:
        pytest.skip("rows are not shared")
    *arguments, options = stack_arguments(layout, 2, with_hx=not shared, tokens=tokens)
    if shared:
        arguments[-1] = None  # reset
        options |= ops.SHARE_PREFIXES
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if layout != "packed" or not shared:
        tests.append("test_aot_dispatch_dynamic")
    alone = options & ~ops.WANT_HIDDEN | ops.LAST_STATE
    torch.library.opcheck(ops.rnn_forward, (*arguments, alone), test_utils=tests)
    output, h_n, hidden = ops.rnn_forward(*arguments, alone)
    assert output.shape == (0,)
    assert not hidden
    if not shared:
        assert torch.equal(h_n, ops.rnn_forward(*arguments, options)[1])
        return
    torch.testing.assert_close(h_n, ops.rnn_forward(*arguments, alone - ops.SHARE_PREFIXES)[1])
    torch.library.opcheck(ops.rnn_forward, (*arguments, options), test_utils=tests)
    output, h_n, hidden = ops.rnn_forward(*arguments, options)
    rest = (*arguments[:3], output, hidden, *arguments[3:], options)
    torch.library.opcheck(ops.rnn_backward, (None, h_n, *rest, False, False, [0, 1]))


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

    # Without a flag, all of torch's own checks are on: undefined gradients, determinism.
    assert torch.autograd.gradcheck(run, (x, hx, *values))
    assert torch.autograd.gradgradcheck(run, (x, hx, *values), fast_mode=True)


def test_a_tensor_given_twice_has_one_whole_second_derivative():
    """A tensor that is weight_ih and weight_hh gets the derivative of both, also the second."""
    square = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    module = FusedRNN(3, 3, bias=False, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(w):
        tied = {"weight_ih_l0": w, "weight_hh_l0": w}
        return torch.func.functional_call(module, tied, (x,))[0]

    assert torch.autograd.gradcheck(run, square)
    assert torch.autograd.gradgradcheck(run, square)


def test_only_what_is_asked_for_has_a_gradient():
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


@pytest.mark.parametrize("layer", [FusedRNN, FusedRNNCell])
def test_torch_func_transforms_agree_with_nn(layer):
    """Transforms that differentiate take the reference path and give the results of `nn.RNN`."""
    base = torch.nn.RNN if layer is FusedRNN else torch.nn.RNNCell
    ours, theirs = layer(3, 4, dtype=torch.float64), base(3, 4, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, tangent = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)

    def loss(module, x):
        result = module(x)
        return (result[0] if isinstance(result, tuple) else result).square().sum()

    results = []
    for module in (ours, theirs):
        jvp = torch.func.jvp(lambda x, m=module: loss(m, x), (x,), (tangent,))[1]
        grad = torch.func.grad(lambda x, m=module: loss(m, x))(x)
        results.append((jvp, grad))
    torch.testing.assert_close(*results)
    mapped = torch.func.vmap(lambda x: loss(ours, x))(torch.stack([x, tangent]))
    torch.testing.assert_close(mapped, torch.stack([loss(theirs, x), loss(theirs, tangent)]))


def test_the_operator_checks_for_itself():
    """An operator that is called directly, past all checks in Python, reads in bounds only."""
    x = torch.randn(5, 2, 4)
    weights = [p.detach() for p in torch.nn.RNN(4, 5).parameters()]
    good = (x, None, weights, None, None, ops.BIAS | ops.WANT_HIDDEN)
    packed, jagged = ops.BIAS | ops.PACKED, ops.BIAS | ops.JAGGED
    output, h_n, _ = ops.rnn_forward(*good)
    names = [argument.name for argument in ops.rnn_forward._schema.arguments]

    def forward_with(**changes):
        values = dict(zip(names, good, strict=True)) | changes
        return lambda: torch.ops.namernn_fast.rnn_forward(**values)

    def backward(grad_output, grad_h_n, output, hidden=(), layers=(0,)):
        return lambda: ops.rnn_backward(
            grad_output, grad_h_n, *good[:3], output, list(hidden), *good[3:], True, False, layers
        )

    for call, text in (
        (
            forward_with(weights=weights[:3]),
            r"weights must hold 4 tensors for each layer, got 3",
        ),
        (forward_with(weights=[]), r"weights must hold 4 tensors for each layer, got 0"),
        (
            forward_with(weights=weights[:3], options=ops.BIDIRECTIONAL),
            r"weights must hold 4 tensors for each layer, got 3",
        ),
        (forward_with(options=1024), "options must be bits of namernn_fast.ops, got 1024"),
        (forward_with(options=-1), "options must be bits of namernn_fast.ops, got -1"),
        (
            forward_with(options=ops.PACKED | ops.JAGGED),
            "options must not say both packed and jagged",
        ),
        (
            forward_with(weights=[weights[1]] * 4),
            r"weight_ih must have shape \(5, 4\), got \(5, 5\)",
        ),
        (forward_with(weights=[w.double() for w in weights]), "weight_ih must have the dtype of"),
        (forward_with(hx=torch.zeros(1, 3, 5)), r"hx must have shape \(1, 2, 5\), got \(1, 3, 5\)"),
        (forward_with(input=x[0]), "input must have 3 dimensions, got 2"),
        (forward_with(input=x[:0]), "Expected sequence length to be larger than 0 in RNN"),
        (
            forward_with(
                input=x[0], sequence_layout=torch.tensor([2], dtype=torch.int32), options=packed
            ),
            "batch_sizes must be a 1-D int64 tensor on the CPU",
        ),
        (backward(output[1:], None, output), r"grad_output must have shape \(5, 2, 5\), got \(4,"),
        (backward(output, h_n[0], output), r"grad_h_n must have shape \(1, 2, 5\), got \(2, 5\)"),
        (backward(output, h_n, output[..., 1:]), r"output must have shape \(5, 2, 5\)"),
        (
            backward(output, h_n, output, [x]),
            r"hidden must hold the outputs of 0 layer\(s\), got 1",
        ),
        (backward(output, h_n, output, layers=[1]), "want_layers must be from 0 to 0, got 1"),
        (
            forward_with(sequence_layout=torch.tensor([2, 3], dtype=torch.int32)),
            "lengths must be a 1-D int64 tensor on the CPU",
        ),
        (
            forward_with(sequence_layout=torch.tensor([2])),
            "one length for each of the 2 sequences, got 1",
        ),
        (
            forward_with(sequence_layout=torch.tensor([2, 6])),
            "lengths must be from 0 to 5, the steps of input, got 6 for sequence 1",
        ),
        (
            forward_with(sequence_layout=torch.tensor([-1, 2])),
            "from 0 to 5, .*, got -1 for sequence 0",
        ),
        (
            forward_with(sequence_layout=torch.tensor([2]), options=packed),
            "input must have 2 dimensions, got 3",
        ),
        (
            forward_with(input=x[0], options=packed),
            "sequence_layout must be the batch_sizes of input, got none",
        ),
        (
            forward_with(input=x[0], options=jagged),
            "sequence_layout must be the offsets of input, got none",
        ),
        (
            forward_with(input=x[0], sequence_layout=torch.tensor([0, 1]), options=jagged),
            "offsets must begin with 0 and end with 2, the rows of data, got 0 and 1",
        ),
        (
            forward_with(input=x[0], sequence_layout=torch.tensor([0, 3, 2]), options=jagged),
            "offsets must not decrease, got 2 after 3 at 2",
        ),
        (forward_with(reset=torch.zeros(5, 2)), "reset must be a bool tensor on the CPU"),
        (
            forward_with(reset=torch.zeros(2, 5, dtype=torch.bool)),
            r"reset must have shape \(5, 2\), got \(2, 5\)",
        ),
    ):
        with pytest.raises(RuntimeError, match=text):
            call()
