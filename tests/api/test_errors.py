"""Tests that errors name the argument, the bad value and the valid values."""

import pytest
import torch
from kinds import DROP_INS, KINDS, said_of, states_of
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedGRU, FusedRNNCell, last_state, replace_rnn

pytestmark = pytest.mark.usefixtures("path")


def packed(rows, sizes):
    return PackedSequence(torch.randn(rows, 4), torch.tensor(sizes, dtype=torch.int64))


X = torch.randn(5, 2, 4)
LIKE_TORCH = [
    # (input, hx, error, text). Torch's layer raises exactly the same message.
    (torch.randn(5, 2, 3), None, RuntimeError, "must be equal to input_size. Expected 4, got 3"),
    (torch.randn(4), None, ValueError, "Expected input to be 2D or 3D, got 1D"),
    (X[None], None, ValueError, "Expected input to be 2D or 3D, got 4D"),
    (torch.randn(0, 2, 4), None, RuntimeError, "Expected sequence length to be larger than 0"),
    (X.double(), None, ValueError, r"RNN input dtype \(torch.float64\) does not match weight"),
    (X.to("meta"), None, RuntimeError, "not at the same device, found input tensor at meta"),
    (X, torch.zeros(2, 5), RuntimeError, "batched 3-D input, hx should also be 3-D but got 2-D"),
    (X[:, 0], torch.zeros(1, 1, 5), RuntimeError, "For unbatched 2-D input, hx should also be 2-D"),
    (X, torch.zeros(1, 3, 5), RuntimeError, r"Expected hidden size \(1, 2, 5\), got \[1, 3, 5\]"),
    (X, torch.zeros(2, 2, 5), RuntimeError, r"Expected hidden size \(1, 2, 5\), got \[2, 2, 5\]"),
    (X, torch.zeros(1, 2, 6), RuntimeError, r"Expected hidden size \(1, 2, 5\), got \[1, 2, 6\]"),
    (X, torch.zeros(1, 2, 5, device="meta"), RuntimeError, "hidden tensor at meta"),
    (
        PackedSequence(X, torch.tensor([2, 1])),
        None,
        RuntimeError,
        "input must have 2 dimensions, got 3",
    ),
]
OURS = [
    (X.long(), None, ValueError, r"RNN input dtype \(torch.int64\) does not match weight dtype"),
    ([1.0], None, TypeError, "input must be a Tensor or a PackedSequence, got list"),
    (X, [1.0], TypeError, "hx must be a Tensor or None, got list"),
    (X, torch.zeros(1, 2, 5).double(), RuntimeError, "hx must have the dtype of input"),
    (packed(3, [2, 1]), torch.zeros(5), RuntimeError, "hx must have 3 dimensions, got 1"),
    (packed(3, [2, 1]), torch.zeros(2, 5), RuntimeError, "hx must have 3 dimensions, got 2"),
    (
        packed(3, [1, 2]),
        None,
        RuntimeError,
        "batch_sizes must not increase, got 2 after 1 at step 1",
    ),
    (packed(3, [2, 2]), None, RuntimeError, "batch_sizes must sum to 3"),
    (packed(3, [1, 1]), None, RuntimeError, "batch_sizes must sum to 3"),
    (packed(3, [3, 0]), None, RuntimeError, "batch_sizes must be positive, got 0 at step 1"),
    (packed(3, [2, 2, -1]), None, RuntimeError, "batch_sizes must be positive, got -1 at step 2"),
    (packed(3, [2**62, 1]), None, RuntimeError, "batch_sizes must"),
    (packed(0, []), None, RuntimeError, "Expected sequence length to be larger than 0"),
    (packed(3, [2, 1]), torch.zeros(1, 3, 5), RuntimeError, r"\(1, 2, 5\), got [\[(]1, 3, 5[\])]"),
]


H, C = torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)
PAIRS_LIKE_TORCH = [
    # (input, states of an LSTM, error, text). nn.LSTM raises exactly the same message.
    (X, (H, C[0]), RuntimeError, r"hx and cx should also be 3-D but got \(3-D, 2-D\) tensors"),
    (X[:, 0], (H[:, 0], C), RuntimeError, r"should also be 2-D but got \(2-D, 3-D\) tensors"),
    (X, (H[:, 1:], C), RuntimeError, r"Expected hidden\[0\] size \(1, 2, 5\), got \[1, 1, 5\]"),
    (X, (H, C[..., 1:]), RuntimeError, r"Expected hidden\[1\] size \(1, 2, 5\), got \[1, 2, 4\]"),
    (X, (H,), IndexError, "tuple index out of range"),
    (X, (H, C, C), RuntimeError, "lstm expects two hidden states"),
    (X, H, IndexError, "index 1 is out of bounds for dimension 0 with size 1"),
]
PAIRS = [
    (X, torch.zeros(2, 1, 2, 5), TypeError, "hx must be a pair of tensors or None, got Tensor"),
    (X, (H, [1.0]), TypeError, "cx must be a Tensor, got list"),
    (X, (H, None), TypeError, "cx must be a Tensor, got NoneType"),
    (X, (H, C.double()), RuntimeError, "cx must have the dtype of input"),
    (X, (H.half(), C.double()), RuntimeError, "cx must have the dtype of input"),
    (X, (H, C.to("meta")), RuntimeError, "hidden tensor at meta"),
    (packed(3, [2, 1]), (H, C[0]), RuntimeError, "cx must have 3 dimensions, got 2"),
]


@pytest.mark.parametrize("states", [1, 3, 5])
def test_hx_must_match_the_number_of_layers(kind, states):
    """The error states the size of hx for the whole stack, even if dropout splits the stack."""
    layer = kind.layer(4, 5, num_layers=2, dropout=0.5)
    with pytest.raises(RuntimeError, match=said_of(kind, r"Expected hidden size \(2, 2, 5\)")):
        layer(X, states_of(kind, torch.zeros(states, 2, 5)))


def message(module, *arguments):
    """Returns the type and the text of the error that a call raises."""
    with pytest.raises((IndexError, TypeError, ValueError, RuntimeError)) as raised:
        module(*arguments)
    return raised.type, str(raised.value)


def rows(kinds, table):
    """Returns (kind, input, states, error, text) for each kind and each row of a table."""
    return [
        (kind, input, states_of(kind, hx), error, said_of(kind, text))
        for kind in kinds.values()
        for input, hx, error, text in table
    ]


def of_lstm(table):
    return [(KINDS["lstm"], *row) for row in table]


COLUMNS = ("kind", "input", "states", "error", "text")


@pytest.mark.parametrize(
    COLUMNS, [*rows(KINDS, LIKE_TORCH + OURS), *of_lstm(PAIRS_LIKE_TORCH + PAIRS)]
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_invalid_input_raises_the_expected_error(kind, input, states, error, text, requires_grad):
    module = kind.layer(4, 5).requires_grad_(requires_grad)
    with pytest.raises(error, match=text):
        module(input, states)
    module(X)  # the layer still works after the error


@pytest.mark.parametrize(COLUMNS, [*rows(DROP_INS, LIKE_TORCH), *of_lstm(PAIRS_LIKE_TORCH)])
def test_error_messages_match_torchs_layer(kind, input, states, error, text):
    if kind.name == "lstm" and isinstance(input, PackedSequence):
        pytest.skip("nn.LSTM does not check the dimensions of packed rows")
    assert message(kind.layer(4, 5), input, states) == message(kind.nn_layer(4, 5), input, states)


def test_8_bit_weights_are_not_loaded_into_a_float_layer(kind):
    layer, other = kind.layer(4, 5), kind.layer(4, 5)
    state = other.prepare(torch.int8).state_dict()
    for module in (layer, layer.prepare()):
        with pytest.raises(RuntimeError, match=r"weights in torch\.float32, got 8-bit ones, which"):
            module.load_state_dict(state)


def test_weights_must_be_a_list(kind):
    layer = kind.layer(4, 5)
    with pytest.raises(TypeError, match="weights must be a list or a tuple of tensors, got a gen"):
        kind.run(X, None, (weight for weight in layer.parameters()))


def test_replaced_weights_must_keep_their_shape(kind):
    rows = kind.gates * 5
    module = kind.layer(4, 5)
    module.weight_hh_l0 = torch.nn.Parameter(torch.randn(rows, 6))
    text = rf"weight_hh must have shape \({rows}, 5\), got \({rows}, 6\)"
    with pytest.raises(RuntimeError, match=text):
        module(X)
    module = kind.layer(4, 5)
    module.bias_hh_l0 = torch.nn.Parameter(torch.randn(1))
    with pytest.raises(RuntimeError, match=rf"bias_hh must have shape \({rows},?\), got \(1,?\)"):
        module(X)


STEPS = [
    (torch.randn(3, 5), None, RuntimeError, "inconsistent input_size: got 5 expected 4"),
    (torch.randn(1, 3, 4), None, ValueError, "Expected input to be 1D or 2D, got 3D instead"),
    (torch.randn(3, 4), torch.zeros(3, 6), RuntimeError, "hidden_size: got 6, expected 5"),
    (torch.randn(3, 4), torch.zeros(2, 5), RuntimeError, "3 doesn't match hidden0 batch size 2"),
    (torch.randn(3, 4), torch.zeros(1, 3, 5), ValueError, "to be 1D or 2D, got 3D instead"),
    (torch.randn(3, 4).double(), None, RuntimeError, "same dtype"),
    (torch.randn(3, 4), torch.zeros(3, 5).double(), RuntimeError, "same dtype"),
    (torch.tensor(1.0), None, ValueError, "Expected input to be 1D or 2D, got 0D instead"),
]
STEPS_OF_PAIRS = [
    (X[0], (H[0],), RuntimeError, "lstm_cell expects two hidden states"),
    (X[0], H[0], TypeError, "must be tuple of Tensors, not Tensor"),
    (X[0], (H[0], C[0, :, 1:]), RuntimeError, "hidden1 has inconsistent hidden_size: got 4, expec"),
    (X[0], (H[0], C[0, 1:]), RuntimeError, "batch size 2 doesn't match hidden1 batch size 1"),
]


@pytest.mark.parametrize(COLUMNS, [*rows(DROP_INS, STEPS), *of_lstm(STEPS_OF_PAIRS)])
def test_cell_errors_match_torchs_cell(kind, input, states, error, text):
    ours, theirs = kind.step_module(4, 5), kind.nn_step_module(4, 5)
    wanted = message(theirs, input, states)
    assert wanted[0] is error
    assert text in wanted[1]
    assert message(ours, input, states) == wanted
    with torch.no_grad():
        assert message(ours, input, states) == wanted
        assert message(ours.prepare(), input, states)[0] is error


@pytest.mark.drop_in
def test_16_bit_steps_reject_states_in_float32(kind):
    """16-bit streams keep float32 states, but step modules reject them, as torch's cells do."""
    options, states = {"dtype": torch.bfloat16}, states_of(kind, torch.zeros(3, 5))
    x, ours = torch.zeros(3, 4, **options), kind.step_module(4, 5, **options)
    error, _ = message(kind.nn_step_module(4, 5, **options), x, states)
    with torch.no_grad():
        for module in (ours, ours.prepare()):
            assert message(module, x, states)[0] is error


def test_step_module_rejects_an_unknown_nonlinearity():
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
        FusedRNNCell(4, 5, nonlinearity="gelu")(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((4, 5), {"proj_size": 5}),
        ((4, 5), {"dropout": 2}),
        ((4, 5), {"unknown": 1}),
        ((4, 5), {"nonlinearity": "gelu"}),  # cells with gates take no nonlinearity
        ((4, 5), {"bias": 1}),
        ((4, 5), {"batch_first": "False"}),
        ((0, 5), {}),
        ((4, 0), {}),
        ((4, 5, 0), {}),
        (("4", 5), {}),
        ((4, 5.0), {}),
    ],
    ids=str,
)
@pytest.mark.kinds(*KINDS)
def test_constructor_errors_match_torchs_layer(kind, arguments, options):
    wanted = message(lambda: kind.nn_layer(*arguments, **options))
    assert message(lambda: kind.layer(*arguments, **options)) == wanted


@pytest.mark.drop_in
def test_positional_arguments_match_torchs_layer(kind):
    """Fused layers take the same positional arguments as torch's layers, in the same order."""
    nonlinearity = ("relu",) if kind.has_nonlinearity else ()
    arguments = (4, 5, 2, *nonlinearity, False, True, 0.5, True, 0, "meta", torch.float64)
    layers = [cls(*arguments) for cls in (kind.layer, kind.nn_layer)]
    shared = ("mode", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    ours, theirs = (
        [getattr(layer, name) for name in shared]
        + [(p.shape, p.device, p.dtype) for p in layer.parameters()]
        for layer in layers
    )
    assert ours == theirs
    if kind.name == "lstm":
        assert kind.layer(*arguments[:-3], 2).proj_size == 2
    else:  # torch accepts proj_size and makes a layer that cannot be called
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            kind.layer(*arguments[:-3], 2)


def test_unknown_cells_are_rejected():
    gru, weights = FusedGRU(4, 5), [*FusedGRU(4, 5).parameters()]
    with pytest.raises(
        ValueError,
        match="cell must be one of rnn, gru, lstm, leaky, or a recurrent_cell, got 'sru'",
    ):
        last_state(X, None, weights, cell="sru")
    with pytest.raises(ValueError, match="nonlinearity must be tanh for cell='gru', got 'relu'"):
        last_state(X, None, weights, cell="gru", nonlinearity="relu")
    with pytest.raises(
        TypeError, match=r"cells must be a sequence such as \('gru',\), got the str"
    ):
        replace_rnn(gru, cells="gru")
    with pytest.raises(ValueError, match="cells must be among rnn, gru, lstm, got 'sru'"):
        replace_rnn(gru, cells=("gru", "sru"))
