"""`FusedRNN` against `nn.RNN` and the oracle: every combination of options, every result."""

import copy
import itertools

import pytest
import torch
from cases import LAYOUTS, Case, draws, every_other, twins

from namernn_fast import FusedRNN
from namernn_fast.testing import ErrorBudget

# (D, H, T, B): one of everything, multiples of every vector, remainders in every place, wide and
# thin batches, one short sequence of whole vectors, whose weights are not packed.
SHAPES = {
    torch.float32: [
        (1, 1, 1, 1),
        (1, 1, 4, 3),
        (3, 2, 3, 2),
        (5, 7, 6, 3),
        (64, 64, 8, 16),
        (3, 100, 4, 7),
        (57, 130, 3, 1),
        (16, 48, 5, 1),
        (20, 33, 5, 70),
    ],
    torch.float64: [
        (1, 1, 4, 3),
        (3, 2, 3, 2),
        (5, 7, 6, 3),
        (16, 32, 4, 8),
        (3, 37, 3, 13),
        (8, 32, 5, 1),
    ],
    torch.bfloat16: [(1, 1, 4, 3), (5, 7, 6, 3), (16, 48, 5, 1), (33, 70, 9, 40)],
    torch.float16: [(1, 1, 4, 3), (5, 7, 6, 3), (33, 70, 9, 40)],
}
# For token ids: what differs is the input of the first layer.
TOKEN_SHAPES = [(5, 7, 6, 3), (20, 33, 5, 40)]


@pytest.mark.parametrize(
    ("nonlinearity", "bias", "batch_first", "bidirectional", "num_layers", "dtype"),
    every_other(
        ("tanh", "relu"), (True, False), (False, True), (False, True), (1, 2), list(SHAPES)
    ),
)
def test_every_option(nonlinearity, bias, batch_first, bidirectional, num_layers, dtype):
    options = {
        "nonlinearity": nonlinearity,
        "bias": bias,
        "batch_first": batch_first,
        "bidirectional": bidirectional,
        "num_layers": num_layers,
    }
    budget = ErrorBudget(dtype)
    seeds = itertools.count()
    # Layouts for which an absent hx takes a path of its own.
    kinds = [*((layout, True) for layout in LAYOUTS), ("dense", False), ("packed", False)]
    for layout, with_hx in kinds:
        for shape in SHAPES[dtype]:
            for _ in range(draws(shape[1])):
                Case(*shape, options, layout, with_hx, next(seeds)).add_to(budget, FusedRNN, dtype)
        for shape in TOKEN_SHAPES:
            for _ in range(draws(shape[1])):
                case = of_tokens(*shape, options, layout, with_hx, next(seeds))
                case.add_to(budget, FusedRNN, dtype)
    budget.check()


def of_tokens(D, H, T, B, options, layout, with_hx, seed):  # noqa: N803 - the kernels' own legend
    """Returns a case of token ids: with fewer rows than ids, with more, with one that is padding.

    Not with two rows or three, whose few rounding errors are no sample.
    """
    vocabulary = (T * B // 3, T * B // 2, T * B + 1)[seed % 3]
    padding_idx = (None, 1, -1)[seed // 3 % 3]
    return Case(D, H, T, B, options, layout, with_hx, seed, vocabulary, padding_idx)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_many_steps(layout, bidirectional):
    """There are more steps than the projection and the backward pass take at once."""
    budget = ErrorBudget(torch.float32)
    for shape in [(16, 32, 700, 2), (8, 24, 700, 1), (4, 200, 300, 5)]:
        for seed in range(4):
            case = Case(*shape, {"bidirectional": bidirectional}, layout, seed=seed)
            case.add_to(budget, FusedRNN, torch.float32)
        case = of_tokens(*shape, {"bidirectional": bidirectional}, layout, True, 3)
        case.add_to(budget, FusedRNN, torch.float32)
    budget.check()


def look(layer, x):
    """The results of a layer, and the gradients of its parameters from the last states."""
    output, h_n = layer(x)
    h_n.sum().backward()
    gradients = {f"grad {name}": value.grad for name, value in layer.named_parameters()}
    return {"output": output.detach(), "h_n": h_n.detach()} | gradients


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_many_rows(bidirectional, count, threads):
    """Gradients come from the last states, so that late steps add much and early steps little.

    Their budget is three units in the last place of the largest value, beside a rival that is
    exactly rounded: these sums err by one at most, and by 5 to 16 if chunks of 64 or 256 rows are
    added straight to one large sum.
    """
    threads(count)
    budget, tight = ErrorBudget(torch.float32), ErrorBudget(torch.float32, units=1)
    for _ in range(3):
        ours, theirs = twins(16, 16, bidirectional=bidirectional)
        x = torch.randn(64, 4096, 16)
        exact = look(copy.deepcopy(theirs).double(), x.double())
        mine, his = (look(layer, x) for layer in (ours, theirs))
        for name, reference in exact.items():
            if name.startswith("grad"):
                tight.add(name, mine[name], reference.float(), reference)
            else:
                budget.add(name, mine[name], his[name], reference)
    budget.check()
    tight.check()


@pytest.mark.parametrize("layout", ["dense", "packed unsorted", "lengths"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_steps_in_16_bits(layout, dtype, threads):
    """There are more steps than are converted at once, for one thread and for two.

    Two threads share sequences, the hidden units of few sequences, or the hidden units of enough
    sequences for products on pairs of bfloat16.
    """
    budget = ErrorBudget(dtype)
    shapes = [(8, 40, 150, 90), (8, 40, 150, 90), (8, 700, 120, 3), (8, 1100, 70, 9)]
    for count, shape in zip((1, 2, 2, 2), shapes, strict=True):
        threads(count)
        case = Case(*shape, {"bidirectional": count == 1}, layout, seed=count)
        case.add_to(budget, FusedRNN, dtype)
        case = of_tokens(*shape, {"bidirectional": count == 1}, layout, True, 3)
        case.add_to(budget, FusedRNN, dtype)
    budget.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_threads(threads, layout, count):
    """Results keep their budget for any number of threads and any way to share the work."""
    threads(count)
    budget = ErrorBudget(torch.float32)
    # Few sequences share the hidden units out, many the batch, and the last runs on one thread.
    shapes = [(64, 400, 9, 1), (32, 512, 5, 3), (16, 128, 9, 90), (2, 3, 4, 5)]
    for seed, shape in enumerate(shapes):
        case = Case(*shape, {"batch_first": seed % 2 == 0}, layout, seed=seed)
        case.add_to(budget, FusedRNN, torch.float32)
        for draw in range(draws(shape[1])):
            own = {"batch_first": seed % 2 == 0}
            case = of_tokens(*shape, own, layout, seed % 2 == 0, 10 + seed + 100 * draw)
            case.add_to(budget, FusedRNN, torch.float32)
    budget.check()


@pytest.mark.parametrize("training", [True, False])
def test_dropout(training):
    """From one seed, the elements that `nn.RNN` drops are dropped, and none in evaluation."""
    ours, theirs = twins(5, 8, num_layers=3, dropout=0.5)
    x = torch.randn(6, 4, 5)
    results = []
    for module in (ours, theirs):
        module.train(training)
        torch.manual_seed(1)
        results.append(module(x))
    torch.manual_seed(1)
    budget = ErrorBudget(torch.float32)
    exact = copy.deepcopy(theirs).double()(x.double())
    for name, mine, his, reference in zip(("output", "h_n"), *results, exact, strict=True):
        budget.add(name, mine, his, reference.detach().numpy())
    budget.check()
    assert (results[0][0] != ours(x)[0]).any() == training
