"""`PreparedWeights`: the weights of a stack of layers, packed once for many calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from .. import ops, prepared_ops
from ..cells import Cell
from ..machine import fp32_precision
from ..machine.context import autocast_is_on, is_eager
from .options import PRECISION_BITS, batch_invariant_is_on

NO_GRADIENTS = (
    "a prepared module computes no gradients: use torch.no_grad(), or call the layer itself"
)
"""The error of a prepared module whose arguments require a gradient."""


@dataclass(slots=True)
class PreparedWeights:
    """The weights of all layers in one tensor, in the order in which the kernels read them."""

    tensor: Tensor
    cell: Cell
    sizes: list[int]
    """As in `prepared_ops`."""
    options: int
    """The option bits of the layers."""
    shapes: list[Tensor]
    """Tensors without memory that have the shapes and dtypes of the weights, for checks. If the
    first layer reads token ids, it has tables instead of weight_ih."""

    @property
    def has_table(self) -> bool:
        """Whether the first layer reads token ids."""
        return self.sizes[3] > 0

    @classmethod
    def pack(
        cls, cell: Cell, weights: Sequence[Tensor], options: int, has_table: bool
    ) -> "PreparedWeights":
        """Packs the weights of a stack of layers.
        Args:
            cell: the cell of the layers.
            weights: the weights, as in `ops`, on a CPU.
            options: the option bits of the layers.
            has_table: whether the first layer has tables instead of weight_ih.
        """
        first, layers = weights[0].shape, ops.layer_count(cell, weights, options)
        hidden = first[has_table] // cell.gates
        projected = weights[1].shape[-1] if cell.can_project else hidden
        vocabulary, features = (first[0], 0) if has_table else (0, first[1])
        heads = ops.heads_of(cell, weights, hidden)
        sizes = [layers, features, hidden, vocabulary, projected, heads]
        tensor = prepared_ops.prepare(cell.number, weights, sizes, options, cell.program)
        return cls(tensor, cell, sizes, options, [without_memory(weight) for weight in weights])

    def run_simple(self, input: Tensor, hx: Any) -> Any:
        """Fast path for the most frequent calls: padded features, with no arguments other than hx.

        Args:
            input: (seq_len, batch, input_size), or with BATCH_FIRST (batch, seq_len, input_size).
            hx: the initial states as a layer takes them.

        Returns:
            output and the last states as a layer returns them, or None if this path cannot run the
            call. The caller must then call `functional.run`, which also raises any error.
        """
        # Inline and ordered for speed, because these checks take as long as a small kernel.
        if (
            not is_eager()
            or autocast_is_on()
            or type(input) is not Tensor
            or input.dim() != 3
            or not input.is_cpu
        ):
            return None
        cell = self.cell
        states: tuple[Any, ...] = ()
        if hx is not None:
            if len(cell.states) == 1:
                states = (hx,)
            elif type(hx) is tuple:
                states = hx
            else:
                return None
            for state in states:
                if not (isinstance(state, Tensor) and state.is_cpu):
                    return None
        if is_grad_enabled() and any(tensor.requires_grad for tensor in (input, *states)):
            return None
        tensors, sizes, options = [*states, self.tensor], self.sizes, self.current_options()
        if states:
            options |= ops.STATES
        try:
            output, last = prepared_ops.forward_untraced(
                cell.number, input, tensors, sizes, None, None, options, 0, cell.program
            )
        except (RuntimeError, TypeError):
            return None
        return output, last[0] if len(last) == 1 else tuple(last)

    def call_options(self) -> int:
        """Returns the option bits of a call under the current setting of `batch_invariant()`."""
        return self.options | ops.BATCH_INVARIANT if batch_invariant_is_on() else self.options

    def current_options(self) -> int:
        """Returns `call_options()` plus the bit for the float32 precision that torch allows.

        This is faster than `precision_bits`, but Dynamo cannot trace it.
        """
        precision = fp32_precision.get("mkldnn", self.cell.fp32_precision)
        return self.call_options() | PRECISION_BITS.get(precision, 0)

    def fits(self, weights: Sequence[Tensor], options: int) -> bool:
        """Returns whether shapes, dtypes and option bits match, as `refresh` requires."""
        mine = [(shape.shape, shape.dtype) for shape in self.shapes]
        return (mine, self.options) == ([(w.shape, w.dtype) for w in weights], options)

    def refresh(self, weights: Sequence[Tensor]) -> None:
        """Packs other weights of the same shapes and dtypes into the same memory."""
        cell = self.cell
        prepared_ops.refresh(
            self.tensor, cell.number, weights, self.sizes, self.options, cell.program
        )

    def unpack(self) -> list[Tensor]:
        """Returns copies of the weights, with an empty tensor for a table.

        The copies equal the original weights, or with INT8 the rounded weights.
        """
        return prepared_ops.unpack(  # type: ignore[no-any-return]
            self.tensor, self.cell.number, self.sizes, self.options, self.cell.program
        )


def without_memory(tensor: Tensor) -> Tensor:
    """Returns zeros like `tensor`, expanded from a single element to save memory."""
    zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    return zero.expand(tensor.shape)
