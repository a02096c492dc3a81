"""Helpers to run a layer with various strides, resets and layouts, and to check its gradients."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from kinds import flat, map_states, tensors_in
from plain import Plain
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)
from torch.utils._pytree import tree_leaves

from namernn_fast.machine import availability
from namernn_fast.testing import assert_within_budget

NO_IDS = (-1, 2**31 - 1)  # token ids out of range, to fill padding
T, B = 9, 13
"""The number of steps, and the number of sequences, in the calls that `calls_of` yields."""


def check_same(actual, expected):
    """Checks that two results are equal: bit for bit from a kernel, else within the error budget.

    The last bits of ATen's products depend on the BLAS library, and on shapes and strides.
    """
    if availability.HAS_EXTENSION:  # tests of paths without a kernel set it to False
        assert torch.equal(actual, expected)
    else:
        assert_within_budget(*({"": values} for values in (actual, expected, expected.double())))


@dataclass(frozen=True)
class Place:
    """Places a tensor in a slice of a larger tensor, with any strides and order of dimensions."""

    order: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, tensor):
        """Returns a copy of `tensor` with these strides, surrounded by NaN or out-of-range ids."""
        dims = range(tensor.dim())
        order = [d for d in self.order if d in dims]
        ends = [self.before[d] + self.stride[d] * tensor.shape[d] for d in dims]
        outside = torch.nan if tensor.is_floating_point() else NO_IDS[0]
        whole = torch.full([ends[d] + self.after[d] for d in order], outside, dtype=tensor.dtype)
        whole = whole.permute([order.index(d) for d in dims])
        part = whole[tuple(slice(self.before[d], ends[d], self.stride[d]) for d in dims)]
        return part.copy_(tensor)


class Pieces:
    """The pieces into which resets divide the sequences of a batch.

    Each piece can run as a separate sequence, because a reset discards the previous state.
    """

    def __init__(self, lengths, reset, states, directions):
        self.rows = []
        begin, end = [], []  # a (forward, backward) pair for each piece
        for b, length in enumerate(lengths):
            cuts = [] if reset is None else reset[:length, b].nonzero().flatten().tolist()
            for first, last in itertools.pairwise(sorted({0, *cuts, length})):
                self.rows.append((b, first, last))
                begin.append((first == 0 and 0 not in cuts, last == length))
                end.append((last == length, first == 0))
        direction = np.arange(states) % directions
        self.begin = np.array(begin, bool).reshape(-1, 2).T[direction]
        """A mask (states, pieces) of the pieces that start from hx instead of a reset."""
        self.end = np.array(end, bool).reshape(-1, 2).T[direction]
        """A mask (states, pieces) of the pieces that end with h_n instead of a reset."""
        self.sequence = np.array([b for b, *_ in self.rows], np.int64)

    def places(self, which):
        """Returns the (state, sequence, piece) indices where `which` (states, pieces) is true."""
        states, pieces = np.nonzero(which)
        return states, self.sequence[pieces], pieces

    @property
    def restarts(self):
        """The (time, sequence, piece) indices of each piece that starts with a reset.

        Only valid for unidirectional layers.
        """
        (pieces,) = np.nonzero(~self.begin[0])
        times = np.array([first for _, first, _ in self.rows], np.int64)
        return times[pieces], self.sequence[pieces], pieces

    def run(self, module, x, states, reset_to=(), beside=None):
        """Runs each piece as a separate sequence, so that the layer need not support resets.

        Args:
            module: The layer.
            x: The input (T, B, ...).
            states: The initial states, as tensors (states, B, features).
            reset_to: The states after resets, if any, as tensors (T, layers, B, features).
            beside: The inputs besides x (T, B, features), by name.

        Returns:
            The output (T, B, ...) and a list of the last states.
        """
        begin = torch.from_numpy(self.begin).unsqueeze(-1)
        initial = [torch.where(begin, h[:, self.sequence], 0.0) for h in states]
        if reset_to:
            times, b, restarted = map(torch.from_numpy, self.restarts)
            initial = [
                h.index_copy(1, restarted, after[times, :, b].transpose(0, 1))
                for h, after in zip(initial, reset_to, strict=True)
            ]

        lengths = torch.tensor([last - first for _, first, last in self.rows], dtype=torch.int64)
        first = torch.tensor([first for _, first, _ in self.rows], dtype=torch.int64)
        times = torch.arange(max(lengths, default=1)).unsqueeze(1)
        exist, sequence = times < lengths, torch.from_numpy(self.sequence)

        def padded(rows):
            rows = rows[(first + times).clamp(max=len(rows) - 1), sequence]
            return torch.where(exist.unsqueeze(-1), rows, 0.0)

        hx = tuple(initial) if len(initial) > 1 else initial[0]
        more = {name: padded(rows) for name, rows in (beside or {}).items()}
        if isinstance(module, Plain):
            outputs, last = module._time_major(padded(x), hx, more, lengths=lengths)
        else:
            x_rows, *more_rows = (
                pack_padded_sequence(rows, lengths, enforce_sorted=False)
                for rows in (padded(x), *more.values())
            )
            outputs, last = module(x_rows, hx, **dict(zip(more, more_rows, strict=True)))
            outputs, _ = pad_packed_sequence(outputs)
        at, b, ended = self.places(self.end)
        final = [h.clone() for h in states]
        for state, piece_states in zip(final, tensors_in(last), strict=True):
            state[at, b] = piece_states[at, ended]
        at, pieces = exist.nonzero(as_tuple=True)
        places = first[pieces] + at, sequence[pieces]
        zeros = x.new_zeros(*x.shape[:2], outputs.shape[-1])
        return zeros.index_put(places, outputs[at, pieces]), final


def tensors_of(results):
    """Returns a layer's output, as a plain tensor, and its last states."""
    output, *states = flat(results)
    if isinstance(output, PackedSequence):
        output = output.data
    elif output.is_nested:
        output = output.values()
    return output, *states


def loss_of(*results):
    """Returns the sum of squares of all results. Its gradient differs for each element."""
    return sum(result.square().sum() for result in results)


def trained(module, x, lengths=None):
    """Runs both passes. Returns the results, then the gradients of the input and the weights."""
    x = x.detach().clone().requires_grad_()
    input = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    results = tensors_of(module(input))
    return [*results, *torch.autograd.grad(loss_of(*results), [x, *module.parameters()])]


def gradients(results, leaves):
    """Returns the gradients of a random weighted sum. All dtypes use the same weights."""
    generator = torch.Generator().manual_seed(1)
    results = tree_leaves(results)
    weights = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return torch.autograd.grad(results, leaves, weights, retain_graph=True, allow_unused=True)


def check_derivatives(run, leaves, fast_mode=False):
    """Checks the first, second, batched and forward-mode derivatives of a float64 function.

    `fast_mode` checks first derivatives only in random directions.
    """
    batched = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(run, leaves, fast_mode=fast_mode, **batched)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, **batched)
    every = tuple(range(len(leaves)))
    gradient = torch.func.grad(lambda *leaves: loss_of(*run(*leaves)), every)
    for function in (run, gradient):
        modes = (torch.func.jacfwd(function, every), torch.func.jacrev(function, every))
        torch.testing.assert_close(*(jacobian(*leaves) for jacobian in modes))


def calls_of(layer, dtype):
    """Yields (name, arguments, keyword arguments) for a call in each layout."""
    generator = torch.Generator().manual_seed(1)
    first = layer.batch_first
    shape = (B, T) if first else (T, B)
    x = torch.randn(*shape, layer.input_size, generator=generator).to(dtype)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    lengths[0] = T
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: len(layer._cell.states)]

    def states(*rows):
        made = tuple(torch.randn(*rows, size, generator=generator).to(dtype) for size in sizes)
        return made if len(made) > 1 else made[0]

    states_of_sequence = layer.num_layers * (2 if layer.bidirectional else 1)
    hx = states(states_of_sequence, B)
    reset = torch.rand(shape, generator=generator) < 0.2
    yield "dense", (x, hx), {}
    yield "zero states", (x,), {}
    yield "reset", (x, hx), {"reset": reset}
    yield "lengths", (x, hx), {"lengths": lengths, "reset": reset}
    if not layer.bidirectional:
        after = states(*shape, states_of_sequence)
        after = map_states(after, lambda s: s if first else s.transpose(1, 2))
        yield "reset_to", (x, hx), {"lengths": lengths, "reset": reset, "reset_to": after}
    yield "packed", (pack_padded_sequence(x, lengths.clamp(min=1), first, False), hx), {}
    sequences = x.unbind(0 if first else 1)
    values = [rows[:length] for rows, length in zip(sequences, lengths, strict=True)]
    yield "jagged", (torch.nested.as_nested_tensor(values, layout=torch.jagged), hx), {}
    one = x[:, :1] if not first else x[:1]
    yield "one sequence", (one,), {}
