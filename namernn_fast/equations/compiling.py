"""`compile_step` turns a Python function of one step into a `Program`."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .graph import Graph, Node, reachable, unstopped
from .instructions import instructions_of
from .keeping import is_given, kept_nodes
from .program import NAME, Program
from .tracing import Recording, rejected, trace

SIZES = (5, 5003), (1, 6), (2, 7), (33, 64)
"""The numbers of rows and units that steps are traced with. Other constants of a step are unlikely
to equal 5003. The small sizes reveal a step that compares or rounds its sizes."""


def compile_step(
    step: Callable[..., Any],
    *,
    name: str,
    gates: int,
    states: int,
    recurs: bool = True,
    heads: bool = False,
    own: Mapping[str, int] = {},
    inputs: Mapping[str, bool] = {},
) -> Program:
    """Returns the program of `step(x, u, *states, **parameters_and_inputs)`.

    x and u are tuples of one tensor (rows, hidden_size) per gate; without weight_hh there is no u.
    States and inputs are (rows, hidden_size), and an input of numbers (rows, 1). A parameter is
    (hidden_size), or a tuple of one tensor per gate. The step returns the new states. It runs only
    now, so what it reads elsewhere, such as global variables, is constant from now on.

    Args:
        step: the function.
        name: the name of the cell.
        gates: the number of blocks of hidden_size rows in weights.
        states: the number of states, the output h first.
        recurs: whether the cell has weight_hh.
        heads: whether layers may split h into heads.
        own: the number of blocks of each parameter, 1 or `gates`.
        inputs: whether each input beside x is one number in each row.

    Raises:
        ValueError: an argument is out of range, or the step does what programs cannot do. The
            message quotes the line of the step.
    """
    _check_arguments(name, gates, states, own, inputs)
    recording = trace(step, gates, states, recurs, own, inputs, SIZES[0])
    for size in SIZES[1:]:
        _check_equal(recording, trace(step, gates, states, recurs, own, inputs, size, recording))
    graph, new, gradients, *_ = recording
    separate, sums = _sums(graph, [*new, *gradients.values()], gates, recurs)
    new = graph.rewritten(new, sums)
    gradients = dict(zip(gradients, graph.rewritten(gradients.values(), sums), strict=True))
    wanted = {
        operand: gradients.get(leaf, graph.zero)
        for operand, leaf in _gradients(gates, separate, states, own, inputs).items()
    }
    kept = kept_nodes(new, [*wanted.values()])
    # What the backward pass reads instead of computing it again.
    given = {node: graph.leaf(f"k{k}") for k, node in enumerate(kept)}
    for i, state in reversed([*enumerate(new)]):
        if state.kind == "r" and not is_given(state):
            given[unstopped(state)] = graph.leaf(f"k{len(kept) + i - 1}" if i else "y0")
    computed = graph.rewritten(wanted.values(), given, stops=False)
    wanted = dict(zip(wanted, computed, strict=True))
    if all(node.operand != "p0" for node in reachable([*new, *computed])):
        del wanted["q0"]
    stored = {f"h{i}": state for i, state in enumerate(new)}
    stored |= {f"k{k}": node for k, node in enumerate(kept)}
    constants: dict[str, int] = {}
    program = Program(
        name=name,
        gates=gates,
        separate=separate,
        has_weight_hh=recurs,
        has_heads=heads,
        states=states,
        inputs=tuple(inputs.items()),
        own=tuple(own.items()),
        kept=len(kept) + states - 1,
        forward=instructions_of(graph, stored, constants),
        backward=instructions_of(graph, wanted, constants),
        constants=tuple(map(float, constants)),
    )
    _limit("the number of sums of x and u", gates + separate, range(17))
    _limit("the number of kept values", program.kept, range(17))
    _limit("the number of constants", len(constants), range(65))
    _limit("the number of instructions", len(program.forward + program.backward), range(1025))
    return program


def _check_equal(recording: Recording, other: Recording) -> None:
    """Raises ValueError unless a step did the same at two sizes."""
    for (a, place), (b, or_place) in itertools.zip_longest(
        recording.log, other.log, fillvalue=("", None)
    ):
        if a != b:
            reason = "depends on the number of rows, on hidden_size or on values"
            raise rejected(reason, place or or_place)


def _check_arguments(
    name: str, gates: int, states: int, own: Mapping[str, int], inputs: Mapping[str, bool]
) -> None:
    for text in (name, *own, *inputs):
        if not re.fullmatch(NAME, text, re.ASCII):
            raise ValueError(f"a name must be an identifier of at most 64 letters, got {text!r}")
    if both := sorted(own.keys() & inputs.keys()):
        raise ValueError(f"{both[0]} must not be both a parameter and an input")
    _limit("the number of gates", gates, range(1, 9))
    _limit("the number of states", states, range(1, 5))
    _limit("the number of inputs", len(inputs), range(9))
    _limit("the number of parameters", len(own), range(9))
    for text, blocks in own.items():
        _limit(f"the number of blocks of {text}", blocks, (1, gates))


def _limit(what: str, number: int, allowed: Sequence[int]) -> None:
    if number not in allowed:
        raise ValueError(f"{what} must be between {min(allowed)} and {max(allowed)}, got {number}")


def _sums(
    graph: Graph, roots: list[Node], gates: int, recurs: bool
) -> tuple[int, dict[Node, Node]]:
    """Returns the number of gates that use x and u separately, and the operands of the sums."""
    x, u = ([graph.leaf(f"{letter}{g}") for g in range(gates)] for letter in "xu")
    pairs = [graph.make("add", *pair) for pair in zip(x, u, strict=True)] if recurs else x
    nodes, fused = reachable(roots), 0
    while fused < gates:
        pair = pairs[fused]
        read = {*roots, *(source for node in nodes if node is not pair for source in node.sources)}
        if not read.isdisjoint({x[fused], u[fused]} - {pair}):
            break
        fused += 1
    separate = gates - fused
    sums = {pairs[g]: graph.leaf(f"s{separate + g}") for g in range(fused)}
    sums |= {x[g]: graph.leaf(f"s{g - fused}") for g in range(fused, gates)}
    sums |= {u[g]: graph.leaf(f"s{gates + g - fused}") for g in range(fused, gates)}
    return separate, sums


def _gradients(
    gates: int, separate: int, states: int, own: Mapping[str, int], inputs: Mapping[str, bool]
) -> dict[str, str]:
    """Returns the operands of all gradients, and the leaves of the step that they belong to."""
    fused = gates - separate
    x_first = [f"x{g}" for g in (*range(fused, gates), *range(fused))]
    of_sums = [*x_first, *(f"u{g}" for g in range(fused, gates))]
    return {
        **{f"d{k}": leaf for k, leaf in enumerate(of_sums)},
        **{f"q{i}": f"p{i}" for i in range(states)},
        **{f"j{i}": f"i{i}" for i in range(len(inputs))},
        **{f"w{k}": f"o{k}" for k in range(sum(own.values()))},
    }
