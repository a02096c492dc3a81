"""The values of an equation: a graph in which equal values are one node."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from .program import OPERATIONS

Kind: TypeAlias = Literal["c", "v", "m", "r"]
"""How a value varies: a constant, a vector over units, a number for each row, or a full value for
both. The last three are the letters of registers."""


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """A value. Only `Graph` makes nodes, so that no two of a graph are equal."""

    op: str
    """An operation of programs, `constant`, `leaf`, or `stop`: a copy that blocks gradients."""
    sources: tuple["Node", ...]
    kind: Kind
    index: int
    """Nodes have larger indices than their sources."""
    value: float = math.nan
    """The value of a constant."""
    operand: str = ""
    """The operand that holds the value of a leaf."""


def reachable(roots: Iterable[Node]) -> list[Node]:
    """Returns the roots and the values that they are computed from, sources first."""
    found, stack = set(), [*roots]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.sources
    return sorted(found, key=lambda node: node.index)


def unstopped(node: Node) -> Node:
    """Returns the value that a `stop` copies, or the node if it is none."""
    return node.sources[0] if node.op == "stop" else node


def _is_boolean(node: Node) -> bool:
    match node:
        case Node("mul" | "max", (a, b)):
            return _is_boolean(a) and _is_boolean(b)
        case Node("sub", (Node("constant", value=1), a)):
            return _is_boolean(a)
    return node.op in ("lt", "le", "eq")


RULES = """
add a 0 = a; sub a 0 = a; mul a 1 = a; div a 1 = a; neg (neg a) = a; mean m = m
stop k = k; stop p = p; stop (stop a) = stop a; where 0 a b = b; where c a b = a
where p 1 0 = p; where (sub 1 p) a b = where p b a; eq p 0 = sub 1 p; sub 1 (sub 1 p) = p
sub 0 a = neg a; mul a -1 = neg a; neg (sub a b) = sub b a; sub (neg a) b = neg (add a b)
add a (neg b) = sub a b; add (neg b) a = sub a b; sub a (neg b) = add a b
mul (neg a) b = neg (mul a b); mul a (neg b) = neg (mul a b); mean (neg a) = neg (mean a)
div (neg a) b = neg (div a b); div a (neg b) = neg (div a b)
tanh_grad (neg a) b = neg (tanh_grad a b); sigmoid_grad (neg a) b = neg (sigmoid_grad a b)
div (mul a n) n = a; mul (div a n) n = a; div a c = mul a (recip c)
mul (mul a c) d = mul a (mul c d); div 1 a = recip a; recip (sqrt a) = rsqrt a
recip (add (exp a) 1) = sigmoid (neg a); div a (add (exp b) 1) = mul a (sigmoid (neg b))
mul a (sub 1 (mul b b)) = tanh_grad a b
mul a (mul b (sub 1 b)) = sigmoid_grad a b; mul (mul a b) (sub 1 b) = sigmoid_grad a b
"""
"""Simplifications, which may change the rounding, but never remove a NaN or an infinity."""
WHAT: dict[str, Callable[[Node], bool]] = {
    "a": lambda node: True,
    "b": lambda node: True,
    "c": lambda node: node.op == "constant" and 1e-300 < abs(node.value) < 1e300,
    "d": lambda node: node.op == "constant" and 1e-300 < abs(node.value) < 1e300,
    "k": lambda node: node.kind == "c",
    "m": lambda node: node.kind in "cm",
    "n": lambda node: node.operand == "n0",
    "p": _is_boolean,
}
"""What the letters in rules stand for."""


def _parsed(expression: str) -> Any:
    """Returns an expression as nested lists."""
    stack: list[list[Any]] = [[]]
    for token in expression.replace("(", "( ").replace(")", " )").split():
        if token == "(":
            stack.append([])
        else:
            item = stack.pop() if token == ")" else token
            stack[-1].append(item)
    return stack[0] if len(stack[0]) > 1 else stack[0][0]


_RULES: dict[str, list[tuple[Any, Any]]] = {}
for _rule in RULES.strip().replace("\n", ";").split(";"):
    _left, _right = map(_parsed, _rule.split("="))
    _RULES.setdefault(_left[0], []).append((_left[1:], _right))


def _match(pattern: Any, node: Node, found: dict[str, Node]) -> bool:
    """Returns whether a node is what a pattern describes. Adds what its letters stand for."""
    if isinstance(pattern, list):
        return node.op == pattern[0] and all(map(_match, pattern[1:], node.sources, [found] * 3))
    if pattern not in WHAT:
        return node.op == "constant" and node.value == float(pattern)
    return WHAT[pattern](node) and found.setdefault(pattern, node) is node


class Graph:
    """Makes nodes, in as simple a form as possible."""

    def __init__(self) -> None:
        self._nodes: dict[object, Node] = {}
        self.zero, self.one = self.constant(0.0), self.constant(1.0)

    def intern(
        self, op: str, *sources: Node, kind: Kind, value: float = math.nan, operand: str = ""
    ) -> Node:
        """Returns the node with these fields, without simplifying it."""
        key = op, sources, kind, repr(value), operand
        if key not in self._nodes:
            self._nodes[key] = Node(op, sources, kind, len(self._nodes), value, operand)
        return self._nodes[key]

    def leaf(self, operand: str, kind: Kind = "r") -> Node:
        """Returns the value of an operand."""
        return self.intern("leaf", kind=kind, operand=operand)

    def constant(self, value: float) -> Node:
        """Returns a constant."""
        return self.intern("constant", kind="c", value=value)

    def make(self, op: str, *sources: Node) -> Node:
        """Returns the result of an operation, which may be another one or a source."""
        if op in ("add", "mul", "eq"):  # constants come last
            keys = [
                (source.op == "constant", source.kind == "c", source.index) for source in sources
            ]
            sources = tuple(source for _, source in sorted(zip(keys, sources, strict=True)))
        if op in OPERATIONS and all(source.op == "constant" for source in sources):
            values = (torch.tensor(source.value, dtype=torch.float64) for source in sources)
            return self.constant(float(OPERATIONS[op](*values)))
        for patterns, result in _RULES.get(op, ()):
            found: dict[str, Node] = {}
            if all(map(_match, patterns, sources, [found] * len(sources))):
                return self._build(result, found)
        if op == "add" and (sum := self._paired(*sources) or self._paired(*sources[::-1])):
            return sum
        kinds = {source.kind for source in sources} - {"c"}
        kind: Kind = "m" if op == "mean" or not kinds else kinds.pop() if len(kinds) == 1 else "r"
        return self.intern(op, *sources, kind=kind)

    def _build(self, pattern: Any, found: Mapping[str, Node]) -> Node:
        if isinstance(pattern, list):
            return self.make(pattern[0], *(self._build(part, found) for part in pattern[1:]))
        return found[pattern] if pattern in found else self.constant(float(pattern))

    def _paired(self, leaf: Node, rest: Node) -> Node | None:
        """Returns leaf + rest with x_g + u_g first, if leaf is one and rest contains the other."""
        partner = {"x": "u", "u": "x"}.get(leaf.operand[:1], "no ") + leaf.operand[1:]
        for part, other in (rest.sources, rest.sources[::-1]) if rest.op == "add" else ():
            is_partner = part.operand == partner
            if pair := self.make("add", leaf, part) if is_partner else self._paired(leaf, part):
                return self.make("add", pair, other)
        return None

    def rewritten(
        self, roots: Iterable[Node], known: Mapping[Node, Node], stops: bool = True
    ) -> list[Node]:
        """Returns values with replacements for other values, and with or without `stop`."""
        known, roots = {**known}, [*roots]
        for node in reachable(roots):
            sources = [known[source] for source in node.sources if node not in known]
            if sources and (stops or node.op != "stop"):
                known[node] = self.make(node.op, *sources)
            known.setdefault(node, sources[0] if sources else node)
        return [known[root] for root in roots]
