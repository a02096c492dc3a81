"""Compares modules on the GPU kernels with the float64 oracle, in every kind of plan and dtype."""

import itertools
import random
from dataclasses import replace

import hypothesis
import pytest
import torch
from cases import LAYOUTS, Case, draws
from drawn import LUCKY, PLACE, Drawn, check_results, drawn_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import PLANS, resident, streamed
from triton.runtime.errors import InterpreterError

from namernn_fast import FusedRNN, gpu, ops
from namernn_fast.cells import VANILLA
from namernn_fast.gpu import kernels, launching, layer, stack, sums
from namernn_fast.machine import availability
from namernn_fast.testing import ErrorBudget

pytestmark = pytest.mark.covering(1)
DTYPES = availability.TRITON_DTYPES


# (D, H, T, B), with remainders in every block and more than one block of sequences.
SHAPES = [
    (5, 9, 3, 17),
    (5, 17, 6, 3),
    (3, 33, 5, 18),
    (4, 65, 3, 5),
    (2, 130, 4, 9),
    (3, 20, 5, 2),
]
OPTIONS = [
    {"bidirectional": True},
    {"num_layers": 2, "batch_first": True, "bias": False},
    {"nonlinearity": "relu", "batch_first": True},
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_plan_keeps_the_error_budget(plan, dtype, monkeypatch):
    choose = PLANS[plan]
    monkeypatch.setattr(layer, "plan_of", lambda hidden_size, *_: choose(hidden_size))
    budget = ErrorBudget(dtype)
    options = itertools.cycle(OPTIONS)
    for seed, (layout, shape) in enumerate(zip(LAYOUTS, SHAPES, strict=True)):
        if dtype.itemsize == 2 and seed % 2 == (dtype == torch.float16):
            continue
        D, H, T, B = shape
        B = B if choose(H).block_b > 1 else min(B, 3)
        case = Case(D, H, T, B, next(options), layout, seed % 3 > 0, seed)
        case.add_to(budget, dtype)
    budget.check()


@pytest.mark.parametrize("plan", PLANS)
def test_an_infinite_weight_keeps_the_last_gradient_finite(plan, monkeypatch):
    """No gradient reaches the last step through weight_hh, because there is no later step."""
    monkeypatch.setattr(layer, "plan_of", lambda hidden_size, *_: PLANS[plan](hidden_size))
    rnn = FusedRNN(3, 5)
    with torch.no_grad():
        rnn.weight_hh_l0[0, 1] = torch.inf
    x = torch.randn(1, 2, 3, requires_grad=True)
    _, h_n = rnn(x, torch.full((1, 2, 5), 0.5))
    h_n[..., 2:].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.slow
@hypothesis.seed(0)  # without a seed, examples change with every edit of this function
@given(drawn_cases(), st.sampled_from(list(PLANS.values())))
@settings(deadline=None, max_examples=5)
def test_any_call(case, choose):
    """Resets, empty sequences and batches, saturated and non-finite values, omitted arguments."""
    case.dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    # Small, because the interpreter is slow, but more than one block of hidden units.
    case.H, case.T, case.B = 17 + case.H % 20, min(case.T, 4), min(case.B, 5)
    case.options["num_layers"] = min(case.options["num_layers"], 2)
    case.__post_init__()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "plan_of", lambda hidden_size, *_: choose(hidden_size))
        check_results(case)


class AnyOrder(stack._InTurn):
    """Runs tasks in a random order that the streams of layers and their events allow."""

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
    """Cuts every stack into three stretches, and runs tasks in any order that streams allow."""
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
@pytest.mark.usefixtures("three_stretches")
def test_concurrent_layers_keep_the_error_budget(layout, resets, wanted):
    case = replace(
        LUCKY,
        **{"D": 3, "H": 17, "T": 7, "B": 3, "dtype": torch.float32, "values": "ordinary"},
        options=LUCKY.options | {"num_layers": 3, "bias": resets > 0},
        layout=layout,
        with_hx="hx" in wanted,
        wanted=frozenset(wanted),
        resets=resets,
    )
    check_results(case)


class TokenCase(Drawn):
    """A case with token ids. Its features are one-hot, so weight_ih^T is the table.

    `run(FusedRNN, dtype)` calls the operators, once with gradients and once for the last state.
    """

    NOWHERE = (2**62, -1, -(2**62))  # ids in padding, which kernels must not use as rows

    def _draw(self, seed):
        super()._draw(seed)
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(self.D, (self.T, self.B), generator=generator)
        self.rows[..., ::2] = torch.nn.functional.one_hot(self.ids, self.D)

    def _layout(self):
        """Returns row numbers t * B + b in layout order, the sequence_layout and the options."""
        lengths = torch.tensor(self.lengths)
        rows = torch.arange(self.T * self.B).view(self.T, self.B)
        exist = torch.arange(self.T)[:, None] < lengths
        if self.layout == "packed":
            return rows[exist], exist.sum(1), ops.PACKED
        if self.layout == "jagged":
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            return rows.t()[exist.t()], offsets, ops.JAGGED
        lengths = lengths if self.layout == "lengths" else None
        return (
            (rows.t(), lengths, ops.BATCH_FIRST) if self.module.batch_first else (rows, lengths, 0)
        )

    def run(self, layer_class, dtype):
        if layer_class is not FusedRNN:
            return super().run(layer_class, dtype)
        module = self.module
        rows, lengths, options = self._layout()
        options |= ops.BIAS * module.bias + ops.BIDIRECTIONAL * module.bidirectional
        options |= ops.RELU * (module.nonlinearity == "relu")
        past = torch.arange(self.T)[:, None] >= torch.tensor(self.lengths)
        nowhere = torch.tensor(self.NOWHERE).repeat(self.T, self.B)[:, : self.B]
        ids = torch.where(past, nowhere, self.ids).flatten()[rows]
        weights = [w.to(dtype) for w in self.weights]
        for i in range(0, ops.weights_per_layer(options), 4 if module.bias else 2):
            weights[i] = weights[i].t()
        states = None if self.hx is None else [self.hx.to(dtype)]
        reset = self.reset.t() if options & ops.BATCH_FIRST and self.resets else self.reset

        call = (VANILLA.number, ids, states, weights, lengths, reset)
        output, (h_n,), saved = ops.forward(*call, options | ops.WANT_SAVED, 0)
        nothing, (last,), none = ops.forward(*call, options | ops.LAST_STATE, 0)
        assert (nothing.shape, none) == ((0,), [])
        assert torch.equal(last, h_n)
        grads = ops.backward(
            *(*call, options, 0, output, saved),
            *(self.grad_output.to(dtype).flatten(0, 1)[rows], [self.grad_h_n.to(dtype)]),
            *([False, *[True for _ in states or ()]], list(range(module.num_layers))),
        )
        results = {"output": torch.zeros_like(self.grad_output, dtype=dtype), "h_n": h_n}
        results["output"].view(-1, output.shape[-1])[rows] = output
        if states:
            results["grad_hx"] = grads.pop(0)
        for (name, p), grad in zip(module.named_parameters(), grads, strict=True):
            is_table = name.startswith("weight_ih_l0")
            results[f"grad_{name}"] = grad.t() if is_table else grad
            assert results[f"grad_{name}"].shape == p.shape
        return results


def token_case(layout, dtype, **more):
    options = LUCKY.options | {"num_layers": 1} | more.pop("options", {})
    more = {"resets": 0.0} | more
    return TokenCase(
        *(6, 25, 4, 5, options, layout),
        **{"dtype": dtype, "input_place": PLACE, "hx_place": PLACE, "given": LUCKY.given, **more},
        wanted=frozenset(("hx", "weights")),
    )


BOTH = {"bidirectional": True}
TOKEN_CASES = [
    token_case("lengths", torch.float16, options=BOTH | {"batch_first": True}, resets=0.3),
    token_case("packed", torch.float32, options={"num_layers": 2}, resets=0.3),
    token_case("jagged", torch.bfloat16, options=BOTH, with_hx=False),
    token_case("dense", torch.float32, options={"nonlinearity": "relu", "bias": False}),
]


@pytest.mark.covering(0)
@pytest.mark.parametrize("plan", PLANS)
def test_token_ids_keep_the_error_budget(plan, monkeypatch):
    """Runs half of the cases with each plan, so that each kind of plan runs all cases."""
    monkeypatch.setattr(layer, "plan_of", lambda hidden_size, *_: PLANS[plan](hidden_size))
    for case in TOKEN_CASES[list(PLANS).index(plan) % 2 :: 2]:
        check_results(case)


@pytest.mark.usefixtures("three_stretches")
def test_concurrent_token_layers_keep_the_error_budget():
    check_results(token_case("lengths", torch.float32, options={"num_layers": 3}, resets=0.3))


@pytest.mark.parametrize("plan", [resident, streamed])
@pytest.mark.parametrize("id", [-1, 6])
def test_an_id_out_of_range_raises_an_error(plan, id, monkeypatch):
    """Only padding may hold ids out of range, because kernels use all other ids as addresses."""
    monkeypatch.setattr(layer, "plan_of", lambda hidden_size, *_: plan(hidden_size))
    ids = torch.zeros(3, 2, dtype=torch.int64)
    weights = [torch.zeros(6, 25), torch.zeros(25, 25)]
    call = (VANILLA.number, ids, None, weights, torch.tensor([3, 2]), None, ops.LAST_STATE, 0)
    ids[2, 1] = id  # past the end of its sequence
    ops.forward(*call)
    ids[1, 1] = id
    with pytest.raises(InterpreterError, match="input must hold ids of rows of the table"):
        ops.forward(*call)


def test_sums_by_token_are_accurate():
    """Sums are split into parts. Token 1 has no rows, and some rows have ids out of range."""
    ids = torch.randint(-1, 3, (3000,))
    ids[ids == 1] = 3
    rows = torch.randn(3000, 5)
    found = sums.sums_by_token(rows, ids, 3)
    assert found[1].eq(0).all()
    for token in (0, 2):
        exact = rows[ids == token].double()
        error = (found[token] - exact.sum(0)).abs()
        assert (error <= 8 * torch.finfo(torch.float32).eps * exact.abs().sum(0)).all()


@pytest.mark.covering(0)
@pytest.mark.parametrize("hidden_size", [1, 3, 130])
def test_the_chosen_plan_keeps_the_error_budget(hidden_size):
    budget = ErrorBudget(torch.float32)
    for seed in range(draws(hidden_size)):
        Case(3, hidden_size, 3, 2, seed=seed).add_to(budget, torch.float32)
    budget.check()


@pytest.mark.parametrize("seq_len", [1, 4])
@pytest.mark.parametrize("with_hx", [False, True])
def test_consecutive_rows_keep_the_error_budget(seq_len, with_hx):
    """If all rows exist in time-major order, the output itself serves as the previous states."""
    budget = ErrorBudget(torch.float32)
    for seed in range(4):
        case = Case(3, 17, seq_len, 3, {"bidirectional": True}, with_hx=with_hx, seed=seed)
        case.add_to(budget, torch.float32)
    budget.check()


def test_autotune_times_both_passes(monkeypatch, nothing_tuned):
    launched = []
    launch = launching.run
    monkeypatch.setattr(
        launching, "run", lambda kernel, *more: launched.append(kernel) or launch(kernel, *more)
    )

    def measure(call):
        call()
        return 1.0

    gpu.autotune(torch.randn(2, 3, 4), 5, bidirectional=True, measure=measure)
    assert set(launched) == {kernels.forward_kernel, kernels.backward_kernel}
