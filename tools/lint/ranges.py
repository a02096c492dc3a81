"""Finds 32-bit sums and products in a kernel's addresses that may overflow.

Analyses Triton's first intermediate representation, TTIR, and computes the range of every 32-bit
value. The range of the program id follows from the launch, and the range of a loop variable from
the loop's bounds. An argument may be any non-negative number. 64-bit values are ignored.
"""

import re
from collections.abc import Iterator

_LIMIT = 1 << 31
_ANY = (-_LIMIT, _LIMIT - 1)
Range = tuple[int, int]

_LINE = re.compile(r"^\s*(%[\w.]+)(?::\d+)? = (\S+) ?(.*)$")
_VALUE = re.compile(r"%[\w.#]+")
_ARGUMENT = re.compile(r"(%[\w.]+): i32\b")
# Operations that rearrange or convert their operands without changing values.
_SAME = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi"}


def overflows(code: str, programs: int) -> Iterator[str]:
    """Yields each 32-bit operation in an address that may overflow with `programs` programs."""
    ranges: dict[str, Range] = {}
    in_addresses = _in_addresses(code)
    for line in code.splitlines():
        line = line.split(" loc(")[0]
        if "tt.func" in line:
            ranges |= dict.fromkeys(_ARGUMENT.findall(line), (0, _LIMIT - 1))
        if loop := re.search(r"scf\.for (%[\w.]+) = (%[\w.]+) to (%[\w.]+)", line):
            variable, first, last = loop.groups()
            begin, end = ranges.get(first, _ANY), ranges.get(last, _ANY)
            ranges[variable] = (begin[0], max(begin[0], end[1] - 1))
        elif found := _LINE.match(line):
            name, operation, rest = found.groups()
            result = _result(operation, rest, ranges, programs)
            if not -_LIMIT <= result[0] <= result[1] < _LIMIT:
                if name in in_addresses and re.search(r"(: |x)i32>?$", line.strip()):
                    yield line.strip()
                result = _ANY
            ranges[name] = result


def _in_addresses(code: str) -> set[str]:
    """Returns all values that addresses are computed from. Stops at loads and arguments."""
    made_from: dict[str, list[str]] = {}
    waiting = []
    for line in code.splitlines():
        if match := _LINE.match(line.split(" loc(")[0]):
            name, operation, rest = match.groups()
            if operation not in ("tt.load", "tt.bitcast", "arith.bitcast"):
                made_from[name] = _VALUE.findall(rest.split(" : ")[0])
            if operation == "tt.addptr":
                waiting.append(name)
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += made_from.get(name, [])
    return found


def _result(operation: str, rest: str, ranges: dict[str, Range], programs: int) -> Range:
    """Returns the range of an operation's result, ignoring overflow."""
    if operation == "arith.constant":
        found = re.match(r"(?:dense<)?(-?\d+)>? :", rest)
        return (int(found[1]), int(found[1])) if found else _ANY
    if operation == "tt.get_program_id":
        return (0, programs - 1) if rest.startswith("x") else (0, 0)
    if operation == "tt.get_num_programs":
        return (1, programs)
    if operation == "tt.make_range":
        return (0, int(re.search(r"end = (\d+)", rest)[1]) - 1)  # type: ignore[index]
    operands = [ranges.get(name, _ANY) for name in _VALUE.findall(rest.split(" : ")[0])]
    if operation in _SAME and operands:
        return operands[0]
    if operation in ("arith.select", "arith.minsi", "arith.maxsi", "arith.divsi", "arith.remsi"):
        return _bounded(operation, operands)
    if operation in ("arith.addi", "arith.subi", "arith.muli") and len(operands) == 2:
        (a, b), (c, d) = operands
        if operation == "arith.muli":
            products = [x * y for x in (a, b) for y in (c, d)]
            return min(products), max(products)
        return (a + c, b + d) if operation == "arith.addi" else (a - d, b - c)
    return _ANY


def _bounded(operation: str, operands: list[Range]) -> Range:
    """Returns the range of an operation that cannot exceed its operands."""
    (a, b), (c, d) = operands[-2:]
    if operation == "arith.minsi":
        return min(a, c), min(b, d)
    if operation == "arith.maxsi":
        return max(a, c), max(b, d)
    if operation == "arith.select":
        return min(a, c), max(b, d)
    if c <= 0 or a < 0:
        return _ANY
    return (a // d, b // c) if operation == "arith.divsi" else (0, min(b, d - 1))
