"""Records what a step and its gradient compute, from the ATen operations that they run.

A traced tensor stands for values, one for each block of hidden_size columns. Its numbers mean
nothing.
"""

import functools
import itertools
import linecache
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from traceback import walk_stack, walk_tb
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..machine.torch_private import TorchDispatchMode, decomposition_table
from .graph import Graph, Kind, Node, unstopped
from .lowering import DECOMPOSED, POINTWISE

INTERNAL = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
MOVING = {"cat", "clone", "lift_fresh", "select_backward", "slice_backward", "_unsafe_view"}
"""Operations besides views that only move elements."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}
"""Operations that a step cannot use."""
UNREAD = {"device", "dtype", "layout", "memory_format", "non_blocking", "pin_memory"}
Place: TypeAlias = tuple[str, int] | None
"""The file and the line of a step, or None for an operation of autograd."""


def rejected(message: str, place: Place = None) -> ValueError:
    """Returns the error for a step that has no program. It quotes the line of the step."""
    if place:
        line = linecache.getline(*place).strip()
        if re.search(r"\b(if|while)\b", line):
            message += " (to choose by a value of the step, use torch.where)"
        message = f"{os.path.basename(place[0])}:{place[1]}: `{line}`: {message}"
    return ValueError(message)


def _place_of(frames: Iterable[tuple[FrameType, int]]) -> Place:
    """Returns the place of the first frame outside torch and this package."""
    places = ((frame.f_code.co_filename, line) for frame, line in frames)
    return next((place for place in places if not place[0].startswith(INTERNAL)), None)


class Number(NamedTuple):
    """A number of a step: (halves / 2 * hidden_size + rest) ** (1 / power)."""

    rest: float
    halves: int = 0
    power: int = 1

    def at(self, units: int) -> float:
        """Returns the number for this hidden_size, or NaN if there is none."""
        base = self.halves / 2 * units + self.rest
        if self.power == 1:
            return base
        return math.nan if base <= 0 else base ** (1 / self.power)


POWERS = {-1: "recip", 2: "sqrt", -2: "rsqrt"}
"""The operation for each `Number.power` besides 1."""


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Records the operations on traced tensors while it is active."""

    def __init__(self, rows: int, units: int, known: "Recording | None") -> None:
        super().__init__()
        self.graph, self.is_forward = Graph(), True
        self.log: list[tuple[object, Place]] = []
        """The operations with their sources, and where they run."""
        self.numbers: list[Number] = []
        """The numbers that the step used, in order."""
        self._known = None if known is None else iter(known.numbers)
        self._rows, self._units = rows, units
        self._traced: dict[int, tuple[Tensor, list[Node]]] = {}
        self._shared: set[int] = set()  # tensors that may not change in place
        self._running = ""  # the operation that runs, even if others run within it

    def leaf(self, operand: str, kind: Kind = "r") -> Tensor:
        """Returns a tensor that stands for an operand."""
        shape = {"r": (self._rows, self._units), "m": (self._rows, 1), "v": (1, self._units)}[kind]
        tensor = torch.linspace(self._rows, self._units, shape[0] * shape[1]).view(shape)
        return self._trace(tensor[0] if kind == "v" else tensor, [self.graph.leaf(operand, kind)])

    def protect_all(self) -> None:
        """Forbids changing the traced tensors in place."""
        self._shared |= self._traced.keys()

    def blocks_of(self, tensor: Tensor) -> list[Node]:
        """Returns the blocks of a tensor, or its number if it is not traced."""
        if id(tensor) in self._traced:
            return self._traced[id(tensor)][1]
        first = tensor.flatten()[:1]
        if tensor.requires_grad or tensor.numel() == 0 or not bool((tensor == first).all()):
            raise self._rejected("reads a tensor that is not an argument: declare a parameter")
        return [self._number(float(first))]

    def _number(self, value: float) -> Node:
        """Returns a constant, or the function of hidden_size that it must be."""
        make, constant, n0 = self.graph.make, self.graph.constant, self.graph.leaf("n0", "c")
        number = self._recognised(value) if self._known is None else next(self._known, None)
        if number is None or not math.isclose(number.at(self._units), value, rel_tol=1e-6):
            number = Number(value)  # another number than before: _check_equal reports it
        self.numbers.append(number)
        if not number.halves:
            return constant(number.rest)
        node = make("add", make("mul", n0, constant(number.halves / 2)), constant(number.rest))
        return make(POWERS[number.power], node) if number.power != 1 else node

    def _recognised(self, value: float) -> "Number":
        """Returns the function of hidden_size that a number is most likely to be."""
        for power in (1, *POWERS) if 1e-9 < abs(value) < 1e9 else ():
            halves = round(2 * value**power / self._units)
            rest = value**power - halves / 2 * self._units
            if 0 < abs(halves) <= 32 and abs(rest) <= 1 and abs(2 * rest - round(2 * rest)) < 1e-3:
                return Number(round(2 * rest) / 2, halves, power)
        return Number(value)

    def _dispatch(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        outer, name = self._running, func.overloadpacket.__name__
        self._running = outer or name
        try:
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise self._rejected("draws random numbers: pass them as an input")
            tensors = _tensors([*args, *kwargs.values()])
            if self._traced.keys().isdisjoint(map(id, tensors)):
                return func(*args, **kwargs)
            if name in PRODUCTS and self.is_forward:
                raise self._rejected("multiplies by a matrix: only weight_hh does, so scale u")
            for tensor in tensors:
                self.blocks_of(tensor)  # raises an error if it is not a constant
            result = self._run(func, name, args, kwargs)
            if self.is_forward and not outer and (name == "detach" or not torch.is_grad_enabled()):
                for tensor in _tensors([result]):
                    self._trace(tensor, [self._make("stop", x) for x in self.blocks_of(tensor)])
            return result
        except NotImplementedError as error:
            raise self._rejected(f"is not supported: {error}") from error
        except (IndexError, TypeError) as error:
            raise self._rejected("is not supported with these arguments") from error
        finally:
            self._running = outer

    def _run(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation on traced tensors."""
        if name.endswith("_") and not name.endswith("__"):
            return self._change(getattr(torch.ops.aten, name[:-1]), args, kwargs)
        if name in POINTWISE:
            return self._pointwise(name, func(*args, **kwargs), args, kwargs)
        if name in ("mean", "sum"):
            return self._reduce(name, func(*args, **kwargs), *args, **kwargs)
        if name in MOVING or func.is_view:
            return self._move(func, args, kwargs)
        if name.endswith("_like") or name.startswith("new_"):
            made = func(*args, **kwargs)
            made = made.zero_() if "empty" in name else made
            return self._trace(made, self.blocks_of(made))
        lowered = DECOMPOSED.get(name) or decomposition_table.get(func) or func.decompose
        with self:
            result = lowered(*args, **kwargs)
        if result is NotImplemented:
            raise NotImplementedError(
                "the guide to your own cell lists the functions that kernels have"
            )
        return result

    def _make(self, op: str, *sources: Any) -> Node:
        """Makes an operation of values and numbers."""
        nodes = [x if isinstance(x, Node) else self._number(float(x)) for x in sources]
        nodes = nodes if self.is_forward else [*map(unstopped, nodes)]
        frames = itertools.takewhile(lambda f: f[0].f_code is not trace.__code__, walk_stack(None))
        self.log.append(((op, *((x.index, repr(x.value)) for x in nodes)), _place_of(frames)))
        return self.graph.make(op, *nodes)

    def _rejected(self, reason: str) -> RuntimeError:
        """Returns an error to which `trace` adds the place."""
        within = "" if self.is_forward else "the gradient: "
        return RuntimeError(f"{within}aten.{self._running} {reason}")

    def _layout(self, tensor: Tensor) -> tuple[int, int]:
        """Returns the numbers of rows and columns of a tensor."""
        sizes = [1, 1, *tensor.shape]
        sizes = [*sizes, 1] if sizes[-1] == self._rows else sizes
        rows, columns = sizes[-2:]
        is_block = columns == 1 or columns % self._units == 0
        if rows not in (1, self._rows) or not is_block or any(size != 1 for size in sizes[:-2]):
            sizes_of_step = "(rows, k * hidden_size), (rows, 1) or (hidden_size)"
            raise self._rejected(f"mixes rows or units: tensors must be {sizes_of_step}")
        return rows, columns

    def _count(self, tensor: Tensor) -> int:
        """Returns the number of blocks of a tensor."""
        return max(1, self._layout(tensor)[1] // self._units)

    def _trace(self, tensor: Tensor, blocks: list[Node]) -> Tensor:
        """Makes a tensor stand for blocks. A single block is repeated to fill the tensor."""
        if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool:
            raise self._rejected(f"returns {tensor.dtype}: convert its arguments to the dtype of x")
        blocks = blocks * self._count(tensor) if len(blocks) == 1 else blocks
        self._traced[id(tensor)] = tensor, blocks
        return tensor

    def _change(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Runs an operation in place."""
        target: Tensor = args[0]
        if id(target) in self._shared or id(target) not in self._traced:
            raise self._rejected("changes a tensor in place: compute a new tensor")
        with self:
            changed = func(*args, **kwargs)
        return self._trace(target.copy_(changed), self.blocks_of(changed))

    def _pointwise(
        self, name: str, result: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Records an operation on corresponding elements."""
        are_bool = all(tensor.dtype == torch.bool for tensor in _tensors(args))
        if name == "_to_copy" and not are_bool and result.dtype != torch.float32:
            raise self._rejected("changes the dtype")
        if name in ("logical_and", "logical_or") and not are_bool:
            raise self._rejected("needs conditions: compare with 0 first")
        compute = POINTWISE["logical_or" if name == "add" and result.dtype == torch.bool else name]
        options = [key for key in kwargs if key not in UNREAD]
        values = [*args, *(kwargs[key] for key in options)]
        blocks = [self.blocks_of(x) if isinstance(x, Tensor) else [x] for x in values]
        results = []
        for block in range(self._count(result)):
            chosen = [x[block if len(x) > 1 else 0] for x in blocks]
            given = dict(zip(options, chosen[len(args) :], strict=True))
            made = compute(self._make, *chosen[: len(args)], **given)
            results.append(made if isinstance(made, Node) else self._number(float(made)))
        return self._trace(result, results)

    def _reduce(
        self, name: str, result: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> Tensor:
        """Records a mean or a sum."""
        blocks = self.blocks_of(x)
        for size in {d % x.dim(): x.shape[d] for d in dim or range(x.dim())}.values():
            if size % self._units == 0:
                total = functools.reduce(functools.partial(self._make, "add"), blocks)
                op, by = ("div", len(blocks)) if name == "mean" else ("mul", self._units)
                blocks = [self._make(op, self._make("mean", total), by)]
            elif size != 1 and (self.is_forward or name == "mean"):
                raise self._rejected("combines rows")
            # Programs add up the rows of the gradients of parameters when they accumulate them.
        return self._trace(result, blocks)

    def _move(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation that moves elements, and runs it on labels to see where they go."""
        known: list[tuple[Tensor, Node]] = []  # the labels of blocks
        counter = itertools.count(1)

        def labelled(value: Any) -> Any:
            if not isinstance(value, Tensor):
                is_list = isinstance(value, list | tuple)
                return [labelled(item) for item in value] if is_list else value
            first = next(counter) << 32
            labels = torch.arange(first, first + value.numel()).view(self._layout(value))
            parts = labels.split(self._units, 1)
            known.extend(zip(parts, itertools.cycle(self.blocks_of(value)), strict=False))
            return labels.view(value.shape)

        def block_of(part: Tensor) -> Node:
            for labels, node in known:
                same = labels == part
                if same.shape == part.shape and same.all():
                    return node
            if part.any():
                raise self._rejected("mixes rows or units")
            return self.graph.zero

        result, moved = func(*args, **kwargs), func(*map(labelled, args), **kwargs)
        for tensor, labels in zip(_tensors([result]), _tensors([moved]), strict=True):
            parts = labels.reshape(self._layout(tensor)).split(self._units, 1)
            self._trace(tensor, [*map(block_of, parts)])
        if func.overloadpacket.__name__ != "clone":
            self._shared |= {id(tensor) for tensor in (*_tensors(args), *_tensors([result]))}
        return result


# TorchDispatchMode would wrap a method of this name in a function that imports Dynamo.
Recorder.__torch_dispatch__ = Recorder._dispatch


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Returns the tensors among values, and in lists among them."""
    nested = (value if isinstance(value, list | tuple) else [value] for value in values)
    return [value for value in itertools.chain(*nested) if isinstance(value, Tensor)]


class Recording(NamedTuple):
    """A traced step."""

    graph: Graph
    states: list[Node]
    gradients: dict[str, Node]
    """The gradients of x, u, p (states), i (inputs) and o (blocks of parameters), except zeros."""
    log: list[tuple[object, Place]]
    numbers: list[Number]


def trace(
    step: Callable[..., Any],
    gates: int,
    states: int,
    recurs: bool,
    own: Mapping[str, int],
    inputs: Mapping[str, bool],
    sizes: tuple[int, int],
    known: Recording | None = None,
) -> Recording:
    """Traces a step, the function that `compile_step` gets, with these numbers of rows and units.

    Recognises numbers that depend on hidden_size or, with a known recording of the same step,
    expects the numbers of that recording.

    Raises:
        ValueError: the step does something that programs cannot do.
    """
    recorder = Recorder(*sizes, known)
    leaves: dict[str, Tensor] = {}

    def argument(operand: str, kind: Kind = "r") -> Tensor:
        leaves[operand] = recorder.leaf(operand, kind).requires_grad_()
        return leaves[operand].clone()  # unlike a leaf, it could change in place

    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), recorder:
        sums = [tuple(argument(f"{x}{g}") for g in range(gates)) for x in ("xu" if recurs else "x")]
        previous = [argument(f"p{i}") for i in range(states)]
        named: dict[str, Any] = {}
        for i, (name, is_number) in enumerate(inputs.items()):
            named[name] = argument(f"i{i}", "m" if is_number else "r")
        indices = itertools.count()
        for name, count in own.items():
            blocks = tuple(argument(f"o{next(indices)}", "v") for _ in range(count))
            named[name] = blocks if count > 1 else blocks[0]
        recorder.protect_all()
        try:
            result = step(*sums, *previous, **named)
            results = result if isinstance(result, list | tuple) else [result]
            shapes = [tuple(getattr(tensor, "shape", ())) for tensor in results]
            if shapes != [sizes] * states:
                what = "1 tensor" if states == 1 else f"{states} tensors"
                what += f" (rows, hidden_size), here {sizes}, for states={states}"
                raise rejected(
                    f"the step must return {what}, got {result if result is None else shapes}"
                )
            new = [recorder.blocks_of(tensor)[0] for tensor in results]
            gradients = _gradients(recorder, results, leaves)
        except (IndexError, RuntimeError, TypeError) as error:
            place = _place_of(reversed([*walk_tb(error.__traceback__)]))
            hint = ""
            if not isinstance(error, RuntimeError):
                tuples = "x and u are tuples" if recurs else "x is a tuple"
                hint = f" ({tuples} of gates={gates} tensors)"
            elif not str(error).startswith(("aten.", "the gradient: ", "Boolean value")):
                rows, units = sizes
                hint = f" (traced with {rows} rows and {units} units: sizes must come from shapes)"
            raise rejected(f"{error}{hint}", place) from error
    recorder.log.append(([node.index for node in (*new, *gradients.values())], None))
    return Recording(recorder.graph, new, gradients, recorder.log, recorder.numbers)


def _gradients(
    recorder: Recorder, results: Sequence[Tensor], leaves: Mapping[str, Tensor]
) -> dict[str, Node]:
    """Returns the gradients of leaves, except zeros, for gradients g0, g1 and so on of results."""
    recorder.is_forward = False
    # A sum, because autograd.grad would import sympy for the gradients of several results.
    terms = [(h * recorder.leaf(f"g{i}")).sum() for i, h in enumerate(results)]
    loss = functools.reduce(torch.add, terms)
    if not loss.requires_grad:
        return {}
    stack: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if isinstance(node, BackwardCFunction):
            raise rejected(f"{type(node).__name__}: a step must not use autograd Functions")
        if node not in seen:
            seen.add(node)
            stack += [source for source, _ in node.next_functions]
    found = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    given = {operand: grad for operand, grad in zip(leaves, found, strict=True) if grad is not None}
    return {operand: unstopped(recorder.blocks_of(grad)[0]) for operand, grad in given.items()}
