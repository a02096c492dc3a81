"""`replace_rnn` and `restore_rnn`: replace torch's modules by the fused ones, and back."""

import warnings
from typing import TypeVar, overload

import torch

from .nn import FUSED, PLAIN, FusedRNN, FusedRNNCell

Model = TypeVar("Model", bound=torch.nn.Module)


def replace_rnn(model: Model) -> Model:
    """Turns every `nn.RNN` and `nn.RNNCell` in `model`, or `model` itself, into its fused class.

    The modules stay the same objects; only their class changes. So parameters, buffers, hooks,
    training flags and all references to modules stay as they are. Subclasses of `nn.RNN` and
    `nn.RNNCell` are left alone, because they may override anything. If there is nothing to replace,
    a warning says so and names these subclasses.

    Args:
        model: any module.

    Returns:
        `model`, for chaining.

    Raises:
        TypeError: model is not a module.
    """
    _change_classes(model, FUSED)
    if not any(type(module) in PLAIN for module in model.modules()):
        _warn_nothing_replaced(model)
    return model


def _warn_nothing_replaced(model: torch.nn.Module) -> None:
    """Warns that no module of `model` was replaced."""
    left_alone = sorted(
        {
            type(module).__qualname__
            for module in model.modules()
            if isinstance(module, (torch.nn.RNN, torch.nn.RNNCell))
        }
    )
    subclasses = f", only subclasses of them: {', '.join(left_alone)}" if left_alone else ""
    warnings.warn(
        f"replace_rnn replaced nothing: found no nn.RNN and no nn.RNNCell in the "
        f"{type(model).__qualname__}{subclasses}",
        stacklevel=3,
    )


@overload
def restore_rnn(model: FusedRNN) -> torch.nn.RNN: ...


@overload
def restore_rnn(model: FusedRNNCell) -> torch.nn.RNNCell: ...


@overload
def restore_rnn(model: Model) -> Model: ...


def restore_rnn(model: torch.nn.Module) -> torch.nn.Module:
    """Turns every `FusedRNN` and `FusedRNNCell` in `model`, or `model` itself, into torch's class.

    The inverse of `replace_rnn`, for tools that recognise torch's modules by their class, such as
    `torch.ao.quantization.quantize_dynamic`. Drops `batch_invariant`, which only the fused classes
    have. Subclasses are left alone.

    Args:
        model: any module.

    Returns:
        `model`, for chaining.

    Raises:
        TypeError: model is not a module.
    """
    return _change_classes(model, PLAIN)


def _change_classes(model: Model, classes: dict[type, type]) -> Model:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            module.__dict__.pop("batch_invariant", None)
    return model
