"""Errors on bad input name the argument, what it got and what it takes, on both paths."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedRNN, FusedRNNCell

pytestmark = pytest.mark.usefixtures("path")


def packed(rows, sizes):
    return PackedSequence(torch.randn(rows, 4), torch.tensor(sizes, dtype=torch.int64))


X = torch.randn(5, 2, 4)
CASES = [
    # input, hx, error, text
    (torch.randn(5, 2, 3), None, RuntimeError, "must be equal to input_size. Expected 4, got 3"),
    (torch.randn(4), None, ValueError, "Expected input to be 2D or 3D, got 1D tensor instead"),
    (X[None], None, ValueError, "Expected input to be 2D or 3D, got 4D tensor instead"),
    (torch.randn(0, 2, 4), None, RuntimeError, "Expected sequence length to be larger than 0"),
    (
        X.double(),
        None,
        ValueError,
        r"RNN input dtype \(torch.float64\) does not match weight dtype",
    ),
    (X.long(), None, ValueError, r"RNN input dtype \(torch.int64\) does not match weight dtype"),
    (X.to("meta"), None, RuntimeError, "not at the same device, found input tensor at meta"),
    ([1.0], None, TypeError, "input must be a Tensor or a PackedSequence, got list"),
    (X, [1.0], TypeError, "hx must be a Tensor or None, got list"),
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
    (X, torch.zeros(1, 2, 5).double(), RuntimeError, "hx must have the dtype of input"),
    (X, torch.zeros(1, 2, 5, device="meta"), RuntimeError, "hidden tensor at meta"),
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
    (
        PackedSequence(X, torch.tensor([2, 1])),
        None,
        RuntimeError,
        "input must have 2 dimensions, got 3",
    ),
]


@pytest.mark.parametrize("states", [1, 3, 5])
def test_states_of_another_number_of_layers(states):
    """The error is the same when dropout splits the stack, and no operator sees all of hx."""
    rnn = FusedRNN(4, 5, num_layers=2, dropout=0.5)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(2, 2, 5\)"):
        rnn(X, torch.zeros(states, 2, 5))


@pytest.mark.parametrize(("input", "hx", "error", "text"), CASES)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_bad_input(input, hx, error, text, requires_grad):
    module = FusedRNN(4, 5).requires_grad_(requires_grad)
    with pytest.raises(error, match=text):
        module(input, hx)
    module(X)  # the layer still works after the error


def test_replaced_weights_of_another_shape():
    module = FusedRNN(4, 5)
    module.weight_hh_l0 = torch.nn.Parameter(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match=r"weight_hh must have shape \(5, 5\), got \(5, 6\)"):
        module(X)
    module = FusedRNN(4, 5)
    module.bias_hh_l0 = torch.nn.Parameter(torch.randn(1))
    with pytest.raises(RuntimeError, match=r"bias_hh must have shape \(5,?\), got \(1,?\)"):
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
def test_bad_cell_input(input, hx, error, text):
    with pytest.raises(error, match=text):
        FusedRNNCell(4, 5)(input, hx)


def test_unknown_nonlinearity():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        FusedRNN(4, 5, nonlinearity="gelu")
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
        FusedRNNCell(4, 5, nonlinearity="gelu")(torch.randn(3, 4))
