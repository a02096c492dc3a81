"""A long call of a layer of which the last state alone is wanted, against the usual call."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.classifier.program import EMBEDDING, HIDDEN
from namernn_fast import FusedRNN
from namernn_fast.bench.race import Call, TimeBudget, race
from namernn_fast.testing import assert_within_budget

FORWARD, LAST_STATE = "forward", "last_state"
LONG_CALLS: dict[str, Callable[[FusedRNN, Tensor], Tensor]] = {
    FORWARD: lambda layer, input: layer(input)[1],
    LAST_STATE: lambda layer, input: layer.last_state(input),
}
"""Each call by its name: it returns h_n."""
KNOWN = 2
"""How many sequences the oracle computes."""


def layer_and_input(seq_len: int, batch: int) -> tuple[FusedRNN, Tensor]:
    """Returns a layer of the classifier's sizes, and a dense input."""
    torch.manual_seed(0)
    return FusedRNN(EMBEDDING, HIDDEN), torch.randn(seq_len, batch, EMBEDDING)


def long_call(name: str, seq_len: int, batch: int) -> Call:
    """Returns a call of `LONG_CALLS`."""
    layer, input = layer_and_input(seq_len, batch)
    return lambda: LONG_CALLS[name](layer, input)


def check(seq_len: int, batch: int) -> None:
    """Checks that every call keeps its error budget."""
    layer, input = layer_and_input(seq_len, batch)
    baseline = nn.RNN(EMBEDDING, HIDDEN)
    baseline.load_state_dict(layer.state_dict())
    known = input[:, :KNOWN]
    theirs = {"h_n": baseline(known)[1]}
    exact = {"h_n": baseline.double()(known.double())[1]}
    for call in LONG_CALLS.values():
        assert_within_budget({"h_n": call(layer, input)[:, :KNOWN]}, theirs, exact)


@torch.inference_mode()
def race_calls(threads: int, seq_len: int, batch: int, budget: TimeBudget) -> list[dict[str, Any]]:
    """Returns a row for each call, after each has passed the gate."""
    check(seq_len, batch)
    rounds = race({name: long_call(name, seq_len, batch) for name in LONG_CALLS}, budget)
    return [
        {
            "threads": threads,
            "call": name,
            "seq_len": seq_len,
            "batch": batch,
            "seconds": statistics.median(recorded.seconds),
        }
        for name, recorded in rounds.items()
    ]
