"""The program that `speed` runs for each revision: python -m tools.revisions.stopwatch THREADS

It reads a cell as a line of JSON from standard input, and prints the median time of a call in
seconds, over and over.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from namernn_fast import FusedRNN

WARM_UP_SECONDS, SECONDS = 0.02, 0.1
# The lengths of a packed batch, which are like those of surnames.
MEAN_LENGTH, SPREAD, LONGEST = 7, 2, 20
# Below the 32 MiB up to which glibc keeps freed memory.
LARGEST_KEPT_BYTES = 31 * 2**20


def prepare(
    mode: str, batch: int, input_size: int, hidden_size: int, seq_len: int | None, **_: str
) -> Callable[[], object]:
    """Draws the parameters and the input of a cell, and returns the call that is timed.

    In training, fixed random gradients of `output` and `h_n` do not fade into subnormal numbers.
    """
    torch.manual_seed(0)
    layer = FusedRNN(input_size, hidden_size)
    lengths = (torch.randn(batch) * SPREAD + MEAN_LENGTH).round().clamp(2, LONGEST).long()
    input = torch.randn(seq_len or int(lengths.max()), batch, input_size)
    if seq_len is None:
        input = pack_padded_sequence(input, lengths, enforce_sorted=False)
    if mode == "forward":
        return torch.inference_mode()(lambda: layer(input))
    rows = input.data.shape[:-1] if isinstance(input, PackedSequence) else input.shape[:-1]
    parameters = list(layer.parameters())
    gradients = [torch.randn(*outer, hidden_size) for outer in (rows, (1, batch))]

    def train() -> object:
        for parameter in parameters:
            parameter.grad = None
        output, h_n = layer(input)
        output = output.data if isinstance(output, PackedSequence) else output
        torch.autograd.backward([output, h_n], gradients)
        return output

    return train


def times_of(call: Callable[[], object], seconds: float) -> list[float]:
    """Calls at least once, until the seconds have passed, and returns the time of each call."""
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
    torch.empty(LARGEST_KEPT_BYTES, dtype=torch.uint8)  # glibc keeps blocks of that size from now
    for line in sys.stdin:
        call = None  # frees the previous cell's memory first
        call = prepare(**json.loads(line))
        times_of(call, WARM_UP_SECONDS)
        seconds = statistics.median(times_of(call, SECONDS))
        time.sleep(0.005)  # until the threads of the pool have stopped spinning
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
