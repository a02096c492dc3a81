"""Draws random test cases with hypothesis, and checks a fused layer's results."""

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch
from cases import CONTIGUOUS, DTYPES, FUSED, FUSED_LAYOUTS, TORCH, Case
from hypothesis import strategies as st
from kinds import EVERY, TESTED
from layouts import Place

from namernn_fast import ops
from namernn_fast.testing import ErrorBudget

LAYOUTS = ("dense", "unbatched", "packed", "packed unsorted", *FUSED_LAYOUTS)
NON_FINITE = {"NaN": [torch.nan], "infinite": [torch.inf, -torch.inf]}
VALUES = ("ordinary", "zeros", "saturating", "subnormal", *NON_FINITE)
SATURATING = 30  # tanh of an ordinary value times 30 rounds to 1
FEW = 24  # results with fewer numbers are too small to estimate torch's error
SAMPLES = 16  # runs with nudged numbers, whose errors may differ tenfold in small results


class Recorder(oracle.Rounding):
    """Records the largest finite magnitude of any factor in a product. Rounds nothing."""

    largest = 1.0

    def numbers(self, values):
        largest = float(np.abs(values).max(initial=0))
        if not np.isfinite(largest):
            largest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
        self.largest = max(self.largest, largest)
        return values

    computed = numbers


@dataclass
class Drawn(Case):
    """A case drawn by hypothesis, with a dtype, strides, special values and resets."""

    dtype: torch.dtype = torch.float32
    values: str = "ordinary"
    input_place: Place | None = None
    hx_place: Place | None = None
    wanted: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    threads: int = 1
    resets: float = 0.0
    """The fraction of steps with a reset."""
    with_reset_to: bool = False
    """Whether to pass reset_to. Ignored without resets, and by bidirectional layers."""

    def __post_init__(self):
        # Gradients are not comparable in these cases:
        # - Rounding to 16 bits may flip the sign of a relu's argument.
        # - The embedding may be non-finite. Even unused rows reach the gradient of weight_ih.
        # - Only c_n of a leaky cell has a gradient, and the kernel multiplies zero by NaN. Cells of
        #   tests do that in more cases.
        self.gradients_comparable = not (
            (self.has_kinks and self.dtype.itemsize == 2)
            or (self.vocabulary and self.values in NON_FINITE)
            or (self.cell_lists.own and self.values in NON_FINITE and self.given == {"c_n"})
            or (self.cell in TESTED and self.values in NON_FINITE)
        )
        self.scale = {"saturating": SATURATING, "subnormal": torch.finfo(self.dtype).tiny}.get(
            self.values, 1
        )
        with np.errstate(all="ignore"):
            super().__post_init__()

    def _draw(self, seed):
        super()._draw(seed)
        generator = torch.Generator().manual_seed(seed)
        if self.layout in FUSED_LAYOUTS:  # some sequences may be empty, but not all
            empty = torch.rand(self.B, generator=generator) < 0.2
            self.lengths = [
                0 if is_empty and length < self.T else length
                for is_empty, length in zip(empty.tolist(), self.lengths, strict=True)
            ]
        if self.resets and self.B:
            self.reset = torch.rand(self.T, self.B, generator=generator) < self.resets
            if self.with_reset_to and not self.module.bidirectional:
                self.reset_to = [
                    torch.randn(self.T, *like.shape, dtype=torch.float64, generator=generator)
                    for like in self.grads_of_last
                ]
        grads = self.grads_of_results
        for name in grads.keys() - self.given:
            grads.pop(name).zero_()
        beside = self.beside.values()
        inputs = [self.rows[..., ::2], *self.initial, *self.reset_to, *beside]
        if self.values == "zeros":
            for tensor in (*inputs, *self.weights, *grads.values()):
                tensor[torch.rand(tensor.shape, generator=generator) < 0.5] = 0
        elif self.values in NON_FINITE:
            # Keep weights finite if rounding may zero a relu's result, because 0 * infinity is NaN.
            more = [*self.weights, *grads.values()] if self.gradients_comparable else []
            for value in NON_FINITE[self.values]:
                tensor = self._choice([*inputs, *more], generator)
                if tensor.numel():
                    tensor[tuple(self._choice(range(n), generator) for n in tensor.shape)] = value
        else:
            # Scaling the input and the biases saturates the gates. Gated and leaky cells may keep a
            # large state for many steps. The gradients of their gates grow with the state and would
            # overflow in float16, so the states of these cells are not scaled.
            keeps_state = self.cell_lists.kept > 0 and self.values == "saturating"
            for tensor in (
                *(inputs[:1] if keeps_state else inputs),
                *(w for w in self.weights if w.dim() == 1),
            ):
                tensor *= self.scale

    @staticmethod
    def _choice(items, generator):
        return items[int(torch.randint(len(items), (), generator=generator))]

    @property
    def is_prepared(self):
        """Whether the case runs a prepared layer. Half of the inference cases do."""
        takes_ids_and_more = self.vocabulary and self.beside
        is_equation = self.cell_lists.program is not None
        inference = not self.wanted and self.seed % 2 == 1
        return inference and not takes_ids_and_more and not is_equation

    def compare(self, forward, backward):
        """Checks that results are finite where torch's are. Adds finite results to the budgets.

        Exceptions:

        - A gradient may be NaN where torch's is infinite: if h is rounded to 1, an infinite
          gradient times 1 - h^2 is NaN.
        - A bfloat16 result must be finite where the oracle's is, even if torch's is NaN: on AMX,
          NaN leaks from rows of other sequences in torch's layer.
        - Gradients are not compared if `gradients_comparable` is false.
        """
        self.compared = {}
        ours, theirs = (self.run(layers[self.cell], self.dtype) for layers in (FUSED, TORCH))
        recorder = Recorder()
        with np.errstate(all="ignore"):
            reference = self.run_oracle(self.dtype, recorder)
        self.largest = recorder.largest
        assert ours.keys() == theirs.keys()
        for name, wanted in theirs.items():
            is_grad = name.startswith("grad")
            if is_grad and not self.gradients_comparable:
                continue
            got, exact = ours[name], reference[name]
            assert got.shape == wanted.shape == exact.shape, name
            exact_is_finite = torch.from_numpy(np.isfinite(exact))
            should_be_finite = wanted.isfinite()
            if self.dtype == torch.bfloat16:
                should_be_finite |= exact_is_finite
            assert torch.equal(got.isfinite(), should_be_finite), (
                f"{name} is non-finite in unexpected places"
            )
            if not is_grad:
                expected = wanted
                if self.dtype == torch.bfloat16:
                    expected = torch.where(wanted.isnan(), torch.from_numpy(exact).to(got), wanted)
                infinite = [value[~should_be_finite].nan_to_num(0.0) for value in (got, expected)]
                assert torch.equal(*infinite), f"{name} has an unexpected NaN or infinity"
            finite = should_be_finite & wanted.isfinite() & exact_is_finite
            budget = backward if is_grad else forward
            mask = finite.numpy()
            budget.add(name, got[finite], wanted[finite], exact[mask])
            self.compared[name] = budget, exact, mask

    def add_sample(self, sample):
        """Runs the oracle with nudged numbers, and adds its results to the budgets."""
        numbers = torch.finfo(self.dtype)
        sums = torch.finfo(torch.promote_types(self.dtype, torch.float32))
        nudges = oracle.Nudges(numbers.eps, numbers.tiny, sums.eps, [self.seed, sample])
        with np.errstate(all="ignore"):
            nearby = self.run_oracle(self.dtype, nudges)
        for name, (budget, exact, compared) in self.compared.items():
            mask = compared & np.isfinite(nearby[name])
            budget.add_nearby(name, sample, nearby[name][mask], exact[mask])


places = st.builds(
    Place,
    st.permutations(range(3)).map(tuple),
    *[st.tuples(*[st.integers(0, 2)] * 3)] * 2,
    st.tuples(*[st.integers(1, 2)] * 3),
)
sizes = st.one_of(st.integers(1, 9), st.integers(1, 140))  # the largest span more than two panels


@st.composite
def drawn_cases(draw, cell="rnn"):
    layout = draw(st.sampled_from(LAYOUTS))
    batch = {"dense": st.integers(0, 12), "unbatched": st.just(1)}
    vocabulary = draw(st.sampled_from((0, 0, 0, 1, 7, 300)))
    lists = EVERY[cell].cell
    known = lists.nonlinearities
    nonlinearity = {"nonlinearity": st.sampled_from(known)} if len(known) > 1 else {}
    hidden_size, projections = draw(sizes), {}
    if lists.can_project and hidden_size > 1:
        proj_size = st.one_of(st.just(0), st.integers(1, hidden_size - 1))
        projections = {"proj_size": proj_size}
    options = st.fixed_dictionaries(
        nonlinearity
        | projections
        | {
            "bias": st.booleans(),
            "batch_first": st.booleans(),
            "bidirectional": st.booleans(),
            "num_layers": st.integers(1, 3),
        }
    )
    return Drawn(
        D=draw(sizes),
        H=hidden_size,
        T=draw(st.one_of(st.integers(1, 4), st.integers(1, 40))),
        B=draw(batch.get(layout, st.integers(1, 12))),
        options=draw(options),
        layout=layout,
        with_hx=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
        vocabulary=vocabulary,
        padding_idx=draw(st.sampled_from((None, 0, -1))) if vocabulary else None,
        cell=cell,
        dtype=draw(st.sampled_from(DTYPES)),
        values=draw(st.sampled_from(VALUES)),
        input_place=draw(places),
        hx_place=draw(places),
        wanted=draw(st.frozensets(st.sampled_from(("input", "hx", "weights")))),
        given=draw(
            st.frozensets(
                st.sampled_from(("output", "h_n", "c_n", "n_n", "m_n")[: 1 + len(lists.states)]),
                min_size=1,
            )
        ),
        threads=draw(st.integers(1, 3)),
        resets=0.0 if layout == "jagged" else draw(st.sampled_from((0.0, 0.0, 0.1, 0.6))),
        with_reset_to=draw(st.booleans()),
    )


@contextmanager
def threads(count):
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


# By luck, `nn.RNN` errs by only 2e-15 and one nudged run by 4e-15. Most nudged runs err by 6e-14.
LUCKY = Drawn(
    D=63,
    H=1,
    T=1,
    B=1,
    options={
        "nonlinearity": "tanh",
        "bias": True,
        "batch_first": False,
        "bidirectional": False,
        "num_layers": 3,
    },
    layout="jagged",
    seed=124,
    dtype=torch.float64,
    values="saturating",
    input_place=CONTIGUOUS,
    hx_place=CONTIGUOUS,
    wanted=frozenset(("input", "hx", "weights")),
    given=frozenset(("output", "h_n")),
)


def check_results(case):
    """Checks that a case's results meet their budgets, and are finite where torch's are.

    The backward pass flushes subnormal factors to zero, and so does the forward pass if the kernel
    multiplies bfloat16 numbers. Flushing changes a product by at most the smallest normal number
    times the other factor. The floor of the budgets allows for the sum of these changes.

    Saturated units and growing states amplify rounding errors. So if a budget is exceeded, the
    oracle runs `SAMPLES` times with nudged numbers, and the changes in its results are allowed too.
    """
    compute = torch.finfo(torch.promote_types(case.dtype, torch.float32))
    # The maximum number of terms in a sum.
    longest = max(case.D, 2 * case.cell_lists.gates * case.H)
    flushed = compute.tiny * case.T * max(1, case.B) * longest
    multiplies_pairs = ops.cpu_kernel(case.dtype) in ("amx", "avx512_bf16")
    forward, backward = ErrorBudget(case.dtype), ErrorBudget(case.dtype)
    smallest = case.H
    if "input" in case.wanted:
        smallest = min(smallest, (case.vocabulary or case.T * max(1, case.B)) * case.D)
    draws = [replace(case, seed=case.seed + draw) for draw in range(-(-FEW // smallest))]
    with threads(case.threads):
        for draw in draws:
            draw.compare(forward, backward)
    backward.floor = flushed * max(draw.largest for draw in draws)
    forward.floor = backward.floor if multiplies_pairs else 0.0
    if forward.exceeded() or backward.exceeded():
        for draw, sample in itertools.product(draws, range(SAMPLES)):
            draw.add_sample(sample)
    forward.check()
    if backward.results:
        backward.check()
