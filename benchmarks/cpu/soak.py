"""Calls layers from four Python threads for an hour: `python -m benchmarks.cpu.soak [--record]`.

The threads create layers of random sizes, train them, prepare them, and step streams. Every call
is repeated and must give the same bits. Meanwhile the program samples the memory of the process.
"""

import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import namernn_fast as nf
from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from benchmarks.harness.peak import resident_bytes
from benchmarks.harness.study import Document
from benchmarks.report.plots import save
from namernn_fast.bench.plot import COLOURS
from namernn_fast.bench.tables import markdown

CALLERS = 4
SAMPLES = 60
SHOWN = (0.05, 0.25, 0.5, 0.75, 1)
"""The fractions of the run that the table shows. The first samples still load code."""
CALLS_OF_A_LAYER = 50
LAYERS = (
    nf.FusedRNN,
    nf.FusedGRU,
    nf.FusedLSTM,
    nf.FusedLeakyRNN,
    nf.FusedLayerNormGRU,
    nf.FusedLayerNormLSTM,
    nf.FusedSLSTM,
)
INT8 = (nf.FusedRNN, nf.FusedGRU, nf.FusedLSTM)
MEBI = 2**20


def _train(layer: nn.Module, x: Tensor, draw: random.Random) -> Callable[[], Any]:
    lengths = [draw.randint(1, len(x)) for _ in range(x.shape[1])] if draw.random() < 0.5 else None

    def call() -> Tensor:
        layer.zero_grad()
        output = layer(x, lengths=lengths)[0]
        output.sum().backward()
        return output  # type: ignore[no-any-return]

    return call


def _prepared(layer: Any, x: Tensor, draw: random.Random) -> Callable[[], Any]:
    has_int8 = type(layer) in INT8 and x.dtype == torch.float32
    prepared = layer.prepare(torch.int8 if has_int8 and draw.random() < 0.5 else None)
    return lambda: prepared(x)


def _stream(layer: Any, x: Tensor, draw: random.Random) -> Callable[[], Any]:
    stream = layer.prepare().stream(x.shape[1])
    rows = draw.sample(range(x.shape[1]), draw.randint(1, x.shape[1]))

    def call() -> Any:
        stream.reset()
        whole, some = stream(x), stream(x[0, : len(rows)], rows=rows)
        return whole, some, stream.fork().states

    return call


CALLS = (_train, _prepared, _stream)


def soak(seed: int, until: float, counts: list[int], wrong: list[str]) -> None:
    """Calls random layers until a time, and counts the calls in `counts[seed]`.

    Args:
        seed: The number of this thread.
        until: When to end, as in `time.monotonic`.
        counts: The number of calls of each thread.
        wrong: Gets a line for each call that gives other bits when repeated, or that raises.
    """
    draw = random.Random(seed)
    while time.monotonic() < until and not wrong:
        sizes = draw.choice((1, 17, 64, 200)), draw.choice((1, 16, 33, 128, 256))
        steps, batch = draw.randint(1, 40), draw.choice((1, 2, 7, 16, 65))
        dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
        layer = draw.choice(LAYERS)(*sizes).to(dtype)
        kind = draw.choice(CALLS)
        name = f"{kind.__name__[1:]}, {layer}, {dtype}, {steps} steps, batch {batch}"
        try:
            call = kind(layer, torch.randn(steps, batch, sizes[0], dtype=dtype), draw)
            first = tree_leaves(call())
            for _ in range(CALLS_OF_A_LAYER):
                if not all(map(torch.equal, first, tree_leaves(call()))):
                    wrong.append(f"{name}: two calls differ")
                counts[seed] += 1
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")


def measure(seconds: float) -> dict[str, Any]:
    """Runs the threads, and returns the samples of memory and the calls that failed."""
    counts, wrong, samples = [0] * CALLERS, [], []
    started = time.monotonic()
    threads = [
        threading.Thread(target=soak, args=(seed, started + seconds, counts, wrong))
        for seed in range(CALLERS)
    ]
    for thread in threads:
        thread.start()
    for number in range(1, SAMPLES + 1):
        if wrong:
            break
        time.sleep(max(0, started + seconds * number / SAMPLES - time.monotonic()))
        samples.append(
            {
                "seconds": time.monotonic() - started,
                "calls": sum(counts),
                "resident": resident_bytes(),
                "reserved": nf.memory_reserved(),
            }
        )
    for thread in threads:
        thread.join()
    return {"samples": samples, "wrong": wrong}


def report(document: Document) -> str:
    samples = document["samples"]
    lines = [["minutes", "calls", "resident memory (MiB)", "`memory_reserved()` (MiB)"]]
    for fraction in SHOWN:
        sample = samples[math.ceil(fraction * len(samples)) - 1]
        sizes = (f"{sample[key] / MEBI:.0f}" for key in ("resident", "reserved"))
        lines.append([f"{sample['seconds'] / 60:.0f}", f"{sample['calls']:,}", *sizes])
    most = max(sample["reserved"] for sample in samples) / MEBI
    return (
        f"{document['cpu']}, {CALLERS} Python threads, {document['threads']} thread(s) a call. "
        f"At most {most:.0f} MiB were reserved.\n\n{markdown(lines)}"
    )


def draw(document: Document, folder: Path) -> list[Path]:
    """Plots the memory against time."""
    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    minutes = [sample["seconds"] / 60 for sample in document["samples"]]
    for key, colour in zip(("resident", "reserved"), COLOURS, strict=False):
        sizes = [sample[key] / MEBI for sample in document["samples"]]
        axes.plot(minutes, sizes, color=colour, label=key)
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.legend()
    save(figure, path := folder / "soak.png")
    return [path]


SECTION = Section(PERFORMANCE_TABLES, "soak", report)


def main() -> None:
    from benchmarks.harness import pages
    from namernn_fast.bench.machine import cpu_name

    options = pages.parse(pages.parser(__doc__, seconds=3600.0))
    pages.settle(options.threads)
    found = measure(6 if options.quick else options.seconds)
    document = {"cpu": cpu_name(), "threads": options.threads, "samples": found["samples"]}
    pages.publish("soak", document, [SECTION], options.record, found["wrong"], draw)


if __name__ == "__main__":
    main()
