"""The cells of equations, and how the operators name any cell."""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..cells import NUMBERED, Cell
from ..cells.cell import Input, LayerWeights, Parameter, State, Step, usual_parameters
from .program import Program, evaluate

EQUATION = -1
"""The argument `cell` of the operators if their argument `program` describes the cell."""


class ProgramCell(Cell):
    """The cell of a program. Copies and pickles contain only the text of the program."""

    def __reduce__(self) -> Any:
        return cell_of_program, (self.program,)


def find_cell(number: int, program: str | None) -> Cell:
    """Returns the cell that the arguments `cell` and `program` of an operator describe."""
    return NUMBERED[number] if program is None else cell_of_program(program)


def cell_of_program(text: str) -> Cell:
    """Returns the cell that a program describes."""
    cell = _CELLS.get(text)  # a plain dictionary, because Dynamo warns about functools.cache
    return cell or _CELLS.setdefault(text, _described(text))


_CELLS: dict[str, Cell] = {}
"""The cells of programs, by text."""


def _described(text: str) -> Cell:
    program = Program.parse(text)
    own = [
        Parameter(name, ("hidden",) if blocks == 1 else ("gates", "hidden"), init=initial_values)
        for name, blocks in program.own
    ]
    names = ("h", "c", "n", "m")[: program.states]
    return ProgramCell(
        name=program.name,
        number=EQUATION,
        layer=program.name,
        gates=program.gates,
        kept=program.kept,
        make_step=functools.partial(_make_step, program),
        parameters=usual_parameters(*own, heads=program.has_heads, recurs=program.has_weight_hh),
        inputs=tuple(Input(name, is_number) for name, is_number in program.inputs),
        states=tuple(State(name, "hidden" if i else "projected") for i, name in enumerate(names)),
        separate=program.separate,
        only_in_float=_needs_floats(program),
        program=text,
    )


def _needs_floats(program: Program) -> bool:
    """Returns the value of `Cell.only_in_float`, for which kernels have the same rule."""
    both = program.forward, program.backward
    carried = program.states - all(i.destination != "q0" for i in program.backward)
    has_means = any(i.op == "mean" for instructions in both for i in instructions)
    has_numbers = any(is_number for _, is_number in program.inputs)
    return carried > 1 or has_means or has_numbers or not program.has_weight_hh


@functools.cache
def program_of(cell: Cell, nonlinearity: str) -> Program | None:
    """Returns the program of a cell, or None if it has none; traces the equation at first."""
    if cell.program is not None:
        return Program.parse(cell.program)
    if cell.equation is None:
        return None
    from .compiling import compile_step  # imports much that only few processes need

    return compile_step(
        cell.equation(nonlinearity),
        name=cell.name,
        gates=cell.gates,
        states=len(cell.states),
        own={p.name: 1 if p.shape == ("hidden",) else cell.gates for p in cell.own},
        inputs={i.name: i.is_number for i in cell.inputs},
    )


def initial_values(values: Any, hidden_size: int, default: Any = None) -> Tensor:
    """Returns the initial values of a parameter, or `default` if `values` is None."""
    return torch.as_tensor(default if values is None else values, dtype=torch.float64)


def products_of_h(
    h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, gates: int
) -> tuple[Tensor, ...]:
    """Returns W_hh h + b_hh for each gate; weight_hh may be block-diagonal, with heads of h."""
    head = weight_hh.shape[1]
    if head == h.shape[1]:
        return linear(h, weight_hh, bias_hh).chunk(gates, 1)
    blocks = weight_hh.split(head)  # one for each gate and head
    of_heads = zip(itertools.cycle(h.split(head, 1)), blocks, strict=False)
    u = torch.cat([linear(*of_head) for of_head in of_heads], 1)
    return (u if bias_hh is None else u + bias_hh).chunk(gates, 1)


def _make_step(
    program: Program, weights: LayerWeights, *, nonlinearity: str, in_place: bool
) -> Step:
    """Returns a step that evaluates the program in ATen operators."""
    gates = program.gates
    own = [weights[name] for name, _ in program.own]
    blocks = [row for values in own for row in (values.unbind() if values.dim() == 2 else [values])]
    weight_hh = weights.get("weight_hh")
    bias_hh = weights.get("bias_hh") if program.separate else None

    def step(x: Tensor, states: Tensor) -> Tensor:
        size = states.shape[1] // program.states
        previous = states.split(size, 1)
        widths = [1 if is_number else size for _, is_number in program.inputs]
        given = x.shape[1] > gates * size
        sums, *beside = x.split([gates * size, *(widths if given else [])], 1)
        u = () if weight_hh is None else products_of_h(previous[0], weight_hh, bias_hh, gates)
        of_step = program.sums(sums.chunk(gates, 1), u)
        inputs = beside if given else [None] * len(widths)
        return torch.cat(evaluate(program, of_step, previous, inputs, blocks), 1)

    return step
