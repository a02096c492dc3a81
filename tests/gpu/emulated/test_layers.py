"""Tests that layers on the emulated GPU meet the error budget and cause no fault."""

import pytest
import torch
from layers import LAYERS, Layer
from tf32 import RoundedRecurrence, check_results
from torch.nn.functional import linear

import namernn_fast.gpu
from namernn_fast import FusedRNN
from namernn_fast.testing import ErrorBudget


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_an_emulated_layer_meets_the_error_budget(machine, layer, fp32_precision):
    machine.device = layer.device
    assert layer.plan.kind == layer.kind
    if layer.dtype == "TF32":
        # If the precisions of RNNs and matmul differ, our kernels compute all products of a layer.
        fp32_precision("tf32", "ieee" if layer.kind == "resident" else "tf32")
    layer.check()


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3], LAYERS[4]], ids=str)
def test_last_state_is_bit_identical_to_the_last_state_of_the_layer(machine, layer):
    """For `last_state`, the kernel alternates between two states instead of storing all states."""
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
def test_the_kernel_rounds_operands_to_the_nearest_tf32_value(machine, layer, monkeypatch):
    """Tensor cores would truncate the operands, and errors would be nearly three times as large."""
    machine.device = layer.device
    monkeypatch.setattr(namernn_fast.gpu.layer, "plan_of", lambda *_: layer.plan)
    check_results(str(layer), 3, layer.H, layer.B, linear, RoundedRecurrence.apply)


def test_long_sums_on_cuda_cores_are_split_into_short_chains(machine):
    """A single chain of 500 multiply-adds would err by up to 10 ulp, which exceeds this budget."""
    layer = Layer(80, "streamed", "float32", 500, 4, processors=4)
    machine.device = layer.device
    assert layer.plan.kind == layer.kind
    results, exact = layer.case.run(FusedRNN, torch.float32), layer.case.run_oracle(torch.float32)
    budget = ErrorBudget(torch.float32, units=2)  # independent of the error of nn.RNN
    for name in ("h_n", "grad_weight_hh_l0"):
        nearest = torch.from_numpy(exact[name]).float()
        budget.add(name, results[name], nearest, exact[name])
    budget.check()
