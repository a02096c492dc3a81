"""Calls the operators with one changed argument, to find calls that crash.

`python tests/mutated.py COUNT` runs COUNT random calls and reports how many were rejected. To
start at call N, use `--first N`. A child process writes each call to a file before running it, so
that a crash report can show the call.
"""

import argparse
import contextlib
import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from equation_cells import TWINS
from torch.utils._pytree import tree_flatten, tree_map_only

from namernn_fast import ops, prepared_ops
from namernn_fast.cells import CELLS

EQUATIONS = [cell._cell for cell, _ in TWINS.values()]
HUGE = (2**31, 2**32 + 1, 2**40, 2**52, 2**62, 2**62 + 1, 2**63 - 1)
NUMBERS = (*HUGE, -1, -2, -(2**31), -(2**63), 0, 1, 2, 3, 5, 64, 255)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (*DTYPES, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64)
HEADER = range(32, 112, 8)
"""The byte offsets of the integers in the header of packed weights."""
OPERATORS = {
    "forward": ops.forward,
    "backward": ops.backward,
    "forward_prepared": prepared_ops.forward,
    "prepare": prepared_ops.prepare,
    "refresh": prepared_ops.refresh,
    "unpack": prepared_ops.unpack,
    "step": prepared_ops.step,
    "_C.step": prepared_ops.step_directly,
    "_C.step_back": prepared_ops.step_back_directly,
    "cpu_plan": torch.ops.namernn_fast.cpu_plan.default,
    "cpu_terms": torch.ops.namernn_fast.cpu_terms.default,
}
SHAPES_ARE_KNOWN = ("forward", "backward", "forward_prepared", "step")
"""The operators that have fake kernels."""
MOST_BYTES = 8 << 30
"""The memory limit of the child process. It makes huge allocations fail immediately."""
MOST_SECONDS = 60


class Hollow(torch.Tensor):
    """A tensor without memory, which is a wrapper subclass of torch.Tensor."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} called with a tensor that has no memory")


class Stack:
    """A stack of layers with random options, sizes and tensors, for valid calls."""

    def __init__(self, draw: random.Random, operator: str):
        back = operator == "_C.step_back"
        one_layer = back or (operator == "_C.step" and draw.random() < 0.5)
        steps = operator in ("step", "_C.step", "_C.step_back")
        inference = steps or operator not in ("forward", "backward")
        self.prepared, self.cell = None, draw.choice([*CELLS.values(), *EQUATIONS])
        cell = self.cell
        self.dtype = draw.choice(DTYPES)
        self.layers = 1 if one_layer else draw.randint(1, 3)
        self.directions = 1 if steps else draw.randint(1, 2)
        self.D, self.H = draw.choice((0, 1, 4, 33)), draw.choice((1, 2, 5, 17, 40))
        self.has_ids = not one_layer and draw.random() < 0.3
        self.vocabulary = draw.choice((1, 7, 50)) if self.has_ids else 0
        self.T, self.B = draw.choice((1, 2, 7)), draw.choice((0, 1, 3, 9))
        if back:  # which leaves empty tensors to the operator
            self.D, self.B = max(self.D, 1), max(self.B, 1)
        self.layout = "padded" if steps else draw.choice(("padded", "lengths", "packed", "jagged"))
        options = draw.choice((0, ops.MEDIUM_PRECISION, ops.HIGH_PRECISION))
        for bit, allowed in (
            (ops.BIAS, True),
            (ops.BATCH_FIRST, self.layout in ("padded", "lengths")),
            (ops.BATCH_INVARIANT, True),
            (ops.PROJECTIONS, cell is CELLS["lstm"] and self.H > 1 and not one_layer),
        ):
            options |= bit if allowed and draw.random() < 0.5 else 0
        options |= draw.choice(
            [0, *(getattr(ops, name.upper()) for name in cell.nonlinearities if name != "tanh")]
        )
        options |= ops.BIDIRECTIONAL if self.directions == 2 else 0
        options |= {"packed": ops.PACKED, "jagged": ops.JAGGED}.get(self.layout, 0)
        if inference and not one_layer and not options & ops.PROJECTIONS and draw.random() < 0.3:
            options |= ops.INT8
            self.dtype = torch.float32
        self.D = 0 if self.has_ids else self.D
        self.P = self.H // 2 if options & ops.PROJECTIONS else self.H
        self.state_sizes = cell.state_sizes(self.P, self.H)
        share = self.has_ids and self.directions == 1 and not options & (ops.PROJECTIONS | ops.INT8)
        self.shares = share and self.dtype.itemsize >= 4 and draw.random() < 0.5
        options |= ops.SHARE_PREFIXES if self.shares else 0
        if operator == "backward" or (operator == "forward" and draw.random() < 0.5):
            options |= ops.WANT_SAVED
        elif not steps and draw.random() < 0.3:
            options |= ops.LAST_STATE
        self.options, self.trees = options, draw.randint(0, 4) if self.shares else 0
        self.sizes = [self.layers, self.D, self.H, self.vocabulary, self.P, 1]
        self.weights = self._weights()
        self._draw_rows(draw)

    def _randn(self, *shape):
        return torch.randn(shape).to(self.dtype)

    def _weights(self):
        weights, rows = [], self.cell.gates * self.H
        for layer in range(self.layers):
            for _ in range(self.directions):
                if layer == 0 and self.has_ids:
                    weights.append(self._randn(self.vocabulary, rows))
                else:
                    features = self.directions * self.P if layer else self.D
                    weights.append(self._randn(rows, features))
                weights.append(self._randn(rows, self.P))
                if self.options & ops.BIAS:
                    weights += [self._randn(rows), self._randn(rows)]
                if self.options & ops.PROJECTIONS:
                    weights.append(self._randn(self.P, self.H))
                weights += [self._randn(self.H) for _ in self.cell.own]
        return weights

    def _draw_rows(self, draw):
        T, B = self.T, self.B  # noqa: N806 - named as in the kernels
        if self.layout == "packed":
            self.B = B = max(B, 1)  # noqa: N806
        lengths = torch.tensor([draw.randint(0, T) for _ in range(B)], dtype=torch.int64)
        if self.layout == "packed":
            lengths = lengths.clamp_min(1)
            lengths[0] = T
        self.sequence_layout, rows = None, [T, B]
        if self.layout in ("padded", "lengths"):
            rows = [B, T] if self.options & ops.BATCH_FIRST else rows
            self.sequence_layout = lengths if self.layout == "lengths" else None
        elif self.layout == "packed":
            self.sequence_layout = torch.stack([(lengths > t).sum() for t in range(T)])
            rows = [int(lengths.sum())]
        else:
            self.sequence_layout = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            rows = [int(lengths.sum())]
        self.input = self.frame(rows)
        self.states, self.reset, self.reset_to, self.inputs = [], None, [], []
        if self.shares:
            return
        self.inputs = self.beside(rows) if draw.random() < 0.5 else []
        if draw.random() < 0.5:
            shape = self.layers * self.directions, B
            self.states = [self._randn(*shape, size) for size in self.state_sizes]
        steps = T if self.layout != "jagged" else int(lengths.max()) if B else 0
        if draw.random() < 0.4:
            by_batch = self.options & ops.BATCH_FIRST
            self.reset = torch.rand((B, steps) if by_batch else (steps, B)) < 0.4
            if self.directions == 1 and draw.random() < 0.5:
                shape = steps, self.layers, B
                self.reset_to = [self._randn(*shape, size) for size in self.state_sizes]

    def frame(self, rows):
        """Returns random ids of shape `rows`, or random features of shape (*rows, D)."""
        if self.has_ids:
            return torch.randint(self.vocabulary, rows)
        return self._randn(*rows, self.D)

    def beside(self, rows):
        """Returns the cell's extra inputs, such as noise, for input of the shape `rows`."""
        return [
            self._randn(*rows, self.layers * self.directions * self.H) for _ in self.cell.inputs
        ]

    def prepare(self, more_options=0):
        """Returns the packed weights."""
        cell, options = self.cell, self.options | more_options
        return prepared_ops.prepare(cell.number, self.weights, self.sizes, options, cell.program)


def arguments_of(draw: random.Random, operator: str) -> dict[str, Any]:
    """Returns random valid arguments of an operator, by name."""
    if operator == "cpu_plan":
        names = "input_size", "hidden_size", "num_layers", "threads", "l2_bytes", "weight_blocks"
        numbers = dict(zip(names, (8, 64, 3, 4, 2**20, 3), strict=True))
        numbers["backward"] = draw.random() < 0.5
        return {"batch_sizes": [draw.randint(1, 9)] * draw.randint(1, 90), **numbers}
    if operator == "cpu_terms":
        names = "steps", "sequences", "rows", "hidden_size"
        return {"options": ops.BIAS | ops.HIGH_PRECISION, **dict.fromkeys(names, 128)}
    stack = Stack(draw, operator)
    cell = {"cell": stack.cell.number}
    rest = {"sizes": stack.sizes, "options": stack.options, "program": stack.cell.program}
    call = cell | {"input": stack.input}
    rows = {"sequence_layout": stack.sequence_layout, "reset": stack.reset}
    lists = ops.Lists(stack.states, stack.reset_to, stack.inputs, stack.weights)
    if operator == "forward_prepared":
        lists = lists._replace(weights=[stack.prepare()])
    tensors, options = lists.joined(stack.options)
    rows |= {"options": options, "trees": stack.trees}
    program = {"program": stack.cell.program}
    call |= {"tensors": [*tensors]}
    match operator:
        case "forward":
            return call | rows | program
        case "backward":
            output, last, saved = ops.forward(**call, **rows, **program)
            grads = [None if draw.random() < 0.2 else torch.randn_like(state) for state in last]
            wanted = [draw.random() < 0.7 and not stack.has_ids]
            for _ in (*stack.states, *stack.reset_to, *stack.inputs):
                wanted.append(draw.random() < 0.7)
            results = {"output": output, "saved": saved}
            results["grad_output"] = None if stack.shares else torch.randn_like(output)
            results |= {"grad_last_states": grads, "wanted": wanted}
            layers = [k for k in range(stack.layers) if draw.random() < 0.7]
            return call | rows | results | {"want_layers": layers} | program
        case "prepare":
            return cell | {"weights": stack.weights} | rest
        case "refresh":
            return {"prepared": stack.prepare()} | cell | {"weights": stack.weights} | rest
        case "unpack":
            return {"prepared": stack.prepare()} | cell | rest
        case "forward_prepared":
            return call | {"sizes": stack.sizes} | rows | program
        case "_C.step_back":
            return step_back_arguments(draw, stack)
    return step_arguments(draw, operator, stack)


def step_back_arguments(draw: random.Random, stack: Stack) -> dict[str, Any]:
    """Returns random valid arguments of `_C.step_back`, by name."""
    cell, B, H = stack.cell, stack.B, stack.H  # noqa: N806 - named as in the kernels
    prepared = draw.random() < 0.5

    def grads_like(tensors, all_or_none=False):
        wanted = [draw.random() < 0.7] * len(tensors) if all_or_none else None
        wanted = wanted or [draw.random() < 0.7 for _ in tensors]
        pairs = zip(tensors, wanted, strict=True)
        return [torch.empty_like(tensor) if want else None for tensor, want in pairs]

    frame, inputs = stack.frame([B]), stack.beside([B]) if draw.random() < 0.5 else []
    rows = [stack._randn(B, H) for _ in cell.states]
    states = rows if draw.random() < 0.5 else []
    sums, own = stack._randn(B, cell.sums * H), stack.weights[len(stack.weights) - len(cell.own) :]
    of_weights = grads_like([sums, *own] if prepared else stack.weights, True)
    gradients = [grads_like([frame]), grads_like(states, True), grads_like(inputs), of_weights]
    call = {"weights": [stack.prepare(ops.FOR_BACKWARD)] if prepared else stack.weights}
    call |= {"states": states, "frame": frame, "inputs": inputs}
    call |= {"saved": stack._randn(B, (1 + cell.kept) * H), "grads": rows, "gradients": gradients}
    call |= {"options": stack.options | ops.FOR_BACKWARD * prepared, "cell": cell.number}
    return call | {"program": cell.program}


def step_arguments(draw: random.Random, operator: str, stack: Stack) -> dict[str, Any]:
    """Returns random valid arguments of `step` or `_C.step`, by name."""
    is_stream = operator == "step" or draw.random() < 0.5 or stack.layers > 1
    is_stream |= stack.has_ids
    prepared = operator == "step" or stack.layers > 1 or stack.has_ids or draw.random() < 0.5
    prepared |= bool(stack.options & (ops.PROJECTIONS | ops.INT8))
    sequences = stack.B if operator == "step" else max(stack.B, 1)
    size = (stack.layers, sequences) if is_stream else (sequences,)
    dtype = torch.float32 if is_stream and stack.dtype.itemsize == 2 else stack.dtype
    states = [torch.randn(*size, count).to(dtype) for count in stack.state_sizes]
    places = None
    if is_stream and sequences and draw.random() < 0.5:
        places = draw.sample(range(sequences), draw.randint(1, sequences))
    count = sequences if places is None else len(places)
    rows = [count]
    if is_stream and draw.random() < 0.5:
        rows = [count, stack.T] if stack.options & ops.BATCH_FIRST else [stack.T, count]
    frame = stack.frame(rows)
    inputs = stack.beside(rows) if draw.random() < 0.5 else []
    if operator == "step":
        places = None if places is None else torch.tensor(places)
        call = {"cell": stack.cell.number, "prepared": stack.prepare(), "states": states}
        call |= {"input": frame, "rows": places, "inputs": inputs, "options": stack.options}
        return call | {"program": stack.cell.program}
    last = None if is_stream else [torch.empty_like(state) for state in states]
    output = torch.empty(*rows, stack.P, dtype=stack.dtype) if is_stream else None
    weights = [stack.prepare()] if prepared else stack.weights
    call = {"weights": weights, "states": states, "last": last, "frame": frame, "output": output}
    call |= {"rows": places, "options": stack.options, "cell": stack.cell.number}
    return call | {"inputs": inputs or None, "program": stack.cell.program, "saved": None}


def corrupted(draw: random.Random, prepared: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Changes the header of packed weights. Returns a description of the change, and a copy."""
    prepared = prepared.clone()
    place, number = draw.choice((*HEADER, 0, 16)), draw.choice(NUMBERS)
    data = prepared.view(torch.uint8)[place : place + 8]
    data.copy_(torch.tensor([number]).view(torch.uint8))
    return f"{number} at byte {place}", prepared


def changed_values(draw: random.Random, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Changes one value of a tensor. Returns a description of the change, and a copy."""
    tensor = tensor.clone()
    number = torch.nan if tensor.is_floating_point() else draw.choice(NUMBERS)
    place = draw.randrange(tensor.numel())
    tensor.view(-1)[place] = number if tensor.dtype != torch.int8 else number % 127
    return f"{number} at {place}", tensor


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a tensor, with its storage resized to 0 bytes."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def huge(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with a huge shape but at most one element in memory."""
    shape = [*tensor.shape]
    for _ in range(draw.randint(1, 2)):
        shape[draw.randrange(len(shape))] = draw.choice(HUGE)
    if draw.random() < 0.5:
        shape[draw.randrange(len(shape))] = 0
    return tensor.new_zeros(()).expand(shape)


TENSOR_CHANGES = {
    "dtype": lambda draw, t: t.to(draw.choice(OTHER_DTYPES)),
    "meta": lambda draw, t: t.to("meta"),
    "flat": lambda draw, t: t.flatten(),
    "unsqueezed": lambda draw, t: t.unsqueeze(draw.randint(0, t.dim())),
    "squeezed": lambda draw, t: t[0],
    "a number": lambda draw, t: t.new_zeros(()),
    "shorter": lambda draw, t: t.narrow(draw.randrange(t.dim()), 0, 1),
    "empty": lambda draw, t: t.narrow(draw.randrange(t.dim()), 0, 0),
    "longer": lambda draw, t: torch.cat([t, t], draw.randrange(t.dim())),
    "transposed": lambda draw, t: t.transpose(0, -1),
    "strided": lambda draw, t: torch.stack([t, t], -1)[..., 0],
    "column-major": lambda draw, t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "repeated": lambda draw, t: t.new_zeros(()).expand(t.shape),
    "huge": huge,
    "sparse": lambda draw, t: t.to_sparse(),
    "sparse CSR": lambda draw, t: t.to_sparse_csr(),
    "nested": lambda draw, t: torch.nested.nested_tensor([t]),
    "hollow": lambda draw, t: Hollow(t),
    "zeros": lambda draw, t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "lost": lambda draw, t: without_memory(t),
    "negated": lambda draw, t: torch._neg_view(t),
    "None": lambda draw, t: None,
    "no tensor": lambda draw, t: 1.5,
}


def mutated(draw: random.Random, name: str, value: Any, options: int) -> tuple[str, Any]:
    """Changes an argument at random. Returns a description of the change, and the new value."""
    if isinstance(value, torch.Tensor):
        if name == "prepared" and draw.random() < 0.6:
            return corrupted(draw, value)
        if value.numel() and draw.random() < (0.3 if value.dtype == torch.int64 else 0.05):
            return changed_values(draw, value)
        # With ids or LAST_STATE, a huge number of steps would be accepted and run forever.
        endless = name in ("input", "frame") and (options & ops.LAST_STATE or ops.has_ids(value))
        while True:
            change = draw.choice([*TENSOR_CHANGES])
            if not (endless and change == "huge"):
                with contextlib.suppress(RuntimeError, IndexError, ValueError, NotImplementedError):
                    return change, TENSOR_CHANGES[change](draw, value)
    if isinstance(value, bool):
        return "inverted", not value
    if isinstance(value, int):
        change = draw.choice((1 << draw.randrange(20), None))
        number = draw.choice(NUMBERS) if change is None else value ^ change
        return f"{value} to {number}", number
    if value is None:
        other = draw.choice((0, [], torch.zeros(3), [torch.zeros(3)], torch.zeros(2, 3) > 0))
        return "given", other
    if isinstance(value, str):
        others = (None, "", value[:-9], draw.choice(EQUATIONS).program)
        return "another program", draw.choice(others)
    value, place = [*value], draw.randrange(len(value) + 1)
    if place == len(value) or draw.random() < 0.3:
        change = draw.choice(("None", "empty", "doubled", "shortened", "a number", "reversed"))
        return change, {
            "None": None,
            "empty": [],
            "doubled": value + value,
            "shortened": value[:-1],
            "a number": 1,
            "reversed": value[::-1],
        }[change]
    # `_C.step` takes packed weights as a list of one tensor.
    is_prepared = name == "weights" and len(value) == 1
    change, value[place] = mutated(draw, "prepared" if is_prepared else name, value[place], options)
    return f"[{place}] {change}", value


def described(value: Any) -> Any:
    """Returns a short description of an argument, such as a tensor's dtype and shape."""
    if isinstance(value, torch.Tensor):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            text = f"{str(value.dtype)[6:]} {tuple(value.shape)}"
            if value.layout == torch.strided and not value.is_contiguous():
                text += f" strides {value.stride()}"
            return text
        return "a tensor"
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    return value if isinstance(value, (int, type(None))) else str(value)


def check_shapes(operator: str, arguments: dict[str, Any], results: Any) -> None:
    """Checks that results have the same shapes and dtypes as the results of the fake kernel."""
    has_states = arguments["options"] & ops.STATES or "states" in arguments
    if arguments["options"] & ops.PACKED and not has_states:
        return  # the fake kernel does not know the number of sequences
    # Use meta tensors, because FakeTensorMode would import the compiler, which takes seconds.
    meta = tree_map_only(
        torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), arguments
    )
    expected = OPERATORS[operator](*meta.values())
    got, wanted = (
        [(result.dtype, tuple(result.shape)) for result in tree_flatten(values)[0]]
        for values in (results, expected)
    )
    assert got == wanted


def run_call(number: int, announce: Any) -> str:
    """Runs a valid call, then the same call with one change. Returns the second call's outcome."""
    draw = random.Random(number)
    torch.manual_seed(number)
    operator = draw.choice(SHAPES_ARE_KNOWN if draw.random() < 0.5 else [*OPERATORS])
    arguments = arguments_of(draw, operator)
    valid = [*copy.deepcopy(arguments).values()]
    accepted = OPERATORS[operator](*valid)
    assert accepted is not False or operator[:3] != "_C.", "a valid step was rejected"
    name = draw.choice([*arguments])
    options = arguments.get("options", 0)
    change, value = mutated(draw, name, arguments[name], options)
    text = {"operator": operator, "argument": name, "change": change}
    arguments[name] = value
    text |= {"arguments": {name: described(value) for name, value in arguments.items()}}
    announce(number, text)
    try:
        results = OPERATORS[operator](*arguments.values())
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, MemoryError) as e:
        message = re.sub(r"\d+", "#", str(e).split("\n")[0])
        return f"rejected: {type(e).__name__}: {message}"
    if operator[:3] == "_C." and not results:
        return "rejected: left to the operator"
    if operator in SHAPES_ARE_KNOWN:
        check_shapes(operator, arguments, results)
    return "accepted"


def run_child(first: int, last: int, path: str) -> None:
    """Runs calls. Writes the current call to a file, and each outcome to standard output."""
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # ASan reserves terabytes
        import resource  # not on Windows

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, resource.RLIM_INFINITY))
    torch.set_num_threads(2)
    with open(path, "w") as file, torch.no_grad():

        def announce(number, call):
            file.seek(0)
            file.truncate()
            json.dump({"number": number} | call, file)
            file.flush()

        for number in range(first, last):
            signal.alarm(MOST_SECONDS)
            announce(number, {"operator": "still valid"})
            try:
                outcome = run_call(number, announce)
            except Exception as error:
                outcome = f"failed: {type(error).__name__}: {error}"
            print(json.dumps([number, outcome]), flush=True)


def run(first: int, count: int) -> tuple[Counter, list[str]]:
    """Runs calls in child processes. Returns the count of each outcome, and a list of faults."""
    outcomes: Counter = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        path, end = str(Path(folder, "call.json")), first + count
        while first < end:
            command = [sys.executable, "-W", "ignore", __file__]
            command += ["--child", str(first), str(end), path]
            child = subprocess.run(command, capture_output=True, text=True)
            lines = [json.loads(line) for line in child.stdout.splitlines() if line[:1] == "["]
            outcomes.update(outcome for _, outcome in lines)
            faults += [f"{number}: {text}" for number, text in lines if text.startswith("failed")]
            first += len(lines)
            if child.returncode:
                call = Path(path).read_text() if Path(path).exists() else "no call"
                error = child.stderr[-2000:]
                faults.append(f"{first}: ended with {child.returncode} in {call}\n{error}")
                first += 1
            elif not lines:
                break
    return outcomes, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        first, last, path = arguments.child
        return run_child(int(first), int(last), path)
    outcomes, faults = run(arguments.first, arguments.count)
    for outcome, times in outcomes.most_common():
        print(f"{times:6} {outcome[:150]}")
    rejected = sum(times for text, times in outcomes.items() if text.startswith("rejected"))
    share = rejected / arguments.count
    print(f"{arguments.count} calls: {share:.1%} rejected, {len(faults)} faults")
    print("\n".join(faults))
    return None


if __name__ == "__main__":
    main()
