"""The threading rule past this machine's cores: `python -m benchmarks.threads [--write]`.

Asks the rule what it would choose on machines with more threads, and what its model expects.
Nothing is timed: it is the model's own table.
"""

import argparse

from benchmarks.cpu.peers import SHAPES
from benchmarks.harness.pages import write_section
from benchmarks.harness.paths import PERFORMANCE
from benchmarks.harness.tables import duration, markdown
from namernn_fast.ops import cpu_plan

THREADS = (1, 2, 8, 32, 96)


def table() -> str:
    lines = [["(D, H, T)", "B", *(f"{threads} threads" for threads in THREADS)]]
    for size, hidden, steps, batch in SHAPES:
        line = [f"({size}, {hidden}, {steps})", str(batch)]
        for threads in THREADS:
            plan = cpu_plan([batch] * steps, size, hidden, threads)
            line.append(f"{plan.groups} x {plan.members}, {duration(plan.nanoseconds * 1e-9)}")
        lines.append(line)
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    print(table())
    if options.write:
        write_section(PERFORMANCE, "threads", table())


if __name__ == "__main__":
    main()
