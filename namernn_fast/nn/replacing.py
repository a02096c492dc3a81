"""Replaces the recurrent modules of a model.

`replace_rnn` replaces torch's modules with fused modules. `prepare_rnn` replaces torch's and fused
modules with prepared modules. `restore_rnn` undoes both.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.utils.parametrize import type_before_parametrizations

from ..call import int8
from ..cells import CELLS, CellName
from ..integrations.nn_rnn import plain_twin
from ..machine import availability
from .base.token_layer import TokenLayer
from .gru import FusedGRU, FusedGRUCell
from .inference.prepared import Prepared
from .lstm import FusedLSTM, FusedLSTMCell
from .replacing_loops import Replacements, module_like
from .vanilla import FusedRNN, FusedRNNCell
from .weights import CLASSES, why_not_int8

Model = TypeVar("Model", bound=torch.nn.Module)

FUSED: dict[str, dict[type, type]] = {
    name: {
        cell.torch.layer: CLASSES[cell.layer],
        cell.torch.step_module: CLASSES[f"{cell.layer}Cell"],
    }
    for name, cell in CELLS.items()
    if cell.torch is not None
}
"""For each cell, by name, a map from torch's classes to the fused classes that replace them."""
PLAIN = {fused: plain for classes in FUSED.values() for plain, fused in classes.items()}
"""A map from each fused class to the torch class that it replaces."""
FUSED_OF = {plain: fused for fused, plain in PLAIN.items()}
"""A map from each torch class to the fused class that replaces it."""


@overload
def replace_rnn(model: Model, cells: Sequence[CellName] = ("rnn", "gru", "lstm")) -> Model: ...


@overload
def replace_rnn(model: torch.nn.Module, cells: Replacements) -> Any: ...


def replace_rnn(
    model: torch.nn.Module,
    cells: Sequence[CellName] | Replacements = ("rnn", "gru", "lstm"),
) -> Any:
    """Turns torch's recurrent layers and step modules in `model` into fused modules.

    The modules stay the same objects; only their class changes. So parameters, buffers, hooks,
    training flags and all references to modules stay as they are. Subclasses of torch's modules are
    left alone, because a subclass may override anything. TorchScript modules are left alone because
    they cannot be changed. A warning names the modules left alone if nothing was replaced, or if a
    TorchScript module should have been replaced.

    Args:
        model: any module, which may itself be a module to replace.
        cells: the cells whose modules are replaced: "rnn" for `nn.RNN` and `nn.RNNCell`, "gru" for
            `nn.GRU` and `nn.GRUCell`, "lstm" for `nn.LSTM` and `nn.LSTMCell`. Or a mapping that
            replaces your own modules: from their class to a tuple of a `RecurrentCell`, a function
            of a module that returns its weights, and options of the layer. The weights have the
            names in the state_dict of `EquationLayer` (`weight_ih_l0`) or, for a module of one
            step, of `EquationCell` (`weight_ih`). Each module is replaced with such a module, which
            has the same weights (parameters stay the same objects) and the `batch_first`,
            `dropout` and `training` of the module, unless options have them. It is called like
            `EquationLayer`, and its last states have a first dimension for layers and directions.
            `restore_rnn` does not undo this.

    Returns:
        `model`, for chaining; with a mapping the new module, if `model` itself is replaced.

    Raises:
        TypeError: model is not a module, or cells is a string.
        ValueError: a cell is unknown, or weights do not belong to the cell.
        RuntimeError: a module to replace by the mapping has hooks. The model is then unchanged.

    Example:
        >>> from namernn_fast import recurrent_cell
        >>> class Loop(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.of_x, self.of_h = torch.nn.Linear(4, 8), torch.nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         h, outputs = x.new_zeros(x.shape[1], 8), []
        ...         for row in x:
        ...             h = torch.relu(self.of_x(row) + self.of_h(h))
        ...             outputs.append(h)
        ...         return torch.stack(outputs), h
        >>> @recurrent_cell(gates=1)
        ... def rectified(x, u, h):
        ...     return torch.relu(x[0] + u[0])
        >>> def weights_of(loop):
        ...     x, h = loop.of_x, loop.of_h
        ...     weights = {"weight_ih_l0": x.weight, "weight_hh_l0": h.weight}
        ...     return weights | {"bias_ih_l0": x.bias, "bias_hh_l0": h.bias}
        >>> replace_rnn(Loop(), {Loop: (rectified, weights_of, {"batch_first": False})})
        EquationLayer(rectified, 4, 8)
    """
    if isinstance(cells, Mapping):
        _check_module(model)
        replacements = cells
        if not any(type(module) in replacements for module in model.modules()):
            _warn_nothing_replaced(model, replacements)
        return _exchange(model, lambda name, module: module_like(name, module, replacements))
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


def _warn_nothing_replaced(model: torch.nn.Module, classes: Mapping[type, Any]) -> None:
    """Warns that no module of `model` was replaced."""
    left_alone = sorted(
        {
            type(module).__qualname__
            for module in model.modules()
            if isinstance(module, tuple(classes))
        }
    )
    names = ", ".join(f"nn.{cls.__name__}" if cls in FUSED_OF else cls.__name__ for cls in classes)
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
def restore_rnn(model: Prepared[Any]) -> Any: ...


@overload
def restore_rnn(model: Model) -> Model: ...


def restore_rnn(model: torch.nn.Module) -> torch.nn.Module:
    """Turns every fused layer and step module in `model` back into torch's module.

    Use it before tools that recognise torch's modules by their class, such as
    `torch.ao.quantization.quantize_dynamic`. Turns every prepared module into a fused module with a
    copy of its weights, not into torch's module. Parameters that were shared before `prepare_rnn`
    are shared again if their values are still equal. Drops `batch_invariant`, which only the fused
    classes have. Leaves subclasses of the fused classes alone.

    Args:
        model: any module, which may itself be a fused module.

    Returns:
        `model`, for chaining; a new module if `model` itself is prepared.

    Raises:
        TypeError: model is not a module.
        RuntimeError: a prepared module has 8-bit weights. The model is then unchanged.
    """
    _check_module(model)
    fused = [module for module in model.modules() if type(module) in PLAIN]

    pairs: list[tuple[Prepared[Any], torch.nn.Module]] = []

    def restored(name: str, module: torch.nn.Module) -> Any:
        if not isinstance(module, Prepared):
            return None
        pairs.append((module, module.restore()))
        return pairs[-1][1]

    model = _exchange(model, restored)
    _tie_again(pairs)
    for module in fused:
        _change_class(module, PLAIN)
    return model


def prepare_rnn(
    model: torch.nn.Module, dtype: torch.dtype | None = None, min_hidden: int | None = None
) -> Any:
    """Replaces the recurrent layers in `model` with prepared layers, for inference on a CPU.

    Prepares fused layers, step modules and token layers, and torch's own layers and step modules.
    A module that appears in several places stays one module. A parameter that appears in several
    modules is copied into each prepared module. Subclasses, TorchScript modules and prepared
    modules are left alone. `restore_rnn` turns prepared modules back into fused modules.

    Args:
        model: any module, in eval mode or not. It must not be trained afterwards.
        dtype: None, or torch.int8 for 8-bit weights, as in `FusedRNN.prepare`.
        min_hidden: with torch.int8, the smallest hidden_size of a layer that gets 8-bit weights.
            Smaller layers keep their dtype. So do layers that are not in float32, have a proj_size
            or run without a kernel. If None, the smallest size is 128 with AMX or AVX-512 VNNI, and
            256 with AVX-VNNI or AVX2; other processors use no 8-bit weights. If None, token layers
            with one direction also keep their dtype, because layers with 8-bit weights share no
            prefixes.

    Returns:
        `model`, for chaining; a new module if `model` itself is a module to replace.

    Raises:
        TypeError: model is not a module.
        ValueError: dtype is neither None nor torch.int8, or min_hidden is invalid.
        RuntimeError: a module has hooks, which the prepared module would not run. The model is then
            unchanged.

    Warns if nothing was replaced, or if torch.int8 was asked for and no layer got 8-bit weights.
    """
    _check_module(model)
    int8.check_prepared_dtype(dtype)
    is_size = type(min_hidden) is int and min_hidden >= 0 and dtype is not None
    if min_hidden is not None and not is_size:
        raise ValueError(
            f"min_hidden needs dtype=torch.int8 and must be an integer of at least 0, got "
            f"{min_hidden!r} with {dtype}"
        )

    sources: list[tuple[Prepared[Any], str, Tensor]] = []
    why_not_rounded: list[str | None] = []

    def prepared(name: str, module: torch.nn.Module) -> Any:
        if not _is_preparable(name, module):
            return None
        fused = _fused(module)
        why_not = None if dtype is None else _why_not_rounded(fused, min_hidden)
        why_not_rounded.append(why_not)
        other = fused.prepare(None if why_not else dtype)
        names = fused._names_in_state_dict()
        sources.extend((other, *each) for each in zip(names, fused._weights(), strict=True))
        return other

    model = _exchange(model, prepared)
    _remember_ties(model, sources)
    if not why_not_rounded:
        is_prepared = any(isinstance(module, Prepared) for module in model.modules())
        left = "prepared ones (restore_rnn undoes them)" if is_prepared else "subclasses"
        warnings.warn(
            f"prepare_rnn replaced nothing: the {type(model).__qualname__} has no recurrent "
            f"layers, or only {left}",
            stacklevel=2,
        )
    elif all(why_not_rounded):
        warnings.warn(
            f"prepare_rnn gave no layer 8-bit weights: {why_not_rounded[0]}",
            stacklevel=2,
        )
    return model


def _why_not_rounded(fused: Any, min_hidden: int | None) -> str | None:
    """Returns why `prepare_rnn` gives a fused module no 8-bit weights, or None if it does."""
    why_not_kernel = availability.why_not_cpu_kernel(next(fused.parameters()))
    if why_not_kernel is not None:
        return why_not_kernel
    why_not = why_not_int8(fused, min_hidden)
    if why_not is not None and why_not_int8(fused, min_hidden=0) is None:
        why_not += " (min_hidden=0 asks for them regardless)"
    return why_not


def is_replaceable(module: torch.nn.Module) -> bool:
    """Returns whether a module has a class that `prepare_rnn` replaces."""
    cls = type_before_parametrizations(module)
    return "_cell" in cls.__dict__ or type(module) in FUSED_OF


def _is_token_layer(cls: type) -> bool:
    return issubclass(cls, TokenLayer) and "_cell" in cls.__dict__


def _is_preparable(name: str, module: torch.nn.Module) -> bool:
    """Returns whether `prepare_rnn` replaces a module.

    Raises:
        RuntimeError: the module would be replaced, but has hooks.
    """
    if not is_replaceable(module):
        return False
    why_not = _fused(module)._why_not_preparable()
    if why_not is None:
        return True
    if _is_token_layer(type_before_parametrizations(module)):
        return False  # prepares its layer `rnn` instead, unless that has hooks
    where = repr(name) if name else "model"
    raise RuntimeError(f"prepare_rnn cannot replace {where}, a {type(module).__name__}: {why_not}")


def _fused(module: torch.nn.Module) -> Any:
    """Returns a fused module that shares the parameters of `module`, or `module` if it is fused."""
    fused = FUSED_OF.get(type(module))
    return module if fused is None else plain_twin(module, fused)


def _exchange(model: torch.nn.Module, other_of: Callable[[str, torch.nn.Module], Any]) -> Any:
    """Replaces modules in `model`, and returns `model`, or its replacement if it was replaced.

    Args:
        model: the model. It is not changed if `other_of` raises an error.
        other_of: a function that takes the name of a module and the module, and returns the module
            that replaces it, or None to search in its children.
    """
    others: dict[torch.nn.Module, Any] = {}

    def visit(name: str, module: torch.nn.Module) -> None:
        if module in others:
            return
        others[module] = other_of(name, module)
        if others[module] is None:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    for parent, other in others.items():
        for name, child in parent._modules.items() if other is None else ():
            if child is not None and others.get(child) is not None:
                parent._modules[name] = others[child]
    return model if others[model] is None else others[model]


class _Tie:
    """A parameter that several modules shared before they were prepared.

    Modules that shared a parameter share a `_Tie`, also in pickles and deep copies of the model.
    """

    def __init__(self, parameter: torch.nn.Parameter | None) -> None:
        self.parameter = parameter
        """The parameter if an unprepared module also has it, otherwise None."""


def _remember_ties(
    model: torch.nn.Module, sources: Sequence[tuple[Prepared[Any], str, Tensor]]
) -> None:
    """Records in prepared modules which of their weights were parameters of several modules.

    Args:
        model: the model with the prepared modules.
        sources: each prepared module, the name of a weight, and the parameter that it was copied
            from.
    """
    kept = {id(parameter): parameter for parameter in model.parameters()}
    counts = Counter(id(weight) for _, _, weight in sources)
    ties = {key: _Tie(kept.get(key)) for key in counts if counts[key] > 1 or key in kept}
    for module, name, weight in sources:
        if id(weight) in ties:
            module._ties[name] = ties[id(weight)]


def _tie_again(pairs: Sequence[tuple[Prepared[Any], torch.nn.Module]]) -> None:
    """Shares parameters again that were shared before `prepare_rnn`, if their values are equal.

    Args:
        pairs: each prepared module, and the module that was restored from it.
    """
    first: dict[_Tie, Tensor] = {}
    for prepared, module in pairs:
        for name, tie in prepared._ties.items():
            path, _, own_name = name.rpartition(".")
            owner = module.get_submodule(path)
            own = getattr(owner, own_name)
            other = first.setdefault(tie, own if tie.parameter is None else tie.parameter)
            if other is not own and _have_equal_values(own, other):
                setattr(owner, own_name, other)


def _have_equal_values(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.device) != (second.dtype, second.device):
        return False
    return first.shape == second.shape if first.is_meta else torch.equal(first, second)


def _check_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _change_classes(model: Model, classes: dict[type, type]) -> Model:
    _check_module(model)
    for module in model.modules():
        if type(module) in classes:
            _change_class(module, classes)
    return model


def _change_class(module: torch.nn.Module, classes: dict[type, type]) -> None:
    module.__class__ = classes[type(module)]
    module.__dict__.pop("batch_invariant", None)
