"""Hands the rounds of a race to pytest-benchmark, which times one function at a time.

The rounds are recorded first and handed over afterwards, by the documented means of
pytest-benchmark alone: each call has a test of its own in the cell's group, whose clock is a `Tape`
of the recorded rounds. Statistics, JSON and comparison tables are therefore pytest-benchmark's own,
and every round in the JSON is a measured one, in seconds per call. The number of calls in a round
differs between the calls, so that a round of each lasts equally long; it is kept as `iterations` in
`extra_info`.
"""

from collections.abc import Iterable, Iterator


class Tape:
    """A clock that shows recorded durations: a `step` after a `rewind` lasts as its round did."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._rounds: Iterator[float] = iter(())

    def load(self, seconds: Iterable[float]) -> None:
        """Takes the durations that the clock shows from now on."""
        # Six digits are finer than any timer here and keep the raw data small.
        self._rounds = (float(f"{duration:.6g}") for duration in seconds)

    def now(self) -> float:
        """Returns the time that the clock shows."""
        return self._shown

    def rewind(self) -> None:
        """Sets the clock to zero."""
        self._shown = 0.0

    def step(self) -> None:
        """Moves the clock on by the next recorded duration."""
        self._shown = next(self._rounds, 0.0)


TAPE = Tape()
