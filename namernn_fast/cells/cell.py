"""`Cell`: everything that the rest of the package knows about a recurrent cell."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

CellName: TypeAlias = Literal["rnn", "gru", "lstm", "leaky"]
"""The name of a cell, as users pass it."""


class LayerWeights(NamedTuple):
    """The weights of one layer in one direction."""

    weight_ih: Tensor
    """(gates * hidden_size, features)"""
    weight_hh: Tensor
    """(gates * hidden_size, hidden_size), with projections (gates * hidden_size, proj_size)"""
    bias_ih: Tensor | None = None
    """(gates * hidden_size), or None without biases"""
    bias_hh: Tensor | None = None
    """(gates * hidden_size), or None without biases"""
    weight_hr: Tensor | None = None
    """(proj_size, hidden_size), or None without projections"""
    rate: Tensor | None = None
    """(hidden_size), the logits of the rates, or None if the cell has none"""

    @property
    def bias(self) -> Tensor | None:
        """The sum of both biases, or None without biases."""
        if self.bias_ih is None or self.bias_hh is None:
            return None
        return self.bias_ih + self.bias_hh


Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function of the input's sums and the previous states that returns the next states.

The input's sums, (batch, gates * hidden_size), include `Cell.bias_of_input`. Noise follows in more
columns, if there is any. The states of a row are side by side, the output first.
"""


class MakeStep(Protocol):
    """Makes the step of a layer, a function that evaluates the equation of its cell on tensors."""

    def __call__(self, weights: LayerWeights, *, nonlinearity: str, in_place: bool) -> Step:
        """Returns a step with these weights.

        Args:
            weights: the weights of the layer in one direction.
            nonlinearity: one of `Cell.nonlinearities`.
            in_place: whether the step must overwrite the sums with the states, which requires
                `Cell.sums_become_states`.
        """


class OnnxNode(NamedTuple):
    """The ONNX node that computes a layer."""

    operator: str
    gates: Sequence[int]
    """The indices of torch's weight blocks, in ONNX order."""
    attributes: Mapping[str, Any] = {}
    int8_operator: str | None = None
    """ONNX Runtime's operator for 8-bit weights, or None if it has none."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell."""

    name: CellName
    """The value that users pass as `cell`, and the name of the function that runs the cell."""
    number: int
    """The argument `cell` of the operators: the value of `CellKind` in csrc/contract.h."""
    layer: str
    """The class name of the cell's layer. The cell's step module has this name plus `Cell`."""
    weight_blocks: int
    """The number of blocks of hidden_size rows in weights and biases, one per gate."""
    kept_blocks: int
    """The number of blocks of hidden_size values that each row keeps for the backward pass besides
    its output."""
    make_step: MakeStep
    torch_layer: type[nn.RNNBase] | None = None
    """torch's layer, or None if torch has none with this cell."""
    torch_step_module: type[nn.RNNCellBase] | None = None
    torch_steps: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """torch's operator for a single step, by nonlinearity."""
    onnx: OnnxNode | None = None
    states: tuple[str, ...] = ("h",)
    """The names of a row's states, the output first. For h, torch's names are hx and h_n."""
    fp32_precision: Literal["matmul", "rnn"] = "matmul"
    """The setting of `torch.backends.mkldnn` that allows torch's layer on a CPU to multiply float32
    numbers in lower precision."""
    nonlinearities: tuple[str, ...] = ("tanh",)
    """The nonlinearities that users can choose."""
    separate_bias_hh: bool = False
    """Whether the gradients of bias_ih and bias_hh differ. If so, the step adds bias_hh."""
    torch_operator: Callable[..., Any] | None = None
    """torch's operator for whole sequences, which runs on devices without a fused kernel. If None,
    the reference path runs on these devices, as fast as torch's own layer."""
    has_gpu_kernel: bool = False
    can_project: bool = False
    """Whether weight_hr may project h, to fewer features than hidden_size."""
    has_rate: bool = False
    """Whether the last weight of a layer is its rate, and steps may have noise."""
    autocasts_only_products: frozenset[str] = frozenset()
    """The kinds of call (see `call.dtypes`) for which torch's autocast on a CPU casts the operands
    of products, but keeps the states in their dtype."""

    @property
    def torch_name(self) -> str:
        """The name of torch's layer, or of this package's if torch has none with this cell."""
        return self.layer if self.torch_layer is None else self.torch_layer.__name__

    def state_sizes(self, size_of_h: int, hidden_size: int) -> list[int]:
        """Returns the number of features of each state."""
        return [size_of_h, hidden_size][: len(self.states)]

    @property
    def sums_become_states(self) -> bool:
        """Whether a row's sums have the shape of its states, so that a step may overwrite them."""
        return self.weight_blocks == len(self.states) == 1

    def bias_of_input(self, weights: LayerWeights) -> Tensor | None:
        """Returns what the biases add to the sums of the input, or None without biases."""
        return weights.bias_ih if self.separate_bias_hh else weights.bias
