"""`Program`: the equation of a recurrent cell, as text and in ATen operators.

C++ reads the same text. An instruction such as `fma h0 k1 p0 r2` consists of an operation, its
destination and its sources. An operand is a letter and an index.
"""

import functools
import operator
import re
import struct
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

VERSION = 1
"""The version of the text that this package writes and reads."""

PAIR = r" (\w+) (\w+)"
NAME, NUMBER = r"[A-Za-z_]\w{0,63}", r"\d{1,4}"
INSTRUCTIONS = NUMBER + r"((?:\n[a-z]\w+(?: [a-z]\d{1,3}){2,4})*)"
TEXT = re.compile(
    rf"equation {VERSION}\nname ({NAME})\ngates ({NUMBER}) separate ({NUMBER})\n"
    rf"weight_hh ([01]) heads ([01])\nstates ({NUMBER})\n"
    rf"inputs {NUMBER}((?: {NAME} (?:hidden|number))*)\nown {NUMBER}((?: {NAME} {NUMBER})*)\n"
    rf"kept ({NUMBER})\nconstants {NUMBER}((?: [0-9a-f]{{16}})*)\n"
    rf"forward {INSTRUCTIONS}\nbackward {INSTRUCTIONS}\nend\n",
    re.ASCII,
)


class Instruction(NamedTuple):
    """One operation of a program."""

    op: str
    destination: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """The equation of one step of a recurrent cell, and of its gradient."""

    name: str
    gates: int
    separate: int
    """The number of gates, the last ones, that use W_ih x_t and W_hh h_{t-1} separately. The others
    use only their sums."""
    has_weight_hh: bool
    has_heads: bool
    """Whether layers may split h into heads."""
    states: int
    inputs: tuple[tuple[str, bool], ...]
    """The inputs beside x: their names, and whether they are one number in each row."""
    own: tuple[tuple[str, int], ...]
    """The parameters besides weights and biases: their names and numbers of blocks."""
    kept: int
    """The number of blocks that a row keeps for the backward pass. The last ones are the new states
    after the first."""
    constants: tuple[float, ...]
    forward: tuple[Instruction, ...]
    """Computes the new states. No gradient flows through a `copy` to a register, which is how
    `Tensor.detach` is written."""
    backward: tuple[Instruction, ...]
    """Computes all gradients from those of the new states and from what a row keeps."""

    @functools.cached_property
    def text(self) -> str:
        """The program as text."""

        def listed(items: Iterable[Any], between: str = " ") -> str:
            items = [*items]
            return between.join([str(len(items)), *map(str, items)])

        def instructions(items: Iterable[Instruction]) -> str:
            return listed((" ".join([op, to, *sources]) for op, to, sources in items), "\n")

        inputs = (f"{name} {('hidden', 'number')[number]}" for name, number in self.inputs)
        return (
            f"equation {VERSION}\nname {self.name}\ngates {self.gates} separate {self.separate}\n"
            f"weight_hh {self.has_weight_hh:d} heads {self.has_heads:d}\nstates {self.states}\n"
            f"inputs {listed(inputs)}\n"
            f"own {listed(f'{name} {count}' for name, count in self.own)}\nkept {self.kept}\n"
            f"constants {listed(struct.pack('>d', value).hex() for value in self.constants)}\n"
            f"forward {instructions(self.forward)}\nbackward {instructions(self.backward)}\nend\n"
        )

    def sums(self, x: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
        """Returns the operands s, given W_ih x_t and W_hh h_{t-1} of each gate.

        Without weight_hh, u is empty.
        """
        fused = self.gates - self.separate
        together = [a + b for a, b in zip(x, u, strict=True)] if u else x
        return [*x[fused:], *together[:fused], *u[fused:]]

    @staticmethod
    def parse(text: str) -> "Program":
        """Returns the program that a text describes. C++ checks whether it makes sense.

        Raises:
            ValueError: the text is malformed, or of a version that this package cannot read.
        """
        version = re.match(r"equation (\d{1,9})\n", text)
        if version and int(version[1]) != VERSION:
            raise ValueError(
                f"the text of a program must be of version {VERSION}, got version {version[1]}: "
                "it was written by another version of namernn_fast"
            )
        found = TEXT.fullmatch(text)
        if not found:
            raise ValueError(f"not the text of a program: {text[:200]!r}")
        name, gates, separate, recurs, heads, states, inputs, own, kept, constants, *passes = (
            found.groups()
        )
        forward, backward = (
            tuple(Instruction(op, to, tuple(sources)) for op, to, *sources in map(str.split, lines))
            for lines in (instructions.splitlines()[1:] for instructions in passes)
        )
        program = Program(
            name=name,
            gates=int(gates),
            separate=int(separate),
            has_weight_hh=recurs == "1",
            has_heads=heads == "1",
            states=int(states),
            inputs=tuple((n, kind == "number") for n, kind in re.findall(PAIR, inputs)),
            own=tuple((n, int(count)) for n, count in re.findall(PAIR, own)),
            kept=int(kept),
            constants=tuple(struct.unpack(">d", bytes.fromhex(c))[0] for c in constants.split()),
            forward=forward,
            backward=backward,
        )
        for op, _, sources in (*forward, *backward):
            if ARITY.get(op) != len(sources):
                raise ValueError(f"programs have no operation {op} of {len(sources)} sources")
        if program.text != text:
            raise ValueError("the text of a program has a wrong number of items in a list")
        return program


def _max(a: Any, b: Any) -> Any:
    # If both are equal, a constant that comes first gets the gradient, as in relu; one that comes
    # second does not, as in clamp.
    if not isinstance(a, Tensor):
        return threshold(b, a, a)
    return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition != 0, a if isinstance(a, Tensor) else condition.new_full((), a), b)


_UNARY: dict[str, Callable[..., Any]] = {
    **{op: getattr(torch, op) for op in ("neg", "abs", "sign", "sqrt", "rsqrt", "exp", "log")},
    **{op: getattr(torch, op) for op in ("log1p", "expm1", "tanh", "sigmoid")},
    "copy": lambda a: a,
    "accumulate": lambda a: a,  # the caller adds up the rows
    "recip": torch.reciprocal,
    "softplus": lambda a: torch.logaddexp(a, torch.zeros_like(a)),  # F.softplus is linear above 20
    "mean": lambda a: a.mean(-1, keepdim=True),
}
_BINARY: dict[str, Callable[..., Any]] = {
    **{op: getattr(operator, op) for op in ("add", "sub", "mul", "lt", "le", "eq")},
    "div": operator.truediv,
    "max": _max,
    "min": lambda a, b: -_max(-a, -b),
    "tanh_grad": lambda g, t: g * (1 - t * t),
    "sigmoid_grad": lambda g, s: g * (s * (1 - s)),
}
_TERNARY: dict[str, Callable[..., Any]] = {
    "where": _where,
    "fma": lambda a, b, c: a * b + c,
    "fnma": lambda a, b, c: c - a * b,
}
OPERATIONS = _UNARY | _BINARY | _TERNARY
"""The operations of programs. At least one argument of each must be a tensor."""
ARITY = dict.fromkeys(_UNARY, 1) | dict.fromkeys(_BINARY, 2) | dict.fromkeys(_TERNARY, 3)


def execute(
    instructions: Iterable[Instruction], values: MutableMapping[str, Any], like: Tensor
) -> None:
    """Runs instructions on the values of operands, with the dtype and the device of `like`."""
    for op, to, sources in instructions:
        arguments = [values[source] for source in sources]
        if not any(isinstance(argument, Tensor) for argument in arguments):
            arguments[0] = like.new_full((), arguments[0])
        value = OPERATIONS[op](*arguments)
        value = value.to(like.dtype) if value.dtype == torch.bool else value
        values[to] = value.detach() if op == "copy" and to[0] in "rmv" else value


def operands(program: Program, like: Tensor, **given: Sequence[Tensor | None]) -> dict[str, Any]:
    """Returns the values of constants, n0, and operands given by letter. None means zeros."""
    values: dict[str, Any] = {"n0": like.shape[-1]}
    values |= {f"c{k}": constant for k, constant in enumerate(program.constants)}
    for letter, tensors in given.items():
        for k, tensor in enumerate(tensors):
            values[f"{letter}{k}"] = like.new_zeros(()) if tensor is None else tensor
    return values


def evaluate(
    program: Program,
    sums: Sequence[Tensor],
    previous: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    own: Sequence[Tensor],
) -> list[Tensor]:
    """Returns the new states, (..., hidden_size), computed in differentiable ATen operators.

    Args:
        program: the equation.
        sums: the operands s of the program, (..., hidden_size).
        previous: the previous states, (..., hidden_size), or None for zeros.
        inputs: the inputs beside x, (..., hidden_size) or (..., 1), or None for zeros.
        own: the blocks of all own parameters, (hidden_size).
    """
    values = operands(program, sums[0], s=sums, p=previous, i=inputs, o=own)
    execute(program.forward, values, sums[0])
    return [values[f"h{i}"].expand_as(sums[0]) for i in range(program.states)]
