"""`run_in_pieces`, which keeps few values for the backward pass and computes the others again."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import ops
from .call import Call, Path, Results


def run_in_pieces(path: Path, call: Call, steps: int) -> Results:
    """Runs a time-major call of one layer in pieces of at most `steps` time steps.

    Autograd keeps only the states between the pieces. The backward pass runs each piece again
    before it computes the gradients of the piece.

    Raises:
        ValueError: the input is jagged.
    """
    if call.options & ops.JAGGED:
        raise ValueError("recompute does not support jagged input: pad the input and pass lengths=")
    if not call.requires_grad():
        return path(call)
    outputs: list[Tensor] = []
    last: Sequence[Tensor] = ()
    for piece, batch in _pieces(call, steps):
        if last:
            piece.states = [state[:, :batch] for state in last]
        output, *states = checkpoint(path, piece, use_reentrant=False, preserve_rng_state=False)
        outputs.append(output)
        if last and batch < last[0].shape[1]:  # packed sequences that have ended
            ended = [state[:, batch:] for state in last]
            states = [torch.cat(pair, 1) for pair in zip(states, ended, strict=True)]
        last = states
    return torch.cat(outputs), *last


def _pieces(call: Call, steps: int) -> Iterator[tuple[Call, int]]:
    """Yields the pieces of a call with the number of their sequences. All have the first states."""
    layout, reset, row = call.sequence_layout, call.reset, 0
    sizes = layout if layout is not None and call.options & ops.PACKED else None
    length = call.data.shape[0] if sizes is None else len(sizes)
    for start in range(0, length, steps):
        end = min(start + steps, length)
        if sizes is None:
            rows, batch = slice(start, end), call.data.shape[1]
            of_piece = None if layout is None else (layout - start).clamp(0, end - start)
        else:
            of_piece, batch = sizes[start:end], int(sizes[start])
            rows = slice(row, row := row + int(of_piece.sum()))
        piece = replace(
            call,
            data=call.data[rows],
            beside=[values[rows] for values in call.beside],
            sequence_layout=of_piece,
            reset=None if reset is None else reset[start:end, :batch],
            restart_states=[states[start:end, :, :batch] for states in call.restart_states],
        )
        yield piece, batch


def check_recompute(steps: object, bidirectional: bool) -> None:
    """Raises ValueError unless a layer can run in pieces of `steps` steps."""
    if type(steps) is not int or steps < 1:
        raise ValueError(f"recompute must be a positive number of steps or None, got {steps!r}")
    if bidirectional:
        raise ValueError("recompute supports one direction only")
