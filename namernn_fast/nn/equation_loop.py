"""`EquationLoop`: the layer of an equation as a loop over its function, to compare with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..cells import HasCell
from ..cells.cell import LayerWeights
from ..equations import products_of_h
from .equation_modules import EquationLayer
from .states import states_in


class EquationLoop(EquationLayer):
    """Calls the function of a cell for every step; `RecurrentCell.loop` makes it.

    Has the parameters of `EquationLayer`, but runs torch's operators on any device, and takes
    padded input only, without lengths and resets. Tests and benchmarks compare with it.
    """

    _step: HasCell

    def __init__(self, *sizes: Any, cell: HasCell, **options: Any) -> None:
        self.__dict__["_step"] = cell
        super().__init__(*sizes, cell=cell, **options)

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Any = None, **inputs: Tensor
    ) -> tuple[Tensor, Any]:
        """Computes output and the last states as `EquationLayer` does.

        Args:
            input: (seq_len, batch, input_size), or (batch, seq_len, input_size) with batch_first.
            hx, inputs: as in `EquationLayer`.
        """
        cell, size, weights = self._cell, self.hidden_size, self._weights()
        by_batch = self.batch_first
        x = input.transpose(0, 1) if by_batch else input
        beside = {name: v.transpose(0, 1) if by_batch else v for name, v in inputs.items()}
        beside = {i.name: beside.get(i.name, i.zeros(x, size)) for i in cell.inputs}
        parts = len(self._all_weights)
        last: list[list[Tensor]] = []
        initial = states_in(hx) or [x.new_zeros(parts, x.shape[1], size)] * len(cell.states)
        for layer in ops.layers_of(cell, weights, self._options(weights)):
            rows, outputs = F.dropout(x, self.dropout, self.training) if last else x, []
            for direction, of_direction in enumerate(layer):
                part = len(last)
                of_part = {
                    i.name: i.part_of(beside[i.name], size, part, parts) for i in cell.inputs
                }
                states = [state[part] for state in initial]
                output, states = self._run(of_direction, rows, states, of_part, direction == 1)
                outputs.append(output)
                last.append(states)
            x = torch.cat(outputs, -1)
        stacked = tuple(map(torch.stack, zip(*last, strict=True)))
        return x.transpose(0, 1) if by_batch else x, stacked if len(stacked) > 1 else stacked[0]

    def _run(
        self,
        weights: LayerWeights,
        x: Tensor,
        states: list[Tensor],
        inputs: dict[str, Tensor],
        reverse: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the output and the last states of one direction of a layer."""
        cell = self._cell
        own = {
            p.name: weights[p.name].unbind() if len(p.shape) == 2 else weights[p.name]
            for p in cell.own
        }
        sums = F.linear(x, weights["weight_ih"], weights.get("bias_ih"))
        bias_hh = weights.get("bias_hh")
        outputs: list[Any] = [None] * len(x)
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            given = [sums[t].chunk(cell.gates, -1)]
            if cell.has_weight_hh:
                weight_hh = weights["weight_hh"]
                given.append(products_of_h(states[0], weight_hh, bias_hh, cell.gates))
            of_step = {name: rows[t] for name, rows in inputs.items()}
            states = [*states_in(self._step(*given, *states, **own, **of_step))]
            outputs[t] = states[0]
        return torch.stack(outputs), states
