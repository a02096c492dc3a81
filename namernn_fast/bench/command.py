"""`python -m namernn_fast bench`: benchmarks a fused layer against torch's layer on this CPU."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import os
import pkgutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from ..cells import CELLS, VANILLA
from ..machine import advice
from ..nn import RecurrentCell, explain
from ..testing import BudgetError
from .machine import cpu_name
from .plot import Points, Timings, draw, speed_up, speed_ups
from .race import QUICK, Rounds, TimeBudget, TimedCall, keep_freed_memory, race
from .tables import duration, markdown, ratio
from .timed_calls import CLASSES, Input, add_cell, gated_calls, rows_of_oracle
from .workloads import DENSE, FORWARD, LAYERS_OF, MODES, PACKED, SIZES, TRAINING, Workload

SECONDS = 45.0
"""The default total time for all rounds, in seconds; checking results takes another 25%."""
BATCHES = (1, 16, 256)
SHAPES = ((64, 64, 8), (64, 256, 8), (128, 128, 128), (512, 512, 32))
PACKED_SHAPE = (64, 256)
LENGTHS = (2, 12)
"""The minimum and maximum length of a packed sequence; most surnames are in this range."""
WORKLOADS = tuple(
    Workload(family, mode, batch, *shape)
    for family, shapes in ((DENSE, SHAPES), (PACKED, (PACKED_SHAPE,)))
    for shape in shapes
    for batch in BATCHES
    for mode in MODES
)
"""The workloads of `nn.RNN`. With `--cell`, another layer is timed with the same sizes."""

DISAGREEMENT = 1.5
"""The rounds of a call disagree if their median exceeds the best round by this factor."""
WIDTH = 40
"""The width of the progress line, in characters."""

Results = dict[Workload, dict[str, Rounds]]
"""The rounds of each layer, by workload."""


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
        "--cell",
        type=_cell,
        default=VANILLA.name,
        metavar="CELL",
        help=f"layer to race: {', '.join(LAYERS_OF)}, or MODULE:NAME for a cell made by "
        "recurrent_cell, which races a loop over its function (default: %(default)s)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=_number(float, "a number above 0", math.inf),
        default=SECONDS,
        metavar="S",
        help="total time for all rounds, without the checks (default: %(default)g)",
    )
    length.add_argument(
        "--quick", action="store_true", help="only small workloads and few short rounds, as a test"
    )
    parser.add_argument(
        "--threads",
        type=_number(int, "a whole number from 1 to 4096", 4097),
        default=None,
        metavar="N",
        help=f"number of torch threads (default: torch's own, here {torch.get_num_threads()})",
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw a plot (matplotlib)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every round, as JSON")
    parser.set_defaults(run=run, parser=parser)


def _cell(text: str) -> str:
    """An argparse type for the name of a cell. Adds a user's cell to the cells to race."""
    if text in LAYERS_OF:
        return text
    module, _, name = text.partition(":")
    try:
        cell = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(LAYERS_OF)
        wanted = f"one of {known}, nor MODULE:NAME of a cell made by recurrent_cell"
        raise argparse.ArgumentTypeError(f"{text!r} is neither {wanted}: {error}") from None
    if not isinstance(cell, RecurrentCell):
        raise argparse.ArgumentTypeError(f"{text!r} is not a cell made by recurrent_cell")
    add_cell(text, cell)
    return text


def _number(kind: type[int] | type[float], words: str, end: float) -> Callable[[str], float]:
    """Returns an argparse type for numbers above 0 and below `end`; `words` describes them."""

    def parse(text: str) -> float:
        try:
            if 0 < (value := kind(text)) < end:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return parse


def run(options: argparse.Namespace) -> None:
    """Checks the results, runs the benchmark, prints a report and writes the requested files.

    Raises:
        BudgetError: a result of the fused layer exceeds its error budget.
        ModuleNotFoundError: a plot is requested, but matplotlib is not installed.
        OSError: a file cannot be written.
        SystemExit: a path is invalid (exit code 2).
    """
    _check_paths(options)
    with _settled(options.threads):
        facts = advice.gather()  # before the benchmark itself causes load
        workloads = [dataclasses.replace(workload, cell=options.cell) for workload in WORKLOADS]
        if options.cell not in CELLS:  # a loop over a user's function takes padded input only
            workloads = [workload for workload in workloads if workload.family == DENSE]
        workloads = [workload for workload in workloads if workload.is_small or not options.quick]
        described = machine(options.cell)
        print(described)
        calls = check(workloads)
        fused = LAYERS_OF[options.cell].fused
        count = len(workloads)
        print(f"Results of {fused} are within the error budget in all {count} workloads.\n")
        budget = QUICK if options.quick else TimeBudget(options.seconds / count)
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
        compared = [*dict.fromkeys(workload.layers for workload in times)]
        draw(title, _panels(times), legend, compared).savefig(options.plot, dpi=150)


def _check_paths(options: argparse.Namespace) -> None:
    """Checks the output paths, so that a bad path fails before the benchmark runs."""
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

    formats = FigureCanvasBase.get_supported_filetypes()
    if options.plot.suffix[1:].lower() not in formats:
        options.parser.error(
            f"--plot {str(options.plot)!r} must end with one of {', '.join(sorted(formats))}"
        )


@contextmanager
def _settled(threads: int | None) -> Iterator[None]:
    """Sets the number of threads, and prepares the allocator and garbage collector for timing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    keep_freed_memory()
    # Garbage collection stays on, as in a user's program. Freezing all current objects prevents the
    # collector from traversing torch's objects while a round is timed.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def machine(cell: str) -> str:
    """Returns one line with the processor, threads, torch version and kernel path."""
    _, fused = CLASSES[cell]
    path = explain(fused(1, 1), torch.zeros(1, 1, 1)).path
    return (
        f"{cpu_name()}, {os.cpu_count()} processors, {torch.get_num_threads()} thread(s); "
        f"torch {torch.__version__}; {LAYERS_OF[cell].fused} on `{path}`; float32"
    )


def _input(workload: Workload) -> Input:
    """Returns random input for a workload.

    If `seq_len` is None, the input is packed, with lengths in the range `LENGTHS`.
    """
    generator = torch.Generator().manual_seed(1)
    if workload.seq_len is not None:
        return torch.randn(
            workload.seq_len, workload.batch, workload.input_size, generator=generator
        )
    least, greatest = LENGTHS
    lengths = torch.randint(least, greatest + 1, (workload.batch,), generator=generator)
    padded = torch.randn(greatest, workload.batch, workload.input_size, generator=generator)
    return pack_padded_sequence(padded, lengths, enforce_sorted=False)


def check(workloads: Iterable[Workload]) -> dict[Workload, dict[str, TimedCall]]:
    """Checks the results of every workload against the error budget; returns the calls to time.

    Returns:
        For each workload, the calls to torch's layer and to the fused layer, by layer name.

    Raises:
        BudgetError: a result exceeds its budget; the message names the workload.
    """
    calls = {}
    for workload in _with_progress(workloads, "checked"):
        rows = rows_of_oracle(workload) if workload.family == DENSE else None
        try:
            calls[workload] = gated_calls(workload, _input(workload), rows)
        except BudgetError as error:
            raise BudgetError(
                f"{workload.layers.fused} is wrong in {workload} ({SIZES}), "
                f"nothing was timed: {error}"
            ) from error
    return calls


def measure(calls: dict[Workload, dict[str, TimedCall]], budget: TimeBudget) -> Results:
    """Times the calls of each workload in alternating rounds; returns the rounds by layer name."""
    results = {}
    for workload in _with_progress(calls, "timed"):
        # Enter inference mode once per workload: entering it for each call would add 10% to the
        # shortest calls.
        with torch.inference_mode(workload.mode == FORWARD):
            results[workload] = race(calls[workload], budget)
    return results


def _with_progress(workloads: Iterable[Workload], done: str) -> Iterator[Workload]:
    """Yields the workloads; shows progress if standard error is a terminal."""
    workloads = list(workloads)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    for number, workload in enumerate(workloads):
        if is_terminal:
            text = f"{number} of {len(workloads)} workloads {done}"
            print(f"{text:<{WIDTH}}", end="\r", file=sys.stderr, flush=True)
        yield workload
    if is_terminal:
        print(" " * WIDTH, end="\r", file=sys.stderr, flush=True)


def disagree(results: Results) -> bool:
    """Returns whether the median round of any call took much longer than its fastest round.

    Other programs on the machine slow down the median round, but hardly the fastest round.
    """
    every = (rounds.seconds for timed in results.values() for rounds in timed.values())
    return any(statistics.median(seconds) > DISAGREEMENT * min(seconds) for seconds in every)


def _times(results: Results) -> Timings:
    """Returns the seconds per call of each layer, by workload.

    Each time is the median of the rounds, or the fastest round if `disagree(results)` is true.
    """
    chosen = min if disagree(results) else statistics.median
    return {
        workload: {layer: chosen(rounds.seconds) for layer, rounds in timed.items()}
        for workload, timed in results.items()
    }


def _label(workload: Workload) -> str:
    """Returns `(input_size, hidden_size, steps)` as text; steps is a range if packed."""
    steps = workload.seq_len or "{}..{}".format(*LENGTHS)
    return f"({workload.input_size}, {workload.hidden_size}, {steps})"


def report(results: Results) -> str:
    """Returns the table of times and speed-ups, with their geometric mean and minimum."""
    times = _times(results)
    layers = next(iter(times)).layers
    rows = [["(D, H, T)", "B"]]
    for mode in MODES:
        rows[0] += [f"{mode}: {layers.baseline}", layers.fused, "speed-up"]
    for workload in times:
        if workload.mode == FORWARD:
            row = [_label(workload), str(workload.batch)]
            for mode in MODES:
                timed = times[dataclasses.replace(workload, mode=mode)]
                row += [duration(timed[layer]) for layer in layers]
                row.append(ratio(speed_up(workload, timed)))
            rows.append(row)
    ratios = [
        speed_ups({workload: timed for workload, timed in times.items() if workload.mode == mode})
        for mode in MODES
    ]
    for name, summary in (("geometric mean", statistics.geometric_mean), ("worst", min)):
        rows.append([name, ""])
        for in_mode in ratios:
            rows[-1] += ["", "", ratio(summary(in_mode))]
    packed = any(workload.family == PACKED for workload in times)
    lengths = f"; sequences of {'{} to {}'.format(*LENGTHS)} steps are packed" if packed else ""
    counts = [len(rounds.seconds) for timed in results.values() for rounds in timed.values()]
    which = "The best" if disagree(results) else "Medians"
    return (
        f"{markdown(rows)}\n\n{SIZES}.\n{which} of {min(counts)} to {max(counts)} rounds, in which "
        f"the two layers alternate. `{TRAINING}` is a training\nstep with gradients at output and "
        f"the last states{lengths}."
    )


def _panels(times: Timings) -> dict[str, dict[str, Points]]:
    """Returns one panel of the plot per mode, with one line per shape."""
    panels: dict[str, dict[str, Points]] = {mode: {} for mode in MODES}
    for workload, timed in times.items():
        points = panels[workload.mode].setdefault(_label(workload), {})
        points[workload.batch] = speed_up(workload, timed)
    return panels


def _json(results: Results, described: str) -> str:
    """Returns a JSON document with the seconds per call of every round."""
    rows = [
        dataclasses.asdict(workload) | {"layer": layer} | dataclasses.asdict(rounds)
        for workload, timed in results.items()
        for layer, rounds in timed.items()
    ]
    return json.dumps({"machine": described, "packed_lengths": LENGTHS, "rows": rows}) + "\n"
