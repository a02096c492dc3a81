"""Tests that launches are within CUDA's limits, for batches of up to a million sequences.

`make gpu ONLY=lint` checks the registers, shared memory and indices of the compiled kernels.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from namernn_fast import ops
from namernn_fast.gpu import device, kernels, launching, plan, problem, stack, stepwise, sums
from tools.gpu.resources import DEVICES, GEFORCE, PRECISIONS

# Limits from the table "Technical Specifications per Compute Capability" of the CUDA
# programming guide. AMD's limits are the same or larger.
GRID = (2**31 - 1, 65535, 65535)
THREADS = 1024
RECURRENCES = (kernels.forward_kernel, kernels.backward_kernel)
REGISTERS = 65536

ARCHITECTURES = {gpu.arch: gpu for gpu in (*DEVICES, *GEFORCE)}
BATCHES = (1, 2, 33, 1024, 65535, 65536, 1 << 17, (1 << 20) - 1, 1 << 20)
HIDDEN_SIZES = (1, 16, 33, 64, 100, 128, 200, 256, 512, 1000, 1024, 2048, 4096)


def launches(monkeypatch, hidden_size, batch, directions, dtype):
    """Records the launches of a layer's forward and backward pass and of a large table's gradient.

    Returns tuples of the kernel, the grid and the settings.
    """
    launched = []
    monkeypatch.setattr(
        *(launching, "run"),
        lambda kernel, grid, arguments, settings: launched.append((kernel, grid, settings)),
    )

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    layout = problem.SequenceLayout(1, batch, batch, batch, 1)
    options = ops.BIAS | (ops.BIDIRECTIONAL if directions == 2 else 0)
    shapes = ((hidden_size, 1), (hidden_size, hidden_size), (hidden_size,), (hidden_size,))
    weights = [empty(*shape) for _ in range(directions) for shape in shapes]
    layers = problem.Stack(layout, None, weights, options, directions, hidden_size)
    x = empty(batch, 1)
    outputs, h_n = stack.forward_stack(layers, x)
    gradients = (torch.empty_like(outputs[0]), torch.empty_like(h_n), None)
    stack.backward_stack(layers, x, outputs, *gradients, True, [0])
    sums.sums_by_token(outputs[0], torch.empty(batch, dtype=torch.int64, device="meta"), 2**20)
    assert sum(kernel in RECURRENCES for kernel, *_ in launched) == 2
    return launched


@pytest.mark.covering(1)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_are_within_cuda_limits(arch, precision, monkeypatch):
    gpu, (dtype, tf32) = ARCHITECTURES[arch], precision
    monkeypatch.setattr(device, "find_device", lambda index: gpu)
    monkeypatch.setattr(plan, "may_round_to_tf32", lambda device: tf32)
    monkeypatch.setattr(stepwise, "suits", lambda *_: False)  # torch launches its own products
    for hidden_size, batch, directions in itertools.product(HIDDEN_SIZES, BATCHES, (1, 2)):
        size = (hidden_size, batch, directions)
        chosen = plan.plan_of(hidden_size, batch, torch.empty(0, dtype=dtype), directions)
        threads = chosen.warps * gpu.lanes
        assert threads <= THREADS, size
        for kernel, grid, settings in launches(monkeypatch, *size, dtype):
            programs = 1
            for axis, limit in zip(grid, GRID, strict=False):
                assert 0 < axis <= limit, (size, grid)
                programs *= axis
            if kernel not in RECURRENCES:
                continue
            blocks = -(-batch // chosen.block_b)
            assert programs == chosen.members * blocks * directions, (size, grid)
            if chosen.members > 1:  # members wait for each other, so all must run at once
                assert programs <= gpu.processors, (size, grid)
                assert settings["launch_cooperative_grid"], size
            if gpu.backend == "cuda":
                assert settings["maxnreg"] * threads <= REGISTERS, size
