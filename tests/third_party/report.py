"""Formats the report of `run.py`, which compares test outcomes with torch's and fused layers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from suites import Suite

LAYERS = ("torch", "fused")
NO_LONGER = "the test did not run"


@dataclass(frozen=True)
class Result:
    """A suite's outcomes, {layer: {test: {"outcome", "error"}}}, or why the suite did not run."""

    suite: Suite
    outcomes: dict[str, dict[str, dict[str, str]]]
    trouble: str = ""

    def failing(self, layer: str) -> dict[str, str]:
        """Returns {test: first line of its error} for the tests that fail with `layer`.

        A test that ran only with torch's layer counts as a failure with the fused layer.
        """
        ran = self.outcomes.get(layer, {})
        failed = {test: it["error"] for test, it in ran.items() if it["outcome"] == "failed"}
        missing = self.outcomes.get("torch", {}).keys() - ran.keys() if ran else ()
        return failed | dict.fromkeys(missing, NO_LONGER)

    def failing_here_alone(self) -> dict[str, str]:
        """Returns the errors of the tests that fail with the fused layer but not with torch's."""
        theirs = self.failing("torch")
        return {k: v for k, v in self.failing("fused").items() if k not in theirs}


def counts(outcomes: dict[str, dict[str, str]]) -> str:
    """Returns the numbers of passed, failed and skipped tests, as `passed / failed / skipped`."""
    numbers = Counter(it["outcome"] for it in outcomes.values())
    return " / ".join(str(numbers[outcome]) for outcome in ("passed", "failed", "skipped"))


def text_of(results: list[Result], torch_version: str) -> str:
    """Returns the table in Markdown, and a list of tests that fail only with the fused layers."""
    lines = [
        f"With torch {torch_version}, on a CPU. A test is counted if it builds an `nn.RNN`, an "
        "`nn.GRU`, an `nn.LSTM` or a cell of theirs. Numbers are passed / failed / skipped.",
        "",
        "| library | version | tests | torch's layers | fused layers |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for result in results:
        cells = [result.suite.library, result.suite.version]
        if result.trouble:
            cells += ["-", result.trouble, "-"]
        else:
            cells.append(str(len(result.outcomes["torch"])))
            cells += [counts(result.outcomes[layer]) for layer in LAYERS]
        lines.append(f"| {' | '.join(cells)} |")
    found = []
    for result in results:
        for test, error in sorted(result.failing_here_alone().items()):
            path, _, name = test.partition("::")
            error = error.replace("`", "'")
            found.append(f"- {result.suite.library}, `{Path(path).name}::{name}`: `{error}`")
    return "\n".join([*lines, "", *(found or ["No test fails with the fused layers alone."])])
