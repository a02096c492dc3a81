"""The precision of float32 products, read from torch's settings."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._guards import Guard, TracingContext

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _called_by_dynamo(function: _Function) -> _Function:
    """Makes Dynamo call a function while it traces, and treat the result as a constant.

    Equivalent to `torch.compiler.assume_constant_result`, which would import all of Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


get: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
"""Returns the precision of a backend and an operator, in a tenth of the time that the properties of
`torch.backends` take. Dynamo cannot trace it."""


@_called_by_dynamo
def on_cpu(operator: str) -> str:
    """Returns the precision of float32 products that `torch.backends.mkldnn` sets for an operator.

    Args:
        operator: `matmul` or `rnn`.

    Returns:
        `bf16`, `tf32`, or any other string for full precision.
    """
    return get("mkldnn", operator)


@_called_by_dynamo
def guard_on_cpu(operator: str) -> None:
    """Makes `torch.compile` compile again if `on_cpu(operator)` changes.

    Does nothing outside of tracing, and in `torch.export`, whose programs keep the precision.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    expected = on_cpu(operator)

    def add(builder: Any, guard: Guard) -> None:
        builder.guard_manager.root.add_lambda_guard(
            lambda _: on_cpu(operator) == expected,
            [f"torch.backends.mkldnn.{operator}.fp32_precision == {expected!r}"],
            None,
        )

    from torch._dynamo.source import GlobalStateSource  # Dynamo is imported if it is tracing

    context.guards_context.dynamo_guards.add(Guard(GlobalStateSource(), add))


def of_rnns() -> str:
    """Returns the precision of all products of an RNN, which is always `ieee` on AMD GPUs."""
    return "ieee" if torch.version.hip else _of(torch.backends.cudnn.rnn)


def of_products() -> str:
    """Returns the precision of torch's own matrix products."""
    return _of(torch.backends.cuda.matmul)


def _of(setting: Any) -> str:
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"
