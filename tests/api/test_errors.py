"""Errors on bad input name the argument, what it got and what it takes, on both paths."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedGRU, FusedRNN, FusedRNNCell, last_state, replace_rnn

pytestmark = pytest.mark.usefixtures("path")


def packed(rows, sizes):
    return PackedSequence(torch.randn(rows, 4), torch.tensor(sizes, dtype=torch.int64))


X = torch.randn(5, 2, 4)
LIKE_TORCH = [
    # input, hx, error, text. The whole message is that of torch's layer.
    (torch.randn(5, 2, 3), None, RuntimeError, "must be equal to input_size. Expected 4, got 3"),
    (torch.randn(4), None, ValueError, "Expected input to be 2D or 3D, got 1D"),
    (X[None], None, ValueError, "Expected input to be 2D or 3D, got 4D"),
    (torch.randn(0, 2, 4), None, RuntimeError, "Expected sequence length to be larger than 0"),
    (
        X.double(),
        None,
        ValueError,
        r"RNN input dtype \(torch.float64\) does not match weight dtype",
    ),
    (X.to("meta"), None, RuntimeError, "not at the same device, found input tensor at meta"),
    (
        X,
        torch.zeros(2, 5),
        RuntimeError,
        "For batched 3-D input, hx should also be 3-D but got 2-D",
    ),
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
    (packed(3, [2, 2]), None, RuntimeError, "batch_sizes must sum to the rows of data, 3"),
    (packed(3, [1, 1]), None, RuntimeError, "batch_sizes must sum to the rows of data, 3"),
    (packed(3, [3, 0]), None, RuntimeError, "batch_sizes must be positive, got 0 at step 1"),
    (packed(3, [2, 2, -1]), None, RuntimeError, "batch_sizes must be positive, got -1 at step 2"),
    (packed(3, [2**62, 1]), None, RuntimeError, "batch_sizes must"),
    (packed(0, []), None, RuntimeError, "Expected sequence length to be larger than 0"),
    (packed(3, [2, 1]), torch.zeros(1, 3, 5), RuntimeError, r"\(1, 2, 5\), got [\[(]1, 3, 5[\])]"),
]


@pytest.mark.parametrize("states", [1, 3, 5])
def test_states_of_another_number_of_layers(kind, states):
    """The error is the same when dropout splits the stack, and no operator sees all of hx."""
    layer = kind.layer(4, 5, num_layers=2, dropout=0.5)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(2, 2, 5\)"):
        layer(X, torch.zeros(states, 2, 5))


def message(module, *arguments):
    """Returns the type and the text of the error that a call raises."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        module(*arguments)
    return raised.type, str(raised.value)


@pytest.mark.parametrize(("input", "hx", "error", "text"), [*LIKE_TORCH, *OURS])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_bad_input(kind, input, hx, error, text, requires_grad):
    module = kind.layer(4, 5).requires_grad_(requires_grad)
    with pytest.raises(error, match=text):
        module(input, hx)
    module(X)  # the layer still works after the error


@pytest.mark.parametrize(("input", "hx", "error", "text"), LIKE_TORCH)
def test_messages_are_those_of_torchs_layer(kind, input, hx, error, text):
    assert message(kind.layer(4, 5), input, hx) == message(kind.nn_layer(4, 5), input, hx)


def test_replaced_weights_of_another_shape(kind):
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


@pytest.mark.parametrize(
    ("input", "hx", "error", "text"),
    [
        (torch.randn(3, 5), None, RuntimeError, "inconsistent input_size: got 5 expected 4"),
        (torch.randn(1, 3, 4), None, ValueError, "Expected input to be 1D or 2D, got 3D instead"),
        (torch.randn(3, 4), torch.zeros(3, 6), RuntimeError, "hidden_size: got 6, expected 5"),
        (
            torch.randn(3, 4),
            torch.zeros(2, 5),
            RuntimeError,
            "3 doesn't match hidden0 batch size 2",
        ),
        (torch.randn(3, 4).double(), None, RuntimeError, "same dtype"),
        (torch.randn(3, 4), torch.zeros(3, 5).double(), RuntimeError, "same dtype"),
        (torch.tensor(1.0), None, ValueError, "Expected input to be 1D or 2D, got 0D instead"),
    ],
)
def test_bad_cell_input(kind, input, hx, error, text):
    with pytest.raises(error, match=text):
        kind.cell(4, 5)(input, hx)
    assert message(kind.cell(4, 5), input, hx) == message(kind.nn_cell(4, 5), input, hx)


def test_unknown_nonlinearity():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        FusedRNN(4, 5, nonlinearity="gelu")
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
        FusedRNNCell(4, 5, nonlinearity="gelu")(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((4, 5), {"proj_size": 2}),
        ((4, 5), {"dropout": 2}),
        ((4, 5), {"unknown": 1}),
        ((4, 0), {}),
        ((4, 5, 0), {}),
        ((4, 5.0), {}),
    ],
    ids=str,
)
def test_bad_constructor_arguments(kind, arguments, options):
    wanted = message(lambda: kind.nn_layer(*arguments, **options))
    assert message(lambda: kind.layer(*arguments, **options)) == wanted


def test_a_gru_has_no_nonlinearity():
    wanted = message(lambda: torch.nn.GRU(4, 5, nonlinearity="tanh"))
    assert message(lambda: FusedGRU(4, 5, nonlinearity="tanh")) == wanted


def test_unknown_kinds():
    gru, weights = FusedGRU(4, 5), [*FusedGRU(4, 5).parameters()]
    with pytest.raises(ValueError, match="cell must be one of rnn, gru, got 'lstm'"):
        last_state(X, None, weights, cell="lstm")
    with pytest.raises(ValueError, match="nonlinearity must be tanh for cell='gru', got 'relu'"):
        last_state(X, None, weights, cell="gru", nonlinearity="relu")
    with pytest.raises(
        TypeError, match=r"cells must be a sequence such as \('gru',\), got the str"
    ):
        replace_rnn(gru, cells="gru")
    with pytest.raises(ValueError, match="cells must be among rnn, gru, got 'lstm'"):
        replace_rnn(gru, cells=("gru", "lstm"))
