"""Tests operator calls that compute shared prefixes of sequences only once.

With sharing, states must be bit-identical, and gradients must match up to rounding errors.
"""

import itertools
import random
from dataclasses import dataclass, replace

import operators
import pytest
import torch
from drawn import threads
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kinds import KINDS, needs_extension
from torch.nn.utils.rnn import pad_sequence

from namernn_fast import ops
from namernn_fast.cells import CELLS

pytestmark = needs_extension
LAYOUTS = ("padded", "batch first", "lengths", "packed", "jagged")
EVEN = ("padded", "batch first")
"""Layouts in which all sequences have the same length."""
STYLES = ("random", "stems", "equal", "prefixes", "distinct")
VOCABULARIES = (1, 2, 31, 70_000)


def draw_sequences(style, vocabulary, batch, seq_len, layout, seed):
    """Returns random token ids for each sequence. `style` determines how they share prefixes."""
    draw = random.Random(seed)
    shortest = seq_len if layout in EVEN else 1 if layout == "packed" else 0
    base = [draw.randrange(vocabulary) for _ in range(seq_len)]
    stems = [base[: draw.randint(0, seq_len)] for _ in range(4)]
    firsts = draw.sample(range(vocabulary), min(vocabulary, batch))
    sequences = []
    for b in range(batch):
        length = draw.randint(shortest, seq_len)
        ids = {
            "random": [],
            "stems": draw.choice(stems),
            "equal": base,
            "prefixes": base[: draw.randint(0, seq_len)] if layout in EVEN else base,
            "distinct": [firsts[b % len(firsts)]],
        }[style]
        ids = ids if style == "equal" else ids[:length]
        while len(ids) < length:
            ids = [*ids, draw.randrange(vocabulary)]
        sequences.append(ids)
    return sorted(sequences, key=len, reverse=True) if layout == "packed" else sequences


def arrange(sequences, layout):
    """Returns the operators' arguments for these sequences: input, sequence_layout and options.

    The ids are not contiguous in memory. Padding consists of ids that are out of range.
    """
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    lengths = torch.tensor([len(ids) for ids in sequences])
    if layout == "packed":
        batch_sizes = torch.tensor([(lengths > t).sum() for t in range(int(lengths.max()))])
        ids = torch.cat([pad_sequence(rows)[t, :size] for t, size in enumerate(batch_sizes)])
        rest = batch_sizes, ops.PACKED
    elif layout == "jagged":
        ids = torch.cat(rows)
        rest = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), ops.JAGGED
    else:
        first = layout == "batch first"
        ids = pad_sequence(rows, batch_first=first, padding_value=-99)
        if layout == "lengths":
            ids = torch.nn.functional.pad(ids, (0, 0, 0, 1), value=-99)
        rest = lengths if layout == "lengths" else None, ops.BATCH_FIRST if first else 0
    return torch.stack([ids, ids + 1_000_000], -1)[..., 0], *rest


@dataclass
class TokenBatch:
    """A batch of token ids, and the options and weights of a stack of layers."""

    sequences: list[list[int]]
    layout: str = "jagged"
    vocabulary: int = 31
    hidden_size: int = 8
    num_layers: int = 1
    bias: bool = True
    relu: bool = False
    dtype: torch.dtype = torch.float64
    trees: int = 0
    cell: str = "rnn"

    def __post_init__(self):
        self.ids, self.sequence_layout, self.options = arrange(self.sequences, self.layout)
        self.options += (ops.BIAS if self.bias else 0) + (ops.RELU if self.relu else 0)
        self.options += KINDS[self.cell].bits
        generator = torch.Generator().manual_seed(len(self.sequences))
        hidden_size = self.hidden_size
        rows = CELLS[self.cell].gates * hidden_size

        def uniform(*size):
            return ((torch.rand(*size, generator=generator) * 2 - 1) * hidden_size**-0.5).to(
                self.dtype
            )

        self.weights = []
        for k in range(self.num_layers):
            self.weights += [
                uniform(rows, hidden_size) if k else uniform(self.vocabulary, rows),
                uniform(rows, hidden_size),
            ]
            self.weights += [uniform(rows), uniform(rows)] if self.bias else []
            self.weights += [uniform(hidden_size) for _ in CELLS[self.cell].own]
        self.grads_of_last = [
            uniform(self.num_layers, len(self.sequences), hidden_size)
            for _ in CELLS[self.cell].states
        ]

    def arguments(self, share, bits):
        """Returns the arguments that `ops.forward` and `ops.backward` have in common."""
        options = self.options + bits + (ops.SHARE_PREFIXES if share else 0)
        call = CELLS[self.cell].number, self.ids, (), self.weights
        return *call, self.sequence_layout, None, options, self.trees

    def last_state(self, share):
        """Runs inference, and returns the last states, concatenated if there are several."""
        output, last, saved = operators.forward(*self.arguments(share, ops.LAST_STATE))
        assert output.shape == (0,)
        assert saved == []
        return torch.cat(last, -1)

    def forward(self, share):
        """Runs a training forward pass; returns output, concatenated last states and `saved`."""
        output, last, saved = operators.forward(*self.arguments(share, ops.WANT_SAVED))
        return output, torch.cat(last, -1), saved

    def backward(self, share, results, want_layers=None):
        """Returns the gradients of the weights of all layers, or of the layers in `want_layers`."""
        output, _, saved = results
        want = range(self.num_layers) if want_layers is None else want_layers
        arguments = *self.arguments(share, 0), output, saved
        wants = [False], list(want)
        return operators.backward(*arguments, None, self.grads_of_last, *wants)

    def shares(self):
        """Returns whether the operators share prefixes, which changes the order of output rows."""
        output = self.forward(share=True)[0]
        assert output.shape == (self.ids.numel(), self.hidden_size)
        return not torch.equal(output, self.forward(share=False)[0].flatten(0, -2))


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def check(call, set_threads=torch.set_num_threads):
    """Checks that sharing changes no bits of states, and changes gradients only by rounding."""
    plain = call.forward(share=False)
    expected = call.backward(False, plain)
    by_threads = []
    for count in (1, 2):
        set_threads(count)
        assert torch.equal(call.last_state(share=True), plain[1])
        shared = call.forward(share=True)
        assert torch.equal(shared[1], plain[1])
        grads = call.backward(True, shared)
        assert equal(call.backward(True, call.forward(share=True)), grads)
        for grad, other, weight in zip(grads, expected, call.weights, strict=True):
            assert grad.shape == weight.shape
            assert grad.dtype == call.dtype
            error = 1e-12 if call.dtype == torch.float64 else 2e-5
            largest = float(other.abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(grad, other, rtol=0, atol=error * largest)
        by_threads.append((shared, grads))
    # The backward pass must rebuild the trees of the forward pass on any number of threads.
    assert equal(call.backward(True, by_threads[0][0]), by_threads[1][1])


@st.composite
def calls(draw):
    layout = draw(st.sampled_from(LAYOUTS))
    vocabulary = draw(st.sampled_from(VOCABULARIES))
    sequences = draw_sequences(
        draw(st.sampled_from(STYLES)),
        vocabulary,
        draw(st.integers(1, 60)),
        draw(st.integers(1 if layout != "jagged" else 0, 40)),
        layout,
        draw(st.integers(0, 2**32)),
    )
    return TokenBatch(
        sequences,
        layout,
        vocabulary,
        draw(st.sampled_from((1, 5, 16))),
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from((torch.float32, torch.float64))),
        draw(st.sampled_from((0, 1, 2, 3, 2**40))),
    )


@pytest.mark.covering(0)
@pytest.mark.parametrize("cell", CELLS)
@given(calls())
@example(TokenBatch([[], [], []], "lengths"))
@example(TokenBatch([[], [], []], "jagged"))
@example(TokenBatch([[3, 1, 4, 1, 5][:n] for n in (2, 5, 0, 1, 5, 4, 2)] * 3, num_layers=3))
@settings(deadline=None, max_examples=100)
def test_sharing_prefixes_does_not_change_results_of_random_calls(cell, call):
    with threads(torch.get_num_threads()):
        check(replace(call, cell=cell, relu=call.relu and "relu" in CELLS[cell].nonlinearities))


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_sharing_prefixes_in_many_trees_does_not_change_results(cell, layout, dtype, threads):
    sequences = draw_sequences("random", 31, 3000, 9, layout, seed=1)
    call = TokenBatch(sequences, layout, num_layers=2, hidden_size=16, dtype=dtype, cell=cell)
    assert call.shares()
    check(call, threads)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("cell", CELLS)
def test_sharing_prefixes_of_long_sequences_does_not_change_results(cell, vocabulary, threads):
    sequences = draw_sequences("stems", vocabulary, 12, 300, "jagged", seed=2)
    sequences += draw_sequences("random", vocabulary, 40, 40, "jagged", seed=3)
    check(TokenBatch(sequences, vocabulary=vocabulary, num_layers=2, trees=2, cell=cell), threads)


@pytest.mark.parametrize("trees", [0, 1, 2, 7, 2**40])
@pytest.mark.parametrize("style", ["equal", "stems"])
def test_prefixes_are_shared_if_that_is_estimated_to_be_faster(style, trees, threads):
    sequences = draw_sequences(style, 31, 400, 12, "lengths", seed=4)
    call = TokenBatch(sequences, "lengths", trees=trees)
    assert call.shares() or trees > 400  # with one tree per sequence, nothing can be shared
    check(call, threads)


@pytest.mark.parametrize("batch", [1, 200])
def test_sequences_without_equal_prefixes_are_not_shared(batch, threads):
    call = TokenBatch(draw_sequences("distinct", 70_000, batch, 12, "padded", 5), "padded", 70_000)
    assert not call.shares()
    check(call, threads)


@pytest.mark.parametrize("want_layers", [[], [0], [1], [2], [0, 2]])
@pytest.mark.parametrize("cell", CELLS)
def test_only_gradients_of_the_wanted_layers_are_returned(cell, want_layers):
    sequences = draw_sequences("stems", 31, 200, 9, "jagged", seed=6)
    call = TokenBatch(sequences, num_layers=3, cell=cell)
    assert call.shares()
    results = call.forward(share=True)
    all_grads = call.backward(True, results)
    grads = call.backward(True, results, want_layers)
    per_layer = len(all_grads) // 3
    assert equal(grads, [grad for i, grad in enumerate(all_grads) if i // per_layer in want_layers])


@pytest.mark.parametrize("cell", CELLS)
def test_shared_prefixes_accept_strided_gradients_and_strided_saved_rows(cell):
    sequences = draw_sequences("stems", 31, 200, 9, "jagged", seed=7)
    call = TokenBatch(sequences, num_layers=2, cell=cell)
    assert call.shares()
    results = call.forward(share=True)
    call.grads_of_last = [grad[:1, :1, :1].expand(grad.shape) for grad in call.grads_of_last]

    def with_gaps(rows):
        return torch.stack([rows, rows.neg()], -2)[..., 0, :]

    output, h_n, saved = results
    assert not with_gaps(output).is_contiguous()
    grads = call.backward(True, (with_gaps(output), h_n, [with_gaps(rows) for rows in saved]))
    call.grads_of_last = [grad.contiguous() for grad in call.grads_of_last]
    assert equal(grads, call.backward(True, results))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrong", [-1, 7, 2**62])
def test_errors_report_the_position_of_an_id_out_of_range(layout, share, wrong):
    right = TokenBatch([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [6, 5, 4, 3, 2]], layout, vocabulary=7)
    call = TokenBatch([[1, 2, 3, 4, 5], [1, 2, 3, wrong, 5], [6, 5, 4, 3, 2]], layout, vocabulary=7)
    message = f"^namernn_fast: input must hold ids from 0 to 6, got {wrong} at step 3 of sequence 1"
    with pytest.raises(RuntimeError, match=message):
        call.last_state(share)
    with pytest.raises(RuntimeError, match=message):
        call.backward(share, right.forward(share))


@pytest.mark.parametrize("layout", ["lengths", "jagged"])
@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_errors_report_the_index_of_a_sequence_in_the_callers_order(order, layout):
    sequences = [[1, 2, 3, 4, 5], [1, 2, 99], [6]]
    call = TokenBatch([sequences[b] for b in order], layout, vocabulary=7)
    with pytest.raises(RuntimeError, match=f"got 99 at step 2 of sequence {order.index(1)}"):
        call.last_state(share=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": ops.BIDIRECTIONAL}, "sharing prefixes takes one direction, got 2"),
        ({"states": True}, "states must be empty when prefixes are shared"),
        ({"reset": torch.ones(3, 1, dtype=torch.bool)}, "reset must be None when prefixes"),
        ({"dtype": torch.bfloat16}, "weights must be float32 or float64 when prefixes"),
        ({"input": torch.zeros(3, 1, 4)}, "when prefixes are shared, got features"),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_arguments_that_cannot_be_combined_with_sharing_are_rejected(cell, changes, message):
    ids = torch.zeros(3, 1, dtype=torch.int64)
    call = {"input": ids, "states": False, "reset": None, "options": 0, "dtype": None, **changes}
    rows = CELLS[cell].gates * 4
    table, weight_hh = (torch.zeros(size, dtype=call["dtype"]) for size in ((4, rows), (rows, 4)))
    if call["input"].dim() == 3:
        table = table.t()
    rate = [weight_hh[0, :4] for _ in CELLS[cell].own]
    weights = [table, weight_hh, *rate] * (2 if call["options"] else 1)
    states = [torch.zeros(1, 1, 4) for _ in CELLS[cell].states] if call["states"] else []
    options = call["options"] + ops.SHARE_PREFIXES + KINDS[cell].bits
    rows = None, call["reset"], options, 0
    with pytest.raises(RuntimeError, match=message):
        operators.forward(CELLS[cell].number, call["input"], states, weights, *rows)


@pytest.mark.parametrize("cell", CELLS)
def test_sharing_prefixes_rejects_a_gradient_of_the_output(cell):
    call = TokenBatch([[1, 2, 3]] * 50, cell=cell)
    output, _, saved = call.forward(share=True)
    grads = torch.zeros_like(output), [None for _ in call.grads_of_last]
    with pytest.raises(RuntimeError, match="grad_output must be None when prefixes"):
        operators.backward(*call.arguments(True, 0), output, saved, *grads, [False], [0])
