"""Times plans where a user asks for it; nothing else in this package times anything."""

import torch
import triton
from torch import Tensor

from .. import ops
from .operators import rnn_backward, rnn_forward
from .plan import Plan, Size, size_of, tuned


def autotune(input: Tensor, hidden_size: int, *, bidirectional: bool = False, measure=None) -> Plan:
    """Times the plans that may suit a layer and keeps the fastest one for this process.

    Args:
        input: (seq_len, batch, features), on a GPU, of the sizes and the dtype to tune for.
        hidden_size: hidden units of the layer.
        bidirectional: whether the layer has two directions.
        measure: returns the milliseconds of `call()`; by default `triton.testing.do_bench`. A call
            is a forward and a backward pass.

    Returns:
        The plan of all later calls with this batch, dtype and hidden size.
    """
    directions = 2 if bidirectional else 1
    layer = torch.nn.RNN(
        input.shape[2],
        hidden_size,
        bidirectional=bidirectional,
        device=input.device,
        dtype=input.dtype,
    )
    weights = [p.detach() for p in layer.parameters()]
    options = ops.BIAS | ops.WANT_HIDDEN | (ops.BIDIRECTIONAL if bidirectional else 0)
    padded = (None, None, options)  # all rows exist, without a reset

    def call():
        output, h_n, _ = rnn_forward(input, None, weights, *padded)
        rnn_backward(output, h_n, input, None, weights, output, [], *padded, True, False, [0])

    size = size_of(hidden_size, input.shape[1], input, directions)
    taken: dict[Plan, float] = {}
    for plan in _candidates(size):
        tuned[size] = plan
        try:
            taken[plan] = (measure or triton.testing.do_bench)(call)
        except triton.runtime.errors.OutOfResources:  # the plan does not fit the device
            continue
        finally:
            del tuned[size]
    tuned[size] = min(taken, key=lambda plan: taken[plan])
    return tuned[size]


def _candidates(size: Size) -> list[Plan]:
    """Returns the plans for this size and for other batches, with more warps and with fewer."""
    chosen = [size.choose()]
    chosen += [size._replace(batch=batch).choose() for batch in (1, 16, 64, 256, 1024, 4096)]
    found = []
    for plan in chosen:
        blocks = triton.cdiv(size.batch, plan.block_b) * size.directions
        if plan.members > 1 and plan.members * blocks > size.device.meeting:
            continue
        found += [plan._replace(warps=warps) for warps in (4, 8, 16)]
    return list(dict.fromkeys(found))
