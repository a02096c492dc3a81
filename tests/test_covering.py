"""Tests how `covering` chooses calls of a parametrized test."""

import itertools

import pytest
from covering import combinations, covering


def product(**choices):
    """Returns a call for each combination of `choices`: {name: {parameter: value as text}}."""
    rows = (
        dict(zip(choices, map(str, row), strict=True))
        for row in itertools.product(*choices.values())
    )
    return {"-".join(row.values()): row for row in rows}


@pytest.mark.parametrize("strength", [0, 1, 2, 3, 9])
def test_a_covering_array_contains_every_combination(strength):
    calls = product(a=range(4), b=range(3), c=range(2), d=range(2))
    chosen = covering(calls, strength)
    seen = set().union(*(combinations(calls[name], strength) for name in chosen))
    assert seen == set().union(*(combinations(row, strength) for row in calls.values()))
    assert chosen == covering(calls, strength)


def test_a_covering_array_needs_few_calls():
    calls = product(a=range(4), b=range(4), c=range(2), d=range(2))
    assert [len(covering(calls, strength)) for strength in (0, 1, 4)] == [1, 4, 64]
    assert 16 <= len(covering(calls, 2)) <= 20


def test_a_covering_array_pairs_values_with_different_values():
    """Calls with different values of `b` also differ in `a`."""
    calls = product(a=range(3), b=range(12))
    assert len({calls[name]["a"] for name in covering(calls, 1)}) == 3
    met = {calls[name]["a"] for name in sorted(covering(calls, 1)) if calls[name]["b"] > "3"}
    assert len(met) > 1


def test_a_covering_array_skips_combinations_that_no_call_has():
    calls = {"x": {"kind": "lstm", "relu": "no"}, "y": {"kind": "rnn", "relu": "yes"}}
    assert covering(calls, 2) == {"x", "y"}
