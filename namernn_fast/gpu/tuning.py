"""Times configurations where a user asks for it; nothing else does."""

import torch
import triton
from torch import Tensor

from .. import ops
from .operators import rnn_backward, rnn_forward
from .plan import Config, Size, size_of, tuned


def autotune(
    input: Tensor, hidden_size: int, *, bidirectional: bool = False, measure=None
) -> Config:
    """Times the configurations that may suit a layer and keeps the best one for this process.

    Nothing else times anything: without it the rule alone decides.

    Args:
        input: (seq_len, batch, features), on a GPU, of the sizes and the dtype to tune for.
        hidden_size, bidirectional: of the layer.
        measure: what to time, in place of a forward and a backward pass: milliseconds of `call()`.

    Returns:
        What calls with this batch, dtype and hidden size run by from now on.
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
    rows = (None, None, options)  # all of them, without a reset

    def call():
        output, h_n, _ = rnn_forward(input, None, weights, *rows)
        rnn_backward(output, h_n, input, None, weights, output, [], *rows, True, False, [0])

    size = size_of(hidden_size, input.shape[1], input, directions)
    taken: dict[Config, float] = {}
    for config in _candidates(size):
        tuned[size] = config
        try:
            taken[config] = (measure or triton.testing.do_bench)(call)
        except triton.runtime.errors.OutOfResources:  # it does not fit: no candidate
            continue
        finally:
            del tuned[size]
    tuned[size] = min(taken, key=lambda config: taken[config])
    return tuned[size]


def _candidates(size: Size) -> list[Config]:
    """What the rule says for this size and for other batches, with more warps and with fewer."""
    chosen = [size.choose()]
    chosen += [size._replace(batch=batch).choose() for batch in (1, 16, 64, 256, 1024, 4096)]
    found = []
    for config in chosen:
        blocks = triton.cdiv(size.batch, config.block_b) * size.directions
        if config.members > 1 and config.members * blocks > size.device.meeting:
            continue
        found += [config._replace(warps=warps) for warps in (4, 8, 16)]
    return list(dict.fromkeys(found))
