"""The program that `speed` runs for each revision: python -m tools.revisions.stopwatch THREADS

For each line of JSON on standard input, which describes a workload, it prints the median time of a
call in seconds.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import namernn_fast
from tools.revisions.probes import LAYERS

WARM_UP_SECONDS, SECONDS = 0.02, 0.1
# The distribution of lengths in a packed batch, similar to the lengths of surnames.
MEAN_LENGTH, SPREAD, LONGEST = 7, 2, 20
# Below 32 MiB, the limit up to which glibc keeps freed memory.
LARGEST_KEPT_BYTES = 31 * 2**20


def prepare(
    mode: str,
    batch: int,
    input_size: int,
    hidden_size: int,
    seq_len: int | None,
    cell: str,
    **_: str,
) -> Callable[[], object]:
    """Draws the parameters and the input of a workload, and returns the call to time.

    In training, all results get fixed random gradients, which do not fade to subnormal numbers.
    """
    torch.manual_seed(0)
    layer = getattr(namernn_fast, LAYERS[cell])(input_size, hidden_size)
    lengths = (torch.randn(batch) * SPREAD + MEAN_LENGTH).round().clamp(2, LONGEST).long()
    input = torch.randn(seq_len or int(lengths.max()), batch, input_size)
    if seq_len is None:
        input = pack_padded_sequence(input, lengths, enforce_sorted=False)
    if mode == "forward":
        return torch.inference_mode()(lambda: layer(input))
    rows = input.data.shape[:-1] if isinstance(input, PackedSequence) else input.shape[:-1]
    parameters = list(layer.parameters())
    outer_sizes = (rows, (1, batch), (1, batch)) if cell == "lstm" else (rows, (1, batch))
    gradients = [torch.randn(*outer, hidden_size) for outer in outer_sizes]

    def train() -> object:
        for parameter in parameters:
            parameter.grad = None
        output, states = layer(input)
        output = output.data if isinstance(output, PackedSequence) else output
        states = states if isinstance(states, tuple) else (states,)
        torch.autograd.backward([output, *states], gradients)
        return output

    return train


def times_of(call: Callable[[], object], seconds: float) -> list[float]:
    """Calls repeatedly for the given seconds, at least once; returns the time of each call."""
    times: list[float] = []
    start = time.perf_counter()
    deadline = start + seconds
    while not times or start < deadline:
        call()
        end = time.perf_counter()
        times.append(end - start)
        start = end
    return times


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    # Once a block of this size has been freed, glibc keeps blocks up to that size.
    torch.empty(LARGEST_KEPT_BYTES, dtype=torch.uint8)
    for line in sys.stdin:
        call = None  # free the previous workload's memory first
        call = prepare(**json.loads(line))
        times_of(call, WARM_UP_SECONDS)
        seconds = statistics.median(times_of(call, SECONDS))
        time.sleep(0.005)  # lets the threads of the pool stop spinning
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
