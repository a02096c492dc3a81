"""Models that torch's `quantize_dynamic` rounds to 8 bits, the rival of 8-bit weights."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from namernn_fast.bench.machine import held_to
from namernn_fast.bench.race import TimedCall, warm_up

ENGINES = ("x86", "onednn")
"""torch.ao's engines: one is faster for one sequence, the other for many. The first always uses the
best instruction set of the processor."""
SECONDS = 0.05
"""The time to try each engine."""


def is_available() -> bool:
    """Returns whether torch still has `quantize_dynamic`, which is deprecated."""
    found = getattr(getattr(torch, "ao", None), "quantization", None)
    return hasattr(found, "quantize_dynamic")


def fastest(
    model: nn.Module,
    call_of: Callable[[Any], TimedCall],
    kinds: set[type[nn.Module]] | None = None,
) -> TimedCall:
    """Returns the call of a quantized copy of a model, on the fastest engine.

    Args:
        model: The model.
        call_of: Returns the call of a copy.
        kinds: The classes of the modules to quantize; default: `quantize_dynamic` chooses.
    """
    quantized = torch.backends.quantized
    before, calls = quantized.engine, []
    engines = ENGINES[1:] if held_to() else ENGINES
    for engine in [name for name in engines if name in quantized.supported_engines]:
        quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates torch.ao
            calls.append(call_of(torch.ao.quantization.quantize_dynamic(model, kinds)))
    quantized.engine = before
    return min(calls, key=lambda call: warm_up(call, SECONDS))
