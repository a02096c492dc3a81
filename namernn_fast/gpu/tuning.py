"""`autotune`, which times plans for a layer and keeps the fastest one."""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor

from .. import ops
from ..cells import VANILLA
from .layer import on_device_of
from .operators import backward, forward
from .plan import FEWEST_UNITS_OF_STEPS, Plan, Size, choose, size_of, tuned

_Measure: TypeAlias = Callable[[Callable[[], None]], float]


def autotune(
    input: Tensor, hidden_size: int, *, bidirectional: bool = False, measure: _Measure | None = None
) -> Plan:
    """Times candidate plans for a layer and keeps the fastest one for this process.

    Args:
        input: a tensor (seq_len, batch, features) on a GPU, with the sizes and dtype to tune for.
        hidden_size: number of hidden units of the layer.
        bidirectional: whether the layer has two directions.
        measure: a function that returns how many milliseconds its argument takes. The argument is a
            function that runs a forward and a backward pass. The default is
            `triton.testing.do_bench_cudagraph`, which replays a CUDA graph and so excludes host
            overhead. If no graph can be captured, `autotune` warns and uses
            `triton.testing.do_bench`.

    Returns:
        The fastest plan, which later calls with this batch, dtype and hidden size will use.
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
    options = ops.BIAS | ops.WANT_SAVED | (ops.BIDIRECTIONAL if bidirectional else 0)
    arguments: dict[str, Any] = {
        "cell": VANILLA.number,
        "input": input,
        "tensors": weights,
        "sequence_layout": None,
        "reset": None,
        "options": options,
        "trees": 0,
    }

    def call() -> None:
        output, last_states, saved = forward(ops.ForwardArguments(**arguments))
        backward(
            ops.BackwardArguments(
                **arguments,
                output=output,
                saved=saved,
                grad_output=output,
                grad_last_states=last_states,
                wanted=[True],
                want_layers=[0],
            )
        )

    size = size_of(hidden_size, input.shape[1], input, directions)
    if measure is not None:
        milliseconds = _time(size, call, measure)
    else:
        with on_device_of(input):
            milliseconds = _time_by_default(size, call)
    if size_of(hidden_size, input.shape[1], input, directions) != size:
        # The GPU rejected a cooperative launch, so the wrong plans were timed. Start again.
        return autotune(input, hidden_size, bidirectional=bidirectional, measure=measure)
    tuned[size] = min(milliseconds, key=lambda plan: milliseconds[plan])
    return tuned[size]


def _time_by_default(size: Size, call: Callable[[], None]) -> dict[Plan, float]:
    """Returns the milliseconds that each plan takes. Uses CUDA graphs for all plans or for none."""
    try:
        return _time(size, call, triton.testing.do_bench_cudagraph)
    except RuntimeError as error:
        warnings.warn(
            f"namernn_fast: autotune could not capture a CUDA graph ({error}) and times calls "
            "launched by the host instead. Host overhead hides differences between plans of small "
            "layers",
            RuntimeWarning,
            stacklevel=3,
        )
        return _time(size, call, triton.testing.do_bench)


def _time(size: Size, call: Callable[[], None], measure: _Measure) -> dict[Plan, float]:
    """Returns the milliseconds that each plan takes, except plans that do not fit the device."""
    milliseconds = {}
    for plan in _candidates(size):
        tuned[size] = plan
        try:
            milliseconds[plan] = measure(call)
        except triton.runtime.errors.OutOfResources:
            continue
        finally:
            del tuned[size]
    return milliseconds


def _candidates(size: Size) -> list[Plan]:
    """Returns the default plans for this and other batch sizes, with several warp counts.

    For a large float32 layer that streams weight_hh, one plan runs each step's product in torch.
    """
    chosen = [choose(size)]
    chosen += [choose(size._replace(batch=batch)) for batch in (1, 16, 64, 256, 1024, 4096)]
    found, by_products = [], []
    for plan in chosen:
        if plan.members > 1 and plan.members * size.blocks(plan.block_b) > size.device.meeting:
            continue
        if plan.kind == "streamed":
            by_products.append(plan._replace(stepwise=True))
            plan = plan._replace(stepwise=False)
        found += [plan._replace(warps=warps) for warps in (4, 8, 16)]
    if size.hidden_size >= FEWEST_UNITS_OF_STEPS and size.dtype == torch.float32:
        found += by_products[:1]
    return list(dict.fromkeys(found))
