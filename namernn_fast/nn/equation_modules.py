"""`EquationLayer`, `EquationCell` and `TokenEquationLayer`: the modules of cells from equations."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.types import Device

from ..cells import Cell, HasCell, only, user_cell
from .base.layer import CustomLayer
from .base.step_module import CustomStepModule
from .base.token_layer import TokenLayer
from .weights import arguments_of


class _OfEquation(torch.nn.Module):
    """What layers and step modules of equations share."""

    _cell: Cell
    _equation: ClassVar[Callable[..., HasCell] | None] = None
    """Makes the cell of a subclass for one equation, from options of the constructor."""

    def extra_repr(self) -> str:
        """Returns the options, for `repr`, with the name of the cell unless the class says it."""
        options = super().extra_repr()
        return f"{self._cell.name}, {options}" if self._equation is None else options


class EquationLayer(_OfEquation, CustomLayer[Any]):
    """A layer whose cell is an equation; `RecurrentCell.layer` makes it.

    Calls, parameters and their initialisation are as in `FusedGRU`. `hx` and the returned states
    are a tensor if the cell has one state, otherwise a tuple of one tensor per state. The keyword
    arguments of a call are the cell's inputs. On a CPU, runs in one operator.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedGRU`.
        bidirectional, device, dtype, batch_invariant, recompute: as in `FusedGRU`.
        cell: the `RecurrentCell`. Subclasses for one equation have no such argument.
        own: for each parameter of the cell its initial values, by name, and whether it requires
            gradients, as `train_<name>`; for a cell with heads their number, `heads`.

    Example:
        >>> @recurrent_cell(gates=1, states=2, weight_hh=False, parameters={"decay": 2.0})
        ... def average(x, h, c, decay):
        ...     c = c + (x[0] - c) * torch.sigmoid(-decay)
        ...     return torch.tanh(c), c
        >>> layer = average.layer(8, 16, decay=1.0)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 8))
        >>> output.shape, c_n.shape, layer.decay_l0[0]
        (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]), tensor(1., grad_fn=<SelectBackward0>))
    """

    _cell: Cell = None  # type: ignore[assignment]  # each layer has its own

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        batch_invariant: bool = False,
        recompute: int | None = None,
        **own: Any,
    ) -> None:
        arguments = arguments_of(locals())
        del arguments["own"]
        self.__dict__["_cell"] = cell = _take_cell(self._equation, own)
        super().__init__(**arguments, **_own_options(cell, own))


class EquationCell(_OfEquation, CustomStepModule[Any]):
    """One step of an `EquationLayer`; `RecurrentCell.step_module` makes it.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `FusedGRUCell`.
        cell, own: as in `EquationLayer`.

    Example:
        >>> @recurrent_cell(gates=1, states=2, weight_hh=False)
        ... def average(x, h, c):
        ...     c = 0.9 * c + 0.1 * x[0]
        ...     return torch.tanh(c), c
        >>> cell = average.step_module(8, 16)
        >>> h, c = cell(torch.randn(3, 8))
        >>> h.shape, c.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    _cell: Cell = None  # type: ignore[assignment]  # each module has its own

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **own: Any,
    ) -> None:
        cell = _take_cell(self._equation, own)
        self.__dict__.update(_cell=cell, _names=self._names_for(cell))
        more = _own_options(cell, own)
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype, **more)


class TokenEquationLayer(TokenLayer[Any]):
    """An `nn.Embedding` followed by an `EquationLayer`; `RecurrentCell.token_layer` makes it.

    Works like `TokenGRU`.

    Args:
        num_embeddings, input_size, padding_idx: as in `TokenGRU`.
        sizes, options: hidden_size and all options, as in `EquationLayer`.
        cell: as in `EquationLayer`.

    Example:
        >>> @recurrent_cell(gates=1)
        ... def rectified(x, u, h):
        ...     return torch.relu(x[0] + u[0])
        >>> model = rectified.token_layer(31, 8, 16, padding_idx=0)
        >>> model.last_state(torch.randint(1, 31, (5, 3))).shape
        torch.Size([1, 3, 16])
    """

    rnn: EquationLayer
    _cell: Cell = None  # type: ignore[assignment]  # each model has its own
    _layer_class = EquationLayer

    def __init__(self, num_embeddings: int, input_size: int, *sizes: Any, **options: Any) -> None:
        super().__init__(num_embeddings, input_size, *sizes, **options)
        self.__dict__["_cell"] = self.rnn._cell


def _take_cell(equation: Callable[..., HasCell] | None, own: dict[str, Any]) -> Cell:
    """Removes what determines the cell from the arguments of a constructor, and returns the cell.

    Args:
        equation: makes the cell from some of the arguments; None if `cell` is one of them.
        own: the arguments, by name.

    Raises:
        TypeError: the argument `cell` is missing or no `RecurrentCell`.
    """
    if equation is None:
        cell = own.pop("cell", None)
    else:
        names = own.keys() & inspect.signature(equation).parameters.keys()
        cell = equation(**{name: own.pop(name) for name in names})
    described = user_cell(cell)
    if described is None:
        raise TypeError(f"cell must be a RecurrentCell, made by recurrent_cell, got {cell!r}")
    return described


def _own_options(cell: Cell, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a constructor that only this cell has, with defaults added.

    Raises:
        TypeError: an argument that is given is not one of them.
    """
    options: dict[str, Any] = {parameter.name: None for parameter in cell.own}
    options |= {f"train_{parameter.name}": True for parameter in cell.own}
    options |= {"heads": 1} if cell.can_have_heads else {}
    if unknown := given.keys() - options.keys():
        name = min(unknown)
        raise TypeError(f"a {cell.name} module takes no argument {name!r}{only(options)}")
    return options | {**given}
