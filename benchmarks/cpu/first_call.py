"""Times first calls in new processes: `python -m benchmarks.cpu.first_call [--record]`.

Short scripts and test suites wait for the import, the first forward and backward pass, and the
first call of a compiled model. Torch's caches of compiled code are off. `torch.compile` does not
trace `nn.RNN`: it leaves that layer unchanged and compiles the code around the layer.
"""

import os
import statistics
import time
from importlib import import_module
from typing import Any

from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from benchmarks.harness.processes import in_new_process

# A new process imports this module first, so it must not import torch or the layer.
LAYERS = {"nn.RNN": ("torch.nn", "RNN"), "FusedRNN": ("namernn_fast", "FusedRNN")}
STAGES = ("import", "first forward", "first backward", "second forward and backward")
COMPILED_STAGES = ("first compiled forward and backward", "second compiled forward and backward")


def measure(name: str, threads: int) -> dict[str, float]:
    """Returns the seconds of every stage in this process, which must be new."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import torch

    torch.set_num_threads(threads)
    seconds = {}
    mark = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        seconds[stage], mark = now - mark, now

    module, cls = LAYERS[name]
    layer_class = getattr(import_module(module), cls)
    lap(STAGES[0])
    layer, x = layer_class(64, 256), torch.randn(8, 64, 64)
    mark = time.perf_counter()
    output, _ = layer(x)
    lap(STAGES[1])
    output.sum().backward()
    lap(STAGES[2])
    layer(x)[0].sum().backward()
    lap(STAGES[3])
    compiled = torch.compile(lambda x: layer(x)[0].sum())
    for stage in COMPILED_STAGES:
        mark = time.perf_counter()
        compiled(x).backward()
        lap(stage)
    return seconds


def report(document: dict[str, Any]) -> str:
    from namernn_fast.bench.tables import duration, markdown

    found = document["rounds"]
    lines = [["stage", *LAYERS]]
    for stage in (*STAGES, *COMPILED_STAGES):
        medians = (statistics.median(seconds[stage] for seconds in found[name]) for name in LAYERS)
        lines.append([stage, *map(duration, medians)])
    return (
        f"{document['cpu']}, {document['threads']} thread(s); input size 64, hidden size 256, "
        f"sequence length 8, batch size 64. Medians of {min(map(len, found.values()))} new "
        f"processes each. `import` excludes the import of torch.\n\n{markdown(lines)}"
    )


SECTION = Section(PERFORMANCE_TABLES, "first_call", report)


def main() -> None:
    from benchmarks.harness import pages
    from namernn_fast.bench.machine import cpu_name

    options = pages.parse(pages.parser(__doc__, seconds=5.0))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LAYERS}
    for _ in range(1 if options.quick else int(options.seconds)):
        for name, rounds in found.items():
            rounds.append(in_new_process(measure, name, options.threads))
    document = {"cpu": cpu_name(), "threads": options.threads, "rounds": found}
    pages.publish("first_call", document, [SECTION], options.record)


if __name__ == "__main__":
    main()
