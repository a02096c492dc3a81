"""Compares fused layers with torch's layers and the oracle on cases that hypothesis draws.

`make test` runs the same few examples every time; `make test FUZZ=1` runs thousands of new ones.
"""

from dataclasses import replace

import pytest
import torch
from drawn import LUCKY, check_results, drawn_cases
from hypothesis import example, given, settings, strategies

from namernn_fast.cells import CELLS

# Without bias and hx, and with inputs that are often zero, states decay to the kink of relu at 0.
FADING = replace(
    LUCKY,
    H=120,
    T=39,
    B=12,
    options=dict(LUCKY.options, nonlinearity="relu", bias=False, num_layers=1),
    layout="packed unsorted",
    with_hx=False,
    seed=721,
    dtype=torch.float32,
    values="zeros",
    D=1,
)


# The input is subnormal, but the product of the input and a gradient is a normal number.
FLUSHED = replace(
    LUCKY,
    D=2,
    options=dict(LUCKY.options, bias=False, num_layers=1),
    layout="dense",
    with_hx=False,
    seed=0,
    dtype=torch.float32,
    values="subnormal",
    wanted=frozenset(("weights",)),
)

# One state is infinite. On AMX, `nn.RNN` returns NaN for it, because NaN leaks from another row.
INFINITE = replace(
    LUCKY,
    D=76,
    H=116,
    T=4,
    B=11,
    options=dict(FADING.options, num_layers=2),
    layout="packed unsorted",
    with_hx=False,
    seed=531,
    dtype=torch.bfloat16,
    values="infinite",
    wanted=frozenset(),
)

# For one sequence, `nn.RNN` splits each sum over SIMD lanes, which makes its errors small.
ALONE = replace(
    LUCKY,
    D=21,
    H=140,
    T=21,
    options=dict(LUCKY.options, num_layers=1),
    layout="unbatched",
    seed=1,
    dtype=torch.float32,
    values="ordinary",
    wanted=frozenset(),
)


@given(drawn_cases())
@example(LUCKY)
@example(ALONE)
@example(FADING)
@example(INFINITE)
@example(FLUSHED)
@settings(deadline=None)
def test_random_vanilla_calls_meet_the_error_budget(case):
    check_results(case)


# Runs fewer examples, because each takes several times as long as a vanilla RNN's example.
@pytest.mark.parametrize("cell", [*CELLS][1:])
@given(data=strategies.data())
@settings(deadline=None, max_examples=settings.default.max_examples // 4)
def test_random_calls_of_other_cells_meet_the_error_budget(cell, data):
    check_results(data.draw(drawn_cases(cell)))
