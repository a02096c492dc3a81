"""Tests layers on every emulated architecture, autotune's plans, and the GPU benchmark.

`make gpu` runs all tests. `make test-all` runs each size, precision and architecture at least once.
"""

import dataclasses
import functools
import itertools
import random
import zlib

import pytest
import torch
from layers import RELU, TWO_DIRECTIONS, TWO_LAYERS, Layer
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.dry_run import Interpreted
from benchmarks.gpu.race import DRY, MEASURED, run
from namernn_fast import gpu_backend
from namernn_fast.gpu import device, plan, tuning
from namernn_fast.machine import availability
from tools.ptx.driver import DEVICES

pytestmark = pytest.mark.slow
PRECISIONS = ("float32", "TF32", "bfloat16", "float16")
SIZES = [
    *itertools.product((16, 33, 64, 100, 127, 128), (1, 3, 19, 67)),
    *itertools.product((200, 256, 300, 384, 512), (1, 5, 35)),
]
CANDIDATES = 65
"""The number of autotune's plans to test on each architecture."""


@functools.cache
def layers(arch):
    """Returns a layer for every size and precision. Layouts and options alternate."""
    found = {}
    rows = itertools.cycle(("dense", "lengths", "packed", "jagged", "packed unsorted"))
    options = itertools.cycle(({}, TWO_DIRECTIONS, RELU, TWO_LAYERS | TWO_DIRECTIONS))
    resets = itertools.cycle((0.0, 0.0, 0.3))
    ids = itertools.cycle((0, 0, 0, 7))
    states = itertools.cycle((True, True, False))
    for i, ((H, B), precision) in enumerate(itertools.product(SIZES, PRECISIONS)):
        layout, reset_share = next(rows), next(resets)
        takes_resets = layout in ("dense", "lengths")
        layer = Layer(
            *(arch, "", precision, H, B, 3 + i % 3, layout, next(options)),
            resets=reset_share if takes_resets else 0.0,
            vocabulary=next(ids),
            with_hx=next(states),
        )
        found[H, B, precision] = dataclasses.replace(layer, kind=layer.plan.kind)
    return found


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layers_of_any_size_meet_the_error_budget(machine, arch, precision, size, fp32_precision):
    layer = layers(arch)[(*size, precision)]
    machine.device = layer.device
    seed = zlib.crc32(str(layer).encode()) % 1000
    machine.options.seed, machine.options.flush = seed, (0, 5, 50)[seed % 3]
    machine.options.quantum = (5, 40, 400)[seed // 3 % 3]
    if layer.dtype == "TF32":
        fp32_precision("tf32", "ieee" if seed % 2 else "tf32")
    layer.check()


@functools.cache
def candidates(arch):
    """Returns a random sample of layers with a plan that autotune may choose for them."""
    found = []
    for H, B, directions in itertools.product((5, 33, 100, 256, 384), (1, 3, 40), (1, 2)):
        for precision in PRECISIONS:
            layer = Layer(arch, "", precision, H, B, 3, options={"bidirectional": directions == 2})
            dtype, tf32 = layer.case.dtype, precision == "TF32"
            size = plan.Size(H, B, dtype, DEVICES[arch], directions, tf32)
            plans = tuning._candidates(size)
            found += [(layer, size, chosen) for chosen in plans if not chosen.stepwise]
    return random.Random(arch).sample(found, CANDIDATES)


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("number", range(CANDIDATES))
def test_a_layer_with_a_plan_of_autotune_meets_the_error_budget(
    machine, arch, number, monkeypatch, fp32_precision
):
    layer, size, chosen = candidates(arch)[number]
    machine.device = layer.device
    monkeypatch.setitem(plan.tuned, size, chosen)
    if layer.dtype == "TF32":
        fp32_precision("tf32", "tf32")
    try:
        layer.check()
    except OutOfResources:
        pytest.skip("needs more shared memory than the GPU has, as autotune would find")


def test_all_workloads_of_the_gpu_benchmark_pass_its_correctness_gate(machine, monkeypatch):
    """Runs all code of `make bench-gpu` except the timing."""
    machine.device = DEVICES[90]
    replaced = (
        (device, "find_device"),
        (availability, "why_not_cpu_kernel"),
        (gpu_backend, "implementation"),
    )
    for module, name in replaced:
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test
    platform = dataclasses.replace(DRY, path=Interpreted().path)
    torch.use_deterministic_algorithms(False)
    rows = list(run(platform, float("inf")))
    assert {row["status"] for row in rows} == {MEASURED}, rows
