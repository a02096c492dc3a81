"""Executed layers, forward and backward: within the error budget and without any fault."""

import pytest
import torch
from layers import LAYERS, Layer

from namernn_fast import FusedRNN
from namernn_fast.testing import ErrorBudget


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer(machine, layer, fp32_precision):
    machine.device = layer.device
    assert layer.plan.kind == layer.kind
    if layer.dtype == "TF32":
        # Where the precisions differ, the products around the recurrence are kernels too.
        fp32_precision("tf32", "ieee" if layer.kind == "resident" else "tf32")
    layer.check()


def test_the_layers_reach_every_kind_of_plan():
    kinds = {(layer.kind, layer.dtype) for layer in LAYERS}
    for kind in ("resident", "cooperative", "streamed"):
        assert {dtype for of, dtype in kinds if of == kind} >= {"float32", "TF32"}
        assert {dtype for of, dtype in kinds if of == kind} & {"bfloat16", "float16"}


def test_sums_without_tensor_cores_have_short_chains(machine):
    """One chain of 500 multiply-adds would make errors of up to 10 units in the last place."""
    layer = Layer(80, "streamed", "float32", 500, 4, processors=4)
    machine.device = layer.device
    assert layer.plan.kind == layer.kind
    results, exact = layer.case.run(FusedRNN, torch.float32), layer.case.run_oracle(torch.float32)
    budget = ErrorBudget(torch.float32, units=2)  # independent of the error of nn.RNN
    for name in ("h_n", "grad_weight_hh_l0"):
        nearest = torch.from_numpy(exact[name]).float()
        budget.add(name, results[name], nearest, exact[name])
    budget.check()
