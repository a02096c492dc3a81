"""Layers and step modules that run any cell as a plain loop over its `Cell.make_step`.

Tests use these modules as references for cells that torch lacks. The oracle runs them in higher
precision.
"""

import functools

import torch
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from namernn_fast.nn.states import map_states, states_in


def weights_of(module):
    """Returns the weights of a fused layer or step module, grouped by layer and direction."""
    groups = {}
    for name in module._weight_names():
        role, _, place = name.partition("_l")
        groups.setdefault(place, {})[role] = getattr(module, name)
    return [*groups.values()]


class Plain:
    """A mixin for fused modules that computes whole sequences with the cell's step."""

    def _sums(self, x, weights):
        """Returns the input's contribution to the pre-activations."""
        return linear(x, weights["weight_ih"], self._cell.bias_of_input(weights))

    def _make_step(self, weights):
        """Returns the step function of one layer in one direction."""
        nonlinearity = getattr(self, "nonlinearity", "tanh")
        return self._cell.make_step(weights, nonlinearity=nonlinearity, in_place=False)

    def _time_major(self, x, hx, noise=None, lengths=None):
        """Runs the layer on x (T, B, features). Returns output (T, B, features) and last states."""
        (steps, batch, _), each = x.shape, weights_of(self)
        directions = 2 if getattr(self, "bidirectional", False) else 1
        sizes = self._cell.state_sizes(each[0]["weight_hh"].shape[1], self.hidden_size)
        lengths = torch.full((batch,), steps) if lengths is None else lengths
        initial = states_in(hx) or [x.new_zeros(len(each), batch, size) for size in sizes]
        noise = None if noise is None else noise.split(self.hidden_size, -1)
        last = []
        for k, (weights, states) in enumerate(zip(each, torch.cat([*initial], -1), strict=True)):
            if k % directions == 0:
                inputs, outputs = dropout(x, self.dropout, self.training) if k else x, []
            sums = self._sums(inputs, weights)
            sums = (sums if noise is None else torch.cat([sums, noise[k]], -1)).unbind()
            step, rows = self._make_step(weights), [None] * steps
            for t in reversed(range(steps)) if k % directions else range(steps):
                (alive,) = torch.nonzero(lengths > t, as_tuple=True)
                if len(alive) == batch:
                    states = rows[t] = step(sums[t], states)
                    continue
                after = step(sums[t][alive], states[alive])
                rows[t] = torch.zeros_like(states).index_put((alive,), after)
                states = states.index_put((alive,), after)
            outputs.append(torch.stack(rows)[..., : sizes[0]])
            last.append(states)
            x = torch.cat(outputs, -1)
        last = torch.stack(last).split(sizes, -1)
        return x, last if len(last) > 1 else last[0]


class PlainStep(Plain):
    """A mixin that makes fused step modules run the cell's step instead of the kernel."""

    def forward(self, input, hx=None, noise=None):
        """Returns the next states. The input is a batch of rows or a single row."""
        shape = (1, *[1] * (2 - input.dim()))

        def as_sequence(rows):
            return rows.reshape(*shape, *rows.shape)

        noise = None if noise is None else as_sequence(noise)
        _, last = self._time_major(as_sequence(input), map_states(hx, as_sequence), noise)
        return map_states(last, lambda state: state.reshape(*input.shape[:-1], -1))


class PlainLayer(Plain):
    """A mixin that makes fused layers run plain loops on padded, unbatched or packed input."""

    def forward(self, input, hx=None, noise=None):
        """Returns the output and the last states."""
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input)
            noise = None if noise is None else pad_packed_sequence(noise)[0]
            output, last = self._time_major(x, hx, noise, lengths)
            output = pack_padded_sequence(output, lengths, enforce_sorted=False)
            return PackedSequence(output.data, *input[1:]), last
        batch = 0 if self.batch_first and input.dim() == 3 else 1

        def swapped(rows):
            return rows.unsqueeze(1) if input.dim() == 2 else rows.transpose(batch, 1)

        def back(rows):
            return rows.squeeze(1) if input.dim() == 2 else rows.transpose(batch, 1)

        hx = map_states(hx, swapped) if input.dim() == 2 else hx
        noise = None if noise is None else swapped(noise)
        output, last = self._time_major(swapped(input), hx, noise)
        return back(output), map_states(last, back) if input.dim() == 2 else last


def plain(module_class, **defaults):
    """Returns a subclass of a fused module that runs plain loops and has these default options."""
    mixin = PlainLayer if issubclass(module_class, torch.nn.RNNBase) else PlainStep
    members = {"__init__": functools.partialmethod(module_class.__init__, **defaults)}
    name = module_class.__name__.replace("Fused", "Plain")
    return type(name, (mixin, module_class), members)
