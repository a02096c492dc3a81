"""Shows the plan for machines with more threads than this one: `python -m benchmarks.cpu.threads`.

The table shows the groups x members that the plan in `csrc/plan.cpp` chooses for each number of
threads, and the time that its cost model predicts. Nothing is timed.
"""

from typing import Any

from benchmarks.cpu.peers import SHAPES
from benchmarks.harness import pages
from benchmarks.harness.grid import SIZES
from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from namernn_fast.bench.tables import duration, markdown
from namernn_fast.ops import cpu_plan

THREADS = (1, 2, 8, 32, 96)


def run() -> list[dict[str, Any]]:
    """Gets the plan for every shape and number of threads; returns a row for each shape."""
    rows = []
    for size, hidden, steps, batch in SHAPES:
        plans = [cpu_plan([batch] * steps, size, hidden, threads) for threads in THREADS]
        rows.append(
            {
                "shape": [size, hidden, steps],
                "batch": batch,
                "plans": [[plan.groups, plan.members, plan.nanoseconds] for plan in plans],
            }
        )
    return rows


def report(document: dict[str, Any]) -> str:
    lines = [["(D, H, T)", "B", *(f"{threads} thread(s)" for threads in THREADS)]]
    for row in document["rows"]:
        plans = [
            f"{groups} x {members}, {duration(nanoseconds * 1e-9)}"
            for groups, members, nanoseconds in row["plans"]
        ]
        lines.append([str(tuple(row["shape"])), str(row["batch"]), *plans])
    return f"{SIZES}\n\n{markdown(lines)}"


SECTION = Section(PERFORMANCE_TABLES, "threads", report)


def main() -> None:
    options = pages.parse(pages.parser(__doc__))
    document = {"threads": THREADS, "rows": run()}
    pages.publish("threads", document, [SECTION], options.record)


if __name__ == "__main__":
    main()
