"""The modules for a single step: `torch.nn.RNNCell` and `torch.nn.GRUCell`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import availability
from .call import Call, Cell
from .functional import batch_invariant_is_on, option_bits, run
from .integrations.fx import make_leaves
from .integrations.nn_rnn import is_exact, plain_twin
from .nn import current_weights

_VANILLA_STEPS = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}
_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _FusedCell(torch.nn.RNNCellBase):
    """What the fused cells share.

    A subclass inherits from this class first and then from torch's cell.
    """

    _cell: Cell
    _torch_class: type[torch.nn.RNNCellBase]
    nonlinearity: str = "tanh"

    def _step(self) -> Callable[..., Tensor] | None:
        """Returns torch's operator for a step, or None if torch's cell must raise an error."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Returns the next state, (batch, hidden_size), or (hidden_size) for one row.

        Args:
            input: (batch, input_size), or (input_size).
            hx: (batch, hidden_size), or (hidden_size); None for zeros.

        Raises:
            ValueError: input or hx has neither 1 nor 2 dimensions.
            RuntimeError: a size, dtype or device does not match, or the nonlinearity is unknown.
        """
        weights = current_weights(self, _WEIGHTS)
        if self.why_not_fused(input, hx, weights) is None:
            weights = weights if self.bias else weights[:2]
            options = option_bits(weights, self.bias, False, self.nonlinearity, False, False)
            row, states = input.unsqueeze(0), None if hx is None else hx.unsqueeze(0)
            _, h_n = run(Call(row, states, weights, None, None, options, cell=self._cell), row)
            # Not a view: one made under no_grad could not be modified in place afterwards.
            return h_n.squeeze(0) if torch.is_grad_enabled() else h_n.squeeze_(0)
        step = self._step()
        if step is None or input.dim() != 2 or (hx is not None and hx.dim() != 2):
            return super().forward(input, hx)  # type: ignore[no-any-return]
        if hx is None:
            hx = input.new_zeros(input.shape[0], self.hidden_size)
        return step(input, hx, *weights)

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...

    def why_not_fused(
        self, input: Tensor, hx: Tensor | None = None, weights: Sequence[Tensor] | None = None
    ) -> str | None:
        """Returns why a call runs torch's own cell, or None if it runs the fused operator.

        Args:
            input, hx: of the call.
            weights: the current weights of this cell, if the caller has read them already.
        """
        # Torch's own cell is not batch-invariant and has no rule for `vmap`.
        if not (batch_invariant_is_on() or torch._C._are_functorch_transforms_active()):
            slower = self._why_slower(input)
            if slower is not None:
                return slower
        weights = current_weights(self, _WEIGHTS) if weights is None else weights
        if not self._fits(input, hx, weights[0]):
            name = self._torch_class.__name__
            return f"the arguments do not match, and nn.{name} raises its own errors"
        return None

    def _why_slower(self, input: Tensor) -> str | None:
        """Returns why the fused operator would not be faster than torch's cell, or None."""
        return "torch's own cell is as fast for a single step"

    def _fits(self, input: Tensor, hx: Tensor | None, weight_ih: Tensor) -> bool:
        """Returns whether shapes and dtypes match; if not, torch's cell must raise its errors."""
        batch, dtype = input.shape[:-1], input.dtype
        return (
            self._step() is not None
            and len(batch) in (0, 1)
            and input.dim() > 0
            and input.shape[-1] == self.input_size
            and input.layout == torch.strided
            and (dtype == weight_ih.dtype or torch._C._is_any_autocast_enabled())
            and (hx is None or (hx.shape == (*batch, self.hidden_size) and hx.dtype == dtype))
        )

    def __prepare_scriptable__(self) -> torch.nn.RNNCellBase:
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        return plain_twin(self, self._torch_class) if is_exact(self) else self


class FusedRNNCell(_FusedCell, torch.nn.RNNCell):
    """A drop-in for `torch.nn.RNNCell`: one step, h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh).

    The constructor, parameters, `state_dict`, initialisation, errors and results are those of
    `torch.nn.RNNCell`. So are the operators, because the fused kernel is not faster for a single
    step; it runs only for batch invariance and `vmap`, which those operators do not support.
    `namernn_fast.explain` says which path an input takes.

    Example:
        >>> cell = FusedRNNCell(8, 16)
        >>> cell(torch.randn(3, 8), torch.zeros(3, 16)).shape
        torch.Size([3, 16])
    """

    _cell = "rnn"
    _torch_class = torch.nn.RNNCell

    def _step(self) -> Callable[..., Tensor] | None:
        return _VANILLA_STEPS.get(self.nonlinearity)


class FusedGRUCell(_FusedCell, torch.nn.GRUCell):
    """A drop-in for `torch.nn.GRUCell`: one step of `torch.nn.GRU`.

    The constructor, parameters, `state_dict`, initialisation, errors and results are those of
    `torch.nn.GRUCell`. The fused operator runs on a CPU in float32 and float64, where torch runs a
    dozen operators, and for batch invariance and `vmap`, which torch's cell does not support.
    `namernn_fast.explain` says which path an input takes.

    Example:
        >>> cell = FusedGRUCell(8, 16)
        >>> cell(torch.randn(3, 8), torch.zeros(3, 16)).shape
        torch.Size([3, 16])
    """

    _cell = "gru"
    _torch_class = torch.nn.GRUCell

    def _step(self) -> Callable[..., Tensor] | None:
        return torch.gru_cell

    def _why_slower(self, input: Tensor) -> str | None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return "a compiler fuses the operators of torch's own cell"
        if input.dtype not in (torch.float32, torch.float64):
            return "in 16 bits torch's own cell is faster for some sizes"
        return availability.why_not_kernel(input, self._cell)


make_leaves(FusedRNNCell, FusedGRUCell)
