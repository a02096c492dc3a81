"""Draws cases with hypothesis, and checks a fused layer's results."""

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch
from cases import FUSED, NO_IDS, TORCH, Case, named_states
from hypothesis import strategies as st
from kinds import KINDS, map_states, tensors_in
from torch.nn.functional import embedding
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

from namernn_fast import ops
from namernn_fast.cells import CELLS
from namernn_fast.testing import ErrorBudget

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUSED_LAYOUTS = ("lengths", "jagged")  # layouts that torch's layers do not accept
LAYOUTS = ("dense", "unbatched", "packed", "packed unsorted", *FUSED_LAYOUTS)
NON_FINITE = {"NaN": [torch.nan], "infinite": [torch.inf, -torch.inf]}
VALUES = ("ordinary", "zeros", "saturating", "subnormal", *NON_FINITE)
SATURATING = 30  # tanh of an ordinary value times 30 rounds to 1
FEW = 24  # a result with fewer numbers is too small to sample the error of torch's layer
SAMPLES = 16  # nudged runs of the oracle; on small results, their effects differ by a factor of ten


@dataclass(frozen=True)
class Place:
    """A tensor's place in memory: a slice of a bigger tensor, with dimensions in any order."""

    order: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, tensor):
        """Returns a copy of `tensor` in this place, surrounded by NaN or out-of-range ids."""
        dims = range(tensor.dim())
        order = [d for d in self.order if d in dims]
        ends = [self.before[d] + self.stride[d] * tensor.shape[d] for d in dims]
        outside = torch.nan if tensor.is_floating_point() else NO_IDS[0]
        whole = torch.full([ends[d] + self.after[d] for d in order], outside, dtype=tensor.dtype)
        whole = whole.permute([order.index(d) for d in dims])
        part = whole[tuple(slice(self.before[d], ends[d], self.stride[d]) for d in dims)]
        return part.copy_(tensor)


class Recorder(oracle.Rounding):
    """Records the largest absolute value among factors of products, and does not round."""

    largest = 1.0

    def numbers(self, values):
        finite = values[np.isfinite(values)]
        self.largest = max(self.largest, float(np.abs(finite).max(initial=0)))
        return values

    computed = numbers


@dataclass
class Drawn(Case):
    """A case with a dtype, places in memory, special values, resets and a choice of gradients."""

    dtype: torch.dtype = torch.float32
    values: str = "ordinary"
    input_place: Place | None = None
    hx_place: Place | None = None
    wanted: frozenset[str] = frozenset()
    """The arguments that need a gradient, among `input` (and noise), `hx` (and reset_to) and
    `weights`."""
    given: frozenset[str] = frozenset()
    """The results that receive a gradient, among `output`, `h_n` and `c_n`."""
    threads: int = 1
    resets: float = 0.0
    """The fraction of steps with a reset."""
    with_reset_to: bool = False
    """Whether states are given for after the resets, if there are any and one direction."""

    def __post_init__(self):
        # If rounding to 16 bits may move a relu's argument across the kink, two gradients are
        # correct. Non-finite rows of the embedding reach the gradient of weight_ih even if no id
        # names them. If r of a leaky cell has no gradient, the kernel uses zeros, and zero times
        # NaN is NaN.
        self.gradients_comparable = not (
            (self.has_kinks and self.dtype.itemsize == 2)
            or (self.vocabulary and self.values in NON_FINITE)
            or (KINDS[self.cell].bits and self.values in NON_FINITE and self.given == {"c_n"})
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
        grads = {"output": self.grad_output, **named_states("{}_n", self.grads_of_last)}
        for name in grads.keys() - self.given:
            grads.pop(name).zero_()
        noise = [] if self.noise is None else [self.noise]
        inputs = [self.rows[..., ::2], *tensors_in(self.states), *self.reset_to, *noise]
        if self.values == "zeros":
            for tensor in (*inputs, *self.weights, *grads.values()):
                tensor[torch.rand(tensor.shape, generator=generator) < 0.5] = 0
        elif self.values in NON_FINITE:
            # With a non-finite weight, outputs would depend on each relu's side of the kink.
            more = [*self.weights, *grads.values()] if self.gradients_comparable else []
            for value in NON_FINITE[self.values]:
                tensor = self._choice([*inputs, *more], generator)
                if tensor.numel():
                    tensor[tuple(self._choice(range(n), generator) for n in tensor.shape)] = value
        else:
            # A cell with gates can keep a large state for many steps, and the gradients of its
            # gates grow with the state until they overflow in float16. So scale the input and the
            # biases, which saturates the gates, but not the initial states.
            keeps_state = CELLS[self.cell].kept_blocks > 0 and self.values == "saturating"
            for tensor in (
                *(inputs[:1] if keeps_state else inputs),
                *(w for w in self.weights if w.dim() == 1),
            ):
                tensor *= self.scale

    @staticmethod
    def _choice(items, generator):
        return items[int(torch.randint(len(items), (), generator=generator))]

    def run(self, layer_class, dtype):
        """Runs a layer; returns output padded to (T, B, ...), last states and wanted gradients."""
        module = layer_class(self.D, self.H, dtype=dtype, **self.options)
        with torch.no_grad():
            for p, value in zip(module.parameters(), self.weights, strict=True):
                p.copy_(value)
        is_fused = layer_class is FUSED[self.cell]
        # Half of the calls for inference run a prepared layer.
        is_prepared = is_fused and not self.wanted and self.seed % 2 == 1
        is_prepared &= not (self.vocabulary and self.noise is not None)
        if is_prepared and not self.vocabulary:
            module = module.prepare()
        module.requires_grad_("weights" in self.wanted)

        unbatched = self.layout == "unbatched"

        def with_layout(rows):  # converts (T, B, ...) to the layer's shape and back
            if unbatched:
                return rows[:, 0] if rows.dim() == 3 else rows.unsqueeze(1)
            return rows.transpose(0, 1) if module.batch_first else rows

        rows = self.rows.to(dtype)[..., ::2]
        leaf = self.input_place(rows if self.vocabulary else with_layout(rows))
        leaf.requires_grad_("input" in self.wanted)
        x, ids = leaf, {}
        if self.vocabulary:
            x = with_layout(self.ids.unsqueeze(-1)).squeeze(-1)
            if is_prepared:
                x, module = self.input_place(x), self._prepared_model(module, leaf)
            elif is_fused:
                x, ids = self.input_place(x), {"embedding": leaf, "padding_idx": self.padding_idx}
            else:
                x = embedding(x, leaf, self.padding_idx)

        def placed(state):
            state = self.hx_place(state[:, 0].to(dtype) if unbatched else state.to(dtype))
            return state.requires_grad_("hx" in self.wanted)

        hx = None if self.states is None else map_states(self.states, placed)
        step = 1 + self.seed % 2  # with 2, the features are not adjacent
        reset_to = [
            states.to(dtype).repeat_interleave(step, -1)[..., ::step] for states in self.reset_to
        ]
        for states in reset_to:
            states.requires_grad_("hx" in self.wanted)
        noise = self._noise(dtype)
        if is_fused or (self.reset is None and self.layout not in FUSED_LAYOUTS):
            input, more = self._arguments(x, with_layout)
            if noise is not None:
                more["noise"] = self._arguments(with_layout(noise), with_layout)[0]
            if reset_to:
                states = [self._as_reset_to(states, with_layout) for states in reset_to]
                more["reset_to"] = tuple(states) if self.has_cell_state else states[0]
            output, last = module(input, hx, **more, **ids)
            if isinstance(output, PackedSequence):
                output, _ = pad_packed_sequence(output, total_length=self.T)
            elif output.is_nested:
                output = pad_sequence(output.unbind())
            else:
                output = with_layout(output)
            last = tensors_in(last)
            if unbatched:
                last = [h.unsqueeze(1) for h in last]
        else:
            states = [h.unsqueeze(1) if unbatched else h for h in tensors_in(hx)]
            output, last = self._run_pieces(module, with_layout(x), states, reset_to, noise)
        results = {"output": output, **named_states("{}_n", last)}

        if self.wanted and output.requires_grad:
            names = sorted(self.given)
            torch.autograd.backward(
                [results[name] for name in names],
                [getattr(self, f"grad_{name}").to(dtype) for name in names],
            )
        if "input" in self.wanted and self.vocabulary:
            results["grad_embedding"] = leaf.grad
        elif "input" in self.wanted:
            results["grad_input"] = with_layout(leaf.grad)
        if "input" in self.wanted and noise is not None:
            results["grad_noise"] = noise.grad
        if "hx" in self.wanted:
            grads = [h.grad.unsqueeze(1) if unbatched else h.grad for h in tensors_in(hx)]
            results |= named_states("grad_{}x", grads)
            results |= named_states("grad_reset_to_{}", [h.grad for h in reset_to])
        if "weights" in self.wanted:
            results.update((f"grad_{name}", p.grad) for name, p in module.named_parameters())
        return {name: value.detach() for name, value in results.items()}

    def _noise(self, dtype):
        """Returns the noise (T, B, features), or None."""
        if self.noise is None:
            return None
        return self.noise.to(dtype, copy=True).requires_grad_("input" in self.wanted)

    def _prepared_model(self, layer, rows):
        """Returns a prepared token layer with this layer and these rows of the embedding."""
        model = KINDS[self.cell].tokens(self.vocabulary, self.D, self.H, **self.options)
        model.rnn = layer
        model.embedding = torch.nn.Embedding.from_pretrained(rows, padding_idx=self.padding_idx)
        return model.prepare()

    def _arguments(self, x, with_layout):
        """Returns the input in the case's layout, and keyword arguments for lengths and resets."""
        more = {}
        if self.reset is not None:
            more["reset"] = with_layout(self.reset.unsqueeze(-1)).squeeze(-1)
        if self.layout.startswith("packed"):
            first = self.options["batch_first"]
            is_sorted = self.layout == "packed"
            x = pack_padded_sequence(x, self.lengths, first, enforce_sorted=is_sorted)
        elif self.layout == "lengths":
            past = torch.arange(self.T)[:, None] >= torch.tensor(self.lengths)
            if x.is_floating_point():
                x = x.masked_fill(with_layout(past.unsqueeze(-1)), torch.nan)
            else:
                x = x.masked_fill(with_layout(past.unsqueeze(-1)).squeeze(-1), NO_IDS[1])
            more["lengths"] = self.lengths
        elif self.layout == "jagged":
            sequences = x.unbind(0 if self.options["batch_first"] else 1)
            x = torch.nested.as_nested_tensor(
                [s[:length] for s, length in zip(sequences, self.lengths, strict=True)],
                layout=torch.jagged,
            )
        return x, more

    def _as_reset_to(self, states, with_layout):
        """Returns states (T, layers, B, H) in the shape of a layer's reset_to."""
        if self.layout == "unbatched":
            return states.squeeze(2)
        return with_layout(states.transpose(1, 2)) if self.options["batch_first"] else states

    def _run_pieces(self, module, x, states, reset_to, noise):
        """Runs a layer that accepts neither resets nor lengths, on a packed batch of pieces.

        Returns:
            The output (T, B, ...), and the list of last states.
        """
        pieces = self.pieces
        starts = list(states) or [torch.zeros_like(g, dtype=x.dtype) for g in self.grads_of_last]
        begin = torch.from_numpy(pieces.begin).unsqueeze(-1)
        initial = tuple(torch.where(begin, h[:, pieces.sequence], 0.0) for h in starts)
        if reset_to:
            times, b, restarted = map(torch.from_numpy, pieces.restarts)
            initial = tuple(
                h.index_copy(1, restarted, after[times, :, b].transpose(0, 1))
                for h, after in zip(initial, reset_to, strict=True)
            )
        more = {}
        if noise is not None:
            more["noise"] = pack_sequence(pieces.of(noise), enforce_sorted=False)
        outputs, last = module(
            pack_sequence(pieces.of(x), enforce_sorted=False),
            initial if self.has_cell_state else initial[0],
            **more,
        )
        outputs, _ = pad_packed_sequence(outputs)
        at, b, ended = pieces.places(pieces.end)
        final = [h.clone() for h in starts]
        for state, piece_states in zip(final, tensors_in(last), strict=True):
            state[at, b] = piece_states[at, ended]
        return pieces.put(outputs.unbind(1), x.new_zeros(*x.shape[:2], outputs.shape[-1])), final

    def compare(self, forward, backward):
        """Checks that results are finite where torch's are, and adds finite values to budgets.

        Some differences from torch are allowed:

        - A gradient may be NaN instead of infinite: if rounding makes h 1, an infinite gradient
          times 1 - h^2 is NaN.
        - In bfloat16, a result must be finite if the oracle's is, even if torch's is NaN: on AMX,
          NaN spreads to other sequences' rows in torch's layer.
        - Gradients are not compared at all if `gradients_comparable` is false.
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
        """Adds the results of one nudged run of the oracle to the budgets of compared results."""
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
PLACE = Place((0, 1, 2), *[(0, 0, 0)] * 2, (1, 1, 1))  # a contiguous tensor
sizes = st.one_of(st.integers(1, 9), st.integers(1, 140))  # the largest span more than two panels


@st.composite
def drawn_cases(draw, cell="rnn"):
    layout = draw(st.sampled_from(LAYOUTS))
    batch = {"dense": st.integers(0, 12), "unbatched": st.just(1)}
    vocabulary = draw(st.sampled_from((0, 0, 0, 1, 7, 300)))
    known = CELLS[cell].nonlinearities
    nonlinearity = {"nonlinearity": st.sampled_from(known)} if len(known) > 1 else {}
    hidden_size, projections = draw(sizes), {}
    if CELLS[cell].can_project and hidden_size > 1:
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
                st.sampled_from(("output", "h_n", "c_n")[: 1 + len(CELLS[cell].states)]),
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


# By luck, `nn.RNN` errs by only 2e-15 and one nudged run by 4e-15; other nudged runs err by 6e-14.
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
    input_place=PLACE,
    hx_place=PLACE,
    wanted=frozenset(("input", "hx", "weights")),
    given=frozenset(("output", "h_n")),
)


def check_results(case):
    """Checks that a case's results keep their budgets, and are finite where torch's are.

    The backward pass treats subnormal numbers as zero, and so does the forward pass on instructions
    that multiply bfloat16. A product whose factor becomes zero changes by at most the smallest
    normal number times the other factor, and a sum by the total of these changes.

    Some cases amplify rounding errors, because units are saturated or states grow at every step. So
    if a budget is exceeded, `SAMPLES` nudged runs of the oracle measure what rounding can change,
    and the budgets grow accordingly.
    """
    compute = torch.finfo(torch.promote_types(case.dtype, torch.float32))
    # The maximum number of terms in a sum.
    longest = max(case.D, 2 * CELLS[case.cell].weight_blocks * case.H)
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
