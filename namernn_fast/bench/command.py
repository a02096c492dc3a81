"""`python -m namernn_fast bench`: races a fused layer against torch's on this machine's CPU."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from .. import advice
from ..cells import ELMAN
from ..explaining import explain
from ..testing import BudgetError
from .cells import DENSE, FORWARD, LAYERS_OF, MODES, PACKED, SIZES, TRAINING, Cell
from .machine import cpu_name
from .plot import Points, Timings, draw, speed_up, speed_ups
from .race import QUICK, Call, Rounds, TimeBudget, keep_freed_memory, race
from .tables import duration, markdown, ratio
from .workload import CLASSES, Input, gated_calls, rows_of_oracle

SECONDS = 45.0
"""The default time for the rounds of all cells together; the checks add a quarter to that."""
BATCHES = (1, 16, 256)
SHAPES = ((64, 64, 8), (64, 256, 8), (128, 128, 128), (512, 512, 32))
PACKED_SHAPE = (64, 256)
LENGTHS = (2, 12)
"""The minimum and maximum length of a packed sequence: those of most surnames."""
CELLS = tuple(
    Cell(family, mode, batch, *shape)
    for family, shapes in ((DENSE, SHAPES), (PACKED, (PACKED_SHAPE,)))
    for shape in shapes
    for batch in BATCHES
    for mode in MODES
)
"""The cells of `nn.RNN`; `--cell` times another layer with the same sizes."""

DISAGREEMENT = 1.5
"""How many times the best round a median is if the rounds of a call disagree."""
WIDTH = 40
"""The width of the progress line, in characters."""

Results = dict[Cell, dict[str, Rounds]]
"""The rounds of each layer in each cell."""


def add_parser(commands: Any) -> None:
    """Adds this command to the subparsers of `python -m namernn_fast`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="race FusedRNN, FusedGRU or FusedLSTM against torch's layer on the CPU of this "
        "machine, in about a minute",
        description="Check the results of FusedRNN, or of the layer that --cell chooses, against "
        "the error budget of namernn_fast.testing, then time it and torch's layer in alternation, "
        "in one process. Nothing is timed if a check fails. No file is written without --plot or "
        f"--json. Sizes: {SIZES}.",
    )
    parser.add_argument(
        "--cell", choices=LAYERS_OF, default=ELMAN.name, help="layer to race (default: %(default)s)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=_positive,
        default=SECONDS,
        metavar="S",
        help="time for the rounds of all cells, without the checks (default: %(default)g)",
    )
    length.add_argument(
        "--quick", action="store_true", help="only small cells and few short rounds, as a test"
    )
    parser.add_argument(
        "--threads",
        type=_threads,
        default=None,
        metavar="N",
        help=f"number of torch threads (default: torch's own, here {torch.get_num_threads()})",
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw a plot (matplotlib)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every round, as JSON")
    parser.set_defaults(run=run, parser=parser)


def _threads(text: str) -> int:
    """The argparse type of `--threads`."""
    try:
        if 0 < (threads := int(text)) <= 4096:
            return threads
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 4096")


def _positive(text: str) -> float:
    """The argparse type of `--seconds`."""
    try:
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def run(options: argparse.Namespace) -> None:
    """Runs the checks and the benchmark, prints a report and writes files as requested.

    Raises:
        BudgetError: a result of the fused layer exceeds its error budget.
        ModuleNotFoundError: a plot is requested, but matplotlib is not installed.
        OSError: a file cannot be written.
        SystemExit: a path is invalid (argparse, code 2).
    """
    _check_paths(options)
    with _settled(options.threads):
        facts = advice.gather()  # now, before this program itself causes load
        cells = [dataclasses.replace(cell, kind=options.cell) for cell in CELLS]
        cells = [cell for cell in cells if cell.is_small or not options.quick]
        described = machine(options.cell)
        print(described)
        calls = check(cells)
        fused = LAYERS_OF[options.cell].fused
        print(f"Results of {fused} are within the error budget in all {len(cells)} cells.\n")
        budget = QUICK if options.quick else TimeBudget(options.seconds / len(cells))
        results = measure(calls, budget)
        if options.quick:
            print("A quick run only shows that it works: do not rely on these times.\n")
        elif advice.is_busy(facts):
            print("The machine was busy with other programs: do not rely on these times.\n")
        if disagree(results):
            print("Rounds of one call took very different times: these are the best rounds.\n")
        print(report(results))
        for text in advice.advise(facts):
            print("\n" + advice.wrapped(text))
        title = f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
    if options.json is not None:
        options.json.write_text(_json(results, described), encoding="utf-8")
    if options.plot is not None:
        legend = "(D, H, T):\ninput features,\nhidden units,\ntime steps"
        times = _times(results)
        compared = [*dict.fromkeys(cell.layers for cell in times)]
        draw(title, _panels(times), legend, compared).savefig(options.plot, dpi=150)


def _check_paths(options: argparse.Namespace) -> None:
    """Checks, before a minute of timing, that the output files can probably be written."""
    for path in (options.plot, options.json):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            options.parser.error(f"{str(path)!r} is not a file path in an existing folder")
    if options.plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if options.plot.suffix[1:].lower() not in kinds:
        options.parser.error(
            f"--plot {str(options.plot)!r} must end with one of {', '.join(sorted(kinds))}"
        )


@contextmanager
def _settled(threads: int | None) -> Iterator[None]:
    """Sets the threads, and puts the process in the state of one that has run for a long time."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    keep_freed_memory()
    # Garbage collection stays on, as in a user's program, but freezing keeps it from walking all of
    # torch's objects while a round is timed.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def machine(kind: str) -> str:
    """Describes the measured system in one line: processor, threads, torch, path of the layer."""
    _, fused = CLASSES[kind]
    path = explain(fused(1, 1), torch.zeros(1, 1, 1)).path
    return (
        f"{cpu_name()}, {os.cpu_count()} processors, {torch.get_num_threads()} thread(s); "
        f"torch {torch.__version__}; {LAYERS_OF[kind].fused} on `{path}`; float32"
    )


def _input(cell: Cell) -> Input:
    """Draws the input of a cell: time-major, or packed with lengths drawn from `LENGTHS`."""
    generator = torch.Generator().manual_seed(1)
    if cell.seq_len is not None:
        return torch.randn(cell.seq_len, cell.batch, cell.input_size, generator=generator)
    least, greatest = LENGTHS
    lengths = torch.randint(least, greatest + 1, (cell.batch,), generator=generator)
    padded = torch.randn(greatest, cell.batch, cell.input_size, generator=generator)
    return pack_padded_sequence(padded, lengths, enforce_sorted=False)


def check(cells: Iterable[Cell]) -> dict[Cell, dict[str, Call]]:
    """Checks all cells against the error budget and returns the calls of both layers in each.

    Raises:
        BudgetError: a result exceeds its budget; the message names the cell.
    """
    calls = {}
    for cell in _with_progress(cells, "checked"):
        rows = rows_of_oracle(cell) if cell.family == DENSE else None
        try:
            calls[cell] = gated_calls(cell, _input(cell), rows)
        except BudgetError as error:
            raise BudgetError(
                f"{cell.layers.fused} is wrong in {cell} ({SIZES}), nothing was timed: {error}"
            ) from error
    return calls


def measure(calls: dict[Cell, dict[str, Call]], budget: TimeBudget) -> Results:
    """Times both layers in alternation and returns their rounds in each cell."""
    results = {}
    for cell in _with_progress(calls, "timed"):
        # Entered once per cell: entering it takes 10% of the time of the shortest calls.
        with torch.inference_mode(cell.mode == FORWARD):
            results[cell] = race(calls[cell], budget)
    return results


def _with_progress(cells: Iterable[Cell], done: str) -> Iterator[Cell]:
    """Yields the cells and shows the progress on a terminal."""
    cells = list(cells)
    is_seen = sys.stderr is not None and sys.stderr.isatty()
    for number, cell in enumerate(cells):
        if is_seen:
            text = f"{number} of {len(cells)} cells {done}"
            print(f"{text:<{WIDTH}}", end="\r", file=sys.stderr, flush=True)
        yield cell
    if is_seen:
        print(" " * WIDTH, end="\r", file=sys.stderr, flush=True)


def disagree(results: Results) -> bool:
    """Returns whether some call took much longer in most of its rounds than in the best of them.

    Other programs then decide what a median is, but hardly what the best round is.
    """
    every = (rounds.seconds for timed in results.values() for rounds in timed.values())
    return any(statistics.median(seconds) > DISAGREEMENT * min(seconds) for seconds in every)


def _times(results: Results) -> Timings:
    """Returns the seconds per call of each layer in each cell.

    They are the medians of the rounds, or the best rounds if rounds disagree.
    """
    chosen = min if disagree(results) else statistics.median
    return {
        cell: {layer: chosen(rounds.seconds) for layer, rounds in timed.items()}
        for cell, timed in results.items()
    }


def _label(cell: Cell) -> str:
    """Returns `(D, H, T)`, see `SIZES`; for packed sequences T is a range."""
    steps = cell.seq_len or "{}..{}".format(*LENGTHS)
    return f"({cell.input_size}, {cell.hidden_size}, {steps})"


def report(results: Results) -> str:
    """Returns the table of times and speed-ups, with their geometric mean and minimum."""
    times = _times(results)
    layers = next(iter(times)).layers
    rows = [["(D, H, T)", "B"]]
    for mode in MODES:
        rows[0] += [f"{mode}: {layers.baseline}", layers.fused, "speed-up"]
    for cell in times:
        twin = dataclasses.replace(cell, mode=TRAINING)
        if cell.mode == FORWARD:
            row = [_label(cell), str(cell.batch)]
            for one in (cell, twin):
                timed = times.get(one)
                if timed is None:
                    row += [""] * 3
                else:
                    row += [duration(timed[layer]) for layer in layers]
                    row.append(ratio(speed_up(one, timed)))
            rows.append(row)
    summaries: Sequence[tuple[str, Callable[[list[float]], float]]] = (
        ("geometric mean", statistics.geometric_mean),
        ("worst", min),
    )
    for name, summary in summaries:
        row = [name, ""]
        for mode in MODES:
            of_mode = {cell: timed for cell, timed in times.items() if cell.mode == mode}
            row += ["", "", ratio(summary(speed_ups(of_mode)))]
        rows.append(row)
    counts = [len(rounds.seconds) for timed in results.values() for rounds in timed.values()]
    kind = "The best" if disagree(results) else "Medians"
    return (
        f"{markdown(rows)}\n\n{SIZES}.\n{kind} of {min(counts)} to {max(counts)} rounds, in which "
        f"the two layers alternate. `{TRAINING}` is a training\nstep with gradients at output and "
        f"the last states; sequences of {'{} to {}'.format(*LENGTHS)} steps are packed."
    )


def _panels(times: Timings) -> dict[str, dict[str, Points]]:
    """Returns the panels of the plot by mode, each with one line per shape."""
    panels: dict[str, dict[str, Points]] = {mode: {} for mode in MODES}
    for cell, timed in times.items():
        panels[cell.mode].setdefault(_label(cell), {})[cell.batch] = speed_up(cell, timed)
    return panels


def _json(results: Results, described: str) -> str:
    """Returns every round, in seconds per call, as a JSON document."""
    rows = [
        dataclasses.asdict(cell) | {"layer": layer} | dataclasses.asdict(rounds)
        for cell, timed in results.items()
        for layer, rounds in timed.items()
    ]
    return json.dumps({"machine": described, "packed_lengths": LENGTHS, "rows": rows}) + "\n"
