"""Executed layers, forward and backward: within the error budget and without any fault."""

import pytest
from layers import LAYERS


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer(machine, layer, fp32_precision):
    machine.device = layer.device
    assert layer.plan.kind == layer.kind
    if layer.dtype == "TF32":
        fp32_precision("tf32", "ieee")
    layer.check()


def test_the_layers_reach_every_kind_of_plan():
    kinds = {(layer.kind, layer.dtype) for layer in LAYERS}
    for kind in ("resident", "cooperative", "streamed"):
        assert {dtype for of, dtype in kinds if of == kind} >= {"float32", "TF32"}
        assert {dtype for of, dtype in kinds if of == kind} & {"bfloat16", "float16"}
