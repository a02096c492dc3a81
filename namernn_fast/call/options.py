"""The option bits of a call, and the setting `batch_invariant()`, which sets one of these bits."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ..cells import Cell
from ..machine import fp32_precision

# Other modules must call batch_invariant_is_on(), because importing this name copies its value.
_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Context manager that makes the results of a sequence bit-identical however it is batched.

    The results of a sequence do not depend on the other sequences in the batch, on its position in
    the batch, on whether the batch is padded, packed or passed with `lengths`, or on the number of
    threads. This holds for the forward results of `rnn`, `gru`, `lstm` and the modules, but not for
    gradients of parameters, which are sums over the batch. The setting makes calls slower: small
    batches use the summation order of large batches, and weights are packed even for a single short
    sequence. `FusedRNN(..., batch_invariant=True)` turns the setting on for one module.

    The setting is global to the process, not per thread, like torch's own settings of this kind.

    Args:
        enabled: False turns the setting off within an outer `batch_invariant()`.
    """
    global _batch_invariant
    previous, _batch_invariant = _batch_invariant, enabled
    try:
        yield
    finally:
        _batch_invariant = previous


def batch_invariant_is_on() -> bool:
    """Returns whether `batch_invariant()` is active."""
    return _batch_invariant


NONLINEARITIES = {"tanh": 0, "relu": ops.RELU, "sigmoid": ops.SIGMOID, "softplus": ops.SOFTPLUS}
"""The option bit of each nonlinearity."""


def nonlinearity_of(options: int) -> str:
    """Returns the name of the nonlinearity that the option bits select."""
    return next((name for name, bit in NONLINEARITIES.items() if options & bit), "tanh")


PRECISION_BITS = {"bf16": ops.MEDIUM_PRECISION, "tf32": ops.HIGH_PRECISION}
"""The option bit for each lower precision of float32 products that torch's settings may allow."""


def precision_bits(cell: Cell) -> int:
    """Returns the option bits for the precision that torch's settings allow on a CPU."""
    return PRECISION_BITS.get(fp32_precision.on_cpu(cell.fp32_precision), 0)


def _check_list(weights: Any) -> None:
    if isinstance(weights, Tensor) or not hasattr(weights, "__len__"):
        got = type(weights).__name__
        raise TypeError(f"weights must be a list or a tuple of tensors, got a {got}")


def option_bits(
    cell: Cell,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool,
    batch_first: bool = False,
    bidirectional: bool = False,
    projections: bool = False,
    batch_invariant: bool = False,
) -> int:
    """Returns the option bits of a call; checks the number of weights and the nonlinearity."""
    options = ops.BIAS if bias else 0
    # Inlined `ops.weights_per_layer`: calling it would slow down small calls.
    per_layer = len(cell.present[1 if bias else 0][1 if projections else 0])
    if bidirectional:
        options |= ops.BIDIRECTIONAL
        per_layer *= 2
    if projections:
        options |= ops.PROJECTIONS
    if type(weights) is not list:
        _check_list(weights)
    if not weights or len(weights) % per_layer:
        raise ValueError(
            f"weights must hold {per_layer} tensors for each layer (bias={bias}, "
            f"bidirectional={bidirectional}, projections={projections}), got {len(weights)}"
        )
    if batch_first:
        options |= ops.BATCH_FIRST
    if batch_invariant or _batch_invariant:
        options |= ops.BATCH_INVARIANT
    if nonlinearity not in cell.nonlinearities:
        known = " or ".join(map(repr, cell.nonlinearities))
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from {known}.")
    return options | NONLINEARITIES[nonlinearity]
