"""Decides when a call must run on the operators of torch's layer instead of the fused operators.

Three features need the operators of torch's layer:

- TorchScript (`torch.jit.trace`, `torch.jit.script`, `torch.onnx.export(..., dynamo=False)`), which
  cannot record an `autograd.Function`.
- Torch's expanded weights, which Opacus uses for per-sample gradients (`grad_sample_mode="ew"`).
- Tensor-like objects, which are not tensors but define `__torch_function__`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.overrides import is_tensor_like

from ..call import Arguments
from ..cells import Cell
from ..machine.context import is_jit_tracing, jit_tracer
from ..machine.torch_private import EXPANDED_WEIGHTS, _set_tracing_state
from .deferred import when_imported

Plain = TypeVar("Plain", bound=torch.nn.Module)

_expanded_weights: tuple[type, ...] = ()


def _remember(module: ModuleType) -> None:
    global _expanded_weights
    _expanded_weights = (module.ExpandedWeight,)


when_imported(EXPANDED_WEIGHTS, _remember, "run layers with torch's expanded weights")


def must_serve(arguments: Arguments, weights: Sequence[Tensor], cell: Cell) -> bool:
    """Returns whether the operators of torch's layer must compute a call.

    Args:
        arguments: the caller's arguments.
        weights: the weights of the layer.
        cell: the layer's cell.

    Raises:
        RuntimeError: the call must run on torch's operators, but has lengths or resets.
    """
    is_plain = cell.torch is not None and arguments.are_known_to_torch()
    if isinstance(weights[0], _expanded_weights):
        if not is_plain:
            raise RuntimeError(
                "torch's expanded weights have no rule for lengths= or reset=: use "
                "torch.func.vmap(torch.func.grad(...)) for per-sample gradients"
            )
        return True
    if is_jit_tracing():
        if not is_plain:
            refuse_untraceable(
                "lengths= or reset=" if cell.torch else f"a {cell.layer}, which torch lacks"
            )
        return is_plain
    return is_plain and any(map(_stands_for_tensor, (arguments.input, arguments.hx)))


def _stands_for_tensor(value: object) -> bool:
    if isinstance(value, tuple) and not is_tensor_like(value):  # the states of an LSTM
        return any(map(_stands_for_tensor, value))
    return is_tensor_like(value) and not isinstance(value, Tensor)


class FromExporter:
    """A module that torch's older ONNX exporter can call despite its keyword-only parameters.

    That exporter appends the defaults of all parameters of `forward` to the positional arguments.
    """

    def _slow_forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Runs instead of `forward` while `torch.jit.trace` records the call."""
        by_position, appended = arguments[:3], arguments[3:]
        if any(argument is not None for argument in appended):
            by_position = arguments  # `forward` reports that there are too many
        return super()._slow_forward(*by_position, **keywords)  # type: ignore[misc]


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Context manager in which `torch.jit.trace` records nothing, so that results are constants."""
    state = jit_tracer()
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)


def is_exact(module: torch.nn.Module) -> bool:
    """Returns whether the class of a module belongs to this package, and is not a user's subclass.

    A subclass may override anything. Only classes of this package define `_cell` themselves.
    """
    return "_cell" in type(module).__dict__


def exact_class(module: Plain) -> type[Plain]:
    """Returns the first class of this package in the MRO of a module's class."""
    return next(cls for cls in type(module).__mro__ if "_cell" in cls.__dict__)


def plain_twin(module: torch.nn.Module, cls: type[Plain]) -> Plain:
    """Returns a module of class `cls` that shares all attributes and parameters of `module`."""
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    return twin


def refuse_script(cell: Cell) -> NoReturn:
    """Raises the error for `torch.jit.script` of a module whose cell torch lacks."""
    raise RuntimeError(
        f"torch.jit.script compiles only torch's layers, and torch has no {cell.layer}: trace the "
        "call with torch.jit.trace under torch.no_grad(), or use torch.export"
    )


def refuse_untraceable(what: str) -> None:
    """Raises an error if a call that torch lacks is traced for ONNX or with gradients."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"torch.onnx.export(..., dynamo=False) cannot export {what}: use dynamo=True, which "
            "can export lengths="
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"torch.jit.trace cannot record gradients of {what}: trace the call under "
            "torch.no_grad(), for inference, or use torch.export"
        )
