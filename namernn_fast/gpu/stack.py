"""Runs the layers of a stack one by one, or as a pipeline on several streams.

The sequences are split into stretches of steps. A stretch of one layer depends only on the previous
stretch of that layer and on the same stretch of the layer below (above in the backward pass). So
unidirectional layers can run concurrently, one stretch apart, each on a separate stream.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops
from . import launching
from .device import device_of
from .layer import backward_layer, forward_layer, weight_gradients
from .plan import plan_of
from .problem import BackwardTensors, SequenceLayout, Stack

_STRETCH = 128  # Minimum number of steps: the host could not launch shorter stretches fast enough.
_STRETCHES = 8  # Maximum number of stretches.

_Rows = TypeVar("_Rows", Tensor, Tensor | None)


class _Stretch(NamedTuple):
    """A range of consecutive steps of all sequences."""

    layout: SequenceLayout
    begin: int
    """The first row."""
    end: int
    """One past the last row."""

    def of(self, tensor: _Rows) -> _Rows:
        """Returns this stretch's rows of a tensor that holds all rows."""
        if tensor is None or self.end - self.begin == len(tensor):
            return tensor
        return tensor[self.begin : self.end]


def _stretches(stack: Stack, num_layers: int, like: Tensor) -> list[_Stretch]:
    """Returns several stretches if layers can run concurrently, else one stretch of all steps."""
    layout, excluded = stack.layout, ops.BATCH_FIRST | ops.PACKED | ops.JAGGED | ops.BIDIRECTIONAL
    count = 1
    if num_layers > 1 and layout.T >= 2 * _STRETCH and layout.B and not stack.options & excluded:
        plan = plan_of(stack.hidden_size, layout.B, like, stack.directions)
        programs = plan.members * -(-layout.B // plan.block_b)
        if num_layers * programs <= device_of(like).processors:
            count = min(_STRETCHES, layout.T // _STRETCH)
    return _cut(layout, count)


def _cut(layout: SequenceLayout, count: int) -> list[_Stretch]:
    """Splits time-major rows into `count` stretches of nearly equal length."""
    if count == 1:
        return [_Stretch(layout, 0, layout.N)]
    found = []
    for i in range(count):
        first, last = layout.T * i // count, layout.T * (i + 1) // count
        steps, lengths = last - first, layout.lengths
        if lengths is not None:
            lengths = (lengths - first).clamp(0, steps)
        reset = None if layout.reset is None else layout.reset[first:last]
        part = layout._replace(lengths=lengths, reset=reset, T=steps, N=steps * layout.B)
        found.append(_Stretch(part, first * layout.B, last * layout.B))
    return found


class _InTurn:
    """Runs tasks on the current stream, in the order in which they are submitted."""

    def __enter__(self) -> "_InTurn":
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def run(self, layer: int, after: int | None, task: Callable[[], object]) -> None:
        """Runs a task after the latest tasks of layer `layer` and of layer `after`, if any."""
        task()

    def finish(self, task: Callable[[], object]) -> None:
        """Runs a task on the current stream, after all previously submitted tasks."""
        task()


class _AtOnce(_InTurn):
    """Runs the tasks of each layer on a separate stream.

    The programs of all layers must fit on the device at once. A task must write its results into
    tensors that were allocated beforehand on the current stream.
    """

    def __init__(self, like: Tensor, num_layers: int, cooperative: bool):
        self.device, self.cooperative = like.device, cooperative
        self.main = torch.cuda.current_stream(like.device)
        self.streams = _streams(like.device, num_layers)
        self.done: dict[int, torch.cuda.Event] = {}
        self.last: list[Callable[[], object]] = []

    def __enter__(self) -> "_AtOnce":
        if self.cooperative:
            launching.share_turn(self.device, self.main, self.streams)
        for stream in self.streams:
            stream.wait_stream(self.main)
        return self

    def __exit__(self, *raised: object) -> None:
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


def _schedule(stack: Stack, stretches: list[_Stretch], num_layers: int, like: Tensor) -> _InTurn:
    """Returns a scheduler that runs layers concurrently if there are several stretches."""
    if len(stretches) == 1:
        return _InTurn()
    plan = plan_of(stack.hidden_size, stack.layout.B, like, stack.directions)
    return _AtOnce(like, num_layers, plan.members > 1)


def forward_stack(stack: Stack, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Runs the forward pass of a stack.

    Args:
        stack: the stack to run.
        x: the input's rows (N, features), or token ids (N).

    Returns:
        The outputs of all layers, each (N, directions * H), and h_n. With LAST_STATE the last
        layer's output is only scratch memory of its kernel, (2 * B, directions * H).
    """
    layers, like = stack.layers(), stack.weights[0]  # not x, which may be token ids
    stretches = _stretches(stack, len(layers), like)
    width = stack.directions * stack.hidden_size
    ring = len(layers) - 1 if stack.options & ops.LAST_STATE else None
    rows = [2 * stack.layout.B if k == ring else len(x) for k in range(len(layers))]
    outputs = [like.new_empty(count, width) for count in rows]
    h_n = like.new_empty(len(layers) * stack.directions, stack.layout.B, stack.hidden_size)
    into = h_n.chunk(len(layers))
    # Successive stretches alternate between two tensors for their last states, ending with h_n.
    out_of = torch.empty_like(h_n).chunk(len(layers)) if len(stretches) > 1 else into
    if len(stretches) % 2 == 0:
        into, out_of = out_of, into
    with _schedule(stack, stretches, len(layers), like) as schedule:
        for i, stretch in enumerate(stretches):
            for k, (hx, weights) in enumerate(layers):
                task = functools.partial(
                    forward_layer,
                    stack._replace(layout=stretch.layout),
                    x=stretch.of(outputs[k - 1] if k else x),
                    hx=out_of[k] if i else hx,
                    weights=weights,
                    output=outputs[k] if k == ring else stretch.of(outputs[k]),
                    h_n=into[k],
                    ring=k == ring,
                )
                schedule.run(k, k - 1 if k else None, task)
            into, out_of = out_of, into
    return outputs, h_n


def backward_stack(
    stack: Stack,
    x: Tensor,
    outputs: Sequence[Tensor],
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_hx: Tensor | None,
    want_input: bool,
    want_layers: Sequence[int],
) -> tuple[Tensor | None, dict[int, list[Tensor]]]:
    """Runs the backward pass of a stack.

    Args:
        stack, x: as in `forward_stack`.
        outputs: the outputs of all layers, each (N, directions * H).
        grad_output: the gradient of the last layer's output, or None for zeros.
        grad_h_n: the gradient of h_n, or None for zeros.
        grad_hx: receives the gradient of hx, or None if it is not needed.
        want_input: whether the gradient of the input is needed.
        want_layers: the indices of the layers whose weights need gradients.

    Returns:
        The gradient of x, or None if it is not needed; the gradients of weights by layer index.
    """
    layers, like = stack.layers(), stack.weights[0]  # not x, which may be token ids
    lowest = 0 if want_input or grad_hx is not None else min(want_layers, default=len(layers))
    stretches = _stretches(stack, len(layers), like)
    none: Sequence[Tensor | None] = [None] * len(layers)
    grads_hx = none if grad_hx is None else grad_hx.chunk(len(layers))
    grads_h_n = none if grad_h_n is None else grad_h_n.chunk(len(layers))
    states = (len(layers), stack.layout.B, stack.hidden_size)
    # Successive stretches alternate between two tensors for the gradients of states.
    into, out_of = none, none
    if len(stretches) > 1:
        into, out_of = (like.new_empty(states).chunk(len(layers)) for _ in range(2))
    grads: list[Tensor | None] = [*none, grad_output]  # for each layer's input, then for output
    # For each layer: dz, and the previous states (None if `outputs` already holds them).
    work: dict[int, tuple[Tensor, Tensor | None]] = {}
    grad_weights: dict[int, list[Tensor]] = {}

    def finish(k: int) -> None:
        (hx, weights), (dz, previous) = layers[k], work.pop(k)
        grads[k + 1] = None
        if k in want_layers:
            below = outputs[k - 1] if k else x
            grad_weights[k] = weight_gradients(stack, below, hx, weights, outputs[k], dz, previous)

    with _schedule(stack, stretches, len(layers), like) as schedule:
        for i, stretch in reversed(list(enumerate(stretches))):
            is_last = i == len(stretches) - 1
            for k in reversed(range(lowest, len(layers))):
                hx, weights = layers[k]
                if is_last:
                    needs_states = k in want_layers and not stack.layout.consecutive
                    previous_states = torch.empty_like(outputs[k]) if needs_states else None
                    work[k] = torch.empty_like(outputs[k]), previous_states
                    if want_input or k > lowest:
                        grads[k] = torch.empty_like(outputs[k - 1] if k else x)
                if i:
                    hx = outputs[k][stretch.begin - stack.layout.B : stretch.begin].unsqueeze(0)
                dz, previous_states = work[k]
                tensors = BackwardTensors(
                    hx=hx,
                    weights_hh=[direction["weight_hh"] for direction in weights],
                    output=stretch.of(outputs[k]),
                    grad_output=stretch.of(grads[k + 1]),
                    grad_h_n=grads_h_n[k] if is_last else out_of[k],
                    dz=stretch.of(dz),
                    previous_states=stretch.of(previous_states),
                    grad_hx=into[k] if i else grads_hx[k],
                )
                of_stretch = stack._replace(layout=stretch.layout)
                grad_input = stretch.of(grads[k])
                task = functools.partial(backward_layer, of_stretch, weights, tensors, grad_input)
                schedule.run(k, k + 1 if k + 1 < len(layers) else None, task)
                if i == 0:
                    schedule.finish(functools.partial(finish, k))
            into, out_of = out_of, into
    return grads[0], grad_weights
