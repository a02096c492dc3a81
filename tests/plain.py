"""Layers and step modules that run any cell as a plain loop over its `Cell.make_step`.

Tests use these modules as references for cells that torch lacks. The oracle runs them in higher
precision.
"""

import functools

import torch
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from namernn_fast.call import given
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

    def _beside(self, inputs, number):
        """Returns the inputs besides x for each layer and direction; zeros replace missing ones."""
        if not inputs:
            return [[]] * number
        like, *_ = inputs.values()
        of_each = []
        for described in self._cell.inputs:
            size = described.features(self.hidden_size)
            rows = inputs.get(described.name)
            if rows is None:
                rows = torch.zeros_like(like.narrow(-1, 0, 1)).expand(*like.shape[:-1], size)
            of_each.append([rows] * number if rows.shape[-1] == size else rows.split(size, -1))
        return [*zip(*of_each, strict=True)]

    def _time_major(self, x, hx, inputs=None, lengths=None):
        """Runs the layer on x (T, B, features). Returns output (T, B, features) and last states.

        `inputs` are the inputs besides x, by name.
        """
        (steps, batch, _), each = x.shape, weights_of(self)
        directions = 2 if getattr(self, "bidirectional", False) else 1
        size_of_h = getattr(self, "proj_size", 0) or self.hidden_size
        sizes = self._cell.state_sizes(size_of_h, self.hidden_size)
        lengths = torch.full((batch,), steps) if lengths is None else lengths
        initial = states_in(hx) or [x.new_zeros(len(each), batch, size) for size in sizes]
        beside = self._beside(inputs or {}, len(each))
        last = []
        for k, (weights, states) in enumerate(zip(each, torch.cat([*initial], -1), strict=True)):
            if k % directions == 0:
                rows_of_x, outputs = dropout(x, self.dropout, self.training) if k else x, []
            sums = torch.cat([self._sums(rows_of_x, weights), *beside[k]], -1).unbind()
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

    def forward(self, input, hx=None, **inputs):
        """Returns the next states. The input is a batch of rows or a single row."""
        shape = (1, *[1] * (2 - input.dim()))

        def as_sequence(rows):
            return rows.reshape(*shape, *rows.shape)

        inputs = {name: as_sequence(rows) for name, rows in given(**inputs).items()}
        _, last = self._time_major(as_sequence(input), map_states(hx, as_sequence), inputs)
        return map_states(last, lambda state: state.reshape(*input.shape[:-1], -1))


class PlainLayer(Plain):
    """A mixin that makes fused layers run plain loops on padded, unbatched or packed input."""

    def forward(self, input, hx=None, **inputs):
        """Returns the output and the last states."""
        inputs = given(**inputs)
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input)
            inputs = {name: pad_packed_sequence(rows)[0] for name, rows in inputs.items()}
            output, last = self._time_major(x, hx, inputs, lengths)
            output = pack_padded_sequence(output, lengths, enforce_sorted=False)
            return PackedSequence(output.data, *input[1:]), last
        batch = 0 if self.batch_first and input.dim() == 3 else 1

        def swapped(rows):
            return rows.unsqueeze(1) if input.dim() == 2 else rows.transpose(batch, 1)

        def back(rows):
            return rows.squeeze(1) if input.dim() == 2 else rows.transpose(batch, 1)

        hx = map_states(hx, swapped) if input.dim() == 2 else hx
        inputs = {name: swapped(rows) for name, rows in inputs.items()}
        output, last = self._time_major(swapped(input), hx, inputs)
        return back(output), map_states(last, back) if input.dim() == 2 else last


def plain(module_class, **defaults):
    """Returns a subclass of a fused module that runs plain loops and has these default options."""
    mixin = PlainLayer if issubclass(module_class, torch.nn.RNNBase) else PlainStep
    members = {"__init__": functools.partialmethod(module_class.__init__, **defaults)}
    name = module_class.__name__.replace("Fused", "Plain")
    return type(name, (mixin, module_class), members)
