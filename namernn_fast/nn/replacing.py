"""`replace_rnn` turns torch's modules into fused modules; `restore_rnn` turns them back."""

import warnings
from collections.abc import Sequence
from typing import TypeVar, overload

import torch

from ..cells import CELLS, CellName
from .layers import LAYERS, FusedGRU, FusedLSTM, FusedRNN
from .step_modules import STEP_MODULES, FusedGRUCell, FusedLSTMCell, FusedRNNCell

Model = TypeVar("Model", bound=torch.nn.Module)

FUSED: dict[str, dict[type, type]] = {
    name: {cell.torch_layer: LAYERS[name], cell.torch_step_module: STEP_MODULES[name]}
    for name, cell in CELLS.items()
}
"""For each cell, by name, a map from torch's classes to the fused classes that replace them."""
PLAIN = {fused: plain for classes in FUSED.values() for plain, fused in classes.items()}
"""A map from each fused class to the torch class that it replaces."""


def replace_rnn(model: Model, cells: Sequence[CellName] = ("rnn", "gru", "lstm")) -> Model:
    """Turns torch's recurrent layers and step modules in `model` into fused modules.

    The modules stay the same objects; only their class changes. So parameters, buffers, hooks,
    training flags and all references to modules stay as they are. Subclasses of torch's modules are
    left alone, because a subclass may override anything. TorchScript modules are left alone because
    they cannot be changed. If nothing was replaced, or if a TorchScript module should have been
    replaced, a warning names the modules left alone.

    Args:
        model: any module, which may itself be a module to replace.
        cells: the cells whose modules are replaced: "rnn" for `nn.RNN` and `nn.RNNCell`, "gru" for
            `nn.GRU` and `nn.GRUCell`, "lstm" for `nn.LSTM` and `nn.LSTMCell`.

    Returns:
        `model`, for chaining.

    Raises:
        TypeError: model is not a module, or cells is a string.
        ValueError: a cell is unknown.
    """
    if isinstance(cells, str):
        raise TypeError(f"cells must be a sequence such as ({cells!r},), got the string {cells!r}")
    for cell in cells:
        if cell not in FUSED:
            raise ValueError(f"cells must be among {', '.join(FUSED)}, got {cell!r}")
    classes = {plain: fused for cell in cells for plain, fused in FUSED[cell].items()}
    _change_classes(model, classes)
    if scripted := _scripted(model, classes):
        warnings.warn(
            "replace_rnn cannot change modules of TorchScript, and left these as they are: "
            f"{', '.join(scripted)}. Call it before torch.jit.script or torch.jit.trace",
            stacklevel=2,
        )
    elif not any(type(module) in classes.values() for module in model.modules()):
        _warn_nothing_replaced(model, classes)
    return model


def _scripted(model: torch.nn.Module, classes: dict[type, type]) -> list[str]:
    """Returns the names of the TorchScript modules in `model` that were made from these classes."""
    names = {plain.__name__ for plain in classes}
    return [
        name or module.original_name
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule) and module.original_name in names
    ]


def _warn_nothing_replaced(model: torch.nn.Module, classes: dict[type, type]) -> None:
    """Warns that no module of `model` was replaced."""
    left_alone = sorted(
        {
            type(module).__qualname__
            for module in model.modules()
            if isinstance(module, tuple(classes))
        }
    )
    names = ", ".join(f"nn.{plain.__name__}" for plain in classes)
    subclasses = f", only subclasses: {', '.join(left_alone)}" if left_alone else ""
    warnings.warn(
        f"replace_rnn replaced nothing: the {type(model).__qualname__} has none of {names}"
        f"{subclasses}",
        stacklevel=3,
    )


@overload
def restore_rnn(model: FusedRNN) -> torch.nn.RNN: ...


@overload
def restore_rnn(model: FusedRNNCell) -> torch.nn.RNNCell: ...


@overload
def restore_rnn(model: FusedGRU) -> torch.nn.GRU: ...


@overload
def restore_rnn(model: FusedGRUCell) -> torch.nn.GRUCell: ...


@overload
def restore_rnn(model: FusedLSTM) -> torch.nn.LSTM: ...


@overload
def restore_rnn(model: FusedLSTMCell) -> torch.nn.LSTMCell: ...


@overload
def restore_rnn(model: Model) -> Model: ...


def restore_rnn(model: torch.nn.Module) -> torch.nn.Module:
    """Turns every fused layer and step module in `model` back into torch's module.

    The inverse of `replace_rnn`, for tools that recognise torch's modules by their class, such as
    `torch.ao.quantization.quantize_dynamic`. Drops `batch_invariant`, which only the fused classes
    have. Subclasses of the fused classes are left alone.

    Args:
        model: any module, which may itself be a fused module.

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
