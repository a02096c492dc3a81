"""Reads and replaces the weights of a module, and finds what its calls run besides `forward`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.types import Device

from .. import ops
from ..call import int8
from ..cells import Cell
from ..integrations.nn_rnn import FromExporter, exact_class, plain_twin
from ..machine.torch_private import _has_any_global_hook

Module = TypeVar("Module", bound=torch.nn.Module)


def current_weights(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Returns the weights with these names, including parametrized weights.

    Reads `_parameters` first, because `getattr` takes ten times as long.
    """
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]  # type: ignore[misc]
    except KeyError:
        return [getattr(module, name) for name in names]


def arguments_of(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a constructor, including `**refused`, from its `locals()`."""
    refused = variables.pop("refused", {})
    return {
        **{name: variables[name] for name in variables.keys() - {"self", "__class__"}},
        **refused,
    }


def make_parameters(
    module: Any, options: int, own: Mapping[str, Any], device: Device, dtype: torch.dtype | None
) -> None:
    """Registers and initialises the parameters of a layer or step module that torch lacks.

    Args:
        module: the module, whose sizes and parameter names are already set.
        options: the option bits that the parameters depend on.
        own: the arguments for `Cell.own`; see `CustomLayer`.
        device, dtype: the device and dtype of the parameters.
    """
    shapes = ops.parameters_and_shapes(
        module._cell,
        options,
        layers=getattr(module, "num_layers", 1),
        features=module.input_size,
        hidden=module.hidden_size,
        projected=module.hidden_size,
        heads=checked_heads(module),
    )
    for name, (parameter, shape) in zip(module._weight_names(), shapes, strict=True):
        values, trainable = torch.empty(shape, device=device, dtype=dtype), True
        if parameter.init is not None:
            initial = parameter.init(own[parameter.name], module.hidden_size)
            if initial.shape not in ((), shape[-1:], shape):
                wanted = f"a number or have shape {tuple(shape)}"
                got = f"got shape {tuple(initial.shape)}"
                raise ValueError(f"{parameter.name} must be {wanted}, {got}")
            values.copy_(initial)
            trainable = own[f"train_{parameter.name}"]
        module.register_parameter(name, torch.nn.Parameter(values, trainable))
    module.reset_parameters()


def checked_heads(module: Any) -> int:
    """Returns the number of heads of a module, 1 if its cell has none, or raises ValueError."""
    heads, hidden_size = getattr(module, "heads", 1), module.hidden_size
    if type(heads) is not int or heads < 1 or hidden_size % heads:
        raise ValueError(f"heads must be a divisor of hidden_size ({hidden_size}), got {heads!r}")
    return heads


def options_shown(module: Any, **defaults: Any) -> str:
    """Returns options of a module for its `extra_repr`, except those with their default value."""
    options = {name: getattr(module, name, default) for name, default in defaults.items()}
    return "".join(f", {name}={v}" for name, v in options.items() if v != defaults[name])


def draw_parameters(module: Any) -> None:
    """Draws initial parameters as torch's modules do, except for parameters with `init`."""
    described = ops.parameters_of(module._cell, ops.BIAS * module.bias)
    bound = module.hidden_size**-0.5 if module.hidden_size else 0.0
    for name, parameter in zip(module._weight_names(), itertools.cycle(described)):
        if parameter.init is None:
            torch.nn.init.uniform_(getattr(module, name), -bound, bound)


def what_else_runs(module: torch.nn.Module) -> str | None:
    """Returns what a call of a module runs besides the `forward` of its class, or None."""
    if "forward" in module.__dict__:
        return "a forward set on the object"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "hooks"
    return "global hooks" if _has_any_global_hook() else None


def _has_other_forward(module: torch.nn.Module) -> bool:
    """Returns whether a user's subclass replaced the `forward` of this package's class."""
    return type(module).forward is not exact_class(module).forward


def check_forward(module: torch.nn.Module) -> None:
    """Raises RuntimeError if a subclass replaced the `forward` that `last_state` computes."""
    if _has_other_forward(module):
        raise RuntimeError(
            f"last_state would not run the forward of {type(module).__name__}: call the module and "
            "use its last states, or override last_state"
        )


def why_not_preparable(module: torch.nn.Module) -> str | None:
    """Returns why a prepared copy would not behave like the module, or None if it would."""
    if _has_other_forward(module):
        return f"the class {type(module).__name__} has a different forward"
    what_else = what_else_runs(module)
    return None if what_else in (None, "global hooks") else f"it has {what_else}"


def with_weights(
    module: Module,
    cls: type[Module],
    weights: Mapping[str, Tensor],
    requires_grad: bool,
) -> Module:
    """Returns a copy of a module, in eval mode and without submodules, that has these weights.

    Args:
        module: the module.
        cls: the class of the copy, which is neither parametrized nor a user's subclass.
        weights: the weights by name. Any other parameter of the copy is None.
        requires_grad: whether the weights require gradients.
    """
    copy = plain_twin(module, cls)
    for name, value in module.__dict__.items():
        if isinstance(value, dict | list):
            copy.__dict__[name] = value.copy()
    parameters = dict.fromkeys(module._parameters)
    copy.__dict__.update(_parameters=parameters, _modules={}, training=False)
    for name, weight in weights.items():
        setattr(copy, name, torch.nn.Parameter(weight, requires_grad))
    return copy


def matrices(layer: Any, tables: int) -> list[str]:
    """Returns the state_dict names of a layer's matrices, without the first `tables` weight_ih."""
    rnn = layer._recurrent
    names = layer._names_in_state_dict()[-len(rnn._weight_names()) :]  # without the embedding
    parameters = ops.parameters_of(rnn._cell, rnn._options(rnn._weights()))
    found = []
    for name, parameter in zip(names, itertools.cycle(parameters)):
        if parameter.role == "weight_ih" and tables:
            tables -= 1
        elif parameter.is_matrix:
            found.append(name)
    return found


def from_saved(layer: Any, named: dict[str, Tensor]) -> list[Tensor]:
    """Returns the weights of a layer from a dictionary of names and tensors.

    Replaces 8-bit integers and scales in the dictionary with the weights they represent.
    """
    int8.to_weights(named, matrices(layer, 0))
    return [named[name] for name in layer._names_in_state_dict()]


def why_no_int8_kernel(rnn: Any) -> str | None:
    """Returns what the kernels for 8-bit weights do not support in a layer or step module."""
    weights = rnn._weights()
    return ops.why_only_float(rnn._cell, weights, rnn.hidden_size, rnn._options(weights))


def why_not_int8(layer: Any, min_hidden: int | None = None) -> str | None:
    """Returns why a layer would not benefit from 8-bit weights, or None if it would benefit.

    Args:
        layer: a fused layer, step module or token layer.
        min_hidden: as in `prepare_rnn`.
    """
    rnn = layer._recurrent
    weights = [weight for weight in rnn._weights() if weight.dim() == 2]
    if weights[0].dtype != torch.float32:
        return "the layer is not in float32"
    if lacking := why_no_int8_kernel(rnn):
        return f"8-bit weights do not support {lacking}"
    if max(weight.shape[1] for weight in weights) > int8.MOST_INPUTS:
        return f"they take at most {int8.MOST_INPUTS} inputs"
    if min_hidden is None and rnn is not layer and not rnn.bidirectional:
        return "sequences of token ids could not share prefixes"
    return int8.why_not_faster(rnn.hidden_size, min_hidden)


CLASSES: dict[str, type[Any]] = {}
"""The public layers, step modules and token layers, by name."""


class Preparable(FromExporter):
    """The methods of fused layers, step modules and token layers that `prepare()` needs."""

    _cell: Cell
    _why_not_preparable = why_not_preparable

    _more_options = 0
    """Option bits to add to each call. They are not options of the module."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not {"_cell", "_equation", "_layer_class"}.isdisjoint(cls.__dict__):
            # Marks a class of this package, for `is_exact`.
            cls._cell = cls.__dict__.get("_cell")  # type: ignore[assignment]
            CLASSES[cls.__name__] = cls

    @property
    def _recurrent(self) -> Any:
        """The recurrent layer inside a token layer, or else the module itself."""
        return self

    def _weight_names(self) -> Sequence[str]:
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)  # type: ignore[misc]
        names = self._weight_names() if self._recurrent is self else ()
        if any(f"{prefix}{name}_int8" in state_dict for name in names):
            lists[-1].append(
                f"the state_dict must have weights in {self._weights()[0].dtype}, got 8-bit ones, "
                "which only prepare(torch.int8) loads"
            )

    def _names_in_state_dict(self) -> list[str]:
        """Returns the names of the weights in the state_dict, in the order of `_weights`."""
        return [*self._weight_names()]

    def _weights(self: Any) -> list[Tensor]:
        return current_weights(self, self._weight_names())

    def _with_weights(self: Any, weights: Sequence[Tensor], requires_grad: bool) -> Any:
        """Returns a copy of this module in eval mode with these weights."""
        named = dict(zip(self._weight_names(), weights, strict=True))
        return with_weights(self, exact_class(self), named, requires_grad)
