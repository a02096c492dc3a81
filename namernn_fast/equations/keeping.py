"""Chooses the values that a row keeps for the backward pass."""

from collections.abc import Sequence

from .graph import Node, reachable, unstopped

SLOW = {"exp", "expm1", "log", "log1p", "sigmoid", "softplus", "tanh"}
UNLIMITED = 1 << 20


def is_given(node: Node) -> bool:
    """Returns whether the backward pass has a value anyway, or computes it once for all rows."""
    return node.kind in "cv" or (node.op == "leaf" and node.operand[0] in "pi")


def kept_nodes(states: Sequence[Node], gradients: Sequence[Node]) -> list[Node]:
    """Returns the fewest values that, with the new states, determine the gradients.

    The backward pass computes fast operations again. It computes slow ones again only if their
    sources need none, and numbers always, because rows keep only full values. The result is a
    minimum cut between the sums and the gradients, the one closest to the gradients.
    """
    forward = reachable(states)
    free = {node for node in forward if is_given(node)}
    free |= {unstopped(state) for state in states if state.kind == "r"}
    later = {*reachable(gradients)} - {*forward}
    needed = {*gradients, *(source for node in later for source in node.sources)}
    quick: set[Node] = set()  # what follows from free values by fast operations
    rest: dict[object, dict[object, int]] = {"start": {}, "end": {}}  # capacities, less the flow

    def connect(a: object, b: object, capacity: int = UNLIMITED) -> None:
        rest.setdefault(a, {})[b] = capacity
        rest.setdefault(b, {})[a] = 0

    for node in forward:
        is_fast = node.op not in SLOW or node.kind == "m"
        follows = bool(node.sources) and quick.issuperset(node.sources)
        if node in free or (is_fast and follows):
            quick.add(node)
        if node in free:
            continue
        can_keep = node.kind == "r" and node.op != "stop"
        connect((node, "in"), (node, "out"), 1 if can_keep else UNLIMITED)
        if not node.sources or not (is_fast or follows):
            connect("start", (node, "in"))
        for source in {*node.sources} - free:
            connect((source, "out"), (node, "in"))
        if node in needed:
            connect((node, "out"), "end")
    while True:
        after: dict[object, object] = {"end": None}  # the next step of a way to the end
        queue: list[object] = ["end"]
        for b in queue:
            found = [a for a in rest[b] if a not in after and rest[a][b] > 0]
            after |= dict.fromkeys(found, b)
            queue += found
        if "start" not in after:
            return [n for n in forward if (n, "out") in after and (n, "in") not in after]
        a: object = "start"
        while a != "end":
            rest[a][after[a]] -= 1
            rest[after[a]][a] += 1
            a = after[a]
