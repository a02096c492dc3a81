"""Tests that every planted fault is detected by the emulator or causes wrong results."""

import pytest
from mutants import LAYERS, MUTANTS, caught, results


@pytest.fixture(scope="module")
def wanted():
    """Provides a cache for the fault-free results of each layer."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_planted_fault_is_detected(machine, mutant, wanted, fp32_precision):
    layer = LAYERS[mutant.layer]
    machine.device = layer.device
    if layer.dtype == "TF32":
        fp32_precision("tf32", "tf32")
    if mutant.layer not in wanted:
        wanted[mutant.layer] = results(layer)
    assert not machine.faults
    assert any(mutant.places(text) for text in machine.kernels), "the fault fits nowhere in the PTX"
    how = caught(machine, layer, mutant.plant, wanted[mutant.layer])
    print(how)
    assert how is not None
