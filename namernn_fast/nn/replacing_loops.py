"""Replaces a user's own recurrent modules, such as loops in Python, with modules of equations."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .equation import RecurrentCell
from .equation_modules import EquationCell, EquationLayer
from .weights import what_else_runs

WeightsOf = Callable[[Any], Mapping[str, Tensor]]
Replacement = tuple[RecurrentCell, WeightsOf] | tuple[RecurrentCell, WeightsOf, Mapping[str, Any]]
"""A cell; a function that returns a module's weights, by the names that `EquationLayer` or, for a
module of one step, `EquationCell` gives them; and options of the layer or step module."""
Replacements = Mapping[type[torch.nn.Module], Replacement]
"""A replacement for each class."""


def module_like(name: str, module: torch.nn.Module, replacements: Replacements) -> Any:
    """Returns the module that replaces `module`, or None if its class is not in `replacements`.

    Raises:
        RuntimeError: the module has hooks, which the replacement would not run.
        ValueError: the weights do not belong to the cell.
    """
    if type(module) not in replacements:
        return None
    where = f"{name or 'model'}, a {type(module).__name__}"
    if (what_else := what_else_runs(module)) not in (None, "global hooks"):
        raise RuntimeError(f"replace_rnn cannot replace {where}: it has {what_else}")
    cell, weights_of, *given = replacements[type(module)]
    weights, options = dict(weights_of(module)), dict(given[0] if given else {})
    try:
        return _with_weights(cell, weights, module, options)
    except ValueError as error:
        shapes = _listed({name: tuple(weight.shape) for name, weight in weights.items()})
        what = f"it does not fit {cell!r}: {error}, got {shapes}"
        raise ValueError(f"replace_rnn cannot replace {where}: {what}") from error


def _with_weights(
    cell: RecurrentCell,
    weights: dict[str, Tensor],
    module: torch.nn.Module,
    given: dict[str, Any],
) -> EquationLayer | EquationCell:
    """Returns a layer or step module of a cell, with these weights and options."""
    is_layer = any(re.search(r"_l\d+(_reverse)?$", name) for name in weights)
    first = "_l0" if is_layer else ""
    for name in ["weight_ih", "weight_hh"][: 1 + cell._cell.has_weight_hh]:
        if f"{name}{first}" not in weights:
            either = f"{name}{first}" if is_layer else f"{name}_l0 of a layer, or {name} of a step,"
            raise ValueError(f"{either} is missing")
    weight_ih = weights[f"weight_ih{first}"]
    hidden = weight_ih.shape[0] // cell._cell.gates
    options: dict[str, Any] = {"bias": f"bias_ih{first}" in weights, "device": "meta"}
    if cell._cell.can_have_heads:
        of_layer = weight_ih, weights[f"weight_hh{first}"]
        options["heads"] = ops.heads_of(cell._cell, of_layer, hidden)
    made: EquationLayer | EquationCell
    if is_layer:
        numbers = [int(found[1]) for name in weights if (found := re.search(r"_l(\d+)", name))]
        for name in ("batch_first", "dropout"):
            if isinstance(value := getattr(module, name, None), bool | float):
                options[name] = value
        if "batch_first" not in options | given:
            choices = '{"batch_first": True} for (batch, seq_len, features), or False'
            raise ValueError(f"the layout of its input is unknown: add options, {choices}")
        options["bidirectional"] = any(name.endswith("_reverse") for name in weights)
        made = cell.layer(weight_ih.shape[1], hidden, 1 + max(numbers), **(options | given))
    else:
        made = cell.step_module(weight_ih.shape[1], hidden, **(options | given))
    shapes = {name: tuple(weight.shape) for name, weight in made.named_parameters()}
    if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise ValueError(f"wanted {_listed(shapes)}")
    for name, weight in weights.items():
        # A parameter stays the same object, so that optimizers that know it still train it.
        is_parameter = isinstance(weight, torch.nn.Parameter)
        value = weight if is_parameter else torch.nn.Parameter(weight.detach().clone())
        setattr(made, name, value)
    return made.train(module.training)


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
