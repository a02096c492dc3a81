"""Tests cells that are written as equations: random equations, mutated programs, and operations."""

import functools
import random
import re
import statistics
from dataclasses import dataclass

import pytest
import torch
from drawn import check_results, drawn_cases
from equation_cells import MORE, TWINS
from hypothesis import given, settings, strategies
from kinds import needs_extension
from random_steps import cells, compiled_or_none

from namernn_fast import ops
from namernn_fast.equations import EQUATION, Program, products_of_h
from namernn_fast.equations.program import ARITY, OPERATIONS, execute, operands

pytestmark = needs_extension
CELLS = {name: cell for name, (cell, _) in TWINS.items()} | MORE
SLOW = ("everything",)
BATCH, H = 3, 8


@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CELLS]
)
@given(data=strategies.data())
@settings(deadline=None, max_examples=settings.default.max_examples // 8)
def test_random_calls_meet_the_error_budget(cell, data):
    check_results(data.draw(drawn_cases(cell)))


@dataclass
class Step:
    """Random arguments for one step of a program, run by the operators and in ATen operators."""

    program: Program
    seed: int
    heads: int = 1

    def __post_init__(self):
        program, generator = self.program, torch.Generator().manual_seed(self.seed)

        def drawn(*size):
            return torch.randn(*size, dtype=torch.float64, generator=generator)

        rows = program.gates * H
        self.sums = drawn(1, BATCH, rows)
        self.states = [drawn(1, BATCH, H) for _ in range(program.states)]
        self.inputs = [drawn(1, BATCH, 1 if is_number else H) for _, is_number in program.inputs]
        self.biases = [drawn(rows) for _ in range(1 + program.has_weight_hh)]
        self.weight_hh = [drawn(rows, H // self.heads)] * program.has_weight_hh
        self.own = [drawn(blocks, H) if blocks > 1 else drawn(H) for _, blocks in program.own]
        self.grads = [drawn(1, BATCH, H) for _ in range(program.states)]

    def run(self, text):
        """Returns the results of the operators, and the gradients of all arguments."""
        weights = [*self.weight_hh, *self.biases, *self.own]
        tensors = [*self.states, *self.inputs, *weights]
        options = ops.BIAS | ops.SUMS | ops.STATES | ops.WANT_SAVED
        options |= ops.INPUTS * bool(self.inputs)
        call = EQUATION, self.sums, tensors, None, None, options, 0
        output, last, saved = ops.forward(*call, text)
        wanted = [True] * (1 + len(self.states) + len(self.inputs))
        grads = ops.backward(*call, output, saved, None, self.grads, wanted, [0], text)
        return [*last, *grads]

    def evaluate(self, nudge=0.0):
        """Returns the same results, evaluated in ATen operators, and their largest numbers.

        `nudge` changes each argument by up to this relative amount.
        """
        program, gates = self.program, self.program.gates
        nudged = functools.partial(_nudged, nudge)
        previous = [nudged(state[0]) for state in self.states]
        x, u = (nudged(self.sums[0]) + self.biases[0]).split(H, 1), ()
        if program.has_weight_hh:
            u = products_of_h(previous[0], self.weight_hh[0], self.biases[1], gates)
        sums = program.sums(x, u)
        inputs = [nudged(rows[0]) for rows in self.inputs]
        own = [row for values in self.own for row in values.view(-1, H)]
        like = sums[0]
        values = operands(program, like, s=sums, p=previous, i=inputs, o=own)
        execute(program.forward, values, like)
        states = [values[f"h{k}"].expand_as(like) for k in range(program.states)]
        first = program.kept - program.states
        values |= {f"k{first + k}": state for k, state in enumerate(states) if k}
        values |= {"y0": states[0]} | {f"g{k}": nudged(g[0]) for k, g in enumerate(self.grads)}
        execute(program.backward, values, like)
        dz = [values[f"d{k}"].expand_as(like) for k in range(gates + program.separate)]
        of_x = torch.cat([*dz[program.separate : gates], *dz[: program.separate]], 1)
        of_u = torch.cat(dz[program.separate :], 1)
        bypass = [values.get(f"q{k}", like.new_zeros(())) for k in range(program.states)]
        of_states = [grad.expand_as(like) for grad in bypass]
        of_weights = [of_x.sum(0)]
        if program.has_weight_hh:
            of_h, of_weight_hh = self.gradients_of_products(previous[0], of_u)
            of_states[0] = of_states[0] + of_h
            of_weights = [of_weight_hh, of_x.sum(0), of_u.sum(0)]
        of_inputs = [values[f"j{k}"].expand_as(rows) for k, rows in enumerate(inputs)]
        blocks = [values[f"w{k}"].expand_as(like).sum(0) for k in range(len(own))]
        counts = [values.shape[0] if values.dim() == 2 else 1 for values in self.own]
        of_own, at = [], 0
        for count, parameter in zip(counts, self.own, strict=True):
            of_own.append(torch.stack(blocks[at : at + count]).view_as(parameter))
            at += count
        largest = max(
            value.abs().nan_to_num(0, 0, 0).max().item()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        )
        results = [*states, of_x, *of_states, *of_inputs, *of_weights, *of_own]
        return [result.detach() for result in results], largest

    def gradients_of_products(self, h, of_u):
        """Returns the gradients of h and weight_hh."""
        size = H // self.heads
        dz = of_u.view(BATCH, self.program.gates, self.heads, size)
        weight_hh = self.weight_hh[0].view(self.program.gates, self.heads, size, size)
        of_h = torch.einsum("bgni,gnij->bnj", dz, weight_hh).reshape(BATCH, H)
        of_weight_hh = torch.einsum("bgni,bnj->gnij", dz, h.view(BATCH, self.heads, size))
        return of_h, of_weight_hh.reshape(-1, size)

    def check(self, text):
        """Compares the operators with ATen, where small changes of the arguments matter little.

        Returns:
            The share of the results that were compared.
        """
        exact, largest = self.evaluate()
        nearby, _ = self.evaluate(1e-12)
        compared = total = 0
        for got, wanted, near in zip(self.run(text), exact, nearby, strict=True):
            got = got.reshape_as(wanted)
            change = (near - wanted).abs()
            stable = _are_equal(wanted, near) | (change <= 1e-6 * (1 + wanted.abs()))
            allowed = 1e3 * change + 1e-9 * wanted.abs() + 1e-12 * (1 + largest)
            fine = _are_equal(got, wanted) | ((got - wanted).abs() <= allowed) | ~stable
            assert fine.all(), (got[~fine], wanted[~fine])
            compared, total = compared + stable.sum().item(), total + stable.numel()
        return compared / total


def _are_equal(a, b):
    return (a == b) | (a.isnan() & b.isnan())


def _nudged(nudge, values):
    return values * (1 + nudge * torch.linspace(-1, 1, values.numel()).view_as(values))


@pytest.mark.parametrize("cell", [*CELLS])
def test_programs_match_aten_operators(cell):
    text = CELLS[cell].program
    for seed in range(4):
        assert Step(Program.parse(text), seed).check(text) > 0.99


@given(cells(), strategies.sampled_from([1, 2, H]), strategies.integers(0, 1000))
@settings(deadline=None)
def test_random_equations_match_aten_operators(cell, heads, seed):
    """`tests/equations` compares the same equations in ATen operators with autograd."""
    program = compiled_or_none(*cell)
    if program is not None:
        step = Step(program, seed, heads if program.has_heads else 1)
        assert step.check(program.text) > 0.5


MUTATIONS = 20_000 if settings.default.max_examples > 1000 else 700
"""How many mutated programs to try: more in `make test FUZZ=1`."""
WORDS = (
    *(*OPERATIONS, "hidden", "number", "forward", "backward", "end", "x", "-1", "9" * 20, "7f" * 8),
    *map(str, (0, 1, 2, 3, 4, 5, 8, 9, 63, 64, 65, 1024)),
    *(letter + index for letter in "rmvcnsphkioygdqjwz" for index in ("0", "1", "4", "64")),
)


def mutated(text, generator):
    """Returns a program with one random change. About every third remains valid."""
    tokens = re.split(r"([ \n])", text)
    places = [k for k, token in enumerate(tokens) if token.strip()]
    k, other = generator.choices(places, k=2)
    kind = generator.randrange(10)
    if kind == 0:
        del tokens[k]
    elif kind == 1:
        tokens[k] += " " + tokens[other]
    elif kind == 2:
        tokens[k], tokens[other] = tokens[other], tokens[k]
    elif kind == 3:
        tokens[k] = generator.choice(WORDS)
    elif kind < 7:
        k = generator.choice([k for k in places if tokens[k] in OPERATIONS])
        arity = ARITY[tokens[k]]
        tokens[k] = generator.choice([name for name in OPERATIONS if ARITY[name] == arity])
    else:
        operands = [k for k in places if re.fullmatch(r"[a-z]\d+", tokens[k])]
        k, other = generator.choices(operands, k=2)
        tokens[k] = tokens[other]
    return "".join(tokens)


def test_mutated_programs_are_rejected_or_match_aten_operators():
    """Also prints how many programs are refused."""
    generator, refused, shares = random.Random(0), 0, []
    for seed in range(MUTATIONS):
        cell = generator.choice([*CELLS])
        original = CELLS[cell].program
        text = mutated(original, generator)
        try:
            step = Step(Program.parse(text), seed)
        except ValueError:
            with pytest.raises(RuntimeError):
                Step(Program.parse(original), seed).run(text)
            refused += 1
            continue
        try:
            step.run(text)
        except RuntimeError:
            refused += 1
            continue
        shares.append(step.check(text))
    assert statistics.mean(shares) > 0.99
    print(f"{refused} of {MUTATIONS} programs are refused")
    assert MUTATIONS / 10 < refused < MUTATIONS * 9 / 10


def test_names_have_at_most_64_letters():
    text = next(iter(CELLS.values())).program
    longest, too_long = (
        re.sub(r"^name \w+", "name " + "a" * n, text, flags=re.M) for n in (64, 65)
    )
    step = Step(Program.parse(longest), seed=0)
    assert step.check(longest) > 0.99
    with pytest.raises(RuntimeError, match="at most 64 letters"):
        step.run(too_long)
    with pytest.raises(ValueError, match="program"):
        Program.parse(too_long)
