"""A stack of layers, one after the other or at the same time."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .device import device_of
from .layer import Rows, Stack, backward_layer, forward_layer, weight_gradients
from .plan import configuration

# A stretch of steps of one layer waits for that stretch of the layer below, backward above, and for
# the stretch before of its own. So layers of one direction can run at the same time, a stretch
# apart, each on a stream of its own.

_STRETCH = 128  # steps, at least: fewer take less time than launching them
_STRETCHES = 8  # at most


class _Stretch(NamedTuple):
    rows: Rows
    begin: int
    """Its first row."""
    end: int

    def of(self, tensor: Tensor | None) -> Tensor | None:
        """Its part of all rows."""
        if tensor is None or self.end - self.begin == len(tensor):
            return tensor
        return tensor[self.begin : self.end]


def _stretches(stack: Stack, num_layers: int, like: Tensor) -> list[_Stretch]:
    """One of all steps, unless there are layers that can run at the same time."""
    rows, uneven = stack.rows, ops.BATCH_FIRST | ops.PACKED | ops.JAGGED | ops.BIDIRECTIONAL
    count = 1
    if num_layers > 1 and rows.T >= 2 * _STRETCH and rows.B and not stack.options & uneven:
        config = configuration(stack.hidden_size, rows.B, like, stack.directions)
        programs = config.members * -(-rows.B // config.block_b)
        if num_layers * programs <= device_of(like).processors:
            count = min(_STRETCHES, rows.T // _STRETCH)
    return _cut(rows, count)


def _cut(rows: Rows, count: int) -> list[_Stretch]:
    """Time-major rows in stretches of as many steps, give or take one."""
    if count == 1:
        return [_Stretch(rows, 0, rows.N)]
    found = []
    for i in range(count):
        first, last = rows.T * i // count, rows.T * (i + 1) // count
        steps, lengths = last - first, rows.lengths
        if lengths is not None:
            lengths = (lengths - first).clamp(0, steps)
        reset = None if rows.reset is None else rows.reset[first:last]
        part = rows._replace(lengths=lengths, reset=reset, T=steps, N=steps * rows.B)
        found.append(_Stretch(part, first * rows.B, last * rows.B))
    return found


class _InTurn:
    """Runs tasks on the stream that there is, in the order in which they come."""

    def __enter__(self):
        return self

    def __exit__(self, *raised) -> None:
        pass

    def run(self, layer: int, after: int | None, task: Callable[[], object]) -> None:
        """Behind the last task of this layer, and that of the layer `after`."""
        task()

    def finish(self, task: Callable[[], object]) -> None:
        """Behind all tasks so far; its memory is that of the stream that there is."""
        task()


class _AtOnce(_InTurn):
    """Runs tasks on a stream for each layer. What they leave must not be allocated in them."""

    def __init__(self, like: Tensor, num_layers: int):
        self.main = torch.cuda.current_stream(like.device)
        self.streams = _streams(like.device, num_layers)
        self.done: dict[int, torch.cuda.Event] = {}
        self.last: list[Callable[[], object]] = []

    def __enter__(self):
        for stream in self.streams:
            stream.wait_stream(self.main)
        return self

    def __exit__(self, *raised) -> None:
        for stream in self.streams:
            self.main.wait_stream(stream)
        if raised == (None, None, None):
            for task in self.last:
                task()

    def run(self, layer: int, after: int | None, task: Callable[[], object]) -> None:
        stream = self.streams[layer]
        if after is not None:
            stream.wait_event(self.done[after])
        with torch.cuda.stream(stream):
            task()
        self.done[layer] = stream.record_event()

    def finish(self, task: Callable[[], object]) -> None:
        self.last.append(task)


@functools.cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]


def _lanes(stretches: list[_Stretch], num_layers: int, like: Tensor) -> _InTurn:
    return _AtOnce(like, num_layers) if len(stretches) > 1 else _InTurn()


def forward_stack(stack: Stack, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs of all layers (rows, directions * hidden_size), and h_n."""
    layers = list(stack.layers())
    stretches = _stretches(stack, len(layers), x)
    outputs = [x.new_empty(len(x), stack.directions * stack.hidden_size) for _ in layers]
    h_n = x.new_empty(len(layers) * stack.directions, stack.rows.B, stack.hidden_size)
    into = h_n.chunk(len(layers))
    # The states between stretches go from one tensor to the other, and end in h_n.
    out_of = torch.empty_like(h_n).chunk(len(layers)) if len(stretches) > 1 else into
    if len(stretches) % 2 == 0:
        into, out_of = out_of, into
    with _lanes(stretches, len(layers), x) as lanes:
        for i, stretch in enumerate(stretches):
            for k, (hx, weights) in enumerate(layers):
                task = functools.partial(
                    forward_layer,
                    stack._replace(rows=stretch.rows),
                    stretch.of(outputs[k - 1] if k else x),
                    out_of[k] if i else hx,
                    weights,
                    stretch.of(outputs[k]),
                    into[k],
                )
                lanes.run(k, k - 1 if k else None, task)
            into, out_of = out_of, into
    return outputs, h_n


def backward_stack(
    stack: Stack, x, outputs, grad_output, grad_h_n, grad_hx, want_input, want_layers
) -> tuple[Tensor | None, dict[int, list[Tensor]]]:
    """The gradients of the input's rows and, by layer, of weights; that of hx into `grad_hx`."""
    layers = list(stack.layers())
    lowest = 0 if want_input or grad_hx is not None else min(want_layers, default=len(layers))
    stretches = _stretches(stack, len(layers), x)
    none = [None] * len(layers)
    # Of the initial and the last states: of all steps, and of a stretch, which hands them on.
    grads_hx = none if grad_hx is None else grad_hx.chunk(len(layers))
    grads_h_n = none if grad_h_n is None else grad_h_n.chunk(len(layers))
    states = (len(layers), stack.rows.B, stack.hidden_size)
    into, out_of = none, none
    if len(stretches) > 1:
        into, out_of = (x.new_empty(states).chunk(len(layers)) for _ in range(2))
    grads = [*none, grad_output]  # of the input of each layer, and of the output
    work: dict[int, tuple[Tensor, Tensor | None]] = {}  # dz, and the states before
    grad_weights = {}

    def finish(k):
        dz, previous = work.pop(k)
        grads[k + 1] = None
        if previous is not None:
            below = outputs[k - 1] if k else x
            grad_weights[k] = weight_gradients(stack, below, layers[k][1], dz, previous)

    with _lanes(stretches, len(layers), x) as lanes:
        for i, stretch in reversed(list(enumerate(stretches))):
            is_last = i == len(stretches) - 1
            for k in reversed(range(lowest, len(layers))):
                hx, weights = layers[k]
                if is_last:
                    previous = torch.empty_like(outputs[k]) if k in want_layers else None
                    work[k] = torch.empty_like(outputs[k]), previous
                    if want_input or k > lowest:
                        grads[k] = torch.empty_like(outputs[k - 1] if k else x)
                if i:
                    hx = outputs[k][stretch.begin - stack.rows.B : stretch.begin].unsqueeze(0)
                dz, previous = work[k]
                task = functools.partial(
                    backward_layer,
                    stack._replace(rows=stretch.rows),
                    hx,
                    weights,
                    stretch.of(outputs[k]),
                    stretch.of(grads[k + 1]),
                    grads_h_n[k] if is_last else out_of[k],
                    stretch.of(dz),
                    stretch.of(previous),
                    into[k] if i else grads_hx[k],
                    stretch.of(grads[k]),
                )
                lanes.run(k, k + 1 if k + 1 < len(layers) else None, task)
                if i == 0:
                    lanes.finish(functools.partial(finish, k))
            into, out_of = out_of, into
    return grads[0], grad_weights
