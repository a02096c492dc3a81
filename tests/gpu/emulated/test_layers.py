"""Tests that emulated layers, forward and backward, meet the error budget without any fault."""

import pytest
import torch
from layers import LAYERS, Layer
from tf32 import RoundedRecurrence, check_results
from torch.nn.functional import linear

import namernn_fast.gpu
from namernn_fast import FusedRNN
from namernn_fast.testing import ErrorBudget


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_meets_the_error_budget(machine, layer, fp32_precision):
    machine.device = layer.device
    assert layer.plan.kind == layer.kind
    if layer.dtype == "TF32":
        # If the two precisions differ, our kernel also computes the products around the recurrence.
        fp32_precision("tf32", "ieee" if layer.kind == "resident" else "tf32")
    layer.check()


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3], LAYERS[4]], ids=str)
def test_the_last_state_alone_has_the_same_bits(machine, layer):
    """Without an output, the kernel stores the states of two steps in turn."""
    machine.device = layer.device
    rnn, table = FusedRNN(5, layer.H, **layer.options), torch.randn(7, 5)
    input, ids = torch.randn(4, layer.B, 5), {}
    if layer.vocabulary:
        input, ids = torch.randint(7, (4, layer.B)), {"embedding": table}
    lengths = torch.tensor([4, 0, 3, 1, 4])[: layer.B]
    _, last = rnn(input, lengths=lengths, **ids)
    with torch.inference_mode():
        assert torch.equal(rnn.last_state(input, lengths=lengths, **ids), last)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.dtype == "TF32"], ids=str)
def test_operands_are_rounded_to_the_nearest_value(machine, layer, monkeypatch):
    """Truncating operands, as tensor cores do, would make errors nearly three times as large."""
    machine.device = layer.device
    monkeypatch.setattr(namernn_fast.gpu.layer, "plan_of", lambda *_: layer.plan)
    check_results(str(layer), 3, layer.H, layer.B, linear, RoundedRecurrence.apply)


def test_sums_without_tensor_cores_have_short_chains(machine):
    """A single chain of 500 multiply-adds would cause errors of up to 10 ulp."""
    layer = Layer(80, "streamed", "float32", 500, 4, processors=4)
    machine.device = layer.device
    assert layer.plan.kind == layer.kind
    results, exact = layer.case.run(FusedRNN, torch.float32), layer.case.run_oracle(torch.float32)
    budget = ErrorBudget(torch.float32, units=2)  # independent of the error of nn.RNN
    for name in ("h_n", "grad_weight_hh_l0"):
        nearest = torch.from_numpy(exact[name]).float()
        budget.add(name, results[name], nearest, exact[name])
    budget.check()
