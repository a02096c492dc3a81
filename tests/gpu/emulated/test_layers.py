"""Tests that emulated layers, forward and backward, meet the error budget without any fault."""

import pytest
import torch
from layers import LAYERS, Layer

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


def test_layers_cover_every_kind_of_plan():
    for kind in ("resident", "cooperative", "streamed"):
        dtypes = {layer.dtype for layer in LAYERS if layer.kind == kind}
        assert dtypes >= {"float32", "TF32"}
        assert dtypes & {"bfloat16", "float16"}


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
