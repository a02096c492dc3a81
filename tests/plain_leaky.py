"""Leaky RNNs in plain loops, to compare the fused modules with, as torch has none."""

import torch
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from namernn_fast import FusedLeakyRNN, FusedLeakyRNNCell

# In tests, leaky modules train their rates by default, so that shared tests check their gradients,
# and forget their states about as fast as the other cells.
for module in (FusedLeakyRNN, FusedLeakyRNNCell):
    module.__init__.__kwdefaults__.update(rate=0.7, train_rate=True)
ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": lambda v: torch.logaddexp(v, torch.zeros_like(v)),
}


def step(nonlinearity, x, noise, states, weights):
    """Returns the next r and v of a batch of rows."""
    weight_ih, weight_hh, *biases, rate = weights
    r, v = states
    a = torch.sigmoid(rate)
    target = linear(x, weight_ih) + linear(r, weight_hh) + sum(b for b in biases if b is not None)
    v = (1 - a) * v + a * target
    v = v if noise is None else v + noise
    return ACTIVATIONS[nonlinearity](v), v


class PlainLeakyCell(FusedLeakyRNNCell):
    """A step of the equation."""

    def forward(self, input, hx=None, noise=None):
        """Returns r and v."""
        size = *input.shape[:-1], self.hidden_size
        hx = (input.new_zeros(size), input.new_zeros(size)) if hx is None else hx
        weights = (getattr(self, name) for name in self._weight_names())
        return step(self.nonlinearity, input, noise, hx, [*weights])


class PlainLeaky(FusedLeakyRNN):
    """A layer whose sequences are padded, unbatched or packed, like the input of torch's layers."""

    def forward(self, input, hx=None, noise=None):
        """Returns output, and the last r and v."""
        x = input
        if packed := isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input)
            noise = None if noise is None else pad_packed_sequence(noise)[0]
        elif x.dim() == 2:
            hx = None if hx is None else [state.unsqueeze(1) for state in hx]
            noise = None if noise is None else noise.unsqueeze(1)
            output, last = self._time_major(x.unsqueeze(1), hx, noise, None)
            return output.squeeze(1), tuple(state.squeeze(1) for state in last)
        elif self.batch_first:
            x, noise = x.transpose(0, 1), None if noise is None else noise.transpose(0, 1)
        output, last = self._time_major(x, hx, noise, lengths if packed else None)
        if packed:
            output = pack_padded_sequence(output, lengths, enforce_sorted=False)
            return PackedSequence(output.data, *input[1:]), last
        return output.transpose(0, 1) if self.batch_first else output, last

    def _time_major(self, x, hx, noise, lengths):
        steps, batch, size = *x.shape[:2], self.hidden_size
        lengths = torch.full((batch,), steps) if lengths is None else lengths
        last, state = [], 0
        for k in range(self.num_layers):
            x, outputs = dropout(x, self.dropout, self.training) if k else x, []
            for d in range(2 if self.bidirectional else 1):
                weights = [getattr(self, name) for name in self._all_weights[state]]
                states = x.new_zeros(2, batch, size).unbind() if hx is None else None
                states = states or (hx[0][state], hx[1][state])
                rows = [None] * steps
                for t in reversed(range(steps)) if d else range(steps):
                    (alive,) = torch.nonzero(lengths > t, as_tuple=True)
                    of_step = None if noise is None else noise[t, alive].split(size, -1)[state]
                    before = [old[alive] for old in states]
                    after = step(self.nonlinearity, x[t, alive], of_step, before, weights)
                    rows[t] = x.new_zeros(batch, size).index_put((alive,), after[0])
                    pairs = zip(states, after, strict=True)
                    states = [old.index_put((alive,), new) for old, new in pairs]
                outputs.append(torch.stack(rows))
                last.append(states)
                state += 1
            x = torch.cat(outputs, -1)
        return x, tuple(map(torch.stack, zip(*last, strict=True)))
