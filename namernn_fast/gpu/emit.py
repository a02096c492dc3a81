"""Prints the program of a cell as two Triton kernels, one for each pass.

A program instance runs a block of sequences through all steps, and all units of one direction. A
loop over blocks of units surrounds the operations of the program. Where an operation needs a mean
over all units, one loop ends and the next one starts; values that both need go through memory that
belongs to the program instance. If all units fit one block, there is only one loop.
"""

import functools
import hashlib
import importlib.util
import math
import os
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeAlias

import triton

from ..equations import Program
from ..equations.program import Instruction

OPERATIONS = {
    **{op: f"tl.{op}({{}})" for op in ("abs", "exp", "log", "rsqrt")},
    **{op: f"{op}({{}})" for op in ("log1p", "expm1", "tanh", "sigmoid", "softplus", "sign")},
    **{"neg": "-{}", "sqrt": "tl.sqrt_rn({})", "recip": "1.0 / {}", "copy": "{}"},
    **{"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}"},
    "lt": "({} < {}).to(tl.float32)",
    "le": "({} <= {}).to(tl.float32)",
    "eq": "({} == {}).to(tl.float32)",
    "max": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "min": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "tanh_grad": "{0} * (1.0 - {1} * {1})",
    "sigmoid_grad": "{0} * ({1} * (1.0 - {1}))",
    "where": "tl.where({} != 0.0, {}, {})",
    "fma": "{} * {} + {}",
    "fnma": "{2} - {0} * {1}",
}
"""Each operation of programs except `mean` and `accumulate`, as a Triton expression."""

HEADER = """\
# The {name} cell, printed from its equation by namernn_fast.gpu.emit.
import triton
import triton.language as tl

from namernn_fast.gpu.functions import (
{functions}
)
"""
FUNCTIONS = (
    "add_product, expm1, heads_from, heads_to, is_cut, log1p, previous, row_at, sequences, sigmoid,"
    " sign, softplus, tanh"
)
SIZES = (
    *("T", "B", "N", "time_stride", "batch_stride"),
    *("reset_time_stride", "reset_batch_stride", "reset_to_stride"),
)
"""Arguments for which Triton does not compile a kernel again."""
CONSTANTS = (
    *("H", "HEAD", "DIRECTIONS", "BLOCK_B", "BLOCK_N", "BLOCK_K"),
    *("DOT", "PRECISION", "KEEPS_OUTPUT", "KEEPS", "SLOTS"),
)
START = """\
direction = tl.program_id(1).to(tl.int64)
b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
instance = tl.program_id(0).to(tl.int64) * DIRECTIONS + direction
length, first = sequences(b, lengths, offsets, T, B, N, batch_stride)
steps = tl.max(length, axis=0)
hx_at = ((direction * B + b) * H)[:, None]
scratch_at = (instance * BLOCK_B + tl.arange(0, BLOCK_B))[:, None] * H
scratch_stride = tl.num_programs(0).to(tl.int64) * DIRECTIONS * BLOCK_B * H
"""
STEP = """\
s = tl.zeros_like(length) + step
alive = s < length
t = tl.where(direction == 1, length - 1 - s, s)
t_before = tl.where(direction == 1, t + 1, t - 1)
row = row_at(t, first, starts, time_stride, alive)
before = row_at(t_before, first, starts, time_stride, alive & (s > 0))
cut = alive & is_cut(t, direction, reset, b, length, reset_time_stride, reset_batch_stride)
goes_on = (alive & (s > 0) & (cut == 0))[:, None]
begins = (alive & (s == 0) & (cut == 0))[:, None]
ends = (s == length - 1)[:, None]
alive, cut = alive[:, None], cut[:, None]
is_start = alive & (s == 0)[:, None]
row_at_step = row[:, None] * DIRECTIONS + direction
output_at, kept_at = row_at_step * H, row_at_step * SLOTS * H
output_before = (before[:, None] * DIRECTIONS + direction) * H
kept_before = output_before * SLOTS
if not KEEPS_OUTPUT:
    output_at = ((s % 2 * B + b)[:, None] * DIRECTIONS + direction) * H
    output_before = (((s + 1) % 2 * B + b)[:, None] * DIRECTIONS + direction) * H
if not KEEPS:
    kept_at = ((s % 2 * B + b)[:, None] * DIRECTIONS + direction) * SLOTS * H
    kept_before = (((s + 1) % 2 * B + b)[:, None] * DIRECTIONS + direction) * SLOTS * H
reset_to_at = (t * reset_to_stride + b * H)[:, None]
"""
BLOCK = """\
n = (start + tl.arange(0, BLOCK_N))[None, :]
mask = alive & (n < H)
"""


class Value(NamedTuple):
    """An operation of a program, after every value got a name of its own."""

    op: str
    to: str
    """The operand that the program names."""
    name: str
    sources: tuple[str, ...]
    kind: str
    """As `graph.Kind`, or w for a sum over rows."""
    phase: int


class _Body:
    """Prints the operations of one pass as the statements of a step."""

    def __init__(self, program: Program, instructions: Sequence[Instruction], in_one_block: bool):
        self.program, self.in_one_block = program, in_one_block
        self.numbers = {f"i{k}" for k, (_, is_number) in enumerate(program.inputs) if is_number}
        self.values: dict[str, Value] = {}
        self._name_values(instructions)
        self.phases = 1 + max(value.phase for value in self.values.values())
        crossing = {
            source
            for value in self.values.values()
            for source in value.sources
            if self._is_full(source) and self._defined_in(source) < value.phase
        }
        self.slots = {name: slot for slot, name in enumerate(sorted(crossing))}
        """The places in scratch memory of values that live across phases."""

    def _name_values(self, instructions: Sequence[Instruction]) -> None:
        names: dict[str, str] = {}
        phase = 0
        for op, to, operands in instructions:
            sources = tuple(names.get(source, source) for source in operands)
            means = (self.values[x] for x in sources if x in self.values)
            late = (v.phase + (v.op == "mean") for v in means if v.kind == "m")
            if not self.in_one_block:
                phase = max([phase, *late])
            name = to if to not in names else f"{to}_{len(self.values)}"
            is_number = to[0] == "j" and f"i{to[1:]}" in self.numbers
            kind = "m" if is_number else to[0] if to[0] in "mvw" else "r"
            self.values[name] = Value(op, to, name, sources, kind, phase)
            names[to] = name

    def _is_full(self, name: str) -> bool:
        """Returns whether a value must be kept to be read in a later phase."""
        return self.values[name].kind == "r" if name in self.values else name[0] == "s"

    def _defined_in(self, name: str) -> int:
        return self.values[name].phase if name in self.values else 0

    def source(self, name: str) -> str:
        """Returns the expression of an operand."""
        if name == "n0":
            return "H"
        if name[0] != "c":
            return name
        value = self.program.constants[int(name[1:])]
        return repr(value) if math.isfinite(value) else f'float("{value}")'

    def expression(self, value: Value) -> str:
        """Returns the expression that computes a value."""
        sources = [self.source(name) for name in value.sources]
        if all(name[0] in "cn" for name in value.sources):
            sources[0] = f"tl.full((1, 1), {sources[0]}, tl.float32)"
        return OPERATIONS[value.op].format(*sources)

    def step(self, before_block: Sequence[str], load: "Loads", store: "Stores") -> list[str]:
        """Returns the statements of a step.

        Args:
            before_block: the statements that make the operands s of a block of units.
            load: the statement that loads each leaf.
            store: the statement that stores what a program writes.
        """
        lines = [load(name) for name in sorted(self.numbers)]
        for phase in range(self.phases):
            values = [value for value in self.values.values() if value.phase == phase]
            inner = [*BLOCK.splitlines(), *(before_block if phase == 0 else [])]
            known = {x for x in self.slots if phase == 0 and x not in self.values}
            inner += [self._to_scratch(name) for name in sorted(known)]
            after = []
            for value in values:
                is_row = value.kind == "m" and not self.in_one_block
                for name in value.sources if value.op == "mean" or not is_row else ():
                    self._require(name, phase, inner, load)
                if value.op == "mean":
                    total = f"tl.sum(tl.where(mask, {self.source(value.sources[0])}, 0.0), 1)"
                    if is_row:
                        lines.append(f"{value.name} = tl.zeros((BLOCK_B, 1), tl.float32)")
                        inner.append(f"{value.name} += {total}[:, None]")
                        after.append(f"{value.name} = {value.name} / H")
                    else:
                        inner.append(f"{value.name} = {total}[:, None] / H")
                    continue
                target = lines if is_row else inner
                if value.op == "accumulate":
                    target.append(store(value.to, self.source(value.sources[0])))
                    continue
                if value.kind != "v" or f"{value.name} = {self.expression(value)}" not in inner:
                    target.append(f"{value.name} = {self.expression(value)}")
                if value.to[0] in "hkdqj":
                    target += store(value.to, value.name).splitlines()
                if value.name in self.slots:
                    target.append(self._to_scratch(value.name))
            lines.append("for start in range(0, H, BLOCK_N):")
            lines.append(_indented(inner))
            lines += after
            if phase < self.phases - 1:
                lines.append("tl.debug_barrier()")
        return lines

    def _to_scratch(self, name: str) -> str:
        place = f"scratch + {self.slots[name]} * scratch_stride + scratch_at + n"
        return f"tl.store({place}, {name} + tl.zeros((BLOCK_B, BLOCK_N), tl.float32), mask=mask)"

    def _require(self, name: str, phase: int, inner: list[str], load: "Loads") -> None:
        """Adds the statements that make a source known in a block."""
        if name[0] in "cn" or name in self.numbers or any(x.startswith(f"{name} =") for x in inner):
            return
        value = self.values.get(name)
        if value is None and name[0] != "s":
            inner.append(load(name))
        elif value is not None and value.kind == "v":
            for source in value.sources:
                self._require(source, phase, inner, load)
            inner.append(f"{name} = {self.expression(value)}")
        elif name in self.slots and self._defined_in(name) < phase:
            place = f"scratch + {self.slots[name]} * scratch_stride + scratch_at + n"
            inner.append(f"{name} = tl.load({place}, mask=mask, other=0.0)")


Loads: TypeAlias = Callable[[str], str]
Stores: TypeAlias = Callable[[str, str], str]


def _load_previous(program: Program, i: int, n: str, units: str) -> str:
    """Returns the expression of previous state i of units n."""
    history, before = ("output", "output_before")
    if i:
        history, before = "kept", f"kept_before + (SLOTS - {program.states - i}) * H"
    masks = ", ".join(f"{mask} & {units}" for mask in ("goes_on", "begins", "cut"))
    places = f"{before} + {n}, hx_at + {n}, reset_to_at + {n}"
    return f"previous({history}, hx{i}, reset_to{i}, {places}, {masks})"


def _loads(program: Program, name: str) -> str:
    """Returns the statement that loads a leaf of a program."""
    letter, k = name[0], int(name[1:])
    if name == "y0":
        load = "tl.load(output + output_at + n, mask=mask, other=0.0)"
    elif letter == "k":
        load = f"tl.load(kept + kept_at + {k} * H + n, mask=mask, other=0.0)"
    elif letter == "p":
        load = _load_previous(program, k, "n", "(n < H)")
    elif letter == "o":
        blocks = sum(count for _, count in program.own)
        load = f"tl.load(own + (direction * {blocks} + {k}) * H + n, mask=n < H, other=0.0)"
    elif letter == "i":
        at = f"input{k} + row[:, None] * input{k}_row + direction * input{k}_direction"
        is_number = program.inputs[k][1]
        at = f"{at}, mask=alive" if is_number else f"{at} + n, mask=mask"
        load = f"tl.load({at}, other=0.0)"
        load = f"({load} if input{k} is not None else tl.zeros((1, 1), tl.float32))"
    else:
        load = f"tl.load(carried{k} + hx_at + n, mask=mask, other=0.0)"
        if k == 0:
            more = "tl.load(grad_output + output_at + n, mask=mask, other=0.0).to(tl.float32)"
            return f"g0 = {load}\nif grad_output is not None:\n    g0 += {more}"
    return f"{name} = {load}.to(tl.float32)"


def _indented(lines: Sequence[str], levels: int = 1) -> str:
    return textwrap.indent("\n".join(lines), "    " * levels)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 92, initial_indent="    ", subsequent_indent="    "))


def _kernel(name: str, tensors: Sequence[str], numbers: Sequence[str], body: Sequence[str]) -> str:
    """Returns the text of a kernel. Its signature lists tensors, then numbers, then constants."""
    unspecialized = [*SIZES, *numbers]
    arguments = [*tensors, *unspecialized, *(f"{constant}: tl.constexpr" for constant in CONSTANTS)]
    return "\n".join(
        [
            f"@triton.jit(do_not_specialize={unspecialized})",
            f"def {name}(",
            _wrapped(", ".join(arguments)),
            "):",
            _indented([*START.splitlines(), *body]),
            "",
        ]
    )


LAYOUT = ("lengths", "offsets", "starts", "reset")


def _read_by_both(program: Program) -> list[str]:
    """Returns the names of the tensors that both kernels read."""
    states, inputs = range(program.states), range(len(program.inputs))
    names = ["weight_hh", "own", *(f"hx{i}" for i in states), *(f"reset_to{i}" for i in states)]
    return [*LAYOUT, *names, *(f"input{i}" for i in inputs), "output", "kept", "scratch"]


def _strides(program: Program, *prefixes: str) -> list[str]:
    """Returns the names of the strides of inputs, or of their gradients."""
    names = [f"{prefix}input{i}" for prefix in prefixes for i in range(len(program.inputs))]
    return [f"{name}_{stride}" for name in names for stride in ("row", "direction")]


def _sums(program: Program) -> list[str]:
    """Returns the statements that compute the operands s of a block of units."""
    gates, fused = program.gates, program.gates - program.separate
    lines = []
    if program.has_weight_hh:
        for g in range(gates):
            lines.append(f"u{g} = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)")
        h = _load_previous(program, 0, "k", "(k < head + HEAD)")
        loop = ["k = (first_k + tl.arange(0, BLOCK_K))[None, :]", f"h = {h}"]
        loop.append("units = (tl.trans(k) < head + HEAD) & is_own")
        for g in range(gates):
            weight = f"weight_hh + (direction * {gates} + {g}) * H * HEAD"
            tile = f"tl.load({weight} + n * HEAD + tl.trans(k) - head, mask=units, other=0.0)"
            loop.append(f"u{g} = {_add_product(f'u{g}', 'h', tile)}")
        lines += _over_heads(loop)
    for g in range(gates):
        place = f"x + (row_at_step * {gates} + {g}) * H + n"
        lines.append(f"x{g} = tl.load({place}, mask=mask, other=0.0).to(tl.float32)")
    if program.separate:
        lines.append("if bias is not None:")
        for g in range(gates):
            bias = f"tl.load(bias + (direction * {gates} + {g}) * H + n, mask=n < H, other=0.0)"
            lines.append(f"    u{g} += {bias}.to(tl.float32)")
    both = "x{0} + u{0}" if program.has_weight_hh else "x{0}"
    operands = [f"x{g}" for g in range(fused, gates)]
    operands += [both.format(g) for g in range(fused)]
    operands += [f"u{g}" for g in range(fused, gates)]
    return lines + [f"s{k} = {operand}" for k, operand in enumerate(operands)]


def _over_heads(products: list[str]) -> list[str]:
    """Returns the loops over the heads of a block of units n, and over the units k of each head."""
    return [
        "for head in range(heads_from(start, HEAD), heads_to(start, BLOCK_N, HEAD, H), HEAD):",
        "    is_own = (n >= head) & (n < head + HEAD)",
        "    for first_k in range(head, head + HEAD, BLOCK_K):",
        _indented(products, 2),
    ]


def _add_product(sum: str, left: str, right: str) -> str:
    """Returns sum + left @ right for the units of a head; a NaN of one head stays in it."""
    return f"add_product({sum}, {left}, {right}, is_own, HEAD < H, DOT, PRECISION)"


def _forward(program: Program, body: _Body) -> str:
    """Prints the forward pass."""
    states = program.states

    def store(to: str, name: str) -> str:
        letter, k = to[0], int(to[1:])
        if letter == "k":
            return f"if KEEPS:\n    tl.store(kept + kept_at + {k} * H + n, {name}, mask=mask)"
        place = "output + output_at"
        if k:
            place = f"kept + kept_at + (SLOTS - {states - k}) * H"
        last = f"tl.store(last{k} + hx_at + n, {name}, mask=mask & ends)"
        return f"tl.store({place} + n, {name}, mask=mask)\n{last}"

    statements = body.step(_sums(program), lambda name: _loads(program, name), store)
    loop = [*STEP.splitlines(), *statements, "tl.debug_barrier()"]
    tensors = ["x", "bias", *_read_by_both(program), *(f"last{i}" for i in range(states))]
    text = ["for step in range(0, steps):", _indented(loop)]
    return _kernel("forward", tensors, _strides(program, ""), text)


def _to_previous(program: Program) -> list[str]:
    """Returns the statements that pass gradients on to the previous states of a block of units."""
    gates, sums = program.gates, program.gates + program.separate
    lines = [*BLOCK.splitlines()]
    for i in range(program.states):
        lines.append(f"q{i} = tl.load(grad_previous{i} + hx_at + n, mask=mask, other=0.0)")
    if program.has_weight_hh:
        loop = ["k = (first_k + tl.arange(0, BLOCK_K))[None, :]"]
        loop.append("units = (tl.trans(k) < head + HEAD) & is_own")
        for g in range(gates):
            slot = program.separate + g
            place = f"dz + (row_at_step * {sums} + {slot}) * H + k"
            weight = f"weight_hh + (direction * {gates} + {g}) * H * HEAD"
            tile = f"tl.load({weight} + tl.trans(k) * HEAD + n - head, mask=units, other=0.0)"
            loop.append(f"du = tl.load({place}, mask=alive & (k < head + HEAD), other=0.0)")
            loop.append(f"q0 = {_add_product('q0', 'du', tile)}")
        lines += _over_heads(loop)
    for i in range(program.states):
        to = f"carried{i} + hx_at + n"
        lines += [
            f"tl.store({to}, tl.where(goes_on, q{i}, 0.0), mask=mask)",
            f"if grad_hx{i} is not None:",
            f"    first_grad = tl.where(begins, q{i}, 0.0)",
            f"    tl.store(grad_hx{i} + hx_at + n, first_grad, mask=mask & is_start)",
            f"if grad_reset_to{i} is not None:",
            f"    tl.store(grad_reset_to{i} + reset_to_at + n, q{i}, mask=mask & cut)",
        ]
    return lines


def _backward(program: Program, body: _Body) -> str:
    """Prints the backward pass."""
    sums, states = program.gates + program.separate, program.states
    blocks = sum(count for _, count in program.own)

    def store(to: str, name: str) -> str:
        letter, k = to[0], int(to[1:])
        if letter == "w":
            place = f"grad_own + ((instance * 2 + {{}}) * {blocks} + {k}) * H + n"
            before, after = place.format("(step + 1) % 2"), place.format("step % 2")
            total = f"tl.sum(tl.where(mask, {name}, 0.0), 0)[None, :]"
            total = f"tl.load({before}, mask=n < H, other=0.0) + {total}"
            return f"tl.store({after}, {total}, mask=n < H)"
        if letter == "d":
            return f"tl.store(dz + (row_at_step * {sums} + {k}) * H + n, {name}, mask=mask)"
        if letter == "q":
            return f"tl.store(grad_previous{k} + hx_at + n, {name}, mask=mask)"
        grad = f"grad_input{k}"
        place = f"{grad} + row[:, None] * {grad}_row + direction * {grad}_direction"
        is_number = program.inputs[k][1]
        place, mask = (place, "alive") if is_number else (f"{place} + n", "mask")
        return f"if {grad} is not None:\n    tl.store({place}, {name}, mask={mask})"

    statements = body.step(
        [
            "if before_rows is not None:",
            f"    p = {_load_previous(program, 0, 'n', '(n < H)')}",
            "    tl.store(before_rows + row_at_step * H + n, p, mask=mask)",
        ],
        lambda name: _loads(program, name),
        store,
    )
    loop = [*STEP.splitlines(), *statements, "tl.debug_barrier()"]
    loop += ["for start in range(0, H, BLOCK_N):", _indented(_to_previous(program))]
    tensors = [*_read_by_both(program), "grad_output", "dz", "before_rows", "grad_own"]
    for names in ("carried", "grad_previous", "grad_hx", "grad_reset_to"):
        tensors += [f"{names}{i}" for i in range(states)]
    tensors += [f"grad_input{i}" for i in range(len(program.inputs))]
    text = [
        "for steps_left in range(0, steps):",
        _indented(["step = steps - 1 - steps_left", *loop, "tl.debug_barrier()"]),
    ]
    return _kernel("backward", tensors, _strides(program, "", "grad_"), text)


class Printed(NamedTuple):
    """The kernels of a program."""

    module: ModuleType
    source: str
    slots: tuple[int, int]
    """The numbers of scratch values of a block that the forward and the backward kernel need."""


@functools.cache
def printed(program: Program, in_one_block: bool) -> Printed:
    """Returns the kernels of a program.

    Args:
        program: the program.
        in_one_block: whether BLOCK_N covers all units, so that means need no phases.
    """
    passes = program.forward, program.backward
    forward, backward = (_Body(program, items, in_one_block) for items in passes)
    header = HEADER.format(name=program.name, functions=_wrapped(FUNCTIONS))
    texts = header, _forward(program, forward), _backward(program, backward)
    source = "\n\n".join(texts)
    return Printed(
        _imported(program.name, source), source, (len(forward.slots), len(backward.slots))
    )


def _imported(name: str, source: str) -> ModuleType:
    """Imports source code from a file in Triton's cache, because Triton reads source files."""
    folder = Path(triton.knobs.cache.dir) / "namernn_fast"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:32]}.py"
    if not path.is_file() or path.read_text(encoding="utf-8") != source:
        handle, temporary = tempfile.mkstemp(dir=folder)  # readable by this user only
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(source)
        os.replace(temporary, path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
