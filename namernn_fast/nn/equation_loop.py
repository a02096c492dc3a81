"""`EquationLoop`: the layer of an equation as a loop over its function, to compare with."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cells import HasCell
from .equation_modules import EquationLayer
from .states import states_in
from .weights import current_weights


class EquationLoop(EquationLayer):
    """Calls the function of a cell for every step; `RecurrentCell.loop` makes it.

    Has the parameters of `EquationLayer`, but runs torch's operators on any device, and takes
    padded input only, without lengths and resets. Tests and benchmarks compare with it.
    """

    _step: Callable[..., Any]

    def __init__(
        self, *sizes: Any, cell: HasCell, step: Callable[..., Any], **options: Any
    ) -> None:
        self.__dict__["_step"] = step
        super().__init__(*sizes, cell=cell, **options)

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Any = None, **inputs: Tensor
    ) -> tuple[Tensor, Any]:
        """Computes output and the last states as `EquationLayer` does.

        Args:
            input: (seq_len, batch, input_size), or (batch, seq_len, input_size) with batch_first.
            hx, inputs: as in `EquationLayer`.
        """
        by_batch = self.batch_first
        x = input.transpose(0, 1) if by_batch else input
        beside = {name: v.transpose(0, 1) if by_batch else v for name, v in inputs.items()}
        parts, directions = len(self._all_weights), 1 + self.bidirectional
        zeros = [x.new_zeros(parts, x.shape[1], self.hidden_size)] * len(self._cell.states)
        initial, last = states_in(hx) or zeros, []
        for part in range(parts):
            if part % directions == 0:
                rows = F.dropout(x, self.dropout, self.training) if part else x
                outputs = []
            of_part = {
                cell_input.name: cell_input.part_of(
                    beside.get(cell_input.name, cell_input.zeros(x, self.hidden_size)),
                    self.hidden_size,
                    part,
                    parts,
                )
                for cell_input in self._cell.inputs
            }
            states = [state[part] for state in initial]
            output, states = self._run(part, rows, states, of_part, part % directions == 1)
            outputs.append(output)
            last.append(states)
            x = torch.cat(outputs, -1)
        stacked = tuple(map(torch.stack, zip(*last, strict=True)))
        return x.transpose(0, 1) if by_batch else x, stacked if len(stacked) > 1 else stacked[0]

    def _run(
        self,
        part: int,
        x: Tensor,
        states: list[Tensor],
        inputs: dict[str, Tensor],
        reverse: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the output and the last states of one direction of a layer."""
        cell = self._cell
        described = cell.present[self.bias][False]
        values = current_weights(self, self._all_weights[part])
        weights = dict(zip((p.name for p in described), values, strict=True))
        own = {
            p.name: weights[p.name].unbind() if len(p.shape) == 2 else weights[p.name]
            for p in cell.own
        }
        sums = F.linear(x, weights["weight_ih"], weights.get("bias_ih"))
        outputs: list[Any] = [None] * len(x)
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            given = [sums[t].chunk(cell.gates, -1)]
            if cell.has_weight_hh:
                products = _products(states[0], weights["weight_hh"], cell.gates)
                bias = weights.get("bias_hh")
                products = products if bias is None else products + bias
                given.append(products.chunk(cell.gates, -1))
            of_step = {name: rows[t] for name, rows in inputs.items()}
            states = [*states_in(self._step(*given, *states, **own, **of_step))]
            outputs[t] = states[0]
        return torch.stack(outputs), states


def _products(h: Tensor, weight_hh: Tensor, gates: int) -> Tensor:
    """Returns weight_hh h, (batch, gates * hidden_size), whose blocks are heads of h."""
    size, width = h.shape[1], weight_hh.shape[1]
    if width == size:
        return F.linear(h, weight_hh)
    blocks = weight_hh.view(gates, size // width, width, width)
    heads = h.view(-1, size // width, width)
    return torch.einsum("gkij,bkj->bgki", blocks, heads).flatten(1)
