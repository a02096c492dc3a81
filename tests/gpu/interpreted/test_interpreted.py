"""Tests random calls, concurrent layers and sums by token, which are not tested in the emulator."""

import itertools
import random
from dataclasses import replace

import hypothesis
import operators
import pytest
import torch
from drawn import LUCKY, check_results, drawn_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import PLANS, resident, streamed
from triton.runtime.errors import InterpreterError

from namernn_fast import FusedRNN, ops
from namernn_fast.cells import VANILLA
from namernn_fast.gpu import layer, stack, sums

pytestmark = pytest.mark.covering(1)


@pytest.mark.parametrize("plan", PLANS)
def test_an_infinite_recurrent_weight_keeps_the_last_steps_gradient_finite(plan, monkeypatch):
    """The last step gets no gradient through weight_hh, because no later step exists."""
    monkeypatch.setattr(layer, "plan_of", lambda hidden_size, *_: plan(hidden_size))
    rnn = FusedRNN(3, 5)
    with torch.no_grad():
        rnn.weight_hh_l0[0, 1] = torch.inf
    x = torch.randn(1, 2, 3, requires_grad=True)
    _, h_n = rnn(x, torch.full((1, 2, 5), 0.5))
    h_n[..., 2:].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_in_one_sequence_does_not_reach_other_sequences(plan, nonlinearity, monkeypatch):
    monkeypatch.setattr(layer, "plan_of", lambda hidden_size, *_: plan(hidden_size))
    x = torch.randn(3, 2, 4)
    x[0, 1, 2] = torch.nan
    output, _ = FusedRNN(4, 5, nonlinearity=nonlinearity)(x)
    assert torch.equal(output.isnan(), torch.tensor([False, True])[:, None].expand_as(output))


@pytest.mark.slow
@hypothesis.seed(0)  # without a seed, examples change with every edit of this function
@given(drawn_cases(), st.sampled_from(PLANS))
@settings(deadline=None, max_examples=5)
def test_random_interpreted_calls_meet_the_error_budget(case, choose):
    """Calls include resets, empty sequences and batches, saturated values, infinity and NaN."""
    case.dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    # The interpreter is slow, so sizes are small, but the hidden units still need several blocks.
    case.H, case.T, case.B = 17 + case.H % 20, min(case.T, 4), min(case.B, 5)
    case.options["num_layers"] = min(case.options["num_layers"], 2)
    case.__post_init__()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "plan_of", lambda hidden_size, *_: choose(hidden_size))
        check_results(case)


class AnyOrder(stack._InTurn):
    """Runs the tasks of concurrent layers in a random order that respects their dependencies."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.tasks, self.last, self.finishing = [], {}, []

    def run(self, layer, after, task):
        awaited = {self.last.get(layer), self.last.get(after)} - {None}
        self.last[layer] = len(self.tasks)
        self.tasks.append((awaited, task))

    def finish(self, task):
        self.finishing.append(task)

    def __exit__(self, *raised):
        waiting = dict(enumerate(self.tasks))
        while waiting:
            ready = [i for i, (awaited, _) in waiting.items() if not awaited & waiting.keys()]
            waiting.pop(self.chance.choice(ready))[1]()
        for task in self.finishing:
            task()


@pytest.fixture
def three_stretches(monkeypatch):
    """Splits the steps of a stack into three stretches, and runs their tasks in random order."""
    stretches = []

    def cut(layers, num_layers, like):
        stretches.append(num_layers)
        return stack._cut(layers.layout, 3)

    monkeypatch.setattr(stack, "_stretches", cut)
    seeds = itertools.count()
    monkeypatch.setattr(stack, "_schedule", lambda *_: AnyOrder(next(seeds)))
    yield
    assert stretches
    assert set(stretches) == {3}


@pytest.mark.parametrize("layout", ["dense", "lengths"])
@pytest.mark.parametrize("resets", [0.0, 0.4])
@pytest.mark.parametrize("wanted", [("input", "hx", "weights"), ("weights",)], ids=str)
@pytest.mark.parametrize("vocabulary", [0, 6])
@pytest.mark.usefixtures("three_stretches")
def test_concurrent_layers_meet_the_error_budget(layout, resets, wanted, vocabulary):
    case = replace(
        LUCKY,
        **{"D": 3, "H": 17, "T": 7, "B": 3, "dtype": torch.float32, "values": "ordinary"},
        options=LUCKY.options | {"num_layers": 3, "bias": resets > 0},
        layout=layout,
        with_hx="hx" in wanted,
        wanted=frozenset(wanted),
        resets=resets,
        vocabulary=vocabulary,
    )
    check_results(case)


@pytest.mark.parametrize("plan", [resident, streamed])
@pytest.mark.parametrize("id", [-1, 6])
def test_an_id_out_of_range_raises_an_error(plan, id, monkeypatch):
    """Unchecked ids out of range would read other memory. Ids in padding may have any value."""
    monkeypatch.setattr(layer, "plan_of", lambda hidden_size, *_: plan(hidden_size))
    ids = torch.zeros(3, 2, dtype=torch.int64)
    weights = [torch.zeros(6, 25), torch.zeros(25, 25)]
    call = (VANILLA.number, ids, (), weights, torch.tensor([3, 2]), None, ops.LAST_STATE, 0)
    ids[2, 1] = id  # past the end of its sequence
    operators.forward(*call)
    ids[1, 1] = id
    with pytest.raises(InterpreterError, match="input must hold ids of rows of the table"):
        operators.forward(*call)


def test_sums_by_token_are_accurate():
    """Long sums are split into parts. Here, token 1 has no rows, and some ids are out of range."""
    ids = torch.randint(-1, 3, (3000,))
    ids[ids == 1] = 3
    rows = torch.randn(3000, 5)
    found = sums.sums_by_token(rows, ids, 3)
    assert found[1].eq(0).all()
    for token in (0, 2):
        exact = rows[ids == token].double()
        error = (found[token] - exact.sum(0)).abs()
        assert (error <= 8 * torch.finfo(torch.float32).eps * exact.abs().sum(0)).all()
