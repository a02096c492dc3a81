"""Calls of a layer in every layout."""

import torch
from kinds import flat, map_states
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

T, B = 9, 13
"""The numbers of steps and of sequences."""


def tensors_of(results):
    """Returns the tensors in a layer's results."""
    output, *states = flat(results)
    if isinstance(output, PackedSequence):
        output = output.data
    elif output.is_nested:
        output = output.values()
    return output, *states


def calls_of(layer, dtype):
    """Yields a name, the arguments and the keyword arguments of a call for each layout."""
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
