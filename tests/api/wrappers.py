"""Wrappers that take plain tensors as input, for tracers and exporters."""

import torch
from layouts import tensors_of
from torch.nn.utils.rnn import PackedSequence


class OnRows(torch.nn.Module):
    """Calls a layer with a packed sequence, given as data and batch_sizes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, data, batch_sizes):
        return tensors_of(self.layer(PackedSequence(data, batch_sizes)))


class WithLengths(torch.nn.Module):
    """Calls `forward` or `last_state` of a layer or model, with lengths."""

    def __init__(self, model, with_output=True):
        super().__init__()
        self.model, self.with_output = model, with_output

    def forward(self, input, lengths):
        run = self.model if self.with_output else self.model.last_state
        return run(input, lengths=lengths)
