"""`FusedCell`, the base class of the modules for a single step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor, is_grad_enabled
from torch.types import Device

from ... import ops
from ...call import Arguments, Call, given, normalise
from ...call.options import batch_invariant_is_on, option_bits
from ...cells import Cell
from ...functional import run
from ...integrations.nn_rnn import is_exact, plain_twin, refuse_script, refuse_untraceable
from ...machine import availability
from ...machine.context import (
    autocast_is_on,
    functorch_is_active,
    is_compiling,
    is_eager,
    is_jit_tracing,
    is_unobserved,
)
from ...step_autograd import PackedSteps, Unrolled, apply_step, holds_its_values, open_block
from ..inference.direct import (
    MIN_UNROLLED,
    is_faster,
    is_faster_with_gradients,
    step_of_module,
)
from ..inference.prepared import PreparedCell
from ..states import States, map_states, states_in, with_steps, without_layers
from ..weights import (
    Preparable,
    current_weights,
    draw_parameters,
    make_parameters,
    options_shown,
)


class FusedCell(Preparable, torch.nn.RNNCellBase, Generic[States]):
    """The base class of the fused step modules.

    A subclass inherits from this class first and then from torch's cell.
    """

    _cell: Cell
    _names: tuple[Sequence[str], Sequence[str]]
    """The names of the parameters: first with biases, then without biases."""
    nonlinearity: str = "tanh"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__dict__.get("_cell"):
            cls._names = cls._names_for(cls._cell)

    @staticmethod
    def _names_for(cell: Cell) -> tuple[Sequence[str], Sequence[str]]:
        """Returns `_names` of modules with this cell."""
        with_biases, without = ([p.name for p in cell.present[b][False]] for b in (True, False))
        return with_biases, without

    def forward(self, input: Tensor, hx: States | None = None, **inputs: Tensor | None) -> States:
        """Returns the next state, (batch, hidden_size), or (hidden_size) for one row.

        Args:
            input: (batch, input_size), or (input_size).
            hx: (batch, hidden_size), or (hidden_size); None for zeros. A cell with two states takes
                and returns a pair: h and c of an LSTM, r and v of a leaky cell.
            inputs: other inputs of the cell. A leaky cell takes `noise`, which is added to v:
                (batch, hidden_size), or (hidden_size).

        Raises:
            ValueError: input or hx has neither 1 nor 2 dimensions.
            RuntimeError: a size, dtype or device does not match, or the nonlinearity is unknown.
        """
        weights = current_weights(self, self._names[int(not self.bias)])
        has_inputs = inputs and given(**inputs)
        if is_grad_enabled():
            last = self._training_step(input, hx, inputs, weights) if is_eager() else None
            if last is not None:
                return last  # type: ignore[no-any-return]
        elif not has_inputs and self._skips_dispatcher(input):
            options = self._options(weights)
            last = step_of_module(self._cell, input, hx, weights, self.hidden_size, options)
            if last is not None:
                return last  # type: ignore[no-any-return]
        if has_inputs or self.why_not_fused(input, hx, weights) is None:
            if is_jit_tracing():
                refuse_untraceable(f"steps of a {type(self).__name__}")
            arguments = with_steps(Arguments(input, hx, inputs=inputs), self._cell)
            last = run(arguments, self._call(arguments, weights))[1]
            return map_states(last, without_layers)  # type: ignore[no-any-return]
        assert self._cell.torch is not None
        torch_step = self._cell.torch.steps.get(self.nonlinearity)
        if torch_step is None or input.dim() != 2:
            return super().forward(input, hx)  # type: ignore[no-any-return]
        for state in states_in(hx):
            if state.dim() != 2:
                return super().forward(input, hx)  # type: ignore[no-any-return]
        states: Any = hx
        if states is None:
            states = input.new_zeros(input.shape[0], self.hidden_size)
            states = (states, states) if len(self._cell.states) > 1 else states
        return torch_step(input, states, *weights)  # type: ignore[no-any-return]

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward

    def unrolled(self) -> AbstractContextManager[None]:
        """Opens a block in which a training loop over this module is faster.

        Inside the block, steps with gradients read weights that are packed once, at the first step
        and after every change of the weights. A backward pass multiplies the gradients of the
        weights once for all steps, instead of once for each step. Results, gradients, hooks and
        `retain_graph` are as without the block; gradients of weights may differ in their last bits.
        The backward pass may run inside the block or after it, except with
        `torch.utils.checkpoint`, which has to find the block open when it runs steps again.

        Only steps on a CPU, with 2-D input, take part, without autocast, compilers and transforms;
        other steps run as without the block, and so do steps of a `FusedRNNCell` with fewer than
        256 units, because torch's operators are as fast. A change of the weights is noticed if it
        increments their version counters, as all operations in place do, or if a
        `torch.optim.Optimizer` makes it. The block belongs to the thread that opens it.

        Example:
            >>> cell = FusedGRUCell(8, 16)
            >>> h = torch.zeros(3, 16)
            >>> with cell.unrolled():
            ...     for x in torch.randn(5, 3, 8):
            ...         h = cell(x, h)
            >>> h.sum().backward()
        """
        return nullcontext() if is_compiling() else Unrolled(self)

    def _training_step(
        self,
        input: Tensor,
        hx: Any,
        inputs: Mapping[str, Tensor | None],
        weights: Sequence[Tensor],
    ) -> Any:
        """Runs a step with gradients as one operator, outside compilers and transforms.

        Returns None, and does nothing, if no gradient is wanted, if the arguments are not plain
        matrices on a CPU, or if torch's own cell is as fast.
        """
        block, packed, cell = open_block(self), None, self._cell
        if block is not None and block.packed is not None and block.packed.are_current(weights):
            packed = block.packed
        elif (self.why_not_torch() is None and self._why_slower(input) is not None) or (
            weights[0].is_cuda or availability.why_not_kernel(weights[0], cell) is not None
        ):
            return None
        states = states_in(hx)
        beside = [inputs.get(name) for name in cell.input_names] if inputs else []
        rows: tuple[Any, ...] = input, *states, *beside
        if (
            not all(map(holds_its_values, rows if packed is not None else (*rows, *weights)))
            or len(inputs) > len(beside)
            or (hx is not None and len(states) != len(cell.states))
            or (len(states) == 1) == isinstance(hx, tuple | list)
            or self.nonlinearity not in cell.nonlinearities
            or autocast_is_on()
        ):
            return None
        options = self._options(weights)
        if block is not None and (packed is None or packed.options != options):
            packed = block.packed = PackedSteps(cell, weights, options)
        token = None if packed is None else packed.token
        if token is None and not any(tensor.requires_grad for tensor in (*rows, *weights)):
            return None
        if states:
            options |= ops.STATES
        if beside:
            options |= ops.INPUTS
        try:
            last = apply_step(cell, options, packed, token, *rows, *weights)
        except RuntimeError:  # the caller raises its own error
            return None
        return last[0] if len(last) == 1 else last

    def _call(self, arguments: Arguments, weights: Sequence[Tensor]) -> Call:
        """Converts arguments to the `Call` of a layer with one time step.

        `arguments` are the result of `with_steps`.
        """
        return normalise(arguments, self._cell, weights, self._options(weights))

    def _options(self, weights: Sequence[Tensor]) -> int:
        """Returns the option bits of calls with these weights."""
        bits = option_bits(self._cell, weights, nonlinearity=self.nonlinearity, bias=self.bias)
        return bits | self._more_options

    def prepare(self, dtype: torch.dtype | None = None) -> PreparedCell[States]:
        """Returns a copy of this module for inference, whose weights are packed once.

        The copy always runs the fused operator on a CPU. See `FusedRNN.prepare`.

        Args:
            dtype: None for the dtype of this module, or torch.int8 for 8-bit weights.

        Raises:
            RuntimeError: this module has hooks or another `forward`, which the copy would not run.
            ValueError: dtype is neither None nor torch.int8, or this module does not support int8.
        """
        return PreparedCell(self, dtype)

    def _weight_names(self) -> Sequence[str]:
        return self._names[int(not self.bias)]

    def why_not_fused(
        self, input: Tensor, hx: Any = None, weights: Sequence[Tensor] | None = None
    ) -> str | None:
        """Returns why a call runs torch's own cell, or None if it runs the fused operator.

        Args:
            input, hx: the arguments of the call.
            weights: the current weights of this module; None to read them from the module.
        """
        if self._cell.torch is None:
            return None
        if self.why_not_torch() is None and not self._skips_dispatcher(input):
            slower = self._why_slower(input)
            if slower is not None:
                return slower
        weights = self._weights() if weights is None else weights
        if not self._fits(input, hx, weights[0]):
            name = f"{self._cell.torch_name}Cell"
            return f"the arguments do not match, and nn.{name} raises its own errors"
        return None

    def why_not_torch(self) -> str | None:
        """Returns why torch's own cell cannot run a call under the current settings, or None."""
        if self._cell.torch is None:
            return "torch has no such cell"
        if batch_invariant_is_on():
            return "torch's own cell is not batch-invariant"
        if functorch_is_active():
            return "torch's own cell has no rule for vmap"
        return None

    def _skips_dispatcher(self, input: Tensor) -> bool:
        """Returns whether a call with valid arguments skips torch's dispatcher."""
        return (
            not is_grad_enabled()
            and type(input) is Tensor
            and input.dim() == 2
            and input.is_cpu
            and input.dtype in (torch.float32, torch.float64)
            and is_faster(
                self._cell,
                input.shape[0],
                self.input_size,
                self.hidden_size,
                skips_dispatcher=True,
            )
            and not autocast_is_on()
            and not batch_invariant_is_on()
            and is_unobserved()
            and self.nonlinearity in self._cell.nonlinearities
        )

    def _is_faster(self, input: Tensor) -> bool:
        """Returns whether the fused operator is faster than torch's cell."""
        if is_grad_enabled():
            return input.dim() == 2 and is_faster_with_gradients(self._cell, self.hidden_size)
        return is_faster(
            self._cell,
            input.shape[0] if input.dim() == 2 else 1,
            self.input_size,
            self.hidden_size,
            skips_dispatcher=False,
        )

    def _why_slower(self, input: Tensor) -> str | None:
        """Returns why the fused operator would not be faster than torch's cell, or None."""
        in_block = is_grad_enabled() and open_block(self) is not None
        if self._cell.gates == 1 and not (in_block and self.hidden_size >= MIN_UNROLLED):
            return "torch's own cell is as fast for a single step"
        if in_block:
            return None
        # Check the speed first, because it is the most frequent reason.
        if not self._is_faster(input):
            return "torch's own cell is as fast for a single step of this size on this processor"
        if is_compiling() or is_jit_tracing():
            return "a compiler fuses the operators of torch's own cell"
        if input.dtype not in (torch.float32, torch.float64):
            return "in 16 bits torch's own cell is faster for some sizes"
        return availability.why_not_kernel(input, self._cell)

    def _fits(self, input: Tensor, hx: Any, weight_ih: Tensor) -> bool:
        """Returns whether shapes and dtypes match. If not, torch's cell raises its own error."""
        batch, dtype = input.shape[:-1], input.dtype
        return (
            self.nonlinearity in self._cell.nonlinearities
            and len(batch) in (0, 1)
            and input.dim() > 0
            and input.shape[-1] == self.input_size
            and input.layout == torch.strided
            and (dtype == weight_ih.dtype or autocast_is_on())
            and (
                hx is None
                or (isinstance(hx, tuple | list) and 1 < len(hx) == len(self._cell.states))
                or (not isinstance(hx, tuple | list) and len(self._cell.states) == 1)
            )
            and all(
                h.shape == (*batch, self.hidden_size) and h.dtype == dtype for h in states_in(hx)
            )
        )

    def __prepare_scriptable__(self) -> torch.nn.RNNCellBase:
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        if self._cell.torch is None:
            refuse_script(self._cell)
        if not is_exact(self):
            return self
        return plain_twin(self, self._cell.torch.step_module)


class CustomStepModule(FusedCell[States]):
    """The base class of the step modules that torch lacks.

    Its constructor takes the arguments of `FusedRNNCell`. For each parameter in `Cell.own`, it also
    takes `<name>` and `train_<name>`, as in `CustomLayer`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        **own: Any,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.nonlinearity = nonlinearity
        if self._cell.can_have_heads:
            self.heads = own.pop("heads")
        for parameter in self._cell.present[True][False]:
            self.register_parameter(parameter.name, None)
        make_parameters(self, ops.BIAS if bias else 0, own, device, dtype)
        self._options(self._weights())  # rejects an unknown nonlinearity

    def extra_repr(self) -> str:
        """Returns the sizes and the options without their default values, for `repr`."""
        return super().extra_repr() + options_shown(self, heads=1)

    def reset_parameters(self) -> None:
        """Draws new values for all parameters that are not arguments of the constructor."""
        draw_parameters(self)
