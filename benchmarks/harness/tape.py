"""Hands the rounds of a race to pytest-benchmark, which times one function at a time.

The rounds are recorded first and handed over afterwards, using only documented features of
pytest-benchmark: each call is a separate test in its workload's group, with a `Tape` of the
recorded rounds as its clock. So statistics, JSON and comparison tables come from pytest-benchmark,
and every round in the JSON was measured, in seconds per call. Calls are repeated until their rounds
take equally long; the number of repetitions is `iterations` in `extra_info`.
"""

from collections.abc import Iterable, Iterator


class Tape:
    """A clock that replays recorded rounds: each `step` advances it by the next duration."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._rounds: Iterator[float] = iter(())

    def load(self, seconds: Iterable[float]) -> None:
        """Sets the durations that the clock replays from now on."""
        # Six digits are finer than the resolution of any timer here, and keep the raw data small.
        self._rounds = (float(f"{duration:.6g}") for duration in seconds)

    def now(self) -> float:
        return self._shown

    def rewind(self) -> None:
        self._shown = 0.0

    def step(self) -> None:
        """Advances the clock by the next recorded duration."""
        self._shown = next(self._rounds, 0.0)


TAPE = Tape()
