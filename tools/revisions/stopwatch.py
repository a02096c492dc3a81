"""The program that `speed` runs for each revision: times the cells that it is asked for.

A request is a line of JSON on standard input: the name of a cell, and the seconds for which it is
to be called, or 0 to only prepare it. The answer is a line of JSON on standard output: the median
time of a call in seconds, or the expected time if the cell was only prepared. Only the public
interface of the library is used. A call gets fixed random gradients for `output` and `h_n`, which
do not fade into subnormal numbers.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import namernn_fast
from namernn_fast import FusedRNN
from tools.revisions.cells import CELLS, FORWARD, LONGEST, MEAN_LENGTH, SPREAD, Cell

WARM_UP_SECONDS = 0.02
COSTLY = 2e10
"""Multiply-adds of a call from which on a cell is not warmed up."""
# Below the 32 MiB up to which glibc keeps freed memory.
LARGEST_KEPT_BYTES = 31 * 2**20


def draw_input(cell: Cell, generator: torch.Generator) -> Tensor | PackedSequence:
    """Draws the input of a cell."""
    if cell.seq_len:
        return torch.randn(cell.seq_len, cell.batch, cell.input_size, generator=generator)
    lengths = torch.randn(cell.batch, generator=generator) * SPREAD + MEAN_LENGTH
    lengths = lengths.round().clamp(2, LONGEST).long()
    padded = torch.randn(int(lengths.max()), cell.batch, cell.input_size, generator=generator)
    return pack_padded_sequence(padded, lengths, enforce_sorted=False)


def prepare(cell: Cell) -> Callable[[], object]:
    """Draws the parameters and the input of a cell, and returns the call that is timed."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = FusedRNN(cell.input_size, cell.hidden_size)
    input = draw_input(cell, generator)
    if cell.mode == FORWARD:

        def run() -> object:
            with torch.inference_mode():
                return layer(input)

        return run
    rows = input.data.shape[:-1] if isinstance(input, PackedSequence) else input.shape[:-1]
    grad_output = torch.randn(*rows, cell.hidden_size, generator=generator)
    grad_h_n = torch.randn(1, cell.batch, cell.hidden_size, generator=generator)
    parameters = list(layer.parameters())

    def train() -> object:
        for parameter in parameters:
            parameter.grad = None
        output, h_n = layer(input)
        output = output.data if isinstance(output, PackedSequence) else output
        torch.autograd.backward([output, h_n], [grad_output, grad_h_n])
        return output

    return train


def times_of(call: Callable[[], object], seconds: float) -> list[float]:
    """Calls for so many seconds, at least once, and returns the time of each call."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="folder of the library")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    own = Path(namernn_fast.__file__).resolve().parent
    if own != (options.library / "namernn_fast").resolve():
        raise SystemExit(f"the library of {options.library} was wanted, got {own}")
    torch.set_num_threads(options.threads)
    torch.empty(LARGEST_KEPT_BYTES, dtype=torch.uint8)  # glibc keeps blocks of that size from now
    name, call = "", None
    for line in sys.stdin:
        request = json.loads(line)
        if request["cell"] != name:
            call = None  # frees the previous cell's memory first
            name = request["cell"]
            call = prepare(CELLS[name])
        if request["seconds"]:
            answer = statistics.median(times_of(call, request["seconds"]))
        elif CELLS[name].work < COSTLY:
            answer = min(times_of(call, WARM_UP_SECONDS))
        else:
            answer = CELLS[name].work / 1e11
        time.sleep(0.005)  # until the threads of the pool have stopped spinning
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
