"""`Cell`: everything that this package knows about a recurrent cell."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

Size: TypeAlias = Literal["features", "rows", "gates", "hidden", "projected", "head"]
"""A size of a layer: input features, gates * hidden_size, gates, hidden_size, the size of h, which
is hidden_size without projections, or the size of a head of h."""


@dataclass(frozen=True)
class Parameter:
    """Describes a parameter. Each direction of each layer has its own copy."""

    name: str
    """The key in the state_dict of a step module; layers append `_l0`, `_l0_reverse` and so on."""
    shape: tuple[Size, ...]
    role: Literal["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "own"] = "own"
    """The parameter's role in torch's layers; `own` if torch's layers have no such parameter."""
    option: Literal["bias", "projections"] | None = None
    """The option that gives layers this parameter; None if all layers have it."""
    init: Callable[[Any, int], Tensor] | None = None
    """None for uniform draws, as in torch's layers. Otherwise a function that computes the initial
    values from the constructor's argument and hidden_size; `reset_parameters` keeps them."""

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter is a matrix that multiplies rows of input or states."""
        return self.role.startswith("weight_")


def usual_parameters(
    *own: Parameter, projects: bool = False, heads: bool = False, recurs: bool = True
) -> tuple[Parameter, ...]:
    """Returns the parameters of torch's layers, in torch's order, followed by `own`.

    Args:
        own: the parameters that only this cell has.
        projects: whether weight_hr may project h to fewer features than hidden_size.
        heads: whether h may be split into heads, so that a unit multiplies only its head's h.
        recurs: whether the cell has weight_hh and bias_hh.
    """
    weight_hr = Parameter("weight_hr", ("projected", "hidden"), "weight_hr", "projections")
    width: Size = "head" if heads else "projected"
    usual = (
        Parameter("weight_ih", ("rows", "features"), "weight_ih"),
        Parameter("weight_hh", ("rows", width), "weight_hh"),
        Parameter("bias_ih", ("rows",), "bias_ih", "bias"),
        Parameter("bias_hh", ("rows",), "bias_hh", "bias"),
    )
    return (*(usual if recurs else usual[::2]), *([weight_hr] if projects else []), *own)


@dataclass(frozen=True)
class Input:
    """Describes an input besides x, laid out like x.

    It has features for each layer and direction, or features that all of them share.
    """

    name: str
    """The keyword argument of calls."""
    is_number: bool = False
    """Whether a layer and direction has one feature in each row instead of hidden_size features."""

    def features(self, hidden_size: int) -> int:
        """Returns the number of features of one layer and direction."""
        return 1 if self.is_number else hidden_size

    def zeros(self, like: Tensor, hidden_size: int) -> Tensor:
        """Returns zeros for the rows of `like`, shared by all layers and directions."""
        return like.new_zeros(self.features(hidden_size)).expand(*like.shape[:-1], -1)

    def part_of(self, rows: Tensor, hidden_size: int, part: int, parts: int) -> Tensor:
        """Returns one of the parts of the features, or all features if the parts share them."""
        is_shared = rows.shape[-1] == self.features(hidden_size)
        return rows if is_shared else rows.chunk(parts, -1)[part]


@dataclass(frozen=True)
class State:
    """Describes a state of a cell, such as h or c."""

    name: str
    size: Size = "hidden"


LayerWeights: TypeAlias = Mapping[str, Tensor]
"""The weights of one layer in one direction, by `Parameter.name`."""
Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function that takes the projected input and the previous states, and returns the next states.

The projected input, also called sums, (batch, gates * hidden_size), includes `Cell.bias_of_input`.
Any `Cell.inputs` follow as further columns. The states of a row are concatenated, the output first.
"""


class MakeStep(Protocol):
    """Makes the step function of a layer, which evaluates the equation of the cell on tensors."""

    def __call__(self, weights: LayerWeights, *, nonlinearity: str, in_place: bool) -> Step:
        """Returns a step with these weights.

        Args:
            weights: the weights of the layer in one direction.
            nonlinearity: one of `Cell.nonlinearities`.
            in_place: whether the step must overwrite the projected input with the states, which
                requires `Cell.sums_become_states`.
        """


class OnnxNode(NamedTuple):
    """The ONNX node that computes a layer."""

    operator: str
    gates: Sequence[int]
    """The indices of torch's weight blocks, in ONNX order."""
    attributes: Mapping[str, Any] = {}
    int8_operator: str | None = None
    """ONNX Runtime's operator for 8-bit weights, or None if there is none."""


@dataclass(frozen=True)
class TorchCounterpart:
    """Torch's modules and operators for a cell."""

    layer: type[nn.RNNBase]
    step_module: type[nn.RNNCellBase]
    steps: Mapping[str, Callable[..., Any]]
    """The operator for a single step, by nonlinearity."""
    onnx: OnnxNode
    operator: Callable[..., Any] | None = None
    """The operator for whole sequences, which runs on devices without a fused kernel. If None, the
    reference path runs there, and is as fast as torch's own layer."""
    autocasts_only_products: frozenset[str] = frozenset()
    """The kinds of call (see `call.dtypes`) for which torch's autocast on a CPU casts the operands
    of products, but keeps the states in their dtype."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell: its parameters, states and equation, and torch's modules for it."""

    name: str
    """The value that users pass as `cell`, and the name of the function that runs the cell."""
    number: int
    """The argument `cell` of the operators: the value of `CellKind` in csrc/cell.h."""
    layer: str
    """The class name of the cell's layer. The cell's step module has this name plus `Cell`."""
    gates: int
    """The number of blocks of hidden_size rows in weights and biases."""
    kept: int
    """The number of blocks of hidden_size values that each row keeps for the backward pass, in
    addition to its output."""
    make_step: MakeStep
    parameters: tuple[Parameter, ...] = usual_parameters()
    """The parameters of each layer and direction, in the order of state_dict and operators. The
    first is weight_ih, and the second weight_hh unless the cell lacks it."""
    inputs: tuple[Input, ...] = ()
    states: tuple[State, ...] = (State("h", "projected"),)
    """The states of the cell, the output first. Calls name h as torch does: hx and h_n."""
    nonlinearities: tuple[str, ...] = ("tanh",)
    """The nonlinearities that users can choose."""
    separate: int = 0
    """The number of gates, the last ones, that use W_ih x_t and W_hh h apart, instead of their sum.
    If there are any, the gradients of bias_ih and bias_hh differ, and the step adds bias_hh."""
    only_in_float: bool = False
    """Whether kernels for bfloat16 instructions and 8-bit weights do not support the cell, because
    it has more than two states, no weight_hh, means over a row or an input of one number."""
    equation: Callable[[str], Callable[..., Any]] | None = None
    """Returns the step, as `equations.compile_step` takes it, for one of `nonlinearities`; None if
    a user wrote the cell. Kernels on GPUs run its program."""
    fp32_precision: Literal["matmul", "rnn"] = "matmul"
    """The setting of `torch.backends.mkldnn` that allows a CPU to multiply float32 numbers in lower
    precision. Torch's layer with this cell, if it exists, uses the same setting."""
    program: str | None = None
    """What kernels run if a user wrote the cell as an equation (see `equations.program`)."""
    torch: TorchCounterpart | None = None
    """torch's modules and operators, or None if torch has none with this cell."""
    present: Sequence[Sequence[tuple[Parameter, ...]]] = field(init=False, repr=False)
    """The parameters that a layer has, in order, as `present[with biases][with projections]`."""
    own: tuple[Parameter, ...] = field(init=False, repr=False)
    """The parameters that only this cell has."""

    def __post_init__(self) -> None:
        def with_options(**given: bool) -> tuple[Parameter, ...]:
            return tuple(p for p in self.parameters if given.get(str(p.option), True))

        either = False, True
        vars(self).update(
            present=[[with_options(bias=b, projections=p) for p in either] for b in either],
            own=tuple(parameter for parameter in self.parameters if parameter.role == "own"),
        )

    @property
    def can_project(self) -> bool:
        """Whether layers may have projections."""
        return self.present[True][True] != self.present[True][False]

    @property
    def has_weight_hh(self) -> bool:
        """Whether a matrix multiplies the previous h."""
        return self.parameters[1].role == "weight_hh"

    @property
    def can_have_heads(self) -> bool:
        """Whether layers may split h into heads."""
        return self.has_weight_hh and "head" in self.parameters[1].shape

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of `inputs`."""
        return tuple(input.name for input in self.inputs)

    @property
    def torch_name(self) -> str:
        """The name of torch's layer, or of this package's layer if torch lacks the cell."""
        return self.layer if self.torch is None else self.torch.layer.__name__

    @property
    def sums(self) -> int:
        """The number of sums that the cell reads for each unit. Gradients of sums are in this
        order: first the W_ih x_t of the gates that are `separate`, then W_ih x_t + W_hh h of the
        other gates, then W_hh h of the gates that are `separate`."""
        return self.gates + self.separate

    def state_sizes(self, size_of_h: int, hidden_size: int) -> list[int]:
        """Returns the number of features of each state."""
        return [size_of_h if state.size == "projected" else hidden_size for state in self.states]

    @property
    def sums_become_states(self) -> bool:
        """Whether projected input and states have the same shape, so a step can run in place."""
        return self.gates == len(self.states) == 1

    def bias_of_input(self, weights: LayerWeights) -> Tensor | None:
        """Returns the bias that is added to W_ih x_t for all steps, or None without biases."""
        bias_ih, bias_hh = weights.get("bias_ih"), weights.get("bias_hh")
        if bias_ih is None or bias_hh is None or self.separate:
            return bias_ih
        return bias_ih + bias_hh
