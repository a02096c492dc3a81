"""Turns values into instructions: joins products and sums, chooses an order, assigns registers."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from .graph import Graph, Node, reachable
from .program import Instruction

REGISTERS = {"r": 64, "m": 64, "v": 16}
"""The number of registers of each kind."""
Makers: TypeAlias = dict[Node, tuple[str, tuple[Node, ...]]]
"""The operation and the sources that compute each value."""


def instructions_of(
    graph: Graph, roots: Mapping[str, Node], constants: dict[str, int]
) -> tuple[Instruction, ...]:
    """Returns the instructions that compute values.

    Args:
        graph: makes the values.
        roots: the values, by the operands that they go to.
        constants: the index of each constant, by its text; constants of the values are added.

    Raises:
        ValueError: there are too few registers.
    """
    roots = {to: _computed(graph, to, node) for to, node in roots.items()}
    makers = _makers_of(roots.values())
    reads = Counter(source for _, sources in makers.values() for source in {*sources})
    reads.update(roots.values())
    free = {kind: [*range(count)] for kind, count in REGISTERS.items()}
    places: dict[Node, str] = {}
    written: list[Instruction] = []

    def operand(node: Node) -> str:
        if node.op == "constant":
            return f"c{constants.setdefault(repr(node.value), len(constants))}"
        return node.operand or places[node]

    def read(nodes: Iterable[Node]) -> tuple[str, ...]:
        operands = tuple(map(operand, nodes))
        for node in {*nodes}:
            reads[node] -= 1
            if reads[node] == 0 and places.get(node, "h")[0] in free:
                heapq.heappush(free[node.kind], int(places[node][1:]))
        return operands

    def copy(targets: Iterable[str]) -> None:
        for to in targets:
            op = "accumulate" if to[0] == "w" else "copy"
            written.append(Instruction(op, to, read([roots[to]])))

    def can_compute_in(to: str, node: Node) -> bool:
        unread = {other.operand for other, count in reads.items() if count}
        replaced = {"h": "p", "q": "g"}.get(to[0], "") + to[1:]
        is_late = replaced not in unread and (to != "h0" or all(o[:1] != "s" for o in unread))
        is_full = node.kind == "r" and node.op != "stop"
        return is_full and (to[0] == "k" or is_late) and (to[0] in "hk" or reads[node] == 1)

    last = [to for to in roots if to[0] in "hq"]
    copy(to for to, node in roots.items() if to not in last and node not in makers)
    for node in _ordered(makers, roots):
        op, sources = makers[node]
        operands = read(sources)
        targets = [to for to in roots if roots[to] is node]
        place = next((to for to in targets if to[0] != "w" and can_compute_in(to, node)), "")
        if place:
            targets.remove(place)
            reads[node] -= 1
        elif free[node.kind]:
            place = f"{node.kind}{heapq.heappop(free[node.kind])}"
        else:
            count = REGISTERS[node.kind]
            raise ValueError(f"the step needs more than {count} registers {node.kind} at a time")
        places[node] = place
        written.append(Instruction(op, place, operands))
        copy(to for to in targets if to not in last)
        last = [to for to in last if to != place]
    copy(last)
    return tuple(written)


def _computed(graph: Graph, to: str, node: Node) -> Node:
    """Returns a value in a register, unless it can be copied when all others are computed."""
    is_replaced = to[0] in "hq" and node.operand[:1] in ("g", "p", "s")
    if not is_replaced and not (to[0] == "w" and node.kind in "cm"):
        return node
    # Not a copy, because gradients do not flow through copies to registers.
    return graph.intern("mul", node, graph.one, kind="v" if node.kind == "c" else "r")


def _makers_of(roots: Iterable[Node]) -> Makers:
    """Returns what computes values, with a single operation for a product in a sum."""
    roots, makers, joined = [*roots], {}, set()
    nodes = reachable(roots)
    uses = Counter([*roots, *(source for node in nodes for source in node.sources)])
    for node in reversed(nodes):
        if not node.sources or node in joined:
            continue
        op, sources = "copy" if node.op == "stop" else node.op, node.sources
        for product in sources[::-1] if op == "add" else sources[1:] if op == "sub" else ():
            if product.op == "mul" and uses[product] == 1 and product.kind == node.kind:
                rest = [source for source in sources if source is not product]
                op, sources = {"add": "fma", "sub": "fnma"}[op], (*product.sources, *rest)
                joined.add(product)
                break
        makers[node] = op, sources
    return makers


def _ordered(makers: Makers, roots: Mapping[str, Node]) -> list[Node]:
    """Returns values in an order that needs few phases and few registers.

    A phase ends where a mean is needed, and C++ runs over the units of a row once for each phase.
    """
    waiting = {node: {*sources} & makers.keys() for node, (_, sources) in makers.items()}
    readers = {node: {n for n in makers if node in waiting[n]} for node in makers}
    phases: dict[Node, int] = {}
    for node in sorted(makers, key=lambda node: node.index):
        phases[node] = max((phases[s] + (s.op == "mean") for s in waiting[node]), default=0)
    # Results that replace what others read come last, in the order that suits delay lines.
    signs, last = {"h": -1, "q": 1}, max(phases.values(), default=0)
    ranks = {node: signs[to[0]] * int(to[1:]) for to, node in roots.items() if to[0] in signs}
    for node in sorted(makers, key=lambda node: -node.index):
        if phases[node] == 0 and node.op != "mean":  # compute it only once it is needed
            latest = last if node in ranks else 0
            phases[node] = min((phases[reader] for reader in readers[node]), default=latest)
    ordered: list[Node] = []

    def cost(node: Node) -> tuple[int, ...]:
        freed = sum(readers[source] == {node} for source in makers[node][1] if source in readers)
        return node.kind != "v", phases[node], ranks.get(node, -9), -freed, node.index

    while waiting:
        node = min((node for node in waiting if not waiting[node]), key=cost)
        ordered.append(node)
        del waiting[node]
        for others in (*waiting.values(), *readers.values()):
            others.discard(node)
    return ordered
