"""Tests that fused layers with any options meet the error budget, and so match torch's layers."""

import copy
import functools
import itertools

import oracle
import pytest
import torch
from cases import LAYERS, SAME_ROWS, Case, draws, layer_of, named_states
from kinds import EVERY, flat

from namernn_fast.testing import ErrorBudget

# (input_size, hidden_size, seq_len, batch): sizes that are and are not multiples of a SIMD vector,
# small and large batches, and batches of one short sequence, for which weights are not packed.
SHAPES = {
    torch.float32: [
        (3, 2, 3, 2),
        (5, 7, 6, 3),
        (64, 64, 8, 16),
        (3, 100, 4, 7),
        (57, 130, 3, 1),
        (16, 48, 5, 1),
        (20, 33, 5, 70),
    ],
    torch.float64: [
        (3, 2, 3, 2),
        (5, 7, 6, 3),
        (16, 32, 4, 8),
        (3, 37, 3, 13),
        (8, 32, 5, 1),
    ],
    torch.bfloat16: [(5, 7, 6, 3), (16, 48, 5, 1), (33, 70, 9, 40)],
    torch.float16: [(5, 7, 6, 3), (33, 70, 9, 40)],
}
# Token ids need fewer shapes, because they change only the projection of the first layer's input.
TOKEN_SHAPES = [(5, 7, 6, 3), (20, 33, 5, 40)]
# (layouts, with_hx). Without hx, the kernel runs different code for dense and for packed rows.
KINDS = [*((layouts, True) for layouts in SAME_ROWS), (("dense",), False), (("packed",), False)]


def add_cases(budget, dtype, shapes, options, make):
    """Adds the errors for every shape in every layout to a budget."""
    seeds = itertools.count()
    for layouts, with_hx in KINDS:
        for shape in shapes:
            for _ in range(draws(shape[1])):
                case = make(*shape, options, layouts[0], with_hx, next(seeds))
                for layout in layouts:
                    case.in_layout(layout).add_to(budget, dtype)


@pytest.mark.covering(1)
@pytest.mark.parametrize("equation", oracle.EQUATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("dtype", SHAPES, ids=str)
def test_layers_with_any_options_meet_the_error_budget(
    equation, bias, batch_first, bidirectional, num_layers, dtype
):
    cell, options = layer_of(equation)
    options |= {
        "bias": bias,
        "batch_first": batch_first,
        "bidirectional": bidirectional,
        "num_layers": num_layers,
    }
    budget = ErrorBudget(dtype)
    add_cases(budget, dtype, SHAPES[dtype], options, functools.partial(Case, cell=cell))
    add_cases(budget, dtype, TOKEN_SHAPES, options, functools.partial(of_tokens, cell=cell))
    budget.check()


@pytest.mark.covering(0)
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", SHAPES, ids=str)
def test_layers_with_sizes_of_one_meet_the_error_budget(cell, batch_first, bidirectional, dtype):
    """The kernel must not rely on the stride of a dimension of size one, which is arbitrary."""
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "num_layers": 2}
    budget = ErrorBudget(dtype)
    make = functools.partial(Case, cell=cell)
    add_cases(budget, dtype, [(1, 1, 1, 1), (1, 1, 4, 3)], options, make)
    budget.check()


def of_tokens(D, H, T, B, options, layout, with_hx, seed, cell):  # noqa: N803 - as in the kernels
    """Returns a case of token ids.

    `seed` determines whether the embedding has fewer or more rows than the batch has ids, and
    whether padding_idx is None, positive or negative. `T * B` must be at least 12: an embedding of
    three or fewer rows yields too few results to estimate rounding errors.
    """
    vocabulary = (T * B // 3, T * B // 2, T * B + 1)[seed % 3]
    padding_idx = (None, 1, -1)[seed // 3 % 3]
    return Case(D, H, T, B, options, layout, with_hx, seed, vocabulary, padding_idx, cell)


@pytest.mark.slow
@pytest.mark.covering(0)
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("layouts", SAME_ROWS, ids=", ".join)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_long_sequences_meet_the_error_budget(cell, layouts, bidirectional):
    """The projection and the backward pass process these sequences in several blocks of rows.

    A block of the projection has 256 rows, and each shape has more than twice as many. On a core
    with 1 MiB of L2 cache, a block of the backward pass has 324 rows of the last shape.
    """
    budget = ErrorBudget(torch.float32)
    options = {"bidirectional": bidirectional}
    for shape in [(16, 32, 300, 2), (8, 24, 600, 1), (4, 200, 200, 5)]:
        cases = [Case(*shape, options, layouts[0], seed=seed, cell=cell) for seed in range(2)]
        for case in (*cases, of_tokens(*shape, options, layouts[0], False, 3, cell)):
            for layout in layouts:
                case.in_layout(layout).add_to(budget, torch.float32)
    budget.check()


def results_and_gradients(layer, x):
    """Returns a layer's results and its parameters' gradients of `h_n.sum()`, by name."""
    output, *last = flat(layer(x))
    last[0].sum().backward()
    gradients = {f"grad {name}": value.grad for name, value in layer.named_parameters()}
    states = named_states("{}_n", [state.detach() for state in last])
    return {"output": output.detach()} | states | gradients


@pytest.mark.slow
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_summed_over_many_rows_are_accurate(cell, bidirectional, threads):
    """Gradients start from the last states, so late steps contribute much and early ones little.

    Gradients are compared with an exactly rounded baseline, so the budget allows three units in the
    last place of the largest value. The kernel errs by at most one unit. It would err by 5 to 16
    units if it added chunks of 64 or 256 rows directly to one large sum.
    """
    budget, tight = ErrorBudget(torch.float32), ErrorBudget(torch.float32, units=1)
    for _ in range(2):
        ours, theirs = EVERY[cell].twins(16, 16, bidirectional=bidirectional)
        x = torch.randn(64, 4096, 16)
        exact = results_and_gradients(copy.deepcopy(theirs).double(), x.double())
        baseline = results_and_gradients(theirs, x)
        for count in (1, 2):
            threads(count)
            ours.zero_grad()
            mine = results_and_gradients(ours, x)
            for name, reference in exact.items():
                if name.startswith("grad"):
                    tight.add(name, mine[name], reference.float(), reference)
                else:
                    budget.add(name, mine[name], baseline[name], reference)
    budget.check()
    tight.check()


@pytest.mark.slow
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("layouts", [("dense",), ("packed unsorted", "lengths")], ids=", ".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_16_bit_sequences_meet_the_error_budget(cell, layouts, dtype, threads):
    """The kernel converts these sequences to float32 in several blocks of steps.

    A block holds at most 1 MiB of converted inputs and outputs: 86 steps of the first shape, 225 of
    the last. On a core with 1 MiB of L2 cache, the backward pass processes the last shape in blocks
    of at most 512 rows.
    """
    budget = ErrorBudget(dtype)
    # One thread runs everything; then two threads divide the sequences, then the hidden units.
    for shape, count in (((8, 90, 185, 31), 1), ((8, 90, 185, 31), 2), ((8, 380, 240, 3), 2)):
        threads(count)
        options = {"bidirectional": count == 1}
        case = Case(*shape, options, layouts[0], seed=count, cell=cell)
        for rows in (case, of_tokens(*shape, options, layouts[0], False, 3, cell)):
            for layout in layouts:
                rows.in_layout(layout).add_to(budget, dtype)
    budget.check()


@pytest.mark.covering(0)
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("layouts", SAME_ROWS, ids=", ".join)
def test_results_meet_the_error_budget_for_any_number_of_threads(threads, cell, layouts):
    """The shapes cover each way to divide the work among threads."""
    budget = ErrorBudget(torch.float32)
    # Threads divide the hidden units of the first two shapes, which have few sequences, and the
    # sequences of the third. The last shape runs on one thread.
    shapes = [(64, 400, 9, 1), (32, 512, 5, 3), (16, 128, 9, 90), (2, 3, 4, 5)]
    for seed, shape in enumerate(shapes):
        options = {"batch_first": seed % 2 == 0}
        cases = [Case(*shape, options, layouts[0], seed=seed, cell=cell)]
        for draw in range(draws(shape[1])):
            token_seed = 10 + seed + 100 * draw
            cases.append(of_tokens(*shape, options, layouts[0], seed % 2 == 0, token_seed, cell))
        for case, count, layout in itertools.product(cases, (1, 2, 3, 4), layouts):
            threads(count)
            case.in_layout(layout).add_to(budget, torch.float32)
    budget.check()
